"""Full, read-only and failing disks, folders that go, two runs in one folder: all is told, and nothing good is lost."""

import errno
import json
import os
import re
import resource
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import failing_disk
import numpy as np
import pytest
import torch
from conftest import ROOT
from failing_disk import Fault
from fault_counts import FULL
from matplotlib.figure import Figure
from PIL import Image
from processes import Forked
from test_resumed_runs import assert_same_training, checkpoint
from torch import nn

from thaw.callbacks.run_checkpoint import PacedCheckpointIO
from thaw.pages import figures
from thaw.predict.prediction import open_output
from thaw.run.command import explain
from thaw.run.csv_log import RunCSV, read_rows
from thaw.run.errors import UserFileError
from thaw.run.files import atomic, atomic_folder, write_bytes, write_json, write_text

Tries = Callable[..., Any]
LARGE = 300_000  # bytes; more than `disk_of` lets be written
SAVED = ["trainer.max_epochs=2", "trainer.plugins.0.seconds=0", "logger=csv"]  # at once, after each epoch
LASTS = 10**9
KINDS = {  # how a disk fails: the error, and for how many operations
    "full": (failing_disk.NO_BYTE, LASTS),
    "no more files": (errno.ENOSPC, LASTS),
    "read-only": (errno.EROFS, LASTS),
    "fails once": (errno.ESTALE, 1),
}
TOLD = re.compile(r"^error: \S.* cannot be (written|used) \(.+\)\. (Free some space, or choose|Choose|Set) ", re.M)


class Started:
    """A root script in a process of its own. What it prints goes through a pipe, which no full disk stops."""

    def __init__(self, folder: Path, *words: str, fault: Fault | None = None, **environment: str) -> None:
        pipe = folder / f"pipe{len(list(folder.glob('pipe*')))}"
        os.mkfifo(pipe)
        self.text = ""
        self.reader = threading.Thread(target=self.read, args=(pipe,), daemon=True)
        self.reader.start()
        command = failing_disk.command(fault, *words) if fault else [sys.executable, *words]
        self.process = Forked(command, ROOT, os.environ | environment, SimpleNamespace(name=pipe))

    def read(self, pipe: Path) -> None:
        self.text = pipe.read_text("utf-8", "replace")

    def wait(self) -> tuple[int, str]:
        """The exit status, and all that was printed."""
        status = self.process.wait(120)
        self.reader.join()
        return status, self.text


def assert_whole(folder: Path) -> None:
    """No file in a folder is half written."""
    for path in folder.rglob("*"):
        assert not path.name.endswith(".part"), path
        if path.suffix == ".ckpt":
            torch.load(path, weights_only=True)
        elif path.suffix == ".json":
            json.loads(path.read_text())
        elif path.suffix == ".npy":
            np.load(path)
        elif path.suffix == ".png":
            Image.open(path).load()
        elif path.name == "metrics.csv":
            lines = path.read_text().splitlines()
            assert len({line.count(",") for line in lines}) <= 1, lines


def assert_told(status: int, printed: str) -> None:
    """A message in thaw's own words, or a warning and the run's end."""
    assert "Traceback" not in printed and "Logging error" not in printed, printed
    assert re.search(r"^warning: .* cannot be written|^cache: in memory", printed, re.M) if status == 0 else True
    assert status == 0 or (status == 1 and TOLD.search(printed)), printed


def test_every_write_of_a_run(tries: Tries, tiny_run: list[str], tmp_path: Path) -> None:
    """Each operation of a run on its disk fails in turn; once there is room, the same command comes to the same end."""

    def run(name: str, fault: Fault | None = None) -> tuple[int, str]:
        places = [f"hydra.run.dir={tmp_path / name / 'run'}", f"cache.dir={tmp_path / name / 'cache'}"]
        return Started(tmp_path, "train.py", *tiny_run, *SAVED, *places, fault=fault).wait()

    log = tmp_path / "operations"
    status, printed = run("whole", Fault(str(tmp_path / "whole"), errno.EIO, LASTS, LASTS, str(log)))
    assert status == 0, printed
    operations, whole = log.read_text().splitlines(), checkpoint(tmp_path / "whole" / "run")
    chosen = range(len(operations)) if FULL else [next(n for n, line in enumerate(operations) if "last.ckpt" in line)]
    kinds = [*KINDS.items()]
    with tries("a disk that is full or fails, at each write of a run in turn", harm="lost") as attempt:
        for number in chosen:
            kind, (code, count) = kinds[number % len(kinds)]
            with attempt(f"{kind} from {operations[number]}"):
                folder = tmp_path / str(number)
                fault = Fault(str(folder), code, number, number + count - 1, str(tmp_path / "log"))
                assert_told(*run(folder.name, fault))
                assert_whole(folder)
                status, printed = run(folder.name)
                assert status == 0, printed
                assert_same_training(whole, checkpoint(folder / "run"), folder.name)
                shutil.rmtree(folder)


# Each kind of file


@contextmanager
def disk_of(size: int) -> Iterator[None]:
    """Let no file grow beyond `size` bytes: the write that would fails in the middle, as on a full disk."""
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def prediction(path: Path) -> None:
    with open_output(str(path), "csv") as (file, _):
        file.write("x" * LARGE)


def program(path: Path) -> None:
    save_program = pytest.importorskip("thaw.export.torch_program").save_program
    exported = torch.export.export(nn.Linear(300, 300), (torch.zeros(2, 300),))
    with atomic(path) as part:
        save_program(exported, {}, part)


def picture(path: Path) -> None:
    figure = Figure()
    figure.add_subplot().imshow(np.random.default_rng(0).random((400, 400)))
    figures.save_figure(figure, path)


WRITERS: dict[str, Callable[[Path], Any]] = {
    "text.html": lambda path: write_text("x" * LARGE, path),
    "facts.json": lambda path: write_json({"x": "x" * LARGE}, path),
    "picture.png": picture,
    "last.ckpt": lambda path: PacedCheckpointIO(0).save_checkpoint({"w": torch.zeros(LARGE)}, path),
    "model.pt2": program,
    "rows.csv": prediction,
}


def test_every_kind_of_file(tries: Tries, tmp_path: Path) -> None:
    """On a full disk the file of before stays, and the error names it."""
    with tries("a full disk, at each kind of file", harm="lost") as attempt:
        for name, write in WRITERS.items():
            with attempt(name):
                path = tmp_path / name.partition(".")[2] / name
                path.parent.mkdir()
                path.write_bytes(b"before")
                full = rf"{name} cannot be written \(.*\)\. Free some space, or choose another folder\."
                with disk_of(100_000), pytest.raises(UserFileError, match=full):
                    write(path)
                assert [(each.name, each.read_bytes()) for each in path.parent.iterdir()] == [(name, b"before")]
                write(path)
                assert [each.name for each in path.parent.iterdir()] == [name] and path.stat().st_size > 100_000


def test_rows_of_metrics_wait_for_room(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """One warning; then all rows are there, also where a new column came while the disk was full."""
    logger = RunCSV(str(tmp_path), "csv", "", 1, None)
    logger.log_metrics({"val/acc": 0.5}, 0)
    with disk_of((tmp_path / "csv" / "metrics.csv").stat().st_size + 4):  # half a row
        logger.log_metrics({"val/acc": 0.625}, 1)
        logger.log_metrics({"val/loss": 1.0}, 2)
        assert_whole(tmp_path)
    (warning,) = caplog.messages
    assert "metrics.csv cannot be written" in warning and "The run goes on" in warning
    logger.log_metrics({"val/acc": 0.75}, 3)
    header, rows = read_rows(tmp_path / "csv" / "metrics.csv")
    assert header == ["step", "val/acc", "val/loss"]
    assert [(row["step"], row["val/acc"]) for row in rows] == [("0", "0.5"), ("1", "0.625"), ("2", ""), ("3", "0.75")]


def test_a_full_disk_names_the_file_in_a_folder_by_its_later_place(tmp_path: Path) -> None:
    with (
        disk_of(100_000),
        pytest.raises(OSError, match=rf"^{tmp_path}/model/weights cannot"),
        atomic_folder(tmp_path / "model") as part,
    ):
        write_bytes(bytes(LARGE), part / "weights")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS, errno.EIO])
def test_other_reasons_are_told_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def refuse(descriptor: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(OSError, match=rf"facts\.json cannot be written \({os.strerror(code)}\)\. Choose"):
        write_json({}, tmp_path / "facts.json")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"file/a\.json cannot be written"):
        write_json({}, tmp_path / "file" / "a.json")


def test_a_full_disk_that_hydra_meets_names_the_setting() -> None:
    """It writes a run's first files, and says nothing of their place."""
    assert explain(OSError(errno.ENOSPC, "full")).startswith("a file in hydra.run.dir cannot be written (No space")
