"""data.exclude and data.relabel: the same run as on data without the images, or with the labels; and bad files."""

import csv
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import compose_run
from PIL import Image
from small_models import mnist_data

from thaw.callbacks.run_record import check_same_corrections
from thaw.data.corrections import image_hash
from thaw.data.images import Source
from thaw.data.mnist import load_mnist
from thaw.run.checkpoint import read_checkpoint
from thaw.run.config import build

PROBE = ["experiment=vit_linear_probe", "data=arrays", "data.batch_size=16", "trainer.max_epochs=1", "logger=csv"]
PROBE += ["validate=false"]


def write_csv(path: Path, *rows: dict[str, Any]) -> str:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
    return str(path)


def of(split: str, *indices: int, **more: Any) -> list[dict[str, Any]]:
    return [{"split": split, "index": index, **more} for index in indices]


def save(path: Path, train: Any, val: Any, test: Any) -> str:
    """Three splits as one .npz file."""
    parts = {"train": train, "val": val, "test": test}
    arrays = {f"{split}_images": images.numpy() for split, (images, _) in parts.items()}
    np.savez(path, **arrays, **{f"{split}_labels": labels.numpy() for split, (_, labels) in parts.items()})
    return f"data.path={path}"


def test_a_run_equals_one_on_corrected_data_to_the_last_bit(
    train: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On cached features, after a run on all images has written some; the test set is the same throughout."""
    digits = load_mnist("MNIST", "data", "sample", None)
    whole = [part.take(slice(64)) for part in (digits.train, digits.val, digits.test)]
    everything = save(tmp_path / "all.npz", *whole)
    drop, moved = [0, 9, 40], {3: 7, 17: 0}
    exclude = write_csv(tmp_path / "exclude.csv", *of("train", *drop, image=""), *of("val", 0), *of("test", 2, 5))
    labels = [row for index, label in moved.items() for row in of("train", index, suggested_label=label)]
    relabel = write_csv(tmp_path / "relabel.csv", *labels, *of("train", 30, suggested_label=""))
    for index, label in moved.items():
        whole[0].labels[index] = label
    kept = torch.tensor([n for n in range(64) if n not in drop])
    right = save(tmp_path / "right.npz", whole[0].take(kept), whole[1].take(slice(1, None)), whole[2])
    train(*PROBE, everything, "test=false", name="all")
    corrected = train(*PROBE, everything, f"data.exclude={exclude}", f"data.relabel={relabel}", name="corrected")
    plain = train(*PROBE, right, "test=false", name="plain")
    one, two = (torch.load(run / "checkpoints" / "best.ckpt", weights_only=True) for run in (corrected, plain))
    assert all(torch.equal(tensor, two["state_dict"][key]) for key, tensor in one["state_dict"].items())
    own, other = (json.loads((run / "summary.json").read_text()) for run in (corrected, plain))
    assert [own[key] == other[key] for key in ("n_train", "n_val", "val/acc")] == [True] * 3 and own["n_test"] == 64
    recorded = read_checkpoint(corrected / "checkpoints" / "best.ckpt")["data"]["corrections"]
    assert recorded == own["corrections"] == yaml.safe_load((corrected / "record.yaml").read_text())["corrections"]
    assert [recorded["exclude"][split] for split in ("train", "val", "test")] == [3, 1, 2]
    assert recorded["relabel"]["sha256"] == hashlib.sha256(Path(relabel).read_bytes()).hexdigest()
    with (corrected / "report" / "predictions.csv").open() as file:
        unlisted = [row["label"] == row["answer"] for row in csv.DictReader(file) if row["index"] not in ("2", "5")]
    assert own["test/acc_unlisted"] == sum(unlisted) / 62
    printed = capsys.readouterr().out
    assert "without 3 train and 1 val images of" in printed and "(2 listed test images stay as they are)" in printed
    assert ", without listed images " in printed


def test_both_at_once_and_before_folds_and_train_size(tmp_path: Path) -> None:
    whole = mnist_data().load()
    row = of("train", 1, given_label=str(int(whole.train.labels[1])), image=image_hash(whole.train.images[1]))
    exclude = write_csv(tmp_path / "exclude.csv", *row, *of("val", 3), *of("test", 8))
    relabel = write_csv(tmp_path / "relabel.csv", *of("train", 1, 2, suggested_label="4"))
    data = mnist_data(exclude=exclude, relabel=relabel, train_size=3).load()
    assert torch.equal(data.train.images, whole.train.images[[0, 2, 3]]) and data.train.labels[1] == 4
    assert len(data.val.labels) == 499 and data.listed == [8] and torch.equal(data.test.labels, whole.test.labels)
    fold = mnist_data(exclude=exclude, fold=0).load()
    assert len(fold.train.labels) + len(fold.val.labels) == 4498


def test_files_are_found_by_name_whatever_their_split(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for name in (f"{kind}/{number}.png" for kind in ("cat", "dog") for number in range(12)):
        (tmp_path / "pets" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(tmp_path / "pets" / name)
    (tmp_path / "pets/dog/broken.png").write_bytes(b"no picture")

    def load(**changes: Any) -> tuple[Source, dict[str, list[str]]]:
        cfg = compose_run(tmp_path, "data=folder", f"data.dir={tmp_path / 'pets'}", "data.image_size=8").data
        module = build(cfg, cache_dir=str(tmp_path / "cache"), skip_unreadable=True, **changes)
        return module.load(), module.names

    whole, names = load()
    rows = [{"split": "", "index": "", "file": names[split][1]} for split in ("train", "val", "test")]
    listed = write_csv(tmp_path / "exclude.csv", *rows, {"file": "dog/broken.png"})
    data, _ = load(exclude=listed)
    for split, before in (("train", whole.train), ("val", whole.val)):
        kept = [n for n in range(len(before.labels)) if n != 1]
        assert torch.equal(getattr(data, split).images, before.images[kept])
    assert data.listed == [1] and len(data.test.labels) == len(whole.test.labels)
    with pytest.raises(
        ValueError, match=r"row 1 names the file 'cat/99\.png', which pets, the folder .* does not have"
    ):
        load(exclude=write_csv(tmp_path / "other.csv", {"file": "cat/99.png"}))


@pytest.mark.parametrize(
    ("setting", "rows", "message"),
    [
        ("exclude", [{"image": 3}], r"has the columns image; it lacks index and split"),
        ("relabel", of("train", 3), r"has the columns split, index; it lacks suggested_label"),
        ("relabel", of("train", 3, suggested_label=""), r"suggests no label"),
        ("exclude", of("training", 3), r"row 1 has the split 'training'; it must be train, val or test"),
        ("exclude", of("val", 1, 500), r"row 2 has the index '500', but the val images of .* have 0 to 499"),
        ("exclude", of("val", -1), r"row 1 has the index '-1'"),
        ("relabel", of("train", 3, suggested_label="ten"), r"row 1 has the label 'ten'; the classes are 0, 1, 2"),
        (
            "exclude",
            of("train", 0, given_label="8"),
            r"given label '8', but train image 0 has '\d'; the file was made for",
        ),
        (
            "exclude",
            of("train", 0, image="0" * 16),
            r"train image 0 of .* has other pixels; the file was made for other",
        ),
        ("exclude", of("val", *range(500)), r"lists all 500 val images; leave some"),
        ("exclude", [{"split": "train", "index": 0, "file": "a.png"}], r"names the file 'a\.png', which MNIST"),
    ],
)
def test_a_wrong_file_is_refused(setting: str, rows: list[dict], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        mnist_data(**{setting: write_csv(tmp_path / "list.csv", *rows)}).load()


def test_an_unreadable_or_empty_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"data\.exclude=\S+gone\.csv cannot be read \(No such file or directory\)"):
        mnist_data(exclude=str(tmp_path / "gone.csv")).load()
    (tmp_path / "bytes.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="cannot be read"):
        mnist_data(relabel=str(tmp_path / "bytes.csv")).load()
    (tmp_path / "head.csv").write_text("split,index\n")
    with pytest.raises(ValueError, match=r"head\.csv lists no image"):
        mnist_data(exclude=str(tmp_path / "head.csv")).load()


def test_a_resumed_run_needs_the_same_file() -> None:
    one, two = ({"exclude": {"file": "a.csv", "sha256": letter * 64}} for letter in "ab")
    check_same_corrections(None, None)
    check_same_corrections(one, dict(one))
    for before, now in ((one, two), (one, None), (None, one)):
        with pytest.raises(ValueError, match=r"data\.exclude=\S+ is not the file that the run to be resumed had"):
            check_same_corrections(before, now)
