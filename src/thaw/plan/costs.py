"""Memory, traffic and work of a policy on several devices, from the numbers of one training step."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from thaw.plan.dry_step import Step
from thaw.plan.settings import PlanSettings

FITS = 0.9  # of a device's memory; the driver's context, libraries and the allocator's gaps need the rest


@dataclass(frozen=True)
class Plan:
    """A training step of each device. Memory is in bytes of one device."""

    model: str
    policy: str
    step: Step
    images: int  # of an epoch
    devices: int
    sharded: bool
    weights: int
    gradients: int
    optimizer: int
    exchange: int  # buffers to exchange tensors with other devices
    memory: int  # at the peak of a step or of filling the cache, whichever is higher
    sent: float  # by a device in a step
    once: float  # FLOPs of the frozen layers for all images: once with the cache, in every epoch without it
    epoch: float  # FLOPs of an epoch above the frozen layers
    cache: int  # on disk


def plan_devices(model: str, policy: str, step: Step, images: int, devices: int, sharded: bool) -> Plan:
    """A step on each of so many devices, which share one copy of the model (FSDP) or have one each (DDP)."""
    share = devices if sharded else 1
    weights, gradients, optimizer = (math.ceil(n / share) for n in (step.weights, step.gradients, step.optimizer))
    buckets, two_layers = step.gradients, 2 * max(map(sum, step.units))  # DDP's; FSDP's, the largest one and the next
    exchange = 0 if devices == 1 else two_layers if sharded else buckets
    busy = weights + gradients + optimizer + exchange + step.activations
    whole, trained = (sum(part) for part in zip(*step.units, strict=True))  # weights and gradients of all layers
    sent = (2 * whole + trained if sharded else 2 * trained) * (devices - 1) / devices  # by ring
    return Plan(
        *(model, policy, step, images, devices, sharded, weights, gradients, optimizer, exchange),
        memory=max(busy, weights + step.filling),
        sent=sent,
        once=images * step.frozen_flops,
        epoch=images * (step.forward_flops + step.backward_flops),
        cache=images * step.cached,
    )


def format_plans(settings: PlanSettings, plans: Sequence[Plan]) -> str:
    """Two tables, memory and work."""
    parts = ["weights", "gradients", "optimizer", "activations", "exchange", "filling", "peak"]
    memory = [["model", "policy", "params M", "train M", *parts, *(f"{gb:g} GB" for gb in settings.memory)]]
    work = [["model", "policy", "frozen", "forward", "backward", "once", "epoch", "no cache"]]
    work[0] += ["once min", "epoch min", "no cache min", "kB/image", "cache GB", "read GB/s"]
    speed = settings.devices * settings.flops * 60  # FLOPs in a minute
    for plan in plans:
        step, names = plan.step, [plan.model, plan.policy]
        sizes = (plan.weights, plan.gradients, plan.optimizer, step.activations, plan.exchange, step.filling)
        counts = [f"{step.parameters / 1e6:,.1f}", f"{step.trained / 1e6:,.2f}"]
        fits = ["yes" if plan.memory <= FITS * gb * 1e9 else "no" for gb in settings.memory]
        memory.append([*names, *counts, *(f"{nbytes / 1e9:,.2f}" for nbytes in (*sizes, plan.memory)), *fits])
        per_image = (step.frozen_flops, step.forward_flops, step.backward_flops)
        whole = (plan.once, plan.epoch, plan.once + plan.epoch)
        row = [*names, *(f"{flops / 1e9:,.2f}" for flops in per_image), *(f"{flops / 1e15:,.1f}" for flops in whole)]
        row += [f"{flops / speed:,.2f}" for flops in whole]
        row += [f"{step.cached / 1e3:,.1f}", f"{plan.cache / 1e9:,.1f}", f"{settings.rate * step.cached / 1e9:,.3f}"]
        work.append(row)
    return "\n".join(
        [
            f"memory of each of {settings.devices} device(s), GB: {settings.strategy}, {settings.optimizer}, "
            f"{settings.precision}, batch of {settings.batch_size} on each, cache {'on' if settings.cache else 'off'}",
            *align_columns(memory),
            "",
            f"work: GFLOP per image, PFLOP for {plans[0].images:,} images, minutes at {settings.flops:.3g} FLOP/s on "
            f"each device; cache, read at {settings.rate:,} images/s",
            *align_columns(work),
        ]
    )


def align_columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines whose first two columns are aligned to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    sides = ["<", "<", *">" * (len(widths) - 2)]
    lines = (zip(row, sides, widths, strict=True) for row in rows)
    return ["  ".join(f"{cell:{side}{width}}" for cell, side, width in line) for line in lines]
