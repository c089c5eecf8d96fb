"""Linear probes of a sweep that differ in learning rate or weight decay: their steps are computed together.

Shapes: H probes, B batch, D feature width, K classes, S steps of an epoch.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from lightning import Callback, Trainer
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from torch import Tensor
from torch.optim import AdamW

from thaw.callbacks.finite_loss import FiniteLoss
from thaw.callbacks.preemption import Preemption
from thaw.callbacks.progress import RunProgress
from thaw.callbacks.step_monitor import StepMonitor
from thaw.callbacks.step_seed import StepSeed
from thaw.classifier import Classifier
from thaw.data.loader import ImageLoader
from thaw.models.heads import LinearHead
from thaw.optim import OptimizerRecipe
from thaw.run.steps import step_hooks
from thaw.run.stopwatch import STOPWATCH
from thaw.task import is_single_label

MOST_WEIGHTS = 1_000_000  # weights of all probes together: the bank holds copies of them for every epoch
MISS_STEPS = (FiniteLoss, LearningRateMonitor, ModelCheckpoint, Preemption, RunProgress, StepMonitor, StepSeed)


@dataclass
class BankEpoch:
    """The steps of an epoch, of all probes."""

    states: dict[int, Tensor] = field(default_factory=dict)  # (3, K, H, D + 1) before some of the steps
    norms: list[Tensor] = field(default_factory=list)  # S times (H, 2), of the gradients of weight and bias, unclipped
    predictions: list[Tensor] = field(default_factory=list)  # S times (B, H)
    labels: list[Tensor] = field(default_factory=list)  # S times (B,)
    losses: list[Tensor] = field(default_factory=list)  # S times (H,)


class ProbeBank:
    """H linear heads that start from the same weights and see the same batches, each with its own AdamW.

    The first run that asks for an epoch has it computed; the others get the same numbers.

    Args:
        settings: learning rate and weight decay of each probe.
    """

    def __init__(self, settings: Sequence[tuple[float, float]]) -> None:
        self.settings = list(settings)
        self.rates, self.decays = torch.tensor(settings).T[..., None]  # (H, 1) both
        self.epochs: list[BankEpoch] = []
        self.state = torch.empty(0)  # (3, K, H, D + 1): weight with the bias as last column, both moments of AdamW
        self.step = 0

    def train_epoch(self, trainer: Any, module: Any, batches: Sequence[Tensor], own: Sequence[int]) -> None:
        """Compute the next epoch on batches of indices (B,), and remember the states before the steps `own`."""
        epoch, head, dataset = BankEpoch(), module.head, trainer.train_dataloader.dataset
        optimizer, total_steps = trainer.optimizers[0].param_groups[0], trainer.estimated_stepping_batches
        if not self.epochs:
            start = torch.cat([head.linear.weight, head.linear.bias[:, None]], dim=1).detach()  # (K, D + 1)
            self.state = torch.stack([start, torch.zeros_like(start), torch.zeros_like(start)])
            self.state = self.state[:, :, None].repeat(1, 1, len(self.settings), 1)
            self.rates, self.decays = self.rates.to(start), self.decays.to(start)
        for number, indices in enumerate(batches):
            if number in own:
                epoch.states[number] = self.state.clone()
            batch, theta = dataset[indices], self.state[0].requires_grad_()  # (K, H, D + 1)
            with torch.enable_grad(), trainer.precision_plugin.forward_context():
                features = head.norm(batch.features.to(module.dtype))  # (B, D)
                logits = F.linear(features, theta[..., :-1].flatten(0, 1), theta[..., -1].flatten())  # (B, K H)
                logits = logits.unflatten(1, theta.shape[:2])  # (B, K, H)
                labels = batch.labels[:, None].expand(-1, len(self.settings))  # (B, H)
                losses = module.task.training_loss(logits, labels, "none").mean(dim=0)  # (H,)
                (gradient,) = torch.autograd.grad(losses.sum(), theta)  # of each probe that of its own loss
            norms = torch.stack([gradient[..., :-1].norm(dim=(0, 2)), gradient[..., -1].norm(dim=0)], dim=1)  # (H, 2)
            if trainer.gradient_clip_val:
                gradient /= (norms.norm(dim=1) / trainer.gradient_clip_val).clamp(min=1.0)[:, None]
            fraction = module.optim.lr_fraction(self.step, total_steps, 0)
            self.adamw(gradient, fraction, optimizer["betas"], optimizer["eps"])
            epoch.norms.append(norms)
            epoch.predictions.append(logits.max(dim=1).indices.int())
            epoch.labels.append(batch.labels)
            epoch.losses.append(losses.detach())
        self.epochs.append(epoch)

    @torch.no_grad()
    def adamw(self, gradient: Tensor, fraction: float, betas: tuple[float, float], eps: float) -> None:
        """A step of AdamW (Loshchilov & Hutter 2017, algorithm 2), each probe at a fraction of its own rate."""
        self.step += 1
        (theta, mean, square), rates = self.state.detach(), fraction * self.rates
        theta[..., :-1] *= 1 - rates * self.decays  # biases do not decay
        mean.lerp_(gradient, 1 - betas[0])
        square.lerp_(gradient.square(), 1 - betas[1])
        root = (square / (1 - betas[1] ** self.step)).sqrt_() + eps
        theta -= rates / (1 - betas[0] ** self.step) * mean / root


BANKS: dict[str, ProbeBank] = {}  # by the folders of a sweep's runs


class SharedSteps(Callback):
    """Takes the steps of a linear probe from the bank of its sweep, where there is one.

    The run itself makes its first step, the steps that are logged and the last one of each epoch, and starts each of
    them from the bank's weights and moments. It takes the others from the bank. Its numbers are those of a run alone,
    up to rounding. Lightning's own work for the step of one probe takes longer than the arithmetic of all probes.

    A run stays alone where the bank cannot know its steps: other layers train, features are not cached, the head, the
    optimizer or the precision is another, a callback of your own has a hook for each step, or the run resumes.
    """

    def __init__(self, run_dir: str) -> None:
        self.bank = BANKS.get(run_dir)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        loop = trainer.fit_loop.epoch_loop
        if self.bank is None or trainer.global_step or not has_plain_steps(trainer, pl_module, self.bank):
            return
        self.probe = self.bank.settings.index((pl_module.optim.lr, pl_module.optim.weight_decay))
        self.monitors = [each for each in trainer.callbacks if isinstance(each, StepMonitor)]
        for monitor in self.monitors:
            monitor.is_alone = False
        own_step = loop.advance

        def advance(data_fetcher: Any) -> None:
            done = loop.batch_progress.current.ready
            own = next(batch for batch in own_batches(trainer) if batch >= done)
            epoch = self.epoch(trainer, pl_module)  # before the run's own first step changes its weights
            if epoch and own > done:
                self.take(epoch, done, own, trainer, pl_module)
                data_fetcher.fetched += own - done
            own_step(data_fetcher)

        loop.advance = advance

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        vars(trainer.fit_loop.epoch_loop).pop("advance", None)

    def epoch(self, trainer: Any, module: Any) -> BankEpoch | None:
        """The bank's numbers of this epoch; None where features are not cached, or this probe diverges."""
        assert self.bank is not None
        loader, number = trainer.train_dataloader, trainer.current_epoch
        if loader.dataset.features is None or module.cut < module.backbone.num_layers:
            return None
        if number == len(self.bank.epochs):
            STOPWATCH.start("training: steps of all probes")
            batches = list(loader.sampler)[: trainer.num_training_batches]
            self.bank.train_epoch(trainer, module, batches, own_batches(trainer))
            STOPWATCH.stop()
        epoch = self.bank.epochs[number]
        return epoch if torch.stack(epoch.losses)[:, self.probe].isfinite().all() else None

    def take(self, epoch: BankEpoch, first: int, end: int, trainer: Any, module: Any) -> None:
        """Let the run have made its steps from `first` to before `end`."""
        loop, count = trainer.fit_loop.epoch_loop, end - first
        optimizing = loop.automatic_optimization.optim_progress.optimizer
        for progress in (loop.batch_progress, loop.scheduler_progress, optimizing.step, optimizing.zero_grad):
            progress.increment_by(count)
        loop._batches_that_stepped += count
        if first:
            trainer.train_dataloader.skip(count)
        else:  # the pass has not begun
            trainer.train_dataloader.load_state_dict({"epoch": trainer.current_epoch, "batches_done": end})
        trainer.lr_scheduler_configs[0].scheduler.go_to(trainer.global_step)
        parameters, *moments = epoch.states[end][:, :, self.probe]  # (K, D + 1) each
        optimizer = trainer.optimizers[0]
        for tensor, part in ((module.head.linear.weight, slice(-1)), (module.head.linear.bias, -1)):
            tensor.data.copy_(parameters[:, part])
            optimizer.state[tensor]["step"].fill_(trainer.global_step)
            for name, moment in zip(("exp_avg", "exp_avg_sq"), moments, strict=True):
                optimizer.state[tensor][name].copy_(moment[:, part])
        for monitor in self.monitors:
            monitor.add(torch.stack(epoch.norms[first:end])[:, self.probe])
        predictions = torch.cat([each[:, self.probe] for each in epoch.predictions[first:end]])
        module.train_acc.update(predictions, torch.cat(epoch.labels[first:end]))


def own_batches(trainer: Any) -> list[int]:
    """The batches of this epoch that the run itself trains on, in their order."""
    count, every = trainer.num_training_batches, trainer.log_every_n_steps
    steps = range(trainer.current_epoch * count + 1, (trainer.current_epoch + 1) * count + 1)
    return [n for n, step in enumerate(steps) if step == 1 or n == count - 1 or (every and step % every == 0)]


def has_plain_steps(trainer: Any, module: Any, bank: ProbeBank) -> bool:
    """Whether the steps of a run are those of the bank, and nothing else has to happen in them."""
    optimizer, loader = trainer.optimizers[0], trainer.train_dataloader
    return (
        type(module) is Classifier
        and type(module.head) is LinearHead
        and not list(module.head.buffers())  # the statistics of norm=batch change with each step
        and module.head.linear.weight.numel() * len(bank.settings) <= MOST_WEIGHTS
        and is_single_label(module.task)
        and {name.split(".")[0] for name, epoch in module.thaw.epochs.items() if epoch < math.inf} == {"head"}
        and type(module.optim) is OptimizerRecipe
        and type(optimizer) is AdamW
        and not any(optimizer.defaults[key] for key in ("amsgrad", "maximize"))
        and trainer.precision in ("32-true", "bf16-mixed")
        and trainer.world_size == trainer.accumulate_grad_batches == 1
        and trainer.gradient_clip_algorithm in (None, "norm")
        and (trainer.max_steps, trainer.val_check_batch) == (-1, trainer.num_training_batches)
        and isinstance(loader, ImageLoader)
        and loader.num_workers == 0
        and getattr(loader.dataset, "soft_targets", None) is None
        and all(isinstance(each, MISS_STEPS) for each in trainer.callbacks if step_hooks(each))
    )
