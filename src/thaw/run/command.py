"""The frame of a root script: Hydra composes its configuration, and an error becomes a message that helps."""

import os
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from types import TracebackType
from typing import Any

import hydra
from hydra.errors import ConfigCompositionException, HydraException, InstantiationException, OverrideParseException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from thaw.run.command_line import quote_path
from thaw.run.console import lenient
from thaw.run.errors import UserError
from thaw.run.files import FULL
from thaw.run.ranks import drop_stray_ranks

SETTING_ERRORS = (UserError, HydraException, OmegaConfBaseException)
LIBRARIES = tuple(sysconfig.get_paths()[name] for name in ("stdlib", "purelib", "platlib"))
FULL_ERROR = "HYDRA_FULL_ERROR"


def command(config_name: str) -> Callable[[Callable[[DictConfig], Any]], Callable[..., Any]]:
    """Decorate the `main(cfg)` of a root script, whose configuration is `configs/<config_name>.yaml`.

    The result composes the configuration from the command line, or takes it as its argument. In the first case errors
    are shown as `clear_errors` does.
    """

    def decorate(task: Callable[[DictConfig], Any]) -> Callable[..., Any]:
        @wraps(task)
        def job(cfg: DictConfig) -> Any:
            with shown_errors():  # before Hydra, which would print a line of its own
                return task(cfg)

        compose_and_run = hydra.main(version_base="1.3", config_path="configs", config_name=config_name)(job)

        @wraps(task)
        def main(cfg: DictConfig | None = None) -> Any:
            if cfg is not None:
                return task(cfg)
            with clear_errors():
                return compose_and_run()

        return main

    return decorate


@contextmanager
def clear_errors() -> Iterator[None]:
    """Show an error as a message on standard error and exit with status 1; printing itself never fails."""
    sys.argv[1:] = map(quote_path, sys.argv[1:])
    before = os.environ.get(FULL_ERROR)
    drop_stray_ranks()
    os.environ[FULL_ERROR] = "1" if before is None else before  # Hydra hands exceptions on instead of printing them
    try:
        with lenient(), shown_errors(before == "1", (*SETTING_ERRORS, OSError)):  # Hydra's own files, too
            yield
    finally:
        if before is None:
            os.environ.pop(FULL_ERROR, None)


@contextmanager
def shown_errors(full: bool = False, known: tuple[type[Exception], ...] = SETTING_ERRORS) -> Iterator[None]:
    """Show an error and exit with status 1.

    Exceptions in `known`, by default a `UserError` and errors of Hydra's configuration, are one message. Any other has
    the lines of its traceback that lie outside libraries. `full` lets all exceptions pass.
    """
    try:
        yield
    except Exception as error:
        if full:
            raise
        print(f"\n{show(error, known)}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(130)


def show(error: BaseException, known: tuple[type[Exception], ...] = SETTING_ERRORS) -> str:
    """An error as a user reads it."""
    cause = cause_of(error)
    if isinstance(cause, known) or (isinstance(error, InstantiationException) and isinstance(cause, TypeError)):
        return f"error: {explain(error if isinstance(error, ConfigCompositionException) else cause)}"
    lines = traceback.format_exception(type(cause), cause, own_frames(cause.__traceback__), chain=False)
    return f"{''.join(lines)}({FULL_ERROR}=1 before the command shows the whole traceback)"


def cause_of(error: BaseException) -> BaseException:
    """The exception in a constructor that Hydra has wrapped into its own."""
    while isinstance(error, InstantiationException) and error.__cause__ is not None:
        error = error.__cause__
    return error


def own_frames(trace: TracebackType | None) -> TracebackType | None:
    """A traceback without the frames of libraries; the whole one if no other frame is in it."""
    frames = []
    each = trace
    while each is not None:
        if not each.tb_frame.f_code.co_filename.startswith((*LIBRARIES, __file__, "<frozen")):
            frames.append(each)
        each = each.tb_next
    kept = None
    for each in reversed(frames):
        kept = TracebackType(kept, each.tb_frame, each.tb_lasti, each.tb_lineno)
    return kept or trace


def explain(error: BaseException) -> str:
    """The message of an error; for an unknown key also the keys that exist in its place."""
    if isinstance(error, OSError) and error.errno in FULL and error.filename is None:  # Hydra's own first files
        return f"hydra.run.dir cannot be written ({error.strerror}). Free some space, or choose another hydra.run.dir."
    message = str(error).split("\n    full_key:")[0].strip()
    if not isinstance(error, SETTING_ERRORS):
        message = f"{type(error).__name__}: {message}".removesuffix(": ")
    if isinstance(error, OverrideParseException):
        message = (
            f"{error.override}: {message.splitlines()[0]}. A value with spaces, commas, brackets or = needs quotes for "
            "Hydra inside those for the shell: \"key='a value'\"."
        )
    cause = error.__cause__ or error
    parent = getattr(cause, "parent_node", None)
    if isinstance(cause, OmegaConfBaseException) and isinstance(parent, DictConfig):
        place = str(cause.full_key or cause.key).rpartition(".")[0] or "the top level"
        message += f"\nallowed in {place}: {', '.join(map(str, parent))}"
    return message
