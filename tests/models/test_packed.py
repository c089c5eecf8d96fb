"""Packed blocks against timm's own in fp32, and the models that they must leave alone."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from thaw.models.backbone import Backbone
from thaw.models.packed import can_pack, multiplies_in_bf16, packed_prefix

Build = Callable[..., Backbone]

TINY = {"depth": 2, "embed_dim": 64, "num_heads": 2}
MODELS: dict[str, dict[str, Any]] = {
    "the bundled model's kind": {"arguments": {**TINY, "class_token": False, "global_pool": "avg"}},
    "class token": {"arguments": TINY},
    "class token and mean": {"arguments": TINY, "pool": "class_and_mean"},
    "mean of patches beside a class token": {"arguments": {**TINY, "global_pool": "avg"}},
    "a norm before the mean": {
        "arguments": {**TINY, "class_token": False, "global_pool": "avg", "final_norm": True, "fc_norm": False}
    },
    "maximum": {"arguments": {**TINY, "class_token": False, "global_pool": "max"}},
    "DINOv2, with registers": {"name": "vit_small_patch14_reg4_dinov2", "arguments": TINY, "channels": 3},
    "CLIP, with a norm before the blocks": {"name": "vit_base_patch16_clip_quickgelu_224", "arguments": TINY},
    "no bias": {"arguments": {**TINY, "qkv_bias": False}},
    "distilled": {"name": "deit_tiny_distilled_patch16_224", "arguments": TINY},
}
OTHERS: dict[str, dict[str, Any]] = {
    "queries with a norm": {"arguments": {**TINY, "qk_norm": True}},
    "a norm before the projection": {"arguments": {**TINY, "scale_attn_norm": True}},
    "parallel blocks": {"name": "vit_small_patch16_18x2_224", "arguments": TINY},
    "rotary embeddings": {"name": "vit_small_patch16_dinov3", "arguments": TINY},
    "windows": {"name": "swin_tiny_patch4_window7_224", "image_size": 56, "arguments": {}},
    "convolutions": {"name": "resnet18", "image_size": 56, "arguments": {}},
}
needs_bf16 = pytest.mark.skipif(not multiplies_in_bf16(), reason="oneDNN does not multiply in bf16 on this CPU")


def built(settings: dict[str, Any]) -> Backbone:
    side = 56 if "14" in settings.get("name", "") else 64
    usual = {"name": "vit_tiny_patch16_224", "weights": "none", "image_size": side, "channels": 1, "pool": "model"}
    torch.manual_seed(0)
    model = Backbone(**usual | {"mean": None, "std": None, "fused_attention": True} | settings).eval()
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:  # norms, biases and LayerScales that are not as they begin
            nn.init.uniform_(parameter, 0.5, 1.5) if "bias" not in name else nn.init.normal_(parameter, std=0.1)
    return model


@needs_bf16
@pytest.mark.parametrize("kind", MODELS)
@torch.no_grad()
def test_packed_blocks_give_what_the_model_gives(kind: str) -> None:
    model = built(MODELS[kind])
    images = torch.randn(8, model.channels, model.image_size, model.image_size)
    for cut in range(1, model.num_layers + 1):
        assert can_pack(model, cut)
        exact = model.prefix(images, cut)
        with torch.autocast("cpu", torch.bfloat16):
            packed = packed_prefix(model, cut)(images)
        assert packed.shape == exact.shape and (packed.float() - exact).norm() < 0.012 * exact.norm()


@pytest.mark.parametrize("kind", OTHERS)
def test_other_blocks_are_not_packed(kind: str) -> None:
    assert not can_pack(built(OTHERS[kind]), 2)


class Twice(nn.Linear):
    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(tokens)


def test_changed_blocks_are_not_packed() -> None:
    model = built(MODELS["class token"])
    second = model.model.blocks[1]
    hook = second.mlp.fc1.register_forward_hook(lambda *_: None)
    assert not can_pack(model, 3)
    hook.remove()
    second.mlp.fc2 = Twice(256, 64)
    assert not can_pack(model, 3) and not can_pack(model, 4)
    second.mlp.fc2 = nn.Linear(256, 64)
    second.ls1 = Twice(64, 64)
    assert not can_pack(model, 3)
    second.ls1, second.norm2 = nn.Identity(), nn.LayerNorm(64, elementwise_affine=False)
    assert not can_pack(model, 3)
    model.compile_layers()
    assert not can_pack(model, 2)
