"""The page in a real browser: digits are drawn as a hand would, with a mouse and with a finger."""

import io
from collections.abc import Callable, Iterator

import pytest
from drawing import answered, draw, draw_with_finger, give, ink, settled, strokes_of
from PIL import Image

from thaw.data.readers import ImageReader
from thaw.predict.predictor import load_predictor

pytestmark = pytest.mark.slow


@pytest.fixture
def address(linear_probe, serving) -> str:
    return serving(load_predictor(str(linear_probe)), max_body_mb=2.0)


@pytest.fixture
def opened(browser, address) -> Iterator[Callable]:
    """Open the page in its own window; it must log no error and load nothing from elsewhere."""
    contexts, wrong = [], []

    def go(**window):
        context = browser.new_context(**window)
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
        page.on(
            "request", lambda request: None if request.url.startswith((address, "data:")) else wrong.append(request.url)
        )
        page.goto(address)
        page.wait_for_selector("#bars li")
        return page

    yield go
    for context in contexts:
        context.close()
    assert wrong == []


def test_digits_with_a_mouse(opened, digits) -> None:
    page = opened(viewport={"width": 1000, "height": 700})
    answers = []
    for digit in digits[::2]:
        draw(page, strokes_of(digit))
        answers.append(settled(page))
        assert ink(page, "input") > 40
        page.keyboard.press("Escape")
    assert sum(answer == str(label) for label, answer in zip((0, 2, 4, 6, 8), answers, strict=True)) >= 4, answers


@pytest.mark.long
def test_small_and_off_centre(opened, digits) -> None:
    """MNIST's rule makes size and place irrelevant, and so does the pen that is scaled with the drawing."""
    page = opened(viewport={"width": 1000, "height": 700})
    answers = []
    for digit in digits[::2]:
        draw(page, [[(0.6 + 0.3 * x, 0.05 + 0.3 * y) for x, y in points] for points in strokes_of(digit)])
        answers.append(settled(page))
        page.keyboard.press("Delete")
    assert sum(answer == str(label) for label, answer in zip((0, 2, 4, 6, 8), answers, strict=True)) >= 4, answers


@pytest.mark.long
def test_on_a_phone_with_a_finger(opened, digits) -> None:
    page = opened(viewport={"width": 360, "height": 740}, has_touch=True, is_mobile=True, device_scale_factor=2)
    answers = []
    for digit in digits[::2]:
        draw_with_finger(page, strokes_of(digit))
        answers.append(settled(page))
        assert page.evaluate("scrollY") == 0, "the page does not scroll while one draws"
        page.wait_for_timeout(400)  # sooner it would be the second half of a double tap
        page.tap("#clear")
    assert sum(answer == str(label) for label, answer in zip((0, 2, 4, 6, 8), answers, strict=True)) >= 4, answers
    assert page.evaluate("document.documentElement.scrollWidth") == 360, "nothing is wider than the screen"


def test_what_is_shown(opened, digits) -> None:
    """Ten bars that add up, the input, the attention; undo takes back a stroke, clear takes back all."""
    page = opened(viewport={"width": 1000, "height": 700}, color_scheme="dark")
    assert page.inner_text("#name") == "?"
    assert page.is_disabled("#clear")
    assert ink(page, "input") == 0
    draw(page, strokes_of(digits[3]))
    answer = settled(page)
    shares = [float(text.removesuffix(" %")) for text in page.locator("#bars span").all_inner_texts()]
    assert len(shares) == 10
    assert abs(sum(shares) - 100) < 0.6
    assert page.inner_text("#bars .best b") == answer
    assert page.is_visible("#attention")
    assert ink(page, "attention") > ink(page, "input")
    assert "ms" in page.inner_text("#state")
    drawn = ink(page, "pad")
    draw(page, [[(0.05, 0.05), (0.1, 0.05)]])
    settled(page)
    assert ink(page, "pad") > drawn
    page.keyboard.press("Control+z")
    assert settled(page) == answer
    assert ink(page, "pad") == drawn
    page.click("#clear")
    assert (page.inner_text("#name"), ink(page, "input"), ink(page, "attention"), ink(page, "pad")) == ("?", 0, 0, 0)


def test_a_picture_of_a_digit(opened, digits) -> None:
    """A digit may also be dropped or pasted; drawing takes the picture away."""
    page = opened(viewport={"width": 1000, "height": 700})
    for event, label in (("drop", 3), ("paste", 6)):
        file = io.BytesIO()
        Image.fromarray(255 - digits[label]).resize((280, 280)).save(file, "PNG")
        give(page, event, file.getvalue())
        assert settled(page) == str(label)
        assert ink(page, "pad") > 10_000, "the picture is shown"
        page.keyboard.press("Escape")
        assert ink(page, "pad") == 0
    give(page, "drop", file.getvalue())
    draw(page, strokes_of(digits[1]))
    settled(page)
    assert ink(page, "pad") < 50_000 and page.evaluate("photo === null")


def test_a_model_of_photographs(browser, stand_in, serving, tmp_path) -> None:
    """No drawing; the picture, the five most probable of many classes, and where the model looked on it."""
    stand_in.classes = ["ants & bees", "<b>ü数</b>", *map(str, range(35))]
    address, wrong = serving(stand_in, ImageReader("photo", (3, 32, 32))), []
    Image.new("RGB", (300, 200), (38, 200, 10)).save(tmp_path / "green.png")  # 38 % 37 is the second class
    page = browser.new_page(viewport={"width": 360, "height": 740})
    page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
    page.goto(address)
    page.wait_for_selector("#bars li")
    assert page.is_hidden("#undo") and page.locator("#bars li").count() == 5
    draw(page, [[(0.2, 0.2), (0.8, 0.8)]])
    assert page.evaluate("strokes.length") == 0
    with page.expect_file_chooser() as chooser:
        page.focus("#pad")
        page.keyboard.press("Enter")
    chooser.value.set_files(tmp_path / "green.png")
    answered(page)
    assert page.inner_text("#name") == page.locator("#bars b").first.inner_text() == "<b>ü数</b>"
    pixel = "id => [...document.getElementById(id).getContext('2d').getImageData(16, 16, 1, 1).data]"
    assert page.evaluate(pixel, "input") == [38, 200, 10, 255]
    red, green, blue, _ = page.evaluate(pixel, "attention")
    assert red < green > blue
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    assert not wrong
    page.keyboard.press("Escape")
    give(page, "paste", b"no picture")
    assert "The picture is not a PNG" in page.inner_text("#state.bad") and page.inner_text("#name") == "?"
    page.keyboard.press("Escape")
    assert page.evaluate(pixel, "input") == [0, 0, 0, 0] and page.is_visible("#hint")
    page.close()


def test_docs_need_no_network(browser, stand_in, serving) -> None:
    """Swagger's page shows the API; all its files come from this server, and its policy blocks none of them."""
    page, address, wrong = browser.new_page(), serving(stand_in), []
    page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
    page.on("request", lambda sent: None if sent.url.startswith((address, "data:")) else wrong.append(sent.url))
    page.goto(f"{address}/docs")
    page.click("text=/predict")
    page.wait_for_selector("text=the request took longer than 10 s to come")
    assert page.locator(".opblock").count() == 4
    page.close()
    assert wrong == []


def test_class_names_are_text(browser, stand_in, serving) -> None:
    """Class names are escaped, and a model without attention has no panel for it."""
    stand_in.has_attention = False
    page = browser.new_page()
    page.goto(serving(stand_in))
    page.wait_for_selector("#bars li")
    assert page.locator("#bars li").last.locator("b").inner_text() == "<b>nine"
    assert page.is_hidden("#where")
    page.close()


def test_a_doubt_is_shown_until_the_drawing_changes(browser, stand_in, serving) -> None:
    page = browser.new_page()
    page.goto(serving(stand_in))
    page.wait_for_selector("#bars li")
    draw(page, [[(0.2, 0.2), (0.2, 0.8)], [(0.8, 0.2), (0.8, 0.8)]])
    page.wait_for_selector("#state.bad:has-text('more than one digit')")
    page.click("#undo")
    page.wait_for_selector("#state:not(.bad):has-text('answered in')")
    page.close()


@pytest.mark.long
def test_a_server_that_is_gone_or_busy(browser, stand_in, serving, digits) -> None:
    """It says so, and goes on by itself with the newest drawing."""
    page = browser.new_page()
    page.goto(serving(stand_in, request_seconds=0.5))
    page.wait_for_selector("#bars li")
    stand_in.open.clear()
    draw(page, strokes_of(digits[2]))
    page.wait_for_selector("#state.bad:has-text('busy')")
    stand_in.open.set()
    page.wait_for_selector("#state:has-text('answered in')")
    page.route("**/predict", lambda route: route.abort())
    draw(page, strokes_of(digits[1]))
    page.wait_for_selector("#state.bad:has-text('does not answer')")
    page.unroute("**/predict")
    page.wait_for_selector("#state:has-text('answered in')")
    page.close()
