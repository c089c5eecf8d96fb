"""Many learning rates and weight decays at once: independent heads on the same batches of a frozen backbone.

The linear probes of DINOv2 are searched so (Oquab et al. 2023, their dinov2/eval/linear.py). The gradient of a sum of
losses is, for each head, that of its own loss, so that every head trains as it would in a run of its own.

Shapes: B batch, D feature width, K heads.
"""

import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.optim import Optimizer

from thaw.classifier import Classifier
from thaw.data.datamodule import Batch
from thaw.data.mix import main_labels
from thaw.lr_bank import BankRecipe, LRBank
from thaw.run.loggers import log_image


class BankClassifier(Classifier):
    """A classifier whose head is an `LRBank`: it trains all K heads and validates them, and tests the chosen one.

    What is logged is the chosen head's, but for `val/acc_<head>` and `train/loss_<head>`, which are each head's. A head
    that diverges drops out, and the others go on.

    Attributes:
        best_acc: the best validation accuracy of each head so far (K,).
        winner: after training, the learning rate and weight decay of the head in the best checkpoint.

    Raises:
        ValueError: when training starts, if the heads would depend on each other, or could not be chosen.
    """

    head: LRBank

    def setup(self, stage: str) -> None:
        if not isinstance(self.head, LRBank):
            raise ValueError(f"model=lr_bank needs head=lr_bank, not {type(self.head).__name__}; leave model= out.")
        super().setup(stage)
        if not hasattr(self, "best_acc"):
            self.best_acc = torch.zeros(len(self.head.names))
        if stage != "fit":
            return
        thaw_epochs = self.freeze_policy.thaw_epochs(self.depths())
        others = [name for name, epoch in thaw_epochs.items() if epoch < math.inf and not name.startswith("head.")]
        if others:
            raise ValueError(
                f"head=lr_bank trains {len(self.head.names)} heads on one frozen backbone, but the freezing policy "
                f"trains {others[0]} and {len(others) - 1} more tensors: no head would be independent of the others. "
                "Use freeze=linear_probe, or a run for each rate: -m head=linear optim.lr=1e-4,1e-3."
            )
        if self.trainer.precision == "16-mixed":
            raise ValueError(
                "head=lr_bank cannot train with trainer.precision=16-mixed, whose loss scaler skips a step of all "
                "heads when the gradient of one overflows; use bf16-mixed or 32-true."
            )
        if self.trainer.limit_val_batches == 0:
            raise ValueError(
                "head=lr_bank chooses a head on validation, but trainer.limit_val_batches=0; set it to null."
            )

    def on_train_start(self) -> None:
        super().on_train_start()
        self.train_sums = torch.zeros(3, len(self.head.names), device=self.device)  # since the epoch, or a resume

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        targets = batch.labels  # (B,), or (B, 10) where images are mixed
        if batch.features is None:
            images = self.preprocess(self.augment(batch.images))  # (B, 28, 28) uint8 -> (B, C, S, S)
            images, targets = self.mix(images, targets, self.num_classes)
            features = self.backbone(images)  # (B, D)
        else:
            features = self.backbone.suffix(batch.features.to(self.dtype), self.cut)
        losses, sums = measure(self.head.logits(features), targets, self.label_smoothing)
        self.train_sums += sums
        self.log("train/loss", losses.detach().take(self.head.chosen), prog_bar=True)
        finite = losses.isfinite()
        return losses.where(finite | ~finite.any(), 0).sum()  # where none is finite, `FiniteLoss` stops the run

    def on_train_epoch_end(self) -> None:
        losses, accuracies = self.means(self.train_sums)
        self.train_sums.zero_()
        self.log("train/acc", accuracies.take(self.head.chosen), sync_dist=True)
        for name, loss in zip(self.head.names, losses, strict=True):
            self.log(f"train/loss_{name}", loss, sync_dist=True)

    def on_validation_epoch_start(self) -> None:
        self.val_sums = torch.zeros(3, len(self.head.names), device=self.device)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        if batch.features is None:
            features = self.backbone(self.preprocess(batch.images))
        else:
            features = self.backbone.suffix(batch.features.to(self.dtype), self.cut)
        _, sums = measure(self.head.logits(features), batch.labels, label_smoothing=0.0)
        self.val_sums += sums

    def on_validation_epoch_end(self) -> None:
        losses, accuracies = self.means(self.val_sums)
        if self.trainer.state.fn == TrainerFn.FITTING and not self.trainer.sanity_checking:
            accuracies = accuracies.where(losses.isfinite(), 0)
            self.head.choose(accuracies)
            self.best_acc = torch.maximum(self.best_acc, accuracies.cpu())
        self.log("val/loss", losses.take(self.head.chosen), sync_dist=True)
        self.log("val/acc", accuracies.take(self.head.chosen), prog_bar=True, sync_dist=True)
        for name, accuracy in zip(self.head.names, accuracies, strict=True):
            self.log(f"val/acc_{name}", accuracy, sync_dist=True)

    def means(self, sums: Tensor) -> tuple[Tensor, Tensor]:
        """Loss and accuracy of each head (K,), over the digits of all processes."""
        loss, right, digits = self.trainer.strategy.reduce(sums, reduce_op="sum")
        return loss / digits, right / digits

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        if self.trainer.is_global_zero:
            print(
                f"lr_bank: {len(self.head.names)} heads; head.lrs and head.weight_decays replace "
                f"optim.lr={self.optim.lr:g} and optim.weight_decay={self.optim.weight_decay:g}",
                flush=True,
            )
        depths = self.depths()
        recipe = BankRecipe(self.optim, self.head)
        return recipe.build(self.named_parameters(), depths, self.freeze_policy.thaw_epochs(depths), self.trainer)

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip the norm of each head's gradient, not of all together."""
        if not gradient_clip_val or gradient_clip_algorithm == "value":  # element by element anyway
            super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)
            return
        for head in self.head.heads:
            nn.utils.clip_grad_norm_(head.parameters(), gradient_clip_val)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["heads"] = dict(zip(self.head.names, self.best_acc.tolist(), strict=True))

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        heads = checkpoint["heads"]
        if list(heads) != self.head.names:
            raise ValueError(
                f"The checkpoint has the heads {', '.join(heads)}, but head.lrs and head.weight_decays ask for "
                f"{', '.join(self.head.names)}; a resumed run keeps its own, so leave these settings out."
            )
        self.best_acc = torch.tensor(list(heads.values()))

    def on_fit_end(self) -> None:
        """Tell the loggers which head the best checkpoint has chosen, and draw how all of them did."""
        if not self.trainer.is_global_zero:
            return
        from thaw.pages.lr_curve import save_lr_curve  # matplotlib, only for pictures

        best = getattr(self.trainer.checkpoint_callback, "best_model_path", "")
        state = self.trainer.strategy.load_checkpoint(best)["state_dict"] if best else self.state_dict()
        number = int(state["head.chosen"])
        lr, weight_decay = self.head.settings[number]
        self.winner = {"best_lr": lr, "best_weight_decay": weight_decay, "heads": len(self.head.names)}
        path = Path(self.trainer.default_root_dir) / "report" / "lr_bank.png"
        save_lr_curve(self.head.settings, self.best_acc.tolist(), number, path)
        log_image(self.trainer.loggers, "val/lr_bank", path)
        for logger in self.trainer.loggers:
            logger.log_metrics({"best/lr": lr, "best/weight_decay": weight_decay}, step=self.trainer.global_step)


def measure(logits: Tensor, targets: Tensor, label_smoothing: float) -> tuple[Tensor, Tensor]:
    """The mean loss of each head (K,), and sums over the batch (3, K): of loss, right answers and digits.

    Args:
        logits: (B, K, 10).
        targets: labels (B,), or shares of the classes (B, 10).
        label_smoothing: as in the loss.
    """
    digits, heads = logits.shape[:2]
    rows = targets.repeat_interleave(heads, dim=0)  # (B * K,) or (B * K, 10)
    losses = F.cross_entropy(logits.flatten(0, 1), rows, reduction="none", label_smoothing=label_smoothing)
    losses = losses.view(digits, heads)
    right = (logits.argmax(dim=2) == main_labels(targets)[:, None]).sum(dim=0)
    total = losses.detach().float().sum(dim=0)
    return losses.mean(dim=0), torch.stack([total, right, torch.full_like(total, digits)])
