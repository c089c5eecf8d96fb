"""Run folders read back from their files alone."""

import json
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from thaw.run.command_line import override_key
from thaw.run.errors import UserError
from thaw.run.files import SafeLoader, without_aliases
from thaw.run.folders import NOT_THE_RUN, is_locked
from thaw.run.values import AUTO

DONE = "done"
FAILURES = ("failed", "pruned", "killed", "timeout")
UNFINISHED = {  # and why
    "interrupted": "ended before it was done",
    "running": "another process works in its folder",
    "waiting": "has not started",
}
RUN_FILES = ("config.yaml", "summary.json", "failure.json")
RECORD = "record.yaml"  # which `find_runs` does without
ACCURACY = ("val/acc",)
COSTS = ("trainable_params", "total_params", "seconds", "peak_memory_gb", "checkpoint_mb")
NUMBERS = {  # key in summary.json or failure.json -> field of a run
    **{"val/acc": "val_acc", "test/acc": "test_acc", "test/acc_low": "test_low", "test/acc_high": "test_high"},
    **{name: name for name in (*COSTS, "epochs")},
}
NOT_SEARCHED = {"checkpoints", "wandb", "csv"}

MEASURED = "freeze.chosen"  # by the run itself, unless it is typed
NOT_THE_SETTING = (*NOT_THE_RUN, "seed", "data.dir", "data.fold")  # runs that differ in these alone are of one setting


@dataclass(frozen=True)
class Run:
    """The record of one run; None where its files say nothing.

    `val_acc`, `test_acc` and the bounds of its 95 % interval, `test_low` and `test_high`, are from 0 to 1. `settings`
    is as `settings_of` makes it, and empty if there is no `config.yaml`.
    """

    folder: Path
    state: str
    name: str = "?"
    overrides: tuple[str, ...] = ()
    seed: int | None = None
    fold: int | None = None
    folds: int | None = None
    val_acc: float | None = None
    test_acc: float | None = None
    test_low: float | None = None
    test_high: float | None = None
    trainable_params: int | None = None
    total_params: int | None = None
    seconds: float | None = None
    peak_memory_gb: float | None = None
    checkpoint_mb: float | None = None
    epochs: int | None = None
    reason: str = ""
    traceback: str = ""
    data: str = ""
    command: str = ""
    started: str = ""
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def failed(self) -> bool:
        return self.state in FAILURES and self.state != "pruned"

    @property
    def repeat(self) -> int | Path:
        """Which repeat of its setting this is: its fold, or its seed; a run that tells neither is its own."""
        return next(each for each in (self.fold, self.seed, self.folder) if each is not None)

    @property
    def repeat_name(self) -> str:
        """`data.fold=3 seed=0`, as far as the run tells."""
        said = {"data.fold": self.fold, "seed": self.seed}
        return " ".join(f"{key}={value}" for key, value in said.items() if value is not None)

    @property
    def has_auto(self) -> bool:
        """Whether settings are not settled yet, because the run has not started to train."""
        return any(value == "auto" and key.rpartition(".")[2] in AUTO for key, value in self.settings.items())

    @cached_property
    def identity(self) -> str:
        """Equal for runs that differ in their seed or fold alone."""
        return json.dumps(self.settings or [self.name, *self.overrides], sort_keys=True, default=str)


def find_runs(folders: Sequence[Path]) -> list[Path]:
    """All run folders at and below the given ones, each once; links below them are not followed.

    Raises:
        UserError: a folder does not exist or holds no run.
    """
    found: dict[Path, None] = {}  # a set that keeps the order
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"{folder} is not a folder; give the folder of a sweep or of runs, such as logs/sweeps.")
        here = []
        for path, inner, files in os.walk(folder.resolve()):
            inner[:] = sorted(name for name in inner if name not in NOT_SEARCHED and not name.startswith("."))
            if set(RUN_FILES) & set(files):
                here.append(Path(path))
        if not here:
            raise UserError(
                f"{folder} holds no run: no folder at or below it has a {', a '.join(RUN_FILES)}. "
                "Give the folder of a sweep or of runs, such as logs/sweeps."
            )
        found.update(dict.fromkeys(here))
    return list(found)


def is_run(folder: Path) -> bool:
    return any((folder / name).is_file() for name in RUN_FILES)


def read_run(folder: Path, warnings: list[str]) -> Run:
    """The record of one run; files and values that cannot be read are left out and named in `warnings`."""
    config, summary, failure = (read_mapping(folder / name, warnings) for name in RUN_FILES)
    if summary:
        state = DONE
    elif is_locked(folder):
        state = "running"
    elif failure:
        state = failure["status"] if failure.get("status") in FAILURES else "failed"
    else:
        state = "interrupted"
    facts, record = failure | summary, read_mapping(folder / RECORD, warnings)
    keys = dotted(config)
    said = config | facts
    return Run(
        folder=folder,
        state=state,
        name=str(said.get("name", folder.name)),
        overrides=split_overrides(said.get("overrides")),
        seed=finite_number(said, "seed", folder, warnings),
        fold=finite_number(keys, "data.fold", folder, warnings),
        folds=finite_number(keys, "data.folds", folder, warnings),
        **{name: finite_number(facts, key, folder, warnings) for key, name in NUMBERS.items()},
        reason="" if state == DONE else UNFINISHED.get(state) or str(failure.get("reason")),
        traceback="" if state == DONE else str(failure.get("traceback") or ""),
        data=", ".join(filter(None, (summary.get("dataset"), summary.get("data_source")))),
        command=str(record.get("command", "")),
        started=str(record.get("started", "")),
        settings=settings_of(config),
    )


def read_mapping(path: Path, warnings: list[str]) -> dict[str, Any]:
    """The keys of a JSON or YAML file; none if it is missing or broken."""
    if not path.is_file():
        return {}
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text) if path.suffix == ".json" else SafeLoader(without_aliases(text)).get_single_data()
        if not isinstance(content, dict):
            raise UserError(f"holds a {type(content).__name__} where keys and values were expected")
    except (ValueError, OSError, yaml.YAMLError) as error:
        warnings.append(f"{os.path.relpath(path)} cannot be read and is left out: {' '.join(str(error).split())}")
        return {}
    return content


def read_objectives(folders: Sequence[Path]) -> list[str]:
    """What a search looked for, from its `multirun.yaml`; validation accuracy for other folders."""
    found = [read_mapping(folder / "multirun.yaml", []).get("sweep") for folder in folders]
    return [*found[0]["objectives"]] if len(found) == 1 and found[0] else [*ACCURACY]


def finite_number(facts: dict[str, Any], key: str, folder: Path, warnings: list[str]) -> Any:
    value = facts.get(key)
    if value is None or (isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)):
        return value
    warnings.append(f"{os.path.relpath(folder)}: {key} is {value!r}, not a finite number; it is left out.")
    return None


def dotted(config: Any, prefix: str = "") -> dict[str, Any]:
    """Nested keys joined with dots; lists stay whole."""
    if not isinstance(config, dict) or not config:
        return {prefix: config} if prefix else {}
    return {
        key: value
        for name, inner in config.items()
        for key, value in dotted(inner, f"{prefix}.{name}" if prefix else str(name)).items()
    }


def settings_of(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration with dotted keys, without `NOT_THE_SETTING` and what the run has measured itself.

    It has `data.folds` if it is of one of them.
    """
    keys = dotted(config)
    typed = map(override_key, split_overrides(config.get("overrides")))
    unused = {MEASURED}.difference(typed) | ({"data.folds"} if keys.get("data.fold") is None else set())
    return {key: value for key, value in keys.items() if not is_aside(key) and key not in unused}


def is_aside(key: str) -> bool:
    return any(key == aside or key.startswith(f"{aside}.") for aside in NOT_THE_SETTING)


def split_overrides(text: Any) -> tuple[str, ...]:
    """`optim.lr=0.1 seed=1 betas=[0.9, 0.99]` as (`optim.lr=0.1`, `betas=[0.9, 0.99]`): without `NOT_THE_SETTING`."""
    parts = re.split(r"\s+(?=[+~]{0,2}[\w./@:-]+=|~)", str(text or "").strip())
    return tuple(part for part in parts if part and not is_aside(override_key(part)))
