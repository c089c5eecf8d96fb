"""Files decoded once: equal to decoding each anew, whole or not at all, and what happens where the disk fails."""

import errno
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from thaw.data import decode
from thaw.data.decode import DecodedData
from thaw.data.pictures import fit_photo
from thaw.data.splits import ListedFile
from thaw.data.store import KNOWN, TensorStore, tensors_sha256

SIZE = 6


@pytest.fixture(autouse=True)
def known() -> Iterator[None]:
    """What this process knows belongs to one test."""
    KNOWN.clear()
    yield
    KNOWN.clear()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """150 small pictures of random pixels: more than two threads take at once."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    random = np.random.default_rng(0)
    for number in range(150):
        Image.fromarray(random.integers(0, 256, (12, 9, 3), dtype=np.uint8)).save(folder / f"{number:03}.png")
    return folder


Decoded: TypeAlias = tuple[Tensor, dict[str, list[int]], list[str]]


def listed(folder: Path) -> list[ListedFile]:
    """All of a folder: the even numbers are trained on and the odd ones tested on."""
    names = sorted(path.name for path in folder.iterdir())
    return [ListedFile(name, "any", ("train", "test")[number % 2]) for number, name in enumerate(names)]


def decoded(
    folder: Path, cache: Path, files: list[ListedFile] | None = None, changed: int = 0, **settings: Any
) -> Decoded:
    """What the settings make of the files, `changed` being a fact about them."""
    batches = {"train_size": None, "batch_size": 8, "eval_batch_size": 8, "num_workers": 0, "seed": 0, "fold": None}
    batches |= {
        "folds": 5,
        "exclude": None,
        "relabel": None,
        "labels_per_class": None,
        "labels_draw": 0,
        "class_weights": None,
        "sampler": "shuffled",
        "reader": "photo",
    }
    pictures = {"image_size": SIZE, "channels": 3, "val_share": 0.1, "test_share": 0.1, "max_gb": 1.0}
    pictures |= {"skip_unreadable": False, "cache_dir": str(cache)}
    files = files or listed(folder)

    def content(number: int) -> bytes:
        return (folder / files[number].name).read_bytes()

    data = DecodedData(**batches | pictures | settings)
    return data.decode_once(files, content, {}, {"changed": changed})


def anew(folder: Path, order: dict[str, list[int]]) -> Tensor:
    names = sorted(path.name for path in folder.iterdir())
    numbers = [number for part in order.values() for number in part]
    return torch.tensor(np.stack([fit_photo(Image.open(folder / names[number]), 3, SIZE) for number in numbers]))


def entries(cache: Path) -> list[str]:
    return sorted(path.suffix for path in (cache / "images").iterdir() if path.suffix != ".lock")


def test_images_are_those_of_the_files_in_the_order_wanted(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    images, order, lines = decoded(folder, tmp_path / "cache")
    hashes = [hashlib.sha256((folder / file.name).read_bytes()).hexdigest() for file in listed(folder)]
    for split, start in (("train", 0), ("test", 1)):
        assert order[split] == sorted(range(start, 150, 2), key=hashes.__getitem__)
    assert not order["val"] and not lines
    assert torch.equal(images, anew(folder, order)) and entries(tmp_path / "cache") == [".json", ".npy"]
    assert "decoded images: 150 of 3 x 6 x 6" in capsys.readouterr().out
    KNOWN.clear()  # as in another run
    monkeypatch.setattr(Path, "read_bytes", None)
    again, order_again, lines_again = decoded(folder, tmp_path / "cache")
    assert torch.equal(again, images) and order_again == order and lines_again == lines
    assert f"in {tmp_path / 'cache' / 'images'} (reused)" in capsys.readouterr().out
    assert decoded(folder, tmp_path / "cache")[0].data_ptr() == again.data_ptr()  # the next job of a sweep
    assert not capsys.readouterr().out


def test_other_facts_settings_or_files_are_other_images(folder: Path, tmp_path: Path) -> None:
    decoded(folder, tmp_path / "cache")
    decoded(folder, tmp_path / "cache", changed=1)
    decoded(folder, tmp_path / "cache", channels=1)
    decoded(folder, tmp_path / "cache", image_size=SIZE + 1)
    assert len(entries(tmp_path / "cache")) == 8


def test_runs_that_start_together_decode_once(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While this run waits for the lock, another one writes the images."""
    lock = TensorStore.lock

    @contextmanager
    def waited(store: TensorStore, key: str) -> Iterator[None]:
        monkeypatch.setattr(TensorStore, "lock", lock)
        decoded(folder, tmp_path / "cache")
        KNOWN.clear()
        monkeypatch.setattr(DecodedData, "decode_all", None)
        with lock(store, key):
            yield

    monkeypatch.setattr(TensorStore, "lock", waited)
    images, order, _ = decoded(folder, tmp_path / "cache")
    assert torch.equal(images, anew(folder, order))


def test_a_key_of_features_does_not_read_the_images(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, _, _ = decoded(folder, tmp_path / "cache")
    whole = tensors_sha256({"train": images})
    assert whole != tensors_sha256({"train": images.clone()})  # of the files, not of the numbers
    parts = [images[:75], images[75:], images[::2], images[:75, :1]]
    assert len({whole, *(tensors_sha256({"train": part}) for part in parts)}) == 5
    KNOWN.clear()
    again, _, _ = decoded(folder, tmp_path / "cache")
    assert tensors_sha256({"train": again}) == whole
    (folder / "000.png").write_bytes((folder / "001.png").read_bytes())
    assert tensors_sha256({"train": decoded(folder, tmp_path / "cache", changed=1)[0]}) != whole


# What cannot be read


def damage(folder: Path) -> None:
    (folder / "002.png").write_bytes(b"")
    (folder / "077.png").write_bytes((folder / "077.png").read_bytes()[:60])
    (folder / "148.png").write_bytes(b"<html>")


def test_what_cannot_be_read_is_named(folder: Path, tmp_path: Path) -> None:
    damage(folder)
    for _ in range(2):
        with pytest.raises(
            ValueError, match=r"3 of 150 pictures cannot be read: 002.png is .*; 077.png is a damaged"
        ) as e:
            decoded(folder, tmp_path / "cache")
        assert "data.skip_unreadable=true" in str(e.value)
        KNOWN.clear()


def test_what_cannot_be_read_is_left_out_if_wanted(folder: Path, tmp_path: Path) -> None:
    damage(folder)
    for _ in range(2):
        images, order, lines = decoded(folder, tmp_path / "cache", skip_unreadable=True)
        assert len(images) == 147 and torch.equal(images, anew(folder, order))
        assert {number for part in order.values() for number in part} == {*range(150)} - {2, 77, 148}
        assert lines[-1].startswith("left out 3 pictures that cannot be read: 002.png is not a PNG")
        KNOWN.clear()
    with pytest.raises(ValueError, match="3 of 150 pictures cannot be read"):  # by another run that does not want that
        decoded(folder, tmp_path / "cache")


def test_only_ten_are_named(folder: Path, tmp_path: Path) -> None:
    for path in sorted(folder.iterdir())[:13]:
        path.write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"13 of 150 .*; 009.png is not a [^;]*file and 3 more\. Replace"):
        decoded(folder, tmp_path / "cache")


def test_a_file_that_vanishes_before_it_is_read(folder: Path, tmp_path: Path) -> None:
    files = listed(folder)
    (folder / "005.png").unlink()
    with pytest.raises(ValueError, match=r"1 of 150 pictures cannot be read: 005.png cannot be read \(No such file"):
        decoded(folder, tmp_path / "cache", files)
    assert entries(tmp_path / "cache") == []
    images, order, lines = decoded(folder, tmp_path / "cache", files, skip_unreadable=True)
    assert len(images) == 149 and 5 not in order["test"] and "left out 1 picture that cannot be read" in lines[-1]


def test_doubts_name_the_pictures(folder: Path, tmp_path: Path) -> None:
    Image.new("RGB", (3000, 10)).save(folder / "150.png")
    Image.new("RGB", (1, 1)).save(folder / "151.png")
    _, _, lines = decoded(folder, tmp_path / "cache")
    square, side = "150.png: its middle square is less than a tenth of it", "151.png: its short side has less than"
    assert lines == [f"{square}; {side} 8 pixels"]


# Disk and memory


def test_images_that_are_too_large_are_refused_with_what_fits(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"150 images of 3 x 6 x 6 take 1.62e-05 GB, more than data.max_gb=1e-05"):
        decoded(folder, tmp_path / "cache", max_gb=1e-5)
    fits = 4  # 150 x 3 x 4 x 4 = 7,200 bytes of 10,000; 5 x 5 would be 11,250
    with pytest.raises(
        ValueError, match=rf"data.max_gb or cache.max_gb to 1 or more, or data.image_size to at most {fits}\."
    ):
        decoded(folder, tmp_path / "cache", max_gb=1e-5)
    assert not (tmp_path / "cache").exists()
    decoded(folder, tmp_path / "cache", image_size=fits, max_gb=1e-5)


def full(*_: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("place", ["os.posix_fallocate", "thaw.data.store.move"])
def test_a_full_disk_is_an_error_and_leaves_nothing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    monkeypatch.setattr(place, full)
    with pytest.raises(OSError, match=r"cannot hold 1.62e-05 GB of decoded images \(No space left.*Free some space"):
        decoded(folder, tmp_path / "cache")
    assert entries(tmp_path / "cache") == [] and not KNOWN


def test_a_folder_that_cannot_be_made_is_an_error(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(OSError, match=r"data.cache_dir=.*images cannot hold .* \(Not a directory\)"):
        decoded(folder, tmp_path / "cache")


def test_a_folder_that_cannot_be_written_is_still_read(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, _, _ = decoded(folder, tmp_path / "cache")
    KNOWN.clear()
    for name in ("posix_fallocate", "utime", "mkdir"):
        monkeypatch.setattr(os, name, full)
    assert torch.equal(decoded(folder, tmp_path / "cache")[0], images)


def test_an_interrupted_run_leaves_nothing(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(decode, "shape_doubts", interrupted)
    with pytest.raises(KeyboardInterrupt):
        decoded(folder, tmp_path / "cache")
    assert entries(tmp_path / "cache") == [] and not KNOWN


def test_damaged_images_are_decoded_again(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    _, order, _ = decoded(folder, tmp_path / "cache")
    [path] = (tmp_path / "cache" / "images").glob("*.npy")
    KNOWN.clear()
    os.truncate(path, path.stat().st_size - 1)
    again, _, _ = decoded(folder, tmp_path / "cache")
    assert torch.equal(again, anew(folder, order)) and "is damaged" in caplog.text
