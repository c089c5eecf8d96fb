"""AdamW without a schedule of the learning rate: it averages its weights instead (Defazio et al. 2024,
arXiv:2405.15682)."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from thaw.run.errors import UserError


class ScheduleFreeAdamW(Optimizer):
    """Algorithm 1 of the paper. A parameter holds y, where gradients are taken; the trained model is the average x.

    Each step moves z by an update of Adam without its first momentum, draws x towards z with a weight in proportion
    to the squared learning rate, and sets y = (1 - beta1) z + beta1 x. `x` is computed when it is asked for.

    The learning rate of a group includes its warmup. Steps are counted for each parameter on its own, so that one that
    thaws late has an average that starts there.

    Args:
        params: groups, each with `lr` and `weight_decay`.
        betas: beta1, above 0 and below 1, and beta2.
        eps: is added to the root of the second moment.
    """

    def __init__(
        self, params: Iterable[dict[str, Any]], lr: float, weight_decay: float, betas: Sequence[float], eps: float
    ) -> None:
        if not (0 < betas[0] < 1 and 0 <= betas[1] < 1):
            raise UserError(f"optim.optimizer.betas={list(betas)} must be two numbers, above 0 and below 1.")
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "betas": betas, "eps": eps})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self.update(parameter, parameter.grad, group)
        return loss

    def update(self, y: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state, (beta1, beta2) = self.state[y], group["betas"]
        if not state:
            state |= {"step": 0, "weight_sum": 0.0, "z": y.clone(), "exp_avg_sq": torch.zeros_like(y)}
        z, second = state["z"], state["exp_avg_sq"]
        state["step"] += 1
        second.lerp_(gradient.square(), 1 - beta2)
        lr = group["lr"] * math.sqrt(1 - beta2 ** state["step"])
        weight = lr**2
        state["weight_sum"] += weight
        x = averaged_iterate(y, z, beta1)
        z.addcdiv_(gradient, second.sqrt().add_(group["eps"]), value=-lr)
        z.add_(y, alpha=-lr * group["weight_decay"])
        if weight:
            x.lerp_(z, weight / state["weight_sum"])
        y.copy_(torch.lerp(z, x, beta1))

    def averages(self) -> dict[Tensor, Tensor]:
        """x of each parameter that was updated and holds y."""
        return {
            parameter: averaged_iterate(parameter.detach(), self.state[parameter]["z"], group["betas"][0])
            for group in self.param_groups
            for parameter in group["params"]
            if parameter in self.state
        }


def averaged_iterate(y: Tensor, z: Tensor, beta1: float) -> Tensor:
    """x of y = (1 - beta1) z + beta1 x."""
    return torch.lerp(z, y, 1 / beta1)
