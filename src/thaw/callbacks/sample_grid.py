"""A picture of training images under the run's augmentation."""

from pathlib import Path
from typing import Any

import torch
from lightning import Callback

from thaw.run.files import dispensable
from thaw.run.loggers import log_image
from thaw.run.values import Count


class SampleGrid(Callback):
    """Draws `<run_dir>/report/augmented_images.png` when training with augmentation starts, and logs it.

    Args:
        images: columns: the first so many training images.
        draws: rows below the first, each with new random parameters.
    """

    def __init__(self, run_dir: str, images: Count, draws: int) -> None:
        self.path = Path(run_dir) / "report" / "augmented_images.png"
        self.columns, self.draws = images, draws

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        if not trainer.is_global_zero or not pl_module.augment.is_random:
            return
        from thaw.evaluation.pictures import on_paper, save_contact_sheet  # matplotlib, only for pictures

        images = trainer.datamodule.load().train.images[: self.columns]
        with torch.random.fork_rng():  # a picture must not change the run
            rows = [images, *(pl_module.augment(images) for _ in range(self.draws))]
        shown = [on_paper(row, getattr(trainer.datamodule, "reader", "photo")) for row in rows]
        with dispensable():
            save_contact_sheet(shown, ["as it is", *(f"draw {n + 1}" for n in range(self.draws))], self.path)
            log_image(trainer.loggers, "train/augmented_images", self.path)
