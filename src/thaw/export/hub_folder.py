"""A folder to share: weights as safetensors, config, and a model card whose code has been run.

A timm model is laid out as timm's own folders are, so that `timm.create_model("local-dir:<folder>")` loads it; what
timm does not know (the baselines) `load_folder` loads.

Shapes: N digits, D feature width.
"""

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from thaw.data.preprocess import Preprocess
from thaw.data.sources import Source
from thaw.export import card_code
from thaw.export.facts import model_facts
from thaw.export.measure import check_parity, expected, probabilities_of, tested
from thaw.export.model_card import model_card
from thaw.export.onnx_model import BATCH
from thaw.export.portable import Portable, portable
from thaw.export.timm_config import fold_head, timm_config
from thaw.models.backbone import Backbone
from thaw.models.baselines import Baseline
from thaw.models.batch_norm import FeatureNorm
from thaw.models.heads import LinearHead, MLPHead
from thaw.predict.predictor import Predictor
from thaw.run import checkpoint as checkpoints
from thaw.run.files import atomic_folder, read_json, write_bytes, write_json, write_text

HEADS: dict[str, type[nn.Module]] = {head.__name__: head for head in (LinearHead, MLPHead)}
CONFIG, WEIGHTS, HEAD, CARD = "config.json", "model.safetensors", "head.safetensors", "README.md"


class CardModel:
    """What the code of a card computes, batch by batch, as a `thaw.predict.predictor.DigitModel` without attention.

    Args:
        code: defines `probabilities`, and is run with `folder` as the current one.
    """

    has_attention = False

    def __init__(self, code: str, folder: Path) -> None:
        names: dict[str, Any] = {}
        with contextlib.chdir(folder):
            exec(code, names)  # our own text; whoever reads the card runs the same
        self.probabilities: Callable[[Tensor], Tensor] = names["probabilities"]

    def __call__(self, images: Tensor) -> Tensor:
        return torch.cat([self.probabilities(batch) for batch in images.split(BATCH)])

    def attention(self, images: Tensor) -> Tensor:
        raise NotImplementedError

    def facts(self) -> dict[str, Any]:
        return {}


def export_folder(
    predictor: Predictor, source: Source, license: str | None, path: Path, allow: Sequence[str] = ()
) -> dict[str, Any]:
    """Write a folder and check it by its card's own code; an earlier one is replaced only by one that has passed.

    Args:
        predictor: in fp32 on the CPU; LoRA is merged into its model.
        source: of the digits that it is compared and tested on.
        license: of the weights, as the hub spells it; None says so only of the bundled ones.
        path: of the folder.
        allow: as for `thaw.run.checkpoint.read_checkpoint`.

    Returns:
        what was measured.

    Raises:
        ValueError: something else lies at `path`, or the folder does not compute what the model does.
    """
    if path.exists() and not replaceable(path):
        raise ValueError(f"{path} is there and no folder that export.py wrote; give another output=, or remove it.")
    checkpoint = checkpoints.read_checkpoint(predictor.checkpoint, allow)
    wanted = expected(predictor, source.test)
    model = portable(predictor)
    facts = model_facts(predictor, "hub_folder")
    with atomic_folder(path) as part:
        code = fill(part, model, predictor, license)
        written = CardModel(code, part)
        facts |= check_parity(written, wanted)
        validated = probabilities_of(written, source.val.images, "validation")
        right = validated.argmax(dim=1) == source.val.labels
        facts |= {"val_accuracy": round(right.float().mean().item(), 6), "val_digits": len(right)}
        facts |= tested(probabilities_of(written, source.test.images, "test"), source)
        facts["bytes"] = sum(file.stat().st_size for file in part.glob("*.safetensors"))
        config = read_json(part / CONFIG)
        write_json({**config, "thaw": facts}, part / CONFIG)
        write_text(model_card(facts, checkpoint, predictor.model.backbone, code, license), part / CARD)
    return facts


def replaceable(path: Path) -> bool:
    """Whether a folder is empty or holds what `fill` writes and nothing else."""
    return path.is_dir() and {file.name for file in path.iterdir()} <= {CONFIG, WEIGHTS, HEAD, CARD}


def fill(folder: Path, model: Portable, predictor: Predictor, license: str | None) -> str:
    """Write weights and config; returns the code that computes probabilities with them.

    Raises:
        ValueError: a head of a class that is not thaw's.
    """
    head, backbone = model.head, model.backbone
    if type(head) not in HEADS.values():
        raise ValueError(
            f"format=hub_folder knows {', '.join(HEADS)} and the lr_bank, not {type(head).__name__}; use format=onnx."
        )
    if isinstance(backbone, Backbone):
        state = backbone.model.state_dict()
        classifier = fold_head(backbone, head)
        config = timm_config(backbone, predictor.classes if classifier else None)
        state |= classifier or {}
        if not classifier:
            save(head.state_dict(), folder / HEAD)
        code = card_code.timm_code(backbone, head, folded=bool(classifier))
    else:
        state = model.state_dict()
        config = {
            "architecture": predictor.name,
            "library": "thaw",
            "num_classes": len(predictor.classes),
            "label_names": predictor.classes,
            "backbone": settings(predictor.cfg.backbone, type(backbone)),
            "head": {"class": type(head).__name__, **head_settings(head)},
        }
        code = card_code.BASELINE
    save(state, folder / WEIGHTS)
    write_json(config, folder / CONFIG)
    return code


def save(state: dict[str, Tensor], path: Path) -> None:
    """Write tensors, whatever their layout in memory: a safetensors file knows one."""
    write_bytes(to_bytes({name: tensor.contiguous() for name, tensor in state.items()}, {"format": "pt"}), path)


def settings(block: Any, kind: type) -> dict[str, Any]:
    """A baseline's configuration with the name of its class."""
    values = OmegaConf.to_container(block, resolve=True)
    assert isinstance(values, dict)
    return {"class": kind.__name__, **{str(key): value for key, value in values.items() if key != "_target_"}}


def head_settings(head: nn.Module) -> dict[str, Any]:
    """The arguments that build a head, but for its width and classes."""
    if isinstance(head, MLPHead):
        return {"hidden_features": head.hidden.out_features, "dropout": head.dropout.p}
    kinds = {nn.LayerNorm: "layer", FeatureNorm: "batch", nn.Identity: "none"}
    return {"norm": kinds[type(head.norm)]}  # type: ignore[index]


def load_folder(folder: str | Path) -> Portable:
    """The model of a folder with a baseline in it; of timm's folders `timm.create_model` makes one.

    Nothing that the folder says is run: only thaw's own classes are built.

    Raises:
        ValueError: the folder holds no such model.
    """
    folder = Path(folder)
    config = read_json(folder / CONFIG) if (folder / CONFIG).is_file() else {}
    baselines = {kind.__name__: kind for kind in Baseline.__subclasses__()}
    given, wanted = config.get("backbone", {}), config.get("head", {})
    if given.get("class") not in baselines or wanted.get("class") not in HEADS:
        raise ValueError(f"{folder} holds no baseline of thaw's; its README.md says how its model is loaded.")
    backbone = baselines[given.pop("class")](**given)
    head = HEADS[wanted.pop("class")](backbone.num_features, config["num_classes"], **wanted)
    preprocess = Preprocess(backbone.image_size, backbone.channels, backbone.mean, backbone.std)
    model = Portable(preprocess, backbone, head)
    model.load_state_dict(load_file(folder / WEIGHTS))
    return model.eval()
