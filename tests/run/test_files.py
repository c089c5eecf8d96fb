"""Files are whole or as they were before, whatever ends the process or fills the disk."""

import os
import stat
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import needs

from thaw.callbacks.run_checkpoint import PacedCheckpointIO
from thaw.run.files import atomic, atomic_folder, write_bytes, write_json, write_text


def test_a_folder_takes_the_place_of_another_whole(tmp_path: Path) -> None:
    path = tmp_path / "model"
    for content in ("first", "second"):
        with atomic_folder(path) as part:
            write_text(content, part / "README.md")
            assert not path.exists() or (path / "README.md").read_text() == "first"
        assert (path / "README.md").read_text() == content
    with pytest.raises(KeyboardInterrupt), atomic_folder(path) as part:
        write_text("third", part / "README.md")
        raise KeyboardInterrupt
    assert (path / "README.md").read_text() == "second" and [each.name for each in tmp_path.iterdir()] == ["model"]


def test_the_error_of_another_file_keeps_its_name(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"missing\.png"), atomic(tmp_path / "rows.csv"):
        (tmp_path / "missing.png").read_bytes()


def test_bytes_are_on_the_disk_before_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a power cut leaves."""
    order: list[str] = []
    sync, replace = os.fsync, Path.replace

    def synced(descriptor: int) -> None:
        order.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        sync(descriptor)

    def renamed(self: Path, target: Path) -> Path:
        order.append("name")
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "replace", renamed)
    write_json({}, tmp_path / "a.json")
    assert order == ["file", "name", "folder"]


def test_nothing_goes_through_the_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "full"))  # does not exist
    PacedCheckpointIO(0).save_checkpoint({"w": torch.zeros(3)}, tmp_path / "last.ckpt")
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["w"].tolist() == [0, 0, 0]


@needs("pretrain")
@needs("export")
def test_every_file_follows_the_umask(
    train: Callable[..., Path], command: Callable[..., int], tiny_run: list[str], tmp_path: Path
) -> None:
    """027 differs from both mistakes: files for the owner alone, as under 077, and files for all, as under 022."""
    before = os.umask(0o027)
    (tmp_path / "tiny.safetensors").chmod(0o640)
    few = ["logger=csv" if word == "logger=none" else word for word in [*tiny_run, "trainer.max_epochs=1"]]
    try:
        run = train(*few)
        train("experiment=pretrain_mae", *few, "test=false", name="pretrained")
        given = [f"ckpt={run}", "format=hub_folder", f"output={tmp_path / 'hub'}", f"hydra.run.dir={tmp_path / 'log'}"]
        assert command("export.py", *given) == 0
    finally:
        os.umask(before)
    files = list(tmp_path.rglob("*"))
    modes = {str(path): stat.S_IMODE(path.stat().st_mode) for path in files}
    wrong = {path: oct(mode) for path, mode in modes.items() if mode != (0o750 if Path(path).is_dir() else 0o640)}
    assert not wrong and {"best.ckpt", "backbone.safetensors", "model.safetensors", "worst_images.png"} <= {
        path.name for path in files
    }


def test_long_and_odd_names(tmp_path: Path) -> None:
    for name in ("x" * 250 + ".json", os.fsdecode(b"not utf-8 \xfc.json"), "\u6570\u5b57" * 40):
        write_text(name, tmp_path / name)
        assert (tmp_path / name).is_file()


def test_a_device_is_written_directly(tmp_path: Path) -> None:
    """json=/dev/stdout"""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = subprocess.Popen(["cat", pipe], stdout=subprocess.PIPE)
    write_text("hello", pipe)
    assert reader.communicate()[0] == b"hello" and stat.S_ISFIFO(pipe.stat().st_mode)


WRITE = """
import sys, time
from pathlib import Path
from thaw.run.files import atomic, atomic_folder
with (atomic_folder if sys.argv[2] == "folder" else atomic)(Path(sys.argv[1])) as part:
    (part / "file" if part.is_dir() else part).write_text("half")
    print("half", flush=True)
    time.sleep(600)
"""


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_a_killed_process_leaves_goes_with_the_next_write(tmp_path: Path, kind: str) -> None:
    """That of a living one does not."""
    (tmp_path / ".others.part").touch()
    command = [sys.executable, "-c", WRITE, str(tmp_path / "model"), kind]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "half\n"
    write_text("x", tmp_path / "other")
    assert len(list(tmp_path.glob(".model.*"))) == 1
    process.kill()
    process.wait()
    assert len(list(tmp_path.glob(".model.*"))) == 1
    write_text("x", tmp_path / "other")
    assert {path.name for path in tmp_path.iterdir()} == {"other", ".others.part"}


def test_many_writers_of_one_file(tmp_path: Path) -> None:
    """Each file that is read is one that was written; no writer takes another's temporary file."""
    path, texts = tmp_path / "facts", [str(number) * 10_000 for number in range(4)]
    write_text(texts[0], path)

    def write(text: str) -> None:
        for _ in range(25):
            write_text(text, path)

    threads = [threading.Thread(target=write, args=(text,)) for text in texts]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        assert path.read_text() in texts
    assert list(tmp_path.iterdir()) == [path]


def test_bytes_that_are_no_text_are_escaped(tmp_path: Path) -> None:
    write_text(os.fsdecode(b"\xfc"), tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == b"\\udcfc"
    write_bytes(b"\xfc", tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == b"\xfc"
