"""Many learning rates and weight decays at once: independent heads on the same batches of a frozen backbone.

The linear probes of DINOv2 are searched like this (Oquab et al. 2023, their dinov2/eval/linear.py). The gradient of a
sum of losses is, for each head, that of its own loss, so that every head trains as it would in a run of its own.

Shapes: B batch, D feature width, H heads, K classes.
"""

import copy
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from pydantic import Field
from torch import Tensor, nn
from torch.optim import Optimizer

from thaw.classifier import Classifier
from thaw.data.loader import Batch
from thaw.data.mix import main_labels
from thaw.freezing.policy import NEVER
from thaw.models.heads import LinearHead
from thaw.optim import OptimizerRecipe
from thaw.run.console import say
from thaw.run.errors import UserError
from thaw.run.steps import is_logged
from thaw.run.values import NonNegative, Positive
from thaw.task import check_single_label


class BankClassifier(Classifier):
    """A classifier whose head is an `LRBank`: it trains all H heads, validates them, and tests the chosen one.

    The metrics are the chosen head's, except for `val/acc_<head>` and `train/loss_<head>`, which are each head's. A
    head that diverges drops out, and the others continue.

    Attributes:
        best_acc: the best validation accuracy of each head so far (H,).
        winner: after training, learning rate and weight decay of the head in the best checkpoint (set by `LRCurve`).

    Raises:
        UserError: when training starts, if the heads would depend on each other, or could not be chosen.
    """

    head: "LRBank"
    best_acc: Tensor
    winner: dict[str, float]

    @property
    def spare_params(self) -> int:
        """How many parameters the heads have that are not chosen."""
        return sum(parameter.numel() for head in self.head.heads[1:] for parameter in head.parameters())

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        features, targets, _ = self.training_features(batch)
        losses, sums = measure_heads(self.head.logits(features), targets, self.task.training_loss)
        self.train_sums += sums
        if is_logged(self._trainer):
            self.log("train/loss", losses.detach().take(self.head.chosen), prog_bar=True)
        finite = losses.isfinite()
        return losses.where(finite | ~finite.any(), 0).sum()  # where none is finite, `FiniteLoss` stops the run

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        _, sums = measure_heads(self.head.logits(self.features(batch)), batch.labels, self.task.loss)
        self.val_sums += sums

    def on_train_epoch_end(self) -> None:
        losses, accuracies = self.means(self.train_sums)
        self.log("train/acc", accuracies.take(self.head.chosen), sync_dist=True)
        for name, loss in zip(self.head.names, losses, strict=True):
            self.log(f"train/loss_{name}", loss, sync_dist=True)

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
        """Loss and accuracy of each head (H,), over the images of all processes."""
        loss, correct, images = self.trainer.strategy.reduce(sums, reduce_op="sum")
        return loss / images, correct / images

    def is_spare(self, parameter: str) -> bool:
        """Whether a parameter is a head's that was not chosen: it may diverge."""
        return parameter.startswith("head.heads.") and int(parameter.split(".")[2]) != int(self.head.chosen)

    def setup(self, stage: str) -> None:
        if not isinstance(self.head, LRBank):
            raise UserError(f"model=lr_bank needs head=lr_bank, not {type(self.head).__name__}; leave model= out.")
        super().setup(stage)
        check_single_label(self.task, "head=lr_bank")
        if not hasattr(self, "best_acc"):
            self.best_acc = torch.zeros(len(self.head.names))
        self.train_sums = torch.zeros(3, len(self.head.names))  # in this epoch; no buffer, as ranks have their own
        if stage != "fit":
            return
        others = [name for name, epoch in self.thaw.epochs.items() if epoch < NEVER and not name.startswith("head.")]
        if others:
            raise UserError(
                f"head=lr_bank trains {len(self.head.names)} heads on one frozen backbone, but the freezing policy "
                f"trains other tensors, too, such as {others[0]}: no head would be independent of the others. "
                "Use freeze=linear_probe, or a run for each rate: -m head=linear optim.lr=1e-4,1e-3."
            )
        if self.trainer.precision == "16-mixed":
            raise UserError(
                "head=lr_bank cannot train with trainer.precision=16-mixed, whose loss scaler skips a step of all "
                "heads when the gradient of one overflows; use bf16-mixed or 32-true."
            )
        if self.trainer.limit_val_batches == 0:
            raise UserError(
                "head=lr_bank chooses a head on validation, but trainer.limit_val_batches=0; set it to null."
            )

    def on_train_start(self) -> None:
        self.train_sums = self.train_sums.to(self.device)

    def on_train_epoch_start(self) -> None:
        self.train_sums.zero_()

    def on_validation_epoch_start(self) -> None:
        self.val_sums = torch.zeros(3, len(self.head.names), device=self.device)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        if self.trainer.is_global_zero:
            replaced = f"optim.lr={self.optim.lr:g} and optim.weight_decay={self.optim.weight_decay:g}"
            say(f"lr_bank: {len(self.head.names)} heads; head.lrs and head.weight_decays replace {replaced}")
        recipe = BankRecipe(self.optim, self.head)
        return recipe.build(self.named_parameters(), self.thaw.depths, self.thaw.epochs, self.trainer)

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
            raise UserError(
                f"The checkpoint has the heads {', '.join(heads)}, but head.lrs and head.weight_decays ask for "
                f"{', '.join(self.head.names)}; a resumed run keeps its own, so leave these settings out."
            )
        self.best_acc = torch.tensor(list(heads.values()))

    def epoch_so_far(self) -> dict[str, Any]:
        return {"sums": self.trainer.strategy.reduce(self.train_sums.clone(), reduce_op="sum")}

    def continue_epoch(self, so_far: dict[str, Any]) -> None:
        if self.trainer.is_global_zero:
            self.train_sums = so_far["sums"]


class LRBank(nn.Module):
    """H linear heads with equal initial weights, one for each pair of a learning rate and a weight decay.

    Args:
        norm: of the features, see `LinearHead`; one for all heads, as it depends on the features alone.
        lrs: peak learning rates.
        weight_decays: of the heads' weights; biases have none.

    Attributes:
        settings: learning rate and weight decay of each head.
        names: of the heads, e.g. `lr=0.001_wd=0`.
        chosen: buffer (), the head that `forward` uses: the best of the latest validation, of equals the earlier.

    Raises:
        UserError: a number that is given twice.
    """

    chosen: Tensor

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        norm: Literal["layer", "batch", "none"],
        lrs: Annotated[Sequence[Positive], Field(min_length=1, description="e.g. [1e-3,1e-2]")],
        weight_decays: Annotated[Sequence[NonNegative], Field(min_length=1, description="e.g. [0.0,1e-2]")],
    ) -> None:
        super().__init__()
        for key, values in {"lrs": lrs, "weight_decays": weight_decays}.items():
            names = [f"{value:g}" for value in values]  # as in the names of the heads
            if twice := [name for name in names if names.count(name) > 1]:
                raise UserError(f"head.{key}={list(values)} holds {twice[0]} twice; give each once, up to 6 digits.")
        self.settings = list(itertools.product(lrs, weight_decays))
        self.names = [f"lr={lr:g}_wd={weight_decay:g}" for lr, weight_decay in self.settings]
        single = LinearHead(in_features, num_classes, norm)
        self.norm = single.norm
        self.heads = nn.ModuleList(copy.deepcopy(single.linear) for _ in self.settings)
        self.register_buffer("chosen", torch.tensor(0))

    def logits(self, features: Tensor) -> Tensor:
        """(B, D) -> the logits of all heads (B, H, K)."""
        weight = torch.cat([head.weight for head in self.heads])  # type: ignore[misc]  # (H K, D)
        bias = torch.cat([head.bias for head in self.heads])  # type: ignore[misc]
        return F.linear(self.norm(features), weight, bias).unflatten(1, (len(self.heads), -1))

    def forward(self, features: Tensor) -> Tensor:
        """(B, D) -> the logits of the chosen head (B, K)."""
        if self.training:
            raise UserError("head=lr_bank trains with model=lr_bank, which it selects; leave model= out.")
        return self.logits(features).index_select(1, self.chosen).squeeze(1)

    def choose(self, accuracies: Tensor) -> None:
        """Choose the head with the highest of the validation accuracies (H,)."""
        self.chosen.copy_(accuracies.argmax())  # the first of equals


class BankRecipe(OptimizerRecipe):
    """A recipe by which every head of a bank is updated with its own learning rate and weight decay.

    Args:
        recipe: for everything else; its own `lr` and `weight_decay` are replaced.
        bank: the heads.
    """

    def __init__(self, recipe: OptimizerRecipe, bank: LRBank) -> None:
        vars(self).update(vars(recipe))
        self.recipe, self.bank = recipe, bank

    def groups(
        self,
        named_parameters: Iterable[tuple[str, nn.Parameter]],
        depths: Mapping[str, int],
        thaw_epochs: Mapping[str, float],
    ) -> list[dict[str, Any]]:
        """For each head the groups that the recipe of a run of its own makes."""
        named, groups = dict(named_parameters), []
        for number, (lr, weight_decay) in enumerate(self.bank.settings):
            single = copy.copy(self.recipe)
            single.lr, single.weight_decay = lr, weight_decay
            own = [(name, parameter) for name, parameter in named.items() if name.startswith(f"head.heads.{number}.")]
            for group in single.groups(own, depths, thaw_epochs):
                kind = group["name"].partition("/")[2]  # decay | no_decay
                groups.append(group | {"name": f"{self.bank.names[number]}/{kind}"})
        return groups


def measure_heads(logits: Tensor, targets: Tensor, loss: Callable[..., Tensor]) -> tuple[Tensor, Tensor]:
    """The mean loss of each head (H,), and sums over the batch (3, H): of loss, correct predictions and images.

    Logits are (B, H, K), targets labels (B,) or shares of the classes (B, K); `loss` is the task's.
    """
    images, heads = logits.shape[:2]
    rows = targets.repeat_interleave(heads, dim=0)  # (B H,) or (B H, K)
    losses = loss(logits.flatten(0, 1), rows, reduction="none").view(images, heads)
    correct = (logits.argmax(dim=2) == main_labels(targets)[:, None]).sum(dim=0)
    total = losses.detach().float().sum(dim=0)
    return losses.mean(dim=0), torch.stack([total, correct, torch.full_like(total, images)])
