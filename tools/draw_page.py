"""Draws a digit on the page of serve.py or of export.py format=web, and takes a picture of the answer.

    python tools/draw_page.py <address or file> <picture.png> [width] [light | dark]

Needs playwright and Chromium, as the tests of the pages do.
"""

import shutil
import sys
import time
from pathlib import Path

from playwright.sync_api import sync_playwright

FIVE = [(0.66, 0.2), (0.4, 0.2), (0.37, 0.45), (0.48, 0.41), (0.6, 0.45), (0.66, 0.57), (0.62, 0.72), (0.5, 0.79)]
FIVE += [(0.35, 0.75)]  # the points of one stroke, from 0 to 1


def main(page_at: str, picture: str, width: str = "1000", scheme: str = "light") -> None:
    address = page_at if "://" in page_at else Path(page_at).resolve().as_uri()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        size = {"width": int(width), "height": 640}
        page = browser.new_page(viewport=size, color_scheme=scheme, device_scale_factor=1.5)  # type: ignore[arg-type]
        started = time.perf_counter()
        page.goto(address)
        page.wait_for_selector("#bars li", timeout=60_000)
        box = page.locator("#pad").bounding_box()
        assert box
        for place, (x, y) in enumerate(FIVE):
            page.mouse.move(box["x"] + x * box["width"], box["y"] + y * box["height"], steps=4)
            if not place:
                page.mouse.down()
                page.wait_for_selector("#state:has-text('answered in')")
                print(f"first answer {time.perf_counter() - started:.1f} s after opening")
        page.mouse.up()
        page.wait_for_timeout(1000)
        print(page.inner_text("#name"), page.inner_text("#state"))
        page.screenshot(path=picture, full_page=True)
        browser.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
