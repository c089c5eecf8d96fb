"""IDX against its definition and against torchvision's reader."""

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.datasets.mnist import read_sn3_pascalvincent_tensor

from thaw.data.idx import read_idx, write_idx
from thaw.data.mnist import load_sample

SMALL = bytes([0, 0, 8, 2, 0, 0, 0, 2, 0, 0, 0, 3, 10, 20, 30, 40, 50, 60])  # a 2 x 3 file, by hand


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    shape = draw(st.lists(st.integers(0, 4), min_size=1, max_size=4))
    size = math.prod(shape)
    return torch.tensor(list(draw(st.binary(min_size=size, max_size=size))), dtype=torch.uint8).reshape(shape)


def test_layout_by_hand() -> None:
    tensor = torch.tensor([[10, 20, 30], [40, 50, 60]], dtype=torch.uint8)
    assert write_idx(tensor) == SMALL
    assert torch.equal(read_idx(SMALL, "small"), tensor)


@settings(deadline=None)
@given(tensors())
def test_round_trip(tensor: torch.Tensor) -> None:
    back = read_idx(write_idx(tensor), "x")
    assert back.dtype == torch.uint8
    assert back.shape == tensor.shape
    assert torch.equal(back, tensor)
    turned = tensor.transpose(0, -1)  # not contiguous
    assert torch.equal(read_idx(write_idx(turned), "x"), turned)


@pytest.mark.parametrize("part", ["images", "labels"])
def test_torchvision_reads_what_we_write(part: str, tmp_path: Path) -> None:
    tensor = getattr(load_sample("MNIST").val, part).to(torch.uint8).squeeze()
    path = tmp_path / "digits-ubyte"
    path.write_bytes(write_idx(tensor))
    theirs = read_sn3_pascalvincent_tensor(str(path))
    assert torch.equal(theirs, tensor)
    assert torch.equal(read_idx(path.read_bytes(), "digits"), theirs)


def test_result_is_writable_and_its_own() -> None:
    tensor = read_idx(SMALL, "small")
    tensor[0, 0] = 99
    assert read_idx(SMALL, "small")[0, 0] == 10


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not an IDX file"),
        (b"\0\0\x08", "not an IDX file"),
        (b"<html>no such page</html>", r"not an IDX file.*<html>"),
        (b"\x1f\x8b" + SMALL, "not an IDX file"),
        (SMALL[:2] + b"\x0d" + SMALL[3:], r"type 0x0d.*0x08"),
        (bytes([0, 0, 8, 0, 5]), "0 dimensions"),
        (SMALL[:10], r"2 dimensions in a file of 10 bytes"),
        (SMALL[:-1], r"\[2, 3\] = 6 bytes, but 5"),
        (SMALL + b"\0", r"\[2, 3\] = 6 bytes, but 7"),
        (bytes([0, 0, 8, 1, 255, 255, 255, 255]), r"\[4294967295\].*but 0"),
    ],
    ids=[
        "empty",
        "three bytes",
        "html",
        "gzip",
        "float",
        "no dimension",
        "header cut",
        "data cut",
        "extra byte",
        "huge",
    ],
)
def test_wrong_files(content: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=rf"^some\.gz.*{message}"):
        read_idx(content, "some.gz")


@pytest.mark.parametrize(
    "tensor", [torch.zeros(3), torch.zeros(3, dtype=torch.int64), torch.tensor(3, dtype=torch.uint8)]
)
def test_what_cannot_be_written(tensor: torch.Tensor) -> None:
    with pytest.raises(AssertionError, match=r"got torch\.(float32|int64)|of 0 dimensions"):
        write_idx(tensor)
