"""How fast this machine is: a few real training steps, from which the time of other policies follows by their FLOPs."""

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor

from thaw.data.loader import Batch
from thaw.plan.dry_step import PRECISIONS, Step
from thaw.run.config import build

MOST_IMAGES = 32  # of a batch that is timed
SECONDS = 1.0  # after which a timing is not repeated


@dataclass(frozen=True)
class Speed:
    """Seconds of what a run consists of, on one device."""

    build: float  # the model, with its weights
    step: float  # a training step of a head alone on cached features
    forward: float  # a FLOP without gradients
    train: float  # a FLOP of a training step


def measure_speed(probe: DictConfig, whole: DictConfig, steps: tuple[Step, Step], shape: tuple[int, ...]) -> Speed:
    """Time a step of a frozen backbone's head, its forward pass, and a step of a policy that trains a lot.

    Args:
        probe: a run of the policy that costs least, settled.
        whole: a run of the policy that costs most, settled.
        steps: their FLOPs, with the cache and without.
        shape: (C, H, W) of an image of the data.
    """
    device, count = torch_device(probe.trainer.accelerator), min(MOST_IMAGES, probe.data.batch_size)
    labels = torch.zeros(count, dtype=torch.long, device=device)
    images = torch.randint(0, 256, (count, *shape), dtype=torch.uint8).to(device)
    precision = probe.trainer.precision
    autocast = torch.autocast(device.type, dtype=PRECISIONS[precision], enabled=precision.endswith("mixed"))

    def one_step(model: Any, batch: Batch) -> Callable[[], None]:
        groups = model.optim.groups(model.named_parameters(), model.thaw.depths, model.thaw.epochs)
        optimizer = model.optim.optimizer(groups, lr=model.optim.lr, weight_decay=model.optim.weight_decay)

        def step() -> None:
            with autocast:
                loss = model.training_step(batch, 0)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

        return step

    warnings.filterwarnings("ignore", message=".*self.log.*")  # there is no trainer
    started = time.monotonic()
    model = thawed_model(probe, device)
    building = time.monotonic() - started

    @torch.no_grad()
    def forward() -> Tensor:
        with autocast:
            return model.backbone.prefix(model.preprocess(images), model.cut)

    features = forward() if model.cut else None
    step = seconds(one_step(model, Batch(images, labels, labels, features=features)), device)
    frozen = steps[0].frozen_flops * count
    passing = seconds(forward, device) / frozen if frozen else 0.0
    model = thawed_model(whole, device)
    trained = (steps[1].frozen_flops + steps[1].forward_flops + steps[1].backward_flops) * count
    training = max(0.0, seconds(one_step(model, Batch(images, labels, labels)), device) - step) / trained
    return Speed(building, step, passing or training, training or passing)


def thawed_model(cfg: DictConfig, device: torch.device) -> Any:
    """A classifier that trains what its policy trains in the end."""
    model = build(cfg.model).to(device)
    last = int(max(epoch for epoch in model.thaw.after(0) if epoch < cfg.trainer.max_epochs))
    model.thaw.apply(last)
    model.cut = model.thaw.cut(last)
    return model


def torch_device(accelerator: str) -> torch.device:
    if accelerator == "auto":
        found = torch.accelerator.current_accelerator()
        return found if found is not None and torch.accelerator.is_available() else torch.device("cpu")
    return torch.device("cuda" if accelerator in ("gpu", "cuda") else accelerator)


def seconds(work: Callable[[], Any], device: torch.device) -> float:
    """The shortest time of a few repetitions, after one that warms up."""
    found: list[float] = []
    work()
    while len(found) < 3 and sum(found) < SECONDS:
        synchronize(device)
        started = time.perf_counter()
        work()
        synchronize(device)
        found.append(time.perf_counter() - started)
    return min(found)


def synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
