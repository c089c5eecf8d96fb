"""Fully sharded data parallel training (Rajbhandari et al. 2019, stage 3): each process holds a part of every
parameter, of its gradient and of its optimizer state, and a block's parameters are gathered while it computes.

torch's `fully_shard` keeps each parameter with its name and shape, so that freezing rules, weight decay and checkpoints
are the same as elsewhere. (The older `FullyShardedDataParallel` flattens them and renames them.)
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from lightning import Trainer
from lightning.fabric.utilities.optimizer import _optimizers_to_device
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.optim import SGD, Optimizer

from thaw.classifier import Classifier
from thaw.freezing.slim import fill_frozen
from thaw.models.backbone import Backbone
from thaw.models.chain import blocks_of
from thaw.run.errors import UserError

WHOLE = StateDictOptions(full_state_dict=True)


class FullyShard(ModelParallelStrategy):
    """Shards a `Classifier` over all processes, block by block; a checkpoint is one file and holds all tensors.

    Raises:
        UserError: when training starts, for a model or callback that cannot be sharded.
    """

    def __init__(self) -> None:
        super().__init__(save_distributed_checkpoint=False)

    def setup_environment(self) -> None:
        self._data_parallel_size, self._tensor_parallel_size = self.num_nodes * self.num_processes, 1
        super().setup_environment()

    def setup(self, trainer: Trainer) -> None:
        """As the parent's, which leaves the sharding to the model."""
        assert self.accelerator is not None and self.model is not None
        self.accelerator.setup(trainer)
        self.model = self.precision_plugin.convert_module(self.model)
        self.shard(self.model, trainer)
        self.model_to_device()
        self.barrier()
        if trainer.state.fn == TrainerFn.FITTING:
            self.setup_optimizers(trainer)
        self.setup_precision_plugin()
        if trainer.state.fn == TrainerFn.FITTING:
            _optimizers_to_device(self.optimizers, self.root_device)

    def shard(self, model: nn.Module, trainer: Trainer) -> None:
        """Share the parameters out, once; frozen ones too."""
        check(model, trainer)
        assert isinstance(model, Classifier)
        if isinstance(model.backbone, FSDPModule):  # validation or test after training
            return
        model.self_contained = True  # tensors that never train are on no process as a whole
        model.cache.refuse("trainer=fsdp shards the layers that would compute features", trainer)
        model.cache.mode = "off"
        mesh = self.device_mesh["data_parallel"]
        for block in layers(model.backbone):
            fully_shard(block, mesh=mesh)
        # as roots these two would stay gathered after a forward pass, and outside of it nobody expects that
        fully_shard(model.backbone, mesh=mesh, reshard_after_forward=True)
        fully_shard(model.head, mesh=mesh, reshard_after_forward=True)

    def setup_optimizers(self, trainer: Trainer) -> None:
        super().setup_optimizers(trainer)
        if any(isinstance(optimizer, SGD) and optimizer.defaults["fused"] for optimizer in self.optimizers):
            raise UserError(
                "trainer=fsdp: torch has no fused SGD for sharded tensors; set optim.optimizer.fused=false."
            )
        if any(type(optimizer).__name__ == "Muon" for optimizer in self.optimizers):
            raise UserError(
                "trainer=fsdp shards the matrices that optim=muon makes orthogonal as a whole, and does not train the "
                "same weights; use trainer=ddp, or another optimizer."
            )

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint of any run, whatever its number of processes; every process reads the file."""
        assert isinstance(self.model, Classifier)
        self.checkpoint_io.teardown()  # writes what is held back, which is on the first process
        self.barrier()
        checkpoint = torch.load(self.broadcast(checkpoint_path), map_location="cpu", weights_only=True)
        if "frozen" in checkpoint:
            fill_frozen(checkpoint, cast(dict[str, Tensor], get_model_state_dict(self.model, options=WHOLE)))
            del checkpoint["frozen"]
        set_model_state_dict(self.model, checkpoint["state_dict"], options=WHOLE)
        if self.model.trainer.state.fn == TrainerFn.FITTING:
            for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
                named = by_name(state, optimizer, self.model)
                set_optimizer_state_dict(self.model, optimizer, named, options=WHOLE)
        return checkpoint

    def teardown(self) -> None:
        super().teardown()
        self.checkpoint_io.teardown()  # which the parent leaves out


def layers(backbone: nn.Module) -> Sequence[nn.Module]:
    """The parts that are gathered one after the other."""
    if isinstance(backbone, Backbone) and backbone.is_chain:
        return [block[-1] for block in blocks_of(backbone.model)]
    return []  # such a network is gathered as a whole


def check(model: nn.Module, trainer: Trainer) -> None:
    """Refuse what has not been seen to train the same weights when it is sharded."""
    if type(model) is not Classifier:
        raise UserError(
            f"trainer=fsdp shards a Classifier, not a {type(model).__name__}; use trainer=ddp, or trainer=gpu."
        )
    if trainer.state.fn != TrainerFn.FITTING:
        return
    if later := model.thaw.after(1):
        raise UserError(
            f"trainer=fsdp cannot thaw on the way, and the freezing policy thaws after {min(later)} epochs; use "
            "trainer=ddp, or a policy without a schedule (freeze=full, last_blocks, lora, ...)."
        )


def by_name(state: dict[str, Any], optimizer: Optimizer, model: nn.Module) -> dict[str, Any]:
    """An optimizer's saved state with names in place of its numbers, which follow the order of the groups."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    order = [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    named = dict(zip(numbers, order, strict=True))
    return {
        "state": {named[number]: values for number, values in state["state"].items()},
        "param_groups": [
            group | {"params": [named[number] for number in group["params"]]} for group in state["param_groups"]
        ],
    }
