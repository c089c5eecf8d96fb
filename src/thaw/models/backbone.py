"""Vision backbones from timm, images (B, C, S, S) -> features (B, D). The only file that imports timm."""

import logging
import sys
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import timm
import timm.models
import torch
from torch import Tensor, nn

log = logging.getLogger(__name__)

BUNDLED = files("thaw.models") / "weights" / "digits_vit.safetensors"
HUB_TIMEOUT = 5.0  # seconds without an answer from the hub


class Backbone(nn.Module):
    """A timm model without its classifier, holding weights from a named place.

    Args:
        name: a timm model name, e.g. `vit_small_patch14_dinov2`.
        weights: `none` (random), `bundled` (this repository's digits ViT), `hub` (what timm names for the model on
            the Hugging Face hub) or the path of a .safetensors or .pth file of the model's state dict.
        image_size: S, pixels; position embeddings are resampled to it.
        channels: C, 1 or 3; a first layer of three channels is summed for one.
        pool: `model` for the pooling that timm defines for it, or `class_and_mean` for the class token next to the
            mean of the patch tokens, (B, 2 D), the features of DINOv2's linear probes (Oquab et al. 2023).
        mean, std: of the pixels in [0, 1] that the weights expect; None means what timm states for the model.
        fused_attention: use torch's fused attention; at 17 tokens plain attention trains faster in bf16 on a CPU.
        arguments: passed to the timm model, e.g. `{depth: 6, drop_path_rate: 0.1}`.

    Attributes:
        fresh: names of the parameters that no weights filled.
        num_features: D of what `forward` returns.

    Raises:
        ValueError: unknown name, size that the model cannot take, weights that do not fit or are not weights.
        ConnectionError: hub weights that cannot be fetched.
    """

    def __init__(
        self,
        name: str,
        weights: str,
        image_size: int,
        channels: int,
        pool: Literal["model", "class_and_mean"],
        mean: Sequence[float] | None,
        std: Sequence[float] | None,
        fused_attention: bool,
        arguments: Mapping[str, Any],
    ) -> None:
        super().__init__()
        self.image_size, self.channels, self.pool = image_size, channels, pool
        self.model = create(name, image_size, channels, dict(arguments))
        stated = self.model.pretrained_cfg
        self.mean, self.std = (match_channels(given or stated[key], channels) for key, given in (("mean", mean), ("std", std)))
        for module in self.model.modules():
            if hasattr(module, "fused_attn"):
                module.fused_attn = fused_attention
        self.num_features: int = self.model.num_features
        if pool == "class_and_mean":
            if not getattr(self.model, "has_class_token", False):
                raise ValueError(f"backbone.pool=class_and_mean needs a class token, {name} has none; use pool=model.")
            self.num_features *= 2
        elif pool != "model":
            raise ValueError(f"backbone.pool={pool!r} is unknown; choose model or class_and_mean.")
        self.weights = weights
        self.fresh = frozenset(dict(self.named_parameters()) if weights == "none" else ())
        if weights != "none":
            load_weights(self.model, name, weights)

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, S, S) -> (B, num_features)."""
        tokens = self.model.forward_features(images)  # (B, T, D) for a ViT
        if self.pool == "class_and_mean":
            patches = tokens[:, self.model.num_prefix_tokens :]
            return torch.cat([tokens[:, 0], patches.mean(dim=1)], dim=1)  # (B, 2 D)
        return self.model.forward_head(tokens, pre_logits=True)  # (B, D)

    def depths(self) -> dict[str, int]:
        """Depth of every parameter: 0 for the stem, 1 for the first block, ..., by timm's `group_matcher`."""
        matcher = self.model.group_matcher(coarse=False)
        depths = timm.models.group_parameters(self.model, matcher, reverse=True)
        return {f"model.{name}": depth for name, depth in depths.items()}


def create(name: str, image_size: int, channels: int, arguments: dict[str, Any]) -> nn.Module:
    """Build a timm model without classifier and with random weights."""
    if not timm.is_model(name):
        close = timm.list_models(f"*{name.split('_')[0]}*")[:8]
        raise ValueError(f"backbone.name={name!r} is not a timm model; similar names: {', '.join(close) or 'none'}.")
    if channels not in (1, 3):
        raise ValueError(f"backbone.channels={channels} must be 1 or 3.")
    taken = {"pretrained": False, "num_classes": 0, "in_chans": channels}
    try:
        try:
            model = timm.create_model(name, img_size=image_size, **taken, **arguments)
        except TypeError as error:
            if "img_size" not in str(error):
                raise
            model = timm.create_model(name, **taken, **arguments)  # convolutional nets take any size
    except (TypeError, AssertionError) as error:
        raise ValueError(f"backbone.name={name} cannot be built with image_size={image_size}, {arguments}: {error}") from error
    patch = getattr(getattr(model, "patch_embed", None), "patch_size", (1,))[0]
    if image_size % patch:
        nearest = max(patch, round(image_size / patch) * patch)
        raise ValueError(
            f"backbone.image_size={image_size} is not divisible by the patch size {patch} of {name}; "
            f"choose a multiple, e.g. {nearest}."
        )
    return model


def match_channels(values: Sequence[float], channels: int) -> tuple[float, ...]:
    """Mean or std with one number for each channel; three are averaged for one grey channel."""
    if len(values) in (1, channels):
        return tuple(values)
    return (sum(values) / len(values),)


def load_weights(model: nn.Module, name: str, weights: str) -> None:
    """Fill a timm model from a file, strictly.

    Every parameter must be in the file with its shape, after timm's own conversion of the model's published
    checkpoints (which resamples position embeddings). The one exception: classifier tensors of the file are
    left out, as the model has no classifier.
    """
    path = locate(model, weights)
    state = read_weights(path)
    convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    first = model.pretrained_cfg.get("first_conv")
    classifier = model.pretrained_cfg.get("classifier") or "head"
    classifiers = (classifier,) if isinstance(classifier, str) else tuple(classifier)
    try:
        if convert is not None:
            state = convert(state, model)
        stem = f"{first}.weight"
        if stem in state and model.get_parameter(stem).shape[1] == 1 and state[stem].shape[1] == 3:
            state[stem] = timm.models.adapt_input_conv(1, state[stem])
        state = {key: value for key, value in state.items() if not key.startswith(tuple(f"{c}." for c in classifiers))}
        wanted = model.state_dict()
    except (RuntimeError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"backbone.weights={path} cannot be converted for {name}: {error}") from error
    problems = [
        *(f"missing {key}" for key in wanted.keys() - state.keys()),
        *(f"unexpected {key}" for key in state.keys() - wanted.keys()),
        *(
            f"{key} is {tuple(state[key].shape)}, the model has {tuple(wanted[key].shape)}"
            for key in wanted.keys() & state.keys()
            if state[key].shape != wanted[key].shape
        ),
    ]
    if problems:
        shown = "; ".join(sorted(problems)[:6]) + (f"; and {len(problems) - 6} more" if len(problems) > 6 else "")
        raise ValueError(
            f"backbone.weights={path} does not fit backbone.name={name} ({len(problems)} differences: {shown}). "
            "Choose the backbone that the weights were made for, or other weights."
        )
    model.load_state_dict(state)


def locate(model: nn.Module, weights: str) -> Path:
    """The local file that a `weights` setting means, fetched from the hub if need be."""
    if weights == "bundled":
        return Path(str(BUNDLED))
    if weights != "hub":
        path = Path(weights).expanduser()
        if not path.is_file():
            raise ValueError(f"backbone.weights={weights!r} is no file; choose none, bundled, hub or an existing file.")
        return path
    repository = model.pretrained_cfg.get("hf_hub_id")
    name = model.pretrained_cfg["architecture"]
    if not repository:
        raise ValueError(f"timm names no hub weights for {name}; set backbone.weights to none or to a file.")
    from huggingface_hub import hf_hub_download

    file = model.pretrained_cfg.get("hf_hub_filename") or "model.safetensors"
    try:
        return Path(hf_hub_download(repository, file, etag_timeout=HUB_TIMEOUT))
    except Exception as error:  # the hub client raises a dozen unrelated classes
        raise ConnectionError(
            f"The weights of {name} could not be fetched: {file} of https://huggingface.co/{repository} "
            f"({type(error).__name__}). Download that file elsewhere and set backbone.weights=<path>, "
            "or use backbone=digits_vit, whose weights are bundled."
        ) from error


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read a state dict without executing code; ValueError says why a file is not one."""
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # each format has its own exceptions for a file that is not of it
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"backbone.weights={path} is not a readable weights file ({reason}); "
            "allowed are .safetensors and .pth files that hold tensors and no pickled code."
        ) from error
    for key in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"backbone.weights={path} holds no state dict (names to tensors), but {type(state).__name__}.")
    return state
