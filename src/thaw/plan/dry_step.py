"""One training step on tensors without numbers: what it keeps in memory and what it computes, for models of any size.

torch's fake tensors are meta tensors that say which device they are on, so that the project's own model, policy and
optimizer run on them unchanged, autocast included, and nothing is allocated.
"""

import gc
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from thaw.data.datamodule import Batch
from thaw.freezing.cache import TOKENS
from thaw.run.config import build

PRECISIONS = {"32-true": None, "bf16-mixed": torch.bfloat16, "16-mixed": torch.float16, "bf16-true": torch.bfloat16}


@dataclass(frozen=True)
class Step:
    """A training step of one device, on its batch.

    Attributes:
        parameters, trained: of the model, and how many of them train at last.
        cut: how many of the backbone's layers are frozen below all that trains.
        num_tokens: T.
        weights: bytes, with buffers.
        gradients: bytes.
        optimizer: bytes of its state.
        activations: bytes that the step needs on top of these at its peak: what autograd saves, and what is in passing.
        filling: bytes on top of the weights while the cache is filled.
        kept: bytes of one image in the cache; 0 where nothing is frozen below all that trains.
        units: bytes of weights and of gradients of each layer of the backbone and of the head.
        frozen_flops: of one image through the layers below the cut, forward.
        forward_flops, backward_flops: of one image through all above it.
    """

    parameters: int
    trained: int
    cut: int
    num_tokens: int
    weights: int
    gradients: int
    optimizer: int
    activations: int
    filling: int
    kept: int
    units: list[tuple[int, int]]
    frozen_flops: float
    forward_flops: float
    backward_flops: float


def dry_step(cfg: DictConfig, device: str) -> Step:
    """Run the second training step of a configuration on fake tensors.

    A policy with a schedule is taken in the epoch from which all trains that ever will.

    Args:
        cfg: as train.py gets it; `data.batch_size` counts, `cache.mode=off` runs the frozen layers in every step.
        device: `cpu`, `cuda` or `mps`: how many tokens at once fill the cache.

    Raises:
        ValueError: a policy, precision or batch size that cannot be.
        InstantiationException: because of a ValueError: a model that cannot be.
    """
    precision, batch_size = cfg.trainer.precision, cfg.data.batch_size
    if precision not in PRECISIONS:
        raise ValueError(f"precision={precision} is unknown; choose {', '.join(PRECISIONS)}.")
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be a whole number, 1 or more.")
    with cleared_up_here():
        return step_on_fake_tensors(cfg.copy(), device)


def step_on_fake_tensors(cfg: DictConfig, device: str) -> Step:
    """As `dry_step`; all fake tensors are garbage when it has returned."""
    loaded = cfg.backbone.get("weights", "none") != "none"
    if loaded:
        cfg.backbone.weights = "none"  # nothing to read
    with torch.device("meta"), SameShape():
        backbone = build(cfg.backbone)
    with warnings.catch_warnings(), FakeTensorMode(allow_non_fake_inputs=True):
        warnings.filterwarnings("ignore", message=".*self.log.*")  # there is no trainer
        warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")  # by torchmetrics
        backbone.to_empty(device="cpu")
        cfg.model.backbone = None
        model = build(cfg.model, _partial_=True)(backbone=backbone)
        backbone.fresh = frozenset() if loaded else backbone.fresh
        if cfg.trainer.precision == "bf16-true":
            model.to(torch.bfloat16)
        model.thaw.check_fresh()
        last = int(max(model.thaw.after(0)))
        model.thaw.apply(last)
        model.cut = model.thaw.cut(last)
        return Dry(model, cfg.data.batch_size, cfg.trainer.precision, device).step(cfg.cache.mode != "off")


@contextmanager
def cleared_up_here() -> Iterator[None]:
    """Collect garbage at the end, and in this thread: torch crashes where another one comes to free fake tensors."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.collect()
        if was_on:
            gc.enable()


class Dry:
    """A model of fake tensors, thawed as far as it will be."""

    def __init__(self, model: Any, batch_size: int, precision: str, device: str) -> None:
        self.model, self.batch_size, self.precision, self.device = model, batch_size, precision, device
        self.autocast = PRECISIONS[precision] if precision.endswith("mixed") else None
        self.backbone = model.backbone
        self.cut = model.cut
        recipe = model.optim
        groups = recipe.groups(model.named_parameters(), model.thaw.depths, model.thaw.epochs)
        self.optimizer = recipe.optimizer(groups, lr=recipe.lr, weight_decay=recipe.weight_decay)

    def step(self, cached: bool) -> Step:
        frozen_flops, filling, features = self.frozen() if self.cut else (0, 0, None)
        labels = torch.zeros(self.batch_size, dtype=torch.long)
        batch = Batch(digits(self.batch_size), labels, labels, features=features if cached else None)
        self.train_on(batch)  # makes gradients and the optimizer's state, which the next step finds
        given = [part for part in (batch.images, batch.features) if part is not None]
        memory = Memory([*given, *(tensor for part in self.parts() for tensor in part)])
        counts: list[int] = []
        with memory:
            self.train_on(batch, counts)
        forward, backward = counts
        weights, gradients, state = (size(part) for part in self.parts())
        return Step(
            parameters=sum(p.numel() for p in self.model.parameters()),
            trained=sum(p.numel() for p in self.model.parameters() if p.requires_grad),
            cut=self.cut,
            num_tokens=self.backbone.num_tokens,
            weights=weights,
            gradients=gradients,
            optimizer=state,
            activations=memory.peak - weights - gradients - state,
            filling=filling if cached else 0,
            kept=features.nbytes // self.batch_size if features is not None else 0,
            units=self.units(),
            frozen_flops=frozen_flops / self.batch_size,
            forward_flops=(forward - (0 if cached else frozen_flops)) / self.batch_size,
            backward_flops=backward / self.batch_size,
        )

    def train_on(self, batch: Batch, counts: list[int] | None = None) -> None:
        """In Lightning's order: the last gradients go after the forward pass."""
        with FlopCounterMode(display=False) as forward, self.context():
            loss = self.model.training_step(batch, 0)
        self.optimizer.zero_grad()
        with FlopCounterMode(display=False) as backward:
            loss.backward()
        self.optimizer.step()
        if counts is not None:
            counts += [forward.get_total_flops(), backward.get_total_flops()]

    def frozen(self) -> tuple[int, int, Tensor]:
        """FLOPs of the frozen layers on a batch, bytes while they fill the cache, and what they give for a batch."""

        @torch.no_grad()
        def compute(number: int) -> Tensor:
            with self.context():
                images = self.model.preprocess(digits(number))
                features = self.backbone.prefix(images.to(self.model.dtype), self.cut)
            tokens = self.cut < len(self.backbone.layers)
            return features.bfloat16() if tokens and "bf16" in self.precision else features

        with FlopCounterMode(display=False) as flops:
            features = compute(self.batch_size)
        with Memory(()) as memory:
            compute(max(1, TOKENS[self.device] // self.backbone.num_tokens))
        return flops.get_total_flops(), memory.peak, features

    def context(self) -> torch.autocast:
        return torch.autocast("cpu", dtype=self.autocast, enabled=self.autocast is not None)

    def parts(self) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Weights and buffers, gradients, and the optimizer's state."""
        parameters = list(self.model.parameters())
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        state = [tensor for tensor in tree_leaves(dict(self.optimizer.state)) if isinstance(tensor, Tensor)]
        return [*parameters, *self.model.buffers()], gradients, state

    def units(self) -> list[tuple[int, int]]:
        """Bytes of weights and of gradients of each layer, and of the head: what FSDP would gather at once."""
        units = [[0, 0] for _ in range(len(self.backbone.layers) + 1)]
        for name, parameter in self.model.named_parameters():
            inside = name.removeprefix("backbone.")
            unit = units[-1 if inside == name else self.backbone.layer_of(inside)]
            unit[0] += parameter.nbytes
            unit[1] += parameter.nbytes * parameter.requires_grad
        return [(weights, gradients) for weights, gradients in units]


class Memory(TorchDispatchMode):
    """Counts bytes of the tensors that are alive, each storage once, from those that it is given on.

    Attributes:
        peak: the most that were alive at once.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        super().__init__()
        self.known: dict[int, tuple[StorageWeakRef, int]] = {}  # by the storage's address, which the reference keeps
        self.now = self.peak = 0
        for tensor in tensors:
            self.add(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.add(tensor)
        return result

    def add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata in self.known:
            return
        self.known[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.now += storage.nbytes()
        if self.now > self.peak:  # perhaps: not all that is known is still alive
            gone = [key for key, (reference, _) in self.known.items() if reference.expired()]
            self.now -= sum(self.known.pop(key)[1] for key in gone)
            self.peak = max(self.peak, self.now)


class SameShape(TorchFunctionMode):
    """Lets `torch.equal` compare the shapes of fake tensors, which hold no numbers."""

    def __torch_function__(self, func: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.equal:
            return args[0].shape == args[1].shape
        return func(*args, **(kwargs or {}))


def digits(number: int) -> Tensor:
    return torch.empty(number, 28, 28, dtype=torch.uint8)


def size(tensors: Iterable[Tensor]) -> int:
    """Bytes, each storage once."""
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())
