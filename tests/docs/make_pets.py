"""Draw small pictures of cats and dogs for the commands in the pages.    python tests/docs/make_pets.py

It makes pets/{cat,dog}/*.jpg, of which six dogs for each ten cats, and new_pictures/ with one of each.
"""

import random
from pathlib import Path

from PIL import Image, ImageDraw


def draw(kind: str, rng: random.Random) -> Image.Image:
    """A face on a coloured ground: a cat has pointed ears, a dog has hanging ones."""
    width, height = rng.randint(150, 220), rng.randint(150, 220)
    fur = tuple(rng.randint(90, 230) for _ in "rgb")
    dark = tuple(value // 2 for value in fur)
    picture = Image.new("RGB", (width, height), tuple(rng.randint(0, 255) for _ in "rgb"))
    pen = ImageDraw.Draw(picture)
    x, y, r = width // 2 + rng.randint(-12, 12), height // 2 + rng.randint(-8, 14), rng.randint(38, 50)
    for side in (-1, 1):
        if kind == "cat":
            pen.polygon([(x + side * r, y - 6), (x + side * r * 4 // 5, y - r * 3 // 2), (x + side * 6, y - r)], dark)
        else:
            left, right = sorted((x + side * r * 3 // 4, x + side * r * 5 // 4))
            pen.ellipse([left, y - r * 3 // 4, right, y + r], dark)
    pen.ellipse([x - r, y - r, x + r, y + r], fur)
    for side in (-1, 1):
        pen.ellipse([x + side * r // 3 - 5, y - 13, x + side * r // 3 + 5, y - 3], "black")
    pen.ellipse([x - 6, y + 8, x + 6, y + 17], "black")
    return picture


def main() -> None:
    rng = random.Random(0)
    for kind, count in (("cat", 100), ("dog", 60)):
        folder, new = Path("pets", kind), Path("new_pictures")
        folder.mkdir(parents=True, exist_ok=True)
        new.mkdir(exist_ok=True)
        for number in range(count):
            draw(kind, rng).save(folder / f"{kind}_{number:03}.jpg")
        draw(kind, rng).save(new / f"a_{kind}.jpg")


if __name__ == "__main__":
    main()
