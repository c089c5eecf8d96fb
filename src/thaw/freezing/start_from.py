"""A new run that starts from the weights of an earlier one."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from thaw.freezing.added import added_names, merge_added, plain_name
from thaw.run.checkpoint import load_model, origin, read_checkpoint
from thaw.run.console import say
from thaw.run.errors import UserError
from thaw.run.jobs import is_first_rank
from thaw.run.places import reads


def start_from(model: Any, path: Path, allow: Sequence[str]) -> str:
    """Copy the weights of an earlier run's checkpoint into `model`; policy, optimizer and schedule stay its own.

    Either of the two models may have added parameters; the earlier run's are merged where they can be. Returns the
    earlier run's `backbone.weights`, which those of the new run descend from, too; `allow` is as for `read_checkpoint`.

    Raises:
        UserError: the checkpoint is of another architecture, or of a policy whose additions this one lacks.
    """
    checkpoint = read_checkpoint(path, allow)
    if is_first_rank():
        say(origin(checkpoint))
        if "frozen" in checkpoint and (
            named := reads(OmegaConf.create(checkpoint["config"]), ["backbone.weights"], [])
        ):
            say(f"reading {named[0]}, as {path} says")
    source = load_model(checkpoint)
    merge_added(source)
    theirs, own, added = source.state_dict(), model.state_dict(), set(added_names(model))
    given = {name: theirs.pop(plain_name(name), None) for name in own}
    if left := [name for name in added_names(source) if name not in added]:
        raise UserError(
            f"start_from={path} has {left[0]} and {len(left) - 1} more, which cannot be merged into plain weights. "
            "Choose the freezing policy that it was trained with."
        )
    differ = [name for name, tensor in given.items() if tensor is None and name not in added]
    differ += [name for name, tensor in given.items() if tensor is not None and tensor.shape != own[name].shape]
    differ += list(theirs)
    if differ:
        raise UserError(
            f"start_from={path} holds another model ({len(differ)} of {len(own)} tensors differ, e.g. {differ[0]}). "
            "Choose the backbone and head that it was trained with."
        )
    model.load_state_dict({name: own[name] if tensor is None else tensor for name, tensor in given.items()})
    model.backbone.fresh = frozenset()
    return checkpoint["config"]["backbone"].get("weights", "none")
