"""What is frozen and what is thawed: one policy of ordered rules over parameter names decides it for everything else.

Frozen means four things at once: no gradient, eval mode (dropout, drop path, norm statistics), no optimizer update
(weight decay included), and therefore bit-identical after training, buffers too.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Rule:
    """Parameters whose whole name matches `match` train or are frozen.

    Attributes:
        match: regular expression for the full name, e.g. `backbone\\..*`.
        train: whether these parameters train.
        last: only the backbone's last so many layers, and the head, which is above them (the stem is the first layer,
            each block is one, a final norm belongs to the last block); None means any depth.
    """

    match: str
    train: bool
    last: int | None = None

    def __post_init__(self) -> None:
        re.compile(self.match)
        if not isinstance(self.train, bool):
            raise TypeError(f"train={self.train!r} must be true or false")
        if self.last is not None and (isinstance(self.last, bool) or not isinstance(self.last, int) or self.last < 1):
            raise TypeError(f"last={self.last!r} must be a number of layers, 1 or more")

    def covers(self, name: str, depth: int, num_layers: int) -> bool:
        if not re.fullmatch(self.match, name):
            return False
        return self.last is None or depth >= num_layers - self.last


class FreezePolicy:
    """An ordered list of rules: for each parameter the first rule that covers it decides.

    Args:
        rules: mappings with the fields of `Rule`.

    Raises:
        ValueError: a rule with unknown fields or an invalid regular expression.
    """

    def __init__(self, rules: Sequence[Mapping]) -> None:
        self.rules = []
        for rule in rules:
            try:
                self.rules.append(Rule(**rule))
            except (TypeError, re.error) as error:
                raise ValueError(
                    f"freeze.rules: {rule} is not a rule ({error}); a rule has match (a regular expression), "
                    "train (true or false) and, if wanted, last (a number of layers)."
                ) from error

    def trainable(self, depths: Mapping[str, int]) -> dict[str, bool]:
        """For each parameter name whether it trains.

        Args:
            depths: of every parameter: 0 for the backbone's stem, 1 for its first block, ...; the head is the deepest,
                so its depth is the number of the backbone's layers.

        Raises:
            ValueError: a parameter that no rule covers, or a rule that decides nothing.
        """
        num_layers = max(depths.values())
        decided: dict[str, int] = {}
        for name, depth in depths.items():
            for number, rule in enumerate(self.rules):
                if rule.covers(name, depth, num_layers):
                    decided[name] = number
                    break
        problems = [f"no rule covers {name}" for name in depths.keys() - decided.keys()]
        used = Counter(decided.values())
        for number, rule in enumerate(self.rules):
            if not used[number]:
                earlier = any(rule.covers(name, depth, num_layers) for name, depth in depths.items())
                why = "only what earlier rules decided" if earlier else "nothing"
                problems.append(f"rule {number + 1} {rule} matches {why}")
        if problems:
            everything = [rule.last for rule in self.rules if rule.last is not None and rule.last >= num_layers]
            problems += [
                f"last={last} is the whole backbone (below {num_layers} is a part of it)" for last in everything
            ]
            tops = sorted({".".join(name.split(".")[:3]) for name in depths})
            raise ValueError(
                f"freeze.rules: {'; '.join(sorted(problems)[:6])}. The model has {num_layers} layers and parameters "
                f"under {', '.join(tops)}."
            )
        return {name: self.rules[number].train for name, number in decided.items()}

    def apply(self, model: nn.Module, depths: Mapping[str, int], fresh: frozenset[str]) -> None:
        """Set `requires_grad` and train or eval mode throughout the model.

        Args:
            model: what the rules speak of.
            depths: depth of each of its parameters.
            fresh: names of parameters that hold random numbers; freezing one is an error.
        """
        trains = self.trainable(depths)
        useless = sorted(name for name in fresh if not trains[name])
        if useless:
            raise ValueError(
                f"freeze: {len(useless)} freshly initialised tensors would stay random for ever, e.g. {useless[0]}. "
                "Load weights (backbone.weights=bundled, hub or a file) or train them (freeze=full)."
            )
        if not any(trains.values()):
            raise ValueError("freeze.rules freeze every parameter; let at least the head train.")
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(trains[name])
        set_modes(model, before=True)


def set_modes(module: nn.Module, before: bool) -> bool:
    """Set eval mode where all parameters are frozen and train mode elsewhere; return the mode at the module's end.

    A module without parameters (dropout, drop path) inside a partly frozen one belongs to what comes before it: after
    a frozen stem it is frozen, after a thawed block it is thawed. `before` is the mode of what came before.
    """
    trains = [parameter.requires_grad for parameter in module.parameters()]
    if not any(trains) or all(trains):
        mode = any(trains) if trains else before
        module.train(mode)
        return mode
    own = [parameter.requires_grad for parameter in module.parameters(recurse=False)]
    module.training = any(own) if own else True
    mode = any(own) if own else before
    for child in module.children():
        mode = set_modes(child, mode)
    return mode


def format_table(model: nn.Module, depths: Mapping[str, int], groups: Sequence[Mapping]) -> str:
    """One line for each run of equal layers: depth, parameters, whether they train, mode, peak lr and weight decay.

    Args:
        model: with the policy applied.
        depths: depth of each parameter.
        groups: the optimizer's parameter groups, with `lr` or `initial_lr`, and `weight_decay`.
    """
    modules = dict(model.named_modules())
    numbers = {
        id(parameter): f"{group.get('initial_lr', group['lr']):>10.2e}{group['weight_decay']:>8.3g}"
        for group in groups
        for parameter in group["params"]
    }
    rows: list[Row] = []
    for name, parameter in model.named_parameters():
        mode = "train" if modules[name.rpartition(".")[0]].training else "eval"
        settings = f"  {'yes' if parameter.requires_grad else 'no':<8}{mode:<5}"
        settings += numbers.get(id(parameter), f"{'-':>10}{'-':>8}")
        layer = Row(*layer_of(name), depths[name], settings)
        row = next((row for row in reversed(rows) if row.continues(layer)), layer)
        if row is layer:
            rows.append(row)
        row.last, row.deepest = layer.first, layer.depth
        row.parameters += parameter.numel()
    labels = [row.stem + (f".{span(row.first, row.last)}" if row.first >= 0 else "") for row in rows]
    width = max(map(len, labels))
    lines = [f"{'layers':<{width}}{'depth':>7}{'parameters':>12}  trains  mode    peak lr   decay"]
    for row, label in zip(rows, labels, strict=True):
        lines.append(f"{label:<{width}}{span(row.depth, row.deepest):>7}{row.parameters:>12,}{row.settings}")
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    lines.append(f"{trained:,} of {sum(row.parameters for row in rows):,} parameters train")
    return "\n".join(lines)


@dataclass
class Row:
    """Consecutive layers of the same settings: `stem.first` to `stem.last`, at `depth` to `deepest`."""

    stem: str
    first: int
    depth: int
    settings: str
    last: int = -1
    deepest: int = -1
    parameters: int = 0

    def continues(self, layer: "Row") -> bool:
        """Whether a layer is the last of this row, or the one after it."""
        alike = (self.stem, self.settings) == (layer.stem, layer.settings)
        return alike and layer.first - self.last <= 1 and layer.depth - self.deepest <= 1


def layer_of(parameter: str) -> tuple[str, int]:
    """`backbone.model.blocks.3.norm1.bias` -> `backbone.model.blocks`, 3; `head.linear.bias` -> `head.linear`, -1."""
    numbered = re.match(r"(.*)\.(\d+)(\.|$)", parameter)
    if numbered:
        return numbered[1], int(numbered[2])
    return ".".join(re.sub(r"\.(weight|bias)$", "", parameter).split(".")[:3]), -1


def span(first: int, last: int) -> str:
    return str(first) if first == last else f"{first}-{last}"
