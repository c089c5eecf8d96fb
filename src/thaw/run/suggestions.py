"""What a setting that does not exist was meant to be: the nearest key or option, as a command that works."""

import difflib
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from thaw.run.migrations import CONFIGS

OTHER_NAMES = {"learning_rate": "lr", "epochs": "max_epochs", "gpus": "devices", "pretrained": "weights"}
SHAPE = "A setting is typed as key=value, e.g. optim.lr=1e-3."


def nearest_word(word: str, words: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The word that resembles another most, if one does."""
    return next(iter(difflib.get_close_matches(word, list(words), 1, cutoff)), None)


def did_you_mean(found: str | None) -> str:
    return f"; did you mean {found}?" if found else "."


def explain_composition(error: Exception) -> str:
    """Why Hydra cannot compose a configuration, with what was allowed and what was perhaps meant."""
    from hydra.errors import MissingConfigException, OverrideParseException  # report.py does without Hydra

    message = str(error).strip()
    if isinstance(error, MissingConfigException) and error.missing_cfg_file and error.options is not None:
        return explain_option(error.missing_cfg_file, error.options)
    if isinstance(error, OverrideParseException):
        if "=" not in error.override:
            return f"{error.override!r} is not a setting{did_you_mean(meant_by(error.override))} {SHAPE}"
        return (
            f"{error.override}: {message.splitlines()[0]}. A value with spaces, commas, brackets or = needs quotes for "
            "Hydra inside those for the shell: \"key='a value'\"."
        )
    first, _, advice = message.partition("\n")
    if first.startswith("Ambiguous value"):
        override = first.split("'")[1]
        key, _, value = override.partition("=")
        program = Path(sys.argv[0]).name.replace("sweep.py", "train.py")
        return (
            f"{override} holds several values. To run each of them: python {program} -m {override}. For a list: "
            f"{key}=[{value}]."
        )
    cause: Any = error.__cause__
    program = Path(sys.argv[0]).name
    if first.endswith("No match in the defaults list."):
        override = advice.rpartition("+")[2]
        group = override.partition("=")[0]
        other = f"python {group}.py {override}" if (CONFIGS / f"{group}.yaml").is_file() else None
        return f"{override} is not a setting of {program}{did_you_mean(other)} {program} --help lists its settings."
    if advice.startswith("To append") and isinstance(cause, OmegaConfBaseException):
        return explain_key(advice.partition("+")[2], cause.parent_node)
    return message


def explain_option(file: str, options: Iterable[str]) -> str:
    """That a group lacks an option; `file` is `<group>/<option>`."""
    group, _, option = file.rpartition("/")
    inside = [f"{option}/{path.stem}" for path in sorted((CONFIGS / file).glob("*.yaml")) if option]  # of a folder
    known = inside or list(options)
    found = next(iter(inside), None) or nearest_word(option, known)
    return f"{group}={option} does not exist{did_you_mean(found and f'{group}={found}')}\noptions: {', '.join(known)}"


def explain_key(override: str, parent: Any) -> str:
    """That a key does not exist in `parent`, a part of the composed configuration or one of its values."""
    key, _, value = override.partition("=")
    if not isinstance(parent, DictConfig) or not parent:
        place = key.rpartition(".")[0]
        return f"{key} is not a setting{did_you_mean(f'{place}={value}')}"
    allowed = [str(each) for each in parent if each not in ("_target_", "hydra", "overrides", "run_dir")]
    found = nearest_key(key, parent)
    place = parent._get_full_key("") or "the top level"
    return (
        f"{key} is not a setting{did_you_mean(found and f'{found}={value}')}\nallowed in {place}: {', '.join(allowed)}"
    )


def nearest_key(key: str, parent: DictConfig) -> str | None:
    """The key beside the wrong one that resembles it most; else one whose last part does, anywhere."""
    place, dot, name = key.rpartition(".")
    groups = [] if place else [path.name for path in CONFIGS.glob("*") if path.is_dir()]
    if found := nearest_word(name, [*map(str, parent), *groups]):
        return f"{place}{dot}{found}"
    keys = sorted(dotted_keys(parent._get_root()), key=len)
    last = nearest_word(OTHER_NAMES.get(name, name), [each.rpartition(".")[2] for each in keys])
    return next((each for each in keys if each.rpartition(".")[2] == last), None)


def dotted_keys(node: Any, place: str = "") -> list[str]:
    """Every key of a configuration except Hydra's own."""
    keys = []
    is_open = isinstance(node, DictConfig) and not node._is_none() and not node._is_interpolation()
    for key in map(str, node) if is_open else ():
        if key not in ("hydra", "_target_"):
            inside = f"{place}{key}"
            keys += [inside, *dotted_keys(node._get_node(key), f"{inside}.")]
    return keys


def meant_by(word: str) -> str | None:
    """The setting that a single word was perhaps meant to be: an option of a group, a checkpoint, or a group."""
    if word == "last" or Path(word).exists():
        return f"{'resume' if Path(sys.argv[0]).stem == 'train' else 'ckpt'}={word}"
    files = sorted(CONFIGS.glob("*/*.yaml"), key=lambda path: (path.parent.name != "experiment", str(path)))
    found = nearest_word(word, [path.stem for path in files], cutoff=0.75)
    return next((f"{path.parent.name}={found}" for path in files if path.stem == found), None)
