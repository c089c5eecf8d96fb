"""Datasets of torchvision, in each one's own form on disk, tiny; never the network."""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torchvision.datasets
from PIL import Image
from scipy.io import savemat

from thaw.data.decode import DecodedData
from thaw.data.idx import write_idx
from thaw.data.images import Source
from thaw.data.pictures import fit_photo
from thaw.data.torchvision import TorchvisionData

RNG = np.random.default_rng(0)


def settings_of(tmp_path: Path) -> dict[str, Any]:
    batches = {"batch_size": 8, "eval_batch_size": 8, "num_workers": 0, "class_weights": None, "sampler": "shuffled"}
    decoded = {"image_size": 16, "channels": 3, "val_share": 0.1, "test_share": 0.2, "skip_unreadable": False}
    cache = {"cache_dir": str(tmp_path / "cache"), "max_gb": 1.0}
    return {
        **batches,
        **decoded,
        **cache,
        "train_size": None,
        "fold": None,
        "folds": 5,
        "exclude": None,
        "relabel": None,
        "labels_per_class": None,
        "labels_draw": 0,
        "seed": 0,
        "reader": "photo",
    }


Read = Callable[..., Source]


@pytest.fixture
def read(tmp_path: Path) -> Read:
    def read(name: str, **settings: Any) -> Source:
        whole = {"dir": str(tmp_path), "download": False, "options": {}, **settings_of(tmp_path), **settings}
        return TorchvisionData(name=name, **whole).load()

    return read


@pytest.fixture(autouse=True)
def any_content(monkeypatch: pytest.MonkeyPatch) -> None:
    """The MD5 sums are those of the real files."""
    for module in ("cifar", "svhn", "flowers102", "mnist"):
        integrity = f"torchvision.datasets.{module}.check_integrity"
        monkeypatch.setattr(integrity, lambda path, md5=None: Path(path).is_file())


def noise(*shape: int) -> np.ndarray:
    return RNG.integers(256, size=shape, dtype=np.uint8)


def test_cifar10(read: Read, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": names}))
    for name in [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]:
        (folder / name).write_bytes(pickle.dumps({"data": noise(40, 3072), "labels": [*range(10)] * 4}))
    source = read("CIFAR10")
    assert source.title == "CIFAR10, the official files" and source.classes == names
    assert [tuple(part.images.shape) for part in source[:3]] == [(180, 3, 32, 32), (20, 3, 32, 32), (40, 3, 32, 32)]
    assert source.val.labels.bincount().tolist() == [2] * 10
    image, label = torchvision.datasets.CIFAR10(tmp_path, train=False)[7]
    assert source.test.labels[7] == label
    assert np.array_equal(source.test.images[7].permute(1, 2, 0), np.asarray(image))
    assert not (tmp_path / "cache").exists()
    monkeypatch.setattr("thaw.data.torchvision.FileLock", None)  # nothing is downloaded or locked that is there
    assert read("CIFAR10", download=True).test.images.equal(source.test.images)


def test_svhn_names_its_classes_by_number(read: Read, tmp_path: Path) -> None:
    pictures = {split: noise(32, 32, 3, 50) for split in ("train", "test")}
    for split, pixels in pictures.items():
        savemat(tmp_path / f"{split}_32x32.mat", {"X": pixels, "y": np.arange(1, 51)[:, None] % 10 + 1})
    source = read("SVHN")
    assert source.classes == [str(digit) for digit in range(10)]
    assert source.test.images.shape == (50, 3, 32, 32)
    assert np.array_equal(source.test.images[3].permute(1, 2, 0), pictures["test"][..., 3])


def test_emnist_is_upright_and_its_letters_begin_at_0(read: Read, tmp_path: Path) -> None:
    raw = tmp_path / "EMNIST/raw"
    raw.mkdir(parents=True)
    stored = torch.from_numpy(noise(52, 28, 28))
    for split in ("train", "test"):
        for kind, tensor in (("images-idx3", stored), ("labels-idx1", torch.arange(52).byte() % 26 + 1)):
            (raw / f"emnist-letters-{split}-{kind}-ubyte").write_bytes(write_idx(tensor))
    source = read("EMNIST", options={"split": "letters"})
    assert source.title == "EMNIST letters, the official files"
    assert source.classes == [chr(code) for code in range(ord("a"), ord("z") + 1)]
    assert source.test.labels.tolist() == [*range(26)] * 2
    assert source.test.images[:, 0].equal(stored.transpose(1, 2))
    with pytest.raises(ValueError, match=r"data\.name=EMNIST: .*missing .*'split'; data\.options gives its arg"):
        read("EMNIST")
    with pytest.raises(ValueError, match=r"data\.name=EMNIST: .*'splits'"):
        read("EMNIST", options={"split": "letters", "splits": "letters"})


def flowers(folder: Path) -> None:
    """A photograph of each of 102 kinds in each official split."""
    (folder / "flowers-102/jpg").mkdir(parents=True)
    for number in range(1, 307):
        picture = Image.fromarray(noise(20, 24 + number % 5, 3))
        picture.save(folder / f"flowers-102/jpg/image_{number:05}.jpg")
    savemat(folder / "flowers-102/imagelabels.mat", {"labels": np.arange(306) % 102 + 1})
    ids = {"trnid": range(1, 103), "valid": range(103, 205), "tstid": range(205, 307)}
    savemat(folder / "flowers-102/setid.mat", {name: np.array(part) for name, part in ids.items()})


def test_official_splits_of_photographs(read: Read, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    flowers(tmp_path)
    source = read("Flowers102")
    assert source.classes[:2] == ["pink primrose", "hard-leaved pocket orchid"] and len(source.classes) == 102
    assert [tuple(part.images.shape) for part in source[:3]] == [(102, 3, 16, 16)] * 3
    assert "splits:" not in capsys.readouterr().out
    number = 205 + int(source.test.labels[0])
    picture = Image.open(tmp_path / f"flowers-102/jpg/image_{number:05}.jpg")
    assert np.array_equal(source.test.images[0], fit_photo(picture, 3, 16))
    (tmp_path / "flowers-102/jpg/image_00003.jpg").write_bytes(b"none")
    with pytest.raises(ValueError, match=r"1 of 306 pictures cannot be read: .*image_00003\.jpg"):
        read("Flowers102", image_size=8)


def test_pictures_that_torchvision_opens_itself(
    read: Read, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of Oxford's pets it gives no paths. They have no official validation split."""
    root = tmp_path / "oxford-iiit-pet"
    for folder in ("images", "annotations"):
        (root / folder).mkdir(parents=True)
    for split, count in (("trainval", 40), ("test", 10)):
        names = [f"{'Abyssinian' if number % 2 else 'shiba_inu'}_{split}{number}" for number in range(count)]
        lines = [f"{name} {1 if name[0] == 'A' else 2} 1 1" for name in names]
        (root / f"annotations/{split}.txt").write_text("\n".join(lines))
        for name in names:
            colour = (250, 10, 20) if name[0] == "A" else (20, 200, 100)
            Image.new("RGB", (30, 20), colour).putpixel((3, 4), (len(name), 0, 0))
            picture = Image.fromarray(np.clip(noise(20, 30, 3) // 8 + np.array(colour) // 2, 0, 255).astype(np.uint8))
            picture.save(root / f"images/{name}.jpg", quality=95)
    source = read("OxfordIIITPet")
    assert source.classes == ["Abyssinian", "Shiba Inu"]
    assert [part.labels.bincount().tolist() for part in source[:3]] == [[18, 18], [2, 2], [5, 5]]
    red = torch.cat([images[labels == 0] for images, labels in source[:3]]).float().mean((0, 2, 3))
    assert red[0] > 100 and red[1] < 50
    assert "splits: val takes 10% of each class in train" in capsys.readouterr().out

    monkeypatch.setattr(torchvision.datasets.OxfordIIITPet, "__getitem__", None)  # a second run opens no picture
    again = read("OxfordIIITPet")
    assert all(torch.equal(one, other) for one, other in zip(sum(source[:3], ()), sum(again[:3], ()), strict=True))


def test_a_dataset_without_splits(read: Read, tmp_path: Path) -> None:
    for number in range(40):
        folder = tmp_path / f"eurosat/2750/{'Forest' if number % 2 else 'River'}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise(16, 16, 3)).save(folder / f"{number}.jpg")
    source = read("EuroSAT")
    assert source.classes == ["Forest", "River"]
    assert [part.labels.bincount().tolist() for part in source[:3]] == [[14, 14], [2, 2], [4, 4]]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("CIFAR", r"data\.name=CIFAR is not one of torchvision's datasets, such as CIFAR10; did you mean CIFAR10?"),
        ("verify_str_arg", "is not one of"),
        (None, "data.name is missing: set it to one of"),
        ("CocoDetection", r"data\.name=CocoDetection: .*'annFile'; data\.options gives"),
    ],
)
def test_no_such_dataset(name: str, message: str, read: Read) -> None:
    with pytest.raises(ValueError, match=message):
        read(name)


def test_detection_is_not_classification(read: Read, tmp_path: Path) -> None:
    root = tmp_path / "VOCdevkit/VOC2012"
    for name in ("ImageSets/Main/train.txt", "JPEGImages/1.jpg", "Annotations/1.xml"):
        (root / name).parent.mkdir(parents=True)
        (root / name).write_text("1\n")
    with pytest.raises(ValueError, match=r"VOCDetection has the label '.*1\.xml'.*: it is not for classification"):
        read("VOCDetection")


def test_files_that_are_not_there(read: Read, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CIFAR10", "Flowers102", "OxfordIIITPet", "USPS", "SEMEION"):
        with pytest.raises(OSError, match=rf"data\.dir={tmp_path} does not hold {name} as .*data\.download=true"):
            read(name)

    def offline(*arguments: Any, **settings: Any) -> None:
        raise URLError("Name or service not known")

    monkeypatch.setattr("urllib.request.urlopen", offline)
    folder = tmp_path / "new" / "folder"
    for name in ("CIFAR10", "Flowers102"):
        with pytest.raises(ConnectionError, match=rf"{folder} does not hold {name} .*Name or service.*run this"):
            read(name, download=True, dir=str(folder))


def test_every_source_of_pictures_has_their_settings() -> None:
    assert {*DecodedData.__dataclass_fields__} < {*TorchvisionData.__dataclass_fields__}
