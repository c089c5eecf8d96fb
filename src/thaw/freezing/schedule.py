"""The callback that applies a classifier's freezing policy: before training, and whenever something thaws."""

import math
from typing import Any

from lightning import Callback, Trainer
from lightning.pytorch.strategies import DDPStrategy

from thaw.freezing.policy import Thaw
from thaw.freezing.table import span
from thaw.run.console import plural, say


class FreezeSchedule(Callback):
    """Sets what trains in the present epoch, see `thaw.freezing.policy.Thaw`."""

    def policy_of(self, pl_module: Any) -> Thaw:
        return pl_module.thaw

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        if stage == "fit":
            pl_module.thaw.check_fresh()
            pl_module.thaw.apply(trainer.current_epoch)

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Only now Lightning knows in which epoch a resumed run continues."""
        thaw = self.policy_of(pl_module)
        if thaw.apply(trainer.current_epoch):
            rebuild_ddp(trainer)
        end = trainer.max_epochs or math.inf
        late = thaw.after(end)
        if late and end > 0 and trainer.is_global_zero:
            say(f"freeze: {len(late)} tensors would thaw after {min(late)} epochs or more; training ends after {end}")

    def on_train_epoch_start(self, trainer: Trainer, pl_module: Any) -> None:
        epoch, thaw = trainer.current_epoch, self.policy_of(pl_module)
        if epoch not in thaw.epochs.values() or not (thawed := thaw.apply(epoch)):
            return
        rebuild_ddp(trainer)
        if trainer.is_global_zero:
            depths = [thaw.depths[name] for name in thawed]
            numbers = sum(pl_module.get_parameter(name).numel() for name in thawed)
            layers = f"depth {span(min(depths), max(depths))}, " if any(thaw.depths.values()) else ""
            say(f"after {plural(epoch, 'epoch')}: {layers}{numbers:,} parameters start to train")


def rebuild_ddp(trainer: Trainer) -> None:
    """DDP averages only the gradients of parameters that trained when it was built: build it again after a thaw."""
    strategy: Any = trainer.strategy
    if isinstance(strategy, DDPStrategy):
        strategy.model = trainer.lightning_module
        strategy.configure_ddp()
