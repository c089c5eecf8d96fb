"""thaw.load: the numbers of the predictor and of predict.py, from arrays and files of every form."""

import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import thaw
from thaw.data.images import Images
from thaw.data.mnist import load_mnist
from thaw.data.readers import ImageReader
from thaw.predict.prediction import find_files, predictions, read_file
from thaw.predict.predictor import Predictor, load_predictor
from thaw.run.errors import UserError


@pytest.fixture(scope="module")
def model(linear_probe: Path) -> thaw.Model:
    return thaw.load(linear_probe)


@pytest.fixture(scope="module")
def predictor(linear_probe: Path) -> Predictor:
    return load_predictor(str(linear_probe))


@pytest.fixture(scope="module")
def digits() -> Images:
    return load_mnist("MNIST", "nowhere", "sample", None).test.take(slice(0, 500, 10))


def test_importing_thaw_imports_nothing_heavy() -> None:
    code = (
        "import sys, thaw\n"
        "assert {'load', 'freeze', 'Model'} <= {*dir(thaw)}\n"
        "heavy = {'torch', 'lightning', 'numpy', 'PIL'} & {*sys.modules}\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="no attribute 'laod'"):
        thaw.__getattr__("laod")  # type: ignore[attr-defined]


def test_arrays_in_the_stored_shape_give_what_the_predictor_gives(
    model: thaw.Model, predictor: Predictor, digits: Images
) -> None:
    images, pixels = digits.images, digits.images.numpy()  # (N, 1, 28, 28)
    wanted = predictor(images).numpy()
    assert (model.classes, model.shape) == ([str(digit) for digit in range(10)], (1, 28, 28))
    for form in (pixels, pixels[:, 0], pixels.transpose(0, 2, 3, 1), [*pixels[:, 0]], np.asfortranarray(pixels)):
        found = model.predict(form)
        assert found.dtype == np.float32 and np.array_equal(found, wanted)
    read_only = pixels[:, 0].copy()
    read_only.setflags(write=False)
    assert np.array_equal(model.predict(read_only), wanted)
    for one in (pixels[0], pixels[0, 0], pixels[0].transpose(1, 2, 0)):
        assert np.allclose(model.predict(one), wanted[:1], atol=1e-2) and model.predict(one).shape == (1, 10)
    assert np.array_equal(model.inputs(pixels), pixels)
    for found, tensor in (
        (model.features(pixels), predictor.features(images)),
        (model.attention(pixels), predictor.attention(images)),
    ):
        assert found.dtype == np.float32 and np.array_equal(found, tensor.numpy())
    assert np.allclose(model.attention(pixels).sum(axis=(1, 2)), 1, atol=1e-5)


def test_files_give_what_predict_gives(
    model: thaw.Model, predictor: Predictor, digits: Images, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for number, image in enumerate(digits.images[:6, 0].numpy()):
        Image.fromarray(np.kron(255 - image, np.ones((3, 3), np.uint8))).save(tmp_path / f"{number}.png")
    Image.fromarray(np.hstack([*digits.images[:2, 0].numpy()])).save(tmp_path / "two.png")
    (tmp_path / "notes.txt").touch()
    files = find_files([str(tmp_path)])[0]
    read = [one for file in files for one in read_file(file, ImageReader("digit", (1, 28, 28)))]
    rows = list(predictions(predictor, read, predictor.classes))
    wanted = np.array([row["probabilities"] for row in rows])
    for form in (tmp_path, str(tmp_path), files, [str(file) for file in files], tmp_path.glob("*.png")):
        order = [*range(7)] if not hasattr(form, "send") else [files.index(file) for file in tmp_path.glob("*.png")]
        assert np.allclose(model.predict(form), wanted[order], atol=1e-6)
    assert f"1 of 7 images are doubtful: {tmp_path / 'two.png'}: it shows 2 separate shapes" in caplog.text
    assert model.inputs(files[0]).shape == (1, 1, 28, 28)


def test_many_files_are_read_in_parts(model: thaw.Model, digits: Images, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("thaw.predict.model.EVAL_BATCH", 4)
    pixels = digits.images[:10].numpy()
    assert np.array_equal(model.inputs(pixels), pixels)
    assert [len(batch) for batch in model.batches(pixels)] == [4, 4, 2]


class Means:
    """Stands for a model of photographs: the mean of each channel."""

    has_attention = False

    def __init__(self, channels: int) -> None:
        shape = (channels, 8, 8)
        self.data = {"classes": [*"rgb"[:channels]], "shape": shape, "reader": "photo"}

    def __call__(self, images: Tensor) -> Tensor:
        assert images.dtype == torch.uint8 and images.shape[1:] == self.data["shape"]
        return images.float().mean(dim=(2, 3))

    def features(self, images: Tensor) -> Tensor:
        return self(images)

    def attention(self, images: Tensor) -> Tensor:
        return self(images)

    def facts(self) -> dict[str, Any]:
        return {"name": "means"}


def of_photos(channels: int = 3) -> thaw.Model:
    return thaw.Model(Means(channels), ImageReader("photo", (channels, 8, 8)))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [(20, 31, 3), (20, 31), (20, 31, 1), (20, 31, 4), (8, 8, 4), (8, 8), (8, 8, 3)])
def test_other_arrays_are_made_as_the_picture_would_be(channels: int, size: tuple[int, ...], tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (2, *size), dtype=np.uint8)
    model = of_photos(channels)
    for number, each in enumerate(pixels):
        Image.fromarray(each[..., 0] if size[-1] == 1 else each).save(tmp_path / f"{number}.png")
    wanted = model.inputs(tmp_path)
    assert wanted.shape == (2, channels, 8, 8)
    assert np.array_equal(model.inputs(pixels), wanted)
    assert np.array_equal(model.inputs([*pixels]), wanted)
    if len(size) == 3 or size == (20, 31):
        assert np.array_equal(model.inputs(pixels[0]), wanted[:1])
    assert repr(model) == f"<thaw.Model of means: images ({channels}, 8, 8), {channels} classes>"


def test_pictures_of_several_sizes(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    sizes = [(9, 9), (30, 20, 3), (8, 8, 3), (8, 8, 4)]
    given = [random.integers(0, 256, size, dtype=np.uint8) for size in sizes]
    for number, each in enumerate(given):
        Image.fromarray(each).save(tmp_path / f"{number}.png")
    assert np.array_equal(of_photos().inputs(given), of_photos().inputs(tmp_path))


def test_digits_of_the_stored_size_are_not_judged(
    model: thaw.Model, digits: Images, caplog: pytest.LogCaptureFixture
) -> None:
    inverted = 255 - digits.images[:5, 0].numpy()
    assert np.array_equal(model.inputs(inverted)[:, 0], inverted)
    assert "5 of 5 images are doubtful: image 0 is not bright ink on a dark background" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        larger = np.kron(inverted, np.ones((1, 2, 2), np.uint8))
        assert (model.predict(larger).argmax(axis=1) == digits.labels[:5].numpy()).mean() >= 0.8
    assert not caplog.text


NOISE = np.random.default_rng(0).integers(0, 256, (2, 3, 50, 60), dtype=np.uint8)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (NOISE / 255, r"array of float64, .* give \(255 \* images\)\.round\(\)\.astype\(np\.uint8\)"),
        (NOISE.astype(np.int64), r"array of int64, .* give images\.astype\(np\.uint8\)\."),
        (NOISE.astype(np.int64) - 300, r"array of int64, .* and these are from -300 to -45\."),
        (NOISE > 3, r"array of bool, .* give 255 \* images\.astype\(np\.uint8\)\."),
        (np.array(["a.png"]), r"array of <U5"),
        (NOISE, r"shape \(2, 3, 50, 60\): channels come last, .* \(N, 3, 8, 8\)\. Give images\.transpose"),
        (NOISE[0, :, :8, :8], r"may be one picture or 3 grey ones; give images\[None\]"),
        (NOISE[0, 0, 0], r"shape \(60,\)\. Give a uint8 array \(N, H, W\)"),
        (NOISE[None], r"shape \(1, 2, 3, 50, 60\)\. Give"),
        (NOISE[:0], "holds no pixels"),
        ([], "the list is empty"),
        (3, "The images are int"),
        ([1, 2], "The list holds int"),
        (["a.png", NOISE[0, 0]], "The list holds numpy.ndarray"),
        (torch.from_numpy(NOISE), r"torch\.Tensor, not an array: give images\.cpu\(\)\.numpy\(\)"),
        (Image.new("L", (9, 9)), r"PIL\.Image\.Image, not an array: give np\.asarray\(picture\)"),
        ("missing.png", "'missing.png' is neither a file nor a folder"),
    ],
)
def test_what_is_no_image(images: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        of_photos().predict(images)


def test_what_cannot_be_read(tmp_path: Path) -> None:
    model = of_photos()
    with pytest.raises(ValueError, match="holds no picture"):
        model.predict(tmp_path)
    for name in "abcd":
        (tmp_path / f"{name}.png").write_bytes(b"no picture")
    Image.new("RGB", (9, 9)).save(tmp_path / "e.png")
    with pytest.raises(ValueError, match=r"4 images cannot be read: \S+a\.png is not a PNG.*c\.png.* and 1 more"):
        model.features(tmp_path)
    blank = thaw.Model(Means(1), ImageReader("digit", (1, 28, 28)))
    with pytest.raises(ValueError, match="1 image cannot be read: Image 1 shows no digit"):
        blank.inputs([np.eye(40, dtype=np.uint8) * 255, np.zeros((40, 40), np.uint8)])


def test_probabilities_that_are_not_finite() -> None:
    model = of_photos()
    model.model.features = lambda images: torch.full((len(images), 3), torch.nan)  # type: ignore[method-assign]
    model.model = type("Broken", (Means,), {"__call__": lambda self, images: torch.full((1, 3), torch.nan)})(3)
    with pytest.raises(ValueError, match="not finite: its weights are damaged"):
        model.predict(NOISE[0, 0])


def test_what_cannot_be_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="`last` means the newest run"):
        thaw.load("last")
    with pytest.raises(UserError, match=r"'nowhere' is neither `last`, a run folder nor a checkpoint file"):
        thaw.load("nowhere")
    with pytest.raises(UserError, match=r"holds no checkpoints/best\.ckpt"):
        thaw.load(tmp_path)
    (tmp_path / "backbone.safetensors").touch()
    with pytest.raises(UserError, match=r"is a pretraining run, whose model has no classes"):
        thaw.load(tmp_path)
    with pytest.raises(UserError, match=r"model\.onnx is not a file; give one that export\.py wrote"):
        thaw.load("model.onnx")
    with pytest.raises(UserError, match=r"precision=32-true is for checkpoints"):
        thaw.load(Path("model.onnx"), precision="32-true")


def test_the_reader_is_a_choice(linear_probe: Path) -> None:
    assert thaw.load(str(linear_probe), reader="photo").reader.kind == "photo"
    with pytest.raises(UserError, match="reader=pdf makes no images"):
        thaw.load(linear_probe, reader="pdf")
