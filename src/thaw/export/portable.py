"""A trained classifier as one module: pixels as they are stored in, probabilities out."""

import warnings
from collections.abc import Sequence
from typing import Any

import torch
import torch.fx
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from thaw.data.preprocess import Preprocess
from thaw.freezing.added import merge_added
from thaw.lr_bank import LRBank
from thaw.models.attention import attention_layers
from thaw.models.heads import LinearHead
from thaw.predict.average import Average, Views
from thaw.predict.predictor import Predictor
from thaw.run.errors import UserError
from thaw.task import check_single_label


class Portable(nn.Module):
    """uint8 (B, C, H, W) -> probabilities (B, K), in a tuple of one, as earlier files and cards have them."""

    def __init__(self, preprocess: Preprocess, backbone: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.preprocess, self.backbone, self.head = preprocess, backbone, head

    def forward(self, images: Tensor) -> tuple[Tensor]:
        return (self.head(self.backbone(self.preprocess(images))).softmax(dim=1),)


class PortableAverage(nn.Module):
    """uint8 (B, C, H, W) -> the mean over models and views of the probabilities (B, K), in a tuple of one."""

    def __init__(self, members: Sequence[Portable], views: Views) -> None:
        super().__init__()
        self.members, self.views = nn.ModuleList(members), views

    def forward(self, images: Tensor) -> tuple[Tensor]:
        given = [member(view)[0] for view in self.views(images) for member in self.members]
        return (torch.stack(given).mean(dim=0),)


def portable(predictor: Predictor) -> Portable | PortableAverage:
    """The predictor's model, changed in place.

    Added parameters are merged where they can be, and a bank of heads is replaced by its chosen head. From then on
    `predictor.facts()` describes the exported weights.
    """
    model = predictor.model
    check_single_label(model.task, "export.py")
    if isinstance(model, Average):
        return PortableAverage([plain_portable(member) for member in model.members], model.views)
    return plain_portable(model)


def plain_portable(model: Any) -> Portable:
    merge_added(model)
    if isinstance(model.head, LRBank):
        bank, linear = model.head, model.head.heads[int(model.head.chosen)]
        assert isinstance(linear, nn.Linear)
        model.head = LinearHead(linear.in_features, linear.out_features, "none")
        model.head.norm, model.head.linear = bank.norm, linear
    return Portable(model.preprocess, model.backbone, model.head).eval().requires_grad_(False)


def trace(model: Portable | PortableAverage, name: str, shape: Sequence[int]) -> ExportedProgram:
    """The computation of a model in fp32 on the CPU as a graph, for any number of images of the shape (C, H, W).

    A UserError names a model that cannot be traced.
    """
    images = torch.zeros(2, *shape, dtype=torch.uint8)
    for part in model.modules():
        for layer in attention_layers(part.backbone) if isinstance(part, Portable) else ():
            layer.fused_attn = False  # type: ignore[assignment]  # plain matrix products, as in all earlier files
    try:
        with torch.no_grad(), warnings.catch_warnings(action="ignore"):
            program = torch.export.export(model, (images,), dynamic_shapes=({0: Dim.DYNAMIC},))
    except Exception as error:  # torch.export raises dozens of classes
        reason = next(iter(str(error).strip().splitlines()), "no message")
        raise UserError(
            f"torch.export cannot follow {name} ({type(error).__name__}: {reason}); "
            "format=hub_folder shares the weights without a graph."
        ) from error
    for module in program.graph_module.modules():
        for node in getattr(module, "graph", torch.fx.Graph()).nodes:
            node.meta.pop("stack_trace", None)  # names the files of this machine
    return program
