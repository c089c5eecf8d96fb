"""Changes bytes as damaged disks, broken transfers and attackers do; a seed repeats each change."""

import io
import re
import struct
import zipfile
import zlib
from collections.abc import Callable
from random import Random

NUMBERS = (0, 1, -1, 127, 255, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63 - 1, 2**63, 2**64 - 1)


def mutate(rng: Random, content: bytes) -> bytes:
    """One change, or several."""
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        content = rng.choice(CHANGES)(rng, content)
    return content


def somewhere(rng: Random, content: bytes) -> int:
    """A place in it, half of the time among its first 128 bytes, where headers lie."""
    return rng.randrange(max(1, min(128, len(content)) if rng.random() < 0.5 else len(content)))


def replaced(content: bytes, place: int, new: bytes) -> bytes:
    return content[:place] + new + content[place + len(new) :]


def flip_bits(rng: Random, content: bytes) -> bytes:
    changed = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 9))):
        if changed:
            changed[somewhere(rng, content)] ^= 1 << rng.randrange(8)
    return bytes(changed)


def overwrite_run(rng: Random, content: bytes) -> bytes:
    size = rng.choice((1, 2, 4, 8, 64, 512))
    new = rng.choice((bytes(size), b"\xff" * size, rng.randbytes(size)))
    return replaced(content, somewhere(rng, content), new)


def set_field(rng: Random, content: bytes) -> bytes:
    """A binary number, of which lengths and dimensions are made, becomes another."""
    size, order = rng.choice((1, 2, 4, 8)), rng.choice(("little", "big"))
    value = (rng.choice(NUMBERS) % 2 ** (8 * size)).to_bytes(size, order)  # type: ignore[arg-type]
    return replaced(content, somewhere(rng, content), value)


def set_text(rng: Random, content: bytes) -> bytes:
    """A number or a word in a header of text becomes another."""
    words = [*re.finditer(rb"\d+|[A-Za-z_]{2,}", content[:4096])]
    if not words:
        return content
    word = rng.choice(words)
    new = str(rng.choice(NUMBERS)).encode() if word[0].isdigit() else rng.choice(words)[0]
    return content[: word.start()] + rng.choice((new, new, b"", b"null", b"1e999", b"|O")) + content[word.end() :]


def cut(rng: Random, content: bytes) -> bytes:
    place = somewhere(rng, content)
    return rng.choice((content[:place], content[:-1], content[:-9], content[place:]))


def extend(rng: Random, content: bytes) -> bytes:
    size = rng.choice((1, 7, 100))
    return content + rng.choice((bytes(size), rng.randbytes(size), content, content[:size]))


def swap_blocks(rng: Random, content: bytes) -> bytes:
    size, (first, second) = rng.choice((4, 16, 64)), sorted(somewhere(rng, content) for _ in range(2))
    blocks = content[first : first + size], content[second : second + size]
    return replaced(replaced(content, first, blocks[1]), second, blocks[0])[: len(content)]


def repeat_run(rng: Random, content: bytes) -> bytes:
    place, size = somewhere(rng, content), rng.choice((1, 8, 64))
    return content[:place] + content[place : place + size] * rng.choice((0, 2, 3)) + content[place + size :]


CHANGES: tuple[Callable[[Random, bytes], bytes], ...] = (
    *(flip_bits, flip_bits, flip_bits, overwrite_run, set_field, set_field),
    *(set_text, cut, extend, swap_blocks, repeat_run),
)


# Within checksums, which are then made to fit


def mutate_png(rng: Random, content: bytes) -> bytes:
    """Change a chunk, or what the image's data are packed from."""
    chunks, place = [], 8
    while place < len(content):
        size = int.from_bytes(content[place : place + 4], "big")
        chunks.append((content[place + 4 : place + 8], content[place + 8 : place + 8 + size]))
        place += 12 + size
    number = rng.randrange(len(chunks))
    kind, data = chunks[number]
    packs = kind == b"IDAT" and rng.random() < 0.7
    chunks[number] = kind, zlib.compress(mutate(rng, zlib.decompress(data))) if packs else mutate(rng, data)
    if rng.random() < 0.2:
        rng.shuffle(chunks)
    return content[:8] + b"".join(png_chunk(*chunk) for chunk in chunks)


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def mutate_member(rng: Random, content: bytes) -> bytes:
    """Change a member of a zip file."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = [(name, archive.read(name)) for name in archive.namelist()]
    number = rng.randrange(len(members))
    name, data = members[number]
    members[number] = name, mutate(rng, data)
    return zipped(members)


def zipped(members: list[tuple[str, bytes]], method: int = zipfile.ZIP_STORED) -> bytes:
    with zipfile.ZipFile(file := io.BytesIO(), "w", method) as archive:
        for name, data in members:
            archive.writestr(zipfile.ZipInfo(name), data, method)
    return file.getvalue()
