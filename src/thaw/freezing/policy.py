"""The freezing policy: ordered rules over parameter names decide which parameters train, and from which epoch.

Frozen means four things at once: no gradient, eval mode (dropout, drop path, norm statistics), no optimizer update
(weight decay included), and therefore bit-identical after training, buffers too.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from itertools import chain
from typing import Any, get_type_hints

import yaml
from torch import nn

from thaw.freezing.added import added_names, own_names, plain_name
from thaw.run.errors import UserError
from thaw.run.suggestions import nearest_word
from thaw.run.values import Count, CountOrZero, find_problem

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
        depths: only these layers.
        from_epoch: they are frozen before this epoch (the first is 0).
        blocks: they thaw from the top down, so many layers at a time (Howard & Ruder 2018, section 3.3) ...
        every: ... so many epochs apart.
    """

    match: str | Sequence[str]
    train: bool
    first: CountOrZero | None = None
    last: Count | None = None
    depths: Sequence[CountOrZero] | None = None
    from_epoch: CountOrZero = 0
    blocks: Count | None = None
    every: Count | None = None

    def __str__(self) -> str:
        """The rule as YAML, as one types it."""
        given = {each.name: getattr(self, each.name) for each in fields(self)}
        return rule_as_yaml({name: value for name, value in given.items() if name in ("match", "train") or value})

    def __post_init__(self) -> None:
        if not self.patterns:
            raise TypeError("match must hold a regular expression")
        for pattern in self.patterns:
            re.compile(pattern)
        for name, annotation in get_type_hints(Rule, include_extras=True).items():
            if problem := find_problem(name, getattr(self, name), annotation):
                raise TypeError(problem[0])
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
        if self.depths is not None and depth not in self.depths:
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

    Args:
        rules: mappings with the fields of `Rule`.
        add: called with the backbone, adds parameters to it, e.g. `thaw.freezing.lora.add_lora`; None adds none.

    Raises:
        UserError: a rule with unknown fields or an invalid regular expression.
    """

    def __init__(self, rules: Sequence[Mapping], add: Callable[[Any], None] | None) -> None:
        self.add = add
        self.rules = []
        names = [each.name for each in fields(Rule)]
        for rule in rules:
            try:
                if unknown := [key for key in rule if key not in names]:
                    near = nearest_word(str(unknown[0]), names)
                    raise TypeError(f"{unknown[0]} is unknown" + (f" (nearest: {near})" if near else ""))
                self.rules.append(Rule(**rule))
            except (TypeError, re.error) as error:
                reason = str(error).removeprefix("Rule.__init__() ")
                raise UserError(
                    f"freeze.rules: {rule_as_yaml(rule)} is not a rule: {reason}. A rule has match (a regular "
                    f"expression or a list), train (true or false) and, if wanted, {', '.join(names[2:])}."
                ) from error

    def bind(self, model: Any, depths: dict[str, int]) -> "Thaw":
        """Decide for every parameter of a model from which epoch it trains; `depths` are as in `thaw_epochs`.

        Raises:
            UserError: as `thaw_epochs`; added parameters never train, or nothing trains in the first epoch.
        """
        epochs = self.thaw_epochs(depths)
        useless = [name for name in added_names(model) if epochs[name] == NEVER]
        if useless:
            kinds = sorted({name.rpartition(".")[2] for name in useless})
            raise UserError(
                f"freeze.add adds {useless[0]} and {len(useless) - 1} more, but freeze.rules never train them; put "
                rf"the rule {{match: '.*\.({'|'.join(kinds)})', train: true}} before those, or set freeze.add to null."
            )
        if min(epochs.values()) > 0:
            raise UserError("freeze.rules freeze every parameter in epoch 0; let at least the head train.")
        return Thaw(model, depths, epochs)

    def thaw_epochs(self, depths: Mapping[str, int]) -> dict[str, float]:
        """For each parameter name the epoch from which it trains, `NEVER` if it is frozen throughout.

        The depth is 0 for the stem of the backbone, 1 for its first block, ...; the head is the deepest, so its
        depth is the number of the backbone's layers.

        Raises:
            UserError: a parameter that no rule covers, a rule that decides nothing, one that asks for more layers
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
                near = None if earlier else near_names(rule, depths)
                problems.append(f"rule {number + 1} {rule} matches {why}" + (f" (nearest: {near})" if near else ""))
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
            raise UserError(
                f"freeze.rules: {'; '.join(sorted(problems)[:6])}. The model has "
                f"{f'{num_layers} layers and ' if num_layers else ''}parameters under {', '.join(tops)}."
            )
        return {name: self.rules[covering[name][0]].thaw_epoch(depth, num_layers) for name, depth in depths.items()}


def rule_as_yaml(rule: Any) -> str:
    return yaml.safe_dump(rule, default_flow_style=True, sort_keys=False, width=10_000).removesuffix("\n...\n").strip()


def near_names(rule: Rule, names: Iterable[str]) -> str | None:
    """The parameters, or the module of several, whose name is most like the pattern of a rule."""
    parts = [name.split(".") for name in names]
    known = {".".join(each[:count]) for each in parts for count in range(1, len(each) + 1)} | set(chain(*parts))
    typed = re.sub(r"\\(?=\.)|[^\w.\\]|\\\w", "", rule.patterns[0]).strip(".")
    return nearest_word(typed, sorted(known))


class Thaw:
    """A freezing policy bound to a classifier: every question about what trains is answered here.

    What trains is a pure function of the epoch, so that it is the same on every process and after a resume.

    Args:
        model: has a `backbone` (`thaw.models.backbone.Backbone` or a baseline) and a `head`.
        depths: of every parameter, as in `FreezePolicy.thaw_epochs`.
        epochs: for every parameter the epoch from which it trains, `NEVER` if it is frozen throughout.
    """

    def __init__(self, model: Any, depths: dict[str, int], epochs: dict[str, float]) -> None:
        self.model, self.depths, self.epochs = model, depths, epochs

    @cached_property
    def layer_epochs(self) -> dict[int, float]:
        """For each layer of the backbone the epoch from which some of it trains; the head, above them, from 0."""
        backbone = self.model.backbone
        starts = {len(backbone.layers): 0.0}
        for name, _ in backbone.named_parameters():
            layer = backbone.layer_of(name)
            starts[layer] = min(starts.get(layer, NEVER), self.epochs[f"backbone.{name}"])
        return starts

    def apply(self, epoch: int) -> list[str]:
        """Set `requires_grad` and train or eval mode throughout the model; return the parameters that this changed."""
        changed = [name for name, p in self.model.named_parameters() if p.requires_grad != (self.epochs[name] <= epoch)]
        for name in changed:
            self.model.get_parameter(name).requires_grad_(self.epochs[name] <= epoch)
        trainable = {parameter for parameter in self.model.parameters() if parameter.requires_grad}
        for module, mode in modes(self.model, trainable).items():
            module.training = mode
        return changed

    def check_fresh(self) -> None:
        """Refuse to freeze random numbers.

        Raises:
            UserError: a parameter that no weights filled is frozen in epoch 0.
        """
        fresh = {f"backbone.{name}" for name in self.model.backbone.fresh}
        frozen = sorted(name for name, epoch in self.epochs.items() if plain_name(name) in fresh and epoch > 0)
        if frozen:
            raise UserError(
                f"freeze: {len(frozen)} freshly initialised tensors would be frozen while random, e.g. {frozen[0]}. "
                "Load weights (backbone.weights=bundled, hub or a file) or train them (freeze=full)."
            )

    def cut(self, epoch: int) -> int:
        """How many of the backbone's layers, counted from the stem, lie below everything that trains in an epoch."""
        return min(layer for layer, start in self.layer_epochs.items() if start <= epoch)

    def next_cut_epoch(self, epoch: int) -> float:
        """In which later epoch the cut changes; infinity if it does not."""
        cut = self.cut(epoch)
        return min((start for layer, start in self.layer_epochs.items() if layer < cut), default=NEVER)

    def after(self, epoch: float) -> list[float]:
        """The epochs of the parameters that thaw in this epoch or later."""
        return [start for start in self.epochs.values() if epoch <= start < NEVER]

    def count(self, end: float = NEVER) -> int:
        """How many numbers train in a run that ends before an epoch."""
        return sum(parameter.numel() for name, parameter in self.model.named_parameters() if self.epochs[name] < end)

    def constant(self) -> list[str]:
        """Names in the backbone's state dict that training leaves as they are: what a checkpoint may leave out.

        They are parameters that never train, and the buffers of modules that have only such parameters.
        """
        names = {name for name, epoch in self.epochs.items() if epoch == NEVER}
        for prefix, module in self.model.named_modules():
            own = [f"{prefix}.{name}" for name in own_names(module)]
            if own and names.issuperset(own):
                names.update(f"{prefix}.{name}" for name, _ in module.named_buffers(recurse=False))
        return [name for name in self.model.state_dict() if name in names and name.startswith("backbone.")]


def modes(model: nn.Module, trainable: Collection[nn.Parameter]) -> dict[nn.Module, bool]:
    """Train (true) or eval mode of a model and all within it: train where all parameters train, eval where none does.

    A module without parameters (dropout, drop path) inside a partly frozen one belongs to the module before it: after
    a frozen stem it is frozen, after a thawed block it is thawed.
    """
    found: dict[nn.Module, bool] = {}

    def note(module: nn.Module, before: bool) -> bool:
        """Add the modes of a module and return the mode at its end; `before` is that of the module before it."""
        trains = [parameter in trainable for parameter in module.parameters()]
        if not any(trains) or all(trains):
            mode = any(trains) if trains else before
            found.update(dict.fromkeys(module.modules(), mode))
            return mode
        own = [module.get_parameter(name) in trainable for name in own_names(module)]
        found[module] = any(own) if own else True
        mode = any(own) if own else before
        for child in module.children():
            mode = note(child, mode)
        return mode

    note(model, True)
    return found
