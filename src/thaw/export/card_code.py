"""The lines of a model card that turn digits into probabilities; a folder is checked by running them."""

from torch import nn

from thaw.models.backbone import Backbone
from thaw.models.heads import MLPHead

BASELINE = '''\
import torch
from thaw.export.hub_folder import load_folder

model = load_folder(".")  # the folder of this card; thaw must be installed


@torch.inference_mode()
def probabilities(images):
    """uint8 (N, 28, 28), bright ink on black, prepared as MNIST's digits -> (N, 10)."""
    return model(images)[0]
'''


def timm_code(backbone: Backbone, head: nn.Module, folded: bool) -> str:
    """For a folder that timm loads.

    Args:
        backbone, head: what was exported.
        folded: whether the head is timm's classifier there.
    """
    steps = ["x = images[:, None] / 255  # (N, 1, 28, 28)"]
    if backbone.image_size != 28:
        steps.append(f'x = F.interpolate(x, {backbone.image_size}, mode="bilinear", antialias=True)')
    mean, std = ("[[[{}]]]".format("]], [[".join(f"{x:.10g}" for x in v)) for v in (backbone.mean, backbone.std))
    steps.append(f"x = (x - torch.tensor([{mean}])) / torch.tensor([{std}])")
    if backbone.channels > len(backbone.mean):
        steps.append(f"x = x.expand(-1, {backbone.channels}, -1, -1)")
    steps += ["return model(x).softmax(dim=1)"] if folded else [*features(backbone), *logits(head)]
    imports = ["import timm", "import torch"]
    imports += ["import torch.nn.functional as F"] if "F." in "".join(steps) else []
    loads = ['model = timm.create_model("local-dir:.", pretrained=True).eval()  # the folder of this card']
    if not folded:
        imports.append("from safetensors.torch import load_file")
        loads.append('head = load_file("head.safetensors")')
    return "\n".join(
        [
            *imports,
            "",
            *loads,
            "",
            "",
            "@torch.inference_mode()",
            "def probabilities(images):",
            '    """uint8 (N, 28, 28), bright ink on black, prepared as MNIST\'s digits -> (N, 10)."""',
            *(f"    {step}" for step in steps),
            "",
        ]
    )


def features(backbone: Backbone) -> list[str]:
    if backbone.pool == "model":
        return ["features = model(x)  # (N, D)"]
    return [
        "tokens = model.forward_features(x)  # (N, T, D)",
        "patches = tokens[:, model.num_prefix_tokens :].mean(dim=1)",
        "features = torch.cat([tokens[:, 0], patches], dim=1)  # (N, 2 D)",
    ]


def logits(head: nn.Module) -> list[str]:
    lines = []
    if isinstance(head.norm, nn.LayerNorm):
        lines.append("features = F.layer_norm(features, features.shape[1:])")
    elif isinstance(head.norm, nn.BatchNorm1d):
        lines.append('features = F.batch_norm(features, head["norm.running_mean"], head["norm.running_var"])')
    if isinstance(head, MLPHead):
        lines.append('features = F.gelu(F.linear(features, head["hidden.weight"], head["hidden.bias"]))')
    return [*lines, 'return F.linear(features, head["linear.weight"], head["linear.bias"]).softmax(dim=1)']
