"""From composed configuration to objects, and configuration errors that say what was allowed."""

import copy
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf._utils import OmegaConfDumper

from thaw.run.errors import UserError
from thaw.run.targets import config_leaves, refers_outside

try:
    from yaml import CSafeDumper as SafeDumper  # 8 times as fast
except ImportError:  # a PyYAML without its C library
    from yaml import SafeDumper  # type: ignore[assignment]  # another class with the same methods

MOST_PROCESSES = 64  # on a CPU
BUNDLED_NAME = "digits_vit"  # of the weights that `backbone.weights=bundled` means


def build(block: Any, **arguments: Any) -> Any:
    """Hydra's `instantiate`, except that lists and dicts reach the object as Python's own, never as OmegaConf's.

    An object that keeps one, as an optimizer keeps `betas`, would write it into checkpoints, which then cannot be read.
    """
    from hydra.utils import instantiate

    return instantiate(block, _convert_="all", **arguments)


def build_list(blocks: Mapping[str, Any] | None, group: str) -> list[Any]:
    """Instantiate every block of a group such as `callbacks`; Hydra would keep one without `_target_` as a dict."""
    built = []
    for name, block in (blocks or {}).items():
        if block is None:  # switched off: callbacks.early_stopping=null
            continue
        if not isinstance(block, DictConfig) or "_target_" not in block:
            raise UserError(f"{group}.{name}={block} has no _target_, so it names no class. Set it to null to drop it.")
        built.append(build(block))
    return built


def plain(cfg: DictConfig) -> dict[str, Any]:
    """The configuration as nested plain dicts that need nothing of Hydra to be resolved later.

    Interpolations between its own keys stay, so that a later override of `optim.lr` reaches whatever refers to it.
    Other resolvers depend on the running job or on this machine, so that their results are written out.
    """
    config: Any = OmegaConf.to_container(cfg, resolve=False)
    outside = [place for place, value in config_leaves(config, "") if refers_outside(value)]
    if outside:
        cfg = copy.deepcopy(cfg)
        for place in outside:
            OmegaConf.update(cfg, place, OmegaConf.select(cfg, place), merge=False)
        config = OmegaConf.to_container(cfg, resolve=False)
    return config


class ConfigDumper(SafeDumper):
    """Quotes text that OmegaConf would read as a number; a value that YAML has no type for becomes its text."""

    def ignore_aliases(self, data: Any) -> bool:
        return True  # a list that occurs twice is written twice, as resume= reads no anchors


ConfigDumper.add_representer(str, OmegaConfDumper.str_representer)
ConfigDumper.add_multi_representer(object, lambda dumper, value: dumper.represent_str(str(value)))


def yaml_text(config: Mapping[str, Any]) -> str:
    """Nested plain values as `OmegaConf.to_yaml` writes them, which first copies them into its own objects."""
    return yaml.dump(config, Dumper=ConfigDumper, allow_unicode=True, sort_keys=False)


def backbone_name(backbone: DictConfig) -> str:
    """The name of a backbone, which depends on its weights.

    Bundled weights have the name of their file, those of the hub timm's name, a baseline that of its class. Otherwise
    it is `vit_tiny_patch16_224 with patch_size 7, depth 6 from w.safetensors`: changed sizes, and a file of weights.
    """
    name, weights = backbone.get("name"), backbone.get("weights", "none")
    if name is None:
        return backbone._target_.rpartition(".")[2].lower()
    if weights == "bundled":
        return BUNDLED_NAME
    if weights == "hub":
        return name
    arguments: Any = OmegaConf.to_container(backbone.get("arguments") or OmegaConf.create())
    sizes = [f"{key} {value}" for key, value in arguments.items() if type(value) in (int, list)]
    name = name.partition(".")[0] + (f" with {', '.join(sizes)}" if sizes else "")
    return name if weights == "none" else f"{name} from {Path(weights).name}"


OmegaConf.register_new_resolver("backbone_name", backbone_name, replace=True)


def check_devices(trainer: DictConfig) -> None:
    """Refuse devices that this machine does not have."""
    import torch

    accelerator, devices = trainer.accelerator, trainer.devices
    if accelerator in ("gpu", "cuda"):
        found = torch.cuda.device_count()
        if not found:
            raise UserError(
                f"trainer.accelerator={accelerator} but torch sees no GPU here; use trainer.accelerator=cpu."
            )
        wanted = len(devices) if OmegaConf.is_list(devices) else devices
        if isinstance(wanted, int) and wanted > found:
            raise UserError(f"trainer.devices={devices} but torch sees {found} GPU(s); choose 1 to {found}, or auto.")
    if accelerator == "cpu" and isinstance(devices, int) and devices > MOST_PROCESSES:
        raise UserError(f"trainer.devices={devices} are processes on this CPU; choose 1 to {MOST_PROCESSES}.")
    if accelerator == "mps" and not torch.backends.mps.is_available():
        raise UserError("trainer.accelerator=mps but this is not a Mac with Metal; use trainer.accelerator=cpu or gpu.")


def settle(cfg: DictConfig) -> None:
    """Check all values, and write out what `auto` means on this machine.

    `trainer.precision=auto` is bf16-mixed where the hardware computes in bf16, else 32-true;
    `backbone.fused_attention=auto` is plain attention on a CPU, which trains faster there in bf16.
    """
    import torch

    from thaw.run.values import check_types

    check_types(cfg)
    check_devices(cfg.trainer)
    accelerator = cfg.trainer.accelerator
    if not torch.cuda.device_count():
        os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")  # torch's optimizers would look for a GPU in every step
    on_gpu = accelerator in ("gpu", "cuda") or (accelerator == "auto" and torch.cuda.is_available())
    on_cpu = accelerator == "cpu" or (accelerator == "auto" and not torch.accelerator.is_available())
    weights = cfg.backbone.get("weights")
    if weights and Path(weights).expanduser().is_file():
        cfg.backbone.weights = str(Path(weights).expanduser().resolve())  # found from any folder later
    if cfg.trainer.precision == "auto":
        fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False) if on_gpu else on_cpu and fast
        cfg.trainer.precision = "bf16-mixed" if has_bf16 else "32-true"
    if cfg.backbone.get("fused_attention") == "auto":  # a baseline has no attention
        cfg.backbone.fused_attention = not on_cpu
