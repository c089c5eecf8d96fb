"""Multinomial logistic regression with an L2 penalty: the linear head that fits frozen features best.

Shapes: N images, D feature width, K classes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def fit_logistic(
    features: Tensor, targets: Tensor, c: float, weight: Tensor, bias: Tensor, max_iterations: int, tolerance: float
) -> tuple[Tensor, Tensor, float]:
    """Minimise C sum_i cross-entropy_i + |weight|^2 / 2, as scikit-learn does, by L-BFGS from a given start.

    The sum is divided by max(1, C N), so that neither mean cross-entropy nor penalty has a weight above 1 and one
    tolerance serves all C.

    Takes features (N, D) in the precision to compute in, targets (N,) from 0 to K - 1, and weight (K, D) and bias (K,)
    to start from; returns weight, bias and the largest entry of their gradient.
    """
    # losses are added in float64 where the device has it, without which the line search ends early
    exact = torch.float32 if features.device.type == "mps" else torch.float64
    parameters = [weight.clone().requires_grad_(), bias.clone().requires_grad_()]
    optimizer = torch.optim.LBFGS(
        parameters, max_iter=max_iterations, tolerance_grad=tolerance, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        logits = features @ parameters[0].T + parameters[1]  # (N, D) -> (N, K)
        penalty = parameters[0].to(exact).square().sum() / 2
        total = (c * len(features) * F.cross_entropy(logits.to(exact), targets) + penalty) / max(1, c * len(features))
        total.backward()
        return total

    optimizer.step(loss)  # type: ignore[arg-type]  # L-BFGS needs the tensor's gradient only
    loss()
    gradient = max(float(parameter.grad.abs().max()) for parameter in parameters if parameter.grad is not None)
    return parameters[0].detach(), parameters[1].detach(), gradient


def standardisation(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (D,) of features (N, D); a constant feature is only centred."""
    std, mean = torch.std_mean(features, dim=0, correction=0)
    return mean, torch.where(std > 0, std, 1.0)
