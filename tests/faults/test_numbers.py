"""Numbers that are not finite, and odd ones: a run stops and says why, or reports what it should; never NaN.

A loss that is not finite stops the run with its step, batch and cause, and leaves the weights as they were.
"""

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from conftest import needs
from fault_counts import sized
from hydra.errors import InstantiationException
from lightning.pytorch.callbacks import ModelCheckpoint
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader

from thaw.callbacks.finite_loss import FiniteLoss
from thaw.callbacks.run_checkpoint import PacedCheckpointIO
from thaw.data.loader import Batch
from thaw.evaluation.evaluate import evaluate_checkpoint
from thaw.run.checkpoint import read_checkpoint
from thaw.run.errors import UserError


class Model(L.LightningModule):
    """The loss is the mean squared output, times `factors[step]`."""

    def __init__(self, factors: list[float]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.frozen = nn.Linear(784, 4).requires_grad_(False)
        self.head = nn.Linear(4, 1)
        self.factors = factors
        self.weights: list[Tensor] = []
        self.validated = 0

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        self.weights.append(self.head.weight.detach().clone())
        outputs = self.head(self.frozen(batch.images.flatten(1) / 255))
        return outputs.square().mean() * self.factors[self.global_step]

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.validated += 1

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.head.parameters(), lr=0.125, weight_decay=0.1)


class Delayed(FiniteLoss):
    """Takes every loss for one on a GPU."""

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        on_gpu: Any = SimpleNamespace(device=torch.device("cuda"), detach=loss.detach)
        super().on_before_backward(trainer, pl_module, on_gpu)


def fit(model: Model, check: FiniteLoss | None = None, validate: bool = False, **changes: Any) -> None:
    images = torch.full((40, 1, 28, 28), 100, dtype=torch.uint8)
    batches = [Batch(part, torch.zeros(10), torch.arange(10) + 10 * i) for i, part in enumerate(images.split(10))]
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    quiet |= {"enable_model_summary": False, "num_sanity_val_steps": 0, "max_epochs": 2, "devices": 1}
    callbacks = [check or FiniteLoss(), *changes.pop("callbacks", [])]
    trainer = L.Trainer(callbacks=callbacks, **quiet | changes)  # type: ignore[arg-type]
    loader: DataLoader = DataLoader(batches, batch_size=None)  # type: ignore[arg-type]
    trainer.fit(model, loader, loader if validate else None)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_the_run_stops_before_the_weights_change(bad: float) -> None:
    model = Model([1.0] * 6 + [bad, 1.0])
    with pytest.raises(ValueError) as caught:
        fit(model)
    message = str(caught.value)
    assert f"The loss is {bad} at step 6 (epoch 1, batch 2, " in message
    assert "training images [20, 21, 22, 23, 24, 25, 26, 27] ...)" in message
    assert "activations overflow; lower optim.lr" in message
    assert len(model.weights) == 7 and not torch.equal(model.weights[5], model.weights[6])  # it was training
    assert torch.equal(model.head.weight, model.weights[6])
    assert model.head.weight.grad is None


def test_a_finite_loss_goes_on() -> None:
    model = Model([1.0, 1e10, -1e10] + [1.0] * 5)
    fit(model)
    assert len(model.weights) == 8


def test_cause_in_loaded_weights() -> None:
    model = Model([1.0] * 8)
    model.frozen.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"the weights that were loaded are not finite, e\.g\. frozen\.weight"):
        fit(model)


def test_cause_in_diverged_weights() -> None:
    class Diverging(Model):
        def on_train_batch_end(self, *_: Any) -> None:
            if self.global_step == 3:
                self.head.weight.data.fill_(float("inf"))

    with pytest.raises(
        ValueError, match=r"at step 3 .*diverged \(head\.weight is not finite\); lower optim\.lr \(now 1\.2"
    ):
        fit(Diverging([1.0] * 8))


# On an accelerator: losses are looked at together


def test_a_delayed_look_names_the_first_bad_step() -> None:
    model = Model([1.0] * 5 + [float("nan"), 1.0, 1.0])  # the weights are spoiled, so that steps 6 and 7 are bad too
    with pytest.raises(ValueError, match=r"The loss is nan at step 5 \(epoch 1, batch 1, training images \[10, 11, "):
        fit(model, Delayed())
    assert len(model.weights) == 8  # seen when the epoch ended


def test_a_delayed_look_comes_every_so_many_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("thaw.callbacks.finite_loss.EVERY", 3)
    model = Model([1.0] * 4 + [float("inf")] + [1.0] * 3)
    with pytest.raises(ValueError, match=r"at step 4 \(epoch 1, batch 0,"):
        fit(model, Delayed(), limit_train_batches=4)
    assert len(model.weights) == 7  # after steps 2, 3 (the end of an epoch) and 6


def test_a_delayed_look_comes_before_validation_and_checkpoint(tmp_path: Path) -> None:
    model = Model([1.0, 1.0, float("nan"), 1.0, 1.0, 1.0, 1.0, 1.0])
    saved = {"callbacks": [ModelCheckpoint(tmp_path, "{step}", save_top_k=-1)], "enable_checkpointing": True}
    with pytest.raises(ValueError, match="at step 2 "):
        fit(model, Delayed(), validate=True, val_check_interval=2, **saved)
    assert len(model.weights) == 4 and model.validated == 4  # after step 1, not after step 3
    assert [path.name for path in tmp_path.iterdir()] == ["step=2.ckpt"]


def test_delayed_finite_losses_go_on() -> None:
    model, check = Model([1.0] * 8), Delayed()
    fit(model, check, validate=True)
    assert len(model.weights) == model.validated == 8 and not check.unchecked


# What was saved before


def saving(folder: Path) -> dict[str, Any]:
    return {"callbacks": [ModelCheckpoint(folder, "last", enable_version_counter=False)], "enable_checkpointing": True}


@pytest.mark.parametrize("seconds", [None, 0.0, 1e6], ids=["Lightning's files", "written", "held back"])
def test_the_message_names_the_last_good_checkpoint(tmp_path: Path, seconds: float | None) -> None:
    plugins = [] if seconds is None else [PacedCheckpointIO(seconds)]
    with pytest.raises(ValueError) as caught:
        fit(Model([1.0] * 6 + [float("nan"), 1.0]), plugins=plugins, **saving(tmp_path))
    path = tmp_path / "last.ckpt"
    assert f"weights are in {path}; continue with resume={path} optim.lr=<less>." in str(caught.value)
    assert torch.load(path, weights_only=True)["global_step"] == 4  # there once the run has ended


def test_without_a_checkpoint_the_message_names_none(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="No checkpoint was saved before"):
        fit(Model([1.0, 1.0, float("nan"), 1.0]), **saving(tmp_path))
    assert not list(tmp_path.iterdir())


def test_weights_that_are_no_numbers_are_not_saved(tmp_path: Path) -> None:
    """The last gradient of an epoch is NaN and its loss is not."""

    class Spoiled(Model):
        def on_before_optimizer_step(self, *_: Any) -> None:
            if self.global_step == 7:
                assert self.head.weight.grad is not None
                self.head.weight.grad.fill_(float("nan"))

    path = tmp_path / "last.ckpt"
    with pytest.raises(ValueError) as caught:
        fit(Spoiled([1.0] * 8), **saving(tmp_path))
    message = str(caught.value)
    assert "The weights after step 8 are not finite and were not saved" in message and f"resume={path} " in message
    assert "training diverged (head.weight is not finite); lower optim.lr" in message
    saved = torch.load(path, weights_only=True)
    assert saved["global_step"] == 4 and all(tensor.isfinite().all() for tensor in saved["state_dict"].values())


# Whole runs

Tries = Callable[..., AbstractContextManager[Any]]
Train = Callable[..., Path]
FULL_TUNING, PROBE, PRETRAIN = "experiment=vit_finetune", "experiment=vit_linear_probe", "experiment=pretrain_"
DIVERGED = r"The (validation )?loss is -?(nan|inf)|weights after step \d+ are not finite"
DECAY = r"optim.lr times optim.weight_decay is .*, and above 1 weights grow"
# Settings, and what is said of them; None: the run ends with finite numbers.
ODD: list[tuple[str, str | None]] = [
    (f"{FULL_TUNING} optim.lr=1e6", DIVERGED),
    (f"{PROBE} optim.lr=1e6", None),
    (f"{PROBE} head=lr_bank head.lrs=[1e-3,1e308]", None),
    (f"{PROBE} head=lr_bank head.lrs=[1e38,1e200]", DIVERGED),
    (f"{FULL_TUNING} backbone.weights=NAN", "blocks.1.attn.qkv.weight holds NaN or infinity"),
    (f"{FULL_TUNING} backbone.weights=HUGE", "The validation loss is nan after step 4.*activations overflow"),
    (f"{PROBE} CONSTANT", None),
    *((f"{PROBE} optim.lr={value}", "must be a number above 0") for value in ("0", "-1", "nan", "inf")),
    (f"{FULL_TUNING} optim.weight_decay=1e6", DECAY),
    (f"{FULL_TUNING} optim.lr=1e6 trainer.precision=bf16-mixed", DIVERGED),
    (f"{FULL_TUNING} optim.lr=1e30 average=ema", DIVERGED),
    (f"{FULL_TUNING} optim=sgd optim.lr=1e6 trainer.gradient_clip_val=null", DIVERGED),
    (f"{FULL_TUNING} optim.lr=1e8 callbacks.checkpoint.monitor=val/loss callbacks.checkpoint.mode=min", DIVERGED),
    (f"{PROBE} backbone.weights=INF", "blocks.1.attn.qkv.weight holds NaN or infinity"),
    (f"{FULL_TUNING} CONSTANT augment=affine", None),
    (f"{PROBE} ONE_CLASS", None),
    (f"{PROBE} EACH_ONE data.class_weights=balanced", None),
    (f"{PROBE} data.batch_size=1", None),
    (f"{PROBE} data.batch_size=1 head.norm=batch", "has no statistics for head.norm=batch"),
    (f"{PROBE} data.train_size=65 data.batch_size=64 head.norm=batch", None),
    (f"{PROBE} data.train_size=5", "data.batch_size=16 is more than the 5 training images"),
    (f"{PROBE} trainer.limit_val_batches=0", None),
    (f"{PROBE} model.label_smoothing=1.0", None),
    (f"{FULL_TUNING} mix=mixup mix.mixup=0.0", "mix.mixup=0.0 must be a number above 0"),
    *((f"{FULL_TUNING} mix=mixup mix.mixup={alpha}", None) for alpha in ("1e-40", "1e38", "1e308")),
    (f"{PROBE} trainer.val_check_interval=5", "val_check_interval=5 is more than the 4 batches of an epoch"),
    *((f"{PRETRAIN}{name} optim.lr=1e6", DIVERGED) for name in ("mae", "simclr", "gan", "autoregressive")),
    *((f"{PRETRAIN}{name} CONSTANT data.batch_size=16", None) for name in ("mae", "simclr", "gan", "autoregressive")),
    (
        f"{PRETRAIN}simclr data.batch_size=9",
        "64 train images in batches of 9: A step on 1 image has nothing to contrast",
    ),
]


def arrays(path: Path, image: Callable[[int], np.ndarray], labels: Callable[[int], np.ndarray]) -> str:
    """The settings of a dataset of 60 training, 30 validation and 30 test images."""
    splits = {"train": 60, "val": 30, "test": 30}
    parts = {f"x_{split}": image(count) for split, count in splits.items()}
    np.savez(path, **parts, **{f"y_{split}": labels(count) for split, count in splits.items()})
    return f"data=arrays data.path={path}"


@pytest.fixture
def settings(tmp_path: Path, tiny_run: list[str]) -> Callable[[str], list[str]]:
    """The overrides of a tiny run with odd settings."""

    def random(count: int) -> np.ndarray:
        return np.random.default_rng(count).integers(0, 256, (count, 28, 28), dtype=np.uint8)

    weights = load_file(tmp_path / "tiny.safetensors")
    words = {
        "CONSTANT": arrays(
            tmp_path / "constant.npz", lambda n: np.full((n, 28, 28), 128, np.uint8), lambda n: np.arange(n) % 3
        ),
        "ONE_CLASS": arrays(tmp_path / "one_class.npz", random, lambda n: np.zeros(n, int)),
        "EACH_ONE": arrays(tmp_path / "each_one.npz", random, np.arange),
    }
    for name, value in (("NAN", float("nan")), ("INF", float("inf")), ("HUGE", 1e38)):
        weights["blocks.1.attn.qkv.weight"][0, 0] = value
        save_file(weights, tmp_path / f"{name}.safetensors")
        words[name] = str(tmp_path / f"{name}.safetensors")

    def overrides(text: str) -> list[str]:
        for word, meaning in words.items():
            text = text.replace(word, meaning)
        own = text.split()
        usual = [
            each for each in tiny_run if "data=arrays" not in own or each[:11] not in ("data.source", "data.train_")
        ]
        usual = [each for each in usual if PRETRAIN not in text or not each.startswith("backbone.weights")]
        return [own[0], *usual, "trainer.max_epochs=2", *own[1:]]

    return overrides


@needs("pretrain")
def test_odd_settings_stop_or_report_sanely(
    tries: Tries, train: Train, settings: Callable[[str], list[str]], undrawn: None, capsys: pytest.CaptureFixture[str]
) -> None:
    with tries("numbers that are not finite, and odd ones", harm="let in") as attempt:
        for number, (text, refusal) in enumerate(ODD[: sized(7, len(ODD))]):
            with attempt(text):
                name = f"run{number}"
                if refusal:
                    with pytest.raises((UserError, InstantiationException), match=refusal):
                        train(*settings(text), name=name)
                else:
                    check_finite(train(*settings(text), name=name))
                said = capsys.readouterr()
                assert "nan" not in said.out.replace("/nan", "")


def check_finite(run_dir: Path) -> None:
    """No number of a summary and a checkpoint is NaN or infinite, but for heads of a bank that were not chosen."""

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} in summary.json")

    json.loads((run_dir / "summary.json").read_text(), parse_constant=refuse)
    state = torch.load(run_dir / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    chosen = int(state.get("head.chosen", 0))
    spare = tuple(f"head.heads.{number}." for number in range(9) if number != chosen)
    assert all(tensor.isfinite().all() for name, tensor in state.items() if not name.startswith(spare))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e38])
def test_a_checkpoint_of_no_finite_answers_has_no_accuracy(
    tries: Tries, linear_probe: Path, tmp_path: Path, value: float
) -> None:
    checkpoint = read_checkpoint(linear_probe / "checkpoints" / "best.ckpt")
    checkpoint["state_dict"]["head.linear.weight"].fill_(value)
    refused = pytest.raises(UserError, match=r"means nothing|are not finite")
    with tries("numbers that are not finite, and odd ones", harm="let in") as attempt, attempt(f"{value}"), refused:
        evaluate_checkpoint(checkpoint, OmegaConf.create(checkpoint["config"]), tmp_path, [])
