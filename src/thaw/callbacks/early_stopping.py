"""Stops a run that no longer gets better."""

from typing import Any

import lightning.pytorch.callbacks as lightning
from lightning import LightningModule, Trainer
from torch import Tensor


class EarlyStopping(lightning.EarlyStopping):
    """Lightning's EarlyStopping, except that the end of an epoch counts only once something was validated.

    A resumed run has the patience of its configuration, where Lightning's has that of the checkpoint, and trains no
    epoch more if that had run out. That a metric is missing is a ValueError.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.wait_count >= max(1, self.patience):
            trainer.should_stop = True

    def _run_early_stopping_check(self, trainer: Trainer) -> None:
        if self.monitor in trainer.callback_metrics or trainer.fit_loop.epoch_loop.val_loop._has_run:
            super()._run_early_stopping_check(trainer)

    def _validate_condition_metric(self, logs: dict[str, Tensor]) -> bool:
        if self.strict and self.monitor not in logs:
            raise ValueError(f"monitor={self.monitor} of EarlyStopping is not logged; choose from {', '.join(logs)}.")
        return super()._validate_condition_metric(logs)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict | {"patience": self.patience})
