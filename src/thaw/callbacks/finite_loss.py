"""Stops a run whose loss is not finite, before it can spoil the weights or be reported."""

from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from thaw.run.command_line import setting
from thaw.run.errors import UserError

EVERY = 50  # steps between two checks of the losses on an accelerator


class FiniteLoss(Callback):
    """Raises UserError when a training loss is infinite or NaN, before a checkpoint holds weights that it spoiled.

    On a CPU that is before the loss's gradient is taken. On an accelerator each check makes the host wait: losses are
    checked together every `EVERY` steps, and before weights are validated or saved.

    A gradient may not be finite although its loss is. Weights are therefore checked before they are saved, so that no
    good checkpoint is overwritten. A validation whose loss is not finite chooses no weights.
    """

    def __init__(self) -> None:
        self.batch: Any = None
        self.batch_idx = 0
        self.unchecked: list[tuple[Tensor, Tensor, int, int, int]] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.batch, self.batch_idx = batch, batch_idx

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        if loss.device.type == "cpu" and loss.isfinite():
            return
        place = (trainer.global_step, trainer.current_epoch, self.batch_idx)
        self.unchecked.append((loss.detach(), self.batch.indices, *place))
        if loss.device.type == "cpu" or len(self.unchecked) == EVERY:
            self.check_losses(trainer, pl_module)

    def check_losses(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Raise for the first unchecked loss that is not finite."""
        unchecked, self.unchecked = self.unchecked, []
        finite = torch.stack([loss for loss, *_ in unchecked]).isfinite().tolist() if unchecked else []
        if all(finite):
            return
        loss, images, step, epoch, batch_idx = unchecked[finite.index(False)]
        indices = images.tolist()
        raise UserError(
            f"The loss is {loss.item()} at step {step} (epoch {epoch}, batch {batch_idx}, training images "
            f"{indices[:8]}{' ...' if len(indices) > 8 else ''}). "
            f"Likely cause: {likely_cause(trainer, pl_module)} {way_back(trainer)}"
        )

    on_validation_start = on_train_epoch_end = check_losses

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        loss = trainer.callback_metrics.get("val/loss")
        if loss is not None and not loss.isfinite():
            raise UserError(
                f"The validation loss is {loss.item()} after step {trainer.global_step}, so that its accuracy means "
                f"nothing. Likely cause: {likely_cause(trainer, pl_module)} {way_back(trainer)}"
            )

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Raise before the file is written, whoever saves it."""
        if not_finite(pl_module, only_trained=True):
            raise UserError(
                f"The weights after step {trainer.global_step} are not finite and were not saved, although the losses "
                f"were. Likely cause: {likely_cause(trainer, pl_module)} {way_back(trainer)}"
            )


def not_finite(pl_module: LightningModule, only_trained: bool) -> list[str]:
    """Names of the parameters with values that are not finite, but for those that the model can do without."""
    own = {  # this process's part of a sharded parameter: the other processes may not be here
        name: parameter.to_local() if hasattr(parameter, "to_local") else parameter
        for name, parameter in pl_module.named_parameters()
        if (parameter.requires_grad or not only_trained) and not getattr(pl_module, "is_spare", lambda _: False)(name)
    }
    finite = torch.stack([parameter.isfinite().all() for parameter in own.values()]).tolist() if own else []
    return [name for name, ok in zip(own, finite, strict=True) if not ok]


def way_back(trainer: Trainer) -> str:
    """Where the last good weights are, on disk or held back until the loop ends."""
    held = getattr(trainer.strategy.checkpoint_io, "held", {})  # by PacedCheckpointIO
    callbacks = [each for each in trainer.checkpoint_callbacks if isinstance(each, ModelCheckpoint)]
    for callback in sorted(callbacks, key=lambda each: each.monitor is not None):  # that of the last epoch first
        for path in (callback.last_model_path, callback.best_model_path):
            if path and (path in held or Path(path).is_file()):
                return f"The last good weights are in {path}; continue with {setting('resume', path)} optim.lr=<less>."
    return "No checkpoint was saved before."


def likely_cause(trainer: Trainer, pl_module: LightningModule) -> str:
    """The likely cause, from the state of the model."""
    groups = trainer.optimizers[0].param_groups if trainer.optimizers else [{"lr": 0.0}]
    rate = max(group["lr"] for group in groups)
    shrinks = max(group["lr"] * group.get("weight_decay", 0.0) for group in groups)  # weights by this share
    if shrinks > 1:
        return f"optim.lr times optim.weight_decay is {shrinks:.2g}, and above 1 weights grow at each step; lower them."
    broken = not_finite(pl_module, only_trained=False)
    if broken:
        loaded = [name for name in broken if not pl_module.get_parameter(name).requires_grad or not trainer.global_step]
        if loaded:
            return f"the weights that were loaded are not finite, e.g. {loaded[0]}."
        return f"training diverged ({broken[0]} is not finite); lower optim.lr (now {rate:.1e}) or lengthen the warmup."
    if str(trainer.precision).startswith("16"):
        return f"fp16 overflow; use trainer.precision=bf16-mixed instead of {trainer.precision}."
    return (
        f"activations overflow; lower optim.lr (now {rate:.1e}) or check backbone.mean, backbone.std and the weights."
    )
