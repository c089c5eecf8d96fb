"""A callback for the test after training: accuracy with its interval, and where the model errs."""

from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor

from thaw.data.loader import Batch
from thaw.evaluation.metrics import accuracy_facts
from thaw.run.errors import UserError
from thaw.run.files import dispensable
from thaw.run.loggers import log_image
from thaw.run.ranks import from_all_ranks
from thaw.task import is_single_label


class FinalTest(Callback):
    """Collects the logits of a test; then `results` holds the accuracy, `<run_dir>/report` figures and
    the predictions.

    Of a task other than one class an image, `results` holds its own metric.
    """

    def __init__(self, run_dir: str) -> None:
        self.folder = Path(run_dir) / "report"
        self.results: dict[str, Any] = {}
        self.parts: list[tuple[Tensor, ...]] = []

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.parts.clear()

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, *_: Any
    ) -> None:
        parts = (outputs.float(), batch.labels, batch.indices)
        self.parts.append(tuple(part.cpu() for part in parts))

    def on_test_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        own = tuple(torch.cat(part) for part in zip(*self.parts, strict=True))
        parts = from_all_ranks(own) if trainer.world_size > 1 else [own]
        logits, labels, indices = (torch.cat(part) for part in zip(*parts, strict=True))
        if broken := int(pl_module.task.probabilities(logits).isnan().any(dim=1).sum()):
            raise UserError(
                f"The model's outputs for {broken:,} of {len(labels):,} test images are not finite, so that no "
                f"accuracy is reported. Likely cause: weights too large for trainer.precision={trainer.precision}."
            )
        if not is_single_label(pl_module.task):
            self.results = {"test/acc": float(pl_module.test_acc.compute()), "n_test": len(labels)}
            return
        listed = trainer.datamodule.load().listed if hasattr(trainer.datamodule, "load") else ()
        places = torch.isin(indices, torch.tensor(listed, dtype=indices.dtype)).nonzero()[:, 0]
        self.results = accuracy_facts(logits, labels, places.tolist())
        if not trainer.is_global_zero:
            return
        from thaw.evaluation.pictures import draw_errors  # matplotlib, only for pictures

        source, reader = trainer.datamodule.load(), getattr(trainer.datamodule, "reader", "photo")
        with dispensable():
            draw_errors(source, logits, indices, reader, self.folder)
            for picture in ("confusion_matrix", "worst_images"):
                log_image(trainer.loggers, f"test/{picture}", self.folder / f"{picture}.png")
