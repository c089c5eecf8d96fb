"""A trained classifier that predicts; eval.py, predict.py, export.py, serve.py and the notebooks share it."""

import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from textwrap import shorten
from typing import Annotated, Any, Literal, Protocol

import torch
from lightning.fabric import Fabric
from omegaconf import DictConfig, OmegaConf
from pydantic import BaseModel, Field, ValidationError
from torch import Tensor

from thaw.classifier import Classifier
from thaw.data.batches import EVAL_BATCH, by_batches
from thaw.data.mnist import DATASETS, class_names
from thaw.data.store import tensors_sha256
from thaw.models.attention import attention_layers, recorded_attention, share_of_patches
from thaw.predict.average import Average, Views
from thaw.run import checkpoint as checkpoints
from thaw.run.config import backbone_name, check_devices, settle
from thaw.run.console import quiet_libraries, say
from thaw.run.errors import UserError
from thaw.run.places import reads

Label = Annotated[str, Field(pattern=r"^[^\x00-\x08\x0b-\x1f\x7f-\x9f]*$")]  # which a terminal may show
Side = Annotated[int, Field(ge=1, le=10_000, strict=True)]


class ImageRecord(BaseModel):
    """What a file says of the images that its model was trained on."""

    name: Label  # of the data set
    origin: str
    classes: Annotated[list[Label], Field(min_length=1)]
    shape: tuple[Literal[1, 3], Side, Side]  # (C, H, W)
    reader: Literal["digit", "photo"]  # see thaw.data.readers.ImageReader


class ImageModel(Protocol):
    """Predicts: a `Predictor`, or an exported file as a `thaw.predict.onnx_model.OnnxModel`."""

    data: Mapping[str, Any]  # the values of an `ImageRecord`
    has_attention: bool

    def __call__(self, images: Tensor) -> Tensor:
        """uint8 (N, C, H, W) -> probabilities (N, K)."""

    def features(self, images: Tensor) -> Tensor:
        """uint8 (N, C, H, W) -> the backbone's features (N, D)."""

    def attention(self, images: Tensor) -> Tensor:
        """uint8 (N, C, H, W) -> each patch's share in what the head sees (N, h, w)."""

    def facts(self) -> dict[str, Any]:
        """Facts that identify the model, as values of JSON."""


class Predictor:
    """Images, uint8 (N, C, H, W) on any device -> logits or probabilities (N, K) on the CPU, in float32.

    Args:
        model: a classifier, or an average of some, in eval mode.
        cfg: its configuration, settled. `trainer` sets accelerator and precision, `data.eval_batch_size`, where there
            is one, the images in a batch.
        checkpoint: the file that it was loaded from.
        commit: of the code that trained it.
        data: the values of an `ImageRecord`.

    Attributes:
        name: the architecture, by timm's name or a baseline's.
        files: the checkpoints, several of an average.
        has_attention: whether `attention` works.
        combined: of a combination how it was made, as values of JSON; see `thaw.evaluation.combine`.
    """

    def __init__(
        self, model: Classifier | Average, cfg: DictConfig, checkpoint: Path, commit: str, data: Mapping[str, Any]
    ) -> None:
        self.cfg, self.checkpoint, self.commit = cfg, checkpoint, commit
        self.name, self.files, self.combined = backbone_name(cfg.backbone), [checkpoint], dict[str, Any]()
        self.data, self.classes = data, list(data["classes"])
        self.fabric = Fabric(accelerator=cfg.trainer.accelerator, devices=1, precision=cfg.trainer.precision)
        self.model: Any = model.to(self.fabric.device)
        self.has_attention = isinstance(model, Classifier) and bool(attention_layers(model.backbone))

    def logits(self, images: Tensor, advance: Callable[[int], Any] | None = None) -> Tensor:
        """(N, C, H, W) -> (N, K); `advance` is called with the number of images after each batch."""
        return self.compute(self.model, images, advance)

    def __call__(self, images: Tensor) -> Tensor:
        """(N, C, H, W) -> probabilities (N, K)."""
        return self.model.task.probabilities(self.logits(images))

    def features(self, images: Tensor) -> Tensor:
        """(N, C, H, W) -> the backbone's features (N, D)."""
        return self.compute(lambda batch: self.model.backbone(self.model.preprocess(batch)), images)

    def attention(self, images: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, h, w): each patch's share in what the head sees.

        Raises:
            UserError: the backbone has no attention between all its patches.
        """
        if not self.has_attention:
            raise UserError(
                f"{self.name} has no attention between all its patches; attention maps need a ViT or an EVA."
            )

        def maps(batch: Tensor) -> Tensor:
            with recorded_attention(self.model.backbone) as recorded:
                self.model(batch)
            return share_of_patches(self.model.backbone, recorded)

        return self.compute(maps, images)

    @torch.inference_mode()
    def compute(
        self, function: Callable[[Tensor], Tensor], images: Tensor, advance: Callable[[int], Any] | None = None
    ) -> Tensor:
        """A function's results for all images, computed in batches on the device and in the precision of `cfg`."""

        def on_device(batch: Tensor) -> Tensor:
            with self.fabric.autocast():
                result = function(batch.to(self.fabric.device)).float().cpu()
            if advance:
                advance(len(batch))
            return result

        return by_batches(on_device, images, self.batch_size)

    def facts(self) -> dict[str, Any]:
        """Facts that identify the model, as values of JSON."""
        return {
            "name": self.cfg.name,
            "backbone": self.name,
            "dataset": self.data["name"],
            "classes": self.classes,
            "shape": list(self.data["shape"]),
            "reader": self.data["reader"],
            "parameters": sum(parameter.numel() for parameter in self.model.parameters()),
            "weights_sha256": tensors_sha256(self.model.state_dict()),
            "git_commit": self.commit,
            "checkpoint": ", ".join(map(str, self.files)),
            **({"combined": self.combined} if self.combined else {}),
        }

    @property
    def where(self) -> str:
        """The checkpoint, as one types it."""
        return os.path.relpath(self.checkpoint)

    @property
    def batch_size(self) -> int:
        return self.cfg.data.get("eval_batch_size") or EVAL_BATCH


def average(members: Sequence[Predictor], views: Views, name: str) -> Predictor:
    """Models and views of an image as one predictor, whose probabilities are the mean.

    It computes in the precision of the members, in 32 bits if they differ.
    """
    first, cfg = members[0], members[0].cfg.copy()
    cfg.name, cfg.overrides = name, ""
    if len({member.cfg.trainer.precision for member in members}) > 1:
        cfg.trainer.precision = "32-true"
    model = Average([member.model for member in members], views).eval()
    result = Predictor(model, cfg, first.checkpoint, first.commit, first.data)
    counts = Counter(member.name for member in members)
    result.name = " + ".join(f"{count} x {each}" if count > 1 else each for each, count in counts.items())
    result.files = [member.checkpoint for member in members]
    return result


def load_predictor(
    ckpt: str,
    weights: str | None = None,
    accelerator: str | None = None,
    precision: str | None = None,
    allow: Sequence[str] = (),
    stderr: bool = False,
) -> Predictor:
    """Load the classifier of a run's best checkpoint, or of a checkpoint file, and say which one it is.

    Args:
        ckpt: as for `thaw.run.checkpoint.find_checkpoint`.
        weights: file of the frozen weights, if it has moved since training.
        accelerator: of Lightning; None means the best device of this machine.
        precision: of Lightning; None means as in training on a device of the same kind, else the device's best.
        allow: as for `thaw.run.checkpoint.read_checkpoint`.

    Raises:
        UserError: no such checkpoint, or its model does not classify.
    """
    quiet_libraries()
    path = checkpoints.find_checkpoint(ckpt, "best.ckpt")
    checkpoint = checkpoints.read_checkpoint(path, allow)
    with checkpoints.understood(path, checkpoint["git_commit"]):
        say(checkpoints.origin(checkpoint), stderr=stderr)
        if weights:
            checkpoint["config"]["backbone"]["weights"] = weights
        cfg = OmegaConf.create(checkpoint["config"])
        named = reads(cfg, ["backbone.weights"], []) if "frozen" in checkpoint and not weights else []
        if named:
            say(f"reading {named[0]}, as the checkpoint says", stderr=stderr)
        if accelerator:
            check_devices(OmegaConf.create({"accelerator": accelerator, "devices": 1}))
        device = Fabric(accelerator=accelerator or "auto", devices=1).device.type
        trained_on = {"gpu": "cuda", "auto": device}.get(cfg.trainer.accelerator, cfg.trainer.accelerator)
        cfg.trainer.accelerator = {"cuda": "gpu"}.get(device, device)
        cfg.trainer.devices = 1
        cfg.trainer.precision = precision or (cfg.trainer.precision if device == trained_on else "auto")
        settle(cfg)
        model = checkpoints.load_model(checkpoint)
        if not isinstance(model, Classifier):
            raise UserError(checkpoints.pretraining_hint(checkpoints.run_folder(path)))
        record = data_record(checkpoint, model.num_classes)
    data = checked_record(record, path)
    if len(data["classes"]) != model.num_classes:
        raise UserError(
            f"{path} names {len(data['classes'])} classes, but its model has {model.num_classes}; "
            "give a checkpoint that train.py wrote."
        )
    with checkpoints.understood(path, checkpoint["git_commit"]):
        return Predictor(model, cfg, path, checkpoint["git_commit"], data)


def data_record(checkpoint: Mapping[str, Any], num_classes: int) -> dict[str, Any]:
    """The record of a checkpoint's data; earlier versions, which knew grey images of 28 x 28 alone, wrote less."""
    if "data" in checkpoint:
        return checkpoint["data"]
    data = checkpoint["config"]["data"]
    name = data.get("dataset") or data["_target_"].rpartition(".")[2]
    named = checkpoint.get("classes") or (class_names(name) if name in DATASETS else [])
    classes = [*named, *map(str, range(len(named), num_classes))]
    return {"name": name, "origin": "", "classes": classes, "shape": [1, 28, 28], "reader": "digit"}


def checked_record(data: Any, path: Path) -> dict[str, Any]:
    """The values of an `ImageRecord` in a file, which may be anything; a UserError names the first that is wrong."""
    try:
        return ImageRecord.model_validate(data).model_dump()
    except ValidationError as error:
        wrong = error.errors(include_url=False)[0]
        key = ".".join(map(str, ("data", *wrong["loc"])))
        raise UserError(
            f"{path} holds {key}={shorten(repr(wrong['input']), 60)}: {wrong['msg']}. Give a file that "
            "train.py or export.py wrote."
        ) from error
