"""Attention rollout against the paper's recipe written out for one token at a time, and what is recorded."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_models import AVERAGED, TINY
from torch import Tensor

from thaw.models.attention import attention_layers, recorded_attention, rollout, share_of_patches

SWIN = {"embed_dim": 16, "depths": (1, 1), "num_heads": (1, 2), "window_size": 7}


def naive_rollout(maps: list[Tensor]) -> Tensor:
    """Abnar & Zuidema 2020, section 3, for one image: raw attention plus identity, renormalised, multiplied."""
    tokens = maps[0].shape[-1]
    total = [[float(i == j) for j in range(tokens)] for i in range(tokens)]
    for attention in maps:
        mixed = [[0.0] * tokens for _ in range(tokens)]
        for i in range(tokens):
            row = [sum(float(head[i, j]) for head in attention) / len(attention) for j in range(tokens)]
            row[i] += 1.0
            mixed[i] = [value / sum(row) for value in row]
        total = [[sum(mixed[i][k] * total[k][j] for k in range(tokens)) for j in range(tokens)] for i in range(tokens)]
    return torch.tensor(total)


def test_rollout_equals_the_paper() -> None:
    torch.manual_seed(0)
    maps = [(3 * torch.randn(2, 3, 5, 5)).softmax(dim=-1) for _ in range(4)]
    flow = rollout(maps)
    for image in range(2):
        torch.testing.assert_close(flow[image], naive_rollout([attention[image] for attention in maps]))
    torch.testing.assert_close(flow.sum(dim=-1), torch.ones(2, 5))


@pytest.mark.parametrize("fused", [False, True])
def test_recorded_maps_are_what_the_model_multiplies_by(backbone: Callable[..., Any], fused: bool) -> None:
    """Recomputed from the first block's own queries and keys; the output and the fused setting stay as they were."""
    net = backbone(fused_attention=fused)
    images = torch.randn(2, 1, 28, 28)
    with torch.no_grad():
        before = net(images)
        with recorded_attention(net) as maps:
            recorded = net(images)
        tokens = net.model.blocks[0].norm1(net.prefix(images, 1))
        heads = TINY["num_heads"]
        queries, keys, _ = net.model.blocks[0].attn.qkv(tokens).view(2, 16, 3, heads, -1).permute(2, 0, 3, 1, 4)
        expected = (queries @ keys.transpose(2, 3) / (TINY["embed_dim"] / heads) ** 0.5).softmax(dim=-1)
    torch.testing.assert_close(recorded, before, rtol=1e-4, atol=1e-5)
    assert len(maps) == TINY["depth"]
    torch.testing.assert_close(maps[0], expected, rtol=1e-4, atol=1e-5)
    assert all(layer.fused_attn is fused and not layer.attn_drop._forward_hooks for layer in attention_layers(net))


@pytest.mark.parametrize(
    ("arguments", "pool"),
    [(AVERAGED, "model"), ({}, "model"), ({}, "class_and_mean"), ({"reg_tokens": 2}, "class_and_mean")],
)
def test_shares_follow_the_pooling(backbone: Callable[..., Any], arguments: dict, pool: str) -> None:
    net = backbone(arguments=TINY | arguments, pool=pool)
    with torch.no_grad(), recorded_attention(net) as maps:
        net(torch.randn(3, 1, 28, 28))
    shares = share_of_patches(net, maps)
    assert shares.shape == (3, 4, 4)
    torch.testing.assert_close(shares.sum(dim=(1, 2)), torch.ones(3))
    flow, prefix = rollout(maps), net.model.num_prefix_tokens
    rows = {"class": flow[:, 0, prefix:], "mean": flow[:, prefix:, prefix:].mean(dim=1)}
    wanted = rows["mean"] if arguments is AVERAGED else rows["class"]
    if pool == "class_and_mean":
        wanted = rows["class"] + rows["mean"]
    torch.testing.assert_close(shares.flatten(1), wanted / wanted.sum(dim=1, keepdim=True))


def test_eva_has_attention_and_swin_has_none(backbone: Callable[..., Any]) -> None:
    eva = backbone("eva02_tiny_patch14_224", {"depth": 2}, image_size=56)
    with torch.no_grad(), recorded_attention(eva) as maps:
        eva(torch.randn(2, 1, 56, 56))
    assert share_of_patches(eva, maps).shape == (2, 4, 4)
    assert attention_layers(backbone("swin_tiny_patch4_window7_224", SWIN, image_size=56)) == []
