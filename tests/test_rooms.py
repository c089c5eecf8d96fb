"""The house: which room may import which (pyproject.toml, tool.importlinter), and that each name is defined once."""

import ast
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT
from importlinter.cli import lint_imports

IN_EVERY_MODULE = {"log", "main"}  # its logger, and the function of a program


def test_rooms_import_only_what_lies_below(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
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
