"""Datasets in the form of the Hugging Face hub, from parquet files in a folder; never the network."""

import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
from PIL import Image

from thaw.data.huggingface import HuggingFaceData
from thaw.data.images import Source

datasets = pytest.importorskip("datasets")
parquet = pytest.importorskip("pyarrow.parquet")
pyarrow = pytest.importorskip("pyarrow")

Read = Callable[..., Source]


@pytest.fixture
def read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Read:
    """Reads `tmp_path/pets` unless another name is given."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hub")
    for module in (datasets.config, huggingface_hub.constants):
        monkeypatch.setattr(module, "HF_HUB_OFFLINE", False)

    def read(name: str | None = str(tmp_path / "pets"), **settings: Any) -> Source:
        batches = {"batch_size": 8, "eval_batch_size": 8, "num_workers": 0, "class_weights": None, "seed": 0}
        decoded = {"image_size": 8, "channels": 3, "val_share": 0.1, "test_share": 0.2, "skip_unreadable": False}
        whole = (
            batches | decoded | {"cache_dir": str(tmp_path / "cache"), "max_gb": 1.0, "train_size": None, "fold": None}
        )
        whole |= {
            "folds": 5,
            "exclude": None,
            "relabel": None,
            "labels_per_class": None,
            "labels_draw": 0,
            "sampler": "shuffled",
            "reader": "photo",
            "subset": None,
            "image_column": None,
            "label_column": None,
        }
        return HuggingFaceData(name=name, **(whole | settings)).load()

    return read


def png(label: int, number: int) -> bytes:
    """A picture whose red channel is its label times 100, all pictures different."""
    pixels = np.full((8, 8, 3), number, np.uint8)
    pixels[..., 0] = label * 100
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def write(folder: Path, split: str, labels: list, first: int = 0, **features: Any) -> None:
    """Rows whose picture `number` is of the class `number % 2`."""
    (folder / "pets").mkdir(exist_ok=True)
    pictures = [{"bytes": png((first + row) % 2, first + row), "path": None} for row in range(len(labels))]
    rows = datasets.Dataset.from_dict(
        {"img": pictures, "label": labels}, datasets.Features(img=datasets.Image(), label=features.get("label"))
    )
    rows.to_parquet(folder / f"pets/{split}-00000-of-00001.parquet")


def test_parquet_files_of_the_hub(read: Read, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    label = datasets.ClassLabel(names=["dog", "cat"])
    for first, (split, count) in zip((0, 60, 80), (("train", 60), ("validation", 20), ("test", 10)), strict=True):
        write(tmp_path, split, [row % 2 for row in range(count)], first, label=label)
    source = read()
    assert source.title == "pets" and source.classes == ["dog", "cat"]
    for part, numbers in zip(source[:3], (range(60), range(60, 80), range(80, 90)), strict=True):
        assert sorted(part.images[:, 1, 0, 0].tolist()) == list(numbers)
        assert part.images[:, 0, 3, 3].equal((part.labels * 100).byte())
    monkeypatch.setattr("thaw.data.decode.open_picture", None)  # a second run opens no picture
    assert all(map(torch.equal, source.train, read().train))


def test_plain_parquet_files_with_names_for_labels(read: Read, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "pets").mkdir()
    labels = ["lynx" if row % 2 else "ocelot" for row in range(60)]
    table = pyarrow.table({"picture": [png(row % 2, row) for row in range(60)], "kind": labels})
    parquet.write_table(table, tmp_path / "pets/train.parquet")
    source = read(image_column="picture", label_column="kind")
    assert source.classes == ["lynx", "ocelot"]
    assert [part.labels.bincount().tolist() for part in source[:3]] == [[21, 21], [3, 3], [6, 6]]
    assert all(part.images[:, 0, 3, 3].equal(((1 - part.labels) * 100).byte()) for part in source[:3])
    assert (
        "splits: test takes 20% of each class in train; val takes 10% of each class in train" in capsys.readouterr().out
    )
    with pytest.raises(ValueError, match=r"no column image; set data\.image_column to one of picture, kind"):
        read()
    with pytest.raises(ValueError, match=r"no column kinds; set data\.label_column to one of picture, kind"):
        read(image_column="picture", label_column="kinds")
    with pytest.raises(ValueError, match=r"the column picture holds b.*labels must be names, or whole numbers"):
        read(image_column="picture", label_column="picture")


def test_a_test_split_without_labels(read: Read, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    label = datasets.ClassLabel(names=["dog", "cat"])
    write(tmp_path, "train", [row % 2 for row in range(60)], label=label)
    write(tmp_path, "validation", [row % 2 for row in range(20)], first=60, label=label)
    write(tmp_path, "test", [-1] * 10, first=80, label=label)
    source = read()
    assert [len(part.labels) for part in source[:3]] == [54, 6, 20]
    out = capsys.readouterr().out
    assert "passed over test, whose labels are not published" in out and "val is the test split" in out


def test_the_library_is_missing(read: Read, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"needs the library datasets: pip install -e '\.\[huggingface\]'"):
        read()


def test_what_cannot_be_loaded(read: Read, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"data\.name is missing"):
        read(None)
    with pytest.raises(ValueError, match=r"data\.name=a/b/c cannot be loaded: Couldn't find"):
        read("a/b/c")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty cannot be loaded: .*data\.subset to a configuration"):
        read(str(tmp_path / "empty"))
    write(tmp_path, "test", [0, 1], label=datasets.Value("int64"))
    with pytest.raises(ValueError, match=r"pets has no split train"):
        read()

    def offline(*arguments: Any, **settings: Any) -> None:
        raise ConnectionError("Name or service not known")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(
        ConnectionError, match=r"the hub cannot be reached \(Name or service not known\)\. .*to the folder of"
    ):
        read("owner/name")
