"""Checkpoints without the tensors that never train: they hold their names and one hash instead."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from thaw.data.store import tensors_sha256
from thaw.run.errors import UserError


def refer_to_frozen(names: Iterable[str], state: Mapping[str, Tensor], weights: str) -> dict[str, Any]:
    """The reference that a checkpoint holds in place of these tensors of a state dict.

    Of `weights`, their source as `backbone.weights` says, only a file's name is stored, not its folder.
    """
    names = list(names)
    return {
        "weights": Path(weights).name,
        "sha256": tensors_sha256({name: state[name] for name in names}),
        "names": names,
    }


def drop_frozen(checkpoint: dict[str, Any], reference: Mapping[str, Any]) -> None:
    """Replace a checkpoint's frozen tensors by a reference to them."""
    names = set(reference["names"])
    checkpoint["state_dict"] = {name: tensor for name, tensor in checkpoint["state_dict"].items() if name not in names}
    checkpoint["frozen"] = dict(reference)


def fill_frozen(checkpoint: dict[str, Any], state: Mapping[str, Tensor]) -> None:
    """Put the frozen tensors that a checkpoint refers to back into it, in place, if it refers to any.

    `state` is that of a model that was built with the same frozen weights.

    Raises:
        UserError: the model has other frozen weights.
    """
    reference = checkpoint.get("frozen")
    if reference is None:
        return
    names = reference["names"]
    missing = [name for name in names if name not in state]
    found = "" if missing else tensors_sha256({name: state[name] for name in names})
    if found != reference["sha256"]:
        other = f"SHA-256 {found[:12]} instead of {reference['sha256'][:12]}"
        why = f"the model has no {missing[0]}" if missing else other
        raise UserError(
            f"The checkpoint holds the trained tensors and refers to backbone.weights={reference['weights']} for the "
            f"frozen ones, but the weights found are others ({why}). Give the file that it was trained on: "
            "weights=<file> for eval.py, backbone.weights=<file> for train.py; model.self_contained=true keeps them in "
            "checkpoints."
        )
    checkpoint["state_dict"] = {**checkpoint["state_dict"], **{name: state[name] for name in names}}
