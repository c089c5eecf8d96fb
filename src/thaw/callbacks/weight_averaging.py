"""An average of the weights of past steps: validated, kept in checkpoints and tested, while training goes on."""

from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn


class WeightAveraging(Callback):
    """Averages what trains; a subclass says when, and how much of the average stays.

    Validation runs on the average, so that `val/acc`, early stopping and best.ckpt are about it. A checkpoint's
    `state_dict` holds the average, so that whoever loads it gets that and need not know; `current_weights` holds
    the weights that training goes on with, of averaged tensors only. Until the first update there is no average.

    Lightning's callback of this name differs in what matters here: a test of a checkpoint after training is one of the
    current weights, as it restores them outside of training too; it copies the whole module, frozen weights and kept
    features included; and it needs all of the module's tensors in a checkpoint.
    """

    def __init__(self) -> None:
        self.average: dict[str, Tensor] = {}  # float32 or wider: small steps would vanish in 16 bits
        self.live: dict[str, Tensor] = {}  # the module's own tensors
        self.current: dict[str, Tensor] = {}  # during validation, what `live` held before it
        self.updates = 0
        self.step = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit" and isinstance(trainer.strategy, ModelParallelStrategy):
            raise ValueError("trainer=fsdp cannot average weights; set average=none, or use trainer=ddp.")

    def decay(self, trainer: Trainer) -> float | None:
        """Share that the average keeps at this step, 0 for the first update; None for no update."""
        raise NotImplementedError

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.live = thawed(pl_module, trainer)
        self.average = {name: tensor.to(self.live[name].device) for name, tensor in self.average.items()}
        self.current = {}
        self.step = trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Comes before a validation after this batch."""
        if trainer.global_step == self.step:  # gradients were accumulated
            return
        self.step = trainer.global_step
        if not self.average:
            self.updates = 0
        decay = self.decay(trainer)
        if decay is None:
            return
        live = {name: tensor.detach().to(accurate(tensor)) for name, tensor in self.live.items()}
        if not self.average:
            self.average = {name: tensor.clone() for name, tensor in live.items()}
        get_ema_multi_avg_fn(decay)(list(self.average.values()), list(live.values()), self.updates)
        self.updates += 1

    @torch.no_grad()
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for name, tensor in self.average.items():
            self.current[name] = self.live[name].clone()
            self.live[name].copy_(tensor)

    @torch.no_grad()
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Comes before checkpoints are saved, which Lightning does last."""
        for name, tensor in self.current.items():
            self.live[name].copy_(tensor)
        self.current = {}

    @torch.no_grad()
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The module holds the average from here on."""
        for name, tensor in self.average.items():
            self.live[name].copy_(tensor)
        self.average, self.live = {}, {}

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if self.average:
            state = checkpoint["state_dict"]
            checkpoint["current_weights"] = {name: self.current.get(name, state[name]) for name in self.average}
            checkpoint["state_dict"] = state | self.average

    @torch.no_grad()
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """A run that is resumed goes on with the current weights; whoever validates or tests stays with the average."""
        if trainer.state.fn != TrainerFn.FITTING or "current_weights" not in checkpoint:
            return
        tensors = dict(pl_module.named_parameters()) | dict(pl_module.named_buffers())
        for name, tensor in checkpoint["current_weights"].items():
            self.average[name] = checkpoint["state_dict"][name]
            tensors[name].copy_(tensor)

    def state_dict(self) -> dict[str, Any]:
        return {"updates": self.updates}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.updates = state_dict["updates"]


class EMA(WeightAveraging):
    """Exponential moving average of the weights after every optimizer step (Polyak & Juditsky 1992).

    Args:
        decay: share that the average keeps at each step, so that it spans about 1 / (1 - decay) steps. At the n-th
            update (from 0) it is at most n / (n + 9), by which a run of few steps soon forgets its first weights.

    Raises:
        ValueError: a decay out of its range.
    """

    def __init__(self, decay: float) -> None:
        super().__init__()
        if not 0 < decay < 1:
            raise ValueError(
                f"average.decay={decay} must be above 0 and below 1, e.g. 0.999; average=none switches averaging off."
            )
        self.max_decay = decay

    def decay(self, trainer: Trainer) -> float:
        return min(self.max_decay, self.updates / (self.updates + 9))


class SWA(WeightAveraging):
    """Stochastic weight averaging: the mean of the weights at the ends of the last epochs (Izmailov et al. 2018).

    The learning rate stays the optimizer recipe's; `optim.final_lr_fraction` keeps it up, as the paper does, for
    weights that differ. Statistics of batch norms are averaged like weights, instead of being computed anew.

    Args:
        start: share of all epochs that pass before the first one that counts (algorithm 1 of the paper).

    Raises:
        ValueError: a share out of its range, or a run without a number of epochs.
    """

    def __init__(self, start: float) -> None:
        super().__init__()
        if not 0 <= start < 1:
            raise ValueError(f"average.start={start} must be from 0 to below 1, a share of all epochs, e.g. 0.5.")
        self.start = start

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit" and (trainer.max_epochs is None or trainer.max_epochs < 1):
            raise ValueError(
                f"average=swa averages the last epochs, but trainer.max_epochs={trainer.max_epochs}; set it to a "
                "number of epochs, or choose average=ema."
            )

    def decay(self, trainer: Trainer) -> float | None:
        assert trainer.max_epochs is not None
        if not trainer.is_last_batch or trainer.current_epoch < self.start * trainer.max_epochs:
            return None
        return self.updates / (self.updates + 1)  # equation 1


def accurate(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def thawed(model: LightningModule, trainer: Trainer) -> dict[str, Tensor]:
    """The parameters that the optimizers know, which are all that will ever train, and the norm statistics beside them.

    A buffer belongs to the innermost module around it that has parameters. Counters, and buffers that no checkpoint
    holds, are left out.
    """
    trains = {
        id(parameter)
        for optimizer in trainer.optimizers
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    saved = model.state_dict().keys()
    tensors: dict[str, Tensor] = {name: tensor for name, tensor in model.named_parameters() if id(tensor) in trains}
    for name, buffer in model.named_buffers():
        if name not in saved or not buffer.is_floating_point():
            continue
        place = name
        while place:
            place = place.rpartition(".")[0]
            parameters = list(model.get_submodule(place).parameters())
            if parameters:
                break
        if any(id(parameter) in trains for parameter in parameters):
            tensors[name] = buffer
    return tensors
