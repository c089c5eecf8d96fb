"""The cost of a policy on a model, before renting a machine.    python -m thaw.plan model=vit_small policy=last_blocks

It trains, downloads and allocates nothing: see thaw.plan.dry_step.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from hydra.errors import InstantiationException

from thaw.plan.settings import PlanSettings, compose_run, no_such_option, read_arguments
from thaw.run.command import clear_errors
from thaw.run.errors import UserError
from thaw.run.files import write_text
from thaw.run.migrations import CONFIGS

if TYPE_CHECKING:  # takes seconds
    from thaw.plan.costs import Plan

DATASET_SIZES = {"mnist": (54_000, None), "imagenet1k": (1_281_167, 1000)}  # images to train on, classes


def make_plans(arguments: Sequence[str]) -> tuple[PlanSettings, "list[Plan]"]:
    """The settings, and a plan for each model with each policy, from arguments such as `freeze.k=4`.

    Raises:
        UserError: an argument that is not allowed.
    """
    settings, overrides = read_arguments(arguments)
    from thaw.plan.costs import plan_devices  # with torch, after the arguments are read
    from thaw.plan.dry_step import dry_step

    dataset = settings.dataset
    images, classes = DATASET_SIZES[dataset] if isinstance(dataset, str) else (int(dataset), None)
    if classes:
        overrides = [f"model.num_classes={classes}", *overrides]
    plans = []
    for model in settings.model.split(","):
        for policy in settings.policy.split(","):
            cfg = compose_run(settings, model, policy, overrides)
            try:
                step = dry_step(cfg, "cuda")
            except InstantiationException as error:
                if not isinstance(error.__cause__, UserError):
                    raise
                if "is not a timm model" in str(error.__cause__):
                    raise UserError(f"{no_such_option('model', model, 'backbone')}, or any model of timm") from error
                raise UserError(f"model={model}: {error.__cause__}") from error
            plans.append(plan_devices(model, policy, step, images, settings.devices, settings.strategy == "fsdp"))
    return settings, plans


def main(arguments: Sequence[str]) -> None:
    if {"--help", "-h"} & set(arguments):
        print((CONFIGS / "plan.yaml").read_text(encoding="utf-8"), end="")
        return
    settings, plans = make_plans(arguments)
    from thaw.plan.costs import show_plans

    show_plans(settings, plans)
    if settings.json:
        facts = {"settings": asdict(settings), "plans": [asdict(plan) for plan in plans]}
        write_text(json.dumps(facts, indent=2) + "\n", Path(settings.json))


if __name__ == "__main__":
    with clear_errors():
        main(sys.argv[1:])
