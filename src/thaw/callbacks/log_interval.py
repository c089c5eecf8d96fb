"""Losses and learning rates in the loggers at least once an epoch, however few steps it has."""

import math

from lightning import Callback, LightningModule, Trainer


class LogInterval(Callback):
    """Shortens `trainer.log_every_n_steps` to the optimizer steps of an epoch where these are fewer."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        steps = trainer.num_training_batches / trainer.accumulate_grad_batches  # infinite for a stream
        trainer.log_every_n_steps = math.ceil(min(trainer.log_every_n_steps, steps))  # type: ignore[attr-defined]  # set at run time
