"""Uploads an exported folder to the Hugging Face hub, on request."""

import re
from pathlib import Path

from thaw.run.errors import UnreachableError, UserError

HOW_TO_LOG_IN = "run `hf auth login`, or set HF_TOKEN to one of https://huggingface.co/settings/tokens"


def check_push(repository: str) -> None:
    """Raise a UserError for a name that no repository can have, or without a token; needs no network."""
    from huggingface_hub import get_token

    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        raise UserError(f"push={repository!r} must be <user>/<name>, e.g. push=ada/mnist-vit.")
    if get_token() is None:
        raise UserError(f"push={repository} needs a token of the Hugging Face hub, and there is none: {HOW_TO_LOG_IN}.")


def push(folder: Path, repository: str, private: bool) -> str:
    """Upload all files of a folder, those that were checked, in one commit; returns the line that says where they are.

    The repository, `<user>/<name>`, is created where it does not exist.

    Raises:
        UserError: the hub refuses.
        UnreachableError: it cannot be reached.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    api = HfApi()
    later = f"The folder stays in {folder}; upload it later by `hf upload {repository} {folder}`"
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        commit = api.upload_folder(repo_id=repository, folder_path=folder, commit_message="A model exported by thaw")
    except HfHubHTTPError as error:
        reason = str(error).strip().splitlines()[-1]
        raise UserError(
            f"push={repository}: the hub refuses ({reason}). {later}, with a token that may write: {HOW_TO_LOG_IN}."
        ) from error
    except Exception as error:  # the client raises a dozen unrelated classes for a failed connection
        reason = next(iter(str(error).strip().splitlines()), "no message")
        raise UnreachableError(
            f"push={repository}: {api.endpoint} cannot be reached ({type(error).__name__}: {reason}). {later}."
        ) from error
    return f"pushed     {commit.commit_url}"
