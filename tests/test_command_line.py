"""What is printed to be pasted means what it says, to the shell and to Hydra."""

import shlex
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from thaw.command_line import setting

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
