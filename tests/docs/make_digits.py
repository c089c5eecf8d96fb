"""Write digits of the bundled sample for the commands in the pages.    python tests/docs/make_digits.py

It makes pictures/{three,seven}.png, enlarged and dark on bright, and images.npy, uint8 (20, 1, 28, 28).
"""

from pathlib import Path

import numpy as np
from PIL import Image

from thaw.data.mnist import load_sample


def main() -> None:
    images, labels = load_sample("MNIST").test
    np.save("images.npy", images[:20].numpy())
    Path("pictures").mkdir(exist_ok=True)
    for name, digit in (("three", 3), ("seven", 7)):
        first = images[labels == digit][0, 0].numpy()
        Image.fromarray(255 - first).resize((140, 140)).save(f"pictures/{name}.png")


if __name__ == "__main__":
    main()
