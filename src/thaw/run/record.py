"""How a run was started: its command, the commit of its code, and the versions of the packages that matter."""

import shlex
import subprocess
import sys
from datetime import datetime
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
        "packages": {name: version(name) for name in PACKAGES},
    }


def typed_command() -> str:
    """The command that started this program, as a shell takes it."""
    return shlex.join(["python", *sys.argv])


def time_now() -> str:
    """Date and time of this machine, to the minute."""
    return datetime.now().isoformat(" ", "minutes")


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
