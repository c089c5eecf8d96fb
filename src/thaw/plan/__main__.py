"""What a policy costs on a model, before a machine is rented.    python -m thaw.plan model=vit_small policy=last_blocks

Nothing is trained, downloaded or allocated: see thaw.plan.dry_step.
"""

import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import InstantiationException
from omegaconf import DictConfig, OmegaConf

from thaw.plan.dry_step import Step, dry_step
from thaw.run.config import clear_errors
from thaw.run.files import write_json
from thaw.run.migrations import CONFIGS

DATASETS = {"mnist": (54_000, None), "imagenet1k": (1_281_167, 1000)}  # images to train on, classes
STRATEGIES = ("ddp", "fsdp")
MARGIN = 0.9  # of a device's memory; the rest is the driver's context, libraries and the allocator's gaps


@dataclass(frozen=True)
class Plan:
    """A training step of each device, and the images that an epoch has.

    Memory is in bytes of one device, FLOPs are those of matrix products, convolutions and attention.
    """

    model: str
    policy: str
    step: Step
    images: int
    devices: int
    sharded: bool

    @property
    def share(self) -> int:
        """On how many devices one copy of the weights, gradients and optimizer state lies."""
        return self.devices if self.sharded else 1

    @property
    def weights(self) -> int:
        return math.ceil(self.step.weights / self.share)

    @property
    def gradients(self) -> int:
        return math.ceil(self.step.gradients / self.share)

    @property
    def optimizer(self) -> int:
        return math.ceil(self.step.optimizer / self.share)

    @property
    def exchange(self) -> int:
        """What devices need to work together.

        DDP: buckets, a copy of all gradients. FSDP: the largest layer whole, with its gradients, and the next one.
        """
        if self.devices == 1:
            return 0
        return 2 * max(map(sum, self.step.units)) if self.sharded else self.step.gradients

    @property
    def memory(self) -> int:
        """At the peak of a step, or while the cache is filled, whichever is more."""
        step = self.weights + self.gradients + self.optimizer + self.exchange + self.step.activations
        return max(step, self.weights + self.step.filling)

    @property
    def sent(self) -> float:
        """Bytes that a device sends in a step, by ring: DDP gradients twice, FSDP weights twice and gradients once."""
        ring = (self.devices - 1) / self.devices
        weights, gradients = (sum(part) for part in zip(*self.step.units, strict=True))
        return ring * (2 * weights + gradients if self.sharded else 2 * gradients)

    @property
    def once(self) -> float:
        """FLOPs of the frozen layers for all images: with the cache once, without it in every epoch."""
        return self.images * self.step.frozen_flops

    @property
    def epoch(self) -> float:
        """FLOPs of an epoch above the frozen layers."""
        return self.images * (self.step.forward_flops + self.step.backward_flops)

    @property
    def cache(self) -> int:
        """Bytes on disk."""
        return self.images * self.step.kept

    def numbers(self) -> dict[str, Any]:
        names = ("weights", "gradients", "optimizer", "exchange", "memory", "sent", "once", "epoch", "cache")
        return asdict(self) | {name: getattr(self, name) for name in names}


def plans(arguments: Sequence[str]) -> tuple[DictConfig, list[Plan]]:
    """The settings and a plan for each model and policy.

    Args:
        arguments: of the command line, e.g. `["model=vit_small", "devices=8", "freeze.k=4"]`.

    Raises:
        ValueError: an argument that cannot be; says what was allowed.
    """
    settings, overrides = read_arguments(arguments)
    if settings.strategy == "fsdp":
        settings.cache = False  # as trainer=fsdp has it
    images, classes = count_images(settings.dataset)
    if classes:
        overrides = [f"model.num_classes={classes}", *overrides]
    found = []
    for model in str(settings.model).split(","):
        for policy in str(settings.policy).split(","):
            cfg = compose_run(settings, model, policy, overrides)
            try:
                step = dry_step(cfg, "cuda")
            except InstantiationException as error:
                if not isinstance(error.__cause__, ValueError):
                    raise
                presets = "" if model in options("backbone") else f" Presets are {', '.join(options('backbone'))}."
                raise ValueError(f"model={model}: {error.__cause__}{presets}") from error
            found.append(Plan(model, policy, step, images, settings.devices, settings.strategy == "fsdp"))
    return settings, found


def read_arguments(arguments: Sequence[str]) -> tuple[DictConfig, list[str]]:
    """configs/plan.yaml with arguments in place, and those that are train.yaml's."""
    if not CONFIGS.is_dir():
        raise ValueError(f"{CONFIGS} is no folder: thaw.plan reads the configs of a checkout; pip install -e it.")
    settings: Any = OmegaConf.load(CONFIGS / "plan.yaml")
    own: list[str] = []
    overrides: list[str] = []
    for argument in arguments:
        key, equals, _ = argument.partition("=")
        if not equals or not (key in settings or "." in key):
            raise ValueError(f"{argument!r} is no setting of thaw.plan; give key=value, of {', '.join(settings)}.")
        (own if key in settings else overrides).append(argument)
    settings.merge_with(OmegaConf.from_dotlist(own))
    for key, kinds, lowest in (("devices", int, 1), ("batch_size", int, 1), ("flops", float, 0), ("rate", float, 0)):
        value = settings[key]
        allowed = isinstance(value, int | kinds) and not isinstance(value, bool)
        if not allowed or not (value >= lowest and 0 < value < math.inf):
            what = "a whole number, 1 or more" if kinds is int else "a number above 0"
            raise ValueError(f"{key}={value} must be {what}.")
    if settings.strategy not in STRATEGIES:
        raise ValueError(f"strategy={settings.strategy} is unknown; choose {' or '.join(STRATEGIES)}.")
    if not isinstance(settings.cache, bool):
        raise ValueError(f"cache={settings.cache} must be true or false.")
    if not OmegaConf.is_list(settings.memory) or not all(isinstance(gb, int | float) for gb in settings.memory):
        raise ValueError(f"memory={settings.memory} must be a list of GB, such as [40,80].")
    return settings, overrides


def count_images(dataset: Any) -> tuple[int, int | None]:
    """Images of a data set, and its classes where they are not those of the config."""
    if dataset in DATASETS:
        return DATASETS[dataset]
    if isinstance(dataset, bool) or not isinstance(dataset, int | float) or not 1 <= dataset < math.inf:
        raise ValueError(f"dataset={dataset} must be {', '.join(DATASETS)} or a number of images, 1 or more.")
    return int(dataset), None


def compose_run(settings: DictConfig, model: str, policy: str, overrides: Sequence[str]) -> DictConfig:
    """The configuration that train.py would get, for a GPU."""
    for key, group, name in (("policy", "freeze", policy), ("optimizer", "optim", settings.optimizer)):
        if not (CONFIGS / group / f"{name}.yaml").is_file():
            raise ValueError(f"{key}={name} is unknown; choose {', '.join(options(group))}.")
    known = model in options("backbone")
    size = settings.image_size or (None if known else 224)
    chosen = [f"backbone={model}"] if known else ["backbone=vit_small", f"backbone.name={model}"]
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        cfg = compose(
            "train",
            [
                *(*chosen, f"freeze={policy}", f"optim={settings.optimizer}", f"data.batch_size={settings.batch_size}"),
                *(f"trainer.precision={settings.precision}", f"cache.mode={'auto' if settings.cache else 'off'}"),
                *([f"backbone.image_size={size}"] if size else []),
                *overrides,
            ],
        )
    if cfg.backbone.get("fused_attention") == "auto":
        cfg.backbone.fused_attention = True
    return cfg


def options(group: str) -> list[str]:
    return sorted(path.stem for path in (CONFIGS / group).glob("*.yaml"))


def report(settings: DictConfig, found: Sequence[Plan]) -> str:
    """Two tables, memory and work."""
    parts = ["weights", "gradients", "optimizer", "activations", "exchange", "filling", "peak"]
    memory = [["model", "policy", "params M", "train M", *parts, *(f"{gb:g} GB" for gb in settings.memory)]]
    work = [["model", "policy", "frozen", "forward", "backward", "once", "epoch", "no cache"]]
    work[0] += ["once min", "epoch min", "no cache min", "kB/image", "cache GB", "read GB/s"]
    speed = settings.devices * settings.flops * 60  # FLOPs in a minute
    for plan in found:
        step, names = plan.step, [plan.model, plan.policy]
        sizes = (plan.weights, plan.gradients, plan.optimizer, step.activations, plan.exchange, step.filling)
        counts = [f"{step.parameters / 1e6:,.1f}", f"{step.trained / 1e6:,.2f}"]
        fits = ["yes" if plan.memory <= MARGIN * gb * 1e9 else "no" for gb in settings.memory]
        memory.append([*names, *counts, *(f"{nbytes / 1e9:,.2f}" for nbytes in (*sizes, plan.memory)), *fits])
        per_image = (step.frozen_flops, step.forward_flops, step.backward_flops)
        whole = (plan.once, plan.epoch, plan.once + plan.epoch)
        row = [*names, *(f"{flops / 1e9:,.2f}" for flops in per_image), *(f"{flops / 1e15:,.1f}" for flops in whole)]
        row += [f"{flops / speed:,.2f}" for flops in whole]
        work.append([*row, f"{step.kept / 1e3:,.1f}", f"{plan.cache / 1e9:,.1f}"])
        work[-1].append(f"{settings.rate * step.kept / 1e9:,.3f}")
    return "\n".join(
        [
            f"memory of each of {settings.devices} device(s), GB: {settings.strategy}, {settings.optimizer}, "
            f"{settings.precision}, batch of {settings.batch_size} on each, cache {'on' if settings.cache else 'off'}",
            *table(memory),
            "",
            f"work: GFLOP per image, PFLOP for {found[0].images:,} images, minutes at {settings.flops:.3g} FLOP/s on "
            f"each device; cache, read at {settings.rate:,} images/s",
            *table(work),
        ]
    )


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of aligned columns: the first two to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    sides = ["<", "<", *">" * (len(widths) - 2)]
    lines = (zip(row, sides, widths, strict=True) for row in rows)
    return ["  ".join(f"{cell:{side}{width}}" for cell, side, width in line) for line in lines]


def main(arguments: Sequence[str]) -> None:
    settings, found = plans(arguments)
    print(report(settings, found))
    if settings.json:
        facts = {"settings": OmegaConf.to_container(settings), "plans": [plan.numbers() for plan in found]}
        write_json(facts, Path(settings.json))


if __name__ == "__main__":
    with clear_errors():
        main(sys.argv[1:])
