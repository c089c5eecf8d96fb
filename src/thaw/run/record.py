"""How a run was started: its command, the commit of its code, versions of packages; and paths that may be shared."""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping
from datetime import datetime
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "torchvision", "lightning", "timm", "hydra-core", "torchmetrics", "wandb")


def software_facts() -> dict[str, Any]:
    """Command, time, commit and versions, as values of YAML."""
    return {
        "command": typed_command(),
        "started": time_now(),
        "git_commit": git_commit(),
        "python": sys.version.split()[0],
        "packages": package_versions(),
    }


@cache
def package_versions() -> dict[str, str]:
    return {name: version(name) for name in PACKAGES}


def typed_command() -> str:
    """The command that started this program, as a shell takes it."""
    return shlex.join(["python", *sys.argv])


def time_now() -> str:
    """Date and time of this machine, to the minute."""
    return datetime.now().isoformat(" ", "minutes")


@cache
def git_commit() -> str:
    """The commit of the code that runs, with `-dirty` where files differ from it; `unknown` outside a checkout."""

    def git(*arguments: str) -> str:
        command = ["git", *arguments]
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def portable_paths(run_dir: Path) -> dict[str, str]:
    """Replacements for the folders of this machine and its user in a checkpoint, which may be moved and shared."""
    here, home = Path.cwd(), Path.home()
    short = {f"{run_dir}/": "${run_dir}/"}
    if run_dir.is_relative_to(here):
        short[f"{here}/"] = f"${{run_dir}}/{os.path.relpath(here, run_dir)}/"
    return short if home == home.parent else short | {f"{home}/": "~/"}


def replaced(value: Any, paths: Mapping[str, str]) -> Any:
    """Nested plain values whose paths, keys included, get other beginnings."""
    if isinstance(value, dict):
        return {replaced(key, paths): replaced(inner, paths) for key, inner in value.items()}
    if isinstance(value, list):
        return [replaced(inner, paths) for inner in value]
    if isinstance(value, str):
        for path, other in paths.items():
            value = re.sub(rf"(?<![\w./~-]){re.escape(path)}", other.replace("\\", r"\\"), f"{value}/")[:-1]
    return value
