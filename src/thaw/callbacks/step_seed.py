"""Random numbers that depend on the step alone, so that resuming needs no saved generator state."""

from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from numpy.random import SeedSequence

from thaw.run.values import Seed


class StepSeed(Callback):
    """Seeds torch before every training batch from (the run's seed, epoch, batch, rank).

    Augmentation, dropout and drop path of a step then draw the same numbers in a resumed run as in an uninterrupted
    one, and different ones on every rank.
    """

    def __init__(self, seed: Seed) -> None:
        self.seed = seed

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        place = (self.seed, trainer.current_epoch, batch_idx, trainer.global_rank)
        seed = int(SeedSequence(place).generate_state(1)[0])
        torch.default_generator.manual_seed(seed)
        device = pl_module.device.type
        if device != "cpu":  # torch.manual_seed would queue a call for each kind of device that was never used
            getattr(torch, device).manual_seed(seed)
