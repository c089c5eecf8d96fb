"""The README.md of a shared folder and the code in it, from the templates model_card.md and model_card_code.py.txt."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCardData
from omegaconf import OmegaConf
from torch import nn

from thaw.data.mnist import OFFICIAL, SAMPLE
from thaw.data.preprocess import LUMA
from thaw.export.facts import of_images
from thaw.models.backbone import Backbone
from thaw.pages.html import render

LICENCES = {  # a dataset's id on the hub, and the licence that its authors state
    "MNIST": ("ylecun/mnist", "MNIST, by Yann LeCun, Corinna Cortes and Christopher Burges, CC BY-SA 3.0"),
    "FashionMNIST": ("zalando-datasets/fashion_mnist", "Fashion-MNIST, by Zalando Research, MIT"),
    "KMNIST": (None, "KMNIST, by the ROIS-DS Center for Open Data in the Humanities, CC BY-SA 4.0"),
}
RECIPE = ("seed", "data", "augment", "mix", "average", "backbone", "head", "freeze", "optim", "trainer")
LOCAL = (  # settings of the machine that trained
    *("dir", "cache_dir", "max_gb", "mirrors", "num_workers"),
    *("default_root_dir", "plugins", "profiler", "enable_progress_bar"),
)


def card_code(backbone: Any, head: Mapping[str, Any], has_classifier: bool, data: Mapping[str, Any]) -> str:
    """The lines of a card that turn images into probabilities.

    `head` holds the arguments that built the model's, `data` is `thaw.predict.predictor.Predictor.data`.
    """
    channels, height, width = data["shape"]
    images = {
        "channels": channels,
        "side": min(height, width),
        "is_square": height == width,
        "is_photo": data["reader"] == "photo",
        "shapes": f"uint8 {of_images(data['shape'])}",
        "num_classes": len(data["classes"]),
    }
    if not isinstance(backbone, Backbone):
        return render("model_card_code.py.txt", is_timm=False, **images)
    return render(
        "model_card_code.py.txt",
        is_timm=True,
        **images,
        has_classifier=has_classifier,
        size=backbone.image_size,
        mean=[[[[float(f"{value:.10g}")]] for value in backbone.mean]],  # (1, C, 1, 1)
        std=[[[[float(f"{value:.10g}")]] for value in backbone.std]],
        repeats_grey=backbone.channels > max(channels, len(backbone.mean)),
        luma=list(LUMA) if backbone.channels < channels else None,
        pool=backbone.pool,
        norm=head.get("norm", "layer"),
        is_mlp="hidden_features" in head,
    )


def model_card(
    facts: Mapping[str, Any], checkpoint: Mapping[str, Any], backbone: nn.Module, code: str, license: str | None
) -> str:
    """The whole text; `facts` are those of `thaw.export.facts`, `code` is that of `card_code`."""
    config = OmegaConf.create(checkpoint["config"])
    dataset, is_timm = facts["dataset"], isinstance(backbone, Backbone)
    hub_id, data_licence = LICENCES.get(dataset, (None, f"{dataset}, whose licence is not stated here"))
    weights = config.backbone.get("weights", "none")
    origin, base_model = weights_origin(backbone, weights)
    license = license or ("mit" if weights == "bundled" else None)
    title = f"{facts['backbone']}, {facts['name']}, on {dataset}"
    result = EvalResult(
        task_type="image-classification",
        dataset_name=dataset,
        dataset_type=hub_id or dataset.lower(),
        dataset_split="test",
        metric_type="accuracy",
        metric_value=facts["test_accuracy"],
    )
    metadata = ModelCardData(
        library_name="timm" if is_timm else "thaw",
        license=license or "other",
        license_name=None if license else "not-stated",
        tags=["image-classification", "thaw", dataset.lower(), *(["timm"] if is_timm else [])],
        pipeline_tag="image-classification",
        datasets=[hub_id] if hub_id else None,
        base_model=base_model,
        metrics=["accuracy"],
        model_name=title,
        eval_results=[result] if facts["data_source"] == OFFICIAL else None,  # others do not know the sample's test
    )
    whole: Any = OmegaConf.to_container(config, resolve=True)
    recipe = {key: without_places(whole[key]) for key in RECIPE if whole.get(key) is not None}
    return render(
        "model_card.md",
        **facts,
        metadata=metadata.to_yaml(),
        title=title,
        is_timm=is_timm,
        origin=origin,
        code=code.strip(),
        is_official=facts["data_source"] == OFFICIAL,
        is_sample=facts["data_source"] == SAMPLE,
        data_licence=data_licence,
        license=license,
        epochs=checkpoint["epoch"] + 1 if "epoch" in checkpoint else None,
        recipe=yaml.safe_dump(recipe, sort_keys=False).rstrip(),
    )


def weights_origin(backbone: Any, weights: str) -> tuple[str, str | None]:
    """Where a backbone's weights came from, by `backbone.weights` of the training, and their id on the hub, if any."""
    if weights == "none":
        return "random at the start", None
    if weights == "bundled":
        return "thaw's digits ViT, pretrained by SimCLR on MNIST's training images without labels (MIT)", None
    if weights == "hub":
        repository = backbone.model.pretrained_cfg["hf_hub_id"]
        return f"[{repository}](https://huggingface.co/{repository})", repository
    architecture = backbone.architecture["name"].partition(".")[0]  # the tag is of published weights
    return f"a file called {Path(weights).name}, of timm's {architecture}", None


def without_places(value: Any) -> Any:
    """A part of the configuration without the folders and settings of the machine that trained."""
    if isinstance(value, dict):
        return {key: without_places(item) for key, item in value.items() if key not in LOCAL}
    if isinstance(value, list):
        return [without_places(item) for item in value]
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value
