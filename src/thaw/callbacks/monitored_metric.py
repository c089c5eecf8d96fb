"""The metric that callbacks monitor: a mistyped name is found before training; early stopping."""

from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping as LightningEarlyStopping
from torch import Tensor

from thaw.classifier import Classifier
from thaw.run.errors import UserError


class MonitorCheck(Callback):
    """Raises UserError before training for a callback whose `monitor` is not among the metrics of a validation.

    Every classifier logs `val/acc`. For other metrics a validation batch is run first, Lightning's sanity check, which
    leaves the run's random numbers as they are. Metrics of training, `train/...`, are not known before the first epoch.
    """

    def setup(self, trainer: Any, pl_module: LightningModule, stage: str) -> None:
        monitors = {
            str(each.monitor): type(each).__name__ for each in trainer.callbacks if getattr(each, "monitor", None)
        }
        self.monitors = {name: callback for name, callback in monitors.items() if not name.startswith("train/")}
        if isinstance(pl_module, Classifier) and list(self.monitors) == ["val/acc"]:
            return
        if stage == "fit" and self.monitors and not trainer.fast_dev_run:
            trainer.num_sanity_val_steps = max(1, trainer.num_sanity_val_steps)

    def on_sanity_check_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        logged = trainer.callback_metrics
        for monitor, callback in self.monitors.items():
            if monitor not in logged:
                raise UserError(
                    f"monitor={monitor} of {callback} is not logged by a validation; choose from {', '.join(logged)}."
                )


class EarlyStopping(LightningEarlyStopping):
    """Lightning's EarlyStopping, except that the end of an epoch counts only once something was validated.

    A resumed run has the patience of its configuration, where Lightning's has that of the checkpoint, and trains no
    further epoch if that has run out. A missing metric is a UserError.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.wait_count >= max(1, self.patience):
            trainer.should_stop = True

    def _run_early_stopping_check(self, trainer: Trainer) -> None:
        if self.monitor in trainer.callback_metrics or trainer.fit_loop.epoch_loop.val_loop._has_run:
            super()._run_early_stopping_check(trainer)

    def _validate_condition_metric(self, logs: dict[str, Tensor]) -> bool:
        if self.strict and self.monitor not in logs:
            raise UserError(f"monitor={self.monitor} of EarlyStopping is not logged; choose from {', '.join(logs)}.")
        return super()._validate_condition_metric(logs)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict | {"patience": self.patience})
