"""A trained classifier, ready for digits: what eval.py, predict.py, export.py, serve.py and notebooks share."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from lightning.fabric import Fabric
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from thaw.callbacks.progress import quiet
from thaw.classifier import Classifier
from thaw.data.sources import DATASETS, class_names, dataset_name, with_numbers
from thaw.freezing.features import digest
from thaw.models.attention import attention_layers, recorded_attention, share_of_patches
from thaw.run import checkpoint as checkpoints
from thaw.run.config import backbone_name, check_devices, settle

BATCH = 500  # digits predicted together where the data module does not say


class DigitModel(Protocol):
    """What predicts: a `Predictor`, or an exported file's `thaw.export.onnx_model.OnnxModel`."""

    has_attention: bool

    def __call__(self, images: Tensor) -> Tensor:
        """uint8 (N, 28, 28) -> probabilities (N, 10)."""

    def attention(self, images: Tensor) -> Tensor:
        """uint8 (N, 28, 28) -> each patch's share in what the head sees (N, h, w)."""

    def facts(self) -> dict[str, Any]:
        """What identifies the model, as values of JSON."""


class Predictor:
    """Digits, uint8 (N, 28, 28) on any device -> logits or probabilities (N, 10) on the CPU, in float32.

    Args:
        model: a classifier in eval mode.
        cfg: its configuration, settled; `trainer` says on which accelerator and in which precision it computes,
            `data.eval_batch_size` for how many digits at a time, if the data module has that setting.
        checkpoint: the file that it came from.
        commit: of the code that trained it.
        classes: their names; those without one are called by their number.

    Attributes:
        has_attention: whether `attention` works.
    """

    def __init__(
        self, model: Classifier, cfg: DictConfig, checkpoint: Path, commit: str, classes: Sequence[str]
    ) -> None:
        self.cfg, self.checkpoint, self.commit = cfg, checkpoint, commit
        self.classes = with_numbers(classes, model.num_classes)
        self.fabric = Fabric(accelerator=cfg.trainer.accelerator, devices=1, precision=cfg.trainer.precision)
        self.model = model.to(self.fabric.device)
        self.has_attention = bool(attention_layers(model.backbone))

    def logits(self, images: Tensor, told: Callable[[int], Any] | None = None) -> Tensor:
        """(N, 28, 28) -> (N, 10); `told` is called with the number of digits after each batch."""
        return self.by_batches(images, self.model, told)

    def __call__(self, images: Tensor, told: Callable[[int], Any] | None = None) -> Tensor:
        """(N, 28, 28) -> probabilities (N, 10)."""
        return self.logits(images, told).softmax(dim=1)

    def features(self, images: Tensor) -> Tensor:
        """(N, 28, 28) -> the backbone's features (N, D)."""
        return self.by_batches(images, lambda batch: self.model.backbone(self.model.preprocess(batch)), None)

    def attention(self, images: Tensor) -> Tensor:
        """(N, 28, 28) -> (N, h, w): each patch's share in what the head sees.

        Raises:
            ValueError: the backbone has no attention between all its patches.
        """
        if not self.has_attention:
            raise ValueError(
                f"{self.name} has no attention between all its patches; attention maps need a ViT or an EVA."
            )

        def maps(batch: Tensor) -> Tensor:
            with recorded_attention(self.model.backbone) as recorded:
                self.model(batch)
            return share_of_patches(self.model.backbone, recorded)

        return self.by_batches(images, maps, None)

    @torch.inference_mode()
    def by_batches(
        self, images: Tensor, compute: Callable[[Tensor], Tensor], told: Callable[[int], Any] | None
    ) -> Tensor:
        parts = []
        for batch in images.split(self.batch_size):
            with self.fabric.autocast():
                parts.append(compute(batch.to(self.fabric.device)).float().cpu())
            if told:
                told(len(batch))
        return torch.cat(parts)

    def facts(self) -> dict[str, Any]:
        """What identifies the model, as values of JSON."""
        return {
            "name": self.cfg.name,
            "backbone": self.name,
            "dataset": dataset_name(self.cfg.data),
            "classes": self.classes,
            "parameters": sum(parameter.numel() for parameter in self.model.parameters()),
            "weights_sha256": digest(self.model.state_dict()),
            "git_commit": self.commit,
            "checkpoint": str(self.checkpoint),
        }

    @property
    def name(self) -> str:
        """The architecture: timm's name, or a baseline's."""
        return backbone_name(self.cfg.backbone)

    @property
    def batch_size(self) -> int:
        """How many digits are predicted together."""
        return self.cfg.data.get("eval_batch_size") or BATCH


def load_predictor(
    ckpt: str,
    weights: str | None = None,
    accelerator: str | None = None,
    precision: str | None = None,
    allow: Sequence[str] = (),
) -> Predictor:
    """The classifier of a run's best checkpoint, or of a checkpoint file.

    Args:
        ckpt: `last`, a run's folder or a checkpoint file.
        weights: where the frozen weights lie, if not where they lay in training.
        accelerator: where it computes; None means the best device of this machine.
        precision: how it computes; None means as in training on a device of the same kind, else what suits the device.
        allow: as for `thaw.run.checkpoint.read_checkpoint`.

    Raises:
        ValueError: no such checkpoint, or one of a model that does not classify.
    """
    quiet()
    path = checkpoints.find_checkpoint(ckpt, Path("logs"), "best.ckpt")
    checkpoint = checkpoints.read_checkpoint(path, allow)
    if weights:
        checkpoint["config"]["backbone"]["weights"] = weights
    cfg = OmegaConf.create(checkpoint["config"])
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
        raise ValueError(checkpoints.pretraining_hint(checkpoints.run_folder(path)))
    dataset = cfg.data.get("dataset")
    classes = checkpoint.get("classes", class_names(dataset) if dataset in DATASETS else [])
    return Predictor(model, cfg, path, checkpoint["git_commit"], classes)
