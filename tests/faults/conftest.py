"""The fault suite: `make faults` runs it at full size, `make test` at a small one.

Each test breaks something many times, and counts the tries. The full run ends with a table of the counts.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Literal

import pytest
from fault_counts import FULL, table

TABLE = Path("logs", "faults.md")
Attempt = Callable[[str], AbstractContextManager[None]]


@pytest.fixture
def tries(record_property: Callable[[str, Any], None]) -> Callable[..., AbstractContextManager[Attempt]]:
    """Counts the tries of one fault. A try that raises an error is counted, and the next ones still run.

    with tries("a checkpoint cut off", harm="lost") as attempt:
        for size in sizes:
            with attempt(f"after {size} bytes"):
                ...

    `fault` is a row of the table in docs/reliability.md. `harm` says what a failed try means: work that is `lost`, or
    something that was `let in`, such as foreign code or wrong data. The test fails if any try did.
    """

    @contextmanager
    def count(fault: str, harm: Literal["lost", "let in"]) -> Iterator[Attempt]:
        counts, failures = Counter[str](), []

        @contextmanager
        def attempt(what: str) -> Iterator[None]:
            counts["tried"] += 1
            try:
                yield
            except (Exception, pytest.fail.Exception) as error:
                counts[harm] += 1
                failures.append(f"{what}: {type(error).__name__}: {error}")
            else:
                counts["survived"] += 1

        try:
            yield attempt
        finally:
            record_property("fault", [fault, dict(counts)])
        assert not failures, f"{len(failures)} of {counts['tried']} tries failed:\n" + "\n".join(failures[:20])

    return count


def pytest_terminal_summary(terminalreporter: Any) -> None:
    rows: dict[str, Counter[str]] = {}
    for reports in terminalreporter.stats.values():
        for report in reports:
            for name, value in getattr(report, "user_properties", []) if getattr(report, "when", "") == "call" else []:
                if name == "fault":
                    rows.setdefault(value[0], Counter()).update(value[1])
    if rows:
        terminalreporter.section("faults")
        terminalreporter.write(table(rows))
        if FULL:
            TABLE.parent.mkdir(exist_ok=True)
            TABLE.write_text(table(rows), encoding="utf-8")
