"""What is frozen, what is thawed, and when: one policy of ordered rules over parameter names decides it for all else.

Frozen means four things at once: no gradient, eval mode (dropout, drop path, norm statistics), no optimizer update
(weight decay included), and therefore bit-identical after training, buffers too.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields

from torch import nn

NEVER = math.inf  # the epoch from which a frozen parameter trains


@dataclass(frozen=True)
class Rule:
    """Parameters whose whole name matches `match` train, from an epoch on, or are frozen.

    Layers are counted as depths are: the stem is 0, the first block 1, ...; a final norm belongs to the last block.

    Attributes:
        match: regular expression for the full name, e.g. `backbone\\..*`, or a list of which one matches.
        train: whether these parameters train.
        first: only the backbone's stem and first so many blocks.
        last: only the backbone's last so many layers, and the head, which is above them.
        from_epoch: they are frozen before this epoch (the first is 0).
        blocks: they thaw from the top down, so many layers at a time (Howard & Ruder 2018, section 3.3) ...
        every: ... so many epochs apart.
    """

    match: str | Sequence[str]
    train: bool
    first: int | None = None
    last: int | None = None
    from_epoch: int = 0
    blocks: int | None = None
    every: int | None = None

    def __post_init__(self) -> None:
        if not self.patterns:
            raise TypeError("match must hold a regular expression")
        for pattern in self.patterns:
            re.compile(pattern)
        if not isinstance(self.train, bool):
            raise TypeError(f"train={self.train!r} must be true or false")
        for name, lowest in {"first": 0, "last": 1, "from_epoch": 0, "blocks": 1, "every": 1}.items():
            value = getattr(self, name)
            if value is None and name != "from_epoch":
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < lowest:
                raise TypeError(f"{name}={value!r} must be a whole number, {lowest} or more")
        if (self.blocks is None) != (self.every is None):
            raise TypeError("blocks (layers at a time) and every (epochs between) belong together")
        if self.is_schedule and not self.train:
            raise TypeError("from_epoch, blocks and every say when to train, so train must be true")

    @property
    def patterns(self) -> list[str]:
        return [self.match] if isinstance(self.match, str) else list(self.match)

    @property
    def is_schedule(self) -> bool:
        return self.from_epoch > 0 or self.blocks is not None

    def covers(self, name: str, depth: int, num_layers: int) -> bool:
        if not any(re.fullmatch(pattern, name) for pattern in self.patterns):
            return False
        return (self.first is None or depth <= self.first) and (self.last is None or depth >= num_layers - self.last)

    def thaw_epoch(self, depth: int, num_layers: int) -> float:
        """The epoch from which a parameter at a depth trains."""
        if not self.train:
            return NEVER
        if self.blocks is None or self.every is None:
            return self.from_epoch
        below_top = max(0, num_layers - 1 - depth)  # 0 for the last block
        return self.from_epoch + below_top // self.blocks * self.every


class FreezePolicy:
    """An ordered list of rules: for each parameter the first rule that covers it decides.

    What trains is a pure function of the epoch, so that it is the same on every process and after a resume.

    Args:
        rules: mappings with the fields of `Rule`.
        lora: adds low-rank updates to the backbone, see `thaw.freezing.lora.add_lora`; None adds none.

    Raises:
        ValueError: a rule with unknown fields or an invalid regular expression.
    """

    def __init__(self, rules: Sequence[Mapping], lora: Callable[[nn.Module], None] | None) -> None:
        self.lora = lora
        self.rules = []
        for rule in rules:
            try:
                self.rules.append(Rule(**rule))
            except (TypeError, re.error) as error:
                raise ValueError(
                    f"freeze.rules: {rule} is not a rule ({error}); a rule has match (a regular expression or a list), "
                    f"train (true or false) and, if wanted, {', '.join(each.name for each in fields(Rule)[2:])}."
                ) from error

    def thaw_epochs(self, depths: Mapping[str, int]) -> dict[str, float]:
        """For each parameter name the epoch from which it trains, `NEVER` if it is frozen throughout.

        Args:
            depths: of every parameter: 0 for the backbone's stem, 1 for its first block, ...; the head is the deepest,
                so its depth is the number of the backbone's layers.

        Raises:
            ValueError: a parameter that no rule covers, a rule that decides nothing, one that asks for more layers
                than there are, or two schedules for one parameter.
        """
        num_layers = max(depths.values())
        covering = {
            name: [n for n, rule in enumerate(self.rules) if rule.covers(name, depth, num_layers)]
            for name, depth in depths.items()
        }
        problems = [f"no rule covers {name}" for name, numbers in covering.items() if not numbers]
        used = Counter(numbers[0] for numbers in covering.values() if numbers)
        for number, rule in enumerate(self.rules):
            if not used[number]:
                earlier = any(number in numbers for numbers in covering.values())
                why = "only what earlier rules decided" if earlier else "nothing"
                problems.append(f"rule {number + 1} {rule} matches {why}")
            if rule.last is not None and rule.last >= num_layers:
                problems.append(f"last={rule.last} is the whole backbone (below {num_layers} is a part of it)")
            if rule.first is not None and rule.first >= num_layers - 1:
                problems.append(f"first={rule.first} is the whole backbone (below {num_layers - 1} is a part of it)")
        for name, numbers in covering.items():
            scheduled = [number + 1 for number in numbers if self.rules[number].is_schedule]
            if len(scheduled) > 1:
                problems.append(
                    f"rules {scheduled[0]} and {scheduled[1]} both schedule {name}: overlapping schedules; narrow one "
                    "by first, last or match"
                )
                break
        if problems:
            tops = sorted({".".join(name.split(".")[:3]) for name in depths})
            raise ValueError(
                f"freeze.rules: {'; '.join(sorted(problems)[:6])}. The model has {num_layers} layers and parameters "
                f"under {', '.join(tops)}."
            )
        return {name: self.rules[covering[name][0]].thaw_epoch(depth, num_layers) for name, depth in depths.items()}

    def apply(self, model: nn.Module, depths: Mapping[str, int], fresh: frozenset[str], epoch: int) -> list[str]:
        """Set `requires_grad` and train or eval mode throughout the model, as they are in an epoch.

        Args:
            model: what the rules speak of.
            depths: depth of each of its parameters.
            fresh: names of parameters that hold random numbers; freezing one is an error.
            epoch: counted from 0.

        Returns:
            the names of the parameters that this changed.
        """
        thaws = self.thaw_epochs(depths)
        useless = sorted(name for name in fresh if thaws[name] > 0)
        if useless:
            raise ValueError(
                f"freeze: {len(useless)} freshly initialised tensors would be frozen while random, e.g. {useless[0]}. "
                "Load weights (backbone.weights=bundled, hub or a file) or train them (freeze=full)."
            )
        if not any(start <= 0 for start in thaws.values()):
            raise ValueError("freeze.rules freeze every parameter in epoch 0; let at least the head train.")
        changed = []
        for name, parameter in model.named_parameters():
            trains = thaws[name] <= epoch
            if parameter.requires_grad != trains:
                parameter.requires_grad_(trains)
                changed.append(name)
        set_modes(model, before=True)
        return changed


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
