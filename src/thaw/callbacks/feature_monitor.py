"""The quality of features during pretraining: nearest neighbours, signs of collapse, pictures."""

import warnings
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from lightning import Callback, LightningModule, Trainer
from pydantic import Field
from torch import Tensor

from thaw.data.batches import EVAL_BATCH, by_batches
from thaw.run.files import dispensable
from thaw.run.loggers import log_image
from thaw.run.values import Count


class FeatureMonitor(Callback):
    """Logs how good the features of the validation images are, and draws `<run_dir>/report/epoch_<n>.png`.

    After every validation: `val/knn_acc`, the share of images with the label that most of their 20 nearest neighbours
    (cosine) among the other validation images have. It shows progress and chooses nothing. After every validation, and
    every few steps on some images, `feature_std` and `effective_rank`; the first collapse of the features is warned of.

    Args:
        every_n_steps: between two checks for collapse.
        images: how many of the first validation images these checks and the picture take.
        min_std: below this `feature_std` the features count as constant.
    """

    def __init__(self, run_dir: str, every_n_steps: Count, images: Annotated[int, Field(ge=2)], min_std: float) -> None:
        self.folder = Path(run_dir) / "report"
        self.every_n_steps, self.images, self.min_std = every_n_steps, images, min_std
        self.warned = False

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step % self.every_n_steps == 0:
            images = validation_images(trainer).images[: self.images]
            self.check_collapse(trainer, pl_module, "train", features_of(pl_module, images))

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        images, labels = validation_images(trainer)  # every process takes all of them, so that all log the same
        features = features_of(pl_module, images)
        pl_module.log("val/knn_acc", knn_accuracy(features, labels), prog_bar=True)
        self.check_collapse(trainer, pl_module, "val", features)

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        if not trainer.is_global_zero:
            return
        from thaw.evaluation.pictures import on_paper, save_contact_sheet  # matplotlib, only for pictures

        path = self.folder / f"epoch_{trainer.current_epoch + 1:04d}.png"
        images = validation_images(trainer).images[: self.images]
        with torch.random.fork_rng(), trainer.precision_plugin.forward_context(), torch.no_grad():
            torch.manual_seed(0)  # the same masks each time, and a run that pictures do not change
            rows, titles = pl_module.contact_sheet(images)
        reader = getattr(trainer.datamodule, "reader", "photo")  # type: ignore[attr-defined]
        with dispensable():
            save_contact_sheet([on_paper(row.cpu(), reader) for row in rows], titles, path)
            log_image(trainer.loggers, "val/pretraining", path)

    def check_collapse(self, trainer: Trainer, pl_module: LightningModule, split: str, features: Tensor) -> None:
        """Log the two indicators, and warn once if the features have become constant."""
        std, directions = feature_std(features), effective_rank(features)
        pl_module.log_dict({f"{split}/feature_std": std, f"{split}/effective_rank": directions})
        if std < self.min_std and not self.warned and trainer.is_global_zero:
            self.warned = True
            warnings.warn(
                f"The features have collapsed: at step {trainer.global_step} their feature_std is {std:.4f} (0 is "
                f"constant, 1 is spread evenly; below {self.min_std} counts as collapse) and their effective_rank "
                f"{directions:.1f} of {features.shape[1]}. Stop the run; lower optim.lr, use a larger data.batch_size "
                "or another augment.",
                stacklevel=2,
            )


def validation_images(trainer: Any) -> Any:
    """All validation images and their labels, on the training device."""
    return trainer.datamodule.split_dataset("val").data


def features_of(pl_module: Any, images: Tensor) -> Tensor:
    """Features (N, D) in float32 and eval mode, which leaves the model as it was."""
    mode = pl_module.training
    pl_module.eval()
    with torch.no_grad(), pl_module.trainer.precision_plugin.forward_context():
        features = by_batches(lambda batch: pl_module.features(batch).float(), images)
    pl_module.train(mode)
    return features


def knn_accuracy(features: Tensor, labels: Tensor) -> Tensor:
    """Share of images, of features (N, D) and labels (N,), with the label of most of their 20 nearest others.

    Of classes with equal votes the lowest wins.
    """
    z, correct = F.normalize(features, dim=1), []
    for chosen in torch.arange(len(z), device=z.device).split(EVAL_BATCH):
        similarity = z[chosen] @ z.T  # (B, N)
        similarity[range(len(chosen)), chosen] = -torch.inf
        neighbours = labels[similarity.topk(min(20, len(labels) - 1)).indices]  # (B, 20)
        correct.append(neighbours.mode(dim=1).values == labels[chosen])
    return torch.cat(correct).float().mean()


def feature_std(features: Tensor) -> float:
    """Deviation of the features on the unit sphere, times the square root of their width (Chen & He 2020, section 4.1).

    1 for features that point in all directions alike, 0 for a constant.
    """
    z = F.normalize(features.float(), dim=1)
    return float(z.std(dim=0).mean() * z.shape[1] ** 0.5)


def effective_rank(features: Tensor) -> float:
    """In how many directions features vary: the exponential of the entropy of their singular values.

    Roy & Vetterli 2007; the features are centred. From 1, a line, to D; 0 for a constant.
    """
    centred = (features - features.mean(dim=0)).double()
    values = torch.linalg.svdvals(centred)
    if values.sum() <= 1e-6 * features.double().norm():  # rounding alone
        return 0.0
    return float(torch.special.entr(values / values.sum()).sum().exp())
