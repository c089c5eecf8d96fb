"""AdaptFormer (Chen et al. 2022, arXiv:2205.13535): a narrow trainable branch beside the frozen MLP of each block.

Shapes: B batch, T tokens, D width.
"""

from typing import Any, Literal

from torch import Tensor, nn

from thaw.freezing.added import Added
from thaw.freezing.blocks import EVA, SWIN, VIT, chosen_blocks, extend
from thaw.models.backbone import Backbone
from thaw.run.errors import UserError
from thaw.run.values import Count, Positive

SHARE = 12  # the paper's bottleneck of 64 is a twelfth of ViT-B's width
BESIDE_MLP = "adds a branch beside the MLP of a transformer block"


class Adapter(Added):
    """(B, T, D) -> (B, T, D): s ReLU(x W_down) W_up, equation 2. W_up starts at 0, and the model as it was."""

    def __init__(self, width: int, bottleneck: int, scale: float) -> None:
        super().__init__()
        self.down, self.up, self.scale = nn.Linear(width, bottleneck), nn.Linear(bottleneck, width), scale
        nn.init.kaiming_normal_(self.down.weight)
        for start in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(start)

    def forward(self, normed: Tensor) -> Tensor:
        return self.scale * self.up(self.down(normed).relu())


class Adapted(nn.Module):
    """A block whose adapter adds to the residual stream itself: layer scale and drop path are the MLP's alone."""

    def forward(self, tokens: Tensor, **options: Any) -> Tensor:
        block: Any = self
        attend = getattr(block, "_attn", block.attn)  # Swin's, in windows
        tokens = tokens + block.drop_path1(scaled(block, 1, attend(block.norm1(tokens), **options)))
        normed = block.norm2(tokens)
        return tokens + block.drop_path2(scaled(block, 2, block.mlp(normed))) + block.adapter(normed)  # equation 3


def scaled(block: Any, number: int, branch: Tensor) -> Tensor:
    """The output of a block's first or second branch times its layer scale, where there is one."""
    if (gamma := getattr(block, f"gamma_{number}", None)) is not None:  # of EVA
        return gamma * branch
    scale = getattr(block, f"ls{number}", None)
    return branch if scale is None else scale(branch)


def add_adapters(backbone: Backbone, last: int | None, bottleneck: Count | Literal["auto"], scale: Positive) -> None:
    """Give each transformer block an adapter, `<block>.adapter`.

    Args:
        backbone: changed in place.
        last: only in the last so many layers of the backbone, so that what lies below can be cached; None is all.
        bottleneck: width of the adapter; `auto` is a twelfth of the block's.
        scale: s.

    Raises:
        UserError: the backbone has no transformer blocks, or a number out of its range.
    """
    for block in chosen_blocks(backbone, "adapter", last, (VIT, EVA, SWIN), BESIDE_MLP):
        width = len(block.norm2.weight)
        size = max(1, width // SHARE) if bottleneck == "auto" else bottleneck
        if size > width:
            raise UserError(f"freeze.adapter.bottleneck={size} must be at most {width}, the width of a block, or auto.")
        block.adapter = Adapter(width, size, scale)
        extend(block, Adapted)
