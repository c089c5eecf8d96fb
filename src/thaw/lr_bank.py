"""Linear heads side by side, one for each pair of a learning rate and a weight decay, and how each is updated.

Shapes: B batch, D feature width, K heads.
"""

import copy
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from thaw.models.heads import LinearHead
from thaw.optim import OptimizerRecipe


class LRBank(nn.Module):
    """K linear heads with equal initial weights, one for each pair of a learning rate and a weight decay.

    Args:
        in_features: D, filled in from the backbone.
        num_classes: number of logits.
        norm: of the features, see `LinearHead`; one for all heads, as it depends on the features alone.
        lrs: peak learning rates.
        weight_decays: of the heads' weights; biases have none.

    Attributes:
        settings: learning rate and weight decay of each head.
        names: of the heads, e.g. `lr=0.001_wd=0`.
        chosen: buffer (), the head that `forward` uses: the best of the latest validation, of equals the earlier.

    Raises:
        ValueError: an empty list, a number out of its range, or one given twice.
    """

    chosen: Tensor

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        norm: Literal["layer", "batch", "none"],
        lrs: Sequence[float],
        weight_decays: Sequence[float],
    ) -> None:
        super().__init__()
        check_list("lrs", lrs, lowest=math.ulp(0.0), allowed="above 0", example="[1e-3,1e-2]")
        check_list("weight_decays", weight_decays, lowest=0.0, allowed="0 or more", example="[0.0,1e-2]")
        self.settings = list(itertools.product(lrs, weight_decays))
        self.names = [f"lr={lr:g}_wd={weight_decay:g}" for lr, weight_decay in self.settings]
        single = LinearHead(in_features, num_classes, norm)
        self.norm = single.norm
        self.heads = nn.ModuleList(copy.deepcopy(single.linear) for _ in self.settings)
        self.register_buffer("chosen", torch.tensor(0))

    def logits(self, features: Tensor) -> Tensor:
        """(B, D) -> the logits of all heads (B, K, num_classes)."""
        weight = torch.cat([head.weight for head in self.heads])  # type: ignore[misc]  # (K * num_classes, D)
        bias = torch.cat([head.bias for head in self.heads])  # type: ignore[misc]
        return F.linear(self.norm(features), weight, bias).unflatten(1, (len(self.heads), -1))

    def forward(self, features: Tensor) -> Tensor:
        """(B, D) -> the logits of the chosen head (B, num_classes)."""
        if self.training:
            raise ValueError("head=lr_bank trains with model=lr_bank, which it selects; leave model= out.")
        return self.logits(features).index_select(1, self.chosen).squeeze(1)

    def choose(self, accuracies: Tensor) -> None:
        """Choose the head with the highest of the validation accuracies (K,)."""
        self.chosen.copy_(accuracies.argmax())  # the first of equals


def check_list(key: str, values: Sequence[float], lowest: float, allowed: str, example: str) -> None:
    """Raise for anything but a list of different numbers from `lowest` on."""
    if isinstance(values, str) or not isinstance(values, Sequence) or not values:
        raise ValueError(f"head.{key}={values!r} must be a list of one number or more, e.g. head.{key}={example}.")
    for value in values:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not lowest <= value < math.inf:
            raise ValueError(f"head.{key}={values} holds {value!r}; each must be a finite number {allowed}.")
    seen: set[str] = set()
    for value in values:
        if f"{value:g}" in seen:  # as in the names of the heads
            raise ValueError(f"head.{key}={values} holds {value:g} twice; give each once, up to 6 digits.")
        seen.add(f"{value:g}")


class BankRecipe(OptimizerRecipe):
    """A recipe by which every head of a bank is updated with its own learning rate and weight decay.

    Args:
        recipe: for all else; its own `lr` and `weight_decay` are replaced.
        bank: the heads.
    """

    def __init__(self, recipe: OptimizerRecipe, bank: LRBank) -> None:
        vars(self).update(vars(recipe))
        self.recipe, self.bank = recipe, bank

    def groups(
        self,
        named_parameters: Iterable[tuple[str, nn.Parameter]],
        depths: Mapping[str, int],
        thaw_epochs: Mapping[str, float],
    ) -> list[dict[str, Any]]:
        """For each head the groups that the recipe of a run of its own makes."""
        named, groups = dict(named_parameters), []
        for number, (lr, weight_decay) in enumerate(self.bank.settings):
            single = copy.copy(self.recipe)
            single.lr, single.weight_decay = lr, weight_decay
            own = [(name, parameter) for name, parameter in named.items() if name.startswith(f"head.heads.{number}.")]
            for group in single.groups(own, depths, thaw_epochs):
                kind = group["name"].partition("/")[2]  # decay | no_decay
                groups.append(group | {"name": f"{self.bank.names[number]}/{kind}"})
        return groups
