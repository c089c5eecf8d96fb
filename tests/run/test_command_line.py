"""Paths are taken as they are typed, and what is printed to be pasted means what it says, to the shell and to Hydra."""

import shlex
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from thaw.run.command_line import quote_path, setting

PATHS = [
    "logs/runs/probe/2026-11-25_17-23-44-687530/checkpoints/last.ckpt",
    *("a run/last.ckpt", "a,b.ckpt", "[a]/{b}.ckpt", "epoch=3-step=100.ckpt", "it's/last.ckpt", "(a)/b.ckpt"),
    *("a;b&c|d.ckpt", "a#b.ckpt", '"a".ckpt', "~/a.ckpt", "a:b.ckpt", "ä.ckpt", "1e3", "null", "true", "12", "*.ckpt"),
]


@pytest.mark.parametrize("path", PATHS)
def test_a_pasted_setting_is_the_path(path: str) -> None:
    (word,) = shlex.split(setting("resume", path))
    override = OverridesParser.create().parse_override(word)
    assert override.key_or_group == "resume" and not override.is_sweep_override()
    value = override.value()
    assert str(getattr(value, "text", value)) == path and isinstance(getattr(value, "text", value), str)


def test_ordinary_paths_are_not_quoted() -> None:
    assert setting("resume", Path("/a/b-c_d.e")) == "resume=/a/b-c_d.e"


def test_paths_are_taken_as_they_are_typed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that exist, whatever is in their names, and the home folder; values that are no paths stay as they are."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/ada b")

    def value(argument: str) -> object:
        read = OverridesParser.create().parse_override(quote_path(argument)).value()
        return getattr(read, "text", read)

    for name in ("epoch=3-step=100.ckpt", "with space, comma [x].ckpt", "it's.ckpt", "ä.ckpt", "2", "mnist"):
        Path(name).touch()
        assert str(value(f"ckpt={name}")) == name
    assert value("freeze.k=2") == 2
    for typed in ("~/x", "'~/x'", '"~/x"'):
        assert value(f"data.dir={typed}") == "/home/ada b/x"
    for argument in ("optim.lr=1e-3,1e-2", "~optim.optimizer.fused", "ckpt=[a,b]", "-m", f"inputs=[{'x' * 5000}]"):
        assert quote_path(argument) == argument
