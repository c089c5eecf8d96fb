"""Checkpoints without what never trains: they name it and hold its hash instead."""

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from thaw.freezing.features import digest


def frozen_names(model: nn.Module, thaw_epochs: Mapping[str, float]) -> list[str]:
    """Names in the backbone's state dict that training leaves as they were: parameters that never train, and the
    buffers of modules that have only such parameters."""
    buffers = []
    for prefix, module in model.named_modules():
        own = [f"{prefix}.{name}" for name, _ in module.named_parameters(recurse=False)]
        if own and all(thaw_epochs[name] == math.inf for name in own):
            buffers += [f"{prefix}.{name}" for name, _ in module.named_buffers(recurse=False)]
    never = {*buffers, *(name for name, epoch in thaw_epochs.items() if epoch == math.inf)}
    return [name for name in model.state_dict() if name in never and name.startswith("backbone.")]


def refer_to_frozen(names: Iterable[str], state: Mapping[str, Tensor], weights: str) -> dict[str, Any]:
    """What a checkpoint holds in place of these tensors.

    Args:
        names: of the tensors.
        state: the model's state dict, from which they are hashed.
        weights: where they come from, as `backbone.weights` says; of a file its name, as its folder is this machine's.
    """
    names = list(names)
    return {"weights": Path(weights).name, "sha256": digest({name: state[name] for name in names}), "names": names}


def drop_frozen(checkpoint: dict[str, Any], reference: Mapping[str, Any]) -> None:
    """Replace the tensors of a reference by it."""
    names = set(reference["names"])
    checkpoint["state_dict"] = {name: tensor for name, tensor in checkpoint["state_dict"].items() if name not in names}
    checkpoint["frozen"] = dict(reference)


def fill_frozen(checkpoint: dict[str, Any], state: Mapping[str, Tensor]) -> None:
    """Put the tensors that a checkpoint refers to back into it.

    Args:
        checkpoint: changed in place, if it refers to any.
        state: of a model that was built with the same frozen weights.

    Raises:
        ValueError: they are not the same.
    """
    reference = checkpoint.get("frozen")
    if reference is None:
        return
    names = reference["names"]
    missing = [name for name in names if name not in state]
    found = "" if missing else digest({name: state[name] for name in names})
    if found != reference["sha256"]:
        why = (
            f"the model has no {missing[0]}"
            if missing
            else f"SHA-256 {found[:12]} instead of {reference['sha256'][:12]}"
        )
        raise ValueError(
            f"The checkpoint holds what was trained and refers to backbone.weights={reference['weights']} for what was "
            f"frozen, but the weights found are others ({why}). Give the file that it was trained on: weights=<file> "
            "for eval.py, backbone.weights=<file> for train.py; model.self_contained=true keeps them in checkpoints."
        )
    checkpoint["state_dict"] = {**checkpoint["state_dict"], **{name: state[name] for name in names}}
