"""How a run was started: its command, the commit of its code, and the versions of the packages that matter."""

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "torchvision", "lightning", "timm", "hydra-core", "torchmetrics", "wandb")


def software_facts() -> dict[str, Any]:
    """Command, commit and versions, as values of YAML."""
    return {
        "command": " ".join(sys.argv),
        "git_commit": git_commit(),
        "python": sys.version.split()[0],
        "packages": {name: version(name) for name in PACKAGES},
    }


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
