"""How well digits are read from pictures: test digits enlarged, moved, recoloured, shaded, framed and compressed.

python -m benchmarks.pictures --ckpt <run folder> --data <folder of the official files>
"""

import argparse
import io

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from thaw.data.mnist import load_mnist
from thaw.data.readers import ImageReader
from thaw.predict.predictor import load_predictor
from thaw.run.console import lenient

COUNT = 2000  # test digits, evenly spread


KINDS = {
    "enlarged and moved, PNG": "plain",
    "in any two colours besides, JPEG": "coloured",
    "with a shadow and noise besides": "shaded",  # it grows from one corner to the other
    "dark on bright with a hard shadow, JPEG": "hard",  # whose edge runs through the middle
    "in any two colours with a frame, JPEG": "framed",  # of the ink's colour, 1 to 4 % of the side, near the edge
}


def draw_picture(digit: np.ndarray, random: np.random.Generator, kind: str) -> bytes:
    """A digit enlarged 4 to 12 times somewhere in a larger picture: white on black as PNG, else in colours as JPEG."""
    side = int(28 * random.uniform(4, 12))
    height, width = (int(side * random.uniform(1, 2)) for _ in range(2))
    large = np.asarray(Image.fromarray(digit).resize((side, side), Image.Resampling.BICUBIC)) / 255
    ink = np.zeros((height, width))
    top, left = random.integers(0, height - side + 1), random.integers(0, width - side + 1)
    ink[top : top + side, left : left + side] = large
    paper, pen = np.zeros(3), np.ones(3)
    if kind == "hard":
        paper, pen = random.uniform(0.7, 1, 3), random.uniform(0, 0.3, 3)
    elif kind == "framed":  # outside of the digit's own field
        ink = np.pad(ink, side // 7)
        height, width = ink.shape
        inset, thick = int(random.uniform(0, 0.1) * side), 1 + int(random.uniform(0.01, 0.04) * side)
        frame = Image.new("L", (width, height))
        ImageDraw.Draw(frame).rectangle((inset, inset, width - 1 - inset, height - 1 - inset), outline=255, width=thick)
        ink = np.maximum(ink, np.asarray(frame) / 255)
    while kind not in ("plain", "hard") and (not paper.any() or abs(paper - pen).max() < 0.35):
        paper, pen = random.uniform(0, 1, 3), random.uniform(0, 1, 3)
    pixels = paper + ink[..., None] * (pen - paper)
    if kind == "shaded":  # a quarter darker in one corner than in the other, and noise
        down, right = np.mgrid[0:height, 0:width]
        pixels *= 1 - 0.25 * ((right / width + down / height) / 2)[..., None]
        pixels += random.normal(0, 0.03, pixels.shape)
    if kind == "hard":
        down, right = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
        angle = random.uniform(0, 2 * np.pi)
        in_shadow = np.cos(angle) * right + np.sin(angle) * down > 0
        pixels *= np.where(in_shadow, random.uniform(0.4, 0.7), 1)[..., None]
    file = io.BytesIO()
    picture = Image.fromarray((255 * pixels.clip(0, 1)).astype(np.uint8))
    picture.save(file, "PNG" if kind == "plain" else "JPEG", quality=80)
    return file.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt", default="last", help="last, a run folder or a checkpoint")
    parser.add_argument("--data", default="data", help="folder of the official files")
    given = parser.parse_args()
    predictor = load_predictor(given.ckpt)
    test = load_mnist("MNIST", given.data, "official", None).test
    reader = ImageReader("digit", (1, 28, 28))
    step = len(test.labels) // COUNT
    images, labels = test.images[::step], test.labels[::step]

    def accuracy(digits: Tensor) -> str:
        return f"{(predictor(digits).argmax(dim=1) == labels).double().mean():.2%}"

    print(f"{'as they are':42} {accuracy(images)}")
    for name, kind in KINDS.items():
        random = np.random.default_rng(0)
        files = (draw_picture(image[0].numpy(), random, kind) for image in images)
        digits = [reader.picture(file, "picture") for file in files]
        found = np.stack([np.zeros((1, 28, 28), np.uint8) if digit.image is None else digit.image for digit in digits])
        doubtful = np.mean([bool(digit.warning or digit.error) for digit in digits])
        print(f"{name:42} {accuracy(torch.from_numpy(found))}, a warning at {doubtful:.2%}", flush=True)


if __name__ == "__main__":
    with lenient():
        main()
