"""Every shipped policy in training: what moves in which epoch, at which rate, and what the table says of it."""

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor

from thaw.classifier import Classifier
from thaw.data.loader import Batch
from thaw.freezing.added import own_names
from thaw.freezing.table import layer_table
from thaw.run.console import as_text

Build = Callable[..., Classifier]

POLICIES = sorted(path.stem for path in (Path(__file__).parents[2] / "configs" / "freeze").glob("*.yaml"))
OF_TRANSFORMERS = {"adapter", "attention_only", "attention_out", "patterns", "prompt"}  # nothing to a convolutional net
TINY_VIT = {"patch_size": 7, "embed_dim": 32, "depth": 3, "num_heads": 2}
DROPOUT = {"pos_drop_rate": 0.2, "proj_drop_rate": 0.2, "attn_drop_rate": 0.2, "drop_path_rate": 0.2}
MODELS: dict[str, dict[str, Any]] = {
    "vit": {"arguments": TINY_VIT | DROPOUT},
    "convnet": {"name": "test_resnet", "arguments": {"drop_path_rate": 0.2}},  # its batch norms have buffers
    "efficientnet": {"name": "test_efficientnet", "arguments": {"drop_path_rate": 0.2}},
}
CASES = [(name, model) for name in POLICIES for model in MODELS if model == "vit" or name not in OF_TRANSFORMERS]
BATCHES = 2  # an epoch
RECIPE = {"lr": 3e-3, "weight_decay": 0.1, "layer_decay": 0.5, "warmup_fraction": 0.3, "final_lr_fraction": 0.1}


def start(model: Classifier) -> Classifier:
    model.thaw.apply(0)
    return model


def owner(model: torch.nn.Module, buffer: str) -> torch.nn.Module:
    return model.get_submodule(buffer.rpartition(".")[0])


class Watch(L.Callback):
    """Notes for each epoch what has moved so far and what got gradients, and for each step every parameter's rates."""

    def __init__(self) -> None:
        self.moved: list[set[str]] = []
        self.with_gradient: list[set[str]] = []
        self.rates: list[dict[str, tuple[float, float]]] = []

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.before = {name: tensor.clone() for name, tensor in self.tensors(pl_module).items()}

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        self.with_gradient.append({name for name, p in pl_module.named_parameters() if p.grad is not None})
        settings = {id(p): (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
        self.rates.append({name: settings[id(p)] for name, p in pl_module.named_parameters() if id(p) in settings})

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.moved.append(
            {name for name, tensor in self.tensors(pl_module).items() if not torch.equal(tensor, self.before[name])}
        )

    @staticmethod
    def tensors(model: L.LightningModule) -> dict[str, Tensor]:
        return {name: t.detach() for name, t in (*model.named_parameters(), *model.named_buffers())}


def epochs_of(thaws: dict[str, float]) -> int:
    return 2 + int(max(epoch for epoch in thaws.values() if epoch < math.inf))


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_exactly_what_is_thawed_moves_at_its_rate(
    classifier: Build, batch: Batch, fit: Callable, name: str, kind: str
) -> None:
    model, watch = start(classifier(name, optim=RECIPE, **MODELS[kind])), Watch()
    depths, named = model.depths(), dict(model.named_parameters())
    for parameter in model.parameters():  # as pretrained: none is 0, such as the last norm's scale in a residual branch
        torch.nn.init.normal_(parameter, 1.0 if parameter.ndim == 1 else 0.0, 0.1)
    thaws = model.thaw.epochs
    epochs = epochs_of(thaws)
    statistics = {  # of batch norms, as their own scale and shift, whatever a policy adds to them
        buffer: min(thaws[f"{buffer.rpartition('.')[0]}.{own}"] for own in own_names(owner(model, buffer)))
        for buffer, _ in model.named_buffers()
        if re.search(r"\.(running_mean|running_var|num_batches_tracked)$", buffer)
    }
    assert bool(statistics) == (kind != "vit")
    fit(model, [batch] * BATCHES, epochs=epochs, callbacks=[watch])

    for epoch in range(epochs):
        thawed = {parameter for parameter, thaw in thaws.items() if thaw <= epoch}
        assert watch.with_gradient[BATCHES * epoch : BATCHES * (epoch + 1)] == [thawed] * BATCHES
        assert watch.moved[epoch] & named.keys() == thawed
        moved_buffers = {buffer for buffer, thaw in statistics.items() if thaw <= epoch}
        assert watch.moved[epoch] - named.keys() == moved_buffers
    for step, rates in enumerate(watch.rates):
        assert rates.keys() == {parameter for parameter, thaw in thaws.items() if thaw < math.inf}
        for parameter, (lr, weight_decay) in rates.items():
            peak = RECIPE["lr"] * RECIPE["layer_decay"] ** (max(depths.values()) - depths[parameter])
            fraction = naive_fraction(step, BATCHES * epochs, BATCHES * thaws[parameter])
            assert lr == pytest.approx(peak * fraction, rel=1e-12), (parameter, step)
            matrix = named[parameter].ndim > 1 and not parameter.endswith(("pos_embed", "cls_token", "prompt.tokens"))
            assert weight_decay == (RECIPE["weight_decay"] if matrix else 0)


def naive_fraction(step: int, total: int, thaw_step: float) -> float:
    """0 before the thaw, then a linear rise onto torch's cosine."""
    if step < thaw_step:
        return 0.0
    warmup = round(RECIPE["warmup_fraction"] * total)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    final = RECIPE["final_lr_fraction"]
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=total - warmup, eta_min=final)
    for _ in range(warmup, step):
        optimizer.step()
        cosine.step()
    rises = [(number + 1) / (warmup + 1) for number in range(warmup)] + [1.0] * total
    return rises[int(step - thaw_step)] * cosine.get_last_lr()[0]


# The table

ROW = re.compile(r"(\S+)(?: \(.*\))?\s+(\d+)(?:-(\d+))?\s+([\d,]+)  (yes|no|after \d+)\s+(train|eval)\s+(\S+)\s+(\S+)")
Settings = tuple[str, str, str, str]  # trains, mode, lr, decay


def rows_of(table: str) -> list[tuple[list[str], range, int, Settings]]:
    """Name prefixes, depths, parameters and settings of every line."""
    rows = []
    for line in table.splitlines()[1:-1]:
        found = ROW.fullmatch(line)
        assert found, line
        label, first, last, count, *settings = found.groups()
        numbers = re.fullmatch(r"(.*\.)(\d+)-(\d+)", label)
        prefixes = [f"{numbers[1]}{i}." for i in range(int(numbers[2]), int(numbers[3]) + 1)] if numbers else [label]
        depths = range(int(first), int(last or first) + 1)
        rows.append((prefixes, depths, int(count.replace(",", "")), (*settings,)))
    return rows  # type: ignore[return-value]


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_table_lists_every_parameter_once_as_the_optimizer_has_it(classifier: Build, name: str, kind: str) -> None:
    model = start(classifier(name, optim=RECIPE, **MODELS[kind]))
    depths = model.depths()
    thaws = model.thaw.epochs
    groups = model.optim.groups(model.named_parameters(), depths, thaws)
    rates = {id(p): (f"{g['lr']:.2e}", f"{g['weight_decay']:.3g}") for g in groups for p in g["params"]}
    for epoch in range(epochs_of(thaws)):
        model.thaw.apply(epoch)
        left: dict[str, Settings] = {}
        for parameter, tensor in model.named_parameters():
            thaw = thaws[parameter]
            trains = "yes" if thaw <= epoch else "no" if thaw == math.inf else f"after {thaw}"
            mode = "train" if owner(model, parameter).training else "eval"
            left[parameter] = (trains, mode, *rates.get(id(tensor), ("-", "-")))
        table = as_text(layer_table(model, depths, groups, epoch))
        for prefixes, spanned, count, settings in sorted(rows_of(table), key=lambda row: -len(row[0][0])):
            mine = [
                parameter
                for parameter, expected in left.items()
                if parameter.startswith(tuple(prefixes)) and expected == settings
            ]
            assert {depths[parameter] for parameter in mine} == set(spanned)
            assert sum(model.get_parameter(parameter).numel() for parameter in mine) == count
            for parameter in mine:
                del left[parameter]
        assert not left
        sizes = {parameter: tensor.numel() for parameter, tensor in model.named_parameters()}
        now, ever = (sum(sizes[p] for p in sizes if thaws[p] <= limit) for limit in (epoch, 1e9))
        assert table.splitlines()[-1] == f"{ever:,} of {sum(sizes.values()):,} parameters train" + (
            f", {now:,} of them now" if now < ever else ""
        )


def test_table_merges_equal_blocks(classifier: Build) -> None:
    model = start(classifier("last_blocks", optim={"lr": 1e-3, "weight_decay": 0.05}))
    depths = model.depths()
    groups = model.optim.groups(model.named_parameters(), depths, model.thaw.epochs)
    expected = """\
layers                                            depth  parameters  trains  mode    peak lr  decay
backbone.model.pos_embed                              0         512  no      eval          -      -
backbone.model.patch_embed                            0       1,600  no      eval          -      -
backbone.model.blocks.0                               1      12,704  no      eval          -      -
backbone.model.blocks.1-2 (norm1.weight, ...)       2-3         832  yes     train  1.00e-03      0
backbone.model.blocks.1-2 (attn.qkv.weight, ...)    2-3      24,576  yes     train  1.00e-03   0.05
backbone.model.fc_norm                                3          64  yes     train  1.00e-03      0
head.linear (weight)                                  4         320  yes     train  1.00e-03   0.05
head.linear (bias)                                    4          10  yes     train  1.00e-03      0
25,802 of 40,618 parameters train"""
    assert as_text(layer_table(model, depths, groups, 0)) == expected


def test_table_shows_the_peak_of_a_schedule(classifier: Build, batch: Batch, fit: Callable) -> None:
    model = classifier("linear_probe", optim={"warmup_fraction": 0.5, "final_lr_fraction": 0.0})
    trainer = fit(model, [batch] * 2)
    groups = trainer.optimizers[0].param_groups
    assert groups[0]["lr"] < 1e-2
    assert "1.00e-02" in as_text(layer_table(model, model.depths(), groups, 0))
