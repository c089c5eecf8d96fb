"""LoRA computes W + alpha / r B A, in linear layers and in convolutions, and refuses what it cannot change."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import compose_run
from small_models import assert_same, parametrized
from torch import nn
from torch.nn import functional

from thaw.classifier import Classifier
from thaw.data.loader import Batch
from thaw.freezing.added import added_names
from thaw.freezing.dora import DoRA
from thaw.freezing.lora import LoRA, add_lora
from thaw.models.backbone import Backbone
from thaw.run.errors import UserError
from thaw.run.values import check_types

Build = Callable[..., Classifier]
CONVOLUTIONS: list[dict[str, Any]] = [
    {"kernel_size": 1},
    {"kernel_size": 3, "stride": 2, "padding": 1, "dilation": 2, "bias": False},
    {"kernel_size": 3, "padding": "same", "groups": 2},
]


@pytest.mark.parametrize("settings", CONVOLUTIONS)
def test_a_convolution_is_the_sum_by_hand(settings: dict) -> None:
    """The narrow convolution with A as its kernels, and one of 1 x 1 with B; for each group, with its rows of B."""
    torch.manual_seed(0)
    layer, images = nn.Conv2d(4, 6, **settings), torch.randn(2, 4, 8, 8, requires_grad=True)
    weight, update = layer.weight, LoRA(layer.weight, 2, 3.0)
    parametrized(layer, "weight", update)
    kernels, rows = update.lora_A.view(2, *weight.shape[1:]), update.lora_B[..., None, None].chunk(layer.groups)
    own = {key: value for key, value in settings.items() if key in ("stride", "padding", "dilation")}
    narrow = [functional.conv2d(part, kernels, **own) for part in images.chunk(layer.groups, dim=1)]
    wide = torch.cat([functional.conv2d(x, b) for x, b in zip(narrow, rows, strict=True)], dim=1)
    expected = functional.conv2d(images, weight, layer.bias, groups=layer.groups, **own) + 3.0 / 2 * wide
    assert_same(layer(images), expected, [images, update.lora_A, update.lora_B])


def test_the_kernel_keeps_its_memory_format() -> None:
    layer = nn.Conv2d(4, 6, 3).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    parametrized(layer, "weight", LoRA(layer.weight, 2, 1.0))
    assert layer.weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(("rank", "alpha"), [(1, 16.0), (8, 0.5), (32, 3.0)])
def test_a_transformer_is_the_sum_by_hand(
    classifier: Build, policy: Callable, batch: Batch, rank: int, alpha: float
) -> None:
    model, hand = classifier(policy("lora", lora={"rank": rank, "alpha": alpha})).eval(), classifier("full").eval()
    hand.head.load_state_dict(model.head.state_dict())
    before = hand(batch.images)
    factors = [name.removesuffix("A") for name in added_names(model) if name.endswith("A")]
    assert len(factors) == 3 * 4  # qkv, proj, fc1, fc2 of each block
    for name in factors:
        a, b = model.get_parameter(f"{name}A"), model.get_parameter(f"{name}B")
        nn.init.normal_(b, std=0.1)
        assert a.shape[0] == b.shape[1] == rank
        hand.get_submodule(name.partition(".parametrizations")[0]).weight.data += alpha / rank * b @ a
    logits = model(batch.images)
    torch.testing.assert_close(logits, hand(batch.images), rtol=1e-4, atol=1e-5)
    assert (logits - before).abs().max() > 0.01


@pytest.mark.parametrize("method", [LoRA, DoRA])
@pytest.mark.parametrize("make", [partial(nn.Linear, 4, 6), partial(nn.Conv2d, 4, 6, 3, 2, 1)], ids=["linear", "conv"])
def test_equals_peft(make: Callable[[], Any], method: type[LoRA]) -> None:
    peft = pytest.importorskip("peft", reason="pip install peft: the reference, which thaw does not need")
    torch.manual_seed(0)
    layer, plain = make(), make()
    plain.load_state_dict(layer.state_dict())
    update = method(layer.weight, 2, 3.0)
    config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=["0"], use_dora=method is DoRA)
    model = peft.get_peft_model(nn.Sequential(plain), config)
    adapter = model.base_model.model[0]
    theirs = [adapter.lora_A["default"].weight, adapter.lora_B["default"].weight]
    if isinstance(update, DoRA):
        theirs.append(adapter.lora_magnitude_vector["default"].weight)
        torch.testing.assert_close(theirs[2].flatten(), update.magnitude)
    parametrized(layer, "weight", update)
    for their, own in zip(theirs, update.parameters(), strict=True):
        their.data = own.data.view(their.shape)
    inputs = torch.randn((3, 4) if isinstance(layer, nn.Linear) else (3, 4, 8, 8), requires_grad=True)
    assert_same(layer(inputs), model(inputs), [inputs, *update.parameters()], [inputs, *theirs])
    torch.testing.assert_close(layer.weight, model.merge_and_unload()[0].weight, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"match": r".*\.nothing"},
            r"freeze\.lora\.match='.*nothing' is the name of no linear layer; .* attn\.qkv, mlp",
        ),
        ({"match": r".*\.blocks\.0\..*", "last": 2}, "is the name of no linear layer in the last 2 layers"),
        ({"match": "["}, r"freeze\.lora\.match='\[' is not a regular expression \(unterminated character set"),
        ({"rank": 0}, r"freeze\.lora\.rank=0 must be from 1 to 32"),
        ({"rank": 33}, r"freeze\.lora\.rank=33 must be from 1 to 32, the smallest side"),
        ({"last": 0}, r"freeze\.lora\.last=0 must be from 1 to 4"),
        ({"last": 5}, r"freeze\.lora\.last=5 must be from 1 to 4, the backbone's layers, or null"),
    ],
)
def test_what_cannot_be_is_refused(backbone: Callable[..., Backbone], changes: dict, message: str) -> None:
    model = backbone()
    with pytest.raises(ValueError, match=message):
        add_lora(model, **{"match": r".*\.(attn|mlp)\..*", "last": None, "rank": 8, "alpha": 16.0} | changes)
    assert not added_names(model)


@pytest.mark.parametrize("alpha", ["0.0", "nan"])
def test_the_scale_is_above_0(alpha: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"freeze.lora.alpha={alpha} must be a number above 0"):
        check_types(compose_run(tmp_path, "freeze=lora", f"freeze.lora.alpha={alpha}"))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("test_resnet", {"conv1", "conv2", "conv3"}),
        ("test_efficientnet", {"conv", "conv_exp", "conv_pw", "conv_pwl"}),  # no stem, depthwise, squeeze-and-excite
    ],
)
def test_convolutions_of_a_backbone_without_linear_layers(classifier: Build, name: str, expected: set[str]) -> None:
    model = classifier("lora", name=name, arguments={})
    layers = {part.partition(".parametrizations")[0] for part in added_names(model)}
    assert {layer.rpartition(".")[2] for layer in layers} == expected
    assert model.thaw.cut(0) == 1  # below lies the stem


def test_a_model_without_either(backbone: Callable[..., Backbone]) -> None:
    model = backbone()
    model.model = nn.Identity()
    with pytest.raises(
        ValueError, match=r"no convolution; this backbone has none: choose another policy, e\.g\. freeze=last_blocks"
    ):
        add_lora(model, ".*", None, 1, 1.0)
