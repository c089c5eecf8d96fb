"""Self-supervised pretraining by SimCLR (Chen et al. 2020, arXiv:2002.05709): two views of a digit should agree.

Shapes: B batch, D feature width, P projection width.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from lightning import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from safetensors.torch import save_file
from torch import Tensor, nn

from thaw.data.datamodule import Batch
from thaw.data.preprocess import Preprocess
from thaw.models.backbone import Backbone
from thaw.models.optim import OptimizerRecipe


class SimCLR(LightningModule):
    """A backbone under a projection head, trained with NT-Xent on two augmented views. Labels are never trained on.

    Validation reports how well 20 nearest neighbours (cosine) among the other validation digits predict a digit's
    label: a cheap sign of progress that chooses nothing. The negatives of a digit are those of its own process.

    Args:
        backbone: images (B, C, S, S) -> features (B, D).
        augment: uint8 (B, 28, 28) -> uint8 (B, 28, 28), random.
        optim: groups, optimizer and schedule.
        projection: width P of the projection head's output, and of its hidden layer.
        temperature: of NT-Xent.
        output: path of the safetensors file that the trained backbone is written to (fp16).
    """

    def __init__(
        self,
        backbone: Backbone,
        augment: nn.Module,
        optim: OptimizerRecipe,
        projection: int,
        temperature: float,
        output: str,
    ) -> None:
        super().__init__()
        if not output.endswith(".safetensors"):
            raise ValueError(f"model.output={output} must end in .safetensors, which is the format it is written in.")
        self.augment = augment
        self.preprocess = Preprocess(backbone.image_size, backbone.channels, backbone.mean, backbone.std)
        self.backbone = backbone
        width = backbone.num_features
        self.projector = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, projection))
        self.optim = optim
        self.temperature = temperature
        self.output = output
        self.val_features: list[Tensor] = []
        self.val_labels: list[Tensor] = []

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        views = self.augment(batch.images.repeat(2, 1, 1))  # (2B, 28, 28) uint8
        features = self.backbone(self.preprocess(views))  # (2B, D)
        loss = nt_xent(self.projector(features), self.temperature)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.val_features.append(F.normalize(self.backbone(self.preprocess(batch.images)).float(), dim=1))
        self.val_labels.append(batch.labels)

    def on_validation_epoch_end(self) -> None:
        features, labels = torch.cat(self.val_features), torch.cat(self.val_labels)
        self.val_features, self.val_labels = [], []
        similarity = (features @ features.T).fill_diagonal_(-torch.inf)  # (N, N)
        neighbours = labels[similarity.topk(min(20, len(labels) - 1)).indices]  # (N, 20)
        self.log("val/knn_acc", (neighbours.mode(dim=1).values == labels).float().mean(), prog_bar=True, sync_dist=True)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        return self.optim.build(self.named_parameters(), self.depths(), {}, self.trainer)

    def depths(self) -> dict[str, int]:
        """Depth of every parameter; the projection head is the deepest."""
        depths = {f"backbone.{name}": depth for name, depth in self.backbone.depths().items()}
        num_layers = max(depths.values()) + 1
        return depths | {f"projector.{name}": num_layers for name, _ in self.projector.named_parameters()}

    def on_train_end(self) -> None:
        """Write the backbone for `backbone.weights=<file>`."""
        if self.trainer.is_global_zero:
            save_backbone(self.backbone, Path(self.output))


def nt_xent(projections: Tensor, temperature: float) -> Tensor:
    """Normalised temperature-scaled cross-entropy (Chen et al. 2020, equation 1 and algorithm 1).

    Args:
        projections: (2B, P), rows i and i + B being two views of the same digit.
        temperature: divides the cosine similarities.

    Returns:
        the mean over all 2B rows of -log(exp(positive) / sum of exp over the other 2B - 1 rows).
    """
    z = F.normalize(projections.float(), dim=1)
    with torch.autocast(z.device.type, enabled=False):  # a product in bf16 would be off by 0.004 / temperature
        similarity = (z @ z.T / temperature).fill_diagonal_(-torch.inf)  # (2B, 2B)
    half = len(z) // 2
    positives = torch.arange(2 * half, device=z.device).roll(half)  # row i pairs with i + B, and i + B with i
    return F.cross_entropy(similarity, positives)


def save_backbone(backbone: Backbone, path: Path) -> None:
    """Write the timm model's state dict as safetensors, whole or not at all; fp16, except for integers (counters)."""
    state = {
        name: (tensor.half() if tensor.is_floating_point() else tensor).cpu().contiguous()
        for name, tensor in backbone.model.state_dict().items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    save_file(state, part)
    part.replace(path)
