"""Files of pretrained weights: finding, reading and checking them. Nothing here knows timm."""

import zipfile
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from thaw.run.claims import check_torch_zip
from thaw.run.config import BUNDLED_NAME
from thaw.run.console import say
from thaw.run.errors import UnreachableError, UserError

BUNDLED = Path(str(files("thaw.models"))) / "weights" / f"{BUNDLED_NAME}.safetensors"
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
HUB_TIMEOUT = 5.0  # seconds without an answer from the hub


def locate(weights: str, stated: Mapping[str, Any]) -> Path:
    """The local file of a `weights` setting, fetched from the hub if need be; `stated` is timm's `pretrained_cfg`.

    Raises:
        UserError: there is no such file, or the model has no hub weights.
        UnreachableError: the hub weights cannot be fetched.
    """
    if weights == "bundled":
        return BUNDLED
    if weights != "hub":
        path = Path(weights).expanduser()
        if not path.is_file():
            raise UserError(f"backbone.weights={weights!r} is not a file; choose none, bundled, hub or a path.")
        return path
    name, repository = stated["architecture"], stated.get("hf_hub_id")
    if not repository:
        raise UserError(f"timm names no hub weights for {name}; set backbone.weights to none or to a file.")
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url
    from huggingface_hub.errors import LocalEntryNotFoundError

    file = stated.get("hf_hub_filename") or "model.safetensors"
    try:
        try:
            return Path(hf_hub_download(repository, file, local_files_only=True))
        except LocalEntryNotFoundError:
            # Ask once first, as the download itself retries for minutes without a network.
            size = get_hf_file_metadata(hf_hub_url(repository, file), timeout=HUB_TIMEOUT).size or 0
            say(f"downloading {file} of {repository}, {size / 1e6:,.1f} MB")  # the hub's own bar is on terminals alone
            return Path(hf_hub_download(repository, file))
    except Exception as error:  # the hub's client raises a dozen unrelated classes
        raise UnreachableError(
            f"The weights of {name} could not be fetched: {file} of https://huggingface.co/{repository} "
            f"({type(error).__name__}). Download that file elsewhere and set backbone.weights=<path>, "
            "or use backbone=digits_vit, whose weights are bundled."
        ) from error


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read a state dict without executing code.

    Raises:
        UserError: the file is not one.
    """
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        if zipfile.is_zipfile(path):  # older versions of torch wrote a pickle
            check_torch_zip(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # each format has its own exceptions for other files
        raise UserError(
            f"backbone.weights={path} is not a readable weights file ({type(error).__name__}); allowed are "
            ".safetensors, and .pth of tensors only (pickled code is not run). Save the state dict as .safetensors."
        ) from error
    for key in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"backbone.weights={path} holds {type(state).__name__}; save a state dict of tensors there.")
    return state


def check_fit(path: Path, name: str, state: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """Raise UserError unless a file's tensors are finite and have exactly the names and shapes of the model `name`."""
    common = wanted.keys() & state.keys()
    fitting = {key for key in common if state[key].shape == wanted[key].shape}
    problems = [
        *(f"missing {key}" for key in wanted.keys() - state.keys()),
        *(f"unexpected {key}" for key in state.keys() - wanted.keys()),
        *(f"{key} is {tuple(state[key].shape)}, the model has {tuple(wanted[key].shape)}" for key in common - fitting),
        *(
            f"{key} is {state[key].dtype}, the model has {wanted[key].dtype}"
            for key in fitting
            if state[key].dtype not in (FLOATS if wanted[key].is_floating_point() else [wanted[key].dtype])
        ),
        *(
            f"{key} holds NaN or infinity"
            for key in fitting
            if state[key].dtype in FLOATS and not state[key].isfinite().all()
        ),
    ]
    if problems:
        shown = "; ".join(sorted(problems)[:6]) + (f"; and {len(problems) - 6} more" if len(problems) > 6 else "")
        raise UserError(
            f"backbone.weights={path} does not fit backbone.name={name} ({len(problems)} differences: {shown}). "
            "Choose the backbone that the weights were made for, or other weights."
        )
