"""A training step on tensors without numbers: its memory and its FLOPs, for models of any size.

torch's fake tensors are meta tensors that claim to be on a device, so that the project's own model, policy and
optimizer run on them unchanged, autocast included, and nothing is allocated.
"""

import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self

import torch
from omegaconf import DictConfig
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from thaw.data.loader import Batch
from thaw.freezing.cache import TOKENS
from thaw.run.config import build
from thaw.run.errors import UserError

PRECISIONS = {"32-true": None, "bf16-mixed": torch.bfloat16, "16-mixed": torch.float16, "bf16-true": torch.bfloat16}


@dataclass(frozen=True)
class Step:
    """A training step of one device, on its batch. Memory is in bytes; FLOPs are those of one image."""

    parameters: int
    trained: int  # parameters that train in the end
    cut: int  # how many of the backbone's layers are frozen below all that trains
    num_tokens: int
    weights: int  # with buffers
    gradients: int
    optimizer: int  # its state
    activations: int  # beside these at the step's peak: tensors that autograd saves, and temporary ones
    filling: int  # beside the weights while the cache is filled
    cached: int  # of one image in the cache; 0 where no layer is frozen below all that trains
    units: list[tuple[int, int]]  # weights and gradients of each layer of the backbone and of the head
    frozen_flops: float  # of the layers below the cut, forward
    forward_flops: float  # of everything above it
    backward_flops: float


def dry_step(cfg: DictConfig, device: str) -> Step:
    """Run the second training step of a configuration on fake tensors.

    A policy with a schedule is taken in the epoch in which its last layer thaws.

    Args:
        cfg: as train.py gets it; `cache.mode=off` runs the frozen layers in every step.
        device: `cpu`, `cuda` or `mps`, which decides how many tokens at once fill the cache.

    Raises:
        UserError: a policy or precision that is not allowed.
        InstantiationException: caused by a UserError: a model that cannot be built.
    """
    with fake_model(cfg) as model:
        model.thaw.check_fresh()
        return step_in_epoch(int(max(model.thaw.after(0))), model, cfg, device, cfg.cache.mode != "off")


def step_in_epoch(epoch: int, model: Any, cfg: DictConfig, device: str, cached: bool) -> Step:
    """The second training step of a `fake_model` as its policy has it in an epoch."""
    model.thaw.apply(epoch)
    model.cut = model.thaw.cut(epoch)
    return DryRun(model, cfg.data.batch_size, cfg.trainer.precision, device).step(cached)


@contextmanager
def fake_model(cfg: DictConfig) -> Iterator[Any]:
    """The classifier of a configuration, of fake tensors, which it has within the body; `dry_step` says what it raises.

    Its weights count as loaded where the configuration names some.
    """
    precision = cfg.trainer.precision
    if precision not in PRECISIONS:
        raise UserError(f"trainer.precision={precision} is unknown; choose {', '.join(PRECISIONS)}.")
    dtype = torch.bfloat16 if precision == "bf16-true" else torch.float32  # `.to` cannot convert fake tensors
    cfg = cfg.copy()
    if cfg.freeze.get("chosen", ()) is None:  # by images; the lowest blocks, which cost most, stand for those
        cfg.freeze.chosen = [*range(1, 1 + cfg.freeze.k)]
    loaded = cfg.backbone.get("weights", "none") != "none"
    if loaded:
        cfg.backbone.weights = "none"  # nothing to read
    with default_dtype(dtype), torch.device("meta"), SameShape():
        backbone = build(cfg.backbone)
    with default_dtype(dtype), warnings.catch_warnings(), SharedFakeMode(allow_non_fake_inputs=True):
        warnings.filterwarnings("ignore", message=".*self.log.*")  # there is no trainer
        warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")  # by torchmetrics
        backbone.to_empty(device="cpu")
        cfg.model.backbone = None
        model = build(cfg.model, _partial_=True)(backbone=backbone)
        backbone.fresh = frozenset() if loaded else backbone.fresh
        yield model


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


class DryRun:
    """A model of fake tensors, thawed as far as it ever will be, with its optimizer."""

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
        batch = Batch(blank_images(self.batch_size), labels, labels, features=features if cached else None)
        self.train_on(batch)  # makes gradients and the optimizer's state, as a later step finds them
        given = [part for part in (batch.images, batch.features) if part is not None]
        memory = Memory([*given, *(tensor for part in self.parts() for tensor in part)])
        with memory:
            forward, backward = self.train_on(batch)
        weights, gradients, state = (nbytes(part) for part in self.parts())
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
            cached=features.nbytes // self.batch_size if features is not None else 0,
            units=self.units(),
            frozen_flops=frozen_flops / self.batch_size,
            forward_flops=(forward - (0 if cached else frozen_flops)) / self.batch_size,
            backward_flops=backward / self.batch_size,
        )

    def train_on(self, batch: Batch) -> tuple[int, int]:
        """FLOPs of the forward and backward pass. In Lightning's order: old gradients are dropped after the forward."""
        with FlopCounterMode(display=False) as forward, self.context():
            loss = self.model.training_step(batch, 0)
        self.optimizer.zero_grad()
        with FlopCounterMode(display=False, custom_mapping=CONVOLUTION) as backward:
            loss.backward()
        with OneStep():
            self.optimizer.step()
        return forward.get_total_flops(), backward.get_total_flops()

    def frozen(self) -> tuple[int, int, Tensor]:
        """Of the frozen layers: FLOPs on a batch, peak memory while the cache is filled, and the output for a batch."""

        @torch.no_grad()
        def compute(number: int) -> Tensor:
            with self.context():
                images = self.model.preprocess(blank_images(number))
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
        """Bytes of weights and gradients of each layer and of the head, which FSDP gathers one after the other."""
        units = [[0, 0] for _ in range(len(self.backbone.layers) + 1)]
        for name, parameter in self.model.named_parameters():
            inside = name.removeprefix("backbone.")
            unit = units[-1 if inside == name else self.backbone.layer_of(inside)]
            unit[0] += parameter.nbytes
            unit[1] += parameter.nbytes * parameter.requires_grad
        return [(weights, gradients) for weights, gradients in units]


def conv_backward_flops(
    grad_shape: Any, image_shape: Any, weight_shape: Any, *settings: Any, out_shape: Any = None, **_: Any
) -> int:
    """FLOPs of a convolution's gradients: of its images and of its weights, each as much as the forward pass.

    torch's own count forgets that the filters of a grouped convolution see only their group.
    """
    transposed, output_mask = settings[-4], settings[-1]
    places = math.prod((image_shape if transposed else grad_shape)[2:])
    return 2 * grad_shape[0] * places * math.prod(weight_shape) * sum(output_mask[:2])


CONVOLUTION = {torch.ops.aten.convolution_backward: conv_backward_flops}


class SharedFakeMode(FakeTensorMode):
    """A mode that copies of its tensors share.

    torchmetrics copies the tensors that it counts in. torch copies a fake tensor's mode with it, and the mode's weak
    references to storages, which are then freed twice: that corrupts the heap, and the process crashes later.
    """

    def __deepcopy__(self, memo: dict) -> Self:
        return self


class Memory(TorchDispatchMode):
    """Counts the bytes of the given tensors and of all new ones while they are alive, each storage once."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        super().__init__()
        self.known: dict[int, tuple[StorageWeakRef, int]] = {}  # by address, which the reference keeps from reuse
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
        if self.now > self.peak:  # an upper bound, as some of the known storages may be gone
            gone = [key for key, (reference, _) in self.known.items() if reference.expired()]
            self.now -= sum(self.known.pop(key)[1] for key in gone)
            self.peak = max(self.peak, self.now)


class SameShape(TorchFunctionMode):
    """Makes `torch.equal` compare shapes, as fake tensors hold no numbers."""

    def __torch_function__(self, func: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.equal:
            return args[0].shape == args[1].shape
        return func(*args, **(kwargs or {}))


class OneStep(TorchFunctionMode):
    """Makes `item` give 1, as fake tensors hold no numbers; optimizers read the number of their steps by it."""

    def __torch_function__(self, func: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return 1.0 if func is Tensor.item else func(*args, **(kwargs or {}))


def blank_images(number: int) -> Tensor:
    return torch.empty(number, 1, 28, 28, dtype=torch.uint8)


def nbytes(tensors: Iterable[Tensor]) -> int:
    """Bytes, each storage once."""
    return sum({storage._cdata: storage.nbytes() for storage in (t.untyped_storage() for t in tensors)}.values())
