"""Values of settings against the types and ranges in signatures: `lr: Annotated[float, Field(gt=0)]`."""

import inspect
import json
import re
import sys
import types
from collections.abc import Sequence
from datetime import timedelta
from typing import Annotated, Any, Literal, TypeAlias, Union, get_args, get_origin, get_type_hints

from omegaconf import DictConfig, OmegaConf
from pydantic import ConfigDict, Field, PydanticUserError, TypeAdapter, ValidationError

from thaw.run.errors import UserError
from thaw.run.suggestions import did_you_mean, dotted_keys, nearest_word
from thaw.run.targets import import_target

Count: TypeAlias = Annotated[int, Field(ge=1, strict=True)]
CountOrZero: TypeAlias = Annotated[int, Field(ge=0, strict=True)]
Positive: TypeAlias = Annotated[float, Field(gt=0, allow_inf_nan=False, strict=True)]
NonNegative: TypeAlias = Annotated[float, Field(ge=0, allow_inf_nan=False, strict=True)]
Probability: TypeAlias = Annotated[float, Field(ge=0, le=1, strict=True)]
Seed: TypeAlias = Annotated[int, Field(ge=0, le=2**32 - 1, strict=True)]

Severity: TypeAlias = Annotated[int, Field(ge=1, le=5, strict=True)]
COMMAND_SETTINGS: dict[str, Any] = {  # of root scripts, which no class takes
    "seed": Seed,
    "rank_timeout": Positive,
    **dict.fromkeys(("validate", "wandb", "private", "lr_find"), bool),
    "test": bool | Literal["always"],
    "allow": Annotated[list[str], Field(description="allow=[mypackage]")],
    "hosts": Annotated[list[str], Field(description="hosts=[digits.example.org]")],
    "robustness": Annotated[dict, Field(description="robustness.corruptions=[] leaves it out")],
    "robustness.corruptions": Literal["auto", "mnist_c", "cifar10_c", "imagenet_c"] | list[str],
    "robustness.severities": Annotated[list[Severity], Field(min_length=1, description="robustness.severities=[3]")],
    "robustness.images": Count | None,
    "distill": str
    | Annotated[list[str], Field(min_length=1, description="distill=[<run folder>,<run folder>]")]
    | None,
    "workers": Count | None,
    "combine": Literal["average", "soup", "wise"] | None,
    "tta": Count,
    "views": Count,
    "alphas": Annotated[list[Probability], Field(min_length=1, description="alphas=[0.0,0.5,1.0]")],
}
AUTO = ("precision", "fused_attention", "num_classes")  # settings whose `auto` is replaced before use
TYPE_WORDS: dict[Any, str] = {
    **{int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"},
    list: "a list",
    dict: "a mapping",
    timedelta: "a duration as DD:HH:MM:SS or {minutes: 10}",
}
RANGE_WORDS = {"gt": "above {}", "ge": "{} or more", "lt": "below {}", "le": "at most {}"}


def check_types(node: DictConfig, place: str = "") -> None:
    """Compare every value of every block with the annotation in the signature of its `_target_`.

    `place` is where the configuration lies in the whole, with a dot at its end.

    Raises:
        UserError: names every key whose value is not allowed, the value and what is allowed.
    """
    if problems := find_problems(node, place):
        raise UserError(". ".join(dict.fromkeys(problems)) + ".")


def check_command_settings(cfg: DictConfig) -> None:
    """Compare the settings of a root script that belong to no class with their types; raises as `check_types`."""
    problems = []
    for key in COMMAND_SETTINGS.keys() & dotted_keys(cfg):
        value = OmegaConf.select(cfg, key)
        given = OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
        problems += find_problem(key, given, COMMAND_SETTINGS[key])
    if problems:
        raise UserError(". ".join(sorted(problems)) + ".")


def find_problems(node: DictConfig, place: str) -> list[str]:
    annotations, problems = {}, []
    if "_target_" in node:
        target = imported(f"{place}_target_", str(node._target_))
        annotations, problems = annotated_arguments(target), unknown_arguments(node, target, place)
    for key in map(str, node):
        value: Any = node._get_node(key) if OmegaConf.is_missing(node, key) else node[key]
        if isinstance(value, DictConfig):
            if not OmegaConf.is_interpolation(node, key):  # checked where it is written
                problems += find_problems(value, f"{place}{key}.")
        elif OmegaConf.is_list(value) and any(isinstance(item, DictConfig) for item in value):
            blocks = [(number, item) for number, item in enumerate(value) if isinstance(item, DictConfig)]
            problems += [line for number, item in blocks for line in find_problems(item, f"{place}{key}.{number}.")]
        elif key in annotations and not (value == "auto" and key in AUTO):
            given = OmegaConf.to_container(value) if OmegaConf.is_list(value) else value
            problems += find_problem(written_at(node, key) or f"{place}{key}", given, annotations[key])
    return problems


def written_at(node: DictConfig, key: str) -> str | None:
    """The key that a value is taken from, as in `${seed}`; None where it is written itself."""
    inner: Any = node._get_node(key)
    reference = re.fullmatch(r"\$\{(\w[\w.]*)\}", str(inner._value()))
    return reference and reference[1]


def imported(key: str, name: str) -> Any:
    """The class or function that a `_target_` names, else a UserError; an error inside its own module passes."""
    try:
        return import_target(name)
    except ModuleNotFoundError as error:
        if not f"{name}.".startswith(f"{error.name}."):  # something that the module imports itself
            raise
        module, _, missing = str(error.name).rpartition(".")
    near = nearest_word(missing, vars(sys.modules[module])) if module else None
    place = f"{module} has no {missing}" if module else f"there is no module {missing}"
    raise UserError(f"{key}={name} cannot be imported: {place}{did_you_mean(near and f'{module}.{near}')}")


def unknown_arguments(node: DictConfig, target: Any, place: str) -> list[str]:
    """A message for each key that is not an argument of the class or function."""
    try:
        parameters = inspect.signature(target).parameters
    except (TypeError, ValueError):  # of a built-in
        return []
    if any(each.kind is each.VAR_KEYWORD for each in parameters.values()):
        return []
    unknown = [str(key) for key in node if key not in parameters and not re.fullmatch("_[a-z]+_", str(key))]
    return [
        f"{place}{key} is not an argument of {node._target_}"
        + did_you_mean(f"{place}{near}" if (near := nearest_word(key, parameters)) else None).rstrip(".")
        + f" (it takes {', '.join(parameters)})"
        for key in unknown
    ]


def annotated_arguments(target: Any) -> dict[str, Any]:
    """The annotated arguments of a class or function; none where they cannot be read."""
    if isinstance(target, type):
        target = next(vars(cls)["__init__"] for cls in target.__mro__ if "__init__" in vars(cls))
    try:
        return get_type_hints(target, include_extras=True)
    except (NameError, TypeError):  # names that only a type checker imports
        return {}


def find_problem(key: str, value: Any, annotation: Any) -> list[str]:
    """A message if a value is not of a type or not in its range; an int is also a float."""
    try:
        adapter = TypeAdapter(annotation, config=ConfigDict(arbitrary_types_allowed=True))
        adapter.validate_python(value, strict=None if isinstance(value, list) else True)  # a list may stand for a tuple
    except ValidationError:
        return [f"{key}={as_yaml(value)} must be {in_words(annotation)}"]
    except PydanticUserError:  # a type that pydantic cannot check
        pass
    return []


def in_words(annotation: Any) -> str:
    """The values that a type and its range allow: `a number above 0 and at most 1`."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        fields = [item for item in arguments[1:] if hasattr(item, "metadata")]
        rules = [rule for field in fields for rule in field.metadata]
        bounds = {name: getattr(rule, name) for rule in rules for name in RANGE_WORDS if hasattr(rule, name)}
        if bounds.keys() >= {"ge", "le"}:
            limits = f"from {bounds['ge']} to {bounds['le']}"
        else:
            limits = " and ".join(words.format(bounds[name]) for name, words in RANGE_WORDS.items() if name in bounds)
        comma = ", " if limits.lstrip("-")[:1].isdigit() else " " if limits else ""
        hints = "".join(f"; {field.description}" for field in fields if field.description)
        words = in_words(arguments[0])
        for least in (rule.min_length for rule in rules if hasattr(rule, "min_length")):
            words = words.replace("a list", f"a list of {least} or more", 1)
        return f"{words}{comma}{limits}{hints}"
    if origin is Literal:
        return alternatives([as_yaml(item).strip("'") for item in arguments])
    if origin in (Union, types.UnionType):
        return alternatives([in_words(item) for item in arguments])
    if arguments and isinstance(origin, type) and issubclass(origin, Sequence):
        return f"a list, each item {in_words(arguments[0])}"
    return TYPE_WORDS.get(annotation) or str(getattr(annotation, "__name__", annotation))


def alternatives(choices: Sequence[str]) -> str:
    """`a, b or c`; with a comma before the `or` if a choice has one itself."""
    comma = "," if any("," in choice for choice in choices) else ""
    return choices[0] if len(choices) == 1 else f"{', '.join(choices[:-1])}{comma} or {choices[-1]}"


def as_yaml(value: Any) -> str:
    """A value as one types it: `null`, `true`, `'text'`."""
    return json.dumps(value) if value is None or isinstance(value, bool) else repr(value)
