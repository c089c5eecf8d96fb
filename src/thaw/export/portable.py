"""A trained classifier as one module that needs nothing of thaw: pixels as stored in, probabilities out.

Shapes: B batch, D feature width, h x w the grid of patches.
"""

import warnings

import torch
import torch.fx
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from thaw.data.preprocess import Preprocess
from thaw.freezing.lora import merge_lora
from thaw.lr_bank import LRBank
from thaw.models.attention import attention_layers, recorded_attention, share_of_patches
from thaw.models.heads import LinearHead
from thaw.predict.predictor import Predictor


class Portable(nn.Module):
    """uint8 (B, 28, 28) -> probabilities (B, 10), and where the backbone has attention each patch's share (B, h, w).

    Args:
        preprocess, backbone, head: of a classifier in eval mode.

    Attributes:
        outputs: their names.
    """

    def __init__(self, preprocess: Preprocess, backbone: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.preprocess, self.backbone, self.head = preprocess, backbone, head
        self.outputs = ["probabilities", "attention"] if attention_layers(backbone) else ["probabilities"]

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        with recorded_attention(self.backbone) as maps:  # of no layer, where there is no attention
            logits = self.head(self.backbone(self.preprocess(images)))  # (B, 10)
        probabilities = logits.softmax(dim=1)
        return (probabilities, share_of_patches(self.backbone, maps)) if maps else (probabilities,)


def portable(predictor: Predictor) -> Portable:
    """The predictor's model, which is changed in place: LoRA is merged, and of a bank of heads the chosen one is left.

    What the predictor says of its weights (`facts`) holds for what is exported from then on.
    """
    model = predictor.model
    merge_lora(model)
    if isinstance(model.head, LRBank):
        model.head = single_head(model.head)
    return Portable(model.preprocess, model.backbone, model.head).eval().requires_grad_(False)


def single_head(bank: LRBank) -> LinearHead:
    """The chosen head of a bank on its own."""
    linear = bank.heads[int(bank.chosen)]
    assert isinstance(linear, nn.Linear)
    head = LinearHead(linear.in_features, linear.out_features, "none")
    head.norm, head.linear = bank.norm, linear
    return head


def trace(model: Portable, name: str) -> ExportedProgram:
    """The computation as a graph, for any number of digits.

    Args:
        model: in fp32 on the CPU.
        name: of the architecture, for an error.

    Raises:
        ValueError: it does what torch.export cannot follow.
    """
    images = torch.zeros(2, 28, 28, dtype=torch.uint8)
    try:
        with torch.no_grad(), warnings.catch_warnings(action="ignore"):
            program = torch.export.export(model, (images,), dynamic_shapes=({0: Dim.DYNAMIC},))
    except Exception as error:  # torch.export raises dozens of classes for what it cannot follow
        reason = next(iter(str(error).strip().splitlines()), "no message")
        raise ValueError(
            f"torch.export cannot follow {name} ({type(error).__name__}: {reason}); "
            "format=hub_folder shares the weights without a graph."
        ) from error
    for module in program.graph_module.modules():
        for node in getattr(module, "graph", torch.fx.Graph()).nodes:
            node.meta.pop("stack_trace", None)  # names the files of this machine
    return program
