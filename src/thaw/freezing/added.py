"""Parameters that a policy adds to a frozen backbone: how they are told from its own, and merged into its weights."""

import re
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.nn.utils import parametrize

from thaw.models.backbone import Backbone
from thaw.run.console import some
from thaw.run.errors import UserError


class Added(nn.Module):
    """Base class of each module that a policy adds to a backbone: all parameters in it are added ones.

    A parametrization of a layer's weight or bias is merged by `merge_added`. Any other module is a child of the layer
    that it belongs to, so that its names begin with the layer's; it stays in an exported model.
    """


def added_names(model: nn.Module) -> list[str]:
    """The names of a model's added parameters, as in its state dict."""
    added = [(place, module) for place, module in model.named_modules() if isinstance(module, Added)]
    return list(dict.fromkeys(f"{place}.{name}" for place, module in added for name, _ in module.named_parameters()))


def plain_name(name: str) -> str:
    """The name that a parameter has without additions: `parametrizations.weight.original` -> `weight`."""
    return re.sub(r"\.parametrizations\.(\w+)\.original$", r".\1", name)


def own_names(module: nn.Module) -> list[str]:
    """The names of a module's parameters, neither those of its children nor added ones."""
    originals = [f"parametrizations.{name}.original" for name in getattr(module, "parametrizations", ())]
    return [name for name, _ in module.named_parameters(recurse=False)] + originals


def lowest_layer(backbone: Backbone, method: str, last: int | None) -> int:
    """The lowest of the last so many layers of a backbone, as `Backbone.depths` counts them; 0 for None, all of them.

    Raises:
        UserError: more layers than there are, or none; `method` is the name of the policy's block, e.g. `lora`.
    """
    num_layers = max(backbone.depths().values(), default=-1) + 1
    if last is not None and not 1 <= last <= num_layers:
        raise UserError(f"freeze.{method}.last={last} must be from 1 to {num_layers}, the backbone's layers, or null.")
    return 0 if last is None else num_layers - last


def named_layers(
    backbone: Backbone, method: str, match: str, last: int | None, fits: Callable[[nn.Module], bool], noun: str
) -> list[Any]:
    """The layers of a kind, called `noun`, whose whole name matches, in the last so many layers of a backbone.

    Raises:
        UserError: there is none, `match` is no regular expression, or as `lowest_layer`.
    """
    try:
        pattern = re.compile(match)
    except re.error as error:
        raise UserError(
            f"freeze.{method}.match={match!r} is not a regular expression ({error}); write e.g. '.*\\.attn\\..*'."
        ) from error
    depths, lowest = backbone.depths(), lowest_layer(backbone, method, last)
    layers = {name: module for name, module in backbone.named_modules() if fits(module)}
    chosen = [
        module for name, module in layers.items() if pattern.fullmatch(name) and depths[f"{name}.weight"] >= lowest
    ]
    if not chosen:
        kinds = sorted({re.sub(r".*\.\d+\.", "", name) for name in layers})
        raise UserError(
            f"freeze.{method}.match={match!r} is the name of no {noun}"
            f"{'' if last is None else f' in the last {last} layers'}; this backbone has "
            f"{some(kinds) if kinds else 'none: choose another policy, e.g. freeze=last_blocks, or a transformer'}."
        )
    return chosen


def merge_added(model: nn.Module) -> None:
    """Write each added parametrization into its weight, for export: the model computes the same, without a trace of it.

    A copy of the model stays as it is. (torch's `remove_parametrizations` takes `weight` off the class that a module
    and its deep copies share.)
    """
    for module in list(model.modules()):
        lists = getattr(module, "parametrizations", None) if parametrize.is_parametrized(module) else None
        if lists is None or not any(isinstance(part, Added) for part in lists.modules()):
            continue
        merged = {
            name: nn.Parameter(getattr(module, name).detach(), each.original.requires_grad)
            for name, each in lists.items()
        }
        module.__class__ = parametrize.type_before_parametrizations(module)
        del module.parametrizations
        for name, parameter in merged.items():
            setattr(module, name, parameter)
