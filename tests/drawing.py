"""Drawing on a page in a browser as a hand would, with a mouse or a finger, and giving it pictures."""

import base64
import time

import numpy as np
from PIL import Image

Strokes = list[list[tuple[float, float]]]  # points (x, y) from 0 to 1


def thinned(ink: np.ndarray) -> np.ndarray:
    """The middle lines of a boolean picture (Zhang & Suen 1984)."""
    ink = np.pad(ink, 1)
    while True:
        before = ink.copy()
        for first in (True, False):
            # the eight neighbours, clockwise from the one above
            n = [
                np.roll(ink, shift, (0, 1))
                for shift in [(1, 0), (1, -1), (0, -1), (-1, -1), (-1, 0), (-1, 1), (0, 1), (1, 1)]
            ]
            count = sum(neighbour.astype(int) for neighbour in n)
            turns = sum((~n[i] & n[(i + 1) % 8]).astype(int) for i in range(8))
            up, right, down, left = n[0], n[2], n[4], n[6]
            ends = (
                ~(up & right & down) & ~(right & down & left) if first else ~(up & right & left) & ~(up & down & left)
            )
            ink = ink & ~((count >= 2) & (count <= 6) & (turns == 1) & ends)
        if (ink == before).all():
            return ink[1:-1, 1:-1]


def strokes_of(digit: np.ndarray) -> Strokes:
    """A real digit (28, 28) as the strokes of a pen: its middle lines, walked from their ends."""
    large = np.asarray(Image.fromarray(digit).resize((84, 84), Image.Resampling.BICUBIC))
    left = {(int(y), int(x)) for y, x in np.argwhere(thinned(large > 100))}
    around = [(dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1) if dy or dx]

    def neighbours(y: int, x: int) -> list[tuple[int, int]]:
        return [(y + dy, x + dx) for dy, dx in around if (y + dy, x + dx) in left]

    strokes = []
    while left:
        at = min(left, key=lambda point: (len(neighbours(*point)) != 1, point))
        walk, step = [at], (0, 0)
        left.remove(at)
        while choices := neighbours(*at):
            following = min(choices, key=lambda p: abs(p[0] - at[0] - step[0]) + abs(p[1] - at[1] - step[1]))
            step, at = (following[0] - at[0], following[1] - at[1]), following
            left.remove(at)
            walk.append(at)
        if len(walk) > 6 or not strokes:
            strokes.append([((x + 0.5) / 84, (y + 0.5) / 84) for y, x in (*walk[:-1:4], walk[-1])])
    return strokes


def settled(page) -> str:
    """The answer, once the page has asked for all that was drawn."""
    stop = time.monotonic() + 15
    while page.evaluate("asking || changed && isGiven()"):
        assert time.monotonic() < stop
        page.wait_for_timeout(20)
    return page.inner_text("#name")


def draw(page, strokes: Strokes) -> None:
    box = page.locator("#pad").bounding_box()
    for points in strokes:
        for place, (x, y) in enumerate(points):
            page.mouse.move(box["x"] + x * box["width"], box["y"] + y * box["height"])
            if not place:
                page.mouse.down()
        page.mouse.up()


def draw_with_finger(page, strokes: Strokes) -> None:
    box, session = page.locator("#pad").bounding_box(), page.context.new_cdp_session(page)
    for points in strokes:
        for place, (x, y) in enumerate(points):
            at = [{"x": box["x"] + x * box["width"], "y": box["y"] + y * box["height"]}]
            session.send(
                "Input.dispatchTouchEvent", {"type": "touchMove" if place else "touchStart", "touchPoints": at}
            )
        session.send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})


def ink(page, canvas: str) -> int:
    """How many pixels of a canvas are not black."""
    return page.evaluate(
        "id => { const canvas = document.getElementById(id);"
        " const { data } = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height);"
        " return data.filter((value, i) => i % 4 === 0 && value > 20).length; }",
        canvas,
    )


GIVE = """([event, base64]) => {
    const bytes = Uint8Array.from(atob(base64), letter => letter.charCodeAt(0)), transfer = new DataTransfer();
    transfer.items.add(new File([bytes], "a.png", { type: "image/png" }));
    dispatchEvent(event === "drop" ? new DragEvent("drop", { dataTransfer: transfer, cancelable: true })
        : new ClipboardEvent("paste", { clipboardData: transfer }));
}"""


def give(page, event: str, content: bytes) -> None:
    """Drop or paste a file where there is none, and wait for the answer."""
    page.evaluate(GIVE, [event, base64.b64encode(content).decode()])
    answered(page)


def answered(page) -> None:
    stop = time.monotonic() + 15
    while page.evaluate("photo === null || asking || changed"):
        assert time.monotonic() < stop
        page.wait_for_timeout(20)
