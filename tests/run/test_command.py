"""The frame of a root script: help, and errors as a user reads them; the messages of settings are in test_messages."""

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from hydra.errors import InstantiationException
from hydra.utils import instantiate

from thaw.run.command import cause_of, explain, show, shown_errors
from thaw.run.errors import UserError, UserFileError

MINE = """
import torch
from torch import nn
from thaw.data.idx import read_idx
from thaw.run.errors import UserError

class Head(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.linear = nn.Linear(width, None)

class Choice:
    def __init__(self):
        raise UserError("choose another head")

def digits():
    try:
        return int("seven")
    except ValueError as error:
        raise RuntimeError("no labels") from error

def loss():
    return nn.functional.cross_entropy(torch.zeros(3, 2), torch.zeros(4, dtype=torch.long))

def missing():
    open("/nowhere/labels")

def misread():
    return read_idx(None, "mine")
"""


@pytest.fixture
def raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Exception]:
    """The error of a class or function in a user's own module, built as from a configuration."""
    (tmp_path / "my_module.py").write_text(MINE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_module", raising=False)

    def build(name: str, **arguments: Any) -> Exception:
        with pytest.raises(Exception, match=r".") as error:
            instantiate({"_target_": f"my_module.{name}", **arguments})
        return error.value

    return build


@pytest.mark.parametrize(
    ("name", "frames", "last"),
    [
        ("Head", ["__init__"], "TypeError: "),
        ("digits", ["digits", "digits"], "RuntimeError: no labels"),
        ("loss", ["loss"], "ValueError: Expected input batch_size (3) to match target batch_size (4)."),
        ("missing", ["missing"], "FileNotFoundError: [Errno 2] No such file or directory: '/nowhere/labels'"),
        ("misread", ["misread", "read_idx", "idx_shape"], "TypeError: "),
    ],
)
def test_a_mistake_in_ones_own_code_has_its_place(
    name: str, frames: list[str], last: str, raised: Callable[..., Exception]
) -> None:
    """Without the frames of libraries, and with what the error was raised from."""
    said = show(raised(name, **({"width": 8} if name == "Head" else {})))
    found = [one or other for one, other in re.findall(r"my_module\.py.* in (\w+)|idx\.py.* in (\w+)", said)]
    assert found == frames
    assert "site-packages" not in said
    error, hint = said.splitlines()[-2:]
    assert error.startswith(last)
    assert hint == "(to see all of the traceback: HYDRA_FULL_ERROR=1 before the command)"
    assert ("ValueError: invalid literal" in said) == (name == "digits")


def test_errors_on_purpose_are_one_message(raised: Callable[..., Exception]) -> None:
    assert show(UserError("choose 3")) == "error: choose 3"
    assert show(UserFileError("no room")) == "error: no room"
    assert show(raised("Choice")) == "error: choose another head"
    assert isinstance(cause_of(raised("Choice")), UserError)
    wrong = raised("Head", width=8, depth=2)
    assert isinstance(wrong, InstantiationException)
    assert show(wrong) == "error: TypeError: Head.__init__() got an unexpected keyword argument 'depth'"
    assert explain(ValueError("a bad day")) == "ValueError: a bad day"


def test_the_whole_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(KeyError), shown_errors():
        raise KeyError("mine")
    monkeypatch.delenv("HYDRA_FULL_ERROR")
    with pytest.raises(SystemExit, match="1"), shown_errors():
        raise KeyError("mine")


HELP = """
import sys, runpy
for script in sys.argv[1].split():
    sys.argv = [script, "--help"]
    print(f"=== {script}", flush=True)
    try:
        (runpy.run_path if script.endswith(".py") else runpy.run_module)(script, run_name="__main__")
    except SystemExit as end:
        assert not end.code
heavy = {"torch", "lightning", "timm", "wandb", "optuna", "fastapi"} & set(sys.modules)
assert not heavy, heavy
"""
SCRIPTS = (
    "train.py",
    "eval.py",
    "predict.py",
    "probe.py",
    "clean.py",
    "export.py",
    "serve.py",
    "sweep.py",
    "compare.py",
)
COMMANDS = (*(script for script in SCRIPTS if (ROOT / script).is_file()), "thaw.plan")


def test_help_shows_examples_without_heavy_imports(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    done = subprocess.run([sys.executable, "-c", HELP, " ".join(COMMANDS)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert done.returncode == 0
    texts = re.findall(r"=== (\S+)\n(.*?)(?=\n=== |\Z)", done.stdout, flags=re.DOTALL)
    assert [script for script, _ in texts] == list(COMMANDS)
    for script, text in texts:
        program = f"python -m {script}" if script == "thaw.plan" else f"python {script}"
        examples = re.findall(rf"^(?:# )?{re.escape(program)}.*\n(?:# )?    \S", text, flags=re.MULTILINE)
        assert len(examples) >= 4, script
        if script != "thaw.plan":  # its settings have comments
            assert all(len(line) <= 80 for line in text.splitlines()), script
            assert len(text.splitlines()) < 55, script
    for word in ("linear probe", "fine-tuning", "LoRA", "learning rate", "checkpoint", "cached"):
        assert word in texts[0][1]
