"""What a sweep prints at its end, at the widths of a terminal and in a file."""

import io
from pathlib import Path

import pytest
from rich.console import Console
from sweeps.test_runs import make_run

from thaw.sweeps.ending import fitted_table, say_where, show_run_table
from thaw.sweeps.run_table import RunTable, read_run_table


def on_terminal(table: RunTable, width: int) -> list[str]:
    """The lines of the table over the settings."""
    file = io.StringIO()
    groups = [group for group in table.groups if group.done]
    Console(file=file, width=width, markup=False).print(fitted_table(groups, width))
    lines = [line.rstrip() for line in file.getvalue().splitlines()]
    assert max(map(len, lines)) <= width
    return lines


def test_the_table_is_aligned_and_the_best_is_marked(policies: Path, capsys: pytest.CaptureFixture[str]) -> None:
    show_run_table(table := read_run_table([policies]))
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["freeze", "optim.lr", "val/acc", "n", "test/acc", "trained", "time"]
    assert lines[2].split()[:7] == ["best", "lora", "0.1", "93.50%", "±", "1.00", "3"]
    assert "95.00% [94.00%, 96.00%]" in lines[2]
    assert lines[3].split()[:5] == ["lora", "0.01", "91.50%", "±", "1.00"]
    assert len({len(line) for line in lines[1:7]}) == 1
    assert "failed  freeze=full optim.lr=0.1 seed=2  failed for a reason" in lines
    assert lines[-1].startswith("18 runs of 6 settings: 15 done, 3 failed.") and "one run is tested" in lines[-1]
    assert table.runs[0].folder == policies / "lora0.1_0"  # the best run of the best setting
    say_where(table, [policies], policies)
    said = capsys.readouterr().out
    assert "best runs:" in said and all(f"lora0.1_{seed}\n" in said for seed in range(3))


def test_a_narrow_terminal_breaks_headers_and_intervals(policies: Path) -> None:
    table = read_run_table([policies])
    assert on_terminal(table, 120)[0].split() == ["freeze", "optim.lr", "val/acc", "n", "test/acc", "trained", "time"]
    narrow = on_terminal(table, 80)
    assert narrow[1].split() == ["freeze", "lr", "val/acc", "n", "test/acc", "trained", "time"]
    assert narrow[2].split()[:3] == ["best", "lora", "0.1"] and narrow[3].split() == ["[94.00%,", "96.00%]"]


@pytest.mark.parametrize("width", [80, 120])
def test_long_settings_still_fit(width: int, tmp_path: Path) -> None:
    for place in range(2):
        overrides = f"{' '.join(f'some.long.key{key}=value{place}' for key in range(6))} weights=/{'x' * 120}{place}"
        make_run(tmp_path / str(place), f"{overrides} optim.lr=0.01234567{place}", 0.9 + place / 100, optim__lr=place)
    text = "".join("\n".join(on_terminal(read_run_table([tmp_path]), width)).split())
    assert "key5=value1" in text and "optim.lr=0.01235" in text and "123456" not in text
