"""The report of a sweep or of any run folders, from their files alone: for the terminal, as CSV, Markdown and HTML."""

import csv
import io
import os
import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from thaw.run.files import write_text
from thaw.sweeps.groups import Group, Score, group_runs
from thaw.sweeps.runs import DONE, FAILURES, UNFINISHED, Run, find_runs, read_run

CSV_FIELDS = {  # header -> field of a run, or what its group says
    **{name: name for name in ("rank", "setting", "name", "overrides", "state")},
    **{"val/acc": "val_acc", "test/acc": "test_acc", "test/acc_low": "test_low", "test/acc_high": "test_high"},
    **{name: name for name in ("trainable_params", "seconds", "epochs", "seed", "folder", "reason")},
}
WIDTH = 100  # columns of a terminal
KEYS = 4  # that settings may differ by and still have a column each
FACTS = ["val/acc", "n", "test/acc", "trained", "time"]
PICTURES = 4  # of swept keys
LOST_SHOWN = 20


@dataclass
class Report:
    """What was found, the best setting first; within it and in `runs` its best run.

    `text` is for the terminal. `warnings` name the files that could not be read.
    """

    groups: list[Group]
    warnings: list[str]
    text: str

    @property
    def runs(self) -> list[Run]:
        return [run for group in self.groups for run in group.runs]


def read_report(folders: Sequence[Path]) -> Report:
    """The runs in and below some folders, ranked by mean validation accuracy; nothing is written.

    Raises:
        ValueError: a folder does not exist or holds no run.
    """
    warnings: list[str] = []
    groups = group_runs([read_run(folder, warnings) for folder in find_runs(folders)])
    return Report(groups, warnings, format_text(groups, warnings))


def write_report(folders: Sequence[Path], out: Path, extra_pictures: Sequence[tuple[str, Path]] = ()) -> Report:
    """Write `report.csv` (a row for each run), `report.md`, `report.html` and their pictures.

    Args:
        folders: of sweeps or runs.
        out: the folder to write to.
        extra_pictures: title and PNG file of what else belongs into the report.

    Raises:
        ValueError: as in `read_report`.
    """
    from thaw.sweeps.page import format_page

    report = read_report(folders)
    out.mkdir(parents=True, exist_ok=True)
    pictures = [*draw(report.groups, out), *extra_pictures]
    title = ", ".join(folder.resolve().name for folder in folders)
    write_text(format_csv(report.groups), out / "report.csv")
    write_text(format_markdown(report, title, pictures, out), out / "report.md")
    write_text(format_page(report, title, pictures), out / "report.html")
    report.text += f"\nKept in {os.path.relpath(out)}: report.html, report.md, report.csv"
    return report


def draw(groups: Sequence[Group], out: Path) -> list[tuple[str, Path]]:
    """Title and file of the pictures that these runs allow."""
    from thaw.sweeps.curves import save_epochs, save_swept, swept_curves, swept_keys

    pictures = []
    for key in swept_keys(groups)[:PICTURES]:
        curves = swept_curves(groups, key)
        if len({point.x for curve in curves for point in curve.points}) > 1:
            path = out / f"report_{re.sub(r'[^A-Za-z0-9]+', '_', key)}.png"
            save_swept(curves, key, path)
            pictures.append((f"Validation accuracy against {key}", path))
    if save_epochs(groups, out / "report_epochs.png"):
        pictures.append(("Validation accuracy over the epochs", out / "report_epochs.png"))
    return pictures


def format_csv(groups: Sequence[Group]) -> str:
    """A row for each run with all digits; an empty field where its files say nothing."""
    file = io.StringIO()
    table = csv.writer(file)
    table.writerow(CSV_FIELDS)
    for rank, group in enumerate(groups, start=1):
        for run in group.runs:
            facts: dict[str, Any] = {**vars(run), "rank": rank, "setting": group.label}
            facts["overrides"] = " ".join(run.overrides)
            table.writerow([facts[name] for name in CSV_FIELDS.values()])
    return file.getvalue()


def setting_columns(groups: Sequence[Group]) -> list[str]:
    """A column for each key by which settings differ, or `setting` for all if they are many."""
    keys = list(dict.fromkeys(key for group in groups for key, _ in group.parts))
    return keys if 0 < len(keys) <= KEYS else ["setting"]


def setting_cells(group: Group, columns: Sequence[str]) -> list[str]:
    parts = dict(group.parts)
    return [group.label if key == "setting" else parts.get(key, "-") for key in columns]


def facts_of(group: Group) -> list[str]:
    """Text for each of `FACTS`."""
    params = "-" if group.trainable_params is None else f"{group.trainable_params:,}"
    seconds = format_seconds(group.seconds[0] if group.seconds else None)
    return [format_score(group.val), format_count(group), format_test(group), params, seconds]


def format_score(score: Score | None) -> str:
    """`97.50% ± 0.21`: mean and sample standard deviation, in percent."""
    if score is None:
        return "-"
    mean, spread, _ = score
    return f"{mean:.2%}" + ("" if spread is None else f" ± {100 * spread:.2f}")


def format_count(group: Group) -> str:
    """Seeds whose accuracy is in the mean; `2 of 3` where runs of the setting are not done."""
    seeds = group.val[2] if group.val else 0
    lost = len(group.runs) - len(group.done)
    return f"{seeds} of {seeds + lost}" if lost else str(seeds)


def format_test(group: Group) -> str:
    """As a score, or one run's accuracy with its 95 % interval."""
    if group.test is None:
        return "-"
    if group.test[2] > 1:
        return format_score(group.test)
    run = next(run for run in group.done if run.test_acc is not None)
    if run.test_low is None or run.test_high is None:
        return f"{run.test_acc:.2%}"
    return f"{run.test_acc:.2%} [{run.test_low:.2%}, {run.test_high:.2%}]"


def format_seconds(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{seconds / 60:.1f} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d}"


def lost_lines(groups: Sequence[Group]) -> list[tuple[Run, str]]:
    """The runs that are not done, and their setting and seed."""
    lost = [(run, group.label) for group in groups for run in group.runs if run.state != DONE]
    lost.sort(key=lambda one: [*FAILURES, UNFINISHED].index(one[0].state))
    return [(run, label if run.seed is None else f"{label} seed={run.seed}") for run, label in lost]


def count_states(runs: Sequence[Run]) -> str:
    """`9 done, 2 failed, 1 pruned`."""
    states = [run.state for run in runs]
    return ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys([DONE, *states]) if state in states)


def format_notes(groups: Sequence[Group]) -> list[str]:
    """How many runs, how compared, and which of them were tested."""
    runs = [run for group in groups for run in group.runs]
    notes = [f"{len(runs)} runs of {len(groups)} settings: {count_states(runs)}."]
    done = [run for run in runs if run.state == DONE]
    if any(group.val and group.val[2] > 1 for group in groups):
        notes.append("± is the sample standard deviation over n seeds.")
    tested = sum(run.test_acc is not None for run in done)
    which = {0: "none is tested", 1: "one run is tested"}.get(tested, f"{tested} runs are tested, none chosen by that")
    return [*notes, f"Ranked by validation; {which}."]


def format_text(groups: Sequence[Group], warnings: Sequence[str]) -> str:
    """Aligned lines, the best setting marked; below them what did not come to its end, and why."""
    ranked = [group for group in groups if group.done]
    lines = format_table(ranked, setting_columns(ranked)) if ranked else []
    if any(len(line) > WIDTH for line in lines):
        lines = format_table(ranked, ["setting"])
    if lost := lost_lines(groups):
        lines.append("")
    for run, label in lost[:LOST_SHOWN]:
        lines += textwrap.wrap(f"{run.state} {label}: {run.reason}", WIDTH, subsequent_indent="    ", max_lines=3)
    if len(lost) > LOST_SHOWN:
        lines.append(f"and {len(lost) - LOST_SHOWN} more that are not done, in report.html")
    lines += [f"warning: {warning}" for warning in warnings]
    return "\n".join(["", *lines, "", *textwrap.wrap(" ".join(format_notes(groups)), WIDTH)])


def format_table(groups: Sequence[Group], columns: list[str]) -> list[str]:
    """Lines of a table; settings in one column go on below where they are too long."""
    rows = [[*columns, *FACTS], *([*setting_cells(group, columns), *facts_of(group)] for group in groups)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    if columns == ["setting"]:
        widths[0] = min(widths[0], max(24, WIDTH - 5 - sum(width + 2 for width in widths[1:])))
    lines = []
    for place, row in enumerate(rows):
        first = (textwrap.wrap(row[0], widths[0], break_long_words=False) or [""])[0][: widths[0]]
        cells = [first, *row[1:]]
        aligned = [
            f"{cell:<{width}}" if column < len(columns) else f"{cell:>{width}}"
            for column, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        lines.append(f"{'best' if place == 1 else '':<4} {'  '.join(aligned)}".rstrip())
        lines += [f"       {line}" for line in textwrap.wrap(row[0][len(first) :].strip(), WIDTH - 7)]
    return lines


def format_markdown(report: Report, title: str, pictures: Sequence[tuple[str, Path]], out: Path) -> str:
    ranked = [group for group in report.groups if group.done]
    columns = setting_columns(ranked)
    lines = [f"# {escape(title)}", "", " ".join(format_notes(report.groups)), ""]
    lines += [f"| {' | '.join(map(escape, ['', *columns, *FACTS]))} |"]
    lines.append("|---|" + "---|" * len(columns) + "---:|" * len(FACTS))
    for place, group in enumerate(ranked):
        cells = [*map(escape, setting_cells(group, columns)), *facts_of(group)]
        lines.append(f"| {' | '.join(['**best**' if place == 0 else '', *cells])} |")
    if lost := lost_lines(report.groups):
        lines += ["", "## Not done", "", "| state | setting | reason |", "|---|---|---|"]
        lines += [f"| {run.state} | {escape(label)} | {escape(run.reason)} |" for run, label in lost]
    for name, path in pictures:
        lines += ["", f"## {escape(name)}", "", f"![{escape(name)}](<{Path(os.path.relpath(path, out)).as_posix()}>)"]
    if report.warnings:
        lines += ["", "## Files that could not be read", "", *(f"- {escape(warning)}" for warning in report.warnings)]
    return "\n".join(lines) + "\n"


def escape(text: str) -> str:
    """Without what Markdown would take for a cell's end, markup or a tag."""
    return re.sub(r"([\\`*_\[\]<>|])", r"\\\1", " ".join(text.split()))
