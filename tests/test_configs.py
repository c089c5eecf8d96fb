"""Every shipped configuration composes, matches the signature it targets, and every experiment runs two batches."""

import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT, compose_run
from hydra.utils import get_object
from omegaconf import DictConfig, ListConfig, OmegaConf

from thaw.run.values import check_types

pytestmark = pytest.mark.usefixtures("undrawn")
CONFIGS = ROOT / "configs"
GROUPS = ["data", "augment", "mix", "average", "backbone", "head", "freeze", "optim", "model", "trainer", "logger"]
GROUPS += ["experiment", "debug"]


def names(group: str) -> list[str]:
    """The options of a group, such as `affine` or, in a subfolder, `baseline/mlp`."""
    folder = CONFIGS / group
    return sorted(
        path.relative_to(folder).with_suffix("").as_posix()
        for path in folder.rglob("*.yaml")
        if path.parent.name != "settings"
    )


OPTIONS = [f"{group}={name}" for group in GROUPS for name in names(group)]
EXPERIMENTS = names("experiment")
REQUIRED = {"backbone=timm": ["backbone.name=resnet18"]}
FILLED_IN = {  # arguments that the program passes itself
    "thaw.models.heads.LinearHead": {"in_features", "num_classes"},
    "thaw.lr_bank.LRBank": {"in_features", "num_classes"},
    "thaw.freezing.adapter.add_adapters": {"backbone"},
    "thaw.freezing.prompt.add_prompts": {"backbone"},
    "thaw.freezing.surgical.choose_blocks": {"backbone", "images", "labels"},
    **{f"thaw.freezing.{method}.add_{method}": {"backbone"} for method in ("lora", "dora", "ssf")},
    "thaw.task.SingleLabel": {"num_classes", "label_smoothing"},
    "thaw.models.heads.MLPHead": {"in_features", "num_classes"},
    "thaw.schedule_free.ScheduleFreeAdamW": {"params", "lr", "weight_decay"},
}


def targets(node: Any) -> Iterator[DictConfig]:
    """Every block with a `_target_` below a node."""
    if isinstance(node, DictConfig):
        if "_target_" in node:
            yield node
        for key in node:
            yield from targets(node[key])
    elif isinstance(node, ListConfig):
        for item in node:
            yield from targets(item)


@pytest.mark.parametrize("option", OPTIONS)
def test_composes_and_matches_signatures(option: str, tmp_path: Path) -> None:
    """YAML keys equal the signature: no default hides in Python, no key is swallowed."""
    cfg = compose_run(tmp_path, option, *REQUIRED.get(option, ()))
    OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    check_types(cfg)
    for block in targets(cfg):
        target = block["_target_"]
        function = get_object(target)
        parameters = inspect.signature(function).parameters
        keys = {key for key in block if not key.startswith("_")} | FILLED_IN.get(target, set())
        if target.startswith("thaw.") and not issubclass_of_lightning(function):
            assert keys == set(parameters), target
            assert all(p.default is p.empty and p.kind is not p.VAR_KEYWORD for p in parameters.values()), target
        elif not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            assert keys <= set(parameters), target


def issubclass_of_lightning(function: object) -> bool:
    """Whether the signature is Lightning's own, with Lightning's defaults."""
    return isinstance(function, type) and "__init__" not in vars(function)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Overrides: a folder of small pictures in two classes, and a tiny ViT with a file of weights."""
    import timm
    from PIL import Image
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("photographs")
    for number in range(60):
        path = folder / "pets" / ("cat" if number % 2 else "dog") / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 32), (4 * number, 200 * (number % 2), 50)).save(path)
    save_file(timm.create_model("test_vit", img_size=32, num_classes=0).state_dict(), folder / "w.safetensors")
    zoo = ["backbone.name=test_vit", f"backbone.weights={folder / 'w.safetensors'}", "backbone.image_size=32"]
    return ["data=folder", f"data.dir={folder / 'pets'}", *zoo]


# tests/callbacks/test_pseudo_labels.py and tests/test_resumed_runs.py run smaller ones; compare/ differs in its policy.
SLOW_EXPERIMENTS = {"few_labels_finetune", "pretrain_gan"}
SLOW_EXPERIMENTS |= {name for name in EXPERIMENTS if name.startswith("compare/")} - {"compare/gradual", "compare/lora"}


@pytest.mark.parametrize(
    "experiment",
    [pytest.param(name, marks=pytest.mark.long) if name in SLOW_EXPERIMENTS else name for name in EXPERIMENTS],
)
def test_experiment_runs_two_batches(
    experiment: str, train: Callable[..., Path], request: pytest.FixtureRequest
) -> None:
    small = ["debug=fast", "data.batch_size=16", "data.eval_batch_size=16"]
    if experiment.startswith(("folder", "cifar10")):
        own: list[str] = request.getfixturevalue("photographs")
        small += own[:2] if experiment.endswith("from_scratch") else own
    else:
        small += ["data.source=sample"]
    if experiment == "pretrain_gan":
        small += ["model.samples=50"]
    if experiment.startswith("few_labels"):  # without labels to validate on, in two rounds
        small += ["trainer.limit_val_batches=0", "trainer.max_epochs=2"]
    run_dir = train(f"experiment={experiment}", *small)
    assert (run_dir / "summary.json").exists()


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_experiment_header(experiment: str) -> None:
    """An experiment opens with its command, hardware, time and what to expect."""
    text = (CONFIGS / "experiment" / f"{experiment}.yaml").read_text()
    header = "".join(line for line in text.splitlines(keepends=True) if line.startswith("#"))
    assert f"python train.py experiment={experiment}" in header
    for word in ("core", "%"):
        assert word in header
    assert yaml.safe_load(text)["name"] == experiment.replace("/", "_")


def test_logger_choices(tmp_path: Path) -> None:
    assert list(compose_run(tmp_path).logger) == ["csv", "wandb"]
    assert list(compose_run(tmp_path, "logger=[csv,tensorboard]").logger) == ["csv", "tensorboard"]
    assert not compose_run(tmp_path, "logger=none").logger


@pytest.mark.parametrize("name", ["hydra_logging", "job_logging"])
def test_matplotlib_does_not_tell_of_its_fonts(name: str) -> None:
    """It does at its first import on a machine, which a sweep does before any job."""
    config = yaml.safe_load((CONFIGS / "hydra" / name / "lines.yaml").read_text())
    assert config["root"]["level"] == "INFO"
    assert config["loggers"]["matplotlib"]["level"] == "WARNING"
