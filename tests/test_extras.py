"""Each extra for fine-tuning, as one line of configuration, shown to act."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from conftest import SMALL, compose_run
from hydra.utils import instantiate
from torch import Tensor

from thaw.classifier import Classifier
from thaw.data.loader import Batch
from thaw.run.config import settle

TINY = [  # random weights, one block
    *("experiment=vit_from_scratch", "backbone.arguments.depth=1", "augment=none", "data.source=sample"),
    "model.num_classes=10",
    *("logger=none", "callbacks.early_stopping=null", "trainer.precision=32-true"),
]
SGD = ["optim=sgd", "optim.optimizer.momentum=0", "optim.optimizer.nesterov=false", "optim.weight_decay=0"]
State = dict[str, Tensor]
pytestmark = pytest.mark.usefixtures("undrawn")


@pytest.fixture
def model(tmp_path: Path) -> Callable[..., Classifier]:
    """Builds the model that a command line means."""

    def build(*overrides: str) -> Classifier:
        cfg = compose_run(tmp_path, *TINY, *overrides)
        settle(cfg)
        L.seed_everything(cfg.seed, verbose=False)
        return instantiate(cfg.model)

    return build


@pytest.fixture
def batch() -> Batch:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (8, 1, 28, 28), dtype=torch.uint8, generator=generator)
    return Batch(images, torch.arange(8), torch.arange(8))


@pytest.fixture
def steps(tmp_path: Path) -> Callable[..., tuple[State, State]]:
    """Trains the model that a command line means; returns its state before and after."""

    def run(*overrides: str) -> tuple[State, State]:
        cfg = compose_run(tmp_path, *TINY, *overrides)
        settle(cfg)
        L.seed_everything(cfg.seed, verbose=False)
        model, datamodule = instantiate(cfg.model), instantiate(cfg.data)
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        callbacks = [instantiate(block) for block in (cfg.callbacks.step_seed, cfg.callbacks.average) if block]
        quiet = {"enable_checkpointing": False, "enable_progress_bar": False}
        instantiate(cfg.trainer, callbacks=callbacks, logger=False, **quiet).fit(model, datamodule)
        return before, model.state_dict()

    return run


def test_drop_path(model: Callable[..., Classifier]) -> None:
    """Of 32 equal digits some lose a branch in training, none in evaluation."""
    net = model("backbone.arguments.drop_path_rate=0.5", "backbone.arguments.depth=2").train()
    features = net.backbone(torch.ones(32, 1, 28, 28))
    assert (features - features[0]).abs().amax(dim=1).gt(1e-3).any()
    features = net.eval().backbone(torch.ones(32, 1, 28, 28))
    torch.testing.assert_close(features, features[:1].expand(32, -1))


def test_erasing(model: Callable[..., Classifier]) -> None:
    white = torch.full((50, 1, 28, 28), 255, dtype=torch.uint8)
    for blank in model("augment.erase=1").augment(white)[:, 0] == 0:
        rows, columns = blank.any(dim=1), blank.any(dim=0)
        assert torch.equal(blank, rows[:, None] & columns)
        assert 5 <= rows.sum() <= 15 and 5 <= columns.sum() <= 15
    share = (model("augment.erase=0.3").augment(white.repeat(20, 1, 1, 1)) == 0).any(dim=(1, 2, 3)).float().mean()
    assert share.item() == pytest.approx(0.3, abs=0.05)


@pytest.mark.parametrize("mix", ["none", "mixup"])
def test_label_smoothing(model: Callable[..., Classifier], batch: Batch, mix: str) -> None:
    """(1 - e) of the loss on the targets, e of the mean over all classes (Szegedy et al. 2016, section 7)."""
    net = model("model.label_smoothing=0.2", f"mix={mix}").eval()
    images, targets = net.preprocess(batch.images), F.one_hot(batch.labels, 10).float()
    if mix == "mixup":
        torch.manual_seed(3)
        images, targets = net.mix(images, batch.labels, 10)
        assert 0.01 < targets[0, 0] < 0.99
    logs = net.head(net.backbone(images)).log_softmax(dim=1)
    expected = -(0.8 * (targets * logs).sum(dim=1) + 0.2 * logs.mean(dim=1)).mean()
    torch.manual_seed(3)
    torch.testing.assert_close(net.training_step(batch, 0), expected)


def test_training_accuracy_counts_the_larger_share(model: Callable[..., Classifier], batch: Batch) -> None:
    """Here the neighbour's: the logits say the label of image i - 1 throughout."""
    net = model("mix=mixup")
    net.mix.forward = lambda images, labels, classes: (  # type: ignore[method-assign]
        images,
        0.4 * F.one_hot(labels, classes) + 0.6 * F.one_hot(labels.roll(1), classes),
    )
    net.head.forward = lambda features: 9.0 * F.one_hot(batch.labels.roll(1), 10)  # type: ignore[method-assign]
    net.training_step(batch, 0)
    assert net.train_acc.compute() == 1


def test_validation_is_not_mixed(model: Callable[..., Classifier], batch: Batch) -> None:
    net = model("mix=both").eval()
    net.mix.forward = None  # type: ignore[assignment]
    net.validation_step(batch, 0)
    net.test_step(batch, 0)
    assert (
        net.val_acc.compute() == net.test_acc.compute() == (net(batch.images).argmax(1) == batch.labels).float().mean()
    )


def test_accumulated_batches_equal_a_large_one(steps: Callable[..., tuple[State, State]]) -> None:
    common = [*SGD, "data.train_size=96", "trainer.max_epochs=1", "optim.lr=0.1"]
    before, large = steps(*common, "data.batch_size=32")
    _, small = steps(*common, "data.batch_size=16", "trainer.accumulate_grad_batches=2")
    for name, tensor in large.items():
        torch.testing.assert_close(small[name], tensor, rtol=1e-4, atol=1e-6, msg=name)
    assert not torch.allclose(large["head.linear.weight"], before["head.linear.weight"])


def test_clipping_bounds_the_step(steps: Callable[..., tuple[State, State]]) -> None:
    """One step of plain SGD with learning rate 1 is as long as the gradient, or as its bound."""

    def length(clip: str) -> float:
        one = ["data.train_size=16", "data.batch_size=16", "trainer.max_epochs=1", "optim.warmup_fraction=0"]
        before, after = steps(*SGD, *one, "optim.lr=1", f"trainer.gradient_clip_val={clip}")
        return torch.cat([(after[name] - before[name]).flatten() for name in before]).norm().item()

    assert length("null") > 0.2
    assert length("0.1") == pytest.approx(0.1, rel=1e-3)


@pytest.mark.long
def test_an_average_leaves_the_frozen_part_bit_identical(steps: Callable[..., tuple[State, State]]) -> None:
    few = ["data.train_size=64", "data.batch_size=16", "trainer.max_epochs=2", "cache.mode=memory"]
    last = ["backbone.weights=bundled", "backbone.arguments.depth=6", "freeze=last_blocks"]
    before, after = steps(*last, *few, "average=ema")
    frozen = [name for name in before if re.match(r"backbone\.model\.(pos_embed|patch_embed|blocks\.[0-3]\.)", name)]
    assert len(frozen) > 40
    assert all(torch.equal(before[name], after[name]) for name in frozen)
    assert not torch.equal(
        before["backbone.model.blocks.5.mlp.fc1.weight"], after["backbone.model.blocks.5.mlp.fc1.weight"]
    )
    plain = steps(*last, *few)[1]
    assert not torch.equal(plain["head.linear.weight"], after["head.linear.weight"])


def test_the_average_is_what_is_tested(
    train: Callable[..., Path], command: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    run = ["experiment=vit_linear_probe", *SMALL, "head.norm=batch", "average=ema"]
    run_dir = train(*run, "trainer.val_check_interval=0.5")
    best = torch.load(run_dir / "checkpoints" / "best.ckpt", weights_only=True)
    averaged, current = (best[key]["head.linear.weight"] for key in ("state_dict", "current_weights"))
    assert not torch.equal(averaged, current)
    summary = json.loads((run_dir / "summary.json").read_text())
    few = ["robustness.corruptions=[]", f"hydra.run.dir={run_dir / 'eval'}"]
    assert command("eval.py", f"ckpt={run_dir}", *few) == 0
    assert f"test/acc {summary['test/acc']:.2%}, 95 % interval" in capsys.readouterr().out


def test_mixing_keeps_no_features(train: Callable[..., Path], capsys: pytest.CaptureFixture) -> None:
    """One line says so; and a last batch of one digit is no obstacle."""
    probe = ["experiment=vit_linear_probe", *SMALL, "data.train_size=33", "trainer.max_epochs=1", "mix=cutmix"]
    run_dir = train(*probe)
    assert capsys.readouterr().out.count("cache: off, images are mixed at random (mix=none would") == 1
    assert not (run_dir.parents[2] / "cache").exists()
    with pytest.raises(ValueError, match=r"cache\.mode=disk can cache nothing: images are mixed at random"):
        train(*probe, "cache.mode=disk", name="disk")


@pytest.mark.parametrize("freeze", ["full", "linear_probe"])
def test_mixing_needs_two_digits(train: Callable[..., Path], freeze: str) -> None:
    with pytest.raises(ValueError, match=r"data\.batch_size=1 leaves no image to mix with; set it to 2 or more, or"):
        train("experiment=vit_linear_probe", f"freeze={freeze}", *SMALL, "data.batch_size=1", "mix=mixup")
