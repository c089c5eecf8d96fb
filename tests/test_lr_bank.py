"""A bank of heads against one run for each learning rate and weight decay."""

import csv
import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import matplotlib.image
import pytest
import torch
import torch.nn.functional as F
from conftest import SMALL
from omegaconf import OmegaConf
from torch import nn

from thaw.callbacks.finite_loss import FiniteLoss
from thaw.classifier import Classifier
from thaw.data.loader import Batch
from thaw.lr_bank import BankClassifier, LRBank, measure_heads
from thaw.models.heads import LinearHead
from thaw.run import checkpoint as checkpoints
from thaw.run.values import check_types
from thaw.task import SingleLabel

LRS, DECAYS = [1e-4, 1e-2, 3e-1], [0.0, 0.5]
NAMES = [f"lr={lr}_wd={decay}" for lr in ("0.0001", "0.01", "0.3") for decay in ("0", "0.5")]
BANK = [
    *("experiment=vit_linear_probe", "head=lr_bank", *SMALL, "head.lrs=[1e-4,1e-2,1e-1]"),
    *("head.weight_decays=[0.0,1e-2]", "callbacks.early_stopping=null"),
]


@pytest.fixture
def bank(classifier: Callable[..., Classifier]) -> Callable[..., BankClassifier]:
    """Builds a BankClassifier from what the classifier of a single run is built from."""

    def build(norm: str = "layer", lrs: Any = LRS, weight_decays: Any = DECAYS, **settings: Any) -> BankClassifier:
        model = classifier(head=partial(LRBank, norm=norm, lrs=lrs, weight_decays=weight_decays), **settings)
        model.__class__ = BankClassifier  # it has no constructor of its own
        return model  # type: ignore[return-value]

    return build


@pytest.fixture
def batches(batch: Batch) -> list[Batch]:
    """Three batches of noisy bars, which no head gets all right."""
    generator = torch.Generator().manual_seed(1)
    noise = torch.randint(0, 256, (3, *batch.images.shape), dtype=torch.uint8, generator=generator)
    return [
        Batch(batch.images // 8 + each // 8 * 7, batch.labels.roll(n), batch.indices) for n, each in enumerate(noise)
    ]


class Losses(L.Callback):
    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_train_batch_end(self, _trainer: L.Trainer, _module: L.LightningModule, outputs: dict, *_: object) -> None:
        self.seen.append(outputs["loss"].item())


@pytest.mark.parametrize("norm", ["layer", "batch"])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_every_head_equals_a_run_of_its_own(
    bank: Callable, classifier: Callable, batches: list, fit: Callable, tmp_path: Path, norm: str, optimizer: str
) -> None:
    """Weights, accuracy and training loss, under a clipping that is at work in every step."""
    settings = {"warmup_fraction": 0.3, "final_lr_fraction": 0.1}
    together = bank(norm, optim=settings)
    models, run = [together], {"epochs": 3, "gradient_clip_val": 0.5, "default_root_dir": tmp_path}
    for lr, decay in together.head.settings:
        single = classifier(head=partial(LinearHead, norm=norm), optim={**settings, "lr": lr, "weight_decay": decay})
        models.append(single)
    for model in models:
        if optimizer == "sgd":
            model.optim.optimizer = partial(torch.optim.SGD, momentum=0.9)
    metrics = fit(together, batches, **run).callback_metrics
    for name, head, single in zip(NAMES, together.head.heads, models[1:], strict=True):
        losses = Losses()
        expected = fit(single, batches, callbacks=[losses], **run).callback_metrics
        torch.testing.assert_close(head.weight, single.head.linear.weight, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(head.bias, single.head.linear.bias, rtol=1e-4, atol=1e-5)
        assert metrics[f"val/acc_{name}"] == expected["val/acc"], name
        assert metrics[f"train/loss_{name}"].item() == pytest.approx(sum(losses.seen[-3:]) / 3, rel=1e-4), name
    if norm == "batch":
        torch.testing.assert_close(together.head.norm.running_var, single.head.norm.running_var)
    assert len({round(head.weight.norm().item(), 4) for head in together.head.heads}) >= 5  # of 6: they do differ
    best = max(NAMES, key=lambda name: metrics[f"val/acc_{name}"].item())
    assert NAMES[together.head.chosen] == best
    assert metrics["val/acc"] == metrics[f"val/acc_{best}"]


def test_groups_carry_rates_and_decays(bank: Callable, batches: list, fit: Callable, tmp_path: Path) -> None:
    model = bank()
    trainer = fit(model, batches, default_root_dir=tmp_path)
    groups = {id(p): group for group in trainer.optimizers[0].param_groups for p in group["params"]}
    assert len(groups) == len(list(model.head.parameters()))
    for (lr, decay), head in zip(model.head.settings, model.head.heads, strict=True):
        weight, bias = groups[id(head.weight)], groups[id(head.bias)]
        assert (weight["initial_lr"], weight["weight_decay"]) == (lr, decay)
        assert (bias["initial_lr"], bias["weight_decay"]) == (lr, 0.0)


def test_norms_are_clipped_head_by_head(bank: Callable) -> None:
    model, expected = bank(), []
    for scale, head in zip((1e-3, 1e-1, 1, 10, 100, 1e3), model.head.heads, strict=True):
        for parameter in head.parameters():
            parameter.grad = scale * torch.randn_like(parameter)
        norm = torch.cat([p.grad.flatten() for p in head.parameters()]).norm().item()
        expected += [p.grad * min(1.0, 0.5 / norm) for p in head.parameters()]
    model.configure_gradient_clipping(None, gradient_clip_val=0.5, gradient_clip_algorithm="norm")
    for parameter, gradient in zip(model.head.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-7)


def test_forward_is_the_chosen_head() -> None:
    head = LRBank(8, 10, "layer", LRS, DECAYS)
    torch.manual_seed(0)
    for linear in head.heads:
        nn.init.normal_(linear.weight)
    with pytest.raises(ValueError, match="leave model= out"):
        head(torch.randn(3, 8))
    head.eval()
    head.choose(torch.tensor([0.1, 0.2, 0.9, 0.3, 0.9, 0.8]))
    restored = LRBank(8, 10, "layer", LRS, DECAYS).eval()
    restored.load_state_dict(head.state_dict())
    single = LinearHead(8, 10, "layer")
    single.linear.load_state_dict(head.heads[2].state_dict())  # of equals the earlier
    features = torch.randn(5, 8)
    assert head.logits(features).shape == (5, 6, 10)
    torch.testing.assert_close(restored(features), single(features))
    exported = torch.export.export(restored, (features,)).module()
    torch.testing.assert_close(exported(features), single(features))


def test_measure_equals_counting_by_hand() -> None:
    logits, labels = torch.randn(7, 3, 10), torch.arange(7)
    mean, sums = measure_heads(logits, labels, SingleLabel(10, label_smoothing=0.1).training_loss)
    for k in range(3):
        torch.testing.assert_close(mean[k], F.cross_entropy(logits[:, k], labels, label_smoothing=0.1))
        assert sums[1, k] == sum(int(row.argmax()) == n for n, row in enumerate(logits[:, k]))
    torch.testing.assert_close(sums[0], 7 * mean)
    shares = torch.rand(7, 10).softmax(dim=1)  # of mixed images
    mean, sums = measure_heads(logits, shares, SingleLabel(10, label_smoothing=0.0).training_loss)
    torch.testing.assert_close(mean[1], F.cross_entropy(logits[:, 1], shares))
    assert sums[1, 1] == (logits[:, 1].argmax(dim=1) == shares.argmax(dim=1)).sum()


def test_a_head_that_diverges_drops_out(bank: Callable, batches: list, fit: Callable, tmp_path: Path) -> None:
    """The others train as if it were not there; a run without a healthy head is stopped."""
    run = {"epochs": 2, "gradient_clip_val": 0.5, "default_root_dir": tmp_path}
    healthy, ill, lost = bank(), bank(), bank()
    fit(healthy, batches, **run)
    for model, heads in ((ill, [0]), (lost, range(6))):
        for number in heads:
            nn.init.constant_(model.head.heads[number].weight, torch.nan)
    fit(ill, batches, callbacks=[FiniteLoss()], **run)
    for before, after in zip(list(healthy.head.heads)[1:], list(ill.head.heads)[1:], strict=True):
        assert torch.equal(before.weight, after.weight)
    assert ill.best_acc[0] == 0 < healthy.best_acc[0]  # although it calls every digit 0, which some are
    with pytest.raises(ValueError, match="The loss is nan at step 0"):
        fit(lost, batches, callbacks=[FiniteLoss()], **run)


@pytest.mark.parametrize("freeze", ["full", "last_blocks"])
def test_a_backbone_that_trains_is_refused(bank: Callable, batches: list, fit: Callable, freeze: str) -> None:
    with pytest.raises(ValueError, match=r"such as backbone\.model\..*Use freeze=linear_probe, or a run for each rate"):
        fit(bank(freeze=freeze), batches)


def test_what_else_is_refused(bank: Callable, classifier: Callable, batches: list, fit: Callable) -> None:
    with pytest.raises(ValueError, match="chooses a head on validation"):
        fit(bank(), batches, limit_val_batches=0)
    single = classifier()
    single.__class__ = BankClassifier
    with pytest.raises(ValueError, match="model=lr_bank needs head=lr_bank, not LinearHead"):
        fit(single, batches)
    with pytest.raises(ValueError, match=r"has the heads a, b, but .* ask for lr=0\.0001_wd=0"):
        bank().on_load_checkpoint({"heads": {"a": 0.5, "b": 0.5}})
    model = bank()
    model._trainer = SimpleNamespace(precision="16-mixed", limit_val_batches=1.0, datamodule=None)
    with pytest.raises(ValueError, match="16-mixed, whose loss scaler skips"):
        model.setup("fit")


@pytest.mark.parametrize(
    ("lists", "message"),
    [
        ({"lrs": 1e-3}, "head.lrs=0.001 must be a list of 1 or more"),
        ({"weight_decays": []}, "head.weight_decays=[] must be a list of 1 or more, each item a number, 0 or more"),
        ({"lrs": [1e-3, 0.0]}, "head.lrs=[0.001, 0.0] must be"),
        ({"lrs": [float("inf")]}, "head.lrs=[inf] must be"),
        ({"lrs": [float("nan")]}, "head.lrs=[nan] must be"),
        ({"lrs": ["fast"]}, "head.lrs=['fast'] must be"),
        ({"lrs": [True]}, "head.lrs=[True] must be"),
        ({"weight_decays": [-0.1]}, "head.weight_decays=[-0.1] must be"),
    ],
)
def test_bad_lists(lists: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        check_types(OmegaConf.create({"_target_": "thaw.lr_bank.LRBank", **lists}), "head.")


def test_a_number_that_is_given_twice() -> None:
    for lists, message in (([1e-3, 0.001], [0.0]), r"lrs=.* holds 0\.001 twice"), (([1e-3], [0, 0.0]), "holds 0 twice"):
        with pytest.raises(ValueError, match=message):
            LRBank(8, 10, "layer", *lists)


# Whole runs


def test_a_whole_run(train: Callable[..., Path], capsys: pytest.CaptureFixture) -> None:
    """The curves say which head is best and when; it is what the checkpoint, the test and the summary speak of."""
    run_dir = train(*BANK)
    printed = capsys.readouterr().out
    assert "6 heads; head.lrs and head.weight_decays replace optim.lr=0.03 and optim.weight_decay=0\n" in printed
    with (run_dir / "csv" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    curves = [{k: float(v) for k, v in row.items() if k.startswith("val/acc") and v} for row in rows]
    curves = [curve for curve in curves if curve][:2]  # later ones are of the best checkpoint
    assert all(len(curve) == 7 and curve["val/acc"] == max(curve.values()) for curve in curves)
    best = max(curves, key=lambda curve: curve["val/acc"])
    checkpoint = checkpoints.read_checkpoint(run_dir / "checkpoints" / "best.ckpt")
    winner = [best[f"val/acc_{name}"] for name in checkpoint["heads"]].index(best["val/acc"])
    assert checkpoint["state_dict"]["head.chosen"] == winner
    summary = json.loads((run_dir / "summary.json").read_text())
    lr, decay = [(lr, decay) for lr in (1e-4, 1e-2, 1e-1) for decay in (0.0, 1e-2)][winner]
    assert (summary["best_lr"], summary["best_weight_decay"], summary["heads"]) == (lr, decay, 6)
    assert summary["val/acc"] == pytest.approx(best["val/acc"])
    assert f"learning rate {lr:g}, weight decay {decay:g}: the best of 6 heads on validation" in printed
    assert (summary["trainable_params"], summary["total_params"]) == (1930, 2_684_170)
    assert "1,930 of 2,684,170 parameters (0.07%) with one of 6 heads" in printed
    assert [float(row["best/lr"]) for row in rows if row["best/lr"]] == [lr]
    assert matplotlib.image.imread(run_dir / "report" / "lr_bank.png").std() > 0.05
    model = checkpoints.load_model(checkpoint)
    images = torch.randint(0, 256, (4, 1, 28, 28), dtype=torch.uint8)
    features = model.backbone(model.preprocess(images))
    torch.testing.assert_close(model(images), model.head.logits(features)[:, winner])
