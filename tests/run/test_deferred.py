"""Modules that are imported when they are used."""

import importlib
import sys
from pathlib import Path

import pytest

from thaw.run.deferred import defer


def test_a_deferred_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "heavy").mkdir()
    (tmp_path / "heavy" / "__init__.py").write_text("value = 3\n")
    (tmp_path / "heavy" / "part.py").write_text("import heavy\nvalue = heavy.value + 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    for use in ("heavy", "heavy.part"):
        for name in ("heavy", "heavy.part"):
            monkeypatch.delitem(sys.modules, name, raising=False)
        defer("heavy", asked=None)
        heavy = importlib.import_module("heavy")
        assert heavy.asked is None and not hasattr(heavy, "__file__") and importlib.util.find_spec("heavy")
        assert "value" not in vars(heavy)  # not imported yet
        assert (heavy if use == "heavy" else importlib.import_module(use)).value == len(use.split(".")) + 2
        assert sys.modules["heavy"] is not heavy and sys.modules["heavy"].__file__ and heavy.value == 3
        with pytest.raises(AttributeError):
            heavy.missing  # noqa: B018
    imported = sys.modules["heavy"]
    defer("heavy"), defer("not_installed")
    assert sys.modules["heavy"] is imported and "not_installed" not in sys.modules
