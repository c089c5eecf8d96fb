"""What a test leaves behind: its accuracy with an interval, and where the model errs as pictures and as a list."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed
from lightning import Callback, LightningModule, Trainer
from torch import Tensor

from thaw.data.datamodule import Batch
from thaw.data.images import with_numbers
from thaw.evaluation.errors import WRONG_IMAGES, write_wrong_images
from thaw.evaluation.metrics import accuracy_interval, worst_digits
from thaw.run.loggers import log_image

WORST = 32  # digits shown


class TestReport(Callback):
    """Collects the logits of a test; afterwards `results` holds the numbers, `<run_dir>/report` pictures and list.

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
        parts = (outputs.float(), batch.labels, batch.images, batch.indices)
        self.parts.append(tuple(part.cpu() for part in parts))

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        logits, labels, images, indices = (torch.cat(part) for part in zip(*self.parts, strict=True))
        if trainer.world_size > 1:
            gathered: list[Any] = [None] * trainer.world_size
            torch.distributed.all_gather_object(gathered, (logits, labels, images, indices))
            logits, labels, images, indices = (torch.cat(part) for part in zip(*gathered, strict=True))
        predictions = logits.argmax(dim=1)
        correct, total = int((predictions == labels).sum()), len(labels)
        low, high = accuracy_interval(correct, total)
        self.results = {"test/acc": correct / total, "test/acc_low": low, "test/acc_high": high, "n_test": total}
        if not trainer.is_global_zero:
            return
        from thaw.evaluation.pictures import save_confusion_matrix, save_digits  # matplotlib, only for pictures

        worst = worst_digits(logits, labels, WORST)
        save_confusion_matrix(labels, predictions, logits.shape[1], self.folder / "confusion_matrix.png")
        save_digits(images[worst], logits[worst], labels[worst], "Highest loss first", self.folder / "worst_digits.png")
        names = trainer.datamodule.load().classes  # type: ignore[attr-defined]  # Lightning sets it at run time
        classes = with_numbers(names, logits.shape[1])
        write_wrong_images(indices, logits, labels, classes, self.folder / WRONG_IMAGES)
        for picture in ("confusion_matrix", "worst_digits"):
            log_image(trainer.loggers, f"test/{picture}", self.folder / f"{picture}.png")
