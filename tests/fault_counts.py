"""How much of the fault suite runs, and the table of what it tried."""

import os
from collections import Counter

FULL = os.environ.get("THAW_FAULTS") == "full"
COLUMNS = ("tried", "survived", "lost", "let in")


def sized(short: int, full: int) -> int:
    """How often to try something in `make test`, and in `make faults`."""
    return full if FULL else short


def table(rows: dict[str, Counter[str]]) -> str:
    """The counts of all faults, in Markdown."""
    lines = [("fault", *COLUMNS), ("---", *["--:"] * len(COLUMNS))]
    lines += [(fault, *(f"{counts[column]:,}" for column in COLUMNS)) for fault, counts in sorted(rows.items())]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
