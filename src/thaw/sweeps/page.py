"""The report of a sweep as one HTML file."""

import os
from collections.abc import Sequence
from html import escape
from pathlib import Path

from thaw.pages.html_page import Cell, page, picture, table
from thaw.sweeps.groups import Group
from thaw.sweeps.report import (
    Report,
    format_count,
    format_notes,
    format_score,
    format_seconds,
    format_test,
    lost_lines,
    setting_cells,
    setting_columns,
)
from thaw.sweeps.runs import Run


def format_page(report: Report, title: str, pictures: Sequence[tuple[str, Path]]) -> str:
    """One HTML page; whatever comes from files is escaped."""
    notes = "".join(f"<p class=soft>{escape(note)}</p>" for note in format_notes(report.groups))
    parts = [f"<h1>{escape(title)}</h1>{notes}"]
    ranked = [group for group in report.groups if group.done]
    if ranked:
        columns = setting_columns(ranked)
        head = [*columns, "validation", "n", "test", "trained parameters", "time"]
        rows = [group_cells(group, columns) for group in ranked]
        words = set(range(len(columns)))
        parts.append("<h2>Settings, best first</h2>" + table(head, words, rows, best=True))
    parts += [picture(name, path) for name, path in pictures]
    if lost := lost_lines(report.groups):
        parts.append("<h2>Not done</h2>" + "".join(lost_run(run, label) for run, label in lost))
    if report.warnings:
        items = "".join(f"<li>{escape(warning)}</li>" for warning in report.warnings)
        parts.append(f"<h2>Files that could not be read</h2><ul>{items}</ul>")
    head = ["setting", "seed", "state", "validation", "test", "test, 95 % interval", "epochs", "time", "folder"]
    above = os.path.commonpath([run.folder.parent for run in report.runs])
    rows = [run_cells(run, group.label, above) for group in report.groups for run in group.runs]
    parts.append(
        f"<h2>Runs</h2><p class=soft>Folders are below {escape(above)}</p>"
        + table(head, {0, 2, 8}, rows, best=bool(ranked))
    )
    return page(title, parts)


def group_cells(group: Group, columns: Sequence[str]) -> list[Cell]:
    val, test, seconds = group.val, group.test, group.seconds
    tested = f" <span class=soft>n = {test[2]}</span>" if test and test[2] > 1 and val and test[2] != val[2] else ""
    params = group.trainable_params
    return [
        *((escape(cell), "" if cell == "-" else cell) for cell in setting_cells(group, columns)),
        (format_score(val), val and val[0]),
        (format_count(group), val[2] if val else 0),
        (format_test(group) + tested, test and test[0]),
        ("-" if params is None else f"{params:,}", params),
        (format_seconds(seconds and seconds[0]), seconds and seconds[0]),
    ]


def run_cells(run: Run, label: str, above: str) -> list[Cell]:
    folder = os.path.relpath(run.folder, above)
    interval = None if run.test_low is None or run.test_high is None else f"{run.test_low:.2%} to {run.test_high:.2%}"
    return [
        (escape(label), label),
        ("-" if run.seed is None else escape(str(run.seed)), run.seed),
        (f"<span class={run.state}>{run.state}</span>", run.state),
        (percent(run.val_acc), run.val_acc),
        (percent(run.test_acc), run.test_acc),
        (interval or "-", run.test_low),
        ("-" if run.epochs is None else str(run.epochs), run.epochs),
        (format_seconds(run.seconds), run.seconds),
        (f"<code>{escape(folder)}</code>", folder),
    ]


def percent(accuracy: float | None) -> str:
    return "-" if accuracy is None else f"{accuracy:.2%}"


def lost_run(run: Run, label: str) -> str:
    line = f"<b class={run.state}>{run.state}</b> {escape(label)}: {escape(run.reason)}"
    if not run.traceback:
        return f"<div class=lost>{line}</div>"
    where = f"<p class=soft>{escape(str(run.folder))}</p>"
    return f"<details><summary>{line}</summary>{where}<pre>{escape(run.traceback)}</pre></details>"
