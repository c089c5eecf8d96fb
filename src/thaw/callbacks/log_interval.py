"""Losses and learning rates in the loggers at least once an epoch, however few steps it has."""

from lightning import Callback, LightningModule, Trainer


class LogInterval(Callback):
    """Shortens `trainer.log_every_n_steps` to the optimizer steps of an epoch where these are fewer."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        steps = trainer.num_training_batches / trainer.accumulate_grad_batches  # infinite for a stream
        trainer.log_every_n_steps = int(min(trainer.log_every_n_steps, max(1, steps)))  # type: ignore[attr-defined]
