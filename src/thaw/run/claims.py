"""What a file states of itself, checked before memory is given for it and before its content is used."""

import os
import zipfile

from thaw.run.errors import UserError


def check_memory(size: int, name: str) -> None:
    """Raise UserError if a file states more bytes than this machine has memory."""
    if size > total_memory():
        raise UserError(f"{name} states {size:,} bytes of data; the memory of this machine has {total_memory():,}.")


def total_memory() -> int:
    """Bytes of this machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def zip_members(archive: zipfile.ZipFile) -> list[zipfile.ZipInfo]:
    """The members of a zip file, which have different names and no method of compression but deflate.

    Raises:
        BadZipFile: they do not, or they overlap.
        UserError: together they are larger than this machine's memory.
    """
    members = archive.infolist()
    if len({member.filename for member in members}) < len(members):
        raise zipfile.BadZipFile("two members have the same name")
    if any(member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) for member in members):
        raise zipfile.BadZipFile("a member is neither stored nor deflated")
    assert archive.fp is not None
    if sum(member.compress_size for member in members) > archive.fp.seek(0, os.SEEK_END):
        raise zipfile.BadZipFile("members overlap")
    check_memory(sum(member.file_size for member in members), str(archive.filename))
    return members


def check_torch_zip(path: str | os.PathLike[str]) -> None:
    """Compare the members of a file of `torch.save` with their CRC-32, which torch.load does not; 2 GB/s.

    Raises:
        BadZipFile: one has another, or is not stored as `torch.save` does.
        UserError: see `zip_members`.
    """
    with zipfile.ZipFile(path) as archive:
        if any(member.file_size != member.compress_size for member in zip_members(archive)):
            raise zipfile.BadZipFile("a member is compressed")
        if damaged := archive.testzip():
            raise zipfile.BadZipFile(f"{damaged} has another CRC-32")
