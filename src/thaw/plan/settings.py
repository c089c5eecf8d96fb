"""The arguments of `python -m thaw.plan`, and the configuration of a training run that they describe."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Literal

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf
from pydantic import Field

from thaw.run.errors import UserError
from thaw.run.migrations import CONFIGS
from thaw.run.suggestions import did_you_mean, nearest_word
from thaw.run.values import Count, Positive, check_types


@dataclass(frozen=True)
class PlanSettings:
    """The settings of configs/plan.yaml, which explains each key."""

    model: str
    policy: str
    optimizer: str
    devices: Count
    strategy: Literal["ddp", "fsdp"]
    batch_size: Count
    image_size: Count | None
    precision: Literal["32-true", "bf16-mixed", "16-mixed", "bf16-true"]
    dataset: Literal["mnist", "imagenet1k"] | Annotated[float, Field(ge=1, allow_inf_nan=False)]
    cache: bool
    memory: list[Positive]
    flops: Positive
    rate: Positive
    ram: Positive
    disk: Positive
    json: str | None


def read_arguments(arguments: Sequence[str]) -> tuple[PlanSettings, list[str]]:
    """The settings in configs/plan.yaml with the arguments in their place, and the arguments that are train.yaml's.

    Raises:
        UserError: an unknown key or a value that is not allowed.
    """
    if not CONFIGS.is_dir():
        raise UserError(f"{CONFIGS} is not a folder: thaw.plan reads the configs of a checkout; pip install -e it.")
    settings = OmegaConf.load(CONFIGS / "plan.yaml")
    own: list[str] = []
    overrides: list[str] = []
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals or not (key in settings or "." in key):
            near = nearest_word(key, map(str, settings))
            meant = did_you_mean(near and f"{near}={value or '<value>'}")
            raise UserError(f"{argument!r} is not a setting{meant}\nallowed: {', '.join(map(str, settings))}")
        if key in settings and value == "auto":
            raise UserError(f"{key}=auto depends on a machine, and a plan is made without one; give a value.")
        (own if key in settings else overrides).append(argument)
    settings.merge_with(OmegaConf.from_dotlist(own))
    target = {"_target_": f"{PlanSettings.__module__}.{PlanSettings.__name__}"}
    check_types(OmegaConf.create({**OmegaConf.to_container(settings), **target}))  # type: ignore[dict-item]
    found = PlanSettings(**OmegaConf.to_container(settings))  # type: ignore[arg-type]
    return replace(found, cache=found.cache and found.strategy != "fsdp"), overrides  # as trainer=fsdp has it


def compose_run(settings: PlanSettings, model: str, policy: str, overrides: Sequence[str]) -> DictConfig:
    """The configuration that train.py would get, for a GPU."""
    for key, group, name in (("policy", "freeze", policy), ("optimizer", "optim", settings.optimizer)):
        if name not in options(group):
            raise UserError(no_such_option(key, name, group))
    size, known = settings.image_size, model in options("backbone")
    chosen = [f"backbone={model}"] if known else ["backbone=timm", f"backbone.name={model}"]
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        cfg = compose(
            "train",
            [
                *(*chosen, f"freeze={policy}", f"optim={settings.optimizer}", f"data.batch_size={settings.batch_size}"),
                *(f"trainer.precision={settings.precision}", f"cache.mode={'auto' if settings.cache else 'off'}"),
                *([f"backbone.image_size={size}"] if size else []),
                "model.num_classes=10",  # a plan reads no data
                *overrides,
            ],
        )
    if cfg.backbone.get("fused_attention") == "auto":
        cfg.backbone.fused_attention = True
    for block in ("backbone", "data", "optim"):
        check_types(cfg[block], f"{block}.")
    return cfg


def no_such_option(key: str, name: str, group: str) -> str:
    near = nearest_word(name, options(group))
    meant = did_you_mean(near and f"{key}={near}")
    return f"{key}={name} does not exist{meant}\noptions: {', '.join(options(group))}"


def options(group: str) -> list[str]:
    """The names of the configurations in a group."""
    return sorted(path.stem for path in (CONFIGS / group).glob("*.yaml"))
