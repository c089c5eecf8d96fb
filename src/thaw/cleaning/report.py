"""What clean.py leaves behind: CSV files, `clean.json`, a sheet of pictures, and a summary on the screen."""

import os
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from rich.table import Table
from torch import Tensor

from thaw.cleaning.findings import KINDS, Finding, count_findings, write_findings
from thaw.data.images import Source
from thaw.data.splits import SPLITS
from thaw.evaluation.pictures import ARROW, on_paper, shorten_name, show_image
from thaw.evaluation.summary import say_commands
from thaw.pages.figures import SMALL, new_figure, save_figure
from thaw.run.command_line import setting
from thaw.run.config import backbone_name
from thaw.run.console import console, say, say_fitted
from thaw.run.files import write_json
from thaw.run.record import git_commit, typed_command

ACROSS, DOWN = 8, 2  # of pictures of each kind


def report_findings(
    cfg: DictConfig,
    source: Source,
    names: Mapping[str, Sequence[str]],
    findings: Sequence[Finding],
    agreed: Mapping[str, float],
    reader: str,
    seconds: float,
) -> None:
    """Write and print everything; `agreed` is as `Search.findings` returns it, `reader` as for `on_paper`."""
    folder = Path(cfg.run_dir)
    write_findings(findings, folder)
    facts = {
        **source.facts(),
        **{f"n_{split}": len(getattr(source, split).labels) for split in SPLITS},
        "classes": list(source.classes),
        "found": count_findings(findings),
        "agreed": agreed,
        "backbone": backbone_name(cfg.backbone),
        "weights": cfg.ckpt or cfg.backbone.get("weights", "none"),
        "views": cfg.views,
        "seconds": round(seconds, 2),
        "seed": cfg.seed,
        "command": typed_command(),
        "git_commit": git_commit(),
        "run_dir": cfg.run_dir,
    }
    if any(each.split for each in findings):
        save_sheet(findings, source, names, reader, folder / "findings.png")
    say_findings(facts, cfg)
    write_json(facts, folder / "clean.json")


def save_sheet(
    findings: Sequence[Finding], source: Source, names: Mapping[str, Sequence[str]], reader: str, path: Path
) -> None:
    """The first images of each kind, with place, labels and score; a copy stands beside its original."""
    places = {name: (split, index) for split, files in names.items() for index, name in enumerate(files)}
    shown = {kind: [each for each in findings if each.kind == kind and each.split] for kind in KINDS}
    shown = {kind: rows for kind, rows in shown.items() if rows}
    heights = [-(-min(len(rows), ACROSS * DOWN) // ACROSS) for rows in shown.values()]
    figure = new_figure(1.3 * ACROSS, 1.75 * sum(heights) + 0.3 * len(shown))
    parts = figure.subfigures(len(shown), 1, height_ratios=heights, squeeze=False)[:, 0]
    for part, height, (kind, rows) in zip(parts, heights, shown.items(), strict=True):
        part.suptitle(f"{kind} ({len(rows):,}): {KINDS[kind]}", fontsize=11)
        panels = part.subplots(height, ACROSS, squeeze=False).flatten()
        for panel in panels:
            panel.axis("off")
        for panel, each in zip(panels, rows, strict=False):
            image = pixels(source, each.split, each.index)
            if each.like:
                split, index = places[each.like] if places else each.like.split()
                image = torch.cat([image, pixels(source, split, int(index))], dim=2)
            show_image(panel, on_paper(image, reader))
            label = shorten_name(each.given_label) + (
                f" {ARROW} {shorten_name(each.suggested_label)}" if each.suggested_label else ""
            )
            place = shorten_name(Path(each.file).name) if each.file else f"{each.split} {each.index}"
            panel.set_title(f"{place}\n{label}  {each.score:.2g}", fontsize=SMALL)
    save_figure(figure, path)


def pixels(source: Source, split: str, index: int | None) -> Tensor:
    return getattr(source, split).images[index]


def say_findings(facts: Mapping[str, Any], cfg: DictConfig) -> None:
    """Print what `clean.json` says: aligned lines, then the next commands, each on its own line."""
    run_dir, found = os.path.relpath(facts["run_dir"]), facts["found"]
    table = Table.grid(padding=(0, 2))
    table.add_column(min_width=12)
    name = ", ".join(filter(None, (facts["dataset"], facts["data_source"])))
    sizes = ", ".join(f"{facts[f'n_{split}']:,} {split}" for split in SPLITS)
    table.add_row("  data", f"{name}: {len(facts['classes'])} classes, {sizes}")
    table.add_row("  backbone", f"{facts['backbone']}, weights: {facts['weights']}")
    agreed = " and ".join(f"{share:.2%} of {part}" for part, share in facts["agreed"].items())
    table.add_row("  labels", f"{agreed} are those that the other images suggest")
    for kind, counts in found.items():
        each = ", ".join(f"{counts[split]:,} {split}" for split in SPLITS if split in counts)
        table.add_row(f"  {kind}", f"{each or counts['none']}: {KINDS[kind]}")
    table.add_row("  cost", f"{facts['seconds']:.1f} s")
    rule = "-" * min(88, console().width)
    say(f"\n{rule}")
    say_fitted(table)
    say(f"  {'lists':<12}{run_dir}/findings.csv" + (", <kind>.csv" if found else ""))
    if any(set(counts) - {"none"} for counts in found.values()):
        say(f"  {'pictures':<12}{run_dir}/findings.png")
    usable = [kind for kind in ("label", *found) if kind in found and kind != "unreadable"]
    lists = [("exclude", usable[0])] if usable else []
    lists += [("relabel", "label")] if "label" in found else []
    settings = [setting(f"data.{key}", f"{run_dir}/{kind}.csv") for key, kind in lists]
    if cfg.ckpt and settings:
        say_commands("next", "look at the pictures, then add one of these to the command of the run", settings)
    elif settings:
        same = [each for each in shlex.split(cfg.overrides) if re.match(r"\+{0,2}data[.=]", each)]
        same.sort(key=lambda each: not each.startswith("data="))
        commands = [f"{shlex.join(['python', 'train.py', *same])} {each}" for each in settings]
        say_commands("next", "look at the pictures, then leave out what is listed, or take its labels", commands)
    say(rule)
