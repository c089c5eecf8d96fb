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
        last: only the backbone's last so many layers (the stem is the first layer, each block is one, a final norm
            belongs to the last); None means any depth.
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
                    f"freeze.rules: {dict(rule)} is not a rule ({error}); a rule has match (a regular expression), "
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
    module.training = True
    own = [parameter.requires_grad for parameter in module.parameters(recurse=False)]
    mode = any(own) if own else before
    for child in module.children():
        mode = set_modes(child, mode)
    return mode


def format_table(model: nn.Module, depths: Mapping[str, int], groups: Sequence[Mapping]) -> str:
    """One line for each layer and group: parameters, learning rate, weight decay, trainable, mode.

    Args:
        model: with the policy applied.
        depths: depth of each parameter.
        groups: the optimizer's parameter groups, with `lr` or `initial_lr`, and `weight_decay`.
    """
    rate = {id(p): (g.get("initial_lr", g["lr"]), g["weight_decay"]) for g in groups for p in g["params"]}
    rows: dict[tuple, int] = {}
    modules = dict(model.named_modules())
    for name, parameter in model.named_parameters():
        owner = name.rpartition(".")[0]
        lr, decay = rate.get(id(parameter), (None, None))
        key = (layer_name(name), parameter.requires_grad, modules[owner].training, lr, decay)
        rows[key] = rows.get(key, 0) + parameter.numel()
    lines = [f"{'layer':<32}{'parameters':>12}{'lr':>11}{'decay':>8}  trains  mode"]
    for (layer, trains, mode, lr, decay), count in rows.items():
        numbers = f"{lr:>11.2e}{decay:>8.3g}" if lr is not None else f"{'-':>11}{'-':>8}"
        lines.append(f"{layer:<32}{count:>12,}{numbers}  {'yes' if trains else 'no':<6}  {'train' if mode else 'eval'}")
    return "\n".join(lines)


def layer_name(parameter: str) -> str:
    """`backbone.model.blocks.3.attn.qkv.weight` -> `backbone.model.blocks.3`: up to the last number, or the module."""
    parts = parameter.split(".")
    numbers = [place for place, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[: numbers[-1] + 1]) if numbers else ".".join(parts[:3] if len(parts) > 3 else parts[:-1] or parts)
