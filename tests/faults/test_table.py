"""The table at the end of docs/reliability.md."""

from conftest import ROOT
from fault_counts import COLUMNS


def test_the_page_tells_of_nothing_lost_or_let_in() -> None:
    page = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    head, _, *rows = page[page.index("| fault |") :].splitlines()
    assert head == f"| fault | {' | '.join(COLUMNS)} |" and len(rows) > 30
    for row in rows:
        _, tried, survived, lost, let_in = row.strip("| ").split(" | ")
        assert (survived, lost, let_in) == (tried, "0", "0") and tried != "0", row
