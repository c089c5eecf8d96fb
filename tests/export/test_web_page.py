"""A page that answers in the browser: what it holds, and in a real browser what it says."""

import base64
import functools
import io
import json
import re
import threading
from collections.abc import Callable, Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from drawing import answered, draw, draw_with_finger, give, ink, settled, strokes_of
from PIL import Image

from thaw.data.readers import ImageReader
from thaw.export.export_file import export_file
from thaw.export.web_page import load_page, rounded, save_page
from thaw.export.web_runtime import WebRuntime, load_runtime
from thaw.predict.onnx_model import OnnxModel
from thaw.predict.predictor import Predictor, load_predictor
from thaw.run.errors import UnreachableError


def test_weights_are_rounded_to_16_bits() -> None:
    values = torch.randn(5000, generator=torch.Generator().manual_seed(0)).numpy() * np.float32(3)
    found = rounded(values)
    assert found.dtype == np.float32 and (found.view(np.uint32) & 0xFF == 0).all()
    assert 0 < np.abs(found / values - 1).max() <= 2**-16
    for kept in (values.astype(np.float16).astype(np.float32), torch.tensor(values).bfloat16().float().numpy()):
        assert np.array_equal(rounded(kept), kept)
    odd = np.array([[0, -0.0, np.inf], [-np.inf, 1e-45, 1]], dtype=np.float32)
    assert np.array_equal(rounded(odd), [[0, -0.0, np.inf], [-np.inf, 0, 1]])
    half = np.array([0x3F800080, 0x3F800180, 0x3F800081], dtype=np.uint32).view(np.float32)
    assert rounded(half).view(np.uint32).tolist() == [0x3F800000, 0x3F800200, 0x3F800100]
    assert rounded(np.float32(np.pi)).shape == ()


def test_a_page_holds_the_model(exported: Callable[..., Any], tmp_path: Path) -> None:
    _, wanted, facts, path, source = exported("photo_convnet", "onnx")
    runtime = WebRuntime("1.2.3", "ort = '<b>';", "glue", "AAAA")
    save_page(onnx.load(path), facts, tmp_path / "index.html", runtime)
    held = load_page(tmp_path / "index.html")
    assert held.facts() == facts
    assert (held(source.train.images[:501]) - wanted).abs().max() < 1e-3
    text = (tmp_path / "index.html").read_text()
    assert "<script>ort = '<b>';</script>" in text
    assert set(re.findall(r"https?://[^'\" ]+", text)) == {"http://www.w3.org/2000/svg"}
    assert f"{facts['test_accuracy']:.2%} accuracy on 60 test images" in text and "commit c0ffee " in text
    (shown,) = re.findall(r"return \{ \.\.\.(\{.*\}), has_attention", text)
    assert json.loads(shown) == facts and "<b>ü" not in shown
    (tmp_path / "index.html").write_text("<p>another page</p>")
    with pytest.raises(ValueError, match=r"index.html holds no ONNX model; give a page of export.py format=web"):
        load_page(tmp_path / "index.html")


# ---- in a browser, with the package from the cache or the registry


@pytest.fixture(scope="module")
def page_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Exports a model to a page; the test is skipped where onnxruntime-web cannot be had."""
    try:
        load_runtime(None)
    except UnreachableError as error:
        pytest.skip(f"onnxruntime-web is neither cached nor reachable ({error.reason})")

    def write(predictor: Predictor, source: Any, quantize: str | None = None) -> Path:
        path = tmp_path_factory.mktemp("page") / "index.html"
        export_file(predictor, source, "web", quantize, path)
        return path

    return write


@pytest.fixture(scope="module")
def probe_page(linear_probe: Path, source: Any, page_of: Callable[..., Path]) -> Path:
    return page_of(load_predictor(str(linear_probe), accelerator="cpu", precision="32-true"), source)


@pytest.fixture
def opened(browser: Any) -> Iterator[Callable[..., Any]]:
    """Open a page in its own window; it must log no error and load nothing but itself."""
    contexts, wrong = [], []

    def go(address: str, **window: Any) -> Any:
        contexts.append(browser.new_context(**window))
        page = contexts[-1].new_page()
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
        page.on("request", lambda sent: None if sent.url.startswith((address, "blob:")) else wrong.append(sent.url))
        page.goto(address)
        page.wait_for_selector("#bars li", timeout=60_000)
        return page

    yield go
    for context in contexts:
        context.close()
    assert wrong == []


def probabilities(page: Any) -> list[float]:
    """The page's answer to what is drawn or given, from its model and not from its text."""
    return page.evaluate("predict().then(answer => answer.prediction.probabilities)")


def drawn(page: Any) -> Image.Image:
    """The picture of the drawing, as serve.py gets it."""
    data = page.evaluate("drawn().toDataURL('image/png')")
    return Image.open(io.BytesIO(base64.b64decode(data.partition(",")[2])))


def by_python(model: OnnxModel, picture: Image.Image) -> torch.Tensor:
    reading = ImageReader(model.data["reader"], model.data["shape"]).opened(picture, "it", [])
    assert reading.image is not None
    return model(torch.from_numpy(reading.image)[None])[0]


@pytest.mark.long
@pytest.mark.parametrize("quantize", [None, "int8"])
def test_ten_digits_from_disk(
    quantize: str | None,
    probe_page: Path,
    linear_probe: Path,
    source: Any,
    page_of: Callable[..., Path],
    opened: Callable[..., Any],
    digits: list[np.ndarray],
) -> None:
    """The classes and probabilities are Python's for the same drawings, but for a step of brightness in a pixel."""
    if quantize:
        predictor = load_predictor(str(linear_probe), accelerator="cpu", precision="32-true")
        probe_page = page_of(predictor, source, quantize)
    assert probe_page.stat().st_size < 15e6
    page, model = opened(probe_page.as_uri(), viewport={"width": 1000, "height": 700}), load_page(probe_page)
    answers, differences = [], []
    for digit in digits:
        draw(page, strokes_of(digit))
        answers.append(settled(page))
        assert ink(page, "input") > 40 and "answered in" in page.inner_text("#state")
        wanted = by_python(model, drawn(page))
        differences.append(float((torch.tensor(probabilities(page)) - wanted).abs().max()))
        assert answers[-1] == str(int(wanted.argmax()))
        page.keyboard.press("Escape")
    assert sum(answer == str(label) for label, answer in enumerate(answers)) >= 9, answers
    assert max(differences) < (0.02 if quantize else 0.005)
    assert (page.is_hidden("#where") and "int8" in page.inner_text("footer")) or not quantize


@pytest.mark.long
def test_pictures_of_a_digit(probe_page: Path, opened: Callable[..., Any], digits: list[np.ndarray]) -> None:
    page, model = opened(probe_page.as_uri(), viewport={"width": 1000, "height": 700}), load_page(probe_page)
    for event, format, label in (("drop", "PNG", 3), ("paste", "JPEG", 6)):
        file = io.BytesIO()
        picture = Image.fromarray(255 - digits[label]).resize((280, 280))
        picture.save(file, format)
        give(page, event, file.getvalue())
        assert settled(page) == str(label) and ink(page, "pad") > 10_000
        wanted = by_python(model, Image.open(file))
        assert float((torch.tensor(probabilities(page)) - wanted).abs().max()) < 0.02
        page.keyboard.press("Escape")
    give(page, "drop", b"no picture")
    assert "cannot read the picture" in page.inner_text("#state.bad") and page.inner_text("#name") == "?"
    page.keyboard.press("Escape")
    file = io.BytesIO()
    Image.new("RGB", (60, 60), "red").save(file, "PNG")
    give(page, "drop", file.getvalue())
    assert "shows no digit" in page.inner_text("#state.bad")


@pytest.mark.long
def test_on_a_phone_from_a_static_host(probe_page: Path, opened: Callable[..., Any], digits: list[np.ndarray]) -> None:
    handler = functools.partial(SimpleHTTPRequestHandler, directory=str(probe_page.parent))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as host:
        threading.Thread(target=host.serve_forever, daemon=True).start()
        phone = {"viewport": {"width": 360, "height": 740}, "has_touch": True, "is_mobile": True}
        page = opened(f"http://127.0.0.1:{host.server_port}/", **phone)
        draw_with_finger(page, strokes_of(digits[3]))
        assert settled(page) == "3"
        assert page.evaluate("document.documentElement.scrollWidth") == 360
        host.shutdown()


@pytest.mark.long
def test_photographs(made: Callable[[str], Any], page_of: Callable[..., Path], opened: Callable[..., Any]) -> None:
    """A model of 37 classes with odd names, in colour: the picture, the most probable ones, Python's numbers."""
    path = page_of(*made("photo_convnet"))
    page, model = opened(path.as_uri(), viewport={"width": 360, "height": 740}), load_page(path)
    assert page.is_hidden("#undo") and page.locator("#bars li").count() == 5
    noise = np.random.default_rng(0).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    picture, file = Image.fromarray(noise).resize((300, 200)), io.BytesIO()
    picture.save(file, "PNG")
    give(page, "drop", file.getvalue())
    answered(page)
    wanted = by_python(model, picture)
    assert torch.allclose(torch.tensor(probabilities(page)), wanted, atol=0.005)
    assert page.inner_text("#name") == model.data["classes"][int(wanted.argmax())]
    seen = page.evaluate("[...$('input').getContext('2d').getImageData(0, 0, 32, 32).data]")
    expected = ImageReader("photo", (3, 32, 32)).opened(picture, "it", []).image
    assert expected is not None
    assert np.abs(np.reshape(seen, (32, 32, 4))[..., :3] - expected.transpose(1, 2, 0).astype(int)).max() <= 2
