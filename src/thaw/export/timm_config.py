"""A backbone and its head as timm describes a model in a folder.

Shapes: D feature width, K classes.
"""

import inspect
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from thaw.models.backbone import Backbone
from thaw.models.heads import LinearHead


def timm_config(backbone: Backbone, classes: Sequence[str] | None) -> dict[str, Any]:
    """What timm reads from a folder's `config.json`.

    Args:
        backbone: whose weights are in the folder.
        classes: names of the classes, None for a folder without classifier.
    """
    made, model = backbone.architecture, backbone.model
    takes_size = "img_size" in inspect.signature(type(model).__init__).parameters
    stated = model.pretrained_cfg
    size = {"img_size": backbone.image_size} if takes_size else {}
    num_classes = len(classes or ())
    pool = made["arguments"].get("global_pool", getattr(model, "global_pool", None))
    return {
        "architecture": made["name"].partition(".")[0],
        "num_classes": num_classes,
        "num_features": model.num_features,
        **({"global_pool": pool} if isinstance(pool, str) else {}),
        **({"label_names": list(classes)} if classes else {}),
        "model_args": {"in_chans": backbone.channels, **size, **made["arguments"]},
        "pretrained_cfg": {
            "num_classes": num_classes,
            "input_size": [backbone.channels, backbone.image_size, backbone.image_size],
            "fixed_input_size": takes_size,
            "interpolation": "bilinear",
            "crop_pct": 1.0,
            "crop_mode": "center",
            "mean": per_channel(backbone.mean, backbone.channels),
            "std": per_channel(backbone.std, backbone.channels),
            "first_conv": stated["first_conv"],
            "classifier": stated["classifier"],
        },
    }


def per_channel(values: Sequence[float], channels: int) -> list[float]:
    return [*values] * channels if len(values) == 1 else [*values]


def fold_head(backbone: Backbone, head: nn.Module) -> dict[str, Tensor] | None:
    """The head as timm's own classifier, by the names of its tensors; None where that has no place for it.

    timm has a linear layer after its pooling, so the pooling must be timm's and the head linear. Standardised features
    are linear in the features: W (x - mean) / std + b = (W / std) x + (b - W mean / std). Normalising each digit's
    features by themselves is not.
    """
    name = backbone.model.pretrained_cfg["classifier"]
    if not isinstance(head, LinearHead) or isinstance(head.norm, nn.LayerNorm):
        return None
    if backbone.pool != "model" or not isinstance(name, str):
        return None
    weight, bias = head.linear.weight.double(), head.linear.bias.double()  # (K, D), (K,)
    if isinstance(head.norm, nn.BatchNorm1d):
        mean, variance = head.norm.running_mean, head.norm.running_var  # (D,)
        assert mean is not None and variance is not None
        weight = weight / (variance.double() + head.norm.eps).sqrt()
        bias = bias - weight @ mean.double()
    return {f"{name}.weight": weight.float(), f"{name}.bias": bias.float()}
