"""The IDX file format of MNIST (http://yann.lecun.com/exdb/mnist): a magic number, the shape, then raw bytes."""

import gzip
import math

import torch
from torch import Tensor

from thaw.run.errors import UserError

UINT8 = 0x08  # the only IDX element type that the MNIST family uses


def unpacked(content: bytes) -> bytes:
    """Decompress gzip content; return other content unchanged, whatever the file's name says."""
    return gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content


def read_idx(content: bytes, name: str) -> Tensor:
    """Decode an uncompressed IDX file of unsigned bytes as a uint8 tensor, e.g. (60000, 28, 28) or (60000,).

    Layout: two zero bytes, the element type, the number of dimensions n, n big-endian 32-bit sizes, the data.

    Raises:
        UserError: the content is not such a file; begins with `name`.
    """
    if len(content) < 4 or content[:2] != b"\0\0":
        raise UserError(f"{name} is not an IDX file: it starts with {content[:16]!r}, expected two zero bytes.")
    if content[2] != UINT8:
        raise UserError(f"{name}: IDX element type 0x{content[2]:02x} is not supported, only 0x08 (unsigned byte).")
    ndim = content[3]
    header = 4 + 4 * ndim
    if ndim == 0 or len(content) < header:
        raise UserError(f"{name}: the IDX header states {ndim} dimensions in a file of {len(content)} bytes.")
    shape = [int.from_bytes(content[i : i + 4], "big") for i in range(4, header, 4)]
    found, stated = len(content) - header, math.prod(shape)
    if found != stated:
        raise UserError(f"{name}: the IDX header states shape {shape} = {stated} bytes, but {found} bytes follow it.")
    # The header is cut off after the copy, as frombuffer(offset=header) refuses to return no bytes.
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)[header:].reshape(shape)


def write_idx(tensor: Tensor) -> bytes:
    """Encode a uint8 tensor as an IDX file, the inverse of `read_idx`."""
    assert tensor.dtype == torch.uint8 and tensor.ndim > 0, f"got {tensor.dtype} of {tensor.ndim} dimensions"
    sizes = b"".join(size.to_bytes(4, "big") for size in tensor.shape)
    return bytes([0, 0, UINT8, tensor.ndim]) + sizes + tensor.numpy().tobytes()
