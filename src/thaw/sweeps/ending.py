"""The end of a sweep or a search: the winner is tested, the table is printed, and what to type next."""

import os
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from omegaconf import DictConfig
from rich.table import Column, Table
from rich.text import Text

from thaw.run.console import UNBOUNDED, brief, console, plural, progress, say, say_fitted
from thaw.run.errors import is_interruption
from thaw.sweeps.cells import MEASURES, group_cells, setting_columns, shortened
from thaw.sweeps.groups import Group
from thaw.sweeps.run_table import RunTable, format_notes, lost_runs, read_run_table, write_run_table
from thaw.sweeps.runs import Run

MAX_LOST = 20  # runs that are not done, on the screen


def measure_winners(folder: Path, allow: Sequence[str], cache: DictConfig, every: bool) -> int:
    """Test the finished runs of a sweep's marked settings, or of `every` setting; returns how many cannot be tested.

    `allow` and `cache` are as for `thaw.evaluation.evaluate.test_run`.
    """
    groups = read_run_table([folder]).groups
    return test_runs([run for group in groups if every or group.mark for run in group.done], allow, cache)


def test_runs(runs: Sequence[Run], allow: Sequence[str], cache: DictConfig) -> int:
    """Test finished runs that are not tested yet; returns how many cannot be tested."""
    from thaw.evaluation.evaluate import test_run
    from thaw.run.command import explain
    from thaw.run.jobs import sigterm_interrupts

    todo = [run for run in runs if run.test_acc is None]
    failures = 0
    with (
        sigterm_interrupts(),
        progress(f"testing {plural(len(todo), 'run')}", len(todo), "runs", hidden=not todo) as advance,
    ):
        for run in todo:
            say(f"testing {os.path.relpath(run.folder)}")
            try:
                with brief():
                    test_run(run.folder, allow, cache)
            except SystemExit as leaving:  # Lightning's, at a signal
                if is_interruption(leaving):
                    raise KeyboardInterrupt from None
                raise
            except Exception as error:  # the table of the other runs is still to be written
                say(f"error: {os.path.relpath(run.folder)} cannot be tested: {explain(error)}", "red", stderr=True)
                failures += 1
            advance(1)
    return failures


def report_runs(
    folders: Sequence[Path],
    out: Path,
    draw: Callable[[], Sequence[tuple[str, Path]]] = list,
    waiting: Sequence[Run] = (),
    more: Mapping[str, Sequence[str]] = {},
) -> None:
    """Write the table over runs to `out`, print it, and say where all is; see `write_run_table` and `say_where`.

    `draw` makes further pictures: title and file of each.
    """
    with console().status("drawing pictures, writing the report"):
        table = write_run_table(folders, out, draw(), waiting)
    show_run_table(table)
    say_where(table, folders, out, more)


def show_run_table(table: RunTable) -> None:
    """Print the settings, the best first; the runs that are not done, and why; notes about the comparison."""
    say()
    if ranked := [group for group in table.groups if group.done]:
        out = console()
        say_fitted(fitted_table(ranked, out.width if out.is_terminal else UNBOUNDED))
        say()
    if lost := lost_runs(table.groups):
        rows = Table.grid(*(Column(overflow="fold") for _ in range(3)), padding=(0, 2, 0, 0))
        for run, label in lost[:MAX_LOST]:
            rows.add_row(Text(run.state, "red" if run.failed else "yellow"), shortened(label), Text(run.reason[:500]))
        say_fitted(rows)
        if len(lost) > MAX_LOST:
            say(f"and {len(lost) - MAX_LOST} more, in report.html")
        say()
    for warning in table.warnings:
        say(f"warning: {warning}", "yellow")
    say_fitted(Text(" ".join(format_notes(table.groups, table.objectives))))


def fitted_table(groups: Sequence[Group], width: int) -> Table:
    """A row for each setting in so many columns: headers and intervals are broken, then settings are folded."""
    keys = setting_columns(groups)

    def table(columns: Sequence[str], breaks: bool) -> Table:
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
        table.add_column("")
        for name in columns:
            table.add_column(name.replace(".", ".\n") if breaks else name, overflow="fold")
        for name in MEASURES:
            table.add_column(name, justify="right", no_wrap=True)
        for group in groups:
            cells = [shortened(text) for text, _ in group_cells(group, columns)]
            cells = [text.replace(" [", "\n[") for text in cells] if breaks else cells
            table.add_row(group.mark, *cells, style="bold green" if group.mark else None)
        return table

    return first_that_fits((table(keys, False), table(keys, True), table(["setting"], True)), width)


def first_that_fits(tables: Sequence[Table], width: int) -> Table:
    """The first table that is no wider, or the last one, whose cells are folded."""
    unbounded = console().options.update(width=UNBOUNDED)
    widths = (console().measure(table, options=unbounded).maximum for table in tables)
    return next((table for table, own in zip(tables, widths, strict=True) if own <= width), tables[-1])


def say_where(table: RunTable, folders: Sequence[Path], out: Path, more: Mapping[str, Sequence[str]] = {}) -> None:
    """Say where the report and the marked runs are, and the commands to look at them, `more` of them by title."""
    say(f"\nreport.html, report.md and report.csv are in:\n  {os.path.relpath(out)}")
    marked = [group for group in table.groups if group.mark]
    winners = [os.path.relpath(run.folder) for group in marked for run in group.done]
    links = [shlex.quote(os.path.relpath(folder / "wandb")) for folder in folders if (folder / "wandb").is_dir()]
    title = (
        "The Pareto front" if len(table.objectives) > 1 else "The best run" if len(winners) == 1 else "The best runs"
    )
    commands = [line for link in links for line in (f"wandb leet {link}", f"wandb sync {link}/*")]
    for name, lines in {title: winners, "To see all runs in W&B, or to upload them": commands, **more}.items():
        if lines:
            say(f"{name}:")
        for line in lines:
            say(f"  {line}", "cyan")


def say_how_to_resume(problem: str) -> None:
    """Say what is not done, and the command that was typed."""
    command = shlex.join([Path(sys.orig_argv[0]).name, *sys.orig_argv[1:]])
    say(f"\n{problem} To resume, run the same command again:\n  {command}", stderr=True)
