"""Soft targets: what teachers say of every training image, computed once and given to each batch beside the labels."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, Trainer
from torch import Tensor

from thaw.classifier import Classifier
from thaw.data.batches import by_batches
from thaw.data.images import Source, check_same_classes
from thaw.data.store import tensors_sha256
from thaw.freezing.cache import FeatureCache, forked_rng, report
from thaw.lr_bank import BankClassifier
from thaw.predict.predictor import checked_record, data_record
from thaw.run.checkpoint import find_checkpoint, load_model, pretraining_hint, read_checkpoint, run_folder
from thaw.run.console import plural
from thaw.run.errors import UserError
from thaw.task import check_single_label


def find_teachers(wanted: str | Sequence[str] | None) -> list[str] | None:
    """The checkpoint files that `distill` means, None for no distillation.

    Raises:
        UserError: there is no such checkpoint, or one of them is named twice.
    """
    if wanted is None:
        return None
    found = [str(find_checkpoint(each, "best.ckpt")) for each in ([wanted] if isinstance(wanted, str) else wanted)]
    if twice := [path for path in found if found.count(path) > 1]:
        raise UserError(f"distill names {twice[0]} twice; give each teacher once.")
    return found


class SoftTargets(Callback):
    """Gives training batches the mean of the teachers' probabilities, for the loss `thaw.task.Distillation`.

    The teachers see each image once and as it is, whatever augmentation the student trains with: the fixed teacher of
    Beyer et al. (2022, arXiv:2106.05237). Teachers that see the student's own view would run in every step.

    Args:
        teachers: their checkpoint files.
        cache: for the probabilities; its mode `off` computes them in every run.
        allow: as for `thaw.run.checkpoint.read_checkpoint`.

    Raises:
        UserError: when training starts, if the student has no such loss, or a teacher knows other classes or images.
    """

    def __init__(self, teachers: Sequence[str], cache: FeatureCache, allow: Sequence[str]) -> None:
        self.teachers, self.cache, self.allow = [Path(path) for path in teachers], cache, allow
        self.cache.what = "soft targets"
        self.dataset: Any = None  # whose batches carry soft targets

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        if stage != "fit":
            return
        if not isinstance(pl_module, Classifier) or isinstance(pl_module, BankClassifier):
            raise UserError(
                f"distill= trains a classifier with one head, and this run trains a {type(pl_module).__name__}; leave "
                "distill out."
            )
        check_single_label(pl_module.task, "distill=")

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.dataset = trainer.datamodule.split_dataset("train")
        images, labels = self.dataset.data
        with forked_rng(trainer):  # a model is built with random weights first
            models = [self.load_teacher(path, trainer.datamodule.load(), trainer) for path in self.teachers]

        @torch.no_grad()
        def probabilities(indices: Tensor) -> Tensor:  # (B,) -> (B, K)
            batch = images[indices.to(images.device)].to(trainer.strategy.root_device)
            with trainer.precision_plugin.forward_context():
                logits = [model(batch) for model in models]
            given = [model.task.probabilities(each.float()) for model, each in zip(models, logits, strict=True)]
            return torch.stack(given).mean(dim=0)

        def compute(indices: Tensor) -> Tensor:
            return by_batches(probabilities, indices)

        facts = {
            "teachers": sorted(map(file_sha256, self.teachers)),
            "images": tensors_sha256({"train": images}),
            "precision": trainer.precision,
        }
        tokens = max(model.backbone.num_tokens for model in models)
        if self.cache.mode == "off":
            self.cache.mode = "memory"
        means = self.cache.features("train", len(images), compute, tokens, facts, trainer)
        if means is None:
            raise UserError(f"distill= needs them; raise cache.max_gb={self.cache.max_gb:g}.")
        self.cache.summarise(trainer)
        means = means.to(labels.device)
        right = float((means.argmax(dim=1) == labels).double().mean())
        report(trainer, f"distill: {plural(len(models), 'teacher')}, {right:.2%} of the training labels")
        self.dataset.soft_targets = pl_module.distillation.soften(means)

    def load_teacher(self, path: Path, source: Source, trainer: Trainer) -> Classifier:
        """The classifier of a checkpoint on the training device, after a check that it is for these images."""
        checkpoint = read_checkpoint(path, self.allow)
        model = load_model(checkpoint)
        if not isinstance(model, Classifier):
            raise UserError(pretraining_hint(run_folder(path)))
        check_single_label(model.task, f"distill={path}")
        record = checked_record(data_record(checkpoint, model.num_classes), path)
        check_same_classes(record["classes"], source, f"distill={path}")
        if tuple(record["shape"]) != source.shape:
            raise UserError(
                f"distill={path} was trained on images of {tuple(record['shape'])} (channels, height, width), and "
                f"those of {source.title} are {source.shape}; give a teacher of such images."
            )
        trainer.precision_plugin.convert_module(model)  # in place
        return model.to(trainer.strategy.root_device)

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        self.dataset.soft_targets = None


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
