"""Memory, traffic and work of a policy on several devices, from the numbers of one training step."""

import math
import mmap
from collections.abc import Sequence
from dataclasses import dataclass

from rich.table import Table
from rich.text import Text

from thaw.plan.dry_step import Step
from thaw.plan.settings import PlanSettings
from thaw.run.console import UNBOUNDED, console, plural, say, say_fitted

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


def show_plans(settings: PlanSettings, plans: Sequence[Plan]) -> None:
    """Print memory and work, each as one table, or as several where the terminal is narrow."""
    cache = "on" if settings.cache else "off"
    memory = (
        f"memory of each of {plural(settings.devices, 'device')}: {settings.strategy}, {settings.optimizer}, "
        f"{settings.precision}, batch of {settings.batch_size} on each, cache {cache}"
    )
    work = (
        f"work: GFLOP per image, PFLOP for {plans[0].images:,} images, minutes at {settings.flops:.3g} FLOP/s on each "
        f"device; cache, read at {settings.rate:,} images/s"
    )
    out = console()
    for title, cells_of in ((memory, memory_cells), (work, work_cells)):
        say_fitted(Text(title, "bold"))
        cells = [cells_of(plan, settings) for plan in plans]
        for table in fitted_tables(plans, cells, out.width if out.is_terminal else UNBOUNDED):
            say_fitted(table)
            say()
    for plan in plans:
        if plan.cache:
            say(cache_line(plan, settings))


def cache_line(plan: Plan, settings: PlanSettings) -> str:
    """Whether a cache fits the memory of a machine, and how long its disk takes to read it."""
    size, fits = plan.cache / 1e9, plan.cache <= FITS * settings.ram * 1e9
    whole = size + (0 if fits else plan.images * mmap.PAGESIZE / 1e9)  # of an image that lies on pages of others
    memory = f"{settings.ram:g} GB of memory"
    read = f"fits in {memory}; read from the disk once" if fits else f"more than {memory}; read in each epoch"
    return f"cache of {plan.model}, {plan.policy}: {size:,.1f} GB, {read}, {whole / settings.disk:,.1f} s"


def memory_cells(plan: Plan, settings: PlanSettings) -> dict[str, str]:
    """Text by header, whose second line is the unit."""
    sizes = {
        **{"weights": plan.weights, "gradients": plan.gradients, "optimizer": plan.optimizer},
        **{"activations": plan.step.activations, "exchange": plan.exchange, "filling": plan.step.filling},
    }
    return {
        "params\nM": f"{plan.step.parameters / 1e6:,.1f}",
        "train\nM": f"{plan.step.trained / 1e6:,.2f}",
        "peak\nGB": f"{plan.memory / 1e9:,.2f}",
        **{f"fits\n{gb:g} GB": "yes" if plan.memory <= FITS * gb * 1e9 else "no" for gb in settings.memory},
        **{f"{name}\nGB": f"{nbytes / 1e9:,.2f}" for name, nbytes in sizes.items()},
    }


def work_cells(plan: Plan, settings: PlanSettings) -> dict[str, str]:
    """Text by header, whose second line is the unit."""
    step = plan.step
    layers = {"frozen": step.frozen_flops, "forward": step.forward_flops, "backward": step.backward_flops}
    whole = {"once": plan.once, "epoch": plan.epoch, "no cache": plan.once + plan.epoch}
    in_a_minute = settings.devices * settings.flops * 60
    return {
        **{f"{name}\nGFLOP": f"{flops / 1e9:,.2f}" for name, flops in layers.items()},
        **{f"{name}\nPFLOP": f"{flops / 1e15:,.1f}" for name, flops in whole.items()},
        **{f"{name}\nminutes": f"{flops / in_a_minute:,.2f}" for name, flops in whole.items()},
        "image\nkB": f"{step.cached / 1e3:,.1f}",
        "cache\nGB": f"{plan.cache / 1e9:,.1f}",
        "read\nGB/s": f"{settings.rate * step.cached / 1e9:,.3f}",
    }


def fitted_tables(plans: Sequence[Plan], cells: Sequence[dict[str, str]], width: int) -> list[Table]:
    """A row for each plan; each table has as many of the columns as fit in the width."""
    unbounded = console().options.update(width=UNBOUNDED)
    tables: list[Table] = []
    left = list(cells[0])
    while left:
        for count in range(len(left), 0, -1):
            table = plan_table(plans, cells, left[:count])
            if console().measure(table, options=unbounded).maximum <= width:
                break
        tables, left = [*tables, table], left[count:]
    return tables


def plan_table(plans: Sequence[Plan], cells: Sequence[dict[str, str]], headers: Sequence[str]) -> Table:
    """A row for each plan; its model and policy may be folded, its numbers are not."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for name in ("model", "policy"):
        table.add_column(name, overflow="fold", vertical="bottom")
    for header in headers:
        table.add_column(header, justify="right", no_wrap=True)
    for plan, texts in zip(plans, cells, strict=True):
        table.add_row(plan.model, plan.policy, *(texts[header] for header in headers))
    return table
