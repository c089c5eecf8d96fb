"""Surgical fine-tuning: the blocks that training would change most are measured before training, and they alone train.

The measure is the relative gradient norm of Lee et al. 2022 (arXiv:2210.11466, section 5, Auto-RGN), |gradient| /
|weights|. The paper scales learning rates by it in every epoch; here it chooses the blocks once.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from omegaconf import DictConfig
from pydantic import Field
from torch import Tensor, nn

from thaw.data.preprocess import Preprocess
from thaw.freezing.added import merge_added
from thaw.models.logistic import fit_logistic, standardisation
from thaw.run.checkpoint import load_model, read_checkpoint
from thaw.run.config import build
from thaw.run.console import say
from thaw.run.errors import UserError
from thaw.run.jobs import is_first_rank
from thaw.run.targets import targets
from thaw.run.values import Count

AT_ONCE = 32  # images whose gradients are computed together
FIT: dict[str, Any] = {"c": 1.0, "max_iterations": 100, "tolerance": 1e-4}  # of the heads; C as in scikit-learn


def choose_blocks(
    backbone: Any, images: Tensor, labels: Tensor, k: Count, batches: Annotated[int, Field(ge=2, strict=True)]
) -> tuple[list[int], dict[int, float]]:
    """The depths of the k blocks with the largest relative gradient norms, in ascending order, and all norms by depth.

    A fresh head would make the gradients random, and one of zeros would make them vanish. The paper's heads are trained
    on other data of the same classes; so each batch is measured through a logistic regression on the features of the
    other batches, which no random numbers enter.

    Args:
        backbone: with pretrained weights; it is left in eval mode and without gradients. It decides on the device.
        images: uint8 (N, C, H, W), the first of training.
        labels: int64 (N,).
        k: below the number of blocks. The stem is not a block.
        batches: into which the images are split.

    Raises:
        UserError: too few blocks, images or classes, labels of several classes an image, or random weights.
    """
    depths = backbone.depths()
    check_measurable(backbone, labels, k, max(depths.values()))
    device = next(backbone.parameters()).device
    preprocess = Preprocess(backbone.image_size, backbone.channels, backbone.mean, backbone.std).to(device)
    parts = torch.arange(len(images)).tensor_split(min(batches, len(images)))  # of indices
    labels, norms = labels.to(device), dict.fromkeys(range(1, 1 + max(depths.values())), 0.0)
    backbone.eval().requires_grad_(False)
    features = torch.cat([backbone(preprocess(some.to(device))) for some in images.split(AT_ONCE)])  # (N, D)
    backbone.requires_grad_(True)
    for part in parts:
        head = fitted_head(features, labels, part)
        backbone.zero_grad()
        for some in part.split(AT_ONCE):
            logits = head(backbone(preprocess(images[some].to(device))))  # (B, K)
            (F.cross_entropy(logits, labels[some], reduction="sum") / len(part)).backward()
        for depth in norms:
            named = [p for name, p in backbone.named_parameters() if depths[name] == depth]
            gradients = [p.grad for p in named if p.grad is not None]
            norms[depth] += float(nn.utils.get_total_norm(gradients) / nn.utils.get_total_norm(named)) / len(parts)
    backbone.zero_grad()
    return sorted(sorted(norms, key=lambda depth: -norms[depth])[:k]), norms


def fitted_head(features: Tensor, labels: Tensor, left_out: Tensor) -> nn.Module:
    """A linear head (B, D) -> (B, K), fitted to all features (N, D) but those of some indices."""
    kept = torch.ones_like(labels, dtype=torch.bool)
    kept[left_out] = False
    mean, std = standardisation(features[kept])
    start = features.new_zeros(int(labels.max()) + 1, features.shape[1])  # (K, D)
    weight, bias, _ = fit_logistic(
        (features[kept] - mean) / std, labels[kept], weight=start, bias=start[:, 0].clone(), **FIT
    )
    head = nn.Linear(features.shape[1], len(bias), device=features.device)
    head.weight.data, head.bias.data = weight / std, bias - weight @ (mean / std)
    return head.requires_grad_(False)


def check_measurable(backbone: Any, labels: Tensor, k: int, blocks: int) -> None:
    if k >= blocks:
        raise UserError(
            f"freeze.k={k} of freeze=surgical must be below {blocks}, the backbone's blocks"
            + ("." if blocks > 1 else "; choose a policy without blocks, e.g. freeze=linear_probe.")
        )
    if labels.ndim > 1 or len(labels) < 2 or len(labels.unique()) < 2:
        raise UserError(
            "freeze=surgical needs training images of two classes or more, with one class an image, to measure "
            "gradients; choose the blocks yourself: freeze=last_blocks or first_blocks."
        )
    if backbone.fresh:
        raise UserError("freeze=surgical measures pretrained weights, and backbone.weights=none are random; load some.")


def settle_chosen(cfg: DictConfig, datamodule: Any) -> None:
    """Write `freeze.chosen` where the freezing policy leaves it to a measurement, and print one line about it.

    It takes the first batches of the first epoch as they are, without augmentation, and the weights from which training
    starts. The run's random numbers are seeded afterwards. Rank 0 calls it before it starts the other ranks.
    """
    if cfg.freeze.get("chosen", ()) is not None:
        return
    measure = build(cfg.freeze.surgical)
    if cfg.start_from:
        source = load_model(read_checkpoint(Path(cfg.start_from), [*cfg.allow, *targets(cfg)]))
        merge_added(source)
        backbone = source.backbone
        backbone.fresh = frozenset()
    else:
        backbone = build(cfg.backbone)
    datamodule.setup("fit")
    first = list(islice(datamodule.train_dataloader(), cfg.freeze.surgical.batches))
    with freed_memory():
        images, labels = (torch.cat([getattr(batch, part) for batch in first]) for part in ("images", "labels"))
        chosen, norms = measure(backbone=backbone.to(device_of(cfg.trainer)), images=images, labels=labels)
    cfg.freeze.chosen = chosen
    if is_first_rank():
        measured = " ".join(f"{norm:.2g}" for norm in norms.values())
        train = f"blocks {', '.join(map(str, chosen))} train" if len(chosen) > 1 else f"block {chosen[0]} trains"
        say(f"surgical: {train}; |gradient| / |weights| of blocks 1 to {len(norms)}: {measured}")


def device_of(trainer: DictConfig) -> torch.device:
    """The first device of a run, on which its rank 0 trains; of a launched rank its own."""
    found = None if trainer.accelerator == "cpu" else torch.accelerator.current_accelerator(check_available=True)
    if found is None or found.type != "cuda":
        return found or torch.device("cpu")
    return torch.device(found.type, int(os.environ.get("LOCAL_RANK", 0)))


@contextmanager
def freed_memory() -> Iterator[None]:
    """Give a GPU's memory back afterwards."""
    yield
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
