"""Paths and addresses in a configuration from a file: which are followed, which are only shown, which are not followed.

Where files would be written, or a run's record sent, only the run's own folder and the defaults of the YAML are
followed: another place has to be typed. What is read from elsewhere is shown before.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from thaw.run.migrations import blocks_of_today, mappings
from thaw.run.targets import within

FOLDERS = ("dirpath", "run_dir", "save_dir", "default_root_dir", "cache_dir", "output", "dir")  # that get files
ADDRESSES = ("tracking_uri", "mirrors")  # that get a run's record, or that files are fetched from
NAMES = ("filename", "name", "version", "sub_dir", "prefix", "reference")  # in a folder
READ = ("backbone.weights", "data.dir", "data.path", "data.table", "data.name", "data.exclude", "data.relabel")
SENT = ("project", "entity", "mode", "log_model", "save_code")  # settings of a logger: to whom it sends what
READERS = "thaw.data"  # whose `dir` is read


def confine(config: dict[str, Any], allow: Sequence[str]) -> list[str]:
    """Put today's defaults in place of settings that would write or send elsewhere; returns `key=value` of each.

    Blocks of packages in `allow` stay as they are: whoever allows them trusts the file.
    """
    changed = []
    for place, block in mappings(config):
        target = str(block.get("_target_", ""))
        if not target or within(target, allow):
            continue
        for key in [key for key in block if is_write(target, key, block)]:
            defaults = [each[key] for each in blocks_of_today(target) if key in each]
            if block[key] not in (None, *defaults) and not is_inside(key, block[key]):
                changed.append(f"{place}{key}={block[key]}")
                block[key] = defaults[0] if defaults else f"${{run_dir}}/{key}" if key in FOLDERS else None
    return changed


def is_write(target: str, key: str, block: Mapping[str, Any]) -> bool:
    if key in NAMES:
        return key in ("filename", "reference") or "save_dir" in block
    return key in ADDRESSES or (key in FOLDERS and not (key == "dir" and target.startswith(READERS)))


def is_inside(key: str, value: Any) -> bool:
    """Whether a setting names a place in the run's own folder, or a plain name within another setting's folder."""
    if not isinstance(value, str) or key in ADDRESSES or ".." in re.split(r"[/\\]", value):
        return False
    if key in NAMES:
        return not re.search(r"^[/~]|[\\:\0]|\$\{", value)
    return re.fullmatch(r"\$\{run_dir\}(/[^$\\:\0]*)?", value) is not None


def reads(cfg: DictConfig, keys: Collection[str], typed: Collection[str]) -> list[str]:
    """`key=value` of each setting that names a place outside of the run's and the working folder, and is not typed."""
    found = []
    for key in keys:
        try:
            value = OmegaConf.select(cfg, key)
        except OmegaConfBaseException:
            continue
        values = [each for each in (value if OmegaConf.is_list(value) else [value]) if isinstance(each, str)]
        if key not in typed and any(is_elsewhere(cfg, key, each) for each in values):
            found.append(f"{key}={value}")
    return found


def is_elsewhere(cfg: DictConfig, key: str, value: str) -> bool:
    if key == "data.name" or key == "backbone.weights":
        if not re.search(r"[/\\~]", value):  # a name of torchvision or timm
            return False
        if key == "data.name" and not Path(value).expanduser().exists():  # of the hub
            return True
    path = Path(value).expanduser().resolve()
    return not any(path.is_relative_to(folder) for folder in (Path.cwd(), Path(str(cfg.get("run_dir"))).resolve()))


def sends(cfg: DictConfig, typed: Collection[str]) -> list[str]:
    """`key=value` of the loggers' settings that are not those of the YAML and not typed."""
    found = []
    for kind, block in (cfg.get("logger") or {}).items():
        for key in [key for key in SENT if block and key in block and f"logger.{kind}.{key}" not in typed]:
            today = [each.get(key) for each in blocks_of_today(str(block.get("_target_")))]
            if block[key] not in (None, False, "offline", "disabled", *today):
                found.append(f"logger.{kind}.{key}={block[key]}")
    return found


def keep_from_downloading(data: DictConfig) -> None:
    """Let a data module read a folder that a file names, but not download into it."""
    if str(data.get("dir")) not in {str(each.get("dir")) for each in blocks_of_today(str(data.get("_target_")))}:
        for key, value in (("mirrors", []), ("download", False)):
            if key in data:
                data[key] = value
