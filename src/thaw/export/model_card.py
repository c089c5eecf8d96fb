"""The README.md of a shared folder: what the model is, how good, for what, from what."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from torch import nn

from thaw.models.backbone import Backbone

DATASETS = {  # their id on the hub, and what their authors say
    "MNIST": ("ylecun/mnist", "MNIST, by Yann LeCun, Corinna Cortes and Christopher Burges, CC BY-SA 3.0"),
    "FashionMNIST": ("zalando-datasets/fashion_mnist", "Fashion-MNIST, by Zalando Research, MIT"),
    "KMNIST": (None, "KMNIST, by the ROIS-DS Center for Open Data in the Humanities, CC BY-SA 4.0"),
}
RECIPE = ("seed", "data", "augment", "mix", "average", "backbone", "head", "freeze", "optim", "trainer")
LOCAL = ("dir", "mirrors", "default_root_dir", "plugins", "profiler", "num_workers", "enable_progress_bar")

CARD = """\
---
{front}---

# {title}

{what}

| | |
|---|---|
| **test accuracy** | **{test:.2%}**, 95 % interval {low:.2%} to {high:.2%}, n = {test_digits:,} ({which}) |
| validation accuracy | {val:.2%}, n = {val_digits:,} |
| parameters | {parameters:,} |
| size | {megabytes:.1f} MB, float32 |
| backbone's weights | {origin} |

The accuracies were measured with the code below and the files of this folder. On {parity_digits:,} test digits it
gives the classes of the trained model, and probabilities that differ by at most {difference:.2g}.

## Use it

```python
{code}```

The classes, in the order of the probabilities: {classes}.

## For what it is, and for what not

It is meant for research and teaching: for pictures of one {thing} at a time that were prepared as {dataset}'s, 28 x 28
pixels, bright on black, centred. It does not find or cut out anything, reads no lines of text and is no document OCR.
It gives one of its {number} classes to every picture, whatever is in it. The accuracy above is on {dataset} alone:
expect it to be worse on other handwriting, pens, scans and noise.

## How it was trained

On {data_licence}.
{epochs}thaw, commit `{trained}`; exported by commit `{exported}`, torch {torch}.
SHA-256 of the weights, as thaw counts it: `{sha}`.

<details><summary>The configuration</summary>

```yaml
{recipe}```

</details>

## Licence

{licence_text} The data: {data_licence}.
"""


def model_card(
    facts: Mapping[str, Any], checkpoint: Mapping[str, Any], backbone: nn.Module, code: str, license: str | None
) -> str:
    """The whole text.

    Args:
        facts: what is known of the model, and what was measured.
        checkpoint: that it came from.
        backbone: the model's.
        code: defines `probabilities`, see `thaw.export.card_code`.
        license: of the weights, or None.
    """
    config = OmegaConf.create(checkpoint["config"])
    dataset, is_timm = facts["dataset"], isinstance(backbone, Backbone)
    hub_id, data_licence = DATASETS.get(dataset, (None, f"{dataset}, whose licence is not stated here"))
    weights = config.backbone.get("weights", "none")
    origin, base = weights_origin(backbone, weights)
    license = license or ("mit" if weights == "bundled" else None)
    low, high = facts["test_accuracy_interval"]
    official = facts["data_source"] == "official"
    title = f"{facts['backbone']}, {facts['name']}, on {dataset}"
    front = {
        "library_name": "timm" if is_timm else "thaw",
        "license": license or "other",
        **({} if license else {"license_name": "not-stated"}),
        "tags": ["image-classification", "thaw", dataset.lower(), *(["timm"] if is_timm else [])],
        "pipeline_tag": "image-classification",
        **({"datasets": [hub_id]} if hub_id else {}),
        **({"base_model": base} if base else {}),
        "metrics": ["accuracy"],
        "model-index": [
            {
                "name": title,
                "results": [
                    {
                        "task": {"type": "image-classification"},
                        "dataset": {"name": dataset, "type": hub_id or dataset.lower(), "split": "test"},
                        "metrics": [{"type": "accuracy", "value": facts["test_accuracy"]}],
                    }
                ]
                if official  # the sample's digits are no test set that others know
                else [],
            }
        ],
    }
    return CARD.format(
        front=yaml.safe_dump(front, sort_keys=False),
        title=title,
        what=f"A classifier of {dataset}'s {len(facts['classes'])} classes: `{facts['backbone']}`"
        + ("." if is_timm else ", a baseline of thaw's that timm does not know."),
        test=facts["test_accuracy"],
        low=low,
        high=high,
        test_digits=facts["test_digits"],
        which="the official test split" if official else f"of {facts['data_title']}, **not the official test split**",
        val=facts["val_accuracy"],
        val_digits=facts["val_digits"],
        parameters=facts["parameters"],
        megabytes=facts["bytes"] / 1e6,
        origin=origin,
        parity_digits=facts["parity_digits"],
        difference=facts["parity_largest_difference"],
        code=code,
        classes=", ".join(facts["classes"]),
        number=len(facts["classes"]),
        thing="handwritten digit" if dataset == "MNIST" else "item",
        dataset=dataset,
        data_licence=data_licence,
        epochs=f"{checkpoint['epoch'] + 1} epochs with " if "epoch" in checkpoint else "With ",
        trained=facts["trained_commit"],
        exported=facts["exported_commit"],
        torch=facts["torch"],
        sha=facts["weights_sha256"],
        recipe=yaml.safe_dump(recipe(config), sort_keys=False),
        licence_text=f"The weights of this folder: {license}."
        if license
        else f"None is stated for the weights of this folder. They derive from {origin}, whose licence holds for them.",
    )


def weights_origin(backbone: Any, weights: str) -> tuple[str, str | None]:
    """Where a backbone's weights came from, and its id on the hub if they came from there.

    Args:
        backbone: the model's.
        weights: as `backbone.weights` said in training; a checkpoint that holds all of them is loaded without it.
    """
    if weights == "none":
        return "random at the start", None
    if weights == "bundled":
        return "thaw's digits ViT, pretrained by SimCLR on MNIST's training images without labels (MIT)", None
    if weights == "hub":
        repository = backbone.model.pretrained_cfg["hf_hub_id"]
        return f"[{repository}](https://huggingface.co/{repository})", repository
    architecture = backbone.architecture["name"].partition(".")[0]  # the tag is of published weights
    return f"a file called {Path(weights).name}, of timm's {architecture}", None


def recipe(config: Any) -> dict[str, Any]:
    """The configuration, as far as it shapes the model, without what only the machine of its training knows."""
    whole = OmegaConf.to_container(config, resolve=True)
    assert isinstance(whole, dict)
    return {key: without_places(whole[key]) for key in RECIPE if whole.get(key) is not None}


def without_places(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_places(item) for key, item in value.items() if key not in LOCAL}
    if isinstance(value, list):
        return [without_places(item) for item in value]
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value
