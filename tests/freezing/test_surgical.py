"""Surgical fine-tuning: the blocks are those of a naive measurement, chosen once, and the run is that of typed ones."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import compose_run
from omegaconf import OmegaConf
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from thaw.data.preprocess import Preprocess
from thaw.freezing import surgical
from thaw.freezing.surgical import choose_blocks
from thaw.models.backbone import Backbone
from thaw.plan.dry_step import dry_step
from thaw.run.errors import UserError
from thaw.run.jobs import go_on

PICTURES = torch.randint(0, 256, (90, 1, 28, 28), generator=torch.manual_seed(3), dtype=torch.uint8)
LABELS = PICTURES[:, 0, :14].float().mean(dim=(1, 2)).argsort().argsort() % 3  # learnable by none, as a worst case


@pytest.fixture
def model(backbone: Callable[..., Backbone]) -> Backbone:
    model = backbone()
    model.fresh = frozenset()
    return model


def naive_norms(model: Backbone) -> list[float]:
    """Heads by scikit-learn, gradients of the whole mean loss by autograd, norms over numbers in one row."""
    inputs = Preprocess(28, 1, model.mean, model.std)(PICTURES)
    features, norms = model(inputs).detach().double().numpy(), np.zeros(3)
    for part in np.array_split(np.arange(90), 4):
        others = np.setdiff1d(np.arange(90), part)
        scaler = StandardScaler().fit(features[others])
        head = LogisticRegression(C=1.0, tol=1e-6, max_iter=1000).fit(
            scaler.transform(features[others]), LABELS[others]
        )
        standard = (model(inputs[part]) - torch.tensor(scaler.mean_)) / torch.tensor(scaler.scale_)
        logits = standard @ torch.tensor(head.coef_).T + torch.tensor(head.intercept_)
        loss = torch.nn.functional.cross_entropy(logits, LABELS[part])
        for number in range(3):
            named = dict(model.model.blocks[number].named_parameters())
            if number == 2:  # with the norm after it
                named |= {f"after {name}": p for name, p in model.model.fc_norm.named_parameters()}
            gradients = torch.autograd.grad(loss, list(named.values()), retain_graph=True)
            row, weights = (torch.cat([each.flatten() for each in group]) for group in (gradients, named.values()))
            norms[number] += (row.norm() / weights.norm()).item() / 4
    return norms.tolist()


def test_equals_a_naive_measurement(model: Backbone) -> None:
    chosen, norms = choose_blocks(model, PICTURES, LABELS, k=2, batches=4)
    wanted = naive_norms(model)
    assert [*norms.values()] == pytest.approx(wanted, rel=1e-3) and list(norms) == [1, 2, 3]
    assert chosen == sorted(1 + int(number) for number in np.argsort(wanted)[-2:])
    assert choose_blocks(model, PICTURES, LABELS, k=1, batches=4)[0] == [1 + int(np.argmax(wanted))]


def test_a_run_is_that_of_typed_blocks(
    train: Callable[..., Path], tiny_run: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights are equal to the last bit, with random images too, and a run that was cut off does not measure again."""
    run = [*tiny_run, "freeze=surgical", "freeze.k=1", "augment=affine", "trainer.max_epochs=1", "test=false"]
    measured = train(*run, name="measured")
    line, *_ = (line for line in capsys.readouterr().out.splitlines() if line.startswith("surgical: block "))
    saved: Any = torch.load(measured / "checkpoints" / "last.ckpt", weights_only=True)
    chosen = OmegaConf.load(measured / "config.yaml").freeze.chosen
    assert saved["config"]["freeze"]["chosen"] == chosen and line.startswith(f"surgical: block {chosen[0]} trains; ")
    trained = [name for name in saved["state_dict"] if name.startswith("backbone")]
    assert trained and all(f"blocks.{chosen[0] - 1}." in name for name in trained)

    monkeypatch.setattr(surgical, "choose_blocks", None)
    typed = train(*run, f"freeze.chosen={list(chosen)}", name="typed")
    other: Any = torch.load(typed / "checkpoints" / "last.ckpt", weights_only=True)
    for name, tensor in saved["state_dict"].items():
        assert torch.equal(tensor, other["state_dict"][name]), name

    cfg = compose_run(measured, *run)
    assert cfg.freeze.chosen is None
    go_on(cfg)
    assert cfg.freeze.chosen == chosen and cfg.resume == str(measured / "checkpoints" / "last.ckpt")


def test_the_planner_takes_the_lowest_blocks(tmp_path: Path) -> None:
    run = ["freeze=surgical", "trainer.precision=32-true", "model.num_classes=10"]
    step, typed = (dry_step(compose_run(tmp_path, *run, *more), "cpu") for more in ([], ["freeze.chosen=[1,2]"]))
    assert step == typed and step.cut == 1


@pytest.mark.parametrize(
    ("k", "labels", "message"),
    [
        (3, LABELS, r"freeze\.k=3 of freeze=surgical must be below 3"),
        (1, LABELS * 0, "two classes or more, with one class an image"),
        (1, torch.zeros(90, 2), "choose the blocks yourself: freeze=last_blocks"),
    ],
)
def test_what_cannot_be_measured(model: Backbone, k: int, labels: torch.Tensor, message: str) -> None:
    with pytest.raises(UserError, match=message):
        choose_blocks(model, PICTURES, labels, k=k, batches=4)


def test_random_weights_are_refused(backbone: Callable[..., Backbone]) -> None:
    with pytest.raises(UserError, match=r"backbone\.weights=none are random"):
        choose_blocks(backbone(), PICTURES, LABELS, k=1, batches=4)
