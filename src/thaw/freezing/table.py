"""The table of frozen and trainable parameters, which a run prints at its start."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from rich.console import Group, RenderableType
from rich.table import Table
from torch import nn

from thaw.freezing.policy import modes


def layer_table(model: nn.Module, depths: Mapping[str, int], groups: Sequence[Mapping], epoch: int) -> RenderableType:
    """One line for each run of equal layers: depth, parameters, whether they train (`after 3`: after 3 epochs), mode,
    peak lr and weight decay.

    `groups` are those of all optimizers, with `from_epoch`, `lr` or `initial_lr`, and `weight_decay`.
    """
    group_of = {id(parameter): group for group in groups for parameter in group["params"]}
    trainable = {parameter for group in groups if group["from_epoch"] <= epoch for parameter in group["params"]}
    module_modes, modules = modes(model, trainable), dict(model.named_modules())
    rows: list[Row] = []
    for name, parameter in model.named_parameters():
        group = group_of.get(id(parameter))
        trains, rates = "no", ("-", "-")
        if group is not None:
            trains = "yes" if group["from_epoch"] <= epoch else f"after {group['from_epoch']}"
            rates = f"{group.get('initial_lr', group['lr']):.2e}", f"{group['weight_decay']:.3g}"
        mode = "train" if module_modes[modules[name.rpartition(".")[0]]] else "eval"
        layer = Row(*split_name(name), depths[name], (trains, mode, *rates))
        row = next((row for row in reversed(rows) if row.continues(layer)), layer)
        if row is layer:
            rows.append(row)
        row.last, row.deepest = layer.first, layer.depth
        row.parameters += parameter.numel()
        row.tails.setdefault(layer.tail)
    labels = [row.label for row in rows]
    labels = [row.long_label if labels.count(label) > 1 else label for row, label in zip(rows, labels, strict=True)]
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("layers", overflow="fold")
    for title in ("depth", "parameters", "trains", "mode", "peak lr", "decay"):
        table.add_column(title, justify="left" if title in ("trains", "mode") else "right", no_wrap=True)
    for row, label in zip(rows, labels, strict=True):
        style = {"yes": "green", "no": "dim"}.get(row.settings[0])
        table.add_row(label, span(row.depth, row.deepest), f"{row.parameters:,}", *row.settings, style=style)
    now = sum(parameter.numel() for parameter in trainable)
    ever = sum(parameter.numel() for group in groups for parameter in group["params"])
    first = "" if now == ever else f", {now:,} of them now"
    return Group(table, f"{ever:,} of {sum(row.parameters for row in rows):,} parameters train{first}")


@dataclass
class Row:
    """Consecutive layers of the same settings: `stem.first` to `stem.last`, at `depth` to `deepest`."""

    stem: str
    first: int
    tail: str
    depth: int
    settings: tuple[str, ...]  # trains, mode, peak lr, weight decay
    last: int = -1
    deepest: int = -1
    parameters: int = 0
    tails: dict[str, None] = field(default_factory=dict)  # an ordered set: which parts of these layers

    def continues(self, layer: "Row") -> bool:
        """Whether a layer is the last of this row, or the one after it."""
        alike = (self.stem, self.settings) == (layer.stem, layer.settings)
        return alike and layer.first - self.last <= 1 and layer.depth - self.deepest <= 1

    @property
    def label(self) -> str:
        return self.stem + (f".{span(self.first, self.last)}" if self.first >= 0 else "")

    @property
    def long_label(self) -> str:
        """With the parts that are meant, where the others of the same layers have other settings."""
        return f"{self.label} ({next(iter(self.tails))}{', ...' if len(self.tails) > 1 else ''})"


def split_name(parameter: str) -> tuple[str, int, str]:
    """Stem, number and rest of a name.

    `backbone.model.blocks.3.norm1.bias` -> `backbone.model.blocks`, 3, `norm1.bias`; `head.linear.bias` ->
    `head.linear`, -1, `bias`.
    """
    parameter = re.sub(r"\.parametrizations\.(?:(\w+)\.original|\w+\.\d+\.(\w+))$", r".\1\2", parameter)
    numbered = re.match(r"(.*)\.(\d+)\.(.*)", parameter)
    if numbered:
        return numbered[1], int(numbered[2]), numbered[3]
    parts = parameter.split(".")
    length = min(3, len(parts) - (parts[-1] in ("weight", "bias")))
    return ".".join(parts[:length]), -1, ".".join(parts[length:])


def span(first: int, last: int) -> str:
    return str(first) if first == last else f"{first}-{last}"
