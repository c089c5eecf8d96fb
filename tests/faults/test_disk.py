"""Full, read-only and failing disks, folders that go, two runs in one folder: all is told, and nothing good is lost."""

import errno
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import failing_disk
import lightning as L
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
from thaw.data.store import KNOWN
from thaw.freezing.cache import VERIFIED
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
TOLD = re.compile(
    r"(^error: |: failed, ).* cannot be (written|used) \(.+\)\. (Free some space, or )?(choose|Choose|Set)", re.M
)


class Started:
    """A root script in a process of its own. What it prints goes through a pipe, which no full disk stops."""

    def __init__(self, folder: Path, *words: str, fault: Fault | None = None, **environment: str) -> None:
        pipe = folder / f"pipe{len(list(folder.glob('pipe*')))}"
        os.mkfifo(pipe)
        self.text = ""
        self.reader = threading.Thread(target=self.read, args=(pipe,), daemon=True)
        self.reader.start()
        command = failing_disk.command(fault, *words) if fault else [sys.executable, *words]
        path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])  # sweep.py imports train.py
        environment = os.environ | {"PYTHONPATH": path} | environment
        self.process = Forked(command, ROOT, environment, SimpleNamespace(name=pipe))

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

    def run(name: str, *more: str, fault: Fault | None = None) -> tuple[int, str]:
        places = [f"hydra.run.dir={tmp_path / name / 'run'}", f"cache.dir={tmp_path / name / 'cache'}"]
        return Started(tmp_path, "train.py", *tiny_run, *SAVED, *places, *more, fault=fault).wait()

    log = tmp_path / "operations"
    status, printed = run("whole", fault=Fault(str(tmp_path / "whole"), errno.EIO, LASTS, LASTS, str(log)))
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
                assert_told(*run(folder.name, fault=fault))
                assert_whole(folder)
                status, printed = run(folder.name, "test=false")  # which takes as long as the training
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


def test_a_full_disk_names_the_file_that_is_written_in_two_steps(tmp_path: Path) -> None:
    full = rf"^{tmp_path}/page\.html cannot be written"
    with disk_of(100_000), pytest.raises(OSError, match=full), atomic(tmp_path / "page.html") as part:
        write_bytes(bytes(LARGE), part)
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


# Real disks and folders


@contextmanager
def small_disk(folder: Path, size: str, files: int = 0) -> Iterator[Path]:
    """A disk of its own with so much room, mounted at a folder."""
    folder.mkdir(exist_ok=True)
    options = f"size={size}" + (f",nr_inodes={files}" if files else "")
    mount = ["mount", "-t", "tmpfs", "-o", options, "thaw-test", str(folder)]
    if not hasattr(os, "geteuid") or os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a disk is not allowed here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def remount(folder: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", str(folder)], check=True)


DISKS = {  # size, number of files
    "no room for the first files": ("4k", 0),
    "no room for the features": ("48k", 0),
    "no room for the first checkpoint": ("160k", 0),
    "no room for the second checkpoint": ("190k", 0),
    "no room for the pictures": ("230k", 0),
    "too many files": ("64m", 14),
}


@pytest.mark.long
def test_a_disk_that_gets_room_again(tries: Tries, tiny_run: list[str], tmp_path: Path) -> None:
    """Everything that a run writes lies on it, temporary files and those of libraries, too."""

    def run(folder: Path) -> tuple[int, str]:
        home = {"TMPDIR": str(folder), "HOME": str(folder), "MPLCONFIGDIR": str(folder)}
        places = [f"hydra.run.dir={folder / 'run'}", f"cache.dir={folder / 'cache'}"]
        return Started(tmp_path, "train.py", *tiny_run, *SAVED, *places, **home).wait()

    (tmp_path / "whole").mkdir()
    status, printed = run(tmp_path / "whole")
    assert status == 0, printed
    with tries("a small disk that gets room again", harm="lost") as attempt:
        for name, (size, files) in DISKS.items():
            with attempt(name), small_disk(tmp_path / "disk", size, files) as disk:
                assert_told(*run(disk))
                assert_whole(disk)
                remount(disk, "size=64m,nr_inodes=1000")
                status, printed = run(disk)
                assert status == 0, printed
                assert_same_training(checkpoint(tmp_path / "whole" / "run"), checkpoint(disk / "run"), name)
        with attempt("read-only"), small_disk(tmp_path / "disk", "64m") as disk:
            remount(disk, "ro")
            assert_told(*run(disk))
            remount(disk, "rw")
            assert run(disk)[0] == 0


@pytest.mark.long
def test_commands_on_a_full_disk(tries: Tries, tiny_run: list[str], tmp_path: Path) -> None:
    """Each has room for a part of what it writes: an error that names the file, and no part of it."""
    status, printed = Started(tmp_path, "train.py", *tiny_run, *SAVED, f"hydra.run.dir={tmp_path / 'run'}").wait()
    assert status == 0, printed
    (tmp_path / "pictures").mkdir()
    for number in range(80):
        picture = Image.new("L", (28, 28))
        picture.paste(255, (8, 4, 20, 24))
        picture.save(tmp_path / "pictures" / f"{number}.png")
    disk, of = tmp_path / "disk", f"ckpt={tmp_path / 'run'}"
    run, own = f"hydra.run.dir={disk / 'run'}", f"hydra.run.dir={tmp_path / 'log'}"
    cache = f"cache.dir={tmp_path / 'cache'}"
    commands = {
        "eval.py": [of, "robustness.images=20", "robustness.severities=[3]", run],
        "predict.py": [of, str(tmp_path / "pictures"), f"output={disk / 'a.csv'}", own],
        "probe.py": [of, "probe=knn", "probe.k=[1]", cache, run],
        "sweep.py": [*tiny_run, "sweep.trials=2", cache, run],
        "train.py -m": [*tiny_run, *SAVED, "seed=0,1", cache, f"hydra.sweep.dir={disk / 'sweep'}"],
        "train.py experiment=pretrain_mae": [*tiny_run, "trainer.max_epochs=1", "backbone.weights=none", run],
        **{
            f"export.py format={kind}": [of, f"output={disk / name}", own]
            for kind, name in (("onnx", "a.onnx"), ("hub_folder", "hub"))
        },
    }
    with tries("a command on a full disk", harm="lost") as attempt:
        for name, words in commands.items():
            with small_disk(disk, "64m"):
                command = [*name.split(), *words]
                status, printed = Started(tmp_path, *command).wait()
                used = shutil.disk_usage(disk).used
            with attempt(f"{name} with all room"):
                assert status == 0, printed
            for share in (0.2, 0.7):
                size = f"{max(4, int(share * used / 1024))}k"
                with attempt(f"{name} with {size} of {used:,} bytes"), small_disk(disk, size):
                    assert_told(*Started(tmp_path, *command).wait())
                    assert_whole(disk)


class Going(L.Callback):
    """In the second epoch, a folder is removed, or a link that leads nowhere takes its place."""

    def __init__(self, folder: str, link: bool) -> None:
        self.folder, self.link = Path(folder), link

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.current_epoch == 1 and not self.folder.is_symlink():
            shutil.rmtree(self.folder)
            if self.link:
                self.folder.symlink_to("nowhere")


@pytest.mark.long
def test_folders_that_go_during_a_run(
    tries: Tries, tiny_run: list[str], tmp_path: Path, command: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    """The run does without, and writes its own folder anew; a link that leads nowhere is an error that says so."""
    pictures = tmp_path / "pictures"
    for number, label in enumerate("ab" * 20):
        (pictures / label).mkdir(parents=True, exist_ok=True)
        Image.new("L", (28, 28), number * 6).save(pictures / label / f"{number}.png")
    data = ["data=folder", f"data.dir={pictures}", "data.image_size=28", "data.channels=1", "data.batch_size=8"]
    words = [*(word for word in tiny_run if not word.startswith("data.")), *SAVED, *data]

    def run(name: str, goes: str, link: bool = False) -> tuple[int, str]:
        KNOWN.clear()  # what the run before has left in memory
        VERIFIED.clear()
        folder = tmp_path / name
        fault = f"+callbacks.going={{_target_:{__name__}.Going,folder:'{folder / goes}',link:{link}}}"
        places = [
            f"hydra.run.dir={folder / 'run'}",
            f"cache.dir={folder / 'cache'}",
            f"data.cache_dir={folder / 'images'}",
        ]
        status = command("train.py", *words, *places, *[fault] * bool(goes))
        said = capsys.readouterr()
        return status, said.out + said.err

    assert run("whole", "")[0] == 0
    whole = checkpoint(tmp_path / "whole" / "run")
    with tries("a folder that goes during a run", harm="lost") as attempt:
        with attempt("a link that leads nowhere"):
            status, printed = run("link", "run", link=True)
            assert status == 1 and f"{tmp_path}/link/run is not a folder" in printed and "Traceback" not in printed
        for goes in ("run", "cache", "images", "../pictures"):
            with attempt(goes):
                status, printed = run(f"without {goes.strip('./')}", goes)
                assert status == 0, printed
                assert_same_training(whole, checkpoint(tmp_path / f"without {goes.strip('./')}" / "run"), goes)


@pytest.mark.long
def test_two_at_once(tries: Tries, tiny_run: list[str], tmp_path: Path) -> None:
    """Of two runs in one folder, one is refused; two that share a cache both train as one alone does."""

    def begin(name: str) -> Started:
        places = [f"hydra.run.dir={tmp_path / name}", f"cache.dir={tmp_path / 'cache'}"]
        return Started(tmp_path, "train.py", *tiny_run, *SAVED, *places)

    with tries("two runs that write one folder", harm="lost") as attempt:
        first, second, other = begin("run"), begin("run"), begin("other")
        *ends, (status, printed) = first.wait(), second.wait(), other.wait()
        ends.sort()
        with attempt("the same run folder"):
            assert [status for status, _ in ends] == [0, 1], ends
            assert "is being written by another process; wait until it ends" in ends[1][1]
            assert_whole(tmp_path)
        with attempt("the same cache"):
            assert status == 0, printed
            assert_same_training(checkpoint(tmp_path / "run"), checkpoint(tmp_path / "other"), "cache")
