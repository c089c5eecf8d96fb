"""VPT-deep (Jia et al. 2022, arXiv:2203.12119): learned tokens at the input of each block, beside the image's own.

Shapes: B batch, T tokens, P prompt tokens, D width.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from thaw.freezing.added import Added
from thaw.freezing.blocks import EVA, VIT, chosen_blocks, extend
from thaw.models.backbone import Backbone
from thaw.run.values import Count

FULL_ATTENTION = "needs tokens that all see each other, without windows, convolutions or biases of relative positions"


class Prompt(Added):
    """P tokens (P, D), at the start uniform in +-bound, which stand after the first so many tokens of an image."""

    def __init__(self, count: int, width: int, bound: float, after: int) -> None:
        super().__init__()
        self.tokens = nn.Parameter(torch.empty(count, width).uniform_(-bound, bound))
        self.after = after


class Prompted(nn.Module):
    """A block that takes its own prompt along and drops what becomes of it, so that each block has a new one."""

    def forward(self, tokens: Tensor, **options: Any) -> Tensor:
        prompt: Any = self.prompt
        start, end = prompt.after, prompt.after + len(prompt.tokens)
        own = prompt.tokens.expand(tokens.shape[0], -1, -1)  # (B, P, D); len(tokens) would fix B on export
        tokens = torch.cat([tokens[:, :start], own, tokens[:, start:]], dim=1)  # (B, T + P, D)
        tokens = super().forward(tokens, **options)  # type: ignore[misc]  # the block's own: equation 7
        return torch.cat([tokens[:, :start], tokens[:, end:]], dim=1)  # (B, T, D)


def add_prompts(backbone: Backbone, last: int | None, count: Count) -> None:
    """Give each transformer block a prompt, `<block>.prompt`, after the class token and registers.

    A rotary embedding rotates what follows those tokens, but not the prompt.

    Args:
        backbone: changed in place.
        last: only in the last so many layers of the backbone, so that what lies below can be cached; None is all.
        count: P.

    Raises:
        UserError: the backbone has no tokens that all see each other, or `last` is out of its range.
    """
    model: Any = backbone.model
    for block in chosen_blocks(backbone, "prompt", last, (VIT, EVA), FULL_ATTENTION):
        width = len(block.norm1.weight)
        bound = math.sqrt(
            6 / (backbone.channels * math.prod(model.patch_embed.patch_size) + width)
        )  # Xavier's, as in the paper
        block.prompt = Prompt(count, width, bound, model.num_prefix_tokens)
        if hasattr(block.attn, "num_prefix_tokens"):  # those that a rotary embedding leaves alone
            block.attn.num_prefix_tokens += count
        extend(block, Prompted)
