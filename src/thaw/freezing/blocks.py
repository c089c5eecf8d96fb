"""The transformer blocks of a backbone to which a policy adds a module of its own."""

from collections.abc import Collection
from typing import Any

from torch import nn

from thaw.freezing.added import lowest_layer
from thaw.models.backbone import Backbone
from thaw.models.chain import blocks_of
from thaw.run.errors import UserError

VIT, EVA = "timm.models.vision_transformer.Block", "timm.models.eva.EvaBlock"
SWIN = "timm.models.swin_transformer.SwinTransformerBlock"


def chosen_blocks(backbone: Backbone, method: str, last: int | None, kinds: Collection[str], need: str) -> list[Any]:
    """The blocks in the last so many layers of a backbone, all for None.

    Args:
        backbone: a chain of layers.
        method: the name of the policy, e.g. `adapter`.
        last: from 1 to the number of the backbone's layers.
        kinds: classes of blocks that the method knows.
        need: what the method does or needs, for the error.

    Raises:
        UserError: a block of another kind, or more layers than there are.
    """
    blocks = [block[-1] for block in blocks_of(backbone.model)] if backbone.is_chain else []
    found = {f"{type(block).__module__}.{type(block).__qualname__}" for block in blocks}
    if not found or not found <= set(kinds):
        built = f"is made of {', '.join(sorted(found))}" if found else "is not a chain of blocks"
        raise UserError(
            f"freeze={method} {need}; this backbone {built}. It knows {', '.join(kinds)}: choose such a backbone, e.g. "
            "a ViT, or another policy, e.g. freeze=bias_only."
        )
    return blocks[max(0, lowest_layer(backbone, method, last) - 1) :]  # layer 0 is the stem


def extend(block: Any, extension: type[nn.Module]) -> None:
    """Give one block the `forward` of an extension, which may call the block's own by `super`."""
    own = type(block)
    block.__class__ = type(f"{extension.__name__}{own.__name__}", (extension, own), {})
