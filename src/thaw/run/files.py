"""How thaw writes files: whole or not at all, whatever ends the process or fills the disk; and JSON files."""

import errno
import fcntl
import json
import logging
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml

from thaw.run.errors import UserError, UserFileError

log = logging.getLogger(__name__)

SUFFIX = ".thaw.part"
SafeLoader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # plain values alone; libyaml's is ten times as fast
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
DISK = (*FULL, errno.EROFS, errno.EIO, errno.ESTALE, errno.EACCES, errno.EPERM)  # no fault of a program


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A temporary file beside `path` for the body to fill; it replaces `path` once its bytes are on the disk.

    After an error, `path` is as it was before. The temporary file of a killed process is removed by the next write into
    the same folder. A device or a pipe, such as /dev/stdout, is written directly.

    Raises:
        OSError: names the file, the reason and the next step.
    """
    if path.exists() and not path.is_file() and not path.is_dir():
        with write_errors(path):
            yield path
        return
    with write_errors(path), temporary(path) as part:
        yield part
        move(part, path)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """`atomic` for a folder."""
    with write_errors(path), temporary(path, folder=True) as part:
        new = part / path.name
        new.mkdir()
        yield new
        for file in new.rglob("*"):
            if file.is_file():  # safetensors writes with mode 0600
                file.chmod(new.stat().st_mode & 0o666)
            sync(file)
        if path.exists():
            path.replace(part / "replaced")
        move(new, path)


def write_bytes(content: bytes | memoryview, path: Path) -> None:
    with atomic(path) as part:
        part.write_bytes(content)


def write_text(text: str, path: Path) -> None:
    """Write UTF-8. Characters that it lacks, as in a file name that is not UTF-8, become escapes."""
    write_bytes(text.encode("utf-8", "backslashreplace"), path)


def write_json(facts: Mapping[str, Any], path: Path) -> None:
    write_text(json.dumps(facts, indent=2) + "\n", path)


def without_aliases(text: str) -> str:
    """YAML without aliases, which could let a short text stand for billions of values; else a UserError."""
    if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, SafeLoader)):
        raise UserError("it has aliases (*name), which files of runs do not have")
    return text


def read_json(path: Path) -> dict[str, Any]:
    """Read what `write_json` wrote; UserError if it is not a JSON object."""
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(facts, dict):
            raise UserError("no object")
    except (ValueError, RecursionError) as error:  # bytes that are not UTF-8, too
        raise UserError(f"{path} is damaged ({error}); remove it to run that again.") from error
    return facts


@contextmanager
def write_errors(path: Path) -> Iterator[None]:
    """Let the error of a failed write name the file that was to be written, and the next step."""
    try:
        yield
    except OSError as error:
        place = str(error.filename or path)
        if error.errno in (None, errno.EPIPE) or not (SUFFIX in place or path.is_relative_to(place)):
            raise  # it names its file already
        if path.name.endswith(SUFFIX):
            raise  # the `atomic` around this one names the finished file
        shown = Path(*(part for part in path.parts if not part.endswith(SUFFIX)))  # its place in the finished folder
        raise unwritten(str(shown), error) from error


def unwritten(place: str, error: OSError) -> UserFileError:
    """The error of a failed write as a user reads it; its `strerror` is the reason alone."""
    reason = os.strerror(error.errno or 0)
    if isinstance(error, FileExistsError | NotADirectoryError):  # of a file, or a link that leads nowhere
        reason = f"{error.filename} is not a folder"
    step = "Free some space, or choose" if error.errno in FULL else "Choose"
    failure = UserFileError(f"{place} cannot be written ({reason}). {step} another folder.")
    failure.strerror = reason
    return failure


@contextmanager
def dispensable() -> Iterator[None]:
    """What a run can do without, such as a picture: where it cannot be written, that is a warning."""
    try:
        yield
    except OSError as error:
        log.warning("%s The run goes on without it.", error)


@contextmanager
def temporary(path: Path, folder: bool = False) -> Iterator[Path]:
    """A new file or folder beside `path`, locked as long as this process lives, and removed at the end.

    It removes what killed processes left in the folder: their locks are gone.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for leftover in path.parent.glob(f".*{SUFFIX}"):
        with suppress(OSError):
            lock = os.open(leftover, os.O_RDONLY if leftover.is_dir() else os.O_RDWR)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                remove(leftover)
            finally:
                os.close(lock)
    while True:
        part = path.with_name(f".{path.name[:40]}.{secrets.token_hex(4)}{SUFFIX}")
        if folder:
            part.mkdir()
        lock = os.open(part, os.O_RDONLY if folder else os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        with suppress(OSError):  # a file system without locks
            fcntl.flock(lock, fcntl.LOCK_EX)
        if part.exists():
            break
        os.close(lock)  # another process removed it as a leftover before it was locked
    try:
        yield part
    finally:
        remove(part)
        os.close(lock)


def remove(part: Path) -> None:
    """Remove a temporary file or folder, if it is still there."""
    if part.is_dir():
        shutil.rmtree(part, ignore_errors=True)
    else:
        with suppress(OSError):
            part.unlink()


def sync(path: Path) -> None:
    """Wait until the bytes of a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def move(part: Path, path: Path) -> None:
    """Rename a file or folder once its bytes are on the disk, and wait until its new name is."""
    sync(part)
    part.replace(path)
    with suppress(OSError):  # some file systems cannot sync a folder
        sync(path.parent)
