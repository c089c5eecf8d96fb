"""Averages of the weights: validated, saved and tested in their place, while training continues."""

from typing import Annotated, Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from pydantic import Field
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from thaw.run.errors import UserError
from thaw.schedule_free import ScheduleFreeAdamW


class AveragedWeights(Callback):
    """Validates, saves and tests an average of the weights, while training continues with the current ones.

    A checkpoint's `state_dict` holds the average, so whoever loads it gets that; `current_weights` holds the weights
    that training resumes with, of averaged tensors only.
    """

    def __init__(self) -> None:
        self.live: dict[str, Tensor] = {}  # the module's own parameters
        self.current: dict[str, Tensor] = {}  # during validation, what `live` held before it
        self.is_average = True  # whether `live` holds the average for good

    def averages(self, trainer: Trainer) -> dict[str, Tensor]:
        """The average of each tensor that has one."""
        raise NotImplementedError

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit" and isinstance(trainer.strategy, ModelParallelStrategy):
            raise UserError(
                "trainer=fsdp cannot average weights, as average=ema and optim=schedulefree do; use trainer=ddp, or "
                "average=none with another optimizer."
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.live, self.current = trained_parameters(pl_module, trainer), {}
        self.is_average = False

    @torch.no_grad()
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.is_average:
            return
        averages = self.averages(trainer)
        self.current = {name: self.live[name].clone() for name in averages}
        for name, tensor in averages.items():
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
        for name, tensor in self.averages(trainer).items():
            self.live[name].copy_(tensor)
        self.is_average = True

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A resumed run that had ended before trains no step: its module holds the average from here on, too."""
        if not self.is_average:
            self.live = trained_parameters(pl_module, trainer)
            self.on_train_end(trainer, pl_module)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        averages = {} if self.is_average else self.averages(trainer)
        if averages:
            state = checkpoint["state_dict"]
            checkpoint["current_weights"] = {name: self.current.get(name, state[name]) for name in averages}
            checkpoint["state_dict"] = state | averages

    @torch.no_grad()
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """A resumed run continues with the current weights; whoever validates or tests stays with the average."""
        if trainer.state.fn != TrainerFn.FITTING or "current_weights" not in checkpoint:
            return
        tensors = dict(pl_module.named_parameters()) | dict(pl_module.named_buffers())
        for name, tensor in checkpoint["current_weights"].items():
            tensors[name].copy_(tensor)
        self.is_average = False


class ScheduleFreeAverage(AveragedWeights):
    """The average that `ScheduleFreeAdamW` keeps of the weights; train.py adds this where optim=schedulefree trains.

    Weights that the optimizer has not updated yet are their own average.
    """

    def __init__(self) -> None:
        super().__init__()
        self.validated: dict[str, Tensor] = {}  # during validation, the average

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if any(isinstance(callback, EMA) for callback in trainer.callbacks):  # type: ignore[attr-defined]
            raise UserError("optim=schedulefree averages the weights itself, and average=ema too; set average=none.")
        super().setup(trainer, pl_module, stage)

    def averages(self, trainer: Trainer) -> dict[str, Tensor]:
        if not self.current:
            (optimizer,) = trainer.optimizers
            assert isinstance(optimizer, ScheduleFreeAdamW)
            averages = optimizer.averages()
            self.validated = {name: averages[tensor] for name, tensor in self.live.items() if tensor in averages}
        return self.validated


class EMA(AveragedWeights):
    """Exponential moving average of the trained weights after every optimizer step (Polyak & Juditsky 1992).

    Validation runs on the average, so `val/acc`, early stopping and best.ckpt are about it.

    Statistics of batch norms are not averaged, as in torch's `AveragedModel`: they are running averages already, and an
    average of them would still remember the first steps of a short run (the convnet on the sample has a validation
    accuracy of 50 % after one epoch so, 73 % otherwise, and 70 % without averaging).

    Ours rather than Lightning's EMAWeightAveraging, which has faults on resume (anemoi-core #1373), tests the current
    weights of a checkpoint after training, and copies the whole module, frozen weights and cached features included.

    Args:
        decay: share that the average keeps at each step, so that it spans about 1 / (1 - decay) steps. At the n-th
            update (from 0) it is at most n / (n + 9), by which a run of few steps soon forgets its first weights. This
            is the warm-up of TensorFlow's ExponentialMovingAverage; timm's ModelEmaV3 has 1 - (1 + n)^(-2/3), which is
            above it in the first 700 updates.
    """

    def __init__(
        self, decay: Annotated[float, Field(gt=0, lt=1, description="e.g. 0.999; average=none switches it off")]
    ) -> None:
        super().__init__()
        self.decay = decay
        self.average: dict[str, Tensor] = {}  # float32 or wider: small steps would vanish in 16 bits
        self.updates = 0
        self.step = 0

    def averages(self, trainer: Trainer) -> dict[str, Tensor]:
        return self.average

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        known = [name for name in self.live if name in self.average]  # earlier checkpoints have norms' statistics
        self.average = {name: self.average[name].to(self.live[name].device) for name in known}
        self.step = trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Comes before a validation after this batch."""
        if trainer.global_step == self.step:  # gradients were accumulated
            return
        self.step = trainer.global_step
        wide = {name: torch.promote_types(tensor.dtype, torch.float32) for name, tensor in self.live.items()}
        live = {name: tensor.detach().to(wide[name]) for name, tensor in self.live.items()}
        if not self.average:
            self.average, self.updates = {name: tensor.clone() for name, tensor in live.items()}, 0
        decay = min(self.decay, self.updates / (self.updates + 9))
        get_ema_multi_avg_fn(decay)(list(self.average.values()), list(live.values()), self.updates)
        self.updates += 1

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        self.average, self.live = {}, {}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(trainer, pl_module, checkpoint)
        if not self.is_average:
            self.average = {name: checkpoint["state_dict"][name] for name in checkpoint["current_weights"]}

    def state_dict(self) -> dict[str, Any]:
        return {"updates": self.updates}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.updates = state_dict["updates"]


def trained_parameters(model: LightningModule, trainer: Trainer) -> dict[str, Tensor]:
    """The parameters that the optimizers know, which are all that will ever train, by their names."""
    groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
    trains = {id(parameter) for group in groups for parameter in group["params"]}
    return {name: parameter for name, parameter in model.named_parameters() if id(parameter) in trains}
