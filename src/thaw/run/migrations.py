"""Configurations of earlier versions: what has become of their keys, so that their checkpoints still load.

Add each key here that is renamed or removed, and each new key whose default in the YAML is not what the code did
before. tests/checkpoints/ holds checkpoints of earlier versions that must load.
"""

import copy
import re
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from thaw.run.errors import UserError
from thaw.run.targets import OWN

CONFIGS = Path(__file__).parents[3] / "configs"

FORMER_NAMES: tuple[str, ...] = ()  # of this package: `make rename` adds them
RENAMED = {  # class -> its name today
    "lightning.pytorch.callbacks.EarlyStopping": "thaw.callbacks.monitored_metric.EarlyStopping",
    "lightning.pytorch.loggers.TensorBoardLogger": "thaw.run.loggers.RunTensorBoard",
    "thaw.callbacks.early_stopping.EarlyStopping": "thaw.callbacks.monitored_metric.EarlyStopping",
    "thaw.callbacks.log_interval.LogInterval": "thaw.callbacks.progress.LogInterval",
    "thaw.callbacks.progress.progress": "thaw.callbacks.progress.RunProgress",
    "thaw.callbacks.progress.progress_bar": "thaw.callbacks.progress.RunProgress",
    "thaw.data.datamodule.MNISTDataModule": "thaw.data.mnist.MNISTData",
    "thaw.callbacks.test_report.TestReport": "thaw.evaluation.final_test.FinalTest",
    "thaw.csv_log.RunCSV": "thaw.run.csv_log.RunCSV",
    "thaw.loggers.wandb_logger": "thaw.run.loggers.wandb_logger",
    "thaw.models.bank_classifier.BankClassifier": "thaw.lr_bank.BankClassifier",
    "thaw.models.classifier.Classifier": "thaw.classifier.Classifier",
    "thaw.models.feature_cache.FeatureCache": "thaw.freezing.cache.FeatureCache",
    "thaw.models.freezing.FreezePolicy": "thaw.freezing.policy.FreezePolicy",
    "thaw.models.lora.add_lora": "thaw.freezing.lora.add_lora",
    "thaw.models.lr_bank.LRBank": "thaw.lr_bank.LRBank",
    "thaw.models.optim.OptimizerRecipe": "thaw.optim.OptimizerRecipe",
    "thaw.models.sharding.FullyShard": "thaw.sharding.FullyShard",
}
REMOVED = {"thaw.callbacks.weight_averaging.SWA"}  # classes whose blocks become null; their weights load as before
RENAMED_KEYS = {  # (class, key) -> the key's name today
    ("thaw.callbacks.feature_monitor.FeatureMonitor", "digits"): "images",
    ("thaw.callbacks.sample_grid.SampleGrid", "digits"): "images",
    ("thaw.freezing.policy.FreezePolicy", "lora"): "add",
}
REMOVED_KEYS: dict[tuple[str, str], Any] = {
    ("thaw.freezing.cache.FeatureCache", "views"): None
}  # (class, key) -> the only value that today's code still has
ADDED_KEYS: dict[tuple[str, str], Any] = {
    ("thaw.optim.OptimizerRecipe", "schedule"): "cosine",
    ("thaw.pretrain.simclr.SimCLR", "hidden"): 192,  # the width of the bundled backbone
}  # (class, key) -> what the code did before, where the YAML says another


def migrate(config: Mapping[str, Any], file: Path, commit: str) -> tuple[dict[str, Any], list[str]]:
    """The configuration of a file as today's version writes it, and what was changed, a line for each key.

    Keys that a block lacks are those that configurations of the same class have today, with the value of the YAML; so
    are whole groups, such as `trainer`.

    Raises:
        UserError: a removed key with a value that today's code lacks, or a missing one without a single value today.
    """
    config = dict(copy.deepcopy(config))
    missing = {group: copy.deepcopy(block) for group, block in default_keys().items() if group not in config}
    changed = [group for group, block in missing.items() if isinstance(block, dict)]
    config |= missing
    for place, block in mappings(config):
        for key, inner in block.items():
            if isinstance(inner, dict) and inner.get("_target_") in REMOVED:
                block[key] = None
                changed.append(f"{place}{key}=null, as {inner['_target_']} is gone")
        if isinstance(block.get("_target_"), str):  # anything else is refused later
            migrate_block(block, place, changed, f"{file} was written by commit {commit} of thaw, and today's version")
    return config, changed


def mappings(value: Any, place: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every mapping in a value, itself included, with its place in the whole."""
    if isinstance(value, dict):
        yield place, value
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from mappings(inner, f"{place}{key}.")


def migrate_block(block: dict[str, Any], place: str, changed: list[str], cannot: str) -> None:
    target = block["_target_"]
    for former in FORMER_NAMES:
        target = re.sub(rf"^{former}(?=\.)", OWN, target)
    target = block["_target_"] = RENAMED.get(target, target)
    for key in [key for key in block if (target, key) in RENAMED_KEYS]:
        block[RENAMED_KEYS[target, key]] = block.pop(key)
        changed.append(f"{place}{RENAMED_KEYS[target, key]} was once {key}")
    for key in [key for key in block if (target, key) in REMOVED_KEYS]:
        if block.pop(key) != REMOVED_KEYS[target, key]:
            raise UserError(f"{cannot} has {place}{key}={REMOVED_KEYS[target, key]} alone. Check that commit out.")
        changed.append(f"{place}{key} is gone")
    today = blocks_of_today(target)
    common = set.intersection(*map(set, today)) if today else set()
    for key in sorted(common - block.keys() - {"defaults"}):
        values = [ADDED_KEYS[target, key]] if (target, key) in ADDED_KEYS else [other[key] for other in today]
        if any(value != values[0] for value in values):
            raise UserError(f"{cannot} needs {place}{key}, whose value is not known. Check that commit out.")
        block[key] = copy.deepcopy(values[0])
        changed.append(f"{place}{key}={values[0]}")


@cache
def blocks_of_today(target: str) -> list[dict[str, Any]]:
    """The blocks of the configuration files that build a class."""
    files = [path for path, text in config_files().items() if target in text]
    return [block for path in files for _, block in mappings(inherited(path)) if block.get("_target_") == target]


def inherited(path: Path) -> dict[str, Any]:
    """The content of a configuration file, below it that of the files in its folder that it starts from."""
    content = parsed(path)
    for name in content.get("defaults", []):
        parent = path.parent / f"{str(name).partition('@')[0]}.yaml"
        if parent in config_files():
            content = inherited(parent) | content
    return content


@cache
def default_keys() -> dict[str, Any]:
    """The top-level keys of every run, from configs/train.yaml."""
    path = CONFIGS / "train.yaml"
    if path not in config_files():  # installed without the checkout
        return {}
    train = dict(parsed(path))
    chosen = [item for entry in train.pop("defaults") if isinstance(entry, dict) for item in entry.items()]
    keys = {key: value for key, value in train.items() if key != "hydra" and "${hydra:" not in str(value)}
    for group, choice in chosen:
        path = CONFIGS / group / f"{choice}.yaml"
        if path in config_files():  # not lists of choices, nor none
            block = parsed(path)
            keys[group] = block[group] if block.keys() == {group} else block  # of `@package _global_`
    return keys


@cache
def config_files() -> dict[Path, str]:
    """Path and text of every configuration file."""
    return {path: path.read_text(encoding="utf-8") for path in sorted(CONFIGS.rglob("*.yaml"))}


@cache
def parsed(path: Path) -> dict[str, Any]:
    content: Any = OmegaConf.to_container(OmegaConf.create(config_files()[path]))
    return content
