"""A freezing policy for any LightningModule: a callback of Lightning, without the rest of thaw."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import nn

from thaw.freezing.policy import NEVER, FreezePolicy, Thaw
from thaw.freezing.schedule import FreezeSchedule
from thaw.run.console import plural, some
from thaw.run.errors import UserError

OF_LAYERS = ("first", "last", "depths", "blocks")  # fields of a rule that count layers
EXAMPLE = "[{'match': r'head\\..*', 'train': True}, {'match': '.*', 'train': False}]"


def freeze(module: LightningModule, rules: Sequence[Mapping[str, Any]]) -> "FreezeModule":
    """A callback that trains what the rules say of a LightningModule, and freezes the rest.

        trainer = L.Trainer(callbacks=[thaw.freeze(module, rules)])
        trainer.fit(module, ...)

    A rule has `match`, a regular expression for the whole name of a parameter or a list of them, and `train`; with
    `from_epoch` they are frozen before that epoch, the first being 0. The first rule that matches a parameter decides.
    The rules are those of `configs/freeze`, as `yaml.safe_load` reads them.

    What is frozen has no gradient, is in eval mode (dropout, statistics of batch norm), is not updated by the optimizer
    (by weight decay either), and so stays bit-identical, buffers too. A module without parameters, such as dropout, in
    a partly frozen one belongs to the module that was defined before it.

    `configure_optimizers` of the module is called while everything that will ever train has `requires_grad`, so that
    the optimizer has it from the first step, whether it is given `self.parameters()` or only what trains. What is still
    frozen then has no gradient, and torch's optimizers leave it alone. A resumed run has the same groups.

    Rules that count layers (`first`, `last`, `depths`, `blocks`) need a method `depths()` of the module, which gives
    each parameter's name its depth: 0 for the stem, 1 for the first block, ..., the head the deepest.

    Raises:
        UserError: a ValueError; a rule has unknown fields or decides nothing, no rule covers a parameter, nothing
            trains in epoch 0, or a rule counts layers of a module without `depths`. In `Trainer.fit`: another
            module, a strategy that splits parameters, or an optimizer that lacks one that trains.
    """
    return FreezeModule(module, rules)


class FreezeModule(FreezeSchedule):
    """The callback that `freeze` returns; it is for one module."""

    def __init__(self, module: LightningModule, rules: Sequence[Mapping[str, Any]]) -> None:
        kind = type(module).__qualname__
        if not isinstance(module, LightningModule):
            raise UserError(f"thaw.freeze takes a lightning.LightningModule and rules, not {kind}.")
        if isinstance(getattr(module, "thaw", None), Thaw):
            raise UserError(f"{kind} has a freezing policy of its own, the setting freeze=...; set that one.")
        if isinstance(rules, str | Mapping) or not all(isinstance(rule, Mapping) for rule in rules):
            raise UserError(f"thaw.freeze: rules must be a list such as {EXAMPLE}, not {rules!r:.60}.")
        policy, depths = FreezePolicy(rules, add=None), own_depths(module)
        of_layers = [rule for rule in policy.rules if any(getattr(rule, field) is not None for field in OF_LAYERS)]
        if of_layers and not any(depths.values()):
            raise UserError(
                f"freeze.rules: {of_layers[0]} counts layers, but {kind} does not say in which layer a parameter is. "
                "Match names instead, or give it a method depths() -> {name: 0 for the stem, 1, ..., the head deepest}."
            )
        self.module, self.thaw = module, policy.bind(module, depths)
        self.frozen: list[nn.Module] = []  # in this epoch

    def policy_of(self, pl_module: LightningModule) -> Thaw:
        return self.thaw

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Before `configure_optimizers`: all that will ever train has `requires_grad`."""
        if stage != "fit":
            return
        if pl_module is not self.module:
            raise UserError("thaw.freeze: the trainer fits another module than the one that the callback was made for.")
        start = getattr(trainer.strategy, "_start_method", None)  # of processes; None: on one device
        if type(trainer.strategy) not in (SingleDeviceStrategy, DDPStrategy) or start not in (None, "popen", "fork"):
            found = f"{type(trainer.strategy).__name__}{f' by {start}' if start else ''}"
            raise UserError(f"thaw.freeze works on one device and with strategy='ddp' or 'ddp_fork', not with {found}.")
        self.check_names()
        warnings.filterwarnings("ignore", r"Found \d+ module\(s\) in eval mode")  # Lightning's, of what is frozen
        self.thaw.apply(max(int(epoch) for epoch in self.thaw.epochs.values() if epoch < NEVER))

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.check_names()
        groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
        held = {id(parameter) for group in groups for parameter in group["params"]}
        ever = [named for named in pl_module.named_parameters() if self.thaw.epochs[named[0]] < NEVER]
        if lost := [name for name, parameter in ever if id(parameter) not in held]:
            raise UserError(
                f"thaw.freeze: {plural(len(lost), 'tensor')} that the rules train are in no optimizer ({some(lost)}). "
                "Let configure_optimizers give self.parameters() to it, or freeze them."
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self.apply(trainer)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_epoch_start(trainer, pl_module)
        self.apply(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Set modes again if the module has called `self.train()` in one of its hooks."""
        if any(part.training for part in self.frozen):
            self.apply(trainer)

    def apply(self, trainer: Trainer) -> None:
        self.thaw.apply(trainer.current_epoch)
        self.frozen = [part for part in self.module.modules() if not part.training]

    def check_names(self) -> None:
        if changed := {name for name, _ in self.module.named_parameters()} ^ self.thaw.epochs.keys():
            raise UserError(
                f"thaw.freeze: the module's parameters have changed since ({some(sorted(changed))}). Build all "
                "layers in __init__, and call thaw.freeze afterwards."
            )


def own_depths(module: LightningModule) -> dict[str, int]:
    """The depth of each parameter; 0 for all of a module that has no method `depths`."""
    names, depths = [name for name, _ in module.named_parameters()], getattr(module, "depths", None)
    if not names:
        raise UserError(f"{type(module).__qualname__} has no parameters to freeze; build its layers in __init__.")
    if not callable(depths):
        return dict.fromkeys(names, 0)
    given = dict(depths())
    if differ := sorted(given.keys() ^ set(names)):
        raise UserError(f"{type(module).__qualname__}.depths() must name each parameter; different: {some(differ)}.")
    return given
