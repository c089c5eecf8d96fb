"""The house: which room may import which (pyproject.toml, tool.importlinter), and that each name is defined once."""

import ast
import re
import subprocess
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import grimp
import pytest
from conftest import REMOVABLE, ROOT
from importlinter.cli import lint_imports

IN_EVERY_MODULE = {"log", "main"}  # its logger, and the function of a program


def test_rooms_import_only_what_lies_below(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("importlinter.cli._configure_logging", lambda verbose: None)  # it disables thaw's loggers
    status = lint_imports(str(ROOT / "pyproject.toml"), no_cache=True)
    assert status == 0, capfd.readouterr().out.partition("Broken contracts")[2]


def module_names(path: Path) -> Iterator[str]:
    """The functions, classes and constants that a module defines, but no TypeVars."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Assign | ast.AnnAssign) and "TypeVar(" not in ast.unparse(node):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = [name for target in targets for name in ast.walk(target)]
            yield from (name.id for name in names if isinstance(name, ast.Name) and isinstance(name.ctx, ast.Store))


def test_a_name_is_defined_once() -> None:
    places = defaultdict(set)
    for path in sorted((ROOT / "src" / "thaw").rglob("*.py")):
        for name in module_names(path):
            if name not in IN_EVERY_MODULE and not name.startswith("__"):
                places[name].add(path.relative_to(ROOT).as_posix())
    twice = [f"{name}: {', '.join(sorted(files))}" for name, files in sorted(places.items()) if len(files) > 1]
    assert not twice, "\n".join(twice)


FORK = (ROOT / "docs" / "fork.md").read_text(encoding="utf-8").replace("\\\n", "")
REMOVALS = {  # the command that removes each room that a fork may remove
    room: command for command, room in re.findall(r"^(git rm -rq src/thaw/(\w+) .*)$", FORK, re.MULTILINE)
}


def test_a_removable_room_is_named_by_nothing_that_stays() -> None:
    """Neither imported by a module, nor named by a configuration, a script or the first lines of a test."""
    assert tuple(REMOVALS) == REMOVABLE
    graph = grimp.build_graph("thaw", cache_dir=None)
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True, text=True).stdout
    files = [Path(name) for name in tracked.split("\0") if name.endswith((".py", ".yaml")) and (ROOT / name).is_file()]
    for room, command in REMOVALS.items():
        if f"thaw.{room}" not in graph.modules:
            continue
        inside = graph.find_descendants(f"thaw.{room}") | {f"thaw.{room}"}
        users = {user for module in inside for user in graph.find_modules_that_directly_import(module)} - inside
        gone = {path for pattern in command.split(" && ")[0].split()[3:] for path in ROOT.glob(pattern)}
        named = re.compile(rf"^(from|import) thaw\.{room}\b|^[^#]*_target_: thaw\.{room}\.", re.MULTILINE)
        users |= {
            str(path)
            for path in files
            if not {ROOT / path, *(ROOT / path).parents} & gone and named.search((ROOT / path).read_text())
        }
        assert not users, f"{room} is needed by {', '.join(sorted(users))}"


def test_a_model_is_served_and_exported_without_the_pictures_of_its_evaluation() -> None:
    graph = grimp.build_graph("thaw", cache_dir=None)
    for room in ("thaw.serve", "thaw.export"):
        if room in graph.modules:
            chain = graph.find_shortest_chain(room, "thaw.evaluation.pictures", as_packages=True)
            assert not chain, chain
