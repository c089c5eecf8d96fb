"""Pseudo-labels: which images train in a round, with which labels."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Trainer

from thaw.callbacks import pseudo_labels
from thaw.callbacks.pseudo_labels import PseudoLabels
from thaw.data.loader import Batch
from thaw.evaluation.propagation import balance, normalised_graph, spread

pytestmark = pytest.mark.usefixtures("undrawn")
ROUNDS = "callbacks.pseudo_labels.shares"


@pytest.fixture
def few_run(tiny_run: list[str]) -> list[str]:
    """4,500 images in 3 steps an epoch, 20 of them labelled."""
    few = ["experiment=few_labels_finetune", "data.train_size=null", "data.labels_per_class=2", "data.batch_size=1500"]
    return [*tiny_run, *few, "average=none", "augment=none", "test=false"]


def test_the_surest_images_train_with_the_labels_of_propagation(
    train: Callable[..., Path], few_run: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second round has the features of the model by then; drawn images keep their label and always train."""
    seen: list[dict[str, Any]] = []

    class Watched(PseudoLabels):
        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            pool = trainer.datamodule.load().pool
            modes = [module.training for module in pl_module.modules()]
            with torch.no_grad():
                features = pl_module.eval().backbone(pl_module.preprocess(pool.images))
            for module, mode in zip(pl_module.modules(), modes, strict=True):
                module.training = mode
            super().on_train_epoch_start(trainer, pl_module)
            assert modes == [module.training for module in pl_module.modules()]
            scores = balance(spread(normalised_graph(features, 20), pool.labels, 0.99))
            seen.append({"known": pool.labels, "scores": scores, "features": features, "images": [], "labels": []})

        def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Batch, batch_idx: int) -> None:
            seen[-1]["images"].append(batch.indices.clone())
            seen[-1]["labels"].append(batch.labels.clone())

    monkeypatch.setattr(pseudo_labels, "PseudoLabels", Watched)
    train(*few_run, "trainer.max_epochs=2", f"{ROUNDS}=[0.3,0.6]", "optim.lr=1e-2")
    assert not torch.allclose(seen[0]["features"], seen[1]["features"], atol=1e-2)
    for facts, count in zip(seen, (1350, 2700), strict=True):
        images, labels, known = torch.cat(facts["images"]), torch.cat(facts["labels"]), facts["known"]
        assert len(images) == 4500  # an epoch has as many images as the pool
        confidence, guesses = facts["scores"].max(dim=1)
        confidence[known >= 0] = 1
        surest = {*confidence.topk(count).indices.tolist()}
        drawn = {*images.tolist()}
        assert len(drawn - surest) <= 0.01 * count  # features of batches differ in their last bits
        assert len(surest - drawn) < 0.25 * count  # as they are drawn with replacement
        expected = torch.where(known >= 0, known, guesses)[images]
        assert (labels == expected).float().mean() > 0.995
        assert torch.equal(labels[known[images] >= 0], known[images][known[images] >= 0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["data.labels_per_class=null"], r"pseudo_labels needs images without labels: set data\.labels_per_class"),
        (["trainer.max_epochs=3"], r"trainer\.max_epochs=3 cannot be divided into the 2 rounds"),
        (["data.sampler=balanced"], r"data\.sampler=balanced draws by known labels"),
        (["trainer.limit_val_batches=null"], r"labels_per_class=2 leaves no labels to validate on"),
        ([f"{ROUNDS}=[0.5,1.5]"], rf"{ROUNDS}=\[0\.5, 1\.5\] must be"),
    ],
)
def test_what_cannot_work_is_refused(
    train: Callable[..., Path], few_run: list[str], changes: list[str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        train(*few_run, *changes)
