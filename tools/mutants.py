"""Mutation testing: would the tests notice an error in the code? A sample of changed lines, each with its tests.

    python -m tools.mutants [room ...]          (30 minutes for all rooms; needs pip install -e '.[mutants]')

mutmut makes the mutants: another comparison, operator, constant or argument, or None for a value. In a copy of the
checkout it forks a process for each, which runs the tests of the room that call the changed function until one fails.
Texts of messages are not changed. logs/mutants.md gets the table, and the changes that no test noticed.
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
REPORT = ROOT / "logs" / "mutants.md"
COPIED = ("src", "configs", "tests", "tools", "pyproject.toml", *(path.name for path in ROOT.glob("*.py")))
WANTED = 0.9  # of the mutants must be killed
UNNOTICED = {0: "survived", 5: "no test", 33: "no test"}  # mutmut's codes; others are a failed test or a time-out


class Room(NamedTuple):
    """What is changed, which tests must notice, and how many changes are tried."""

    sources: list[str]
    tests: list[str]
    sample: int


ROOMS = {
    "freezing": Room(["freezing/*", "optim.py"], ["freezing", "test_optim.py"], 130),
    "data": Room(["data/*"], ["data"], 170),
    "checkpoints": Room(
        ["run/checkpoint.py", "run/resume.py", "callbacks/run_checkpoint.py"],
        [
            *(f"run/test_{name}.py" for name in ("checkpoint", "resume", "targets", "migrations")),
            "callbacks/test_run_checkpoint.py",
            "faults/test_untrusted.py",
        ],
        60,
    ),
    "batcher": Room(["serve/batcher.py"], ["serve/test_batcher.py"], 40),
}
SETTINGS = r"""[mutmut]
source_paths=src
only_mutate=
    {sources}
also_copy=
    configs
    tools
    src
    {scripts}
do_not_mutate_patterns=
    ^\s*[rf]*"
    raise
    say\(
    report\(
    log\.
pytest_add_cli_args_test_selection=
    {tests}
pytest_add_cli_args=
    -m
    not long and not slow
    --deselect=tests/data/test_own_data.py::test_every_command_takes_the_data_of_the_run
timeout_constant=3.0
timeout_multiplier=4.0
use_git_change_detection=false
"""


def try_room(name: str, size: int | None, seed: int) -> tuple[int, list[str]]:
    """Try a sample of a room's mutants; how many there were, and the changes that no test noticed."""
    room = ROOMS[name]
    with tempfile.TemporaryDirectory() as folder:
        for part in map(ROOT.joinpath, COPIED):
            copy = shutil.copytree if part.is_dir() else shutil.copy
            copy(part, Path(folder) / part.name)  # type: ignore[operator]
        sources = "\n    ".join(f"src/thaw/{source}" for source in room.sources)
        tests = "\n    ".join(f"tests/{test}" for test in room.tests)
        scripts = "\n    ".join(name for name in COPIED if name.endswith(".py"))
        settings = SETTINGS.format(sources=sources, tests=tests, scripts=scripts)
        (Path(folder) / "setup.cfg").write_text(settings, encoding="utf-8")
        mutmut(folder, "run", "none")  # makes all mutants, and learns which test calls which function
        names = sorted(results(folder))
        chosen = random.Random(seed).sample(names, min(size or room.sample, len(names)))
        mutmut(folder, "run", "--max-children", "1", *chosen)
        codes = results(folder)
        if unfinished := [each for each in chosen if codes[each] is None]:
            raise SystemExit(f"{name}: mutmut left out {len(unfinished)} of {len(chosen)}: see the log in logs/")
        lines = [each for each in chosen if codes[each] in UNNOTICED]
        return len(chosen), [f"{UNNOTICED[codes[each]]}: {mutmut(folder, 'show', each)}" for each in lines]


def mutmut(folder: str, *arguments: str) -> str:
    """What mutmut says; its own errors show in the results."""
    path = os.pathsep.join(filter(None, [str(Path(folder) / "src"), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    command = [sys.executable, "-m", "mutmut", *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    log = REPORT.with_suffix(".log")
    log.parent.mkdir(exist_ok=True)
    with log.open("a", encoding="utf-8") as file:
        file.write(done.stdout[-5000:] + done.stderr[-5000:])
    return done.stdout


def results(folder: str) -> dict[str, Any]:
    """The exit status of the tests under each mutant, by its name."""
    metas = Path(folder, "mutants").rglob("*.meta")
    return {name: code for meta in metas for name, code in json.loads(meta.read_text())["exit_code_by_key"].items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rooms", nargs="*", choices=[*ROOMS, []], help="default: all")
    parser.add_argument("--size", type=int, help="mutants of each room")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    arguments = parser.parse_args()
    table, survivors, noticed = ["| room | mutants | killed |\n|---|--:|--:|\n"], "", []
    for name in arguments.rooms or ROOMS:
        tried, lines = try_room(name, arguments.size, arguments.seed)
        noticed += [True] * (tried - len(lines)) + [False] * len(lines)
        table.append(f"| {name} | {tried} | {1 - len(lines) / tried:.0%} |\n")
        survivors += "".join(f"\n{line}" for line in lines)
        print(table[-1], end="", flush=True)
    share = sum(noticed) / len(noticed)
    table.append(f"| all | {len(noticed)} | {share:.0%} |\n")
    REPORT.write_text("".join(table) + survivors, encoding="utf-8")
    print(f"{table[-1]}{len(noticed) - sum(noticed)} that no test noticed: {REPORT}")
    sys.exit(share < WANTED)


if __name__ == "__main__":
    main()
