"""Finds a mistyped metric before training."""

from typing import Any

from lightning import Callback, LightningModule, Trainer

from thaw.classifier import Classifier


class MonitorCheck(Callback):
    """Raises ValueError before training for a callback whose `monitor` is not among the metrics of a validation.

    Every classifier logs `val/acc`. For other metrics a validation batch is run first, Lightning's sanity check, which
    leaves the run's random numbers as they are. Metrics of training, `train/...`, are not known before the first epoch.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]  # Lightning sets it at run time
        self.monitors = {getattr(callback, "monitor", None): type(callback).__name__ for callback in callbacks}
        unsure = [name for name in self.monitors if name and not str(name).startswith("train/")]
        if isinstance(pl_module, Classifier) and unsure == ["val/acc"]:
            return
        if stage == "fit" and unsure and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            trainer.num_sanity_val_steps = max(1, trainer.num_sanity_val_steps)

    def on_sanity_check_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        logged = trainer.callback_metrics
        for monitor, callback in self.monitors.items():
            if monitor and not monitor.startswith("train/") and monitor not in logged:
                raise ValueError(
                    f"monitor={monitor} of {callback} is not logged by a validation; choose from {', '.join(logged)}."
                )
