"""VPT-deep: equation 7 of the paper written out, registers and rotary embeddings, and what stays true around it."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import compose_run
from timm.layers import apply_rot_embed_cat
from torch import Tensor, nn

from thaw.classifier import Classifier
from thaw.data.loader import Batch
from thaw.evaluation.cost import flops
from thaw.freezing.prompt import add_prompts
from thaw.models.attention import attention_layers, recorded_attention, share_of_patches
from thaw.models.backbone import Backbone
from thaw.models.chain import chain
from thaw.plan.dry_step import dry_step
from thaw.run.errors import UserError

SMALL = {"embed_dim": 24, "depth": 3, "num_heads": 2}
VIT = SMALL | {"patch_size": 7, "global_pool": "token"}
KINDS: dict[str, dict[str, Any]] = {
    "class token": {"arguments": VIT},
    "no class token": {},
    "registers": {"arguments": VIT | {"reg_tokens": 2}, "pool": "class_and_mean"},
    "layer scale": {"name": "vit_small_patch14_dinov2", "arguments": SMALL | {"init_values": 0.5}, "channels": 3},
}


def prompted(build: Callable[..., Backbone], last: int | None = None, **settings: Any) -> tuple[Backbone, Backbone]:
    """A plain backbone and the same with three prompt tokens in each block, all parameters random."""
    plain, model = build(**settings), build(**settings)
    add_prompts(model, last=last, count=3)
    torch.manual_seed(1)
    for parameter in model.parameters():
        nn.init.normal_(parameter, 0.5 if parameter.ndim == 1 else 0.0, 0.2)
    plain.load_state_dict({name: tensor for name, tensor in model.state_dict().items() if ".prompt." not in name})
    return plain, model


def images_for(model: Backbone) -> Tensor:
    return torch.randn(2, model.channels, model.image_size, model.image_size, generator=torch.manual_seed(2))


@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_formula(backbone: Callable[..., Backbone], kind: str) -> None:
    """[x_i, _, E_i] = L_i([x_(i-1), P_(i-1), E_(i-1)]) with the plain model's layers."""
    plain, model = (each.double() for each in prompted(backbone, **KINDS[kind]))
    images, prompts = images_for(model).double(), [block.prompt.tokens for block in model.model.blocks]
    tokens = plain.prefix(images, 1)
    count = tokens.shape[1]
    for block, prompt in zip(plain.model.blocks, prompts, strict=True):
        first = tokens[:, :1]  # x, where there is one
        output = block(torch.cat([first, torch.stack([prompt] * 2), tokens[:, 1:]], dim=1))
        tokens = torch.cat([output[:, :1], output[:, -(count - 1) :]], dim=1)
    wanted, got = plain.suffix(tokens, 4), model(images)
    assert model.prefix(images, 4).shape == tokens.shape
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(got, plain(images), atol=1e-3)
    weights = torch.randn(got.shape, dtype=torch.double)
    gradients = [torch.autograd.grad((result * weights).sum(), prompts) for result in (got, wanted)]
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-9)
    assert all(gradient.abs().max() > 1e-6 for gradient in gradients[0])


@pytest.mark.parametrize(
    ("name", "size"), [("eva02_tiny_patch14_224", 28), ("vit_small_patch16_dinov3", 32)], ids=["eva02", "dinov3"]
)
def test_a_rotary_embedding_leaves_prompts_alone(backbone: Callable[..., Backbone], name: str, size: int) -> None:
    """The first block's attention by hand: only patches are rotated."""
    plain, model = prompted(backbone, name=name, arguments=SMALL, channels=3, image_size=size)
    images, first = images_for(model), plain.model.num_prefix_tokens
    tokens, (before, after) = plain.prefix(images, 1), (plain.model.blocks[0], model.model.blocks[0])
    angles = chain(plain.model)[1][0].keywords["rope"]
    attend = before.attn
    with_prompt = torch.cat([tokens[:, :first], torch.stack([after.prompt.tokens] * 2), tokens[:, first:]], dim=1)
    normed = before.norm1(with_prompt)
    if attend.qkv is not None:
        weight, bias = attend.qkv.weight, attend.qkv.bias
        if getattr(attend, "q_bias", None) is not None:
            bias = torch.cat([attend.q_bias, torch.zeros_like(attend.v_bias), attend.v_bias])
        query, key, value = torch.nn.functional.linear(normed, weight, bias).chunk(3, dim=-1)
    else:
        query, key, value = attend.q_proj(normed), attend.k_proj(normed), attend.v_proj(normed)
    outputs = []
    for q, k, v in zip(*(part.chunk(2, dim=-1) for part in (query, key, value)), strict=True):
        q, k = (
            torch.cat([x[:, : first + 3], apply_rot_embed_cat(x[:, first + 3 :], angles, half=attend.rotate_half)], 1)
            for x in (q, k)
        )
        outputs.append((q @ k.mT / q.shape[-1] ** 0.5).softmax(dim=-1) @ v)
    attended = attend.proj(attend.norm(torch.cat(outputs, dim=-1)))
    inside = with_prompt + (1 if before.gamma_1 is None else before.gamma_1) * attended
    mlp = before.mlp(before.norm2(inside))
    inside = inside + (1 if before.gamma_2 is None else before.gamma_2) * mlp
    wanted = torch.cat([inside[:, :first], inside[:, first + 3 :]], dim=1)
    torch.testing.assert_close(model.prefix(images, 2), wanted, rtol=1e-4, atol=1e-5)


def test_the_start_is_xavier_uniform_as_in_the_paper(backbone: Callable[..., Backbone]) -> None:
    """Its code takes sqrt(6 / (3 * patch height * patch width + width))."""
    model = backbone(**KINDS["layer scale"])
    add_prompts(model, last=None, count=1000)
    bound = math.sqrt(6 / (3 * 14 * 14 + 24))
    for block in model.model.blocks:
        tokens = block.prompt.tokens
        assert 0.99 * bound < tokens.abs().max() <= bound
        assert float(tokens.detach().std()) == pytest.approx(bound / math.sqrt(3), rel=0.02)


@pytest.mark.parametrize("kind", ["class token", "registers"])
def test_attention_pictures_show_the_patches_of_the_image(backbone: Callable[..., Backbone], kind: str) -> None:
    """Attention among an image's own tokens is that of the whole map, whose other columns are left out."""
    _, model = prompted(backbone, **KINDS[kind])
    images, whole = images_for(model), []
    first = model.model.num_prefix_tokens
    attend: Any = attention_layers(model)[0]
    hook = attend.attn_drop.register_forward_hook(lambda module, inputs, output: whole.append(output))
    with torch.no_grad(), recorded_attention(model) as maps:
        model(images)
    hook.remove()
    count = model.num_tokens
    assert [each.shape for each in maps] == [(2, 2, count, count)] * 3 and whole[0].shape[-1] == count + 3
    keep = torch.tensor([number for number in range(count + 3) if not first <= number < first + 3])
    wanted = whole[0][:, :, keep][:, :, :, keep]
    torch.testing.assert_close(maps[0], wanted / wanted.sum(dim=-1, keepdim=True))
    shares = share_of_patches(model, maps)
    assert shares.shape == (2, 4, 4)
    torch.testing.assert_close(shares.sum(dim=(1, 2)), torch.ones(2))


def flops_of_prompts(blocks: int, width: int, tokens: int, count: int) -> int:
    """In each block: 24 D^2 a token in matrices, 4 D T^2 in attention."""
    return blocks * (24 * width**2 * count + 4 * width * ((tokens + count) ** 2 - tokens**2))


def test_flops_are_those_of_more_tokens(classifier: Callable[..., Classifier], policy: Callable, batch: Batch) -> None:
    plain, model = classifier("linear_probe"), classifier(policy("prompt", prompt={"count": 5}))
    own, all_of = (flops(each.eval(), batch.images[:1]) for each in (plain, model))
    assert own is not None and all_of == own + flops_of_prompts(blocks=3, width=32, tokens=16, count=5)


def test_the_planner_counts_them(tmp_path: Path) -> None:
    run = ["trainer.precision=32-true", "model.num_classes=10"]
    plain, whole, last = (
        dry_step(compose_run(tmp_path, *run, *more), "cpu")
        for more in (["freeze=linear_probe"], ["freeze=prompt"], ["freeze=prompt", "freeze.prompt.last=2"])
    )
    forward = [step.frozen_flops + step.forward_flops for step in (plain, whole, last)]
    assert forward[1] == forward[0] + flops_of_prompts(blocks=6, width=192, tokens=16, count=10)
    assert forward[2] == forward[0] + flops_of_prompts(blocks=2, width=192, tokens=16, count=10)
    assert (whole.cut, last.cut) == (1, 5) and whole.trained == 6 * 10 * 192 + 1930
    assert plain.frozen_flops / 6 * 4 < last.frozen_flops < plain.frozen_flops / 6 * 5


def test_rates_are_those_of_the_block_and_nothing_decays(classifier: Callable[..., Classifier]) -> None:
    model = classifier("prompt", optim={"layer_decay": 0.5})
    groups = model.optim.groups(model.named_parameters(), model.depths(), model.thaw.epochs)
    prompts = {f"layer{depth}/no_decay": 1e-2 * 0.5 ** (4 - depth) for depth in (1, 2, 3)}
    assert {group["name"]: group["lr"] for group in groups} == prompts | {"layer4/decay": 1e-2, "layer4/no_decay": 1e-2}


@pytest.mark.parametrize(
    ("model", "changes", "message"),
    [
        ({"name": "test_resnet", "arguments": {}}, {}, "needs tokens that all see each other, without windows, conv"),
        (
            {
                **{"name": "swin_tiny_patch4_window7_224", "image_size": 64},
                "arguments": {"embed_dim": 16, "num_heads": [1, 2, 2, 2], "depths": [1, 1, 1, 2]},
            },
            *({}, "without windows.* is made of timm.models.swin_transformer.SwinTransformerBlock"),
        ),
        ({}, {"last": 0}, "freeze.prompt.last=0 must be from 1 to 4"),
    ],
)
def test_what_cannot_be_is_refused(backbone: Callable[..., Backbone], model: dict, changes: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        add_prompts(backbone(**model), **{"last": None, "count": 2} | changes)
