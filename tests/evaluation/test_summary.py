"""The printed summary of runs and probes, and the numbers of parameters in it."""

import json
import mmap
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from conftest import compose_run
from hydra.utils import instantiate
from rich.console import Console

from thaw.evaluation.summary import NOT_TESTED, count_parameters, forget_peak_memory, peak_memory_gb, say_summary
from thaw.run.files import write_json

FACTS = {
    **{"test/acc": 0.99, "test/acc_low": 0.977, "test/acc_high": 0.996, "n_test": 500, "val/acc": 0.985, "epochs": 3},
    **{
        "data_source": "the bundled sample of 5,000 digits",
        "dataset": "MNIST",
        "classes": ["ant", "bee"],
        "n_train": 4000,
        "n_val": 500,
        "backbone": "vit",
        "weights": "bundled",
    },
    **{"trainable_params": 25, "total_params": 1000, "seconds": 7.25, "run_dir": "logs/runs/x"},
    **{"peak_memory_gb": 1.24, "checkpoint_mb": 0.031},
}


@pytest.fixture
def summary(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """What is printed of facts; `wandb` is the address or the commands."""

    def printed(facts: dict[str, Any], *wandb: str) -> str:
        say_summary(facts, wandb)
        return capsys.readouterr().out

    return printed


def test_says_what_a_person_wants(summary: Callable[..., str]) -> None:
    text = summary(FACTS, "wandb leet X", "wandb sync X")
    for part in (
        *("sample of 5,000 digits", "weights: bundled", "25 of 1,000 parameters (2.50%)", "99.00% accuracy"),
        *("97.70% to 99.60%", "n = 500", "logs/runs/x\n", "\nwandb leet X\nwandb sync X\n"),
        "7.2 s, at most 1.2 GB of memory, a checkpoint of 0.03 MB",
    ):
        assert part in text
    assert "2 classes, 4,000 to train" in text and "top-5" not in text
    more = summary({**FACTS, "test/top5": 0.995, "test/balanced_acc": 0.98})
    assert "97.70% to 99.60%, top-5 99.50%, balanced 98.00%, n = 500\n" in more
    assert "test" not in summary({**FACTS, **NOT_TESTED})
    assert "W&B         https://wandb.ai/x\n" in summary(FACTS, "https://wandb.ai/x")
    assert "validation  98.50% accuracy, best of 3 epochs\n" in text
    assert "best of 1 epoch\n" in summary({**FACTS, "epochs": 1})


def test_says_which_weights_were_not_chosen(summary: Callable[..., str]) -> None:
    text = summary({**FACTS, "chosen": False})
    assert text.count(", of the last step's weights") == 2 and "best of" not in text


def test_says_what_a_probe_chose(summary: Callable[..., str]) -> None:
    probe: dict[str, Any] = {
        "probe": "knn",
        "chosen": {"k": 5},
        "candidates": [{}, {}],
        "epochs": 0,
        "checkpoint_mb": None,
    }
    text = summary({**FACTS, **probe, "trainable_params": 0, "total_params": 0})
    assert "probe       knn, k = 5, the best of 2 on validation" in text and "0 of 0 parameters\n" in text
    assert "98.50% accuracy\n" in text and "n = 500\n" in text


def test_says_how_pretraining_goes_on(summary: Callable[..., str]) -> None:
    own = {"backbone_file": "a/b.safetensors", "train/loss": 0.5, "val/loss": None, "val/knn_acc": None, "epochs": 1}
    typed = {"overrides": "backbone=convnet seed=1 backbone.weights=none"}
    text = summary({**FACTS, **NOT_TESTED, **own, **typed, "val/acc": None})
    assert "loss        0.5000 in training, after 1 epoch\n" in text
    assert "\npython train.py experiment=few_labels backbone=convnet backbone.weights=a/b.safetensors\n" in text


def test_values_wrap_in_their_column_on_a_terminal(
    summary: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "thaw.run.console.stream_console", lambda _: Console(force_terminal=True, width=60, soft_wrap=True)
    )
    lines = re.sub("\x1b.*?m", "", summary({**FACTS, "run_dir": "x" * 70})).splitlines()
    assert [line.rstrip() for line in lines if len(line) > 60] == ["  run         " + "x" * 70]
    assert lines[1] == "-" * 60 and "              classes, 4,000 to train, 500 to validate" in map(str.rstrip, lines)


def test_json_is_whole_or_not_there(tmp_path: Path) -> None:
    write_json(FACTS, tmp_path / "summary.json")
    assert json.loads((tmp_path / "summary.json").read_text()) == FACTS
    with pytest.raises(TypeError):
        write_json({"x": object()}, tmp_path / "summary.json")
    assert json.loads((tmp_path / "summary.json").read_text()) == FACTS
    assert [path.name for path in tmp_path.iterdir()] == ["summary.json"]


@pytest.mark.parametrize(("epochs", "trained"), [(1, ["head."]), (2, ["head.", "blocks.2.", "fc_norm."]), (-1, [""])])
def test_what_thaws_after_the_last_epoch_does_not_count(
    tiny_run: list[str], tmp_path: Path, epochs: int, trained: list[str]
) -> None:
    """Gradual thawing: the head at first, then a block an epoch from the top."""
    cfg = compose_run(tmp_path, *tiny_run, "freeze=gradual", "backbone.fused_attention=false", "model.num_classes=10")
    model: L.LightningModule = instantiate(cfg.model)
    named = dict(model.named_parameters())
    expected = sum(p.numel() for name, p in named.items() if any(part in name for part in trained))
    assert count_parameters(model, epochs) == {
        "trainable_params": expected,
        "total_params": sum(p.numel() for p in named.values()),
    }
    assert count_parameters(model) == count_parameters(model, -1)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems cannot reset the peak")
def test_peak_memory_is_that_of_the_run_and_not_of_an_earlier_job() -> None:
    trainer: Any = SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device("cpu")))
    with mmap.mmap(-1, 160_000_000) as earlier:  # which goes back to the system, unlike a tensor's memory
        for _ in range(160):
            earlier.write(bytes(1_000_000))
        before = peak_memory_gb(trainer)
    forget_peak_memory()
    after = peak_memory_gb(trainer)
    assert before is not None and after is not None and after < before - 0.1
