"""Parameter groups, the optimizer and the learning-rate schedule."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.util import find_spec
from typing import Annotated, Any, Literal

from lightning import Trainer
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from pydantic import Field
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from thaw.run.console import say
from thaw.run.errors import UserError
from thaw.run.trainer_settings import needs_end
from thaw.run.values import NonNegative, Positive
from thaw.schedule_free import ScheduleFreeAdamW

EMBEDDINGS = (
    *("pos_embed", "cls_token", "reg_token", "dist_token", "mask_token", "relative_position_bias_table"),
    "prompt.tokens",  # of VPT
)
SCALINGS: dict[str, Callable[[int], float]] = {"none": lambda k: 1.0, "linear": float, "sqrt": math.sqrt}


class OptimizerRecipe:
    """How trainable parameters are updated: groups, optimizer, warmup and schedule of the rate, all stepped per batch.

    Args:
        optimizer: torch.optim class with its own settings filled in, called with (groups, lr=, weight_decay=).
        lr: peak learning rate at the top of the model.
        weight_decay: for matrices; 1-D parameters (biases, norms) and embeddings of position or class have none.
        layer_decay: each layer down multiplies the learning rate by this (Clark et al. 2020, section 3.3.2); 1 is off.
        warmup_fraction: share of all steps in which the learning rate rises linearly.
        schedule: how the learning rate falls after the warmup: by a `cosine` (Loshchilov & Hutter 2016), along a
            `linear` line, in `step`s, or not at all (`constant`).
        final_lr_fraction: a cosine or a line ends at this fraction of the peak.
        step_at: shares of all steps; at each of them `schedule=step` multiplies the learning rate by `step_factor`.
        lr_scaling: what a step on k times the images does to the learning rate, k being the number of processes times
            trainer.accumulate_grad_batches: `none`; `linear`, times k (Goyal et al. 2017, section 2.1); `sqrt`, times
            the square root of k (Krizhevsky 2014, section 5).

    Raises:
        UserError: a `final_lr_fraction` that the schedule never reaches.
    """

    def __init__(
        self,
        optimizer: Callable[..., Optimizer],
        lr: Positive,
        weight_decay: NonNegative,
        layer_decay: Annotated[float, Field(gt=0, le=1)],
        warmup_fraction: Annotated[float, Field(ge=0, lt=1)],
        schedule: Literal["cosine", "constant", "linear", "step"],
        final_lr_fraction: Annotated[float, Field(ge=0, le=1)],
        step_at: Annotated[Sequence[Annotated[float, Field(gt=0, lt=1)]], Field(min_length=1)],
        step_factor: Annotated[float, Field(gt=0, lt=1)],
        lr_scaling: Literal["none", "linear", "sqrt"],
    ) -> None:
        self.optimizer, self.lr, self.weight_decay, self.layer_decay = optimizer, lr, weight_decay, layer_decay
        self.warmup_fraction, self.schedule, self.final_lr_fraction = warmup_fraction, schedule, final_lr_fraction
        self.step_at, self.step_factor = step_at, step_factor
        self.lr_scaling = lr_scaling
        if final_lr_fraction and schedule in ("constant", "step"):
            raise UserError(
                f"optim.final_lr_fraction={final_lr_fraction} ends optim.schedule=cosine or linear, not {schedule}; "
                "set it to 0."
            )
        if "timm.optim.kron" in str(getattr(optimizer, "func", "")) and find_spec("opt_einsum") is None:
            raise UserError(
                "optim=kron needs the package opt_einsum, without which a step on a matrix of 192 x 768 asks for 87 "
                "GB: pip install opt_einsum, or choose optim=muon."
            )
        if self.is_schedule_free and schedule != "constant":
            raise UserError(
                f"optim=schedulefree averages the weights in place of lowering the learning rate, and "
                f"optim.schedule={schedule} lowers it; set optim.schedule=constant."
            )

    @property
    def is_schedule_free(self) -> bool:
        return getattr(self.optimizer, "func", self.optimizer) is ScheduleFreeAdamW

    def groups(
        self,
        named_parameters: Iterable[tuple[str, nn.Parameter]],
        depths: Mapping[str, int],
        thaw_epochs: Mapping[str, float],
    ) -> list[dict[str, Any]]:
        """All parameters that will ever train, by depth, thaw epoch and decay: each group has its lr and weight_decay.

        `thaw_epochs` says from which epoch each trains; infinity is never, and a name that is missing trains from 0.
        """
        top = max(depths.values())
        groups: dict[tuple[int, float, bool], dict[str, Any]] = {}
        for name, parameter in named_parameters:
            from_epoch = thaw_epochs.get(name, 0)
            if from_epoch == math.inf:
                continue
            decays = parameter.ndim > 1 and not name.endswith(EMBEDDINGS)
            depth = depths[name]
            label = f"layer{depth}/{'decay' if decays else 'no_decay'}" + (f"/from{from_epoch}" if from_epoch else "")
            new: dict[str, Any] = {
                "params": [],
                "lr": self.lr * self.layer_decay ** (top - depth),
                "weight_decay": self.weight_decay if decays else 0.0,
                "from_epoch": from_epoch,
                "name": label,
                **self.own_settings(decays and depth < top),
            }
            groups.setdefault((depth, from_epoch, decays), new)["params"].append(parameter)
        return list(groups.values())

    def own_settings(self, is_hidden: bool) -> dict[str, Any]:
        """What an optimizer reads beside these; of a group of matrices below the head if `is_hidden`."""
        return {}

    def remark(self, groups: Sequence[Mapping[str, Any]]) -> str:
        """A line to print about the groups, or nothing."""
        return ""

    def build(
        self,
        named_parameters: Iterable[tuple[str, nn.Parameter]],
        depths: Mapping[str, int],
        thaw_epochs: Mapping[str, float],
        trainer: Trainer,
    ) -> OptimizerLRSchedulerConfig:
        """The return value of `LightningModule.configure_optimizers`.

        The optimizer knows from its first step every parameter that will ever train: what is still frozen has no
        gradient, and so is left alone.
        """
        total_steps = trainer.estimated_stepping_batches  # sets up num_training_batches too, if epochs end the run
        if not math.isfinite(total_steps) and (reason := needs_end(self.schedule, self.warmup_fraction)):
            raise UserError(
                f"{reason} needs an end: set trainer.max_epochs to a number (not -1), or add "
                "+trainer.max_steps=<steps>."
            )
        if not math.isfinite(trainer.num_training_batches):  # trainer.max_steps ends it
            trainer.fit_loop.setup_data()
        steps_per_epoch = math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches)
        groups = self.groups(named_parameters, depths, thaw_epochs)
        if trainer.is_global_zero and (remark := self.remark(groups)):
            say(remark)
        scale = self.lr_scale(trainer)
        for group in groups:
            group["lr"] *= scale
        optimizer: Any = self.optimizer(groups, lr=self.lr, weight_decay=self.weight_decay)
        optimizer._step_supports_amp_scaling = False  # gradients are unscaled before they are clipped, fused or not

        def of_group(from_epoch: int) -> Callable[[int], float]:
            return lambda step: self.lr_fraction(step, total_steps, from_epoch * steps_per_epoch)

        scheduler = Schedule(optimizer, [of_group(group["from_epoch"]) for group in groups])
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def lr_scale(self, trainer: Trainer) -> float:
        """By what the rule multiplies every learning rate; says so where that is not 1."""
        ranks, batches = trainer.world_size, trainer.accumulate_grad_batches
        scale = SCALINGS[self.lr_scaling](ranks * batches)
        if scale != 1 and trainer.is_global_zero:
            reason = f"a step is on {ranks} x {batches} batches (processes x trainer.accumulate_grad_batches)"
            say(f"optim.lr_scaling={self.lr_scaling}: learning rates are times {scale:.4g}, as {reason}")
        return scale

    def lr_fraction(self, step: int, total_steps: float, thaw_step: int) -> float:
        """Fraction of the peak learning rate at a step, counted from 0, for parameters that train from `thaw_step` on.

        One schedule for all, and for each group a linear rise from the step at which it thaws.
        """
        if step < thaw_step:
            return 0.0
        warmup_steps = round(self.warmup_fraction * total_steps) if self.warmup_fraction else 0
        rise = min(1.0, (step - thaw_step + 1) / (warmup_steps + 1))
        if self.schedule == "constant":
            return rise
        if self.schedule == "step":
            return rise * self.step_factor ** sum(step >= round(share * total_steps) for share in self.step_at)
        progress = min(1.0, max(0, step - warmup_steps) / max(1, total_steps - warmup_steps))
        left = 1 - progress if self.schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2
        return rise * (self.final_lr_fraction + (1 - self.final_lr_fraction) * left)


class MuonRecipe(OptimizerRecipe):
    """A recipe for timm's Muon, which orthogonalises the updates of hidden matrices and leaves the others to AdamW.

    The others are the head, biases, norms, embeddings of position or class (Jordan et al. 2024), and what timm's Muon
    finds unfit by its shape, such as depthwise convolutions and the patch embedding of grey images.
    """

    def own_settings(self, is_hidden: bool) -> dict[str, Any]:
        return {"use_fallback": not is_hidden}

    def remark(self, groups: Sequence[Mapping[str, Any]]) -> str:
        only_others = all(group["use_fallback"] for group in groups)
        return "optim=muon: no matrix below the head trains, so that AdamW updates all that does" if only_others else ""


class Schedule(LambdaLR):
    """LambdaLR, except that a resumed run has the learning rates and weight decays of its configuration.

    torch takes them from the checkpoint, so that `resume=<run> optim.lr=1e-4` would change nothing.
    """

    def __init__(self, optimizer: Optimizer, fractions: list[Callable[[int], float]]) -> None:
        self.weight_decays = [group["weight_decay"] for group in optimizer.param_groups]
        super().__init__(optimizer, fractions)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        lrs, weight_decays = self.base_lrs, self.weight_decays
        super().load_state_dict(state_dict)
        self.base_lrs, self.weight_decays = lrs, weight_decays
        groups = zip(self.optimizer.param_groups, lrs, weight_decays, self.lr_lambdas, strict=True)
        for group, lr, weight_decay, fraction in groups:
            group |= {"initial_lr": lr, "lr": lr * fraction(self.last_epoch), "weight_decay": weight_decay}

    def go_to(self, step: int) -> None:
        """Have the learning rates of a step, as after so many calls of `step`."""
        self.last_epoch, self._step_count = step, step + 1
        self._last_lr = [lr * fraction(step) for lr, fraction in zip(self.base_lrs, self.lr_lambdas, strict=True)]
        for group, lr in zip(self.optimizer.param_groups, self._last_lr, strict=True):
            group["lr"] = lr
