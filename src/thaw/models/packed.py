"""Blocks of a ViT in bf16 on a CPU, without gradients: weights in oneDNN's own order, residuals added in the product.

The residual stream is bf16, too, where autocast keeps it in fp32: features of the bundled ViT differ by 0.7 % from
those in fp32, autocast's by 0.5 %.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from thaw.models.backbone import Backbone
from thaw.models.chain import Layer, blocks_of

PLAIN_BLOCK = {  # the types of a block's parts, but for its activation, its LayerScales and its dropout
    **{"": "Block", "norm1": "LayerNorm", "norm2": "LayerNorm", "attn": "Attention", "mlp": "Mlp"},
    **{"attn.qkv": "Linear", "attn.q_norm": "Identity", "attn.k_norm": "Identity", "attn.norm": "Identity"},
    **{"attn.proj": "Linear", "mlp.fc1": "Linear", "mlp.norm": "Identity", "mlp.fc2": "Linear"},
}


class PackedLinear:
    """A frozen linear layer, (..., D) -> (..., E)."""

    def __init__(self, linear: nn.Linear, scale: nn.Module) -> None:
        """`scale` follows the layer: a LayerScale of E factors (Touvron et al. 2021, equation 4), or the identity."""
        factors = getattr(scale, "gamma", torch.ones(linear.out_features)).detach()  # (E,)
        weight = (factors[:, None] * linear.weight.detach()).bfloat16()  # (E, D)
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight)
        self.bias = None if linear.bias is None else (factors * linear.bias.detach()).bfloat16()

    def __call__(self, tokens: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(tokens, self.weight, self.bias, "none", [], "")

    def add(self, residual: Tensor, tokens: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise.binary(tokens, residual, self.weight, self.bias, "add")


class PackedNorm:
    def __init__(self, norm: nn.LayerNorm) -> None:
        self.shape, self.eps = norm.normalized_shape, norm.eps
        self.weight, self.bias = norm.weight.detach().bfloat16(), norm.bias.detach().bfloat16()

    def __call__(self, tokens: Tensor) -> Tensor:
        return F.layer_norm(tokens, self.shape, self.weight, self.bias, self.eps)


class PackedBlock:
    """A block of timm's ViT: tokens (B, T, D) in bf16 -> (B, T, D), or (B, 1, D) where the pooling is known.

    Args:
        pool: of the features, if this is the last block: `token` reads the first token, `avg` the mean of all. What is
            not read is not computed.
    """

    def __init__(self, block: Any, pool: str) -> None:
        identity, attention, mlp = nn.Identity(), block.attn, block.mlp
        self.heads, self.activation, self.pool = attention.num_heads, mlp.act, pool
        self.norm1, self.norm2 = PackedNorm(block.norm1), PackedNorm(block.norm2)
        self.qkv, self.proj = PackedLinear(attention.qkv, identity), PackedLinear(attention.proj, block.ls1)
        self.fc1, self.fc2 = PackedLinear(mlp.fc1, identity), PackedLinear(mlp.fc2, block.ls2)

    def __call__(self, tokens: Tensor) -> Tensor:
        qkv = self.qkv(self.norm1(tokens)).unflatten(2, (3, self.heads, -1))  # (B, T, 3, H, D / H)
        attended = F.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4))  # (B, H, T, D / H)
        attended = attended.transpose(1, 2).flatten(2)  # (B, T, D)
        if self.pool == "token":
            tokens, attended = tokens[:, :1], attended[:, :1]
        tokens = self.proj.add(tokens, attended)
        hidden = self.activation(self.fc1(self.norm2(tokens)))  # (B, T, 4 D)
        if self.pool == "avg":  # the mean passes a linear layer
            tokens, hidden = tokens.mean(1, keepdim=True), hidden.mean(1, keepdim=True)
        return self.fc2.add(tokens, hidden)


def can_pack(backbone: Backbone, cut: int) -> bool:
    """Whether this CPU multiplies in bf16, and the blocks below the cut are of the kind that `PackedBlock` computes."""
    if not backbone.is_chain or backbone.architecture.get("compiled"):
        return False
    blocks = blocks_of(backbone.model)[: cut - 1]
    return multiplies_in_bf16() and all(len(each) == 1 and is_plain(each[0]) for each in blocks)


def multiplies_in_bf16() -> bool:
    """Whether oneDNN is there, and this CPU has instructions for it."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def is_plain(block: nn.Module) -> bool:
    """Whether a block is timm's own, without hooks and without parts that `PackedBlock` would leave out."""
    modules = dict(block.named_modules())
    kinds = {name: type(module).__name__ for name, module in modules.items()}
    others = {kind for name, kind in kinds.items() if name not in PLAIN_BLOCK and name != "mlp.act"}
    return (
        type(block).__module__ == "timm.models.vision_transformer"
        and PLAIN_BLOCK.items() <= kinds.items()
        and others <= {"Identity", "Dropout", "DropPath", "LayerScale"}
        and all(modules[norm].weight is not None and modules[norm].bias is not None for norm in ("norm1", "norm2"))
        and all(type(module).__module__.startswith(("torch.nn.", "timm.")) for module in modules.values())
        and not any(module._forward_hooks or module._forward_pre_hooks for module in modules.values())
    )


@torch.no_grad()
def packed_prefix(backbone: Backbone, cut: int) -> Layer:
    """`backbone.prefix(images, cut)` with packed blocks, called under autocast in bf16."""
    stem, *_, last = backbone.layers
    model, blocks, is_whole = backbone.model, blocks_of(backbone.model), cut == backbone.num_layers
    is_usual = type(model).__name__ == "VisionTransformer" and model.attn_pool is None and backbone.pool == "model"
    pool = model.global_pool if is_whole and is_usual else ""
    if pool == "avg" and (model.num_prefix_tokens or not isinstance(model.norm, nn.Identity)):
        pool = ""
    packed = [PackedBlock(block, pool if block is blocks[-1][0] else "") for (block,) in blocks[: cut - 1]]

    def run(images: Tensor) -> Tensor:
        tokens = stem(images).bfloat16()
        for block in packed:
            tokens = block(tokens)
        return last(tokens.float()) if is_whole else tokens

    return run
