"""What clean.py finds, and the files that it writes: a CSV file for each kind, and one with all."""

import csv
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields, replace
from pathlib import Path

from thaw.run.files import atomic

KINDS = {  # in the order of the files
    "unreadable": "files that cannot be read",
    "blank": "images that show nothing",
    "dark": "almost black images",
    "bright": "almost white images",
    "label": "labels that are probably wrong",
    "duplicate": "copies of other images",
    "outlier": "images unlike all others",
}


@dataclass(frozen=True)
class Finding:
    """One row: an image and what may be wrong with it."""

    split: str  # empty for a file that cannot be read
    index: int | None
    file: str  # empty where images have none
    kind: str  # of `KINDS`
    given_label: str
    suggested_label: str  # empty where the kind suggests none
    score: float  # from 0 to 1; the lowest of a kind is the most certain
    like: str  # the image that a duplicate copies: its file, or split and index
    image: str  # see `thaw.data.corrections.image_hash`


def sort_findings(findings: Sequence[Finding]) -> list[Finding]:
    """Best first within each kind."""
    order = list(KINDS)
    return sorted(findings, key=lambda each: (order.index(each.kind), each.score))


def write_findings(findings: Sequence[Finding], folder: Path) -> None:
    """Write `findings.csv`, and `<kind>.csv` for each kind that was found; `findings` are sorted."""
    files = {"findings": [*findings]}
    columns = [field.name for field in fields(Finding)]
    for kind in KINDS:
        if rows := [each for each in findings if each.kind == kind]:
            files[kind] = rows
    for name, rows in files.items():
        with (
            atomic(folder / f"{name}.csv") as part,
            part.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file,
        ):
            writer = csv.writer(file)
            writer.writerow(columns)
            writer.writerows(astuple(replace(row, score=round(row.score, 6))) for row in rows)


def count_findings(findings: Sequence[Finding]) -> dict[str, dict[str, int]]:
    """How many of each kind there are, by split; an unreadable file is of no split."""
    counts: dict[str, dict[str, int]] = {}
    for each in findings:
        of_kind = counts.setdefault(each.kind, {})
        of_kind[each.split or "none"] = of_kind.get(each.split or "none", 0) + 1
    return counts
