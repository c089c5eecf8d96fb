"""The space of a search: keys of the configuration and their values, from YAML to Optuna's distributions and back."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any

from omegaconf import DictConfig, OmegaConf
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.samplers import GridSampler

from thaw.run.command_line import quoted
from thaw.run.errors import UserError
from thaw.run.folders import NOT_THE_RUN

Space = dict[str, BaseDistribution]

RANGE, CHOICES = {"low", "high", "log", "step"}, {"choices"}
HELP = "Give {low, high}, with log: true or a step if wanted, or {choices: [...]}."


class OrderedGridSampler(GridSampler):
    """Optuna's, but without `Study.stop`, which Optuna allows only inside `Study.optimize`; the search counts itself.

    `seed`, of the order, is the same for all trials of a study.
    """

    def __init__(self, search_space: Mapping[str, Sequence[Any]], seed: int) -> None:
        super().__init__(search_space, seed)
        self.size = math.prod(map(len, search_space.values()))

    def after_trial(self, *_: Any) -> None:
        pass


def read_space(block: DictConfig, base: DictConfig) -> Space:
    """The space of a block such as `{optim: {lr: {low: 1e-4, high: 1.0, log: true}}, freeze: {choices: [full, lora]}}`.

    Where `base`, a composed run, has a float, a range of integers is one of floats.

    Raises:
        UserError: a range or a list of choices that is empty or cannot be drawn from.
    """
    space: Space = {}
    for key, leaf in find_dimensions(OmegaConf.to_container(block, resolve=True)):
        if key in space:
            raise UserError(f"sweep.space names {key} twice; leave one of them out.")
        if any(key == aside or key.startswith(f"{aside}.") for aside in NOT_THE_RUN):
            raise UserError(f"sweep.space.{key}: {key} changes nothing in what is trained; leave it out.")
        is_float = isinstance(OmegaConf.select(base, key.lstrip("+")), float)
        space[key] = read_choices(key, leaf) if "choices" in leaf else read_range(key, leaf, is_float)
    if not space:
        raise UserError(f"sweep.space is empty: name a key of the configuration, such as optim.lr. {HELP}")
    return space


def find_dimensions(node: Any, key: str = "") -> list[tuple[str, dict[str, Any]]]:
    """The ranges and choices with their dotted keys."""
    if not isinstance(node, dict):
        raise UserError(f"sweep.space.{key}={node!r} is neither a range nor choices. {HELP}")
    if node.keys() & (RANGE | CHOICES):
        if wrong := node.keys() - (CHOICES if "choices" in node else RANGE):
            names = ", ".join(sorted(wrong))
            raise UserError(f"sweep.space.{key}: {names} is unknown beside {', '.join(sorted(node))}. {HELP}")
        return [(key, node)]
    return [
        found
        for name in node
        if node[name] is not None
        for found in find_dimensions(node[name], f"{key}.{name}".lstrip("."))
    ]


def read_choices(key: str, leaf: dict[str, Any]) -> BaseDistribution:
    values = leaf["choices"]
    if not isinstance(values, list) or not values:
        raise UserError(f"sweep.space.{key}: choices={values!r} must be a list of at least one value.")
    for value in values:
        if not isinstance(value, str | int | float | bool | None):
            raise UserError(
                f"sweep.space.{key}: {value!r} is not allowed in choices; give numbers, words, booleans or null."
            )
    if len({(type(value), value) for value in values}) < len(values):
        raise UserError(f"sweep.space.{key}: choices={values} holds a value twice; name each once.")
    return CategoricalDistribution(values)


def read_range(key: str, leaf: dict[str, Any], is_float: bool) -> BaseDistribution:
    if missing := {"low", "high"} - leaf.keys():
        raise UserError(f"sweep.space.{key} has no {' and no '.join(sorted(missing))}. {HELP}")
    low, high, step, log = leaf["low"], leaf["high"], leaf.get("step"), leaf.get("log", False)
    for name, value in {"low": low, "high": high, "step": 1 if step is None else step}.items():
        if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
            raise UserError(f"sweep.space.{key}: {name}={value!r} must be a number.")
    if not isinstance(log, bool):
        raise UserError(f"sweep.space.{key}: log={log!r} must be true or false.")
    if low >= high:
        raise UserError(f"sweep.space.{key}: low={low} must be less than high={high}.")
    if log and low <= 0:
        raise UserError(f"sweep.space.{key}: low={low} must be more than 0, as log is true.")
    if step is not None and (step <= 0 or log):
        raise UserError(f"sweep.space.{key}: step={step} must be more than 0, and not beside log: true.")
    if is_float or not all(isinstance(value, int) for value in (low, high, step or 1)):
        return FloatDistribution(float(low), float(high), log, step)
    return IntDistribution(low, high, log, step or 1)


def values_of(key: str, distribution: BaseDistribution) -> list[Any]:
    """Every value of choices or of a range with steps.

    Raises:
        UserError: the range has no steps.
    """
    if isinstance(distribution, CategoricalDistribution):
        return list(distribution.choices)
    assert isinstance(distribution, FloatDistribution | IntDistribution)
    if distribution.step is None or distribution.log:
        raise UserError(f"sweep.space.{key} has no end of values, but a grid visits each: give choices, or a step.")
    low, high, step = (Decimal(str(x)) for x in (distribution.low, distribution.high, distribution.step))
    kind = int if isinstance(distribution, IntDistribution) else float
    return [kind(low + place * step) for place in range(int((high - low) / step) + 1)]


def corners(space: Space) -> list[dict[str, Any]]:
    """A few sets of parameters in which every choice and both ends of every range occur."""
    columns: dict[str, list[Any]] = {}
    for key, distribution in space.items():
        if isinstance(distribution, CategoricalDistribution):
            columns[key] = list(distribution.choices)
        else:
            assert isinstance(distribution, FloatDistribution | IntDistribution)
            columns[key] = [distribution.low, distribution.high]
    most = max(map(len, columns.values()))
    return [{key: column[row % len(column)] for key, column in columns.items()} for row in range(most)]


def check_params(params: Mapping[str, Any], space: Space) -> None:
    """Refuse parameters of a stored trial that this search could not have drawn: a study's file is input, not code."""
    for key, value in params.items():
        known = space.get(key)
        if isinstance(known, CategoricalDistribution):
            fits = value in known.choices
        else:
            is_number = isinstance(known, FloatDistribution | IntDistribution) and isinstance(value, int | float)
            fits = is_number and known.low <= value <= known.high  # type: ignore[union-attr]
        if not fits:
            raise UserError(
                f"{key}={value} of a stored trial is not in sweep.space; choose another sweep.study, or another folder."
            )


def as_overrides(params: Mapping[str, Any]) -> list[str]:
    """Parameters of a trial as they would be typed, with every digit of a number."""
    return [f"{key}={as_typed(value)}" for key, value in params.items()]


def as_typed(value: Any) -> str:
    if not isinstance(value, str):
        return json.dumps(value)
    is_word = re.fullmatch(r"[A-Za-z_][\w/-]*", value) and value.lower() not in ("true", "false", "null", "nan", "inf")
    return value if is_word else quoted(value)


def readable(params: Mapping[str, Any]) -> str:
    """Parameters as text to read: `optim.lr=0.01234 freeze=lora`."""
    return " ".join(
        f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={value}" for key, value in params.items()
    )
