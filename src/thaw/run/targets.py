"""Which classes a configuration from a file may name: such a configuration is input, not code.

Hydra builds whatever `_target_` names, `os.makedirs` and `torch.load` included, so that names are checked first: all of
them by their text, then, of packages that are allowed, what they are.
"""

import importlib
import re
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from thaw.run.errors import UserError

OWN = "thaw"
OPTIMIZERS = ("torch.optim", "timm.optim")
NAMED = {  # place -> classes and functions that no base class tells from others
    "trainer": {"lightning.Trainer"},
    "trainer.profiler": {"thaw.callbacks.run_profile.RunProfile"},
    "callbacks.*": {f"lightning.pytorch.callbacks.{name}" for name in ("LearningRateMonitor", "ModelCheckpoint")},
    "logger.*": {
        "thaw.run.csv_log.RunCSV",
        "thaw.run.loggers.RunTensorBoard",
        "thaw.run.loggers.wandb_logger",
        "thaw.run.trackers.mlflow_logger",
        "thaw.run.trackers.trackio_logger",
    },
    "*": {
        "thaw.evaluation.probes.knn",
        "thaw.evaluation.probes.logistic_regression",
        "thaw.evaluation.propagation.propagation",
        "thaw.evaluation.propagation.prototype",
        "thaw.freezing.adapter.add_adapters",
        "thaw.freezing.cache.FeatureCache",
        "thaw.freezing.dora.add_dora",
        "thaw.freezing.lora.add_lora",
        "thaw.freezing.policy.FreezePolicy",
        "thaw.freezing.prompt.add_prompts",
        "thaw.freezing.ssf.add_ssf",
        "thaw.freezing.surgical.choose_blocks",
        "thaw.optim.MuonRecipe",
        "thaw.optim.OptimizerRecipe",
        "thaw.task.Distillation",
        "thaw.task.SingleLabel",
    },
}
LIGHTNING = {name for names in NAMED.values() for name in names if not name.startswith(f"{OWN}.")}
BLOCKS = {"average": "callbacks"}  # a block of its own in train.yaml that another one refers to
PLAIN_TYPES = (str, int, float, bool, type(None))
DEEPEST, MOST_VALUES = 40, 20_000  # levels, and values with all references followed; a run has 6 and about 600

KEY = r"\.*[\w./-]+"
INTERPOLATION = re.compile(  # of another key
    rf"\$\{{(?:oc\.select:{KEY},|backbone_name:)?(?:{KEY}|\$\{{{KEY}\}})\}}"
)


def check_targets(config: Mapping[str, Any], file: Path, allow: Sequence[str], commit: str = "unknown") -> None:
    """Refuse a configuration that names anything but the classes it is meant for; nothing else is imported.

    Allowed are thaw's models, callbacks and data modules, the optimizers of torch and timm, the loggers and the classes
    of Lightning that the shipped configurations use, each in the block that is for them, and `allow`: packages, modules
    or classes of the user's. An object counts by the module that defines it, so that `thaw.run.config.os.makedirs` is
    not thaw's.

    Raises:
        UserError: names the first key that is refused.
    """
    check_plain(config, file, allow)
    for place, value in config_leaves(config, ""):
        key = place.rpartition(".")[2]
        if key == "_target_":
            if not isinstance(value, str) or not (value in LIGHTNING or within(value, (OWN, *OPTIMIZERS, *allow))):
                raise refusal(place, value, file)
        elif refers_outside(value):
            raise UserError(
                f"{file}: {place}={value!r} is not run, as it comes from a file; allowed are references to other keys, "
                "such as ${data.batch_size}. Give a checkpoint that train.py wrote."
            )
    try:
        cfg = OmegaConf.create(dict(config))
    except OmegaConfBaseException as error:
        raise UserError(f"{file}: its configuration cannot be read ({str(error).splitlines()[0]}).") from error
    for place, name in built_blocks(cfg, file):
        if name not in allow:
            check_target(place, name, file, allow, commit)


def check_plain(config: Any, file: Path, allow: Sequence[str]) -> None:
    """Refuse what is not nested mappings and lists of plain values, and arguments without names, which hide paths."""
    values: list[tuple[str, Any, int]] = [("", config, 0)]
    for _ in range(MOST_VALUES):
        if not values:
            return
        place, value, depth = values.pop()
        if isinstance(value, dict):
            if odd := [key for key in value if type(key) not in (str, int)]:
                raise UserError(f"{file}: {place} has the key {odd[0]!r}; a key of a configuration is text.")
            if "_args_" in value and not within(str(value.get("_target_")), allow):
                raise UserError(f"{file}: {place}._args_ is refused, as a run's configuration names each argument.")
            values += [(f"{place}.{key}" if place else str(key), inner, depth + 1) for key, inner in value.items()]
        elif isinstance(value, list | tuple):
            values += [(f"{place}.{number}", inner, depth + 1) for number, inner in enumerate(value)]
        elif isinstance(value, str) and "match" in place.split(".")[-2:] and backtracks(value):
            raise UserError(
                f"{file}: {place}={value!r} could take years to match, as it repeats what repeats; it is not used."
            )
        elif not isinstance(value, PLAIN_TYPES):
            kind = type(value).__name__
            raise UserError(f"{file}: {place} is a {kind}; a configuration holds text, numbers, lists and mappings.")
        if depth > DEEPEST:
            break
    raise UserError(
        f"{file}: its configuration has more than {MOST_VALUES:,} values or {DEEPEST} levels; it is not one of a run."
    )


def backtracks(pattern: str) -> bool:
    """Whether a regular expression repeats a group that itself repeats or branches, which may take exponential time."""
    open_groups, before, inner = [False], "", False
    for part in re.findall(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|.", pattern, re.DOTALL):
        if part == "(":
            open_groups.append(False)
        elif part == ")" and len(open_groups) > 1:
            inner = open_groups.pop()
            open_groups[-1] |= inner
        elif part in ("*", "+", "{", "?", "|") and before != "(":
            if before == ")" and inner and part in "*+{":
                return True
            open_groups[-1] = True
        before = part
    return False


def refusal(place: str, name: Any, file: Path) -> UserError:
    return UserError(
        f"{file}: {place}={name!r} is refused and was not run: a checkpoint may name models, callbacks, loggers "
        "and data modules of thaw, and optimizers of torch and timm, each in its own block. Code of your own in a file "
        "that you trust is allowed by the name of its package: 'allow=[mypackage]'."
    )


def check_target(place: str, name: str, file: Path, allow: Sequence[str], commit: str) -> None:
    """Refuse a class or function that its block is not for, or that an allowed package only imports from elsewhere."""
    block = place.removesuffix("._target_")
    if any(name in names and fnmatchcase(block, pattern) for pattern, names in NAMED.items()):
        return
    top = block.partition(".")[0]
    try:
        if any(is_part(import_target(name), each) for each in allow if is_in(name, each)):
            return
        for package in (each for each in (OWN, *OPTIMIZERS) if is_in(name, each)):
            module, _, attribute = name.rpartition(".")  # nothing between, such as what a module imports
            found = getattr(importlib.import_module(module), attribute, None)
            if (
                isinstance(found, type)
                and is_part(found, package)
                and issubclass(found, kinds(package, BLOCKS.get(top, top)))
            ):
                return
    except (ImportError, ValueError) as error:
        raise UserError(
            f"{file}: {place}={name} cannot be imported ({error}). The file was written by commit {commit}; check "
            "that out, or install the package that it needs."
        ) from error
    raise refusal(place, name, file)


def built_blocks(cfg: DictConfig, file: Path) -> Iterator[tuple[str, str]]:
    """Place and `_target_` of every block that Hydra would build, references followed."""
    open_nodes: list[tuple[str, Any]] = [("", cfg)]
    for _ in range(MOST_VALUES):
        if not open_nodes:
            return
        place, node = open_nodes.pop()
        if OmegaConf.is_dict(node) and "_target_" in node:
            yield f"{place}._target_", node["_target_"]
        keys = list(node) if OmegaConf.is_dict(node) else range(len(node))
        for key in keys if node is not None else ():
            try:
                inner = None if OmegaConf.is_missing(node, key) else node[key]
            except (
                OmegaConfBaseException,
                RecursionError,
            ):  # of a reference to nothing, which is told where it is read
                continue
            if OmegaConf.is_config(inner):
                open_nodes.append((f"{place}.{key}" if place else str(key), inner))
    raise UserError(
        f"{file}: its configuration refers to itself, or has more than {MOST_VALUES:,} blocks; it is not one of a run."
    )


def targets(cfg: DictConfig) -> list[str]:
    """The classes of other packages that a composed configuration names: the user's choice, typed or in configs/."""
    leaves = config_leaves(OmegaConf.to_container(cfg, resolve=False), "")
    named = [str(value) for place, value in leaves if place.endswith("._target_") and not place.startswith("hydra.")]
    return [name for name in named if not within(name, (OWN, *OPTIMIZERS, *LIGHTNING))]


def refers_outside(value: Any) -> bool:
    """Whether a value is an interpolation that calls a resolver, other than for another key of the configuration."""
    return isinstance(value, str) and "${" in INTERPOLATION.sub("", value)


def is_in(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def within(name: str, packages: Sequence[str]) -> bool:
    return any(is_in(name, package) for package in packages)


def import_target(name: str) -> Any:
    """The object that a dotted name means; imports packages and modules on the way to it."""
    parts = name.split(".")
    found: Any = importlib.import_module(parts[0])
    for number, part in enumerate(parts[1:], start=2):
        has = hasattr(found, part)
        found = getattr(found, part) if has else importlib.import_module(".".join(parts[:number]))
    return found


def is_part(found: Any, package: str) -> bool:
    """Whether a package defines a class or function itself."""
    return callable(found) and is_in(getattr(found, "__module__", None) or "", package)


def kinds(package: str, block: str) -> tuple[type, ...]:
    """The base classes of what a block of a configuration may build from a package."""
    from lightning import Callback, LightningDataModule
    from lightning.fabric.plugins import CheckpointIO
    from lightning.pytorch.strategies import Strategy
    from torch import nn, optim

    own: dict[str, tuple[type, ...]] = {
        "callbacks": (Callback,),
        "data": (LightningDataModule,),
        "trainer": (CheckpointIO, Strategy),
    }
    return (optim.Optimizer,) if package in OPTIMIZERS else (nn.Module, optim.Optimizer, *own.get(block, ()))


def config_leaves(value: Any, place: str) -> Iterator[tuple[str, Any]]:
    """The single values in a configuration, with their keys in the whole; `_target_` and what is empty count as one."""
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            inside = f"{place}.{key}" if place else str(key)
            yield from [(inside, inner)] if key == "_target_" else config_leaves(inner, inside)
    elif isinstance(value, list | tuple) and value:
        for number, inner in enumerate(value):
            yield from config_leaves(inner, f"{place}.{number}")
    else:
        yield place, value
