import json
import re
import resource
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
import yaml
from conftest import ROOT
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from thaw.data.images import Source
from thaw.data.mnist import OFFICIAL
from thaw.data.readers import ImageReader
from thaw.export import hub_folder as module
from thaw.export.hub_folder import export_folder, load_folder
from thaw.predict.predictor import Predictor, load_predictor
from thaw.run.files import read_json

TOKEN = ["backbone.arguments.class_token=true", "backbone.arguments.global_pool=token"]
FOLDED = {
    "none": ["head.norm=none"],
    "batch": ["head.norm=batch", "freeze=lora"],
    "rgb_56px": ["head.norm=none", "backbone.channels=3", "backbone.image_size=56", "backbone.arguments.patch_size=14"],
    "bank": ["head=lr_bank", "freeze=full", "head.lrs=[1e-3,1e-2]", "head.norm=batch"],
}
APART = {
    "layer": ["head.norm=layer"],
    "class_and_mean": ["head.norm=none", "backbone.pool=class_and_mean", *TOKEN],
    "class_and_mean_batch": ["head.norm=batch", "backbone.pool=class_and_mean", *TOKEN],
    "mlp": ["head=mlp"],
}


def code_of(folder: Path) -> str:
    """The code of the card, as a reader would copy it."""
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    return code


def run_card(folder: Path, images: Tensor, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    names: dict = {}
    monkeypatch.chdir(folder)
    exec(code_of(folder), names)
    return names["probabilities"](images)


def preprocessed(predictor: Predictor, images: Tensor) -> Tensor:
    return predictor.model.preprocess(images)


@pytest.mark.parametrize("name", FOLDED)
def test_timm_has_the_whole_classifier(
    name: str,
    tiny_vit: Callable[..., Predictor],
    source: Source,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    predictor = tiny_vit(*FOLDED[name])
    images = source.train.images[:50]
    wanted = predictor.logits(images)
    facts = export_folder(predictor, source, None, tmp_path / "hub")
    assert sorted(file.name for file in (tmp_path / "hub").iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
    ]
    model = timm.create_model(f"local-dir:{tmp_path / 'hub'}", pretrained=True).eval()
    with torch.inference_mode():
        given = model(preprocessed(predictor, images))
    torch.testing.assert_close(given, wanted, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(run_card(tmp_path / "hub", images, monkeypatch), wanted.softmax(1), atol=1e-5, rtol=0)
    settings = timm.data.resolve_model_data_config(model)  # type: ignore[attr-defined]
    assert settings["input_size"] == (predictor.model.backbone.channels, *2 * (predictor.model.backbone.image_size,))
    assert settings["mean"] == pytest.approx((0.1307,) * predictor.model.backbone.channels)
    assert facts["parity_largest_difference"] < 1e-5


@pytest.mark.parametrize("name", APART)
def test_timm_has_the_features_and_the_card_the_head(
    name: str,
    tiny_vit: Callable[..., Predictor],
    source: Source,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    predictor = tiny_vit(*APART[name])
    images = source.train.images[:50]
    wanted = predictor(images)
    export_folder(predictor, source, None, tmp_path / "hub")
    model = timm.create_model(f"local-dir:{tmp_path / 'hub'}", pretrained=True).eval()
    assert model.num_classes == 0
    head = load_file(tmp_path / "hub" / "head.safetensors")
    for key, tensor in predictor.model.head.state_dict().items():
        assert torch.equal(head[key], tensor)
    if name == "layer":
        with torch.inference_mode():
            features = F.layer_norm(model(preprocessed(predictor, images)), (32,))
            given = F.linear(features, head["linear.weight"], head["linear.bias"]).softmax(1)
        torch.testing.assert_close(given, wanted, atol=1e-5, rtol=0)
    torch.testing.assert_close(run_card(tmp_path / "hub", images, monkeypatch), wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["convnet", "rnn", "mlp", "logistic_regression"])
def test_baselines_are_loaded_by_thaw(
    name: str, build: Callable[..., Predictor], source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    predictor = build(f"experiment=baseline/{name}")
    images = source.train.images[:50]
    wanted = predictor(images)
    export_folder(predictor, source, "cc0-1.0", tmp_path / "hub")
    assert torch.equal(load_folder(tmp_path / "hub")(images)[0], wanted)
    assert torch.equal(run_card(tmp_path / "hub", images, monkeypatch), wanted)
    assert "not know" in (tmp_path / "hub" / "README.md").read_text()


@pytest.mark.parametrize("name", ["photo_vit", "photo_in_grey", "photo_convnet"])
def test_card_of_photographs(
    name: str, made: Callable[[str], tuple[Predictor, Source]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its code reads a picture as thaw does, and names the classes; nothing in it speaks of digits."""
    predictor, source = made(name)
    picture = Image.effect_noise((75, 61), 90).convert("RGB")
    turned = Image.Exif()
    turned[0x0112] = 6
    picture.save(tmp_path / "picture.png", exif=turned)
    reader = ImageReader("photo", (3, 32, 32))
    [seen] = reader.file((tmp_path / "picture.png").read_bytes(), "it")
    wanted = predictor(torch.from_numpy(seen.image)[None])
    folder = tmp_path / "hub"
    export_folder(predictor, source, None, folder)
    names: dict = {}
    monkeypatch.chdir(folder)
    exec(code_of(folder), names)
    image = names["read"](tmp_path / "picture.png")
    assert np.array_equal(image.numpy(), seen.image)
    torch.testing.assert_close(names["probabilities"](image[None]), wanted, atol=1e-5, rtol=0)
    text = (folder / "README.md").read_text()
    said = text.partition("<details>")[0]
    assert "digit" not in said.replace("digits_vit", "") and "MNIST" not in said
    assert "the folder my pictures" in text and "the centre square, at" in text
    [classes] = re.findall(r"```json\n(.*?)\n```", text, re.DOTALL)
    assert json.loads(classes) == source.classes
    front = yaml.safe_load(text.split("---\n")[1])
    assert "datasets" not in front and "my pictures" in front["tags"]


def test_card(tiny_vit: Callable[..., Predictor], source: Source, tmp_path: Path) -> None:
    predictor = tiny_vit("augment=affine")
    facts = export_folder(predictor, source, None, tmp_path / "hub")
    text = (tmp_path / "hub" / "README.md").read_text()
    front = yaml.safe_load(text.split("---\n")[1])
    assert front["library_name"] == "timm" and front["pipeline_tag"] == "image-classification"
    assert front["license"] == "other" and front["license_name"] == "not-stated"  # random weights: nobody has said
    assert front["datasets"] == ["ylecun/mnist"]
    assert "model-index" not in front  # the sample's digits are not the official test split
    assert f"{facts['test_accuracy']:.2%}" in text and "not the official test split" in text
    assert facts["weights_sha256"] in text and "c0ffee" in text and "n = 60" in text
    assert "CC BY-SA 3.0" in text and "2 epochs" in text
    recipe = yaml.safe_load(re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)[0])
    assert recipe["augment"]["degrees"] == predictor.cfg.augment.degrees
    assert str(tmp_path) not in text and str(ROOT) not in text
    config = read_json(tmp_path / "hub" / "config.json")
    assert config["thaw"] == facts
    assert config["pretrained_cfg"]["license"] is config["pretrained_cfg"]["tag"] is None, "those of published weights"

    official = source._replace(origin=OFFICIAL)
    export_folder(predictor, official, "apache-2.0", tmp_path / "hub")  # replaces the first
    front = yaml.safe_load((tmp_path / "hub" / "README.md").read_text().split("---\n")[1])
    assert front["license"] == "apache-2.0"
    assert front["model-index"][0]["results"][0]["metrics"][0]["value"] == facts["test_accuracy"]
    assert [file.name for file in tmp_path.iterdir() if file.name.startswith(".")] == []


def test_card_of_a_checkpoint_that_holds_all_weights(
    train: Callable[..., Path], source: Source, tmp_path: Path
) -> None:
    """The card names the weights at the start of training also for such a checkpoint."""
    few = ["data.source=sample", "data.train_size=32", "data.batch_size=16", "logger=none", "trainer.max_epochs=1"]
    run = train("model.self_contained=true", "validate=false", "test=false", *few)
    export_folder(load_predictor(str(run), None, "cpu", "32-true"), source, None, tmp_path / "hub")
    text = (tmp_path / "hub" / "README.md").read_text()
    assert "# digits_vit, train, on MNIST" in text and "license: mit" in text and "pretrained by SimCLR" in text


@pytest.mark.parametrize("head", ["head=mlp", "head.norm=none"])
def test_a_full_disk(head: str, tiny_vit: Callable[..., Predictor], source: Source, tmp_path: Path) -> None:
    predictor, before = tiny_vit(head), resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with pytest.raises(OSError, match=r"hub cannot be written \(.*\)\. Free some space"):
            export_folder(predictor, source, None, tmp_path / "hub")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert not list(tmp_path.iterdir())


def test_a_folder_of_something_else_is_left_alone(
    tiny_vit: Callable[..., Predictor], source: Source, tmp_path: Path
) -> None:
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "thesis.txt").write_text("years")
    with pytest.raises(ValueError, match="did not write it"):
        export_folder(tiny_vit(), source, None, tmp_path / "hub")
    assert (tmp_path / "hub" / "thesis.txt").read_text() == "years"
    with pytest.raises(ValueError, match="no baseline"):
        load_folder(tmp_path / "hub")


def test_a_plain_model_holds_no_adapters(tiny_vit: Callable[..., Predictor], source: Source, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"plain model, .*adapter.down.weight and 7 more cannot be merged; use format=onnx"
    ):
        export_folder(tiny_vit("freeze=adapter"), source, None, tmp_path / "hub")
    assert not (tmp_path / "hub").exists()


def test_a_folder_that_computes_something_else_gets_no_name(
    tiny_vit: Callable[..., Predictor], source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    predictor = tiny_vit("head.norm=none")
    export_folder(predictor, source, None, tmp_path / "hub")
    before = (tmp_path / "hub" / "model.safetensors").read_bytes()
    monkeypatch.setattr(module, "folded", lambda head: nn.Linear(head.linear.in_features, 10))
    with pytest.raises(ValueError, match="not the trained one"):
        export_folder(predictor, source, None, tmp_path / "hub")
    assert (tmp_path / "hub" / "model.safetensors").read_bytes() == before
    assert {file.name for file in tmp_path.iterdir()} == {"hub"}
