"""Values of settings against the types and ranges in signatures: `lr: Annotated[float, Field(gt=0)]`."""

import json
import types
from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeAlias, Union, get_args, get_origin, get_type_hints

from omegaconf import DictConfig, OmegaConf
from pydantic import ConfigDict, Field, PydanticUserError, TypeAdapter, ValidationError

Count: TypeAlias = Annotated[int, Field(ge=1, strict=True)]
Positive: TypeAlias = Annotated[float, Field(gt=0, allow_inf_nan=False, strict=True)]
NonNegative: TypeAlias = Annotated[float, Field(ge=0, allow_inf_nan=False, strict=True)]
Probability: TypeAlias = Annotated[float, Field(ge=0, le=1, strict=True)]

KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}
BOUNDS = {"gt": "above {}", "ge": "{} or more", "lt": "below {}", "le": "at most {}"}


def check_types(node: DictConfig, place: str = "") -> None:
    """Compare every value of every block with the annotation in the signature of its `_target_`.

    Args:
        node: a configuration.
        place: where it lies in the whole, with a dot at its end.

    Raises:
        ValueError: names every key whose value is not allowed, the value and what is allowed.
    """
    if problems := find_problems(node, place):
        raise ValueError(". ".join(problems) + ".")


def find_problems(node: DictConfig, place: str) -> list[str]:
    from hydra.utils import get_object

    try:
        annotations = annotated_arguments(get_object(node._target_)) if "_target_" in node else {}
    except (ImportError, ValueError) as error:
        reason = str(error).strip().splitlines()[-1]
        raise ValueError(f"{place}_target_={node._target_} cannot be imported: {reason}") from error
    problems = []
    for key in map(str, node):
        value: Any = node._get_node(key) if OmegaConf.is_missing(node, key) else node[key]
        if isinstance(value, DictConfig):
            if not OmegaConf.is_interpolation(node, key):  # checked where it is written
                problems += find_problems(value, f"{place}{key}.")
        elif OmegaConf.is_list(value) and any(isinstance(item, DictConfig) for item in value):
            blocks = [(number, item) for number, item in enumerate(value) if isinstance(item, DictConfig)]
            problems += [line for number, item in blocks for line in find_problems(item, f"{place}{key}.{number}.")]
        elif key in annotations:
            given = OmegaConf.to_container(value) if OmegaConf.is_list(value) else value
            if not is_allowed(given, annotations[key]):
                problems.append(f"{place}{key}={shown(given)} must be {in_words(annotations[key])}")
    return problems


def annotated_arguments(target: Any) -> dict[str, Any]:
    """The annotated arguments of a class or function; none where they cannot be read."""
    if isinstance(target, type):
        target = next(vars(cls)["__init__"] for cls in target.__mro__ if "__init__" in vars(cls))
    try:
        return get_type_hints(target, include_extras=True)
    except (NameError, TypeError):  # names that only a type checker imports
        return {}


def is_allowed(value: Any, annotation: Any) -> bool:
    """Whether a value is of a type and in its range, as strictly as YAML can tell: an int is a float, too.

    `auto` is of every type, as `thaw.run.config.settle` replaces it.
    """
    if value == "auto":
        return True
    try:
        adapter = TypeAdapter(annotation, config=ConfigDict(arbitrary_types_allowed=True))
        adapter.validate_python(value, strict=None if isinstance(value, list) else True)  # a list may stand for a tuple
    except ValidationError:
        return False
    except PydanticUserError:  # a type that pydantic cannot check
        return True
    return True


def in_words(annotation: Any) -> str:
    """What a type and its range allow: `a number above 0 and at most 1`."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        fields = [item for item in arguments[1:] if hasattr(item, "metadata")]
        bounds = {name: getattr(rule, name) for field in fields for rule in field.metadata for name in vars_of(rule)}
        if bounds.keys() >= {"ge", "le"}:
            limits = f"from {bounds['ge']:g} to {bounds['le']:g}"
        else:
            limits = " and ".join(words.format(bounds[name]) for name, words in BOUNDS.items() if name in bounds)
        hints = "".join(f"; {field.description}" for field in fields if field.description)
        comma = ", " if limits[:1].isdigit() else " " if limits else ""
        words = in_words(arguments[0])
        if least := [rule.min_length for field in fields for rule in field.metadata if hasattr(rule, "min_length")]:
            words = words.replace("a list", f"a list of {least[0]} or more", 1)
        return f"{words}{comma}{limits}{hints}"
    if origin is Literal:
        return one_of([shown(item).strip("'") for item in arguments])
    if origin in (Union, types.UnionType):
        return one_of([in_words(item) for item in arguments])
    if origin is not None and isinstance(origin, type) and issubclass(origin, Sequence):
        return f"a list, each item {in_words(arguments[0])}" if arguments else "a list"
    return KINDS.get(annotation) or str(getattr(annotation, "__name__", annotation))


def vars_of(rule: Any) -> list[str]:
    return [name for name in BOUNDS if hasattr(rule, name)]


def one_of(choices: Sequence[str]) -> str:
    return choices[0] if len(choices) == 1 else f"{', '.join(choices[:-1])} or {choices[-1]}"


def shown(value: Any) -> str:
    """As it is typed: `null`, `true`, `'text'`."""
    return json.dumps(value) if value is None or isinstance(value, bool) else repr(value)
