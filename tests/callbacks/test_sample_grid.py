from collections.abc import Callable
from pathlib import Path

import matplotlib.image
import torch


def test_picture_of_the_augmentation_changes_nothing_else(train: Callable[..., Path], tiny_run: list[str]) -> None:
    tiny = [override for override in tiny_run if override != "callbacks.sample_grid=null"]
    run = ["experiment=vit_last_blocks", *tiny, "trainer.max_epochs=1", "callbacks.step_seed=null", "test=false"]
    with_picture = train(*run, name="with")
    without = train(*run, "callbacks.sample_grid=null", name="without")
    picture = matplotlib.image.imread(with_picture / "report" / "augmented_images.png")
    assert picture.shape[1] > picture.shape[0] and picture.std() > 0.05
    assert not (without / "report").exists()
    one, two = (
        torch.load(run_dir / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        for run_dir in (with_picture, without)
    )
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())
