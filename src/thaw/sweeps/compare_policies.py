"""Which freezing policies apply to a backbone, and the work of each, found on fake tensors: no weights are read."""

import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from thaw.run.errors import UserError

if TYPE_CHECKING:  # takes seconds
    from thaw.plan.dry_step import Step

NOT_A_POLICY = "patterns"  # of configs/freeze: its rules are the user's


@dataclass(frozen=True)
class Work:
    """FLOPs of an image under a policy."""

    train: float  # in a training step, on average over the epochs
    validate: float  # forward, above what is cached
    fill: float  # of the frozen layers, whose output is cached; 0 without a cache
    forward: float  # of the whole model
    cut: int  # how many layers are cached at first
    step: "Step"  # in the last epoch


@dataclass
class Candidates:
    """Policies that apply, the cheapest first, each with its work; and why the others do not."""

    work: dict[str, Work] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)


def bind_policies(configs: Mapping[str, DictConfig], device: str) -> Candidates:
    """Bind policies to the backbone, and count what a training image costs under each.

    A policy that trains the same parameters in the same epochs as an earlier one is left out.

    Args:
        configs: a run of each policy, settled, with `model.num_classes`.

    Raises:
        UserError, InstantiationException: the model cannot be built, whatever the policy.
    """
    from thaw.plan.dry_step import fake_model

    found = Candidates()
    known: dict[Any, str] = {}
    for policy, cfg in configs.items():
        try:
            with fake_model(cfg) as model:
                model.thaw.check_fresh()
                what = what_trains(model, cfg)
                if what in known:
                    found.left_out[policy] = f"it trains what {known[what]} trains"
                    continue
                found.work[policy] = work_of(model, cfg, device)
        except UserError as error:
            if not str(error).startswith("freeze"):
                raise
            found.left_out[policy] = str(error)
            continue
        known[what] = policy
    found.work = dict(sorted(found.work.items(), key=lambda item: item[1].train + item[1].fill))
    return found


def what_trains(model: Any, cfg: DictConfig) -> tuple:
    """Equal for two policies that train the same parameters in the same epochs, and add the same ones."""
    epochs = model.thaw.epochs.items()
    trained = frozenset((name, epoch) for name, epoch in epochs if epoch < cfg.trainer.max_epochs)
    blocks: Any = OmegaConf.to_container(cfg.freeze, resolve=True)
    return trained, repr([block for block in blocks.values() if isinstance(block, dict)])


def work_of(model: Any, cfg: DictConfig, device: str) -> Work:
    """The FLOPs of a policy; between the first and the last epoch of a schedule they grow as layers thaw."""
    from thaw.plan.dry_step import step_in_epoch

    cached = cfg.cache.mode not in ("off", False) and not model.augment.is_random and not model.mix.is_on
    epochs = cfg.trainer.max_epochs
    last = int(max(epoch for epoch in model.thaw.after(0) if epoch < epochs))
    first = step_in_epoch(0, model, cfg, device, cached)
    step = step_in_epoch(last, model, cfg, device, cached) if last else first
    cuts = [model.thaw.cut(epoch) for epoch in range(epochs)]
    thawed = [(first.cut - cut) / max(1, first.cut - step.cut) for cut in cuts]  # of what thaws, by epoch: 0 to 1
    ends = [part.forward_flops + part.backward_flops + (0 if cached else part.frozen_flops) for part in (first, step)]
    return Work(
        train=statistics.mean(ends[0] + (ends[1] - ends[0]) * share for share in thawed),
        validate=step.forward_flops + (0 if cached else step.frozen_flops),
        fill=first.frozen_flops if cached else 0.0,
        forward=step.frozen_flops + step.forward_flops,
        cut=first.cut if cached else 0,
        step=step,
    )
