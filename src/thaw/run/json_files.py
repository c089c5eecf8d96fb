"""JSON files of a run."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from thaw.run.files import write_text


def write_json(facts: Mapping[str, Any], path: Path) -> None:
    write_text(json.dumps(facts, indent=2) + "\n", path)


def read_json(path: Path) -> dict[str, Any]:
    """Read what `write_json` wrote.

    Raises:
        ValueError: it is no JSON.
    """
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged ({error}); remove it to run that again.") from error
    if not isinstance(facts, dict):
        raise ValueError(f"{path} is damaged (no object); remove it to run that again.")
    return facts
