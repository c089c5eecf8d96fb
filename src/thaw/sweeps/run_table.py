"""The table over the runs of a sweep, or of any run folders, read from their files alone.

It is written as `report.csv`, `report.md` and `report.html`; `thaw.sweeps.ending` prints it.
"""

import csv
import io
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from thaw.pages.html import write_page
from thaw.run.console import plural
from thaw.run.files import write_text
from thaw.sweeps.cells import MEASURES, RUN_COLUMNS, RUN_TEXTS, group_cells, run_cells, setting_columns
from thaw.sweeps.groups import Group, group_runs
from thaw.sweeps.heading import describe_runs, title_of
from thaw.sweeps.runs import DONE, FAILURES, NUMBERS, UNFINISHED, Run, find_runs, read_objectives, read_run

CSV_FIELDS = {  # header -> field of a run, or what is said of its group
    **{name: name for name in ("rank", "setting", "name", "overrides", "state")},
    **{name: NUMBERS[name] for name in ("val/acc", "test/acc", "test/acc_low", "test/acc_high")},
    **{name: name for name in ("trainable_params", "seconds", "epochs", "seed", "fold", "folder", "reason")},
}
MAX_PICTURES = 4  # of swept keys


@dataclass
class RunTable:
    """The runs that were found: the best setting first, and within it the best run first.

    `objectives` are those of a search, see `read_objectives`; `warnings` name the files that could not be read.
    """

    groups: list[Group]
    objectives: list[str]
    warnings: list[str]

    @property
    def runs(self) -> list[Run]:
        return [run for group in self.groups for run in group.runs]


def read_run_table(folders: Sequence[Path], waiting: Sequence[Run] = ()) -> RunTable:
    """Read the runs in and below some folders; nothing is written.

    `waiting` are runs to count, too, that have no folder yet.

    Raises:
        UserError: a folder does not exist or holds no run.
    """
    warnings: list[str] = []
    objectives = read_objectives(folders)
    runs = [read_run(folder, warnings) for folder in find_runs(folders)]
    return RunTable(group_runs([*runs, *waiting], objectives), objectives, warnings)


def write_run_table(
    folders: Sequence[Path],
    out: Path,
    extra_pictures: Sequence[tuple[str, Path]] = (),
    waiting: Sequence[Run] = (),
) -> RunTable:
    """Read the runs as `read_run_table` does, and write `report.csv`, `report.md`, `report.html` and their pictures.

    `extra_pictures`, title and PNG file of each, are shown after those of the table.
    """
    table = read_run_table(folders, waiting)
    out.mkdir(parents=True, exist_ok=True)
    pictures = [*draw_runs(table.groups, out), *extra_pictures]
    title, facts = title_of(table.groups), describe_runs(table.groups, folders)
    write_text(format_csv(table.groups), out / "report.csv")
    write_text(format_markdown(table, title, facts, pictures, out), out / "report.md")
    ranked = [group for group in table.groups if group.done]
    columns = setting_columns(ranked)
    above = Path(os.path.commonpath([run.folder.parent for run in table.runs]))
    write_page(
        out / "report.html",
        "sweep.html",
        title=title,
        facts=facts,
        notes=format_notes(table.groups, table.objectives),
        setting_columns=[(name, name in columns) for name in (*columns, *MEASURES)],
        settings=[group_cells(group, columns) for group in ranked],
        marks=[group.mark for group in ranked],
        pictures=pictures,
        lost=lost_runs(table.groups),
        warnings=table.warnings,
        above=above,
        run_columns=[(name, name in RUN_TEXTS) for name in RUN_COLUMNS],
        runs=[run_cells(run, group.label, above) for group in table.groups for run in group.runs],
        run_marks=[group.mark for group in table.groups for _ in group.runs],
    )
    return table


def draw_runs(groups: Sequence[Group], out: Path) -> list[tuple[str, Path]]:
    """Draw what these runs allow: rows of settings, curves along swept numbers, epochs. Returns titles and files."""
    from thaw.sweeps.curves import save_epochs, save_settings, save_swept, swept_curves, swept_keys

    pictures = []
    if save_settings(groups, out / "report_settings.png"):
        pictures.append(("Validation accuracy of each setting", out / "report_settings.png"))
    for key in swept_keys(groups)[:MAX_PICTURES]:
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
    writer = csv.writer(file)
    writer.writerow(CSV_FIELDS)
    for number, group in enumerate(groups, start=1):
        for run in group.runs:
            facts: dict[str, Any] = {**vars(run), "rank": number, "setting": group.label}
            facts["overrides"] = " ".join(run.overrides)
            writer.writerow([facts[name] for name in CSV_FIELDS.values()])
    return file.getvalue()


def lost_runs(groups: Sequence[Group]) -> list[tuple[Run, str]]:
    """The runs that did not finish, each with its setting, seed and fold."""
    lost = [(run, group.label) for group in groups for run in group.runs if run.state != DONE]
    lost.sort(key=lambda one: [*FAILURES, *UNFINISHED].index(one[0].state))
    return [(run, f"{label} {run.repeat_name}".rstrip()) for run, label in lost]


def format_notes(groups: Sequence[Group], objectives: Sequence[str]) -> list[str]:
    """How many runs there are, how they are compared, and which of them were tested."""
    runs = [run for group in groups for run in group.runs]
    states = [run.state for run in runs]
    counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys([DONE, *states]) if state in states)
    notes = [f"{plural(len(runs), 'run')} of {plural(len(groups), 'setting')}: {counts}."]
    if any(group.val and group.val[2] > 1 for group in groups):
        over = {"folds" if group.folds else "seeds" for group in groups}
        notes.append(f"± is the sample standard deviation over n {' or '.join(sorted(over))}.")
    if any(group.mark == "Pareto" for group in groups):
        notes.append(f"Pareto: no other setting is better in one of {', '.join(objectives)} and as good in the others.")
    tested = sum(run.state == DONE and run.test_acc is not None for run in runs)
    which = {0: "none is tested", 1: "one run is tested"}.get(
        tested, f"{tested} runs are tested, none chosen by test accuracy"
    )
    return [*notes, f"Ranked by validation; {which}."]


def format_markdown(
    table: RunTable, title: str, facts: Sequence[tuple[str, str]], pictures: Sequence[tuple[str, Path]], out: Path
) -> str:
    ranked = [group for group in table.groups if group.done]
    columns = setting_columns(ranked)
    lines = [f"# {escape(title)}", "", *(f"- {name}: {escape(text)}" for name, text in facts)]
    lines += ["", " ".join(format_notes(table.groups, table.objectives)), ""]
    lines += [f"| {' | '.join(map(escape, ['', *columns, *MEASURES]))} |"]
    lines.append("|---|" + "---|" * len(columns) + "---:|" * len(MEASURES))
    for group in ranked:
        cells = [escape(text) for text, _ in group_cells(group, columns)]
        lines.append(f"| {' | '.join([group.mark and f'**{group.mark}**', *cells])} |")
    if lost := lost_runs(table.groups):
        lines += ["", "## Not done", "", "| state | setting | reason |", "|---|---|---|"]
        lines += [f"| {run.state} | {escape(label)} | {escape(run.reason)} |" for run, label in lost]
    for name, path in pictures:
        lines += ["", f"## {escape(name)}", "", f"![{escape(name)}](<{Path(os.path.relpath(path, out)).as_posix()}>)"]
    if table.warnings:
        lines += ["", "## Files that could not be read", "", *(f"- {escape(warning)}" for warning in table.warnings)]
    return "\n".join(lines) + "\n"


def escape(text: str) -> str:
    """One line in which Markdown sees no end of a cell, no markup and no tag."""
    return re.sub(r"([\\`*_\[\]<>|])", r"\\\1", " ".join(text.split()))
