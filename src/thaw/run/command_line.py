"""Settings between the shell and Hydra: paths as they are typed, and settings that can be pasted."""

import os
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from thaw.run.errors import UserError

PLAIN = r"[A-Za-z0-9_.@%+-]*/[A-Za-z0-9_./@%+-]*"  # a path that Hydra takes as it stands

LOGIN = r"://[^/@\s]*:[^/@\s]+@"  # of a URL, with its user
CONFIDENTIAL = r"(API_KEY|ACCESS_KEY|TOKEN|PASSWORD|SECRET)$"  # of names of environment variables


def quoted(value: Any) -> str:
    """A text as a value on Hydra's command line, whatever characters it has."""
    return "'" + str(value).replace("'", "\\'") + "'"


def setting(key: str, value: str | Path) -> str:
    """`key=value`, quoted for Hydra, which would read commas, brackets, blanks and `=`, and then for the shell."""
    text = str(value)
    return shlex.quote(f"{key}={text if re.fullmatch(PLAIN, text) else quoted(text)}")


def quote_path(argument: str) -> str:
    """`key=path` for Hydra, if the path exists or starts with `~/`; any other argument stays as it is.

    A shell does not expand a `~` behind a `=`, and Hydra expands none.
    """
    key, equals, value = argument.partition("=")
    if home := re.fullmatch(r"(['\"]?)(~(?:/.*)?)\1", value):
        return f"{key}={quoted(Path(home[2]).expanduser())}"
    try:
        exists = bool(equals) and Path(value).exists()
    except OSError:  # longer than a path can be
        return argument
    if not exists or re.fullmatch(r"[\w./%+@:-]*", value, re.ASCII):  # a number stays one
        return argument
    return f"{key}={quoted(value)}"


def check_secrets(values: Mapping[str, str]) -> None:
    """Refuse passwords and tokens among settings, by their keys: a run's files, checkpoints and logs keep its settings.

    Raises:
        UserError: a URL has a password, or a value holds that of an environment variable such as HF_TOKEN.
    """
    secret = {name: value for name, value in os.environ.items() if re.search(CONFIDENTIAL, name) and len(value) >= 8}
    for key, value in values.items():
        variable = next((name for name in secret if secret[name] in value or f"oc.env:{name}" in value), None)
        if variable or re.search(LOGIN, value):
            kind = f"the value of {variable}" if variable else "a URL with a password"
            raise UserError(
                f"{key} holds {kind}, which the run's files and logs would keep. Leave it out: programs find passwords "
                "and tokens in environment variables, such as MLFLOW_TRACKING_PASSWORD, or in ~/.netrc."
            )


def shown_error(error: BaseException) -> str:
    """An error of a library as one line without passwords: it may name the URL of a server that the environment has."""
    return re.sub(LOGIN, "://", " ".join(str(error).split()))


def override_key(override: str) -> str:
    """The key of one of Hydra's overrides: `optim.lr` of `+optim.lr=1e-3`, `backbone` of `backbone@model.other=vit`."""
    return override.lstrip("+~").split("=", 1)[0].split("@")[0]
