"""Every pretrained backbone of configs/backbone, with random weights, small images and (base models) two blocks."""

import copy
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from safetensors.torch import save_file

from thaw.classifier import Classifier
from thaw.freezing.added import added_names, merge_added
from thaw.freezing.policy import FreezePolicy
from thaw.freezing.table import layer_table
from thaw.models.backbone import Backbone
from thaw.run.console import as_text

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs" / "backbone"
WEIGHTS = ROOT.parent / "shared" / "weights"
ZOO = sorted(path.stem for path in CONFIGS.glob("*.yaml") if "weights: hub" in path.read_text() and path.stem != "timm")
CONVOLUTIONAL = ("convnext", "efficientnet")  # timm is not told their image size

Build = Callable[..., Classifier]


def preset(name: str) -> DictConfig:
    cfg = OmegaConf.load(CONFIGS / f"{name}.yaml")
    assert isinstance(cfg, DictConfig)
    return cfg


def header(name: str) -> str:
    lines = (CONFIGS / f"{name}.yaml").read_text().splitlines()
    return " ".join(line.lstrip("# ") for line in lines if line.startswith("#"))


def small(name: str) -> dict[str, Any]:
    """A size of several tokens in every stage; base models cut to two blocks."""
    patch = re.search(r"patch(\d+)", preset(name).name)
    size = 56 if name.startswith("swin") else 2 * int(patch[1]) if patch else 32
    return {"image_size": size, "arguments": {"depth": 2} if "base" in name else {}, "fused_attention": False}


def shallow(name: str) -> dict[str, Any]:
    """The same with one block, or one in each stage."""
    if name.startswith("efficientnet"):
        return small(name)
    staged = name.startswith(("swin", "convnext"))
    return small(name) | {"arguments": {"depths": [1, 1, 1, 1]} if staged else {"depth": 1}}


@cache
def build(name: str) -> Backbone:
    """A backbone in eval mode whose parameters all differ from 0 and 1, as after training."""
    torch.manual_seed(0)
    model = instantiate(preset(name), weights="none", **small(name)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model


@pytest.fixture
def backbone() -> Callable[..., Backbone]:
    """What the classifier of conftest.py is built on."""

    def thawed(preset: str) -> Backbone:
        return build(preset).eval().requires_grad_(True)

    return thawed


def images_for(model: Backbone) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, model.channels, model.image_size, model.image_size, generator=generator)


def test_the_zoo_is_there() -> None:
    families = {"vit_tiny", "vit_small", "vit_base", "vit_small_deit3", "vit_small_dinov2", "vit_base_dinov2"}
    families |= {"vit_small_dinov3", "vit_base_clip", "vit_base_siglip2", "eva02_tiny", "swin_tiny", "convnext_tiny"}
    families |= {"efficientnet_lite0"}
    assert families <= set(ZOO)


@pytest.mark.parametrize("name", ZOO)
def test_header_states_what_timm_says(name: str) -> None:
    cfg, text = preset(name), header(name)
    sized = {} if name.startswith(CONVOLUTIONAL) else {"img_size": cfg.image_size}
    with torch.device("meta"):
        model = timm.create_model(cfg.name, num_classes=0, **sized)
    stated = model.pretrained_cfg
    number = sum(parameter.numel() for parameter in model.parameters())
    assert f"{number / 1e6:.1f} M parameters" in text
    stages = getattr(model, "stages", None) or getattr(model, "layers", ())
    blocks = sum(len(stage.blocks) for stage in stages) or len(model.blocks)
    if name.startswith("efficientnet"):
        stages, blocks = model.blocks, sum(len(stage) for stage in model.blocks)
    widths = {str(info["num_chs"]) for info in model.feature_info} if stages else {str(model.embed_dim)}
    found = re.search(r"(\d+) blocks (?:in (\d) stages )?of width (\d+)(?: to (\d+))?\.", text)
    assert found and int(found[1]) == blocks and {found[3], found[4]} - {None} <= widths
    assert int(found[2] or 0) == len(stages)
    assert f"Hub: {stated['hf_hub_id']}, trained at {stated['input_size'][-1]} px." in text
    assert stated["license"].replace("-", " ") in text.lower().replace("-", " ")
    assert re.search(r"\(.*(et al\.|& \w+) 20\d\d, arXiv:\d{4}\.\d{5}\)", text)


@pytest.mark.parametrize("name", ZOO)
def test_image_size_is_what_its_comment_allows(name: str) -> None:
    text = (CONFIGS / f"{name}.yaml").read_text()
    if re.search(r"^image_size: \d+ +# any size", text, re.M):
        assert all(instantiate(preset(name), weights="none", image_size=size).is_chain for size in (1, 30))
        return
    unit = re.search(r"^image_size: (\d+) +# any multiple of (\d+)", text, re.M)
    assert unit and int(unit[1]) % int(unit[2]) == 0
    with pytest.raises(InstantiationException, match=rf"must be a multiple of .* {unit[2]}, e\.g\."):
        instantiate(preset(name), weights="none", **shallow(name) | {"image_size": int(unit[1]) + 2})


@pytest.mark.parametrize("name", ZOO)
def test_forward_and_gradients(name: str) -> None:
    """Every parameter is used: there are no exceptions in this zoo."""
    model = build(name).eval().requires_grad_(True)
    features = model(images_for(model))
    assert features.shape == (2, model.num_features) and features.isfinite().all()
    assert not torch.allclose(features[0], features[1])
    gradients = torch.autograd.grad((features * torch.randn_like(features)).sum(), list(model.parameters()))
    for (parameter, _), gradient in zip(model.named_parameters(), gradients, strict=True):
        assert gradient.isfinite().all() and gradient.abs().max() > 0, parameter


@pytest.mark.parametrize("name", ZOO)
@torch.no_grad()
def test_every_cut_is_exact(name: str) -> None:
    model = build(name).eval()
    images = images_for(model)
    tokens = model.model.forward_features(images)
    expected = model.pooled(tokens)
    assert model.is_chain and len(model.layers) == max(model.depths().values()) + 2
    for cut in range(len(model.layers) + 1):
        assert torch.equal(model.suffix(model.prefix(images, cut), cut), expected)
    if model.pool == "model":
        assert torch.equal(expected, model.model(images))


@pytest.mark.parametrize("name", ZOO)
@pytest.mark.parametrize("freeze", ["linear_probe", "last_blocks"])
def test_freezing_leaves_a_long_prefix_and_the_table_counts_all(classifier: Build, name: str, freeze: str) -> None:
    model = classifier(freeze, preset=name)
    model.thaw.apply(0)
    layers = len(model.backbone.layers)  # stem, blocks, final norm
    cut = layers if freeze == "linear_probe" else layers - 3  # the norm belongs to the last of two thawed blocks
    trains = {key for key, parameter in model.backbone.named_parameters() if parameter.requires_grad}
    assert trains == {key for key, _ in model.backbone.named_parameters() if model.backbone.layer_of(key) >= cut}

    groups = model.optim.groups(model.named_parameters(), model.thaw.depths, model.thaw.epochs)
    table = as_text(layer_table(model, model.thaw.depths, groups, epoch=0))
    rows = re.findall(r"^([\w.-]+)(?: \(.*\))? +([\d-]+) +([\d,]+)  (yes|no) ", table, re.M)
    assert len(rows) == len(table.splitlines()) - 2  # heading, sum
    total = sum(parameter.numel() for parameter in model.parameters())
    assert sum(int(number.replace(",", "")) for *_, number, _ in rows) == total
    labels = {label: {f"{expanded}." for expanded in expand(label)} for label, *_ in rows}
    for key, parameter in model.named_parameters():
        row = [label for label, prefixes in labels.items() if f"{key}.".startswith(tuple(prefixes))]
        assert row, key
        settings = {trained for label, _, _, trained in rows if label in row}
        assert ("yes" if parameter.requires_grad else "no") in settings


@pytest.mark.long
@pytest.mark.parametrize("name", ZOO)
@pytest.mark.parametrize("freeze", ["lora", "dora", "ssf"])
@torch.no_grad()
def test_what_is_added_merges(policy: Callable[..., FreezePolicy], name: str, freeze: str) -> None:
    plain = build(name).eval()
    model, images = copy.deepcopy(plain), images_for(plain)
    policy(freeze).add(model)  # type: ignore[misc]
    assert torch.equal(model(images), plain(images))
    for key in added_names(model):
        model.get_parameter(key).add_(0.1)
    expected = model(images)
    assert not torch.equal(expected, plain(images))
    merge_added(model)
    assert torch.equal(model(images), expected)
    assert model.state_dict().keys() == plain.state_dict().keys()


def expand(label: str) -> list[str]:
    """`blocks.3-5` -> `blocks.3`, `blocks.4`, `blocks.5`."""
    span = re.fullmatch(r"(.*\.)(\d+)-(\d+)", label)
    return [f"{span[1]}{number}" for number in range(int(span[2]), int(span[3]) + 1)] if span else [label]


@pytest.mark.parametrize("name", ZOO)
@torch.no_grad()
def test_weights_of_the_published_size_load_as_by_timm(name: str, tmp_path: Path) -> None:
    """Position embeddings and window biases are resampled, the classifier is left out, the rest fits exactly."""
    cfg, settings = preset(name), shallow(name) | {"pool": "model"}
    one = settings["arguments"]
    torch.manual_seed(0)
    classes = timm.get_pretrained_cfg(cfg.name).num_classes
    published = timm.create_model(cfg.name, num_classes=classes, **one)
    save_file(published.state_dict(), tmp_path / "w.safetensors")
    ours = instantiate(cfg, weights=str(tmp_path / "w.safetensors"), **settings).eval()
    source = {"file": str(tmp_path / "w.safetensors"), "custom_load": False}
    sized = {} if name.startswith(CONVOLUTIONAL) else {"img_size": ours.image_size}
    theirs = timm.create_model(
        cfg.name, pretrained=True, pretrained_cfg_overlay=source, num_classes=0, **sized, **one
    ).eval()
    images = images_for(ours)
    torch.testing.assert_close(ours(images), theirs(images), rtol=1e-4, atol=1e-5)
    assert not ours.fresh


@pytest.mark.parametrize(
    ("base", "name", "file", "size", "mean"),
    [
        ("efficientnet_lite0", "tf_efficientnet_lite0", "efficientnet_lite0.safetensors", 96, 0.5),
        # a saliency model's backbone in DINOv2's architecture
        ("vit_small_dinov2", "vit_small_patch14_dinov2", "vit_small_patch14_saliency.safetensors", 112, 0.485),
    ],
)
@torch.no_grad()
def test_trained_weights_give_timms_features(base: str, name: str, file: str, size: int, mean: float) -> None:
    """In 16 bits; the classifier of one is left out, the position embeddings of the other are resampled."""
    path = WEIGHTS / file
    if not path.is_file():
        pytest.skip(f"{path} is not there")
    settings = {"name": name, "weights": str(path), "image_size": size, "pool": "model", "fused_attention": False}
    ours = instantiate(preset(base), **settings).eval()
    source = {"file": str(path), "custom_load": False}
    sized = {"img_size": size} if name.startswith("vit") else {}
    theirs = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=source, num_classes=0, **sized).eval()
    images = images_for(ours)
    torch.testing.assert_close(ours(images), theirs(images), rtol=1e-4, atol=1e-5)
    assert ours.mean[0] == mean and not ours.fresh
    expected = ours(images)
    for cut in range(len(ours.layers) + 1):
        assert torch.equal(ours.suffix(ours.prefix(images, cut), cut), expected)


def test_any_model_of_timm_by_name() -> None:
    cfg = preset("timm")
    assert cfg.image_size == 224 and OmegaConf.missing_keys(cfg) == {"name"}
    model = instantiate(cfg, name="resnet18", weights="none", image_size=32, fused_attention=False).eval()
    plain = timm.create_model("resnet18", num_classes=0).eval()
    plain.load_state_dict(model.model.state_dict())
    images = images_for(model)
    assert torch.equal(model(images), plain(images))
