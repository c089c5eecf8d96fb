"""One HTML file that needs nothing else: its style, its script and its pictures are inside."""

import base64
from collections.abc import Sequence
from html import escape
from pathlib import Path

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


def page(title: str, parts: Sequence[str]) -> str:
    """The page of these pieces of HTML, which load nothing from anywhere."""
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


def picture(name: str, path: Path) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    image = f'<img alt="{escape(name)}" src="data:image/png;base64,{data}">'
    return f"<h2>{escape(name)}</h2><figure>{image}</figure>"
