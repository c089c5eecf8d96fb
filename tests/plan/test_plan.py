"""Plans against timm's parameters, FLOPs worked out by hand, and what real steps on a CPU hold and save."""

import gc
import json
import mmap
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from hydra.utils import instantiate
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.flop_counter import FlopCounterMode

from thaw.data.loader import Batch
from thaw.plan.__main__ import main, make_plans
from thaw.plan.costs import Plan, cache_line, fitted_tables, memory_cells, plan_devices, work_cells
from thaw.plan.dry_step import CONVOLUTION, Step, dry_step
from thaw.plan.settings import compose_run, read_arguments
from thaw.run.command import clear_errors
from thaw.run.console import as_text

pytestmark = pytest.mark.filterwarnings("ignore:You are trying to `self.log")  # real steps without a trainer

WIDTH, DEPTH, TOKENS, PATCH, BATCH = 32, 3, 16, 7, 64
TINY = [f"backbone.arguments.depth={DEPTH}", f"+backbone.arguments.embed_dim={WIDTH}"]
TINY += ["+backbone.arguments.num_heads=2", "backbone.fused_attention=false"]
PARTS = [3 * WIDTH * WIDTH, WIDTH * WIDTH, 8 * WIDTH * WIDTH]  # qkv, proj, the two layers of the MLP
BLOCK = 2 * TOKENS * sum(PARTS) + 2 * 2 * TOKENS * TOKENS * WIDTH  # and q k^T, attention times v
STEM, HEAD = 2 * TOKENS * PATCH * PATCH * WIDTH, 2 * WIDTH * 10


def tiny_config(policy: str, *overrides: str, **settings: Any) -> Any:
    arguments = [f"{key}={value}" for key, value in ({"batch_size": BATCH} | settings).items()]
    found, extra = read_arguments([*arguments, *TINY, *overrides])
    return compose_run(found, "digits_vit", policy, extra)


@cache
def tiny_step(policy: str, *overrides: str, **settings: Any) -> Step:
    return dry_step(tiny_config(policy, *overrides, **settings), "cpu")


def real(cfg: Any) -> tuple[Any, Any, Callable[[], torch.Tensor]]:
    """A model with numbers, its optimizer, and its forward pass on a batch."""
    cfg = cfg.copy()
    cfg.backbone.weights = "none"
    model = instantiate(cfg.model)
    model.backbone.fresh = frozenset()
    model.thaw.apply(0)
    depths = model.depths()
    groups = model.optim.groups(model.named_parameters(), depths, model.thaw.epochs)
    optimizer = model.optim.optimizer(groups, lr=1e-3, weight_decay=0.0)
    images = torch.randint(0, 255, (BATCH, 1, 28, 28), dtype=torch.uint8)
    batch = Batch(images, torch.arange(BATCH) % 10, torch.arange(BATCH))

    def forward() -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=cfg.trainer.precision == "bf16-mixed"):
            return model.training_step(batch, 0)

    return model, optimizer, forward


# One step


@pytest.mark.parametrize("name", ["vit_small_patch14_dinov2", pytest.param("convnext_atto", marks=pytest.mark.long)])
def test_parameters_are_those_of_timm(name: str) -> None:
    _, (plan,) = make_plans([f"model={name}", "policy=full", "batch_size=2"])
    size = {} if name == "convnext_atto" else {"img_size": 224}
    with torch.device("meta"):
        backbone = timm.create_model(name, num_classes=0, **size)
    expected = sum(p.numel() for p in backbone.parameters()) + 10 * backbone.num_features + 10
    assert plan.step.parameters == plan.step.trained == expected


def test_flops_by_hand() -> None:
    step = tiny_step("full")
    assert (step.cut, step.num_tokens, step.frozen_flops) == (0, TOKENS, 0)
    assert step.forward_flops == STEM + DEPTH * BLOCK + HEAD
    assert step.backward_flops == 2 * step.forward_flops - STEM  # images need no gradient


def test_no_weak_reference_is_freed_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which would corrupt the heap, and crash the process some time later."""
    alive: Counter[int] = Counter()
    init, delete = StorageWeakRef.__init__, StorageWeakRef.__del__

    def counted_init(self: StorageWeakRef, storage: Any) -> None:
        init(self, storage)
        alive[self.cdata] += 1

    def counted_delete(self: StorageWeakRef) -> None:
        alive[self.cdata] -= 1
        if alive[self.cdata] >= 0:
            delete(self)

    gc.collect()
    monkeypatch.setattr(StorageWeakRef, "__init__", counted_init)
    monkeypatch.setattr(StorageWeakRef, "__del__", counted_delete)
    dry_step(tiny_config("last_blocks"), "cpu")
    gc.collect()
    assert alive and min(alive.values()) >= 0


@pytest.mark.parametrize("cached", [True, False])
def test_flops_of_the_frozen_part(cached: bool) -> None:
    step = tiny_step("last_blocks", "freeze.k=1", cache=cached)
    assert step.cut == DEPTH
    assert step.frozen_flops == STEM + (DEPTH - 1) * BLOCK
    assert step.forward_flops == BLOCK + HEAD
    assert step.backward_flops == 2 * step.forward_flops  # the norm below its first matrix trains


@pytest.mark.parametrize(
    ("policy", "optimizer"),
    [
        *(("full", optimizer) for optimizer in ("sgd", "muon", "schedulefree")),
        *(pytest.param("full", optimizer, marks=pytest.mark.long) for optimizer in ("adopt", "lion")),
        *((policy, "adamw") for policy in ("full", "last_blocks", "linear_probe", "bias_only")),
    ],
)
def test_state_is_that_of_a_real_step(policy: str, optimizer: str) -> None:
    step = tiny_step(policy, optimizer=optimizer)
    model, updater, forward = real(tiny_config(policy, optimizer=optimizer))
    forward().backward()
    updater.step()
    assert step.weights == nbytes([*model.parameters(), *model.buffers()])
    assert step.gradients == nbytes([p.grad for p in model.parameters() if p.grad is not None])
    states = [value for state in updater.state.values() for value in state.values() if torch.is_tensor(value)]
    assert step.optimizer == nbytes(states)
    assert sum(weights for weights, _ in step.units) == nbytes(model.parameters())
    assert sum(gradients for _, gradients in step.units) == step.gradients


@pytest.mark.parametrize(
    ("policy", "precision"),
    [
        *((policy, "32-true") for policy in ("full", "linear_probe", "ssf")),
        *((policy, "bf16-mixed") for policy in ("full", "last_blocks", "lora")),
        pytest.param("attention_only", "32-true", marks=pytest.mark.long),
        pytest.param("dora", "bf16-mixed", marks=pytest.mark.long),
    ],
)
def test_activations_are_what_a_real_forward_saves(policy: str, precision: str) -> None:
    """And what is in passing in one block: at most its hidden layer twice and five tensors of its width."""
    overrides = ["freeze.k=1"] if policy == "last_blocks" else []
    cfg = tiny_config(policy, *overrides, precision=precision, cache=False)
    model, _, forward = real(cfg)
    saved, activations = saved_bytes(model, forward), dry_step(cfg, "cpu").activations
    passing = (2 * 4 + 5) * WIDTH * TOKENS * BATCH * 4
    assert saved <= activations <= saved + passing


def saved_bytes(model: Any, forward: Callable[[], torch.Tensor]) -> int:
    """What autograd keeps of a forward pass beside the parameters, each storage once."""
    saved: dict[int, int] = {}
    alive: list[torch.Tensor] = []  # so that no storage's address is used again
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        alive.append(tensor)
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    return sum(saved.values())


def test_bf16_halves_the_tensors() -> None:
    half, whole = (tiny_step("lora", precision=precision) for precision in ("bf16-true", "32-true"))
    for name in ("weights", "gradients", "optimizer"):
        assert getattr(half, name) / getattr(whole, name) == pytest.approx(0.5, rel=0.01)


def test_only_what_lies_above_the_cut_is_saved() -> None:
    whole, last, probe = (
        tiny_step(policy, cache=False).activations for policy in ("full", "last_blocks", "linear_probe")
    )
    assert whole > 1.3 * last > 1.3 * 1.3 * probe


def test_activations_grow_with_the_batch() -> None:
    one, two = (tiny_step("full", batch_size=size).activations for size in (128, 256))
    assert two / one == pytest.approx(2, rel=0.1)


@pytest.mark.parametrize("policy", ["linear_probe", "last_blocks", "first_blocks", "norm_only", "full"])
def test_cut_is_that_of_training(policy: str) -> None:
    overrides = ["freeze.k=1"] if "blocks" in policy else []
    model, _, _ = real(tiny_config(policy, *overrides))
    assert tiny_step(policy, *overrides).cut == model.thaw.cut(0)


@pytest.mark.parametrize("policy", ["gradual", "lp_ft"])
def test_schedules_are_planned_where_most_trains(policy: str) -> None:
    assert tiny_step(policy).activations == tiny_step("full").activations


@pytest.mark.parametrize(("policy", "cached"), [("last_blocks", TOKENS * WIDTH * 2), ("linear_probe", WIDTH * 4)])
def test_bytes_in_the_cache(policy: str, cached: int) -> None:
    overrides = ["freeze.k=1"] if policy == "last_blocks" else []
    assert tiny_step(policy, *overrides).cached == cached  # tokens in bf16, pooled features in float32


# Several devices


def plan(devices: int, sharded: bool, **changes: Any) -> Plan:
    values: dict[str, Any] = {"parameters": 0, "trained": 0, "cut": 1, "num_tokens": 16, "cached": 10, "filling": 0}
    values |= {
        "weights": 800,
        "gradients": 400,
        "optimizer": 1600,
        "activations": 50,
        "units": [(500, 100), (300, 300)],
    }
    values |= {"frozen_flops": 3.0, "forward_flops": 2.0, "backward_flops": 4.0}
    return plan_devices("model", "policy", Step(**values | changes), 1000, devices, sharded)


def test_one_device() -> None:
    alone = plan(1, sharded=False)
    assert (alone.memory, alone.exchange, alone.sent) == (800 + 400 + 1600 + 50, 0, 0)
    assert (alone.once, alone.epoch, alone.cache) == (3000, 6000, 10_000)


def test_ddp_copies_everything_and_the_gradients_twice() -> None:
    assert plan(4, sharded=False).memory == 800 + 2 * 400 + 1600 + 50
    assert plan(4, sharded=False).sent == 2 * 400 * 3 / 4


def test_fsdp_shares_and_gathers_two_layers() -> None:
    assert plan(4, sharded=True).memory == (800 + 400 + 1600) // 4 + 2 * (500 + 100) + 50
    assert plan(4, sharded=True).sent == (2 * 800 + 400) * 3 / 4


def test_filling_the_cache_can_take_more_than_a_step() -> None:
    assert plan(1, sharded=False, filling=7000).memory == 800 + 7000


def test_a_cache_larger_than_memory_is_read_in_each_epoch() -> None:
    settings, _ = read_arguments(["ram=50", "disk=2"])
    found = plan(1, sharded=False, cached=40_000_000)  # of 1,000 images: 40 GB of the 45 that count
    assert cache_line(found, settings) == (
        "cache of model, policy: 40.0 GB, fits in 50 GB of memory; read from the disk once, 20.0 s"
    )
    line = cache_line(replace(found, images=10**9, cache=10**12), settings)  # and a page an image
    seconds = (1000 + mmap.PAGESIZE) / 2
    assert line.endswith(f"1,000.0 GB, more than 50 GB of memory; read in each epoch, {seconds:,.1f} s")


def test_fsdp_has_no_cache() -> None:
    settings, (found,) = make_plans(["strategy=fsdp", "devices=2", "batch_size=2"])
    assert (settings.cache, found.step.filling, found.sharded) == (False, 0, True)


# The command


@pytest.mark.long
def test_a_narrow_terminal_has_more_tables() -> None:
    settings, plans = make_plans(["model=vit_tiny_patch16_224", "policy=full,last_blocks", "batch_size=2"])
    for cells_of, most in ((memory_cells, 3), (work_cells, 3)):
        cells = [cells_of(plan, settings) for plan in plans]
        for width, count in ((80, most), (200, 1)):
            tables = fitted_tables(plans, cells, width)
            assert len(tables) == count
            assert max(len(line) for table in tables for line in as_text(table).splitlines()) <= width
            columns = [column.header for table in tables for column in table.columns]
            assert [name for name in columns if name not in ("model", "policy")] == [*cells[0]]


def test_every_model_with_every_policy(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    main(["model=digits_vit,vit_tiny", "policy=full,linear_probe", "devices=2", "dataset=1e6", f"json={path}"])
    lines = capsys.readouterr().out.splitlines()
    rows = [line.split()[:2] for line in lines if line.startswith(("digits_vit", "vit_tiny"))]
    assert rows == 2 * [[model, policy] for model in ("digits_vit", "vit_tiny") for policy in ("full", "linear_probe")]
    assert len({len(line) for line in lines[1:7]}) == 1
    assert lines[1].split()[:2] == ["params", "train"] and lines[2].split()[:4] == ["model", "policy", "M", "M"]
    saved = json.loads(path.read_text())
    assert saved["settings"]["dataset"] == 1e6
    numbers = saved["plans"]
    assert [each["images"] for each in numbers] == 4 * [1_000_000]
    assert numbers[0]["exchange"] == numbers[0]["step"]["gradients"]


def test_imagenet_has_its_classes() -> None:
    _, (found,) = make_plans(["model=digits_vit", "dataset=imagenet1k", "batch_size=2"])
    assert (found.images, found.step.trained) == (1_281_167, 1000 * 193)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        (
            "model=vit_smal",
            r"model=vit_smal does not exist; did you mean model=vit_small\?\noptions: .*any model of timm",
        ),
        ("optimizer=sgdd", r"optimizer=sgdd does not exist; did you mean optimizer=sgd\?\noptions: adamw"),
        ("strategy=tp", "strategy=.tp. must be ddp or fsdp"),
        ("devices=two", "devices=.two. must be a whole number"),
        ("devices=true", "devices=true must be a whole number"),
        ("batch_size=0", "batch_size=0 must be a whole number"),
        ("devices=auto", "devices=auto depends on a machine, .* give a value"),
        ("flops=nan", "flops=.nan. must be a number above 0"),
        ("rate=-1", "rate=-1 must be a number above 0"),
        ("dataset=0", "dataset=0 must be"),
        ("precision=8-true", "precision=.8-true. must be 32-true, bf16-mixed"),
        ("image_size=30", "image_size=30.*multiple of the patch size 7"),
        ("cache=maybe", "cache=.maybe. must be true or false"),
        ("memory=lots", "memory=.lots. must be a list, each item a number above 0"),
        ("trainer.precision=8", "trainer.precision=8 is unknown; choose 32-true"),
        ("freeze.layers=3", "freeze.layers"),
    ],
)
def test_errors_are_one_message(argument: str, message: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit), clear_errors():
        main([argument])
    error = capsys.readouterr().err
    assert re.search(message, error), error
    assert "Traceback" not in error


def nbytes(tensors: Any) -> int:
    return sum(tensor.nbytes for tensor in tensors)


@pytest.mark.parametrize("groups", [1, 4])
def test_flops_of_a_convolutions_gradients(groups: int) -> None:
    """Each of the two gradients multiplies and adds as often as the forward pass does."""
    convolution = torch.nn.Conv2d(8, 12, 3, stride=2, padding=1, groups=groups, bias=False)
    images = torch.randn(2, 8, 6, 6, requires_grad=True)
    output = convolution(images)
    with FlopCounterMode(display=False, custom_mapping=CONVOLUTION) as counter:
        output.sum().backward()
    multiplied = output.numel() * 3 * 3 * 8 // groups
    assert counter.get_total_flops() == 2 * 2 * multiplied
