"""What is seen while a model trains: norms of gradients and weights, sizes of updates, speed."""

import time
from functools import cache
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from thaw.callbacks.run_checkpoint import ends_epoch
from thaw.callbacks.spikes import Spikes
from thaw.data.loader import Batch
from thaw.lr_bank import BankClassifier

FEWEST_STEPS = 200  # of a run whose FLOPs are counted, which takes about as long as a step
SEEN = ("val/acc", "val/loss")  # of each validation


class StepMonitor(Callback):
    """Logs, every `trainer.log_every_n_steps` steps, of what trains in the step:

    - `grad_norm/all` and `grad_norm/layer<depth>`: the L2 norm of the gradient, unscaled and not yet clipped.
    - `weight_norm/all`: the L2 norm of the weights after the step.
    - `update_ratio/all` and `update_ratio/layer<depth>`: the norm of the step's change, divided by the norm of the
      weights before it.
    - `train/images_per_second`: of all devices since the last time, without validations.
    - `train/share_of_peak`: the FLOP/s of a device since the last time, divided by `peak_flops`. The FLOPs of a step
      are counted while the first of its kind runs. It is not logged in runs of fewer than `FEWEST_STEPS` steps, nor for
      recurrent and compiled networks, which torch does not count.

    With head=lr_bank each head is a part like a layer, named as in `val/acc_<head>`, and `all` is the chosen head.

    The norm of each step's gradient stays on the device until the norms of all steps since the last time are read at
    once. After training, `pl_module.course` holds what `thaw.evaluation.course` judges.
    """

    def __init__(self) -> None:
        self.validations: list[dict[str, Any]] = []
        self.spikes: Spikes | None = None
        self.pending: list[Tensor] = []  # for each step since the last time, the norms of its tensors (P,)
        self.before: list[Tensor] = []  # weights, in a step that is logged
        self.counter: FlopCounterMode | None = None  # while FLOPs are counted
        self.counted = 0  # images meanwhile
        self.images, self.seconds = 0, 0.0  # trained since the last time
        self.is_alone = True  # or several runs share their steps, so that it has no speed of its own
        self.resumed: float | None = None  # when training last went on; None while it stands still

    # The arithmetic

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        if self.counter is not None:
            self.flops = self.stop_counting() / self.counted
        gradients = [parameter.grad for parameter in self.trained]
        present = [gradient for gradient in gradients if gradient is not None]
        norms = iter(torch._foreach_norm(present) if present else ())
        if len(present) < len(gradients):  # of the others, that took no part in the step, the norm is 0
            zero = torch.zeros((), device=pl_module.device)
            norms = iter([zero if gradient is None else next(norms) for gradient in gradients])
        self.pending.append(torch.stack([*norms]))
        self.steps += 1
        if trainer.loggers and trainer._logger_connector.should_update_logs:
            self.before = [parameter.detach().clone() for parameter in self.trained]

    def read_norms(self) -> Tensor:
        """The gradient norm of each part in the last step (N,); the norms of all steps are searched for spikes."""
        norms = whole(torch.stack(self.pending)).float().cpu()  # (S, P)
        self.pending = []
        by_part = self.join(norms)  # (S, N)
        assert self.spikes is not None
        self.spikes.add(by_part if self.is_bank else norms.norm(dim=1, keepdim=True), self.steps)
        return by_part[-1]

    def join(self, norms: Tensor) -> Tensor:
        """The norms of tensors (..., P) -> those of the parts that they belong to (..., N)."""
        squares = norms.new_zeros(*norms.shape[:-1], len(self.names))
        return squares.index_add_(-1, self.part, norms.square()).sqrt()

    def norms_now(self, pl_module: Any) -> dict[str, float]:
        """Norms and ratios of the step that has just ended; they are read from the device together."""
        after = [parameter.detach() for parameter in self.trained]
        size_before, size_after = (torch.stack(torch._foreach_norm(each)) for each in (self.before, after))
        torch._foreach_sub_(self.before, after)
        change = torch.stack(torch._foreach_norm(self.before))
        self.before = []
        read = [whole(each).float().cpu() for each in (size_before, size_after, change)]
        gradient, sizes, weights, changes = (self.read_norms(), *(self.join(each) for each in read))  # (N,) each
        ratios = changes / sizes
        chosen = int(pl_module.head.chosen) if self.is_bank else slice(None)
        metrics = {
            "grad_norm/all": float(gradient[chosen].norm()),
            "weight_norm/all": float(weights[chosen].norm()),
            "update_ratio/all": float(changes[chosen].norm() / sizes[chosen].norm()),
        }
        present = self.part.unique().tolist()
        for number in present if len(present) > 1 else ():
            metrics[f"grad_norm/{self.names[number]}"] = float(gradient[number])
            metrics[f"update_ratio/{self.names[number]}"] = float(ratios[number])
        return metrics

    def speed(self, trainer: Trainer) -> dict[str, float]:
        """Since the last time."""
        assert self.resumed is not None
        seconds = self.seconds + time.perf_counter() - self.resumed
        rate = self.images / seconds
        metrics = {"train/images_per_second": rate * trainer.world_size}
        if self.flops and trainer.is_global_zero:
            metrics["train/share_of_peak"] = rate * self.flops / peak_flops(trainer.strategy.root_device, self.dtype)
        self.images, self.seconds, self.resumed = 0, 0.0, time.perf_counter()
        return metrics

    # When

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        self.is_bank = isinstance(pl_module, BankClassifier)
        self.steps = trainer.global_step
        self.images, self.seconds, self.resumed = 0, 0.0, None
        self.kind: Any = None  # of the steps whose FLOPs are known
        self.flops = 0.0  # of an image, 0 where unknown
        series = len(pl_module.head.names) if self.is_bank else 1
        if self.spikes is None or len(self.spikes.count) != series:
            self.spikes = Spikes(series)
        with trainer.precision_plugin.forward_context():  # in which precision products are computed
            one = torch.ones(1, 1, device=pl_module.device)
            self.dtype = (one @ one).dtype
        is_long = trainer.estimated_stepping_batches >= FEWEST_STEPS
        self.countable = is_long and all(map(is_countable, pl_module.modules()))
        labels = parts_of(pl_module)
        self.names = list(dict.fromkeys(labels.values()))
        named = [(labels[name], each) for name, each in pl_module.named_parameters() if name in labels]
        self.tensors = [(parameter, self.names.index(label)) for label, parameter in named]

    def on_train_epoch_start(self, trainer: Trainer, pl_module: Any) -> None:
        if self.pending:
            self.read_norms()
        self.note_training(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Batch, batch_idx: int) -> None:
        if batch_idx == 0 or self.kind is None:  # something may have thawed, or its features are cached now
            self.find_trained()
            kind = (getattr(pl_module, "cut", 0), len(self.trained), getattr(batch, "features", None) is None)
            if kind != self.kind and self.countable and self.is_alone and trainer.loggers:
                self.counter, self.counted = FlopCounterMode(display=False), 0
                self.counter.__enter__()
            self.kind = kind
        if self.counter is not None:
            self.counted += len(batch.labels)
        if self.resumed is None:
            self.resumed = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        self.images += len(batch.labels)
        if self.before:
            metrics = self.norms_now(pl_module) | (self.speed(trainer) if self.is_alone else {})
            for logger in trainer.loggers:
                logger.log_metrics(metrics, step=trainer.fit_loop.epoch_loop._batches_that_stepped)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING:
            self.pause()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            logged = trainer.callback_metrics
            values = {name: round(float(logged[name]), 6) for name in SEEN if name in logged}
            self.validations.append({"epoch": trainer.current_epoch + 1, **values})

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.pause()

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if ends_epoch(trainer):
            self.note_training(trainer)  # in the list that the checkpoint has too

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.pending:
            self.read_norms()
        self.note_training(trainer)

    def on_fit_end(self, trainer: Trainer, pl_module: Any) -> None:
        series = 0
        if winner := getattr(pl_module, "winner", None):  # of head=lr_bank
            series = pl_module.head.settings.index((winner["best_lr"], winner["best_weight_decay"]))
        pl_module.course = {"validations": self.validations, **(self.spikes.facts(series) if self.spikes else {})}

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self.counter is not None:
            self.stop_counting()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.teardown(trainer, pl_module, "")

    # Parts of these

    def add(self, norms: Tensor) -> None:
        """Note steps that were computed elsewhere, by the norms (S, P) of the tensors that train."""
        self.pending += norms.unbind()
        self.steps += len(norms)

    def find_trained(self) -> None:
        """What trains now, and for each tensor the number of its part."""
        now = [(parameter, part) for parameter, part in self.tensors if parameter.requires_grad]
        self.trained = [parameter for parameter, _ in now]
        self.part = torch.tensor([part for _, part in now], dtype=torch.long)

    def note_training(self, trainer: Trainer) -> None:
        """The training accuracy of the epoch that has ended, which is known after its validation."""
        accuracy = trainer.callback_metrics.get("train/acc")
        if self.validations and accuracy is not None:
            self.validations[-1].setdefault("train/acc", round(float(accuracy), 6))

    def pause(self) -> None:
        if self.resumed is not None:
            self.seconds += time.perf_counter() - self.resumed
            self.resumed = None
        if self.counter is not None:  # no step was completed
            self.stop_counting()

    def stop_counting(self) -> int:
        assert self.counter is not None
        self.counter.__exit__(None, None, None)
        flops, self.counter = self.counter.get_total_flops(), None
        return flops

    def state_dict(self) -> dict[str, Any]:
        if self.pending:
            self.read_norms()
        return {"validations": self.validations, "spikes": vars(self.spikes) if self.spikes else {}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.validations = state_dict["validations"]
        if state_dict["spikes"]:
            self.spikes = Spikes(len(state_dict["spikes"]["count"]))
            vars(self.spikes).update(state_dict["spikes"])


def whole(tensor: Tensor) -> Tensor:
    """A tensor, or one that is shared out over processes, as a whole."""
    full = getattr(tensor, "full_tensor", None)
    return full() if full else tensor


def parts_of(pl_module: Any) -> dict[str, str]:
    """For each parameter the name of its part: of its layer, or of its head where there are many."""
    if not isinstance(pl_module, BankClassifier):
        return {name: f"layer{depth}" for name, depth in pl_module.depths().items()}
    heads = enumerate(pl_module.head.names)
    return {
        f"head.heads.{n}.{name}": head for n, head in heads for name, _ in pl_module.head.heads[n].named_parameters()
    }


def is_countable(module: nn.Module) -> bool:
    """Whether torch can count the FLOPs of a module."""
    return not isinstance(module, nn.RNNBase) and module._compiled_call_impl is None


@cache
def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a device in large matrix products, measured: the fastest of three series."""
    side, products = (512, 1) if device.type == "cpu" else (4096, 10)
    generator = torch.Generator(device).manual_seed(0)  # the run's own random numbers stay as they are
    matrix = torch.randn(side, side, device=device, generator=generator).to(dtype)
    taken = []
    for _ in range(3):
        started = time.perf_counter()
        for _ in range(products):
            matrix @ matrix
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        taken.append(time.perf_counter() - started)
    return products * 2 * side**3 / min(taken)
