"""Vision backbones from timm, images (B, C, S, S) -> features (B, D). The only file that imports timm."""

import difflib
import inspect
import math
import os
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import timm
import timm.models
import torch
from omegaconf import OmegaConf
from timm.layers import PatchEmbed
from timm.models import ConvNeXt
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from thaw.models.chain import Layer, TimmModel, blocks_of, chain, count_tokens, is_convolutional, places
from thaw.models.pretrained import check_fit, locate, read_weights
from thaw.run.console import some
from thaw.run.errors import UserError
from thaw.run.values import Count


class Backbone(nn.Module):
    """A timm model without its classifier, with weights from a file.

    Args:
        name: a timm model name, e.g. `vit_small_patch14_dinov2`; a tag after a dot, as in
            `vit_base_patch16_224.augreg_in21k`, chooses among its weights on the hub.
        weights: `none` (random), `bundled` (this repository's digits ViT), `hub` (timm's weights of the model on the
            Hugging Face hub) or the path of a .safetensors or .pth file of the model's state dict.
        image_size: S, pixels; position embeddings are resampled to it.
        channels: C; a first layer of three channels is summed for one.
        pool: `model` for timm's own pooling, or `class_and_mean` for the class token next to the mean of the patch
            tokens, (B, 2 D), the features of DINOv2's linear probes (Oquab et al. 2023).
        mean, std: of the pixels in [0, 1] that the weights expect; None stands for timm's values of the model.
        fused_attention: use torch's fused attention; at 16 tokens plain attention trains faster in bf16 on a CPU.
        arguments: passed to the timm model, e.g. `{depth: 6, drop_path_rate: 0.1}`.

    Attributes:
        fresh: names of the parameters with random weights.
        num_features: D of the output of `forward`.
        layers: stem, each block, and final norm with pooling, applied one after the other. A model that is not such a
            chain (ResNet, ...) is a single layer.
        is_chain: whether there are several layers.
        num_layers: how many they are.
        num_tokens: T after the stem; in a convolutional net, the number of positions at a stride of 16.

    Raises:
        UserError: unknown name, size that the model cannot take, weights that do not fit or are not weights.
        UnreachableError: hub weights that cannot be fetched.
    """

    def __init__(
        self,
        name: str,
        weights: str,
        image_size: Count,
        channels: Literal[1, 3],
        pool: Literal["model", "class_and_mean"],
        mean: Sequence[float] | None,
        std: Sequence[float] | None,
        fused_attention: bool,
        arguments: Mapping[str, Any],
    ) -> None:
        super().__init__()
        self.image_size, self.channels, self.pool = image_size, channels, pool
        arguments = {key: OmegaConf.to_object(x) if OmegaConf.is_config(x) else x for key, x in arguments.items()}
        self.model = create(name, image_size, channels, arguments)
        for module in self.model.modules() if is_convolutional(self.model) else ():
            if isinstance(module, nn.Conv2d):
                module.to(memory_format=torch.channels_last)  # nearly twice as fast on a CPU in bf16
        stated = self.model.pretrained_cfg
        self.mean = match_channels("mean", stated["mean"] if mean is None else mean, channels)
        self.std = match_channels("std", stated["std"] if std is None else std, channels)
        for module in self.model.modules():
            if hasattr(module, "fused_attn"):
                module.fused_attn = fused_attention
        self.num_features: int = self.model.head_hidden_size  # after forward_head; its num_features is before
        if pool == "class_and_mean":
            if getattr(self.model, "cls_token", None) is None:
                raise UserError(f"backbone.pool=class_and_mean needs a class token, {name} has none; use pool=model.")
            self.num_features = 2 * self.model.num_features
        self.architecture: dict[str, Any] = {  # everything but the weights that shapes the features, as values of JSON
            **{"timm": timm.__version__, "name": name, "arguments": arguments, "image_size": image_size},
            **{"channels": channels, "pool": pool, "mean": self.mean, "std": self.std, "fused": fused_attention},
        }
        image = torch.linspace(-1, 1, channels * image_size**2).reshape(1, channels, image_size, -1)
        tokens = count_tokens(self.model, image)
        self.is_chain = tokens > 0
        self.places = {f"model.{name}": layer for name, layer in places(self.model).items()} if tokens else {}
        self.num_tokens = tokens or math.ceil(image_size / 16) ** 2
        self.num_layers = len(self.layers)
        self.weights = weights
        self.fresh = frozenset(dict(self.named_parameters()) if weights == "none" else ())
        if weights != "none":
            load_weights(self.model, name, weights)

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, S, S) -> (B, num_features)."""
        return self.suffix(images, 0)

    def prefix(self, images: Tensor, cut: int) -> Tensor:
        """Images (B, C, S, S) after the first `cut` layers: tokens (B, T, D) in a ViT, features after the last."""
        for layer in self.layers[:cut]:
            images = layer(images)
        return images

    def suffix(self, tokens: Tensor, cut: int) -> Tensor:
        """The output of `prefix` -> features (B, num_features)."""
        if cut == self.num_layers:
            return tokens
        for layer in self.layers[cut:]:
            tokens = layer(tokens)
        return tokens

    def compile_layers(self) -> None:
        """Compile each block; see `compile_each`."""
        compile_each([block[-1] for block in blocks_of(self.model)] if self.is_chain else self.model.children())
        self.architecture["compiled"] = True

    def save_folder(self, folder: Path, classifier: nn.Linear | None, classes: Sequence[str]) -> None:
        """Write `model.safetensors` and `config.json` for `timm.create_model("local-dir:<folder>")`.

        `classifier` becomes timm's own; without one the model gives features. `classes` are names.
        """
        published = ("tag", "license", "description", "origin_url", "paper_name", "paper_ids", "notes")
        config: dict[str, Any] = {"pretrained_cfg": dict.fromkeys(published)}  # facts about weights of timm, not these
        made, weights = self.architecture, self.model.state_dict()
        if classifier:
            name = self.model.pretrained_cfg["classifier"]
            weights |= {f"{name}.{key}": tensor for key, tensor in classifier.state_dict().items()}
            config["label_names"] = list(classes)
        num_classes = len(classes) if classifier else 0
        model = create(made["name"], self.image_size, self.channels, made["arguments"], num_classes)
        model.load_state_dict(weights)
        image = {"input_size": (self.channels, self.image_size, self.image_size), "mean": self.mean, "std": self.std}
        crop = {"interpolation": "bilinear", "crop_pct": 1.0, "crop_mode": "center"}
        timm.models.save_for_hf(model, str(folder), config, safe_serialization=True, data_config=image | crop)

    def new_block(self, width: int, heads: int) -> nn.Module:
        """A transformer block of timm's with random weights and this backbone's kind of attention, (B, T, width)."""
        block = Block(width, heads, qkv_bias=True)
        block.attn.fused_attn = self.architecture["fused"]
        return block

    def layers_state(self, cut: int) -> dict[str, Tensor]:
        """Parameters and buffers of the first `cut` layers."""
        return {name: tensor for name, tensor in self.state_dict().items() if self.layer_of(name) < cut}

    @property
    def layers(self) -> list[Layer]:
        if not self.is_chain:
            return [lambda images: self.pooled(self.model.forward_features(images))]
        stem, blocks, norm = chain(self.model)
        return [stem, *blocks, lambda tokens: self.pooled(norm(tokens))]

    def layer_of(self, parameter: str) -> int:
        """Index of a parameter's layer; those neither in a block nor after the blocks belong to the stem."""
        return next((layer for place, layer in self.places.items() if parameter.startswith(place)), 0)

    def pooled(self, tokens: Tensor) -> Tensor:
        """(B, T, D) for a ViT -> (B, num_features)."""
        if self.pool == "class_and_mean":
            patches = tokens[:, self.model.num_prefix_tokens :]
            return torch.cat([tokens[:, 0], patches.mean(dim=1)], dim=1)  # (B, 2 D)
        return self.model.forward_head(tokens, pre_logits=True)  # (B, D)

    def depths(self) -> dict[str, int]:
        """Depth of every parameter: 0 for the stem, 1 for the first block, and so on, as the layers are cut.

        A final norm or attention pool after the blocks has the depth of the last block. For models that are not a
        chain, depths are those of timm's `group_matcher`.
        """
        if self.is_chain:
            last = max(self.places.values()) - 1
            return {name: min(self.layer_of(name), last) for name, _ in self.named_parameters()}
        matcher = self.model.group_matcher(coarse=False)
        if isinstance(matcher, dict):
            matcher["rest"] = [("", (99999,))]  # timm's mark for "joins the layer before", missing for most heads
        depths = timm.models.group_parameters(self.model, matcher, reverse=True)
        return {f"model.{name}": depth for name, depth in depths.items()}


def create(name: str, image_size: int, channels: int, arguments: dict[str, Any], num_classes: int = 0) -> TimmModel:
    """Build a timm model with random weights; without classifier for 0 classes."""
    if not timm.is_model(name):
        raise UserError(f"backbone.name={name!r} is not a timm model; similar names: {similar_names(name)}.")
    own = inspect.signature(timm.create_model).parameters.keys() - {"kwargs"}  # files of weights, and tricks of export
    if wrong := sorted(own & arguments.keys()):
        raise UserError(
            f"backbone.arguments.{wrong[0]} is not an argument of the model {name} itself; weights are set by "
            "backbone.weights alone."
        )
    architecture, _, tag = name.partition(".")
    try:
        stated = timm.get_pretrained_cfg(name)
    except RuntimeError as error:
        tags = some([each.partition(".")[2] for each in timm.list_pretrained(f"{architecture}.*")])
        raise UserError(f"backbone.name={name}: timm has no weights {tag!r} of {architecture}, only {tags}.") from error
    taken: dict[str, Any] = {"pretrained": False, "num_classes": num_classes, "in_chans": channels}
    try:
        try:
            model: TimmModel = timm.create_model(name, img_size=image_size, **taken, **arguments)
        except TypeError as error:
            if "unexpected keyword argument 'img_size'" not in str(error):
                raise
            model = timm.create_model(name, **taken, **arguments)  # a convolutional network takes any size
        unit, meaning = size_unit(model)
        if image_size % unit:  # timm would fail, or ignore the rest of the image
            nearest = max(unit, round(image_size / unit) * unit)
            raise UserError(
                f"backbone.image_size={image_size} must be a multiple of {meaning} {unit}, e.g. "
                f"backbone.image_size={nearest}."
            )
        with torch.no_grad():
            model.eval().forward_features(torch.zeros(1, channels, image_size, image_size))
    except UserError:
        raise
    except (KeyError, TypeError, ValueError, ArithmeticError, AssertionError, RuntimeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        size = f"; its weights are for backbone.image_size={stated.input_size[-1]}" if stated else ""
        raise UserError(
            f"backbone.name={name} cannot be built with backbone.image_size={image_size} and "
            f"backbone.arguments={arguments}: {reason}{size}"
        ) from error
    return model.train()


def similar_names(name: str) -> str:
    """Up to 8 models of timm whose names resemble another, hold it or begin like it, for a message."""
    wanted, known = name.rpartition("/")[2].partition(".")[0], timm.list_models()
    starts = difflib.get_close_matches(wanted, {each[: len(wanted)] for each in known}, n=8)
    found = difflib.get_close_matches(wanted, known, cutoff=0.85)
    found += sorted((each for each in known if wanted in each), key=lambda each: not each.startswith(wanted))
    found += [each for start in starts for each in known if each.startswith(start)]
    return ", ".join(list(dict.fromkeys(found))[:8]) or "none"


def size_unit(model: TimmModel) -> tuple[int, str]:
    """The number of which the image side must be a multiple, and its meaning."""
    if isinstance(model, ConvNeXt):  # its strided convolutions have no padding
        stride: Any = model.feature_info[-1]["reduction"]
        return stride, "the stride of its last stage,"
    patches = getattr(model, "patch_embed", None) or getattr(model, "stem", None)  # the stem of an MLP-Mixer
    return (patches.patch_size[0], "the patch size") if isinstance(patches, PatchEmbed) else (1, "")


def compile_each(modules: Iterable[nn.Module]) -> None:
    """Have torch.compile turn each module into fast code at its first call; state dicts keep their names.

    Raises:
        UserError: code for a CPU needs a C++ compiler, and there is none.
    """
    if not torch.cuda.is_available() and not shutil.which(os.environ.get("CXX", "g++")):
        raise UserError("model.compile=true needs a C++ compiler such as g++, and none is installed; set it to false.")
    for module in modules:
        module.compile()


def match_channels(key: str, values: Sequence[float], channels: int) -> tuple[float, ...]:
    """Mean or std as one number for all channels or one each; three are averaged for one grey channel."""
    if len(values) not in (1, 3):
        raise UserError(f"backbone.{key}={list(values)} must hold 1 number or 3.")
    return tuple(values) if len(values) <= channels else (sum(values) / 3,)


def load_weights(model: TimmModel, name: str, weights: str) -> None:
    """Fill a timm model from a file, strictly.

    After timm's own conversion of published checkpoints, which resamples position embeddings and patch kernels, the
    file must hold every parameter in its shape and nothing else, except for tensors of a classifier.
    """
    path = locate(weights, model.pretrained_cfg)
    state = read_weights(path)
    wanted = model.state_dict()
    convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    first_conv, classifier = (model.pretrained_cfg.get(key) or () for key in ("first_conv", "classifier"))
    stems = {f"{layer}.weight" for layer in ([first_conv] if isinstance(first_conv, str) else first_conv)}
    classifiers = tuple(f"{layer}." for layer in ([classifier] if isinstance(classifier, str) else classifier))
    try:
        if convert is not None:
            state = convert(state, model)
        for stem in stems & state.keys() & wanted.keys():
            if wanted[stem].shape[1] == 1 and state[stem].shape[1] == 3:
                state[stem] = timm.models.adapt_input_conv(1, state[stem])
        state = {key: value for key, value in state.items() if key in wanted or not key.startswith(classifiers)}
    except Exception as error:  # conversions raise nearly anything for weights of another model
        raise UserError(
            f"backbone.weights={path} cannot be converted for backbone.name={name} ({error}). "
            "Choose the backbone that the weights were made for, or other weights."
        ) from error
    check_fit(path, name, state, wanted)
    model.load_state_dict(state)
