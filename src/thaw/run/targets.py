"""Which classes a configuration from a file may name: such a configuration is input, not code.

Hydra builds whatever `_target_` names, `os.makedirs` and `torch.load` included, so that names are checked first.
"""

import importlib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from thaw.run.errors import UserError

OWN = "thaw"
OPTIMIZERS = ("torch.optim", "timm.optim")
LIGHTNING = {
    "lightning.Trainer",
    *(f"lightning.pytorch.callbacks.{name}" for name in ("LearningRateMonitor", "ModelCheckpoint")),
    "lightning.pytorch.loggers.TensorBoardLogger",
    "lightning.pytorch.profilers.SimpleProfiler",
}
FUNCTIONS = {
    "thaw.callbacks.progress.RunProgress",
    "thaw.evaluation.probes.knn",
    "thaw.evaluation.probes.logistic_regression",
    "thaw.run.loggers.wandb_logger",
    "thaw.freezing.dora.add_dora",
    "thaw.run.trackers.mlflow_logger",
    "thaw.run.trackers.trackio_logger",
    "thaw.freezing.lora.add_lora",
    "thaw.freezing.adapter.add_adapters",
    "thaw.freezing.prompt.add_prompts",
    "thaw.freezing.surgical.choose_blocks",
    "thaw.freezing.ssf.add_ssf",
}
PARTS = {  # thaw's classes that no base class tells from others
    "thaw.freezing.cache.FeatureCache",
    "thaw.freezing.policy.FreezePolicy",
    "thaw.optim.MuonRecipe",
    "thaw.optim.OptimizerRecipe",
    "thaw.task.SingleLabel",
}

KEY = r"\.*[\w./-]+"
INTERPOLATION = re.compile(  # of another key
    rf"\$\{{(?:oc\.select:{KEY},|backbone_name:)?(?:{KEY}|\$\{{{KEY}\}})\}}"
)


def check_targets(config: Mapping[str, Any], file: Path, allow: Sequence[str], commit: str = "unknown") -> None:
    """Refuse a configuration that names anything but the classes it is meant for; nothing else is imported.

    Allowed are thaw's models, callbacks, loggers and data modules, the optimizers of torch and timm, the classes of
    Lightning that the shipped configurations use, and `allow`: packages, modules or classes of the user's. An object
    counts by the module that defines it, so that `thaw.run.config.os.makedirs` is not thaw's.

    Raises:
        UserError: names the first key that is refused.
    """
    for place, value in config_leaves(config, ""):
        if refers_outside(value):
            raise UserError(
                f"{file}: {place}={value!r} is not run, as it comes from a file; allowed are references to other keys, "
                "such as ${data.batch_size}. Give a checkpoint that train.py wrote."
            )
        if place.rpartition(".")[2] == "_target_" and str(value) not in {*LIGHTNING, *allow}:
            check_target(place, str(value), file, allow, commit)


def check_target(place: str, name: str, file: Path, allow: Sequence[str], commit: str) -> None:
    packages = (OWN, *OPTIMIZERS, *allow)
    try:
        found = import_target(name) if any(is_in(name, package) for package in packages) else None
    except ImportError as error:
        raise UserError(
            f"{file}: {place}={name} cannot be imported ({error}). The file was written by commit {commit}; check "
            "that out, or install the package that it needs."
        ) from error
    if found is None or not any(is_part(found, name, package) for package in packages):
        raise UserError(
            f"{file}: {place}={name!r} is refused and was not run: a checkpoint may name models, callbacks, loggers "
            f"and data modules of thaw, and optimizers of torch and timm. Code of your own in a file that you trust is "
            "allowed by the name of its package: 'allow=[mypackage]'."
        )


def targets(cfg: DictConfig) -> list[str]:
    """The classes that a composed configuration names: the user's choice, in this command or the configs folder."""
    leaves = config_leaves(OmegaConf.to_container(cfg, resolve=False), "")
    return [str(value) for place, value in leaves if place.endswith("._target_") and not place.startswith("hydra.")]


def refers_outside(value: Any) -> bool:
    """Whether a value is an interpolation that calls a resolver, other than for another key of the configuration."""
    return isinstance(value, str) and "${" in INTERPOLATION.sub("", value)


def is_in(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def import_target(name: str) -> Any:
    """The object that a dotted name means; imports packages and modules on the way to it."""
    parts = name.split(".")
    found: Any = importlib.import_module(parts[0])
    for number, part in enumerate(parts[1:], start=2):
        has = hasattr(found, part)
        found = getattr(found, part) if has else importlib.import_module(".".join(parts[:number]))
    return found


def is_part(found: Any, name: str, package: str) -> bool:
    """Whether a package defines an object itself, and for thaw and the optimizers one of the allowed kinds."""
    if not is_in(getattr(found, "__module__", None) or "", package):
        return False
    if package not in (OWN, *OPTIMIZERS):
        return callable(found)
    from lightning import Callback, LightningDataModule
    from lightning.fabric.plugins import CheckpointIO
    from lightning.pytorch.loggers import Logger
    from lightning.pytorch.strategies import Strategy
    from torch import nn, optim

    own = (nn.Module, Callback, LightningDataModule, Logger, CheckpointIO, Strategy, optim.Optimizer)
    kinds = own if package == OWN else optim.Optimizer
    return (isinstance(found, type) and issubclass(found, kinds)) or (package == OWN and name in FUNCTIONS | PARTS)


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
