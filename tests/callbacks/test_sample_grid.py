from collections.abc import Callable
from pathlib import Path

import matplotlib.image
import torch
from conftest import SMALL


def test_picture_of_the_augmentation_changes_nothing_else(train: Callable[..., Path]) -> None:
    run = ["experiment=vit_last_blocks", *SMALL, "trainer.max_epochs=1", "callbacks.step_seed=null"]
    with_picture = train(*run, name="with")
    without = train(*run, "callbacks.sample_grid=null", name="without")
    picture = matplotlib.image.imread(with_picture / "report" / "augmented_digits.png")
    assert picture.shape[1] > picture.shape[0] and picture.std() > 0.05
    one, two = (
        torch.load(run_dir / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        for run_dir in (with_picture, without)
    )
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())
