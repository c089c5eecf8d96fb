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
import timm.optim
import torch
from omegaconf import OmegaConf
from small_models import COSINE
from torch import Tensor, nn

from thaw.classifier import Classifier
from thaw.data.loader import Batch
from thaw.freezing.table import layer_table
from thaw.lr_bank import BankRecipe, LRBank
from thaw.optim import OptimizerRecipe, Schedule
from thaw.run.config import build
from thaw.run.console import as_text
from thaw.run.values import check_types
from thaw.schedule_free import ScheduleFreeAdamW

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
    return OptimizerRecipe(**({"optimizer": torch.optim.SGD} | settings | COSINE | changes))


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


def test_a_resumed_schedule_keeps_its_own_rates_and_decays() -> None:
    """Also in the steps that follow: 1 / (1 + step) of its own rate, not of the rate in the checkpoint."""

    def stepped(lr: float, decay: float, steps: int) -> tuple[dict[str, Any], Schedule]:
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=lr, weight_decay=decay)
        schedule = Schedule(optimizer, [lambda step: 1 / (1 + step)])
        for _ in range(steps):
            optimizer.step()
            schedule.step()
        return optimizer.param_groups[0], schedule

    _, saved = stepped(1.0, 0.3, 3)
    group, resumed = stepped(0.1, 0.2, 0)
    for _ in range(2):  # runs may be resumed in one process
        resumed.load_state_dict(saved.state_dict())
        assert (group["lr"], group["initial_lr"], group["weight_decay"]) == (pytest.approx(0.1 / 4), 0.1, 0.2)
    resumed.optimizer.step()
    resumed.step()
    assert group["lr"] == pytest.approx(0.1 / 5)


def test_a_schedule_without_end_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"set trainer\.max_epochs to a number"):
        recipe().build(parameters().items(), DEPTHS, {}, training(float("inf")))


@pytest.mark.parametrize("schedule", ["constant", "linear", "step"])
def test_schedules_as_torchs_own(schedule: str) -> None:
    """Two steps of warmup, ten in all; a rate is multiplied by 0.1 at steps 5 and 7 (of 7.5, rounded to even: 8)."""
    ends = {"linear": 0.1}.get(schedule, 0.0)
    swept = recipe(schedule=schedule, final_lr_fraction=ends)
    other = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    schedulers = torch.optim.lr_scheduler
    scheduler = {
        "constant": lambda: schedulers.ConstantLR(other, factor=1.0),
        "linear": lambda: schedulers.LinearLR(other, start_factor=1.0, end_factor=0.1, total_iters=8),
        "step": lambda: schedulers.MultiStepLR(other, milestones=[5, 8], gamma=0.1),
    }[schedule]()
    expected = [1 / 3, 2 / 3] if schedule == "linear" else []
    while len(expected) < 10:
        rise = min(1.0, (len(expected) + 1) / 3)
        expected.append(rise * other.param_groups[0]["lr"])
        other.step()
        scheduler.step()
    assert [swept.lr_fraction(step, 10, 0) for step in range(10)] == pytest.approx(expected)
    late = [swept.lr_fraction(step, 10, 4) for step in range(10)]  # thaws at step 4: rises to the same schedule
    assert late == pytest.approx([0] * 4 + [expected[4] / 3, expected[5] * 2 / 3, *expected[6:]])


def test_a_constant_rate_needs_no_end() -> None:
    endless = SimpleNamespace(**vars(training(float("inf"))) | {"num_training_batches": 4})
    flat = {"schedule": "constant", "final_lr_fraction": 0.0}
    scheduler = recipe(**flat, warmup_fraction=0.0).build(parameters().items(), DEPTHS, {}, endless)
    assert scheduler["lr_scheduler"]["scheduler"].lr_lambdas[0](10**6) == 1.0
    for changes, named in (({"schedule": "linear"}, "schedule=linear"), (flat, r"warmup_fraction=0\.2")):
        with pytest.raises(ValueError, match=rf"optim\.{named} needs an end"):
            recipe(**changes).build(parameters().items(), DEPTHS, {}, endless)


def test_a_fraction_that_is_never_reached_is_refused() -> None:
    with pytest.raises(ValueError, match=r"optim\.final_lr_fraction=0\.1 ends .* not step; set it to 0"):
        recipe(schedule="step", final_lr_fraction=0.1)


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
        ("schedule", ["cosin"], "cosine, constant, linear or step"),
        ("step_at", [[], [1.0], [0.0], 0.5], "a list of 1 or more, each item a number above 0 and below 1"),
        ("step_factor", [0, 1.0, float("nan")], "a number above 0 and below 1"),
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
        ("muon", timm.optim.Muon, {"momentum": 0.95, "nesterov": False}),
        ("lion", timm.optim.Lion, {"betas": [0.9, 0.99]}),
        ("adopt", timm.optim.Adopt, {"betas": [0.9, 0.9999], "decoupled": True}),
        ("schedulefree", ScheduleFreeAdamW, {"betas": [0.9, 0.999]}),
    ],
)
def test_shipped_recipes(config: str, kind: type, settings: dict, tmp_path: Path) -> None:
    built = shipped(config)
    optimizer = built.build(parameters().items(), DEPTHS, {}, training(10))["optimizer"]
    assert type(optimizer) is kind
    for group in optimizer.param_groups:
        assert {key: group[key] for key in settings} == settings
        assert group["initial_lr"] == built.lr
        assert group["weight_decay"] in (0.0, built.weight_decay)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    assert torch.load(tmp_path / "optimizer.pt", weights_only=True) == optimizer.state_dict()  # plain numbers only


def shipped(name: str, **changes: Any) -> OptimizerRecipe:
    """The recipe of configs/optim/<name>.yaml, which trains at its full rate from the first step on."""
    return build(OmegaConf.load(CONFIGS / f"{name}.yaml"), warmup_fraction=0.0, **changes)


# Steps against the papers' formulas


def steps_of(name: str, number: int = 6, **changes: Any) -> tuple[dict[str, Tensor], dict[str, Any], list, Any]:
    """Weights before and after some steps at a constant rate of 0.01, the gradients of each, and the optimizer."""
    generator = torch.Generator().manual_seed(0)
    named = {key: nn.Parameter(torch.randn(shape, generator=generator)) for key, shape in SHAPES.items()}
    before = {key: parameter.detach().clone() for key, parameter in named.items()}
    built = shipped(name, lr=0.01, weight_decay=0.1, schedule="constant", **changes)
    optimizer = built.build(named.items(), DEPTHS, {}, training(number))["optimizer"]
    gradients = [{key: torch.randn(shape, generator=generator) for key, shape in SHAPES.items()} for _ in range(number)]
    for each in gradients:
        for key, parameter in named.items():
            parameter.grad = each[key].clone()
        optimizer.step()
    return before, named, gradients, optimizer


def adamw_by_hand(weight: Tensor, gradients: list[Tensor], lr: float, decay: float) -> Tensor:
    """Loshchilov & Hutter 2017, algorithm 2."""
    first = second = torch.zeros_like(weight)
    for t, gradient in enumerate(gradients, start=1):
        first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
        update = first / (1 - 0.9**t) / ((second / (1 - 0.999**t)).sqrt() + 1e-8)
        weight = weight - lr * decay * weight - lr * update
    return weight


def lion_by_hand(weight: Tensor, gradients: list[Tensor], lr: float, decay: float) -> Tensor:
    """Chen et al. 2023, algorithm 2."""
    momentum = torch.zeros_like(weight)
    for gradient in gradients:
        weight = weight - lr * ((0.9 * momentum + 0.1 * gradient).sign() + decay * weight)
        momentum = 0.99 * momentum + 0.01 * gradient
    return weight


def adopt_by_hand(weight: Tensor, gradients: list[Tensor], lr: float, decay: float) -> Tensor:
    """Taniguchi et al. 2024, algorithm 2, with decoupled weight decay; the first gradient makes no step."""
    momentum, second = torch.zeros_like(weight), gradients[0] ** 2
    for t, gradient in enumerate(gradients[1:], start=1):
        normed = (gradient / second.sqrt().clamp(min=1e-6)).clamp(-(t**0.25), t**0.25)
        momentum = 0.9 * momentum + 0.1 * normed
        weight = weight - lr * decay * weight - lr * momentum
        second = 0.9999 * second + 0.0001 * gradient**2
    return weight


def muon_by_hand(weight: Tensor, gradients: list[Tensor], lr: float, decay: float) -> Tensor:
    """Jordan et al. 2024 with the scale of Liu et al. 2025, equation 4; the exact orthogonal matrix, by an SVD."""
    momentum = torch.zeros_like(weight)
    for gradient in gradients:
        momentum = 0.95 * momentum + 0.05 * gradient
        u, _, v = torch.linalg.svd(momentum.flatten(1), full_matrices=False)
        scale = 0.2 * math.sqrt(max(momentum.flatten(1).shape))
        weight = weight - lr * decay * weight - lr * scale * (u @ v).view_as(weight)
    return weight


def schedule_free_by_hand(weight: Tensor, gradients: list[Tensor], lr: float, decay: float) -> tuple[Tensor, Tensor]:
    """Defazio et al. 2024, algorithm 1: where the next gradient is taken, and the average."""
    x, z, second, weights = weight, weight, torch.zeros_like(weight), 0.0
    for t, gradient in enumerate(gradients, start=1):
        y = 0.1 * z + 0.9 * x
        second = 0.999 * second + 0.001 * gradient**2
        rate = lr * math.sqrt(1 - 0.999**t)
        z = z - rate * gradient / (second.sqrt() + 1e-8) - rate * decay * y
        weights += rate**2
        x = (1 - rate**2 / weights) * x + rate**2 / weights * z
    return 0.1 * z + 0.9 * x, x


@pytest.mark.parametrize(
    ("name", "by_hand"), [("adamw", adamw_by_hand), ("lion", lion_by_hand), ("adopt", adopt_by_hand)]
)
def test_steps_by_hand(name: str, by_hand: Callable[..., Tensor]) -> None:
    """With layer decay; biases, norms and embeddings have no weight decay."""
    before, after, gradients, _ = steps_of(name, layer_decay=0.5)
    for key, tensor in after.items():
        lr, decay = 0.01 * 0.5 ** (3 - DEPTHS[key]), 0.1 if key in DECAY else 0.0
        expected = by_hand(before[key].double(), [each[key].double() for each in gradients], lr, decay)
        torch.testing.assert_close(tensor.detach().double(), expected, rtol=1e-5, atol=1e-6, msg=key)


def test_schedule_free_by_hand() -> None:
    before, after, gradients, optimizer = steps_of("schedulefree", layer_decay=0.5)
    for key, tensor in after.items():
        lr, decay = 0.01 * 0.5 ** (3 - DEPTHS[key]), 0.1 if key in DECAY else 0.0
        y, x = schedule_free_by_hand(before[key].double(), [each[key].double() for each in gradients], lr, decay)
        torch.testing.assert_close(tensor.detach().double(), y, rtol=1e-5, atol=1e-6, msg=key)
        torch.testing.assert_close(optimizer.averages()[tensor].double(), x, rtol=1e-5, atol=1e-6, msg=key)


def test_muon_updates_hidden_matrices_and_adamw_the_others() -> None:
    """Newton-Schulz steps in bf16 make singular values of about 1, so that Muon's update is nearly the exact one."""
    before, after, gradients, _ = steps_of("muon", layer_decay=0.5)
    hidden = {"blocks.0.attn.weight"}  # of one channel, patch_embed.weight is no matrix to timm's Muon
    for key, tensor in after.items():
        lr, decay = 0.01 * 0.5 ** (3 - DEPTHS[key]), 0.1 if key in DECAY else 0.0
        weight, all_of = before[key].double(), [each[key].double() for each in gradients]
        if key in hidden:
            expected = muon_by_hand(weight, all_of, lr, decay)
            error = (tensor.detach().double() - expected).norm() / (expected - weight).norm()
            assert error < 0.4, key
            assert (adamw_by_hand(weight, all_of, lr, decay) - expected).norm() / (expected - weight).norm() > 0.6, key
        else:
            expected = adamw_by_hand(weight, all_of, lr, decay)
            torch.testing.assert_close(tensor.detach().double(), expected, rtol=1e-5, atol=1e-6, msg=key)


def test_muon_says_when_it_has_no_matrix(capsys: pytest.CaptureFixture[str]) -> None:
    never = {name: 0 if name.startswith("head") else math.inf for name in SHAPES}
    shipped("muon").build(parameters().items(), DEPTHS, never, training(10))
    assert "no matrix below the head trains, so that AdamW" in capsys.readouterr().out


@pytest.mark.parametrize("name", sorted(path.stem for path in CONFIGS.glob("*.yaml")))
def test_what_is_frozen_for_now_is_left_alone(name: str) -> None:
    """It has no gradient: no step, no decay and no state; its first step comes when it thaws."""
    if name == "kron":
        pytest.importorskip("opt_einsum")
    named = {key: nn.Parameter(torch.ones(shape)) for key, shape in SHAPES.items()}
    thaws = {key: 1 if key.startswith("blocks") else 0 for key in SHAPES}
    built = shipped(name).build(named.items(), DEPTHS, thaws, training(4))
    optimizer, scheduler = built["optimizer"], built["lr_scheduler"]["scheduler"]
    for _ in range(2):
        for key, parameter in named.items():
            parameter.grad = None if thaws[key] else torch.full_like(parameter, 0.1)
        optimizer.step()
        scheduler.step()
    for key, parameter in named.items():
        assert (torch.equal(parameter, torch.ones_like(parameter)) and not optimizer.state.get(parameter)) == thaws[key]


def test_schedule_free_refuses_a_schedule() -> None:
    with pytest.raises(ValueError, match=r"optim\.schedule=cosine lowers it; set optim\.schedule=constant"):
        recipe(optimizer=partial(ScheduleFreeAdamW, betas=[0.9, 0.99], eps=1e-8), final_lr_fraction=0.0)
    with pytest.raises(ValueError, match=r"betas=\[0, 0\.9\] must be two numbers"):
        ScheduleFreeAdamW([], lr=1.0, weight_decay=0.0, betas=[0, 0.9], eps=1e-8)


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
