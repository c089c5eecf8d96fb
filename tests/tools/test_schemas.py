"""The schemas of configs/: shipped files fit them, a misspelt key or a wrong value does not, and editors find them."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from jsonschema import Draft7Validator, ValidationError
from omegaconf import OmegaConf

from tools.schemas import NO_BLOCKS, schemas

CONFIGS = ROOT / "configs"
HYDRAS_OWN = tuple(group for group in NO_BLOCKS if group.startswith("hydra/"))
MADE = schemas()


def read(text: str | Path) -> Any:
    return OmegaConf.to_container(OmegaConf.load(text) if isinstance(text, Path) else OmegaConf.create(text))


def validator(name: str) -> Draft7Validator:
    """Of a group's schema; a group that a fork has removed is skipped."""
    return Draft7Validator(MADE[name]) if name in MADE else pytest.skip(f"no configs/{name}")


def innermost(errors: Iterator[ValidationError]) -> str:
    """Where the first schema of each choice does not fit, and why: what an editor underlines."""
    found = []
    for error in errors:
        while error.context:
            error = next(each for each in error.context if each.relative_schema_path[0] == 0)
        found.append(f"{error.json_path}: {error.message}")
    return "\n".join(found)


def editors_schemas(path: Path) -> list[str]:
    """The schemas by which an editor checks a file: the one that its first lines name, else those of the settings."""
    if named := re.match(r"# @.*\n# yaml-language-server: \$schema=(\S+)", path.read_text()):
        return [(path.parent / named[1]).resolve().relative_to(ROOT).as_posix()]
    settings = json.loads((ROOT / ".vscode" / "settings.json").read_text())["yaml.schemas"]
    globs = [(name, pattern) for name, patterns in settings.items() for pattern in patterns]
    return [name.removeprefix("./") for name, pattern in globs if path in ROOT.glob(pattern.removeprefix("/"))]


def test_shipped_files_fit_the_schema_that_an_editor_takes() -> None:
    names = {f"build/schemas/{name.replace('/', '_')}.json": name for name in MADE}
    for path in CONFIGS.rglob("*.yaml"):
        group = path.parent.relative_to(CONFIGS).as_posix()
        if group.startswith(HYDRAS_OWN) or (group == "." and path.stem not in ("train", "sweep", "compare")):
            continue
        (name,) = editors_schemas(path)
        assert not innermost(validator(names[name]).iter_errors(read(path))), path


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        ("experiment", "optm: {lr: 1.0}", "$: 'optm' does not match"),
        ("experiment", "optim: {lrr: 1.0}", "$.optim: 'lrr' does not match"),
        ("experiment", "optim: {lr: fast}", "$.optim.lr: 'fast' is not of type 'number'"),
        ("experiment", "optim: {lr: 0}", "$.optim.lr: 0 is less than or equal to the minimum of 0"),
        ("experiment", "optim: {optimizer: {beta: [0.9]}}", "$.optim.optimizer: 'beta' does not match"),
        ("experiment", "trainer: {max_epoch: 3}", "$.trainer: 'max_epoch' does not match"),
        ("experiment", "test: sometimes", "$.test: 'sometimes' is not of type 'boolean'"),
        ("experiment", "callbacks: {mine: {patience: 3}}", "$.callbacks.mine: '_target_' is a required property"),
        ("experiment", "freeze: {rules: [{match: a, trian: true}]}", "$.freeze.rules[0]: 'train' is a required"),
        (
            "experiment",
            "defaults: [{override /freeze: lorra}]",
            "$.defaults[0]['override /freeze']: 'lorra' is not one",
        ),
        ("data", "_target_: thaw.data.mnist.MNISTData\nbatchsize: 3", "$: 'batchsize' does not match"),
        ("sweep", "trial: 3", "$: 'trial' does not match"),
        ("sweep/sampler", "_target_: optuna.samplers.TPESampler\nseeds: 3", "$: 'seeds' does not match"),
    ],
)
def test_a_misspelt_key_or_value_does_not_fit(name: str, text: str, problem: str) -> None:
    assert innermost(validator(name).iter_errors(read(text))).startswith(problem)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("optim", "optimizer: {_target_: mypackage.Lion, any: 1}"),
        ("optim", "_target_: mypackage.Recipe\nany: 1"),
        ("experiment", "callbacks: {mine: {_target_: mypackage.Callback, any: 1}, early_stopping: null}"),
        ("experiment", "optim: {lr: '${freeze.lr}'}\nmodel: {num_classes: auto}\ndata: {train_size: null}"),
        ("experiment", "backbone: {arguments: {any: 1}}"),
        ("sweep", "space: {any: {low: 1, high: 2}}"),
    ],
)
def test_own_classes_and_references_fit(name: str, text: str) -> None:
    assert not innermost(validator(name).iter_errors(read(text)))


def test_a_key_has_its_comment() -> None:
    of_optim = MADE["optim"]["anyOf"][0]["properties"]
    assert of_optim["lr"]["description"] == "peak, at the head"
    of_adamw = of_optim["optimizer"]["anyOf"][0]["properties"]
    assert of_adamw["fused"]["description"].startswith("one pass over")
    assert "description" not in of_optim["final_lr_fraction"]
