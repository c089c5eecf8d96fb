"""JSON files of a run, written whole or not at all."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def write_json(facts: Mapping[str, Any], path: Path) -> None:
    """Write to a temporary name beside it, then rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}.part")
    part.write_text(json.dumps(facts, indent=2) + "\n")
    part.replace(path)


def read_json(path: Path) -> dict[str, Any]:
    """Read what `write_json` wrote.

    Raises:
        ValueError: it is no JSON.
    """
    try:
        facts = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged ({error}); remove it to run that again.") from error
    if not isinstance(facts, dict):
        raise ValueError(f"{path} is damaged (no object); remove it to run that again.")
    return facts
