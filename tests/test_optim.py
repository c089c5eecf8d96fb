"""Parameter groups and the learning-rate schedule against numbers worked out by hand and torch's own cosine."""

import math
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from small_models import COSINE
from torch import nn

from thaw.classifier import Classifier
from thaw.data.module import Batch
from thaw.freezing.table import layer_table
from thaw.lr_bank import BankRecipe, LRBank
from thaw.optim import OptimizerRecipe
from thaw.run.console import as_text
from thaw.run.values import check_types

CONFIGS = Path(__file__).parents[1] / "configs" / "optim"
SHAPES = {
    "cls_token": (1, 1, 4),
    "pos_embed": (1, 5, 4),
    "patch_embed.weight": (4, 1, 2, 2),
    "blocks.0.attn.weight": (4, 4),
    "blocks.0.attn.bias": (4,),
    "blocks.0.relative_position_bias_table": (9, 2),
    "blocks.1.norm.weight": (4,),
    "head.weight": (10, 4),
    "head.bias": (10,),
}
DEPTHS = dict(zip(SHAPES, (0, 0, 0, 1, 1, 1, 2, 3, 3), strict=True))
DECAY = {"patch_embed.weight", "blocks.0.attn.weight", "head.weight"}


def recipe(**changes: Any) -> OptimizerRecipe:
    settings: dict[str, Any] = {
        "lr": 1.0,
        "weight_decay": 0.1,
        "layer_decay": 0.5,
        "warmup_fraction": 0.2,
        "final_lr_fraction": 0.1,
    }
    settings["lr_scaling"] = "none"
    return OptimizerRecipe(torch.optim.SGD, **(settings | COSINE | changes))


def training(total_steps: float, ranks: int = 1, accumulated: int = 1) -> Any:
    """What a recipe asks a trainer of one epoch."""
    return SimpleNamespace(
        **{"estimated_stepping_batches": total_steps, "num_training_batches": total_steps * accumulated},
        **{"accumulate_grad_batches": accumulated, "world_size": ranks, "is_global_zero": True},
    )


def parameters() -> dict[str, nn.Parameter]:
    return {name: nn.Parameter(torch.zeros(shape)) for name, shape in SHAPES.items()}


# Groups


def test_groups_by_depth_and_decay() -> None:
    named = parameters()
    groups = recipe().groups(named.items(), DEPTHS, {})
    settings = {id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    expected_lr = {0: 0.125, 1: 0.25, 2: 0.5, 3: 1.0}  # lr * layer_decay ** (3 - depth)
    for name, parameter in named.items():
        assert settings[id(parameter)] == (expected_lr[DEPTHS[name]], 0.1 if name in DECAY else 0.0), name


@pytest.mark.parametrize("frozen", [set(), {"cls_token", "pos_embed", "blocks.0.attn.weight"}])
def test_what_will_ever_train_once_and_nothing_else(frozen: set[str]) -> None:
    named = parameters()
    thaws: dict[str, float] = {name: number for number, name in enumerate(named)} | dict.fromkeys(frozen, math.inf)
    grouped = [id(p) for group in recipe().groups(named.items(), DEPTHS, thaws) for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for name, p in named.items() if name not in frozen)


def test_groups_by_thaw_epoch() -> None:
    named = parameters()
    thaws = {name: 2 * (depth < 2) for name, depth in DEPTHS.items()}
    groups = recipe().groups(named.items(), DEPTHS, thaws)
    epochs = {id(p): group["from_epoch"] for group in groups for p in group["params"]}
    assert {name: epochs[id(parameter)] for name, parameter in named.items()} == thaws
    assert len({group["name"] for group in groups}) == len(groups)  # the learning-rate monitor needs names of their own


# Schedule


def test_schedule_against_hand_numbers() -> None:
    fractions = [recipe().lr_fraction(step, total_steps=10, thaw_step=0) for step in range(11)]
    assert fractions[:3] == pytest.approx([1 / 3, 2 / 3, 1])  # two steps of warmup, then the peak
    assert fractions[6] == pytest.approx(0.55)  # half way down from 1 to 0.1
    assert fractions[10] == pytest.approx(0.1)
    assert fractions[2:] == sorted(fractions[2:], reverse=True)
    flat = recipe(warmup_fraction=0.0, final_lr_fraction=1.0)
    assert [flat.lr_fraction(step, 10, 0) for step in range(12)] == [1.0] * 12


def test_every_groups_lr_follows_warmup_and_torchs_cosine() -> None:
    built = recipe().build(parameters().items(), DEPTHS, {}, training(10))
    optimizer, scheduler = built["optimizer"], built["lr_scheduler"]["scheduler"]
    peaks = [group["initial_lr"] for group in optimizer.param_groups]
    assert sorted(set(peaks)) == [0.125, 0.25, 0.5, 1.0]
    other = torch.optim.SGD([{"params": [nn.Parameter(torch.zeros(1))], "lr": 1.0}])
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(other, T_max=8, eta_min=0.1)
    for step in range(10):
        fraction = (step + 1) / 3 if step < 2 else other.param_groups[0]["lr"]
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([fraction * peak for peak in peaks])
        optimizer.step()
        scheduler.step()
        if step >= 2:
            other.step()
            cosine.step()


def test_a_late_group_rises_to_the_common_cosine() -> None:
    """Two steps of warmup, twelve in all, three an epoch: what thaws in epoch 1 or 2 starts at step 3 or 6."""
    groups = [[late(step) for step in range(12)] for late in map(late_fraction, (0, 3, 6))]
    cosine = [0.1 + 0.9 * (1 + math.cos(math.pi * (step - 2) / 10)) / 2 for step in range(12)]
    assert groups[0] == pytest.approx([1 / 3, 2 / 3, *cosine[2:]])
    assert groups[1] == pytest.approx([0, 0, 0, cosine[3] / 3, cosine[4] * 2 / 3, *cosine[5:]])
    assert groups[2] == pytest.approx([0] * 6 + [cosine[6] / 3, cosine[7] * 2 / 3, *cosine[8:]])


def late_fraction(thaw_step: int) -> Callable[[int], float]:
    return lambda step: recipe(warmup_fraction=1 / 6).lr_fraction(step, 12, thaw_step)


class Rates(L.Callback):
    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_before_optimizer_step(self, _trainer: L.Trainer, _module: L.LightningModule, optimizer: Any) -> None:
        self.seen.append(max(group["lr"] for group in optimizer.param_groups))


def test_lightning_steps_the_schedule_per_batch(
    classifier: Callable[..., Classifier], batch: Batch, fit: Callable
) -> None:
    rates = Rates()
    optim = {"lr": 0.01, "warmup_fraction": 0.5, "final_lr_fraction": 0.0}
    fit(classifier(optim=optim), [batch, batch], epochs=2, callbacks=[rates])
    assert rates.seen == pytest.approx([0.01 / 3, 0.02 / 3, 0.01, 0.005])


def test_a_schedule_without_end_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"set trainer\.max_epochs to a number"):
        recipe().build(parameters().items(), DEPTHS, {}, training(float("inf")))


# Larger steps


@pytest.mark.parametrize(("rule", "scale"), [("none", 1.0), ("linear", 6.0), ("sqrt", math.sqrt(6))])
def test_scaling_by_processes_and_accumulated_batches(
    rule: str, scale: float, capsys: pytest.CaptureFixture[str]
) -> None:
    """3 processes that accumulate 2 batches each: a step is on 6 batches."""
    named = parameters()
    built = recipe(lr_scaling=rule).build(named.items(), DEPTHS, {}, training(10, ranks=3, accumulated=2))
    peaks = {id(p): group["initial_lr"] for group in built["optimizer"].param_groups for p in group["params"]}
    for name, parameter in named.items():
        assert peaks[id(parameter)] == pytest.approx(scale * 0.5 ** (3 - DEPTHS[name])), name
    assert ("times" in capsys.readouterr().out) == (rule != "none")


def test_one_process_and_one_batch_scale_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    built = recipe(lr_scaling="linear").build(parameters().items(), DEPTHS, {}, training(10))
    assert max(group["initial_lr"] for group in built["optimizer"].param_groups) == 1.0
    assert not capsys.readouterr().out


def test_linear_scaling_of_sgd_is_the_sum_of_gradients(
    classifier: Callable[..., Classifier], batch: Batch, fit: Callable
) -> None:
    """Without momentum, two batches accumulated at twice the rate are one batch of both at twice the rate."""

    def trained(batches: list[Batch], lr: float, rule: str, **changes: Any) -> dict[str, torch.Tensor]:
        model = classifier("full", optim={"lr": lr, "final_lr_fraction": 1.0, "lr_scaling": rule})
        model.optim.optimizer = torch.optim.SGD
        fit(model, batches, **changes)
        return model.state_dict()

    halves = [Batch(batch.images[part], batch.labels[part], batch.indices[part]) for part in (range(8), range(8, 16))]
    scaled = trained(halves, 0.01, "linear", accumulate_grad_batches=2)
    whole = trained([batch], 0.02, "none")
    untouched = trained(halves, 0.01, "none", accumulate_grad_batches=2)
    for name, tensor in whole.items():
        torch.testing.assert_close(scaled[name], tensor, rtol=1e-4, atol=1e-6, msg=name)
    assert not torch.allclose(untouched["head.linear.bias"], whole["head.linear.bias"], rtol=1e-3)


def test_the_table_shows_scaled_rates(classifier: Callable[..., Classifier], batch: Batch, fit: Callable) -> None:
    model = classifier("full", optim={"lr": 0.01, "lr_scaling": "linear"})
    trainer = fit(model, [batch] * 2, accumulate_grad_batches=2)
    assert "2.00e-02" in as_text(layer_table(model, model.depths(), trainer.optimizers[0].param_groups, epoch=0))


def test_every_head_of_a_bank_is_scaled() -> None:
    bank = LRBank(4, 10, norm="none", lrs=[0.1, 0.2], weight_decays=[0.0])
    named = {f"head.{name}": parameter for name, parameter in bank.named_parameters()}
    built = BankRecipe(recipe(lr_scaling="linear"), bank).build(
        named.items(), dict.fromkeys(named, 0), {}, training(10, ranks=2)
    )
    assert {group["initial_lr"] for group in built["optimizer"].param_groups} == {0.2, 0.4}


# Settings


@pytest.mark.parametrize(
    ("name", "values", "allowed"),
    [
        ("lr", [0, -1e-3, float("inf"), float("nan")], "a number above 0"),
        ("weight_decay", [-0.1, float("inf"), float("nan")], "a number, 0 or more"),
        ("layer_decay", [0, 1.1, float("nan")], "a number above 0 and at most 1"),
        ("warmup_fraction", [-0.1, 1.0, float("nan")], "a number, 0 or more and below 1"),
        ("final_lr_fraction", [-0.1, 1.1, float("nan")], "a number from 0 to 1"),
        ("lr_scaling", ["cubic"], "none, linear or sqrt"),
    ],
)
def test_numbers_out_of_range(name: str, values: list[Any], allowed: str) -> None:
    for value in values:
        block = OmegaConf.create({"_target_": "thaw.optim.OptimizerRecipe", name: value})
        with pytest.raises(ValueError, match=re.escape(f"optim.{name}={value!r} must be {allowed}.")):
            check_types(block, "optim.")


def test_all_wrong_numbers_are_named_at_once() -> None:
    block = OmegaConf.create({"_target_": "thaw.optim.OptimizerRecipe", "lr": 0, "layer_decay": 2})
    with pytest.raises(ValueError, match=r"optim\.lr=0 .*\. optim\.layer_decay=2 "):
        check_types(block, "optim.")


@pytest.mark.parametrize(
    ("config", "kind", "settings"),
    [
        ("adamw", torch.optim.AdamW, {"betas": (0.9, 0.999), "fused": True}),
        ("sgd", torch.optim.SGD, {"momentum": 0.9, "nesterov": True, "fused": True}),
    ],
)
def test_shipped_recipes(config: str, kind: type, settings: dict, tmp_path: Path) -> None:
    built = instantiate(OmegaConf.load(CONFIGS / f"{config}.yaml"))
    optimizer = built.build(parameters().items(), DEPTHS, {}, training(10))["optimizer"]
    assert type(optimizer) is kind
    for group in optimizer.param_groups:
        assert {key: group[key] for key in settings} == settings
        assert group["initial_lr"] == built.lr
        assert group["weight_decay"] in (0.0, built.weight_decay)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    assert torch.load(tmp_path / "optimizer.pt", weights_only=True) == optimizer.state_dict()  # plain numbers only


def test_sgd_step_by_hand() -> None:
    weight = nn.Parameter(torch.tensor([[2.0]]))
    settings = {"lr": 0.1, "weight_decay": 0.5, "layer_decay": 1.0, "warmup_fraction": 0.0, "final_lr_fraction": 0.0}
    settings |= {"lr_scaling": "none"} | COSINE
    built = OptimizerRecipe(partial(torch.optim.SGD, momentum=0.9), **settings).build(
        {"w": weight}.items(), {"w": 0}, {}, training(2)
    )
    for expected in (2 - 0.1 * (3 + 0.5 * 2), 1.6 - 0.05 * (0.9 * 4 + 3 + 0.5 * 1.6)):  # lr 0.1, then half of it
        weight.grad = torch.tensor([[3.0]])
        built["optimizer"].step()
        built["lr_scheduler"]["scheduler"].step()
        assert weight.item() == pytest.approx(expected)


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
def test_fused_updates_are_clipped_as_foreach_ones(
    classifier: Callable[..., Classifier], batch: Batch, fit: Callable, kind: type
) -> None:
    """Lightning refuses to clip for an optimizer that unscales gradients itself, as fused ones say they do."""

    def trained(**changes: Any) -> dict[str, torch.Tensor]:
        model = classifier("last_blocks", optim={"final_lr_fraction": 1.0})
        model.optim.optimizer = partial(kind, **{name: changes.pop(name) for name in ("fused", "foreach")})
        fit(model, [batch] * 3, precision="bf16-mixed", **changes)
        return {name: tensor for name, tensor in model.named_parameters() if tensor.requires_grad}

    fused = trained(fused=True, foreach=False, gradient_clip_val=0.1)
    foreach = trained(fused=False, foreach=True, gradient_clip_val=0.1)
    unclipped = trained(fused=True, foreach=False)
    for name, tensor in fused.items():
        torch.testing.assert_close(tensor, foreach[name], rtol=1e-4, atol=1e-5, msg=name)
    assert max((tensor - unclipped[name]).abs().max() for name, tensor in fused.items()) > 1e-3
