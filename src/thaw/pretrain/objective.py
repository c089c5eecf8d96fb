"""The base of every pretraining objective: a backbone learns from images without labels and is written to a file.

Shapes: B batch, D feature width, C channels, S image side.
"""

from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from safetensors.torch import save
from torch import Tensor
from torch.nn import SyncBatchNorm
from torch.nn.modules.batchnorm import _BatchNorm

from thaw.data.augment import Augment
from thaw.data.loader import Batch
from thaw.data.preprocess import Preprocess
from thaw.models.backbone import Backbone
from thaw.optim import OptimizerRecipe
from thaw.run.errors import UserError
from thaw.run.files import write_bytes


class Objective(LightningModule):
    """A backbone under a pretraining loss. A subclass has `loss`, or steps of its own, and `contact_sheet`.

    It never trains on labels; `callbacks.feature_monitor` uses them to measure the features.

    Args:
        backbone: images (B, C, S, S) -> features (B, D).
        augment: uint8 (B, C, H, W) -> uint8 (B, C, H, W), random.
        optim: groups, optimizer and schedule.
        output: path of the safetensors file that the trained backbone is written to (fp16).
    """

    def loss(self, images: Tensor) -> Tensor:
        """The scalar to minimize, of uint8 images (B, C, H, W); it may draw random numbers."""
        raise NotImplementedError

    def contact_sheet(self, images: Tensor) -> tuple[list[Tensor], list[str]]:
        """Rows of pictures (K, C, S, S) of validation images, uint8 (N, C, H, W), that show progress; and titles."""
        raise NotImplementedError

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = self.loss(batch.images)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        with torch.random.fork_rng():  # the same masks, views and orders after every epoch
            torch.manual_seed(batch_idx)
            loss = self.loss(batch.images)
        self.log("val/loss", loss, prog_bar=True, sync_dist=True, batch_size=len(batch.images))

    def features(self, images: Tensor) -> Tensor:
        """uint8 (B, C, H, W) -> features for a probe, (B, D)."""
        return self.backbone(self.preprocess(images))

    def __init__(self, backbone: Backbone, augment: Augment, optim: OptimizerRecipe, output: str) -> None:
        super().__init__()
        if not output.endswith(".safetensors"):
            raise UserError(f"model.output={output} must end in .safetensors, the only format it is written in.")
        self.preprocess = Preprocess(backbone.image_size, backbone.channels, backbone.mean, backbone.std)
        self.backbone = backbone
        self.augment = augment
        self.optim = optim
        self.output = output

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        trained = [(name, parameter) for name, parameter in self.named_parameters() if parameter.requires_grad]
        return self.optim.build(trained, self.depths(), {}, self.trainer)

    def depths(self) -> dict[str, int]:
        """Depth of every parameter; the objective's own ones are the deepest."""
        depths = {f"backbone.{name}": depth for name, depth in self.backbone.depths().items()}
        top = max(depths.values()) + 1
        return {name: depths.get(name, top) for name, _ in self.named_parameters()}

    def on_train_start(self) -> None:
        """Refuse batch norms that would make several processes differ from one on the same images."""
        norms = {name: module for name, module in self.named_modules() if isinstance(module, _BatchNorm)}
        alone = [name for name, module in norms.items() if not isinstance(module, SyncBatchNorm)]
        if alone and self.trainer.world_size > 1:
            raise UserError(
                f"{alone[0]} would take its statistics from the images of one process alone. On GPUs set "
                "trainer.sync_batchnorm=true; on CPUs, which cannot, trainer.devices=1."
            )

    def on_train_end(self) -> None:
        """Write the backbone for `backbone.weights=<file>`."""
        if self.trainer.is_global_zero:
            save_backbone(self.backbone, Path(self.output))

    def gather(self, rows: Tensor) -> Tensor:
        """(B, ...) of this process -> those of all processes in order of rank; gradients reach every process.

        Processes may hold different numbers of rows. Each process's gradient of a loss over all rows is multiplied by
        the number of processes, which DDP's mean over processes undoes.
        """
        if self.trainer.world_size == 1:
            return rows
        own: Any = self.all_gather(torch.tensor(len(rows), device=rows.device))
        sizes = own.tolist()
        padding = rows.new_zeros(max(sizes) - len(rows), *rows.shape[1:])
        parts: Any = self.all_gather(torch.cat([rows, padding]), sync_grads=True)  # (processes, B, ...)
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])


def save_backbone(backbone: Backbone, path: Path) -> None:
    """Write the timm model's state dict as safetensors; fp16, but for integers (counters) and what it cannot hold."""
    tensors = {name: tensor.cpu().contiguous() for name, tensor in backbone.model.state_dict().items()}
    halves = {name: tensor.half() for name, tensor in tensors.items() if tensor.is_floating_point()}
    fitting = {name: half for name, half in halves.items() if half.isfinite().all()}
    write_bytes(save(tensors | fitting), path)
