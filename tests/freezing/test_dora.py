"""DoRA computes m V / |V| with V = W + alpha / r B A, and its gradients have |V| as a constant."""

import torch
from small_models import assert_same, parametrized
from torch import nn
from torch.nn import functional

from thaw.freezing.dora import DoRA


def test_a_linear_layer_is_the_formula_by_hand() -> None:
    """Equation 5, with the update applied to the inputs, and each row's norm as a number."""
    torch.manual_seed(0)
    layer, inputs = nn.Linear(4, 6), torch.randn(3, 4, requires_grad=True)
    weight, update = layer.weight, DoRA(layer.weight, 2, 3.0)
    parametrized(layer, "weight", update)
    norms = [(weight[row] + 3.0 / 2 * update.lora_B[row] @ update.lora_A).norm().item() for row in range(6)]
    direction = functional.linear(inputs, weight) + 3.0 / 2 * inputs @ update.lora_A.T @ update.lora_B.T
    expected = update.magnitude / torch.tensor(norms) * direction + layer.bias
    assert_same(layer(inputs), expected, [inputs, update.lora_A, update.lora_B, update.magnitude])


def test_a_convolution_is_the_formula_by_hand() -> None:
    """As for the matrix of its kernels, which `unfold` applies to patches."""
    torch.manual_seed(0)
    layer, images = nn.Conv2d(4, 6, 3, stride=2, bias=False), torch.randn(2, 4, 9, 9, requires_grad=True)
    weight, update = layer.weight.flatten(1), DoRA(layer.weight, 2, 3.0)
    parametrized(layer, "weight", update)
    direction = weight + 3.0 / 2 * update.lora_B @ update.lora_A
    matrix = (update.magnitude / direction.detach().square().sum(dim=1).sqrt()).diag() @ direction
    expected = (matrix @ functional.unfold(images, 3, stride=2)).view(2, 6, 4, 4)
    assert_same(layer(images), expected, [images, update.lora_A, update.lora_B, update.magnitude])


def test_a_row_of_zeros_can_be_learned() -> None:
    """Such as that of a neuron that was pruned: its norm is 0."""
    layer = nn.Linear(4, 6)
    layer.weight.data[2] = 0
    update = DoRA(layer.weight, 2, 3.0)
    nn.utils.parametrize.register_parametrization(layer, "weight", update)
    layer(torch.randn(3, 4)).square().sum().backward()
    assert all(torch.isfinite(each.grad).all() for each in update.parameters() if each.grad is not None)
    assert torch.equal(layer.weight[2], torch.zeros(4))
