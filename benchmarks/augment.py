"""Affine augmentation of a batch on two CPU threads: ours next to kornia's.    python benchmarks/augment.py"""

import time
from collections.abc import Callable

import torch
from torch import Tensor

from thaw.data.augment import Augment
from thaw.run.console import lenient

BATCH, ROUNDS = 512, 200
DEGREES, TRANSLATE, SCALE = 10.0, 0.07, 0.1


def main() -> None:
    try:
        from kornia.augmentation import RandomAffine
    except ImportError as error:
        raise SystemExit("This comparison needs kornia: pip install kornia") from error

    torch.set_num_threads(2)
    torch.manual_seed(0)
    ours = Augment(DEGREES, TRANSLATE, SCALE, shear=0.0, elastic=0.0, elastic_sigma=4.0, thickness=0.0, erase=0.0)
    theirs = RandomAffine(DEGREES, (TRANSLATE, TRANSLATE), (1 - SCALE, 1 + SCALE), p=1.0)
    images = torch.randint(0, 256, (BATCH, 28, 28), dtype=torch.uint8)
    pixels = images[:, None].float() / 255  # (B, 1, S, S)

    # In turn, and the fastest round of each, so that whatever else the machine does counts for neither.
    rounds = [(seconds(ours, images), seconds(theirs, pixels)) for _ in range(ROUNDS)]
    speeds = [BATCH / min(column) for column in zip(*rounds, strict=True)]

    print(f"{f'batches of {BATCH}, 2 threads':32}{'images/s':>10}{'ratio':>8}")
    for name, speed in zip(("kornia RandomAffine, float", "thaw Augment, uint8 to uint8"), speeds[::-1], strict=True):
        print(f"{name:32}{speed:>10,.0f}{speed / speeds[1]:>8.2f}")


@torch.inference_mode()
def seconds(transform: Callable[[Tensor], Tensor], images: Tensor) -> float:
    start = time.perf_counter()
    transform(images)
    return time.perf_counter() - start


if __name__ == "__main__":
    with lenient():
        main()
