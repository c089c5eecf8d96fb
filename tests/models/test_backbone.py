"""The backbone against timm itself, and every setting or file that it must refuse."""

import json
import pickle
import time
from collections.abc import Callable
from functools import partialmethod
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from hydra.utils import instantiate
from omegaconf import OmegaConf
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed
from timm.models import group_parameters
from timm.models._efficientnet_blocks import ConvBnAct, DepthwiseSeparableConv, EdgeResidual, InvertedResidual
from timm.models.resnet import BasicBlock, Bottleneck
from torch import Tensor, nn
from torch.nn.utils import parametrize

from thaw.models.backbone import Backbone
from thaw.run.values import check_types

ROOT = Path(__file__).parents[2]
VIT, SWIN = "vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"

Build = Callable[..., Backbone]


def saved(model: nn.Module, path: Path, **changes: Tensor | None) -> str:
    """Save a state dict; `changes` replace or (None) leave out tensors."""
    state = {key: value for key, value in (model.state_dict() | changes).items() if value is not None}
    state = {key: value.contiguous() for key, value in state.items()}
    save_file(state, path) if path.suffix == ".safetensors" else torch.save(state, path)
    return str(path)


def loaded_by_timm(name: str, path: str, **arguments: Any) -> nn.Module:
    """timm's own model without classifier, with the weights of a file read by timm's own loader."""
    source = {"file": path, "custom_load": False}
    return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=source, num_classes=0, **arguments).eval()


def sized(name: str, size: int) -> dict[str, int]:
    """What tells timm the image size, of which convolutional nets know nothing."""
    return {"img_size": size} if name.startswith(("vit", "deit", "eva", "swin")) else {}


# Features


@pytest.mark.parametrize("fused", [True, False])
def test_fused_attention_changes_the_kernel_and_not_the_features(backbone: Build, fused: bool) -> None:
    model = backbone(fused_attention=fused)
    assert [block.attn.fused_attn for block in model.model.blocks] == [fused] * 3
    images = torch.randn(2, 1, 28, 28)
    torch.testing.assert_close(model(images), backbone(fused_attention=not fused)(images))


def test_mean_and_std_follow_the_channels(backbone: Build) -> None:
    name, imagenet = "resnet18", (0.485, 0.456, 0.406)
    assert backbone(name, {}, channels=3).mean == imagenet
    assert backbone(name, {}, channels=1).mean == pytest.approx((sum(imagenet) / 3,))
    assert backbone(name, {}, channels=3, mean=[0.0], std=[1.0]).mean == (0.0,)


# Layers

SMALL: dict[str, Any] = {"embed_dim": 32, "depth": 2, "num_heads": 2}
CHAINS: list[tuple[str, int, dict[str, Any]]] = [
    (VIT, 28, SMALL | {"patch_size": 7, "drop_path_rate": 0.5}),
    (VIT, 28, SMALL | {"patch_size": 7, "class_token": False, "global_pool": "avg", "pre_norm": True}),
    ("vit_small_patch14_dinov2", 42, SMALL),
    ("vit_small_patch14_reg4_dinov2", 42, SMALL),
    ("vit_base_patch16_siglip_224", 32, SMALL),  # attention pool
    ("deit_tiny_distilled_patch16_224", 32, SMALL | {"proj_drop_rate": 0.3}),
    (SWIN, 56, {"embed_dim": 24, "depths": [1, 1, 2, 1]}),
    ("eva02_tiny_patch14_224", 28, SMALL | {"embed_dim": 48, "drop_path_rate": 0.5, "pos_drop_rate": 0.3}),
    ("vit_small_patch16_dinov3", 48, SMALL | {"drop_path_rate": 0.5}),
    ("convnext_atto", 32, {"dims": [8, 16, 24, 32], "depths": [1, 1, 3, 2], "drop_path_rate": 0.5}),
    ("convnextv2_atto", 64, {"dims": [8, 16, 24, 32], "depths": [1, 2, 1, 1], "head_norm_first": True}),
    ("test_resnet", 28, {"drop_path_rate": 0.5, "drop_rate": 0.3}),
    ("test_efficientnet", 32, {"drop_path_rate": 0.5, "drop_rate": 0.3}),
    ("mobilenetv3_small_050", 32, {"drop_path_rate": 0.5}),  # wider after its head than before it
]
OTHERS: list[tuple[str, int, dict[str, Any]]] = [
    ("regnetx_002", 32, {}),
    ("vit_srelpos_small_patch16_224", 32, SMALL),  # its blocks share a bias: without it they run, but differ
    ("vit_small_patch16_rope_mixed_224", 32, SMALL),  # every block has its own rotary embedding
    ("vit_small_patch16_dinov3", 48, SMALL | {"patch_drop_rate": 0.5}),  # drops other patches in every batch
]


def num_blocks(model: nn.Module) -> int:
    """Blocks of a model without stages, or of all its stages."""
    kinds = (InvertedResidual, DepthwiseSeparableConv, EdgeResidual, ConvBnAct, BasicBlock, Bottleneck)
    if convolutional := sum(isinstance(module, kinds) for module in model.modules()):
        return convolutional
    stages = getattr(model, "stages", None) or getattr(model, "layers", ())
    return len(getattr(model, "blocks", ())) or sum(len(stage.blocks) for stage in stages)


def scattered(build: Build, name: str, size: int, arguments: dict, **changes: Any) -> Backbone:
    """A backbone whose parameters all differ from 0 and from each other, as after training."""
    model = build(name, arguments, image_size=size, channels=3, **changes)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize(("name", "size", "arguments"), CHAINS + OTHERS)
def test_prefix_and_suffix_at_every_cut_are_timms_forward(
    backbone: Build, name: str, size: int, arguments: dict, mode: str
) -> None:
    ours = scattered(backbone, name, size, arguments).train(mode == "train")
    theirs = timm.create_model(name, num_classes=0, **sized(name, size), **arguments).train(mode == "train")
    theirs.load_state_dict(ours.model.state_dict())
    if not hasattr(theirs, "patch_embed"):
        theirs.to(memory_format=torch.channels_last)  # other kernels round differently, which batch norm magnifies
    images = torch.randn(3, 3, size, size)
    torch.manual_seed(5)  # of dropout and drop path
    expected = theirs(images)
    assert expected.isfinite().all() and expected.shape == (3, ours.num_features)
    assert ours.depths().keys() == dict(ours.named_parameters()).keys()
    assert ours.is_chain == ((name, size, arguments) in CHAINS)
    assert len(ours.layers) == (num_blocks(theirs) + 2 if ours.is_chain else 1)
    for cut in range(len(ours.layers) + 1):
        torch.manual_seed(5)
        kept = ours.prefix(images, cut)
        assert kept.shape == (images if not cut else expected if cut == len(ours.layers) else kept).shape
        torch.testing.assert_close(ours.suffix(kept, cut), expected)


def test_class_and_mean_is_the_class_token_and_the_mean_patch_at_every_cut(backbone: Build) -> None:
    model = scattered(backbone, "vit_small_patch14_reg4_dinov2", 42, SMALL, pool="class_and_mean")
    images = torch.randn(2, 3, 42, 42)
    tokens = model.model.forward_features(images)  # (2, 1 + 4 + 9, 32)
    expected = torch.stack([torch.cat([one[0], sum(one[5:]) / 9]) for one in tokens])
    assert model.num_features == 64
    for cut in range(5):
        torch.testing.assert_close(model.suffix(model.prefix(images, cut), cut), expected)
    assert torch.equal(model.prefix(images, 4), model(images))


@pytest.mark.parametrize(("name", "size", "arguments"), CHAINS + OTHERS)
def test_gradients_tell_the_layer_of_a_parameter(backbone: Build, name: str, size: int, arguments: dict) -> None:
    """The output of the first layers depends on the parameters of these and on no other."""
    model = scattered(backbone, name, size, arguments)
    images = torch.randn(2, 3, size, size)
    names, parameters = zip(*model.named_parameters(), strict=True)
    for cut in range(1, len(model.layers) + 1):
        output = model.prefix(images, cut)
        grads = torch.autograd.grad((output * torch.randn_like(output)).sum(), parameters, allow_unused=True)
        used = {name for name, grad in zip(names, grads, strict=True) if grad is not None}
        assert used == {name for name in names if model.layer_of(name) < cut}
    assert model.layers_state(len(model.layers)).keys() == model.state_dict().keys()
    assert model.layers_state(0) == {}


def test_tokens_and_positions_belong_to_the_stem(backbone: Build) -> None:
    found = set()
    for name, size, arguments in CHAINS:
        model = backbone(name, arguments, image_size=size, channels=3)
        stem = {name.split(".")[1] for name in model.layers_state(1)}
        assert not stem & {"blocks", "layers", "stages", "layer1", "norm", "fc_norm", "attn_pool", "head"}
        assert not stem & {"conv_head", "norm_head", "bn2", "classifier"}
        assert stem == {name.split(".")[1] for name, depth in model.depths().items() if depth == 0}
        found |= stem
    tokens = {"cls_token", "reg_token", "dist_token", "pos_embed"}
    assert found == tokens | {"patch_embed", "norm_pre", "stem", "conv1", "conv_stem", "bn1"}


@pytest.mark.parametrize(("name", "size", "tokens"), [(SWIN, 56, 196), ("convnext_atto", 64, 16), (VIT, 32, 5)])
def test_tokens_after_the_stem(backbone: Build, name: str, size: int, tokens: int) -> None:
    assert backbone(name, {"depths": [1, 1, 1, 1]} if name != VIT else SMALL, image_size=size).num_tokens == tokens


@pytest.mark.parametrize(
    ("name", "size", "arguments"),
    [
        (VIT, 28, SMALL | {"patch_size": 7}),
        *(case for case in CHAINS if case[0].startswith(("swin", "eva", "convnextv2"))),
    ],
)
def test_parametrized_weights_stay_in_their_layers(backbone: Build, name: str, size: int, arguments: dict) -> None:
    """As low-rank adapters do it: `qkv.weight` becomes `qkv.parametrizations.weight.original`, and gets company."""

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.full((), 2.0))

        def forward(self, weight: Tensor) -> Tensor:
            return self.scale * weight

    model = scattered(backbone, name, size, arguments)
    layers = {key: (model.layer_of(key), depth) for key, depth in model.depths().items()}
    linear = {key: module for key, module in model.named_modules() if isinstance(module, nn.Linear)}
    for module in linear.values():
        parametrize.register_parametrization(module, "weight", Scaled())
    depths = model.depths()
    assert depths.keys() == dict(model.named_parameters()).keys()
    for key in linear:
        for part in ("original", "0.scale"):
            adapted = f"{key}.parametrizations.weight.{part}"
            assert (model.layer_of(adapted), depths[adapted]) == layers[f"{key}.weight"]
    images = torch.randn(2, 3, size, size)
    expected = model.model.forward_head(model.model.forward_features(images), pre_logits=True)
    for cut in range(len(model.layers) + 1):
        torch.testing.assert_close(model.suffix(model.prefix(images, cut), cut), expected)


def test_compiling_keeps_names_and_outputs(backbone: Build, tiny: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here with torch's compiler up to where it would write C++."""
    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend="eager"))
    check_compiled(backbone(arguments=tiny | {"depth": 2}), 28, 2)
    shared = backbone("vit_srelpos_small_patch16_224", SMALL, image_size=32)  # no chain: its children are compiled
    check_compiled(shared, 32, len(list(shared.model.children())))
    check_compiled(backbone("eva02_tiny_patch14_224", SMALL | {"embed_dim": 48, "depth": 1}), 28, 1)
    convnext = backbone("convnext_atto", {"dims": [8] * 4, "depths": [1, 1, 1, 1]}, image_size=32)
    check_compiled(convnext, 32, 4)
    assert all(block._compiled_call_impl for stage in convnext.model.stages for block in stage.blocks)


@pytest.mark.long
def test_compiled_layers_give_the_same(backbone: Build, tiny: dict) -> None:
    check_compiled(backbone(arguments=tiny | {"depth": 1}), 28, 1)


def check_compiled(model: Backbone, size: int, blocks: int) -> None:
    images = torch.randn(2, 1, size, size)
    state, expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}, model(images)
    (wanted,) = torch.autograd.grad(expected.square().sum(), [next(model.parameters())])
    model.compile_layers()
    assert sum(module._compiled_call_impl is not None for module in model.modules()) == blocks
    got = model(images)
    (grad,) = torch.autograd.grad(got.square().sum(), [next(model.parameters())])
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(grad, wanted, rtol=1e-3, atol=1e-4)
    assert model.state_dict().keys() == state.keys()
    model.load_state_dict(state)
    last = len(model.layers)
    torch.testing.assert_close(model.prefix(images, last), expected, rtol=1e-4, atol=1e-5)


def test_compiling_without_a_compiler(backbone: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ValueError, match=r"model\.compile=true needs a C\+\+ compiler such as g\+\+.*set it to false"):
        backbone().compile_layers()


# Depths


@pytest.mark.parametrize("arguments", [{}, {"class_token": False, "global_pool": "avg"}])
def test_depths_of_a_vit(backbone: Build, tiny: dict, arguments: dict) -> None:
    stem = {"cls_token", "pos_embed", "patch_embed"}
    names = set()
    for name, depth in backbone(arguments=tiny | arguments).depths().items():
        _, part, *rest = name.split(".")
        names.add(part)
        expected = 0 if part in stem else int(rest[0]) + 1 if part == "blocks" else 3
        assert depth == expected, name
    assert names == stem | {"blocks", "norm"} if not arguments else {"pos_embed", "patch_embed", "blocks", "fc_norm"}


@pytest.mark.parametrize(("name", "size", "arguments"), CHAINS)
def test_depths_are_those_of_timms_matcher(backbone: Build, name: str, size: int, arguments: dict) -> None:
    """But for tokens that its matcher does not know, and what follows the blocks."""
    model = backbone(name, arguments, image_size=size)
    theirs = group_parameters(model.model, model.model.group_matcher(), reverse=True)
    blocks = num_blocks(model.model)
    for key, depth in model.depths().items():
        part = key.split(".")[1]
        after = ("fc_norm", "attn_pool", "head", "conv_head", "norm_head")
        known = {"reg_token": 0, "dist_token": 0} | dict.fromkeys(after, blocks)
        assert depth == known.get(part, theirs[key.removeprefix("model.")]), key


def test_depths_of_other_models_rise_to_their_last_block(backbone: Build) -> None:
    swin = backbone(SWIN, {"embed_dim": 24, "depths": [1, 1, 2, 1]}, image_size=56).depths()
    assert swin["model.patch_embed.proj.weight"] == 0
    assert swin["model.layers.2.blocks.1.attn.qkv.weight"] == 4
    assert swin["model.norm.weight"] == swin["model.layers.3.blocks.0.attn.qkv.weight"] == 5 == max(swin.values())
    convnext = backbone("convnext_atto", {}, image_size=32).depths()
    assert convnext["model.head.norm.weight"] == convnext["model.stages.3.blocks.1.mlp.fc1.weight"] == 12
    resnet = backbone("resnet18", {}).depths()
    assert resnet["model.conv1.weight"] == 0
    assert resnet["model.layer4.1.conv2.weight"] == 8 == max(resnet.values())


# Weights that fit


def test_fresh_names_what_no_weights_filled(backbone: Build, tmp_path: Path) -> None:
    random = backbone()
    assert random.fresh == dict(random.named_parameters()).keys()
    loaded = backbone(weights=saved(random.model, tmp_path / "w.safetensors"))
    assert loaded.fresh == frozenset()


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        (VIT, {"patch_size": 7}),
        (VIT, {"patch_size": 7, "class_token": False, "global_pool": "avg"}),
        ("vit_small_patch14_dinov2", {}),
        ("vit_small_patch14_reg4_dinov2", {}),
    ],
)
def test_position_embeddings_are_resampled_as_by_timm(
    backbone: Build, tmp_path: Path, name: str, arguments: dict
) -> None:
    arguments = arguments | {"embed_dim": 32, "depth": 1, "num_heads": 2}
    small = backbone(name, arguments)
    path = saved(small.model, tmp_path / "w.safetensors")
    large = backbone(name, arguments, image_size=56, weights=path)
    model = large.model
    prefix = 0 if model.no_embed_class else model.num_prefix_tokens
    grid = list(model.patch_embed.grid_size)
    expected = resample_abs_pos_embed(small.model.pos_embed, grid, num_prefix_tokens=prefix)
    assert torch.equal(model.pos_embed, expected)
    theirs = loaded_by_timm(name, path, img_size=56, in_chans=1, **arguments)
    images = torch.randn(2, 1, 56, 56)
    torch.testing.assert_close(large(images), theirs(images), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", [VIT, "resnet18"])
def test_colour_weights_summed_for_grey_see_the_same(backbone: Build, tiny: dict, tmp_path: Path, name: str) -> None:
    arguments = tiny if name == VIT else {}
    colour = backbone(name, arguments, channels=3)
    grey = backbone(name, arguments, channels=1, weights=saved(colour.model, tmp_path / "w.safetensors"))
    images = torch.randn(2, 1, 28, 28)
    torch.testing.assert_close(grey(images), colour(images.expand(-1, 3, -1, -1)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("key", [None, "state_dict", "model"])
def test_a_file_with_a_classifier_loads_without_it(
    backbone: Build, tiny: dict, tmp_path: Path, key: str | None
) -> None:
    theirs = timm.create_model(VIT, img_size=28, in_chans=1, num_classes=1000, **tiny).eval()
    state = theirs.state_dict()
    torch.save({key: state, "epoch": 3} if key else state, tmp_path / "w.pth")
    ours = backbone(arguments=tiny, weights=str(tmp_path / "w.pth"))
    images = torch.randn(2, 1, 28, 28)
    theirs.reset_classifier(0)
    torch.testing.assert_close(ours(images), theirs(images), rtol=1e-5, atol=1e-5)


def test_bundled_weights_load() -> None:
    model = instantiate(OmegaConf.load(ROOT / "configs" / "backbone" / "digits_vit.yaml"), fused_attention=False)
    assert model.weights == "bundled" and not model.fresh
    assert all(module.training for module in model.modules())
    assert model(torch.randn(2, 1, 28, 28)).shape == (2, 192)


# Weights that do not


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"blocks.1.norm1.bias": None}, "1 differences: missing blocks.1.norm1.bias"),
        ({"blocks.3.norm1.bias": torch.zeros(32)}, "1 differences: unexpected blocks.3.norm1.bias"),
        ({"blocks.0.norm1.bias": torch.zeros(7)}, r"blocks.0.norm1.bias is \(7,\), the model has \(32,\)"),
        (
            {"pos_embed": torch.zeros(1, 15, 32)},
            "cannot be converted for backbone.name=vit_tiny_patch16_224",
        ),
    ],
)
def test_weights_must_fit_exactly(backbone: Build, tmp_path: Path, changes: dict, message: str) -> None:
    path = saved(backbone().model, tmp_path / "w.safetensors", **changes)
    with pytest.raises(ValueError, match=message):
        backbone(weights=path)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("resnet18", {}), r"w.pth does not fit .*vit_tiny_patch16_224 .*missing .* and \d+ more"),
        ((), r"patch_embed.proj.weight is \(32, 1, 7, 7\), the model has \(32, 3, 7, 7\)"),  # grey, not colour
    ],
)
def test_weights_of_another_model_are_refused(backbone: Build, tmp_path: Path, given: tuple, message: str) -> None:
    path = saved(backbone(*given).model, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=message):
        backbone(weights=path, channels=3)


class Payload:
    """Creates a file when unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


def test_pickled_code_is_refused_and_not_run(backbone: Build, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    torch.save({"state_dict": {}, "extra": Payload(trace)}, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"w.pth is not a readable .*pickled code is not run"):
        backbone(weights=str(tmp_path / "w.pth"))
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(Payload(trace), protocol=2))
    with pytest.raises(ValueError, match=r"plain.pth is not a readable weights file"):
        backbone(weights=str(tmp_path / "plain.pth"))
    assert not trace.exists()


@pytest.mark.parametrize("name", ["w.safetensors", "w.pth", "w.txt"])
def test_other_files_are_not_weights(backbone: Build, tmp_path: Path, name: str) -> None:
    for content in ("", "hello", "<!doctype html><html>404</html>"):
        (tmp_path / name).write_text(content)
        with pytest.raises(ValueError, match=rf"{name} is not a readable weights file \(\w+\); allowed are .safetens"):
            backbone(weights=str(tmp_path / name))


@pytest.mark.parametrize("content", [[torch.zeros(1)], {"epoch": 3}, torch.zeros(1)])
def test_a_pth_file_must_hold_a_state_dict(backbone: Build, tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=f"w.pth holds {type(content).__name__}; save a state dict"):
        backbone(weights=str(tmp_path / "w.pth"))


# The hub


def test_hub_out_of_reach_says_what_to_do_and_soon(
    backbone: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")  # nothing listens there
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    start = time.monotonic()
    with pytest.raises(ConnectionError) as caught:
        backbone(arguments={}, weights="hub", image_size=32)
    assert time.monotonic() - start < 10  # the hub's own client would retry for longer
    for part in ("model.safetensors", "timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k", "backbone.weights=<path>"):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("name", "repository"),
    [(VIT, f"timm/{VIT}.augreg_in21k_ft_in1k"), (f"{VIT}.augreg_in21k", f"timm/{VIT}.augreg_in21k")],
)
def test_hub_weights_are_taken_from_the_cache_without_a_connection(
    backbone: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, repository: str
) -> None:
    cached = timm.create_model("vit_tiny_patch16_224", img_size=32, in_chans=1, depth=1)
    path = saved(cached, tmp_path / "w.safetensors")

    def download(asked: str, file: str, local_files_only: bool) -> str:
        assert local_files_only
        assert (asked, file) == (repository, "model.safetensors")
        return path

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    model = backbone(name, {"depth": 1}, weights="hub", image_size=32)
    assert torch.equal(model.model.patch_embed.proj.weight, cached.patch_embed.proj.weight)


def test_a_download_from_the_hub_is_announced(
    backbone: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = saved(timm.create_model(VIT, img_size=32, in_chans=1, depth=1), tmp_path / "w.safetensors")

    def download(repository: str, file: str, local_files_only: bool = False) -> str:
        if local_files_only:
            raise LocalEntryNotFoundError("not there yet")
        return path

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", lambda url, timeout: SimpleNamespace(size=22_900_000))
    backbone(VIT, {"depth": 1}, weights="hub", image_size=32)
    assert capsys.readouterr().out == f"downloading model.safetensors of timm/{VIT}.augreg_in21k_ft_in1k, 22.9 MB\n"


def test_lists_of_a_configuration_reach_timm(backbone: Build) -> None:
    arguments = OmegaConf.create({"depths": [1, 1, 2, 1], "dims": [8, 8, 8, 8]})
    model = backbone("convnext_atto", arguments, image_size=32)
    assert [len(stage.blocks) for stage in model.model.stages] == [1, 1, 2, 1]
    assert json.loads(json.dumps(model.architecture))["arguments"] == {"depths": [1, 1, 2, 1], "dims": [8, 8, 8, 8]}


# Settings that cannot work


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "vit_tinny_patch16_224"}, "'vit_tinny_patch16_224' is not .*similar names: vit_tiny_patch16_224"),
        ({"name": "resnet81"}, "similar names: resnet18, "),
        ({"name": "hf-hub:timm/resnet18.a1"}, "similar names: resnet18, "),
        ({"name": f"{VIT}.nonsense"}, f"no weights 'nonsense' of {VIT}, only augreg_in21k, augreg_in21k_ft_in1k"),
        (
            {"image_size": 30},
            r"^backbone\.image_size=30 must be a multiple of the patch size 7, e\.g\. backbone\.image_size=28\.$",
        ),
        ({"image_size": 3}, r"multiple of the patch size 7, e\.g\. backbone\.image_size=7\.$"),
        (
            {"name": "densenet121", "arguments": {}, "image_size": 8},
            r"size=8 .*too small; its weights are for .*=224",
        ),
        ({"name": "gcvit_xxtiny", "arguments": {}}, r"size=28 .*division by zero; its weights are for"),
        ({"name": "mixer_s16_224", "arguments": {}, "image_size": 100}, "multiple of the patch size 16, e"),
        ({"pool": "class_and_mean"}, "needs a class token, vit_tiny_patch16_224 has none; use pool=model"),
        ({"mean": [0.1, 0.2]}, r"backbone.mean=\[0.1, 0.2\] must hold 1 number or 3"),
        ({"weights": "nowhere.pth"}, r"'nowhere\.pth' is not a file; choose none, bundled, hub or a path"),
        (
            {"name": "convnext_atto_rms", "arguments": {}, "weights": "hub", "image_size": 32},
            r"no hub weights for \w+; set backbone.weights to none or to a file",
        ),
        ({"arguments": {"dept": 2}}, "unexpected keyword argument 'dept'"),
        ({"arguments": {"img_size": 56}}, "multiple values for keyword argument 'img_size'"),
        ({"arguments": {"num_classes": 10}}, "multiple values for keyword argument 'num_classes'"),
    ],
)
def test_settings_that_do_not_go_together(backbone: Build, changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        backbone(**changes)


@pytest.mark.parametrize(
    ("setting", "value", "allowed"),
    [
        ("image_size", 0, "a whole number, 1 or more"),
        ("channels", 2, "1 or 3"),
        ("pool", "max", "model or class_and_mean"),
        ("fused_attention", "maybe", "true or false"),
    ],
)
def test_settings_that_are_not_allowed(setting: str, value: Any, allowed: str) -> None:
    block = OmegaConf.load(ROOT / "configs/backbone/digits_vit.yaml")
    block[setting] = value
    with pytest.raises(ValueError, match=rf"^backbone\.{setting}={value!r} must be {allowed}\.$"):
        check_types(block, "backbone.")


@pytest.mark.parametrize(
    ("name", "arguments", "size", "unit", "nearest"),
    [
        (VIT, SMALL, 28, 16, 32),
        ("vit_small_patch14_dinov2", SMALL, 64, 14, 70),
        ("vit_small_patch16_dinov3", SMALL, 30, 16, 32),
        ("eva02_tiny_patch14_224", SMALL | {"embed_dim": 48}, 8, 14, 14),
        (SWIN, {"embed_dim": 24, "depths": [1, 1, 2, 1]}, 30, 4, 32),
        ("convnext_atto", {"dims": [8] * 4}, 28, 32, 32),
        ("convnextv2_atto", {"dims": [8] * 4}, 80, 32, 64),  # would ignore half of the last row and column
    ],
)
def test_a_size_named_by_the_error_works(
    backbone: Build, name: str, arguments: dict, size: int, unit: int, nearest: int
) -> None:
    with pytest.raises(ValueError, match=rf"image_size={size} must be a multiple of .* {unit}, .*={nearest}\.$"):
        backbone(name, arguments, image_size=size)
    for taken in (nearest, unit):
        model = backbone(name, arguments, image_size=taken)
        assert model(torch.randn(1, 1, taken, taken)).isfinite().all()
