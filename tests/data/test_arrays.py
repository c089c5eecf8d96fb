"""Images from arrays in files: every usual name, shape and type, as numpy reads them."""

import gzip
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from thaw.data.arrays import ArrayData, to_images
from thaw.data.idx import write_idx
from thaw.data.images import Source

Arrays = dict[str, np.ndarray]
RNG = np.random.default_rng(0)
TRAIN, TEST = RNG.integers(256, size=(200, 8, 8), dtype=np.uint8), RNG.integers(256, size=(30, 8, 8), dtype=np.uint8)
LABELS, TEST_LABELS = np.arange(200) % 4, np.arange(30) % 4


def read(path: Path, **settings: object) -> Source:
    whole = {"classes": None, "val_share": 0.1, "test_share": 0.2, "reader": "digit", "train_size": None, "fold": None}
    whole |= {
        "folds": 5,
        "exclude": None,
        "relabel": None,
        "labels_per_class": None,
        "labels_draw": 0,
        "batch_size": 8,
        "eval_batch_size": 8,
        "num_workers": 0,
        "class_weights": None,
        "sampler": "shuffled",
    }
    return ArrayData(path=str(path), **{**whole, "seed": 0, **settings}).load()  # type: ignore[arg-type]


def save_npz(folder: Path) -> Path:
    np.savez(folder / "digits.npz", x_train=TRAIN, y_train=LABELS, x_test=TEST, y_test=TEST_LABELS)
    return folder / "digits.npz"


def save_npz_each(folder: Path) -> Path:
    """As Kuzushiji-49 is published, with a column of labels as in MedMNIST."""
    for name, array in {"train-imgs": TRAIN, "train-labels": LABELS[:, None], "test-imgs": TEST}.items():
        np.savez_compressed(folder / f"k49-{name}.npz", array)
    np.savez_compressed(folder / "k49-test-labels.npz", TEST_LABELS[:, None])
    return folder


def save_npy(folder: Path) -> Path:
    for name, array in {"X_train": TRAIN, "y_train": LABELS, "X_test": TEST, "y_test": TEST_LABELS}.items():
        np.save(folder / f"{name}.npy", array)
    np.save(folder / "mean.npy", np.zeros(3))
    (folder / "README.md").write_text("mine")
    return folder


def save_csv(folder: Path, header: str = "") -> Path:
    for name, images, labels in (("mnist_train", TRAIN, LABELS), ("mnist_test", TEST, TEST_LABELS)):
        rows = np.column_stack([labels, images.reshape(-1, 64)])
        np.savetxt(folder / f"{name}.csv", rows, "%d", delimiter=",", header=header, comments="")
    return folder


def save_headed_csv(folder: Path) -> Path:
    return save_csv(folder, "\ufefflabel," + ",".join(f"pixel{number}" for number in range(64)))


def save_idx(folder: Path) -> Path:
    for name, array in {"train-images-idx3": TRAIN, "train-labels.idx1": LABELS.astype(np.uint8)}.items():
        (folder / f"{name}-ubyte").write_bytes(write_idx(torch.from_numpy(array)))
    for name, array in {"t10k-images-idx3": TEST, "t10k-labels-idx1": TEST_LABELS.astype(np.uint8)}.items():
        (folder / f"{name}-ubyte.gz").write_bytes(gzip.compress(write_idx(torch.from_numpy(array))))
    return folder


@pytest.mark.parametrize("save", [save_npz, save_npz_each, save_npy, save_csv, save_headed_csv, save_idx])
def test_files_under_any_usual_name(save: Callable[[Path], Path], tmp_path: Path) -> None:
    path = save(tmp_path)
    source = read(path)
    assert source.name == path.stem and source.classes == ["0", "1", "2", "3"]
    assert source.test.images.equal(torch.from_numpy(TEST[:, None]))
    assert source.test.labels.equal(torch.from_numpy(TEST_LABELS))
    assert [len(part.labels) for part in source[:3]] == [180, 20, 30]
    known = {image.tobytes(): label for image, label in zip(TRAIN, LABELS, strict=True)}
    for images, labels in source[:2]:
        assert labels.bincount().tolist() == [len(labels) // 4] * 4
        for image, label in zip(images, labels, strict=True):
            assert known.pop(image.numpy().tobytes()) == label
    assert not known and all(map(torch.equal, source.val, read(path, seed=1).val))


def test_one_array_of_each_gives_all_splits(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    np.savez(tmp_path / "mine_test.npz", images=TRAIN, labels=LABELS)
    source = read(tmp_path / "mine_test.npz", classes=["a", "b", "c", "d"])
    assert [len(part.labels) for part in source[:3]] == [140, 20, 40] and list(source.classes) == ["a", "b", "c", "d"]
    assert "splits: test takes 20% of each class" in capsys.readouterr().out


@pytest.mark.parametrize(
    "array",
    [
        TRAIN,
        TRAIN[..., None],
        TRAIN[:, None],
        TRAIN.reshape(200, 64),
        TRAIN.astype(np.int64),
        TRAIN.astype(np.float64),
        (TRAIN / 255).astype(np.float32),
        TRAIN / 255,
        TRAIN[:, ::-1][:, ::-1],
    ],
    ids=["HW", "HWC", "CHW", "flat", "int", "float", "fractions", "doubles", "strided"],
)
def test_shapes_and_types(array: np.ndarray) -> None:
    assert to_images(array, "x").equal(torch.from_numpy(TRAIN[:, None]))


def test_colours_and_masks() -> None:
    colours = RNG.integers(256, size=(5, 4, 6, 3), dtype=np.uint8)
    wanted = torch.from_numpy(colours).permute(0, 3, 1, 2)
    assert to_images(colours, "x").equal(wanted)
    assert to_images(colours.transpose(0, 3, 1, 2), "x").equal(wanted)
    assert to_images(TRAIN > 99, "x").equal((torch.from_numpy(TRAIN[:, None]) > 99).byte() * 255)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((9, 8, 8, 4), np.uint8), r"shape \(9, 8, 8, 4\); images must be \(N, H, W\)"),
        (np.zeros((9, 65), np.uint8), r"shape \(9, 65\); images must"),
        (np.zeros((0, 8, 8), np.uint8), "holds no images"),
        (np.full((9, 8, 8), -0.5), r"float64 from -0\.5 to -0\.5; .*whole numbers from 0 to 255"),
        (np.full((9, 8, 8), 1.5), r"from 1\.5 to 1\.5"),
        (np.full((9, 8, 8), np.nan), "from nan to nan"),
        (np.full((9, 8, 8), 256), "int64 from 256 to 256"),
        (np.full((9, 8, 8), "a"), "is <U1 .*; images must be whole numbers"),
    ],
)
def test_other_arrays_are_refused(array: np.ndarray, message: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", images=array, labels=np.zeros(len(array), int))
    with pytest.raises(ValueError, match=rf"a\.npz \(images\).*{message}"):
        read(tmp_path / "a.npz")


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"images": TRAIN}, r"a\.npz has no train labels \(found: .*a\.npz \(images\)\)\. Name arrays"),
        ({"first": TRAIN}, r"no train images \(found: no arrays\)"),
        ({"x_train": TRAIN, "y_train": LABELS, "x_test": TEST}, "no test labels"),
        ({"x": TRAIN, "images": TRAIN, "y": LABELS}, r"\(x\) and .*\(images\) both hold the train images; move one"),
        ({"x": TRAIN, "y": np.eye(4)[LABELS]}, r"\(y\) is float64 \(200, 4\); labels must be whole numbers.*\(N,\)"),
        ({"x": TRAIN, "y": LABELS + 0.5}, r"\(y\) is float64 \(200,\); labels must be whole"),
        ({"x": TRAIN, "y": LABELS - 1}, "the label -1"),
        ({"x": TRAIN, "y": LABELS * 10**9}, "200 labels up to 3000000000 are not those of classes"),
        ({"x": TRAIN, "y": LABELS[:-1]}, r"\(x\) and .*\(y\) have different lengths"),
        ({"x": TRAIN, "y": np.array([{}] * 200)}, r"a\.npz cannot be read \(Object arrays cannot"),
    ],
)
def test_other_contents_are_refused(arrays: Arrays, message: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", **arrays)  # type: ignore[arg-type]  # numpy takes only allow_pickle by name
    with pytest.raises(ValueError, match=message):
        read(tmp_path / "a.npz")


@pytest.mark.parametrize("name", ["a.npz", "a.npy", "a.csv", "a-images-ubyte", "a.txt"])
def test_damaged_files_are_named(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"PK\x03\x04 no such thing, 1")
    with pytest.raises(ValueError, match=name):
        read(tmp_path / name)


def test_a_path_that_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.path is missing"):
        ArrayData(**{field: None for field in ArrayData.__dataclass_fields__}).load()  # type: ignore[arg-type]
    with pytest.raises(OSError, match=r"none cannot be read \(No such file or directory\); data\.path must"):
        read(tmp_path / "none")
