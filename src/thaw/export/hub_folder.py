"""A folder to share: weights as safetensors, config, and a model card whose code has been run.

A timm model is laid out as timm's own folders are, so that `timm.create_model("local-dir:<folder>")` loads it;
`load_folder` loads the baselines, which timm does not know.
"""

import contextlib
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from thaw.data.batches import by_batches
from thaw.data.images import Source
from thaw.data.preprocess import Preprocess
from thaw.export.facts import check_parity, model_facts, parity_sample, tested_facts
from thaw.export.model_card import card_code, model_card
from thaw.export.portable import Portable, portable
from thaw.freezing.added import added_names
from thaw.models.backbone import Backbone
from thaw.models.baselines import Baseline, ConvNet
from thaw.models.heads import FeatureNorm, LinearHead, MLPHead
from thaw.predict.predictor import Predictor
from thaw.run import checkpoint as checkpoints
from thaw.run.console import say
from thaw.run.errors import UserError, UserFileError
from thaw.run.files import atomic_folder, read_json, write_json, write_text

HEADS: dict[str, type[nn.Module]] = {head.__name__: head for head in (LinearHead, MLPHead)}
CONFIG, WEIGHTS, HEAD, CARD = "config.json", "model.safetensors", "head.safetensors", "README.md"


class CardModel:
    """The model that a card's code loads in its folder: uint8 (N, C, H, W) -> probabilities (N, K), in batches."""

    def __init__(self, code: str, folder: Path) -> None:
        names: dict[str, Any] = {}
        with contextlib.chdir(folder):
            exec(code, names)  # noqa: S102  (our own text; readers of the card run the same)
        self.probabilities: Callable[[Tensor], Tensor] = names["probabilities"]

    def __call__(self, images: Tensor) -> Tensor:
        return by_batches(self.probabilities, images)


def export_folder(
    predictor: Predictor, source: Source, license: str | None, path: Path, allow: Sequence[str] = ()
) -> dict[str, Any]:
    """Write a folder and check it with its card's code; it replaces an earlier folder only if it passes.

    Args:
        predictor: in fp32 on the CPU; what the policy added is merged into its model where it can be.
        source: of the images for comparison and test.
        license: of the weights, as the hub spells it; None means mit for the bundled weights, else not stated.
        allow: as for `thaw.run.checkpoint.read_checkpoint`.

    Returns what was measured.

    Raises:
        UserError: something else lies at `path`, something added cannot be merged, or the folder does not compute what
            the model does.
    """
    if path.exists() and not (
        path.is_dir() and {file.name for file in path.iterdir()} <= {CONFIG, WEIGHTS, HEAD, CARD}
    ):
        raise UserError(f"{path} exists and export.py did not write it; give another output=, or remove it.")
    checkpoint = checkpoints.read_checkpoint(predictor.checkpoint, allow)
    sample = parity_sample(predictor, source.test)
    model = portable(predictor)
    if left := added_names(model):
        raise UserError(
            f"format=hub_folder holds a plain model, into whose weights {left[0]} and {len(left) - 1} more cannot be "
            "merged; use format=onnx or torch_export, whose graph has them."
        )
    assert isinstance(model, Portable), "export.py refuses averages"
    facts = model_facts(predictor, "hub_folder")
    with atomic_folder(path) as part:
        try:
            code = write_model(part, model, predictor)
        except SafetensorError as error:  # its class for a full disk, too
            number = re.search(r"os error (\d+)", str(error))
            raise UserFileError(int(number[1]) if number else None, str(error), str(part / WEIGHTS)) from error
        say(f"running the card's code on {len(sample[0]):,} images, to compare with the trained model")
        written = CardModel(code, part)
        facts |= check_parity(written, *sample)
        facts |= {"val_accuracy": None, "val_images": len(source.val.labels)}
        if len(source.val.labels):
            answers = by_batches(written, source.val.images, title="validation accuracy").argmax(dim=1)
            facts["val_accuracy"] = round((answers == source.val.labels).float().mean().item(), 6)
        facts |= tested_facts(by_batches(written, source.test.images, title="test accuracy"), source)
        facts["bytes"] = sum(file.stat().st_size for file in part.glob("*.safetensors"))
        write_json({**read_json(part / CONFIG), "thaw": facts}, part / CONFIG)
        write_text(model_card(facts, checkpoint, predictor.model.backbone, code, license), part / CARD)
    return facts


def write_model(folder: Path, model: Portable, predictor: Predictor) -> str:
    """Write weights and config; returns the code that computes probabilities with them.

    Raises:
        UserError: a head of a class that is not thaw's.
    """
    head, backbone = model.head, model.backbone
    if type(head) not in HEADS.values():
        raise UserError(
            f"format=hub_folder knows {', '.join(HEADS)} and the lr_bank, not {type(head).__name__}; use format=onnx."
        )
    classifier = None
    if isinstance(backbone, Backbone):
        if backbone.pool == "model" and isinstance(backbone.model.pretrained_cfg["classifier"], str):
            classifier = folded(head)
        backbone.save_folder(folder, classifier, predictor.classes)
        if not classifier:
            save_file(head.state_dict(), folder / HEAD)
    else:
        settings: Any = OmegaConf.to_container(predictor.cfg.backbone, resolve=True)
        del settings["_target_"]
        config = {
            "architecture": predictor.name,
            "library": "thaw",
            "num_classes": len(predictor.classes),
            "label_names": predictor.classes,
            "backbone": {"class": type(backbone).__name__, **settings},
            "head": {"class": type(head).__name__, **head_settings(head)},
        }
        write_json(config, folder / CONFIG)
        state = {key: tensor.contiguous() for key, tensor in model.state_dict().items()}  # convnet is channels_last
        save_file(state, folder / WEIGHTS)
    return card_code(backbone, head_settings(head), classifier is not None, predictor.data)


def folded(head: nn.Module) -> nn.Linear | None:
    """The head as the one linear layer that timm has after its pooling; None where that cannot compute the same.

    Standardised features are linear in the features: W (x - mean) / std + b = (W / std) x + (b - W mean / std).
    Features normalised for each image by itself are not.
    """
    if not isinstance(head, LinearHead) or isinstance(head.norm, nn.LayerNorm):
        return None
    weight, bias = head.linear.weight.double(), head.linear.bias.double()  # (K, D), (K,)
    if isinstance(head.norm, nn.BatchNorm1d):
        mean, variance = head.norm.running_mean, head.norm.running_var  # (D,)
        assert mean is not None and variance is not None
        weight = weight / (variance.double() + head.norm.eps).sqrt()
        bias = bias - weight @ mean.double()
    linear = nn.Linear(head.linear.in_features, head.linear.out_features)
    linear.load_state_dict({"weight": weight, "bias": bias})
    return linear


def head_settings(head: nn.Module) -> dict[str, Any]:
    """The arguments that build a head, except its width and classes."""
    if isinstance(head, MLPHead):
        return {"hidden_features": head.hidden.out_features, "dropout": head.dropout.p}
    kinds = {nn.LayerNorm: "layer", FeatureNorm: "batch", nn.Identity: "none"}
    return {"norm": kinds[type(head.norm)]}  # type: ignore[index]


def load_folder(folder: str | Path) -> Portable:
    """Load a folder that holds a baseline; `timm.create_model` loads the others.

    Nothing that the folder says is run: only thaw's own classes are built.

    Raises:
        UserError: the folder holds no such model.
    """
    folder = Path(folder)
    config = read_json(folder / CONFIG) if (folder / CONFIG).is_file() else {}
    kinds = [*Baseline.__subclasses__(), *ConvNet.__subclasses__()]
    baselines = {kind.__name__: kind for kind in kinds}
    given, wanted = config.get("backbone", {}), config.get("head", {})
    if given.get("class") not in baselines or wanted.get("class") not in HEADS:
        raise UserError(f"{folder} holds no baseline of thaw's; its README.md says how its model is loaded.")
    backbone = baselines[given.pop("class")](**given)
    head = HEADS[wanted.pop("class")](backbone.num_features, config["num_classes"], **wanted)
    model = Portable(Preprocess(backbone.image_size, backbone.channels, backbone.mean, backbone.std), backbone, head)
    model.load_state_dict(load_file(folder / WEIGHTS))
    return model.eval()
