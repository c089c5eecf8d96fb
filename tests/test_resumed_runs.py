"""A resumed run equals one that was never interrupted, to the last bit."""

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, compose_run
from torch import Tensor

from thaw.classifier import Classifier

Train = Callable[..., Path]
pytestmark = pytest.mark.usefixtures("undrawn")

# A checkpoint in the middle and at the end of each epoch of 4 steps.
EVERY = ["trainer.val_check_interval=0.5", "callbacks.last_checkpoint.filename='{step}'"]
EVERY += ["callbacks.last_checkpoint.save_top_k=-1", "trainer.plugins.0.seconds=0"]
PARTS = (
    "epoch",
    "global_step",
    "state_dict",
    "current_weights",
    "frozen",
    "heads",
    "optimizer_states",
    "lr_schedulers",
)
RANDOM = ["augment=affine", "backbone.arguments.drop_path_rate=0.2", "model.label_smoothing=0.1"]
LAST = ["freeze=last_blocks", "freeze.k=1"]
# What is trained for how many epochs, and after which steps it is resumed.
CASES: dict[str, tuple[list[str], int, list[int]]] = {
    path.stem: ([f"freeze={path.stem}"], 2, [2]) for path in sorted((ROOT / "configs" / "freeze").glob("*.yaml"))
}
CASES |= {  # before, at and after a thaw; the last epoch trains everything
    "gradual": (["freeze=gradual", *RANDOM], 5, [2, 4, 6, 14, 18]),
    "lp_ft": (["freeze=lp_ft", *RANDOM], 5, [8, 10, 12, 14]),
    "random images": ([*LAST, *RANDOM], 3, [4, 6]),
    "cached features": ([*LAST, "backbone.arguments.drop_path_rate=0.2"], 3, [4, 6]),
    "EMA on cached features": (["head.norm=batch", "average=ema", "model.label_smoothing=0.1"], 2, [2, 6]),
    "EMA and mixing": ([*LAST, "average=ema", "mix=both", *RANDOM[1:]], 2, [2, 6]),
    **{  # before and after a thaw, with gradients of two batches
        name: (
            [f"optim={name}", "freeze=lp_ft", "freeze.probe_epochs=1", "trainer.accumulate_grad_batches=2"],
            2,
            [1, 3],
        )
        for name in ("adopt", "kron", "lion", "muon", "schedulefree")
    },
    "lr_bank": (["head=lr_bank", "head.lrs=[1e-4,1e-2,1e-1]", "head.weight_decays=[0.0,1e-2]"], 2, [6]),
}
ONE_OPTIMIZER = ("pretrain_autoregressive", "pretrain_mae")  # and one view of an image, as in fine-tuning
OBJECTIVES = sorted(path.stem for path in (ROOT / "configs" / "experiment").glob("pretrain_*.yaml"))


def checkpoint(run_dir: Path, name: str = "last") -> dict[str, Any]:
    return torch.load(run_dir / "checkpoints" / f"{name}.ckpt", weights_only=True)


def assert_same(expected: Any, got: Any, place: str) -> None:
    """Equal to the last bit, tensors in nested containers too."""
    assert type(expected) is type(got), place
    if isinstance(expected, dict):
        assert expected.keys() == got.keys(), place
        for key in expected:
            assert_same(expected[key], got[key], f"{place}.{key}")
    elif isinstance(expected, list):
        assert len(expected) == len(got), place
        for number, (one, other) in enumerate(zip(expected, got, strict=True)):
            assert_same(one, other, f"{place}[{number}]")
    elif isinstance(expected, Tensor):
        assert torch.equal(expected, got), place
    else:
        assert expected == got, place


def assert_same_training(expected: dict[str, Any], got: dict[str, Any], place: str) -> None:
    for part in PARTS:
        assert_same(expected.get(part), got.get(part), f"{place}: {part}")


# What trains by rules or additions, or optimizers, like those of another policy.
LIKE_OTHERS = ["adapter", "attention_out", "dora", "lp_ft", "prompt", "ssf", "surgical"]
LIKE_OTHERS += ["adopt", "kron", "lion", "muon"]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.long) if name in LIKE_OTHERS else name for name in CASES]
)
def test_from_any_step(train: Train, tiny_run: list[str], tmp_path: Path, name: str) -> None:
    if name == "kron":
        pytest.importorskip("opt_einsum")
    settings, epochs, steps = CASES[name]
    run = [*tiny_run, *EVERY, *settings, f"trainer.max_epochs={epochs}", "test=false"]
    whole = train(*run, name="whole")
    steps_per_epoch = 2 if "trainer.accumulate_grad_batches=2" in settings else 4
    last, best = f"step={steps_per_epoch * epochs}", checkpoint(whole, "best")
    for step in steps:
        for path in (tmp_path / "cache").glob("*"):
            path.unlink()
        resumed = train(f"resume='{whole}/checkpoints/step={step}.ckpt'", name=f"from {step}")
        assert_same_training(checkpoint(whole, last), checkpoint(resumed, last), f"{name} from {step}")
        if best["global_step"] > step:
            assert_same_training(best, checkpoint(resumed, "best"), f"{name}, best, from {step}")
    if "average" in str(settings) or name == "schedulefree":
        end = checkpoint(whole, last)
        averaged, current = (end[key]["head.linear.weight"] for key in ("state_dict", "current_weights"))
        assert not torch.equal(averaged, current)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.long) if name in ONE_OPTIMIZER else name for name in OBJECTIVES]
)
def test_pretraining(train: Train, tiny_run: list[str], name: str) -> None:
    """In bf16."""
    run = [f"experiment={name}", *tiny_run, "trainer.precision=bf16-mixed", "trainer.limit_val_batches=1"]
    run += [*EVERY[1:], "trainer.max_epochs=2", "data.eval_batch_size=16", "backbone.weights=none"]
    run += ["model.width=32", "model.samples=50"] if name == "pretrain_gan" else []
    whole = train(*run, name="whole")
    resumed = train(f"resume='{whole}/checkpoints/step=4.ckpt'", name="resumed")
    assert_same_training(checkpoint(whole, "step=8"), checkpoint(resumed, "step=8"), name)
    assert (whole / "backbone.safetensors").read_bytes() == (resumed / "backbone.safetensors").read_bytes()


@pytest.mark.long
def test_pseudo_labels(train: Train, tiny_run: list[str]) -> None:
    """From within each of two rounds, and from the end of the first."""
    run = [*tiny_run, "experiment=few_labels_finetune", "data.train_size=null", "data.batch_size=1125", "test=false"]
    run += ["+callbacks.last_checkpoint.every_n_train_steps=1", *EVERY[1:], "trainer.max_epochs=2"]
    whole = train(*run, name="whole")
    for step in (2, 4, 6):
        resumed = train(f"resume='{whole}/checkpoints/step={step}.ckpt'", name=f"from {step}")
        assert_same_training(checkpoint(whole, "step=8"), checkpoint(resumed, "step=8"), f"from {step}")
        (own, theirs) = (checkpoint(each, "step=8")["callbacks"]["PseudoLabels"] for each in (whole, resumed))
        assert_same(own, theirs, f"labels from {step}")
    first, second = (checkpoint(whole, f"step={step}")["callbacks"]["PseudoLabels"] for step in (3, 8))
    assert len(first["chosen"]) == 3825 and len(second["chosen"]) == 4275
    assert not torch.equal(first["labels"], second["labels"])


SPEED = ("train/images_per_second", "train/share_of_peak")


def rows(run_dir: Path) -> list[dict[str, str]]:
    """Of the metrics, without the speed."""
    with (run_dir / "csv" / "metrics.csv").open() as file:
        found = list(csv.DictReader(file))
    return [{name: value for name, value in row.items() if name not in SPEED} for row in found]


@pytest.mark.parametrize(
    ("end", "interval"), [(RuntimeError("power cut"), 0.5), (KeyboardInterrupt(), 1.0)], ids=["crash", "interruption"]
)
def test_the_last_checkpoint_of_what_was_cut_off(
    train: Train,
    tiny_run: list[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    end: BaseException,
    interval: float,
) -> None:
    """The cut comes after rows of metrics and steps that no checkpoint knows of.

    What crashed is resumed by name; what was interrupted resumes by itself in its own folder, with its own metrics.
    """
    run = [*(setting for setting in tiny_run if setting not in ("logger=none", "callbacks.lr_monitor=null"))]
    run += ["logger=csv", "trainer.log_every_n_steps=1", "trainer.plugins.0.seconds=0", "trainer.max_epochs=3"]
    run += [*LAST, f"trainer.val_check_interval={interval}"]
    whole = train(*run, name="whole")
    step = Classifier.training_step

    def cut_off(self: Classifier, *args: Any) -> Tensor:
        if self.global_step == 7:
            raise end
        return step(self, *args)

    monkeypatch.setattr(Classifier, "training_step", cut_off)
    with pytest.raises(type(end)):
        train(*run, name="cut")
    monkeypatch.setattr(Classifier, "training_step", step)
    cut = whole.parent / "cut"
    assert checkpoint(cut)["global_step"] == (6 if interval == 0.5 else 4) and rows(cut)[-1]["step"] in ("6", "7")
    crashed = isinstance(end, RuntimeError)
    assert (cut / "failure.json").exists() == crashed
    if crashed:
        resumed = train(f"resume={cut}", name="resumed")
    else:
        import train as script

        script.main(compose_run(cut, f"cache.dir={tmp_path / 'cache'}", *run))
        assert rows(cut) == rows(whole)
        resumed = cut
    for name in ("last", "best"):
        assert_same_training(checkpoint(whole, name), checkpoint(resumed, name), name)
