"""The IDX file format of MNIST (http://yann.lecun.com/exdb/mnist): a magic number, the shape, then raw bytes."""

import gzip
import io
import math
import zlib

import torch
from torch import Tensor

from thaw.run.claims import check_memory
from thaw.run.errors import UserError

UINT8 = 0x08  # the only IDX element type that the MNIST family uses
MOST_DIMENSIONS = 4  # (N, H, W, C)
MAX_BYTES = 64_000_000  # of a file once decompressed: MNIST's 70,000 digits take 55 MB
GZIP = b"\x1f\x8b"


def unpacked(content: bytes, name: str, most: int = MAX_BYTES) -> bytes:
    """Decompress gzip content; return other content unchanged, whatever the file's name says.

    Raises:
        UserError: it is damaged, or has more than `most` bytes; begins with `name`.
    """
    if content[:2] != GZIP:
        return content
    found = decompressed(content, name, most + 1)
    if len(found) > most:
        raise UserError(f"{name} holds more than {most:,} bytes; split it.")
    return found


def decompressed(content: bytes, name: str, size: int) -> bytes:
    """The first `size` bytes of what gzip content holds; its CRC is compared only where that is all."""
    try:
        with gzip.open(io.BytesIO(content)) as file:
            return file.read(size)
    except EOFError as error:
        raise UserError(f"{name} is truncated at {len(content):,} bytes.") from error
    except (OSError, zlib.error) as error:
        raise UserError(f"{name} is a damaged gzip file ({error}).") from error


def read_packed_idx(content: bytes, name: str) -> Tensor:
    """`read_idx` of a file that gzip may have packed. No more is decompressed than the IDX header states.

    Raises:
        UserError: also if that is more than this machine's memory.
    """
    if content[:2] != GZIP:
        return read_idx(content, name)
    shape = idx_shape(decompressed(content, name, 4 + 4 * MOST_DIMENSIONS), name)
    size = 4 + 4 * len(shape) + math.prod(shape)
    check_memory(size, name)
    return read_idx(unpacked(content, name, size), name)


def idx_shape(content: bytes, name: str) -> list[int]:
    """The sizes that an IDX header states."""
    if len(content) < 4 or content[:2] != b"\0\0":
        raise UserError(f"{name} is not an IDX file: it starts with {content[:16]!r}, expected two zero bytes.")
    if content[2] != UINT8:
        raise UserError(f"{name}: IDX element type 0x{content[2]:02x} is not supported, only 0x08 (unsigned byte).")
    ndim = content[3]
    header = 4 + 4 * ndim
    if not 1 <= ndim <= MOST_DIMENSIONS or len(content) < header:
        raise UserError(
            f"{name}: the IDX header states {ndim} dimensions in a file of {len(content)} bytes; "
            f"1 to {MOST_DIMENSIONS} are read."
        )
    return [int.from_bytes(content[i : i + 4], "big") for i in range(4, header, 4)]


def read_idx(content: bytes, name: str) -> Tensor:
    """Decode an uncompressed IDX file of unsigned bytes as a uint8 tensor, e.g. (60000, 28, 28) or (60000,).

    Layout: two zero bytes, the element type, the number of dimensions n, n big-endian 32-bit sizes, the data.

    Raises:
        UserError: the content is not such a file; begins with `name`.
    """
    shape = idx_shape(content, name)
    header = 4 + 4 * len(shape)
    found, stated = len(content) - header, math.prod(shape)
    if found != stated or max(shape) > len(content):  # beside a size of 0, others may be anything
        raise UserError(f"{name}: the IDX header states shape {shape} = {stated} bytes, but {found} bytes follow it.")
    # The header is cut off after the copy, as frombuffer(offset=header) refuses to return no bytes.
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)[header:].reshape(shape)


def write_idx(tensor: Tensor) -> bytes:
    """Encode a uint8 tensor as an IDX file, the inverse of `read_idx`."""
    assert tensor.dtype == torch.uint8 and tensor.ndim > 0, f"got {tensor.dtype} of {tensor.ndim} dimensions"
    sizes = b"".join(size.to_bytes(4, "big") for size in tensor.shape)
    return bytes([0, 0, UINT8, tensor.ndim]) + sizes + tensor.numpy().tobytes()
