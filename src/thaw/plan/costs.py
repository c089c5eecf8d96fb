"""Memory, traffic and work of a policy on several devices, from the numbers of one training step."""

import math
from collections.abc import Callable, Sequence
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


PlanCell = Callable[[Plan], str]
PlanColumns = dict[str, PlanCell]  # header, with the unit in its second line -> cell of a plan


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
    width = out.width if out.is_terminal else UNBOUNDED
    for title, parts in ((memory, memory_columns(settings)), (work, work_columns(settings))):
        say_fitted(Text(title, "bold"))
        for table in packed_tables(plans, parts, width):
            say_fitted(table)
            say()


def memory_columns(settings: PlanSettings) -> list[PlanColumns]:
    def size(nbytes: Callable[[Plan], int]) -> PlanCell:
        return lambda plan: f"{nbytes(plan) / 1e9:,.2f}"

    def fits(gb: float) -> PlanCell:
        return lambda plan: "yes" if plan.memory <= FITS * gb * 1e9 else "no"

    return [
        {
            "params\nM": lambda plan: f"{plan.step.parameters / 1e6:,.1f}",
            "train\nM": lambda plan: f"{plan.step.trained / 1e6:,.2f}",
        },
        {"peak\nGB": size(lambda plan: plan.memory), **{f"fits\n{gb:g} GB": fits(gb) for gb in settings.memory}},
        {
            "weights\nGB": size(lambda plan: plan.weights),
            "gradients\nGB": size(lambda plan: plan.gradients),
            "optimizer\nGB": size(lambda plan: plan.optimizer),
        },
        {
            "activations\nGB": size(lambda plan: plan.step.activations),
            "exchange\nGB": size(lambda plan: plan.exchange),
            "filling\nGB": size(lambda plan: plan.step.filling),
        },
    ]


def work_columns(settings: PlanSettings) -> list[PlanColumns]:
    whole: dict[str, Callable[[Plan], float]] = {
        "once": lambda plan: plan.once,
        "epoch": lambda plan: plan.epoch,
        "no cache": lambda plan: plan.once + plan.epoch,
    }
    speed = settings.devices * settings.flops * 60  # FLOPs in a minute

    def scaled(flops: Callable[[Plan], float], unit: float, digits: int) -> PlanCell:
        return lambda plan: f"{flops(plan) / unit:,.{digits}f}"

    return [
        {
            "frozen\nGFLOP": lambda plan: f"{plan.step.frozen_flops / 1e9:,.2f}",
            "forward\nGFLOP": lambda plan: f"{plan.step.forward_flops / 1e9:,.2f}",
            "backward\nGFLOP": lambda plan: f"{plan.step.backward_flops / 1e9:,.2f}",
        },
        {f"{name}\nPFLOP": scaled(flops, 1e15, 1) for name, flops in whole.items()},
        {f"{name}\nminutes": scaled(flops, speed, 2) for name, flops in whole.items()},
        {
            "image\nkB": lambda plan: f"{plan.step.cached / 1e3:,.1f}",
            "cache\nGB": lambda plan: f"{plan.cache / 1e9:,.1f}",
            "read\nGB/s": lambda plan: f"{settings.rate * plan.step.cached / 1e9:,.3f}",
        },
    ]


def packed_tables(plans: Sequence[Plan], parts: Sequence[PlanColumns], width: int) -> list[Table]:
    """As few tables as hold all parts in so many columns; a part is not divided."""
    tables: list[Table] = []
    columns: PlanColumns = {}
    unbounded = console().options.update(width=UNBOUNDED)
    for part in parts:
        wider = plan_table(plans, columns | part)
        if columns and console().measure(wider, options=unbounded).maximum > width:
            columns, wider = part, plan_table(plans, part)
            tables.append(wider)
        else:
            columns, tables = columns | part, [*tables[:-1], wider]
    return tables


def plan_table(plans: Sequence[Plan], columns: PlanColumns) -> Table:
    """A row for each plan; its model and policy may be folded, its numbers are not."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for name in ("model", "policy"):
        table.add_column(name, overflow="fold", vertical="bottom")
    for header in columns:
        table.add_column(header, justify="right", no_wrap=True)
    for plan in plans:
        table.add_row(plan.model, plan.policy, *(cell(plan) for cell in columns.values()))
    return table
