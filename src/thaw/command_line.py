"""Settings as one can paste them into a shell."""

import re
import shlex
from pathlib import Path
from typing import Any

PLAIN = r"[A-Za-z0-9_.@%+-]*/[A-Za-z0-9_./@%+-]*"  # a path that Hydra takes as it stands


def quoted(value: Any) -> str:
    """A text as a value on Hydra's command line, whatever characters it has."""
    return "'" + str(value).replace("'", "\\'") + "'"


def setting(key: str, value: str | Path) -> str:
    """`key=value`, quoted for Hydra where commas, brackets, blanks or `=` would be read, and then for the shell."""
    text = str(value)
    return shlex.quote(f"{key}={text if re.fullmatch(PLAIN, text) else quoted(text)}")
