"""Values of settings against the types and ranges in signatures: `lr: Annotated[float, Field(gt=0)]`."""

import json
import types
from collections.abc import Sequence
from datetime import timedelta
from typing import Annotated, Any, Literal, TypeAlias, Union, get_args, get_origin, get_type_hints

from omegaconf import DictConfig, OmegaConf
from pydantic import ConfigDict, Field, PydanticUserError, TypeAdapter, ValidationError

from thaw.run.errors import UserError

Count: TypeAlias = Annotated[int, Field(ge=1, strict=True)]
CountOrZero: TypeAlias = Annotated[int, Field(ge=0, strict=True)]
Positive: TypeAlias = Annotated[float, Field(gt=0, allow_inf_nan=False, strict=True)]
NonNegative: TypeAlias = Annotated[float, Field(ge=0, allow_inf_nan=False, strict=True)]
Probability: TypeAlias = Annotated[float, Field(ge=0, le=1, strict=True)]

AUTO = ("precision", "fused_attention")  # settings whose `auto` `thaw.run.config.settle` replaces
TYPE_WORDS = {
    **{int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"},
    list: "a list",
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
        raise UserError(". ".join(problems) + ".")


def find_problems(node: DictConfig, place: str) -> list[str]:
    from hydra.utils import get_object

    try:
        annotations = annotated_arguments(get_object(node._target_)) if "_target_" in node else {}
    except (ImportError, ValueError) as error:
        reason = str(error).strip().splitlines()[-1]
        raise UserError(f"{place}_target_={node._target_} cannot be imported: {reason}") from error
    problems = []
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
            problems += find_problem(f"{place}{key}", given, annotations[key])
    return problems


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
            limits = f"from {bounds['ge']:g} to {bounds['le']:g}"
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
