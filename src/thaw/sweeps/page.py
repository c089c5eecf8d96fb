"""The report as one HTML file that needs nothing else: its style, its script and its pictures are inside."""

import base64
import os
from collections.abc import Sequence
from html import escape
from pathlib import Path

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

Cell = tuple[str, float | str | None]  # what is shown, and what is sorted by

STYLE = """
:root { color-scheme: light dark; --text: #1c2430; --soft: #5c6773; --line: #dfe3e8; --back: #fff; --card: #f6f8fa;
  --best: #e9f5ec; --good: #1b7837; --bad: #b2182b; --warn: #a35200; }
@media (prefers-color-scheme: dark) { :root { --text: #e3e8ee; --soft: #9aa5b1; --line: #363e48; --back: #14181d;
  --card: #1d232a; --best: #1b3324; --good: #6fcf8b; --bad: #ff8a80; --warn: #ffb95c; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 76rem; padding: 1.5rem 1rem 4rem; color: var(--text); background: var(--back);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: 0; overflow-wrap: anywhere; } h2 { font-size: 1.1rem; margin: 2.2rem 0 .6rem; }
p { margin: .3rem 0; } li { overflow-wrap: anywhere; } .soft { color: var(--soft); }
.scroll { overflow-x: auto; border: 1px solid var(--line); border-radius: 8px; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .4rem .7rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
tr:last-child td { border-bottom: 0; } th { background: var(--card); font-weight: 600; }
th.text, td.text { text-align: left; } td.wide { white-space: normal; overflow-wrap: anywhere; min-width: 11rem; }
th button { all: unset; cursor: pointer; } th button:focus-visible { outline: 2px solid currentColor; }
th[aria-sort=ascending] button::after { content: " \\25B4"; }
th[aria-sort=descending] button::after { content: " \\25BE"; }
tr.best td { background: var(--best); font-weight: 600; }
.done { color: var(--good); } .failed, .killed, .timeout { color: var(--bad); }
.pruned, .unfinished { color: var(--warn); }
figure { margin: 0; } img { display: block; max-width: 100%; padding: .6rem; background: #fff; border-radius: 8px;
  border: 1px solid var(--line); }
details, .lost { border: 1px solid var(--line); border-radius: 8px; padding: .5rem .8rem; margin: .5rem 0;
  overflow-wrap: anywhere; } summary { cursor: pointer; }
pre { overflow-x: auto; font-size: 12.5px; background: var(--card); padding: .8rem; border-radius: 6px; }
"""

SCRIPT = """
for (const button of document.querySelectorAll("th button")) button.addEventListener("click", () => {
  const head = button.closest("th"), column = head.cellIndex, body = head.closest("table").tBodies[0];
  const up = head.getAttribute("aria-sort") !== "ascending";
  for (const other of head.parentNode.cells) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", up ? "ascending" : "descending");
  const key = row => row.cells[column].dataset.key;
  const compare = (a, b) => isNaN(a) || isNaN(b) ? a.localeCompare(b) : a - b;
  const last = row => key(row) === "";
  body.append(...[...body.rows].sort((a, b) =>
    last(a) - last(b) || (up ? 1 : -1) * compare(key(a), key(b))));
});
"""


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
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n<body>\n"
        + "\n".join(parts)
        + f"\n<script>{SCRIPT}</script></body></html>\n"
    )


def table(head: Sequence[str], text: set[int], rows: Sequence[Sequence[Cell]], best: bool) -> str:
    """A table that sorts by the column that is clicked; `text` are the columns of words, `best` marks the first row."""
    css = [
        f' class="text{" wide" * (name in ("setting", "folder"))}"' if place in text else ""
        for place, name in enumerate(head)
    ]
    titles = "".join(f"<th{own}><button>{escape(name)}</button></th>" for own, name in zip(css, head, strict=True))
    lines = []
    for place, row in enumerate(rows):
        cells = "".join(
            f'<td{own} data-key="{escape("" if key is None else str(key))}">{shown}</td>'
            for own, (shown, key) in zip(css, row, strict=True)
        )
        lines.append(f"<tr{' class=best' if best and place == 0 else ''}>{cells}</tr>")
    body = "\n".join(lines)
    return f"<div class=scroll><table><thead><tr>{titles}</tr></thead>\n<tbody>{body}</tbody></table></div>"


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


def picture(name: str, path: Path) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    image = f'<img alt="{escape(name)}" src="data:image/png;base64,{data}">'
    return f"<h2>{escape(name)}</h2><figure>{image}</figure>"
