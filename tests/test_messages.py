"""Wrong settings get one message: what is wrong, what is allowed, and a setting or a command that works.

All messages stand in `messages.txt`, to be read as a user would: a command after `$`, then what it says.
"""

import logging
import re
import runpy
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import REMOVABLE, ROOT
from hydra.core.global_hydra import GlobalHydra

TABLE = (Path(__file__).parent / "messages.txt").read_text(encoding="utf-8")
MESSAGES = dict(re.findall(r"^\$ (.*)\n((?:.+\n)+)", TABLE, flags=re.MULTILINE))
GONE = [room for room in REMOVABLE if not (ROOT / "src" / "thaw" / room).is_dir()]
if GONE:  # what quotes a removed command or option is not shown any more
    words = {"sweeps": " -m |sweep", "pretrain": "pretrain|simclr|mae|gan"}
    quotes = re.compile("|".join(words.get(room, rf"{room}\.py") for room in GONE))
    MESSAGES = {command: text for command, text in MESSAGES.items() if not quotes.search(f"{command} {text}")}
SMALL = ["data.source=sample", "logger=none"]
WITH_FOLDER = {"train": SMALL, "sweep": SMALL, "probe": SMALL[:1], "eval": []}


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    before, level = logging.root.handlers[:], logging.root.level
    yield
    logging.root.handlers[:] = before  # Hydra's write to what this test captures
    logging.root.setLevel(level)


def said_by(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """What a command line prints on standard error, without the seconds that a process takes to start."""
    script, *arguments = shlex.split(command)
    name = script.removesuffix(".py")
    if name in WITH_FOLDER:
        arguments += [each for each in WITH_FOLDER[name] if each.split("=")[0] not in command]
        arguments += [f"hydra.{mode}.dir={tmp_path / 'run'}" for mode in ("run", "sweep")]
    GlobalHydra.instance().clear()
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    run = runpy.run_path if script.endswith(".py") else runpy.run_module
    with pytest.raises(SystemExit) as end:
        run(script, run_name="__main__")
    said = end.value.code if isinstance(end.value.code, str) else capsys.readouterr().err
    assert end.value.code in (1, said)
    return said


@pytest.mark.parametrize("command", MESSAGES)
def test_a_wrong_setting(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if "trainer=gpu" in command and torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    monkeypatch.setattr("thaw.run.command.find_spec", lambda name: None)  # of tensorboard
    assert said_by(command, tmp_path, monkeypatch, capsys).strip() == MESSAGES[command].strip()
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_messages_are_short() -> None:
    """One line about what is wrong, and a second one for a long list of what is allowed."""
    assert len(MESSAGES) > 40
    for command, message in MESSAGES.items():
        first, *rest = message.strip().splitlines()
        assert first.startswith("error: ") and len(rest) <= 1, command
