"""Train and eval mode under each policy: dropout and drop path are silent in what is frozen, and act in what trains."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from thaw.classifier import Classifier
from thaw.freezing.policy import modes
from thaw.models.heads import MLPHead

Build = Callable[..., Classifier]

POLICIES = sorted(path.stem for path in (Path(__file__).parents[2] / "configs" / "freeze").glob("*.yaml"))
DROPOUT = {"pos_drop_rate": 0.3, "proj_drop_rate": 0.3, "attn_drop_rate": 0.3, "drop_path_rate": 0.5}
HEAD = partial(MLPHead, hidden_features=16, dropout=0.5)


def modes_now(model: nn.Module) -> dict[nn.Module, bool]:
    return modes(model, {parameter for parameter in model.parameters() if parameter.requires_grad})


def test_modules_without_parameters_follow_what_comes_before() -> None:
    model = nn.Sequential(nn.Dropout(), nn.Linear(1, 1), nn.Dropout(), nn.Linear(1, 1), nn.Dropout())
    model[1].requires_grad_(False)
    assert [modes_now(model)[child] for child in model] == [True, False, False, True, True]
    model[3].requires_grad_(False)
    assert not any(modes_now(model).values())
    assert modes_now(model).keys() == set(model.modules())


def test_what_comes_before_reaches_into_a_partly_frozen_module() -> None:
    inner = nn.Sequential(nn.Dropout(), nn.Linear(1, 1).requires_grad_(False), nn.Linear(1, 1))
    model = nn.Sequential(nn.Linear(1, 1), inner)
    for trains in (False, True):
        model[0].requires_grad_(trains)
        assert [modes_now(model)[child] for child in inner] == [trains, False, True]


def test_modules_without_parameters_follow_the_own_parameters_of_their_module() -> None:
    class Stem(nn.Sequential):
        def __init__(self) -> None:
            super().__init__(nn.Dropout(), nn.Linear(1, 1))
            self.token = nn.Parameter(torch.zeros(1), requires_grad=False)

    stem = Stem()
    assert [modes_now(stem)[module] for module in stem.modules()] == [False, False, True]


def test_modes_of_a_frozen_backbone_under_a_training_head(classifier: Build, tiny: dict) -> None:
    model = classifier("linear_probe", head=HEAD, arguments=tiny | DROPOUT)
    model.thaw.apply(0)
    assert model.training and model.head.dropout.training
    assert not any(module.training for module in model.backbone.modules())


def outputs(model: Classifier) -> list[Tensor]:
    """What the stem, each block, the final norm and the head give for the same images."""
    tokens = model.preprocess(torch.arange(8 * 28 * 28).reshape(8, 1, 28, 28).to(torch.uint8))
    seen = []
    for layer in (*model.backbone.layers, model.head):
        tokens = layer(tokens)
        seen.append(tokens)
    return seen


@pytest.mark.parametrize("name", POLICIES)
def test_random_numbers_start_where_something_trains(classifier: Build, tiny: dict, name: str) -> None:
    """In every epoch: two passes are equal as far as nothing below trains, and differ above the first trained layer."""
    model = classifier(name, head=HEAD, arguments=tiny | DROPOUT | {"drop_path_rate": 0.9})
    model.thaw.apply(0)
    thaws, depths = model.thaw.epochs, model.thaw.depths
    for epoch in range(1 + int(max(thaw for thaw in thaws.values() if thaw < float("inf")))):
        model.thaw.apply(epoch)
        lowest = min(depths[parameter] for parameter, thaw in thaws.items() if thaw <= epoch)
        whole = [depth for depth in range(5) if all(thaws[p] <= epoch for p in depths if depths[p] == depth)]
        same = [torch.equal(a, b) for a, b in zip(outputs(model), outputs(model), strict=True)]
        frozen = same[:4] + same[5:]  # by depth; the final norm belongs to the last block
        assert all(frozen[:lowest]), epoch
        assert whole and not any(frozen[whole[0] :]), epoch
        assert same[:4] == [True] * lowest + [False] * (4 - lowest) or lowest not in whole


EVERYTHING = {"attn.attn_drop", "attn.proj_drop", "drop_path1", "mlp.drop1", "mlp.drop2", "drop_path2"}


@pytest.mark.parametrize(
    ("name", "stem", "block"),
    [
        ("linear_probe", False, set()),
        ("full", True, EVERYTHING),
        ("norm_only", False, set()),
        ("bias_only", True, EVERYTHING),
        ("attention_only", False, {"attn.attn_drop", "attn.proj_drop", "drop_path1"}),
        ("patterns", False, {"mlp.drop1", "mlp.drop2", "drop_path2"}),
        ("attention_out", False, {"attn.proj_drop", "drop_path1"}),
        ("lora", False, EVERYTHING),
        ("adapter", False, set()),
        ("prompt", False, set()),
        ("ssf", True, EVERYTHING),
    ],
)
def test_what_acts_within_a_block(classifier: Build, tiny: dict, name: str, stem: bool, block: set[str]) -> None:
    """A module without parameters has the mode of what it follows."""
    model = classifier(name, head=HEAD, arguments=tiny | DROPOUT)
    model.thaw.apply(0)
    assert model.backbone.model.pos_drop.training == stem
    for part in model.backbone.model.blocks:
        assert {place for place in EVERYTHING if part.get_submodule(place).training} == block
