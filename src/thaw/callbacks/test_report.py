"""What a test leaves behind: its accuracy with an interval, and pictures of where the model errs."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed
from lightning import Callback, LightningModule, Trainer
from torch import Tensor

from thaw.data.datamodule import Batch
from thaw.evaluation.metrics import accuracy_interval, worst_digits
from thaw.loggers import log_image

WORST = 32  # digits shown


class TestReport(Callback):
    """Collects the logits of a test; afterwards `results` holds the numbers, `<run_dir>/report` the pictures.

    Args:
        run_dir: the run's folder.
    """

    __test__ = False  # no pytest class

    def __init__(self, run_dir: str) -> None:
        self.folder = Path(run_dir) / "report"
        self.results: dict[str, Any] = {}
        self.parts: list[tuple[Tensor, ...]] = []

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.parts.clear()

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, *_: Any
    ) -> None:
        self.parts.append((outputs.float().cpu(), batch.labels.cpu(), batch.images.cpu()))

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        logits, labels, images = (torch.cat(part) for part in zip(*self.parts, strict=True))
        if trainer.world_size > 1:
            gathered: list[Any] = [None] * trainer.world_size
            torch.distributed.all_gather_object(gathered, (logits, labels, images))
            logits, labels, images = (torch.cat(part) for part in zip(*gathered, strict=True))
        predictions = logits.argmax(dim=1)
        correct, total = int((predictions == labels).sum()), len(labels)
        low, high = accuracy_interval(correct, total)
        self.results = {"test/acc": correct / total, "test/acc_low": low, "test/acc_high": high, "n_test": total}
        if not trainer.is_global_zero:
            return
        from thaw.evaluation.pictures import save_confusion_matrix, save_digits  # matplotlib, only for pictures

        worst = worst_digits(logits, labels, WORST)
        save_confusion_matrix(labels, predictions, self.folder / "confusion_matrix.png")
        save_digits(images[worst], logits[worst], labels[worst], "Highest loss first", self.folder / "worst_digits.png")
        for picture in ("confusion_matrix", "worst_digits"):
            log_image(trainer.loggers, f"test/{picture}", self.folder / f"{picture}.png")
