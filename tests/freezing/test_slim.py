"""Checkpoints without the frozen tensors: what they lack, that nothing is lost, and what is refused."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import compose_run
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file
from torch import nn

from thaw.evaluation.evaluate import evaluate_checkpoint
from thaw.freezing.policy import Thaw
from thaw.freezing.slim import drop_frozen, fill_frozen, refer_to_frozen
from thaw.run import checkpoint as checkpoints
from thaw.run.resume import resumed_config

Train = Callable[..., Path]
pytestmark = pytest.mark.usefixtures("undrawn")


class Net(nn.Module):
    """Two layers with batch norm, a bare buffer and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Linear(2, 2), nn.BatchNorm1d(2))
        self.backbone.register_buffer("table", torch.zeros(3))
        self.head = nn.Linear(2, 2)


NEVER = float("inf")


@pytest.mark.parametrize(
    ("thaws", "expected"),
    [
        ({}, "0.weight 0.bias 1.weight 1.bias 1.running_mean 1.running_var 1.num_batches_tracked"),
        ({"backbone.1.bias": 0}, "0.weight 0.bias 1.weight"),  # its statistics move
        ({"backbone.0.weight": 3, "backbone.1.bias": 3, "backbone.1.weight": 3}, "0.bias"),
    ],
)
def test_what_never_changes(thaws: dict[str, float], expected: str) -> None:
    model = Net()
    top = ("backbone.2", "backbone.3", "head")
    everything = {name: 0 if name.startswith(top) else NEVER for name, _ in model.named_parameters()}
    assert Thaw(model, {}, everything | thaws).constant() == [f"backbone.{name}" for name in expected.split()]


def test_dropped_and_filled_again() -> None:
    model, weights = Net(), "some.safetensors"
    names = ["backbone.0.weight", "backbone.1.running_var"]
    whole = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    checkpoint: dict[str, Any] = {"state_dict": dict(whole), "epoch": 3}
    drop_frozen(checkpoint, refer_to_frozen(names, model.state_dict(), weights))
    assert checkpoint["state_dict"].keys() == whole.keys() - set(names)
    assert checkpoint["frozen"]["names"] == names and checkpoint["frozen"]["weights"] == weights
    nn.init.zeros_(model.head.weight)  # what trained may differ
    fill_frozen(checkpoint, model.state_dict())
    assert checkpoint["state_dict"].keys() == whole.keys()
    assert all(torch.equal(checkpoint["state_dict"][name], whole[name]) for name in whole)

    model.backbone[0].weight.data[0, 0] += 1e-6
    with pytest.raises(ValueError, match=r"backbone\.weights=some\.safetensors .*others \(SHA-256 \w{12} instead of"):
        fill_frozen(checkpoint, model.state_dict())
    with pytest.raises(ValueError, match=r"others \(the model has no backbone\.0\.weight\)"):
        fill_frozen(checkpoint, {})
    complete = {"state_dict": {}}
    fill_frozen(complete, {})
    assert complete == {"state_dict": {}}


# Whole runs


def states(run_dir: Path, name: str = "best") -> dict[str, Any]:
    return checkpoints.read_checkpoint(run_dir / "checkpoints" / f"{name}.ckpt")


def logits(checkpoint: dict[str, Any]) -> torch.Tensor:
    images = torch.arange(8 * 28 * 28).reshape(8, 1, 28, 28).to(torch.uint8)
    with torch.no_grad():
        return checkpoints.load_model(checkpoint)(images)


def test_a_linear_probe_holds_its_head_and_a_reference(train: Train, tiny_run: list[str], tmp_path: Path) -> None:
    run = [*tiny_run, "freeze=linear_probe", "trainer.max_epochs=2"]
    slim = train(*run, name="slim")
    checkpoint = states(slim)
    assert {name for name in checkpoint["state_dict"] if name.startswith("backbone")} == set()
    assert "head.linear.weight" in checkpoint["state_dict"]
    whole = train(*run, "test=false", "model.self_contained=true", name="whole")
    assert "frozen" not in states(whole) and len(states(whole)["state_dict"]) > 40
    sizes = [(run_dir / "checkpoints" / "best.ckpt").stat().st_size for run_dir in (slim, whole)]
    assert sizes[0] < 30_000 < 150_000 < sizes[1]
    assert torch.equal(logits(states(slim)), logits(states(whole)))

    summary = json.loads((slim / "summary.json").read_text())
    results = evaluate_checkpoint(states(slim), OmegaConf.create(states(slim)["config"]), tmp_path / "eval", loggers=[])
    assert results["test/acc"] == summary["test/acc"] and results["n_test"] == summary["n_test"] == 500

    resumed = train(f"resume={slim}", "trainer.max_epochs=3", "test=false", name="longer")  # its own policy continues
    assert states(resumed, "last")["epoch"] == 2

    with pytest.raises(ValueError) as refused:
        train(f"resume={slim}", "freeze=full", name="other")
    path = slim / "checkpoints" / "last.ckpt"
    assert f"{path} was trained under another freezing policy than freeze=full says" in str(refused.value)
    assert f"start_from={path} instead of resume=" in str(refused.value)

    weights = tmp_path / "tiny.safetensors"
    right = load_file(weights)
    save_file({name: tensor + 1e-6 for name, tensor in right.items()}, weights)
    with pytest.raises(ValueError, match=rf"refers to backbone\.weights={re.escape(weights.name)} .*others \(SHA-256"):
        logits(states(slim))
    logits(states(whole))  # needs no file
    moved = tmp_path / "moved.safetensors"
    save_file(right, moved)
    checkpoint = states(slim)
    checkpoint["config"]["backbone"]["weights"] = str(moved)  # what eval.py weights=<file> does
    assert torch.equal(logits(checkpoint), logits(states(whole)))


@pytest.mark.parametrize(
    "name",
    [
        "lora",
        "last_blocks",
        "norm_only",
        "gradual",
        pytest.param("ssf", marks=pytest.mark.long),
        pytest.param("adapter", marks=pytest.mark.long),
    ],
)
def test_a_checkpoint_lacks_what_never_trains(train: Train, tiny_run: list[str], name: str) -> None:
    run_dir = train(*tiny_run, f"freeze={name}", "trainer.max_epochs=1", "test=false")
    checkpoint = states(run_dir)
    model = checkpoints.load_model(checkpoints.read_checkpoint(run_dir / "checkpoints" / "best.ckpt"))
    thaws = model.thaw.epochs
    never = {parameter for parameter, epoch in thaws.items() if epoch == NEVER}
    assert model.state_dict().keys() - checkpoint["state_dict"].keys() == never
    assert checkpoint["frozen"]["names"] == [key for key in model.state_dict() if key in never]


def start_from(train: Train, run: list[str], source: Path, freeze: str) -> torch.Tensor:
    """Logits of a run that starts from another and learns nothing."""
    still = ["optim=sgd", "optim.lr=1e-30", "optim.weight_decay=0", "trainer.max_epochs=1", "test=false"]
    started = train(*run, f"freeze={freeze}", f"start_from={source}", *still, name=f"{source.name} to {freeze}")
    assert "frozen" not in states(started)
    return logits(states(started))


def test_start_from(train: Train, tiny_run: list[str]) -> None:
    """Plain from plain, plain and LoRA from SSF: the logits are the source's."""
    run = [*tiny_run, "test=false"]
    for name, policies in (("last_blocks", ("gradual",)), ("ssf", ("linear_probe", "lora"))):
        source = train(*run, f"freeze={name}", "trainer.max_epochs=1", "optim.lr=0.01", name=name)
        expected = logits(states(source))
        for freeze in policies:
            got = start_from(train, run, source, freeze)
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6, msg=f"{name} -> {freeze}")
    with pytest.raises(
        ValueError, match=r"start_from=.*best.ckpt holds another model \(\d+ of \d+ tensors differ, e\.g\."
    ):
        train(*run, "head=mlp", f"start_from={source}", name="other head")
    with pytest.raises(
        ValueError, match=r"start_from=.* holds another model \(\d+ of \d+ tensors differ, e\.g\. backbone"
    ):
        train(
            *run, "backbone.weights=none", "freeze=full", "backbone.arguments.depth=2", f"start_from={source}", name="x"
        )


@pytest.mark.long
def test_start_from_what_cannot_be_merged(train: Train, tiny_run: list[str]) -> None:
    source = train(*tiny_run, "test=false", "freeze=prompt", "trainer.max_epochs=1", "optim.lr=0.01", name="prompt")
    torch.testing.assert_close(start_from(train, tiny_run, source, "prompt"), logits(states(source)))
    with pytest.raises(ValueError, match=r"prompt\.tokens and 2 more, which cannot be merged .* policy that it was"):
        start_from(train, tiny_run, source, "full")


def test_a_run_that_was_started_from_another_resumes(train: Train, tiny_run: list[str]) -> None:
    """Its backbone's weights are those of its checkpoint, wherever its architecture's came from."""
    run = [*tiny_run, "test=false", "trainer.max_epochs=1"]
    source = train(*run, "backbone.weights=none", "freeze=full", name="source")
    started = train(*run, "freeze=linear_probe", f"start_from={source}", name="started")
    assert json.loads((started / "summary.json").read_text())["weights"] == "none", "the file's weights are gone"
    resumed = train(f"resume={started}", "trainer.max_epochs=2", name="resumed")
    frozen = {name: tensor for name, tensor in states(source)["state_dict"].items() if name.startswith("backbone")}
    for name, tensor in frozen.items():
        assert torch.equal(states(resumed, "last")["state_dict"][name], tensor), name


def test_another_policy_of_the_same_name_is_refused(train: Train, tiny_run: list[str], tmp_path: Path) -> None:
    typed = ["freeze=gradual", "trainer.max_epochs=1"]
    run_dir = train(*tiny_run, *typed, "test=false")
    same = [f"resume={run_dir}", "freeze=gradual"]
    assert resumed_config(compose_run(tmp_path / "same", *same), same).freeze.epochs == 1
    other = [*same, "freeze.epochs=2"]
    with pytest.raises(ValueError, match="another freezing policy"):
        resumed_config(compose_run(tmp_path / "other", *other), other)
