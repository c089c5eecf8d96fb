"""The frame of a root script: Hydra composes its configuration, and an error becomes a message that helps."""

import argparse
import atexit
import io
import os
import re
import shutil
import sys
import sysconfig
import textwrap
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from functools import wraps
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra._internal import utils as hydra_program
from hydra.errors import ConfigCompositionException, HydraException, InstantiationException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from thaw.run.command_line import check_secrets, override_key, quote_path
from thaw.run.console import harmless, lenient
from thaw.run.deferred import defer_unneeded
from thaw.run.errors import UserError
from thaw.run.files import DISK, unwritten
from thaw.run.memory import search_rarely
from thaw.run.migrations import CONFIGS
from thaw.run.ranks import drop_stray_ranks, end_with_parent

SETTING_ERRORS = (UserError, HydraException, OmegaConfBaseException)
FULL_ERROR = "HYDRA_FULL_ERROR"
LIBRARIES = (*(sysconfig.get_paths()[name] for name in ("stdlib", "purelib", "platlib")), "<frozen")
LOGGER_PACKAGES = {  # one of which a logger needs
    "tensorboard": ("tensorboard", "tensorboardX"),
    "mlflow": ("mlflow",),
    "trackio": ("trackio",),
}
TRAIN_FIRST = "To train a first one: python train.py experiment=vit_linear_probe"
CHECKPOINT = "a run's folder, a .ckpt file or last (the newest run)"

if sys.version_info >= (3, 14):  # argparse checks help texts; one of Hydra 1.3 is no text before it is shown
    argparse.ArgumentParser._check_help = lambda *_: None  # type: ignore[attr-defined]


def command(config_name: str) -> Callable[[Callable[[DictConfig], Any]], Callable[..., Any]]:
    """Decorate the `main(cfg)` of a root script, whose configuration is `configs/<config_name>.yaml`.

    The result composes the configuration from the command line, or takes it as its argument. In the first case errors
    are shown as `clear_errors` does.
    """

    def decorate(task: Callable[[DictConfig], Any]) -> Callable[..., Any]:
        @wraps(task)
        def job(cfg: DictConfig) -> Any:
            with shown_errors():  # before Hydra, which would print a line of its own
                check_command(cfg)
                return task(cfg)

        compose_and_run = hydra.main(version_base="1.3", config_path="configs", config_name=config_name)(job)

        @wraps(task)
        def main(cfg: DictConfig | None = None) -> Any:
            if cfg is not None:
                return task(cfg)
            with clear_errors():
                search_rarely(1_000_000)
                if {"--help", "-h"} & set(sys.argv):
                    return print_help(compose_and_run, config_name)
                check_secrets({override_key(argument): argument for argument in sys.argv[1:]})
                check_options(config_name)
                defer_unneeded()
                compose_and_run()
            if task.__module__ == "__main__" and sys.orig_argv[1:2] == sys.argv[:1]:  # no profiler, debugger or test
                end_at_once()

        return main

    return decorate


def end_at_once() -> NoReturn:
    """End the process as Python does, but for freeing each object: with torch and Lightning that takes 2 s."""
    threading._shutdown()  # type: ignore[attr-defined]  # waits for other threads
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # such as a pipe whose reader has gone
            stream.flush()
    os._exit(0)


@contextmanager
def clear_errors() -> Iterator[None]:
    """Show an error as a message on standard error and exit with status 1; printing itself never fails."""
    sys.argv[1:] = map(quote_path, sys.argv[1:])
    drop_stray_ranks()
    end_with_parent()
    before = hydra_program.run_and_report
    hydra_program.run_and_report = lambda func: func()  # hands exceptions on instead of printing them
    try:
        with lenient(), shown_errors((*SETTING_ERRORS, OSError)):  # Hydra's own files, too
            yield
    finally:
        hydra_program.run_and_report = before


@contextmanager
def shown_errors(known: tuple[type[Exception], ...] = SETTING_ERRORS) -> Iterator[None]:
    """Show an error as `show` does and exit with status 1; `HYDRA_FULL_ERROR=1` lets it pass."""
    try:
        yield
    except Exception as error:
        if os.environ.get(FULL_ERROR) == "1":
            raise
        print(f"\n{harmless(show(error, known))}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(130)


def show(error: BaseException, known: tuple[type[Exception], ...] = SETTING_ERRORS) -> str:
    """An error as a user reads it.

    One that is in `known`, by default a `UserError` or an error in the configuration, is one message. Any other has
    the lines of its traceback that lie outside libraries.
    """
    cause = cause_of(error)
    is_slip = isinstance(cause, ConfigAttributeError | ConfigKeyError)  # in code that reads a configuration
    if (isinstance(cause, known) and not is_slip) or is_misfit(error) or is_refused(error) or is_of_disk(cause):
        return f"error: {explain(error)}"
    trace = traceback.TracebackException.from_exception(cause)
    lines = trace.format() if shorten(trace) else [f"error: {explain(error)}\n"]
    return f"{''.join(lines)}(to see all of the traceback: {FULL_ERROR}=1 before the command)"


def cause_of(error: BaseException) -> BaseException:
    """The exception in a constructor that Hydra has wrapped into its own, or in a log file that logging has."""
    while (inner := error.__cause__) and (isinstance(error, InstantiationException) or is_of_disk(inner)):
        if isinstance(error, UserError):  # which says what to do
            break
        error = inner
    return error


def is_of_disk(error: BaseException) -> bool:
    """Whether a disk is full, cannot be written by this user, or fails."""
    return isinstance(error, OSError) and error.errno in DISK


def is_misfit(error: BaseException) -> bool:
    """Whether a constructor was called with other arguments than it takes, rather than failed inside."""
    cause = cause_of(error)
    last = traceback.extract_tb(cause.__traceback__)[-1:]
    return cause is not error and isinstance(cause, TypeError) and "hydra" in Path(last[0].filename).parts


def is_refused(error: BaseException) -> bool:
    """Whether Lightning refuses a setting, or what it asks for is not installed."""
    cause = cause_of(error)
    is_absent = isinstance(cause, ModuleNotFoundError) and cause is not error
    return is_absent or type(cause).__name__ == "MisconfigurationException"  # importing that takes seconds


def shorten(trace: traceback.TracebackException) -> bool:
    """Remove frames of libraries and of this folder; of thaw, only those that call other code stay before such code.

    Returns whether any frame is left.
    """
    run = Path(__file__).parent
    own = [each for each in trace.stack if not each.filename.startswith((*LIBRARIES, __file__))]
    left = [each for each in own if not Path(each.filename).is_relative_to(run)] or own
    outside = [not Path(each.filename).is_relative_to(run.parent) for each in left]
    if outside[-1:] == [True]:
        left = [each for each, *near in zip(left, outside, [*outside[1:], True], strict=True) if any(near)]
    trace.stack[:] = left or trace.stack
    trace.__context__ = None
    if trace.__cause__:
        shorten(trace.__cause__)
    return bool(own)


def explain(error: BaseException) -> str:
    """The message of an error, with what was allowed where it is about a setting."""
    cause = cause_of(error)
    if isinstance(cause, OSError) and is_of_disk(cause):
        return str(unwritten(str(cause.filename or "a file in hydra.run.dir"), cause))
    if isinstance(cause, ConfigCompositionException | OverrideParseException):
        from thaw.run.suggestions import explain_composition

        return explain_composition(cause)
    message = str(cause).split("\n    full_key:")[0].strip()
    if missing := re.search(r"Missing mandatory value: (\S+)", message):
        return f"{missing[1]} is missing; add {missing[1]}=<value>."
    place = re.search(r"full_key: (\S+)", str(error))
    if place and (is_misfit(error) or is_refused(error)):
        return f"{place[1]}: {message}"
    if isinstance(cause, SETTING_ERRORS) or is_refused(error):
        return message
    return f"{type(cause).__name__}: {message}".removesuffix(": ")


def check_command(cfg: DictConfig) -> None:
    """Refuse what is wrong at a glance, before anything heavy is imported."""
    from thaw.run.targets import config_leaves
    from thaw.run.values import check_command_settings

    program = Path(sys.argv[0]).name
    allowed = CHECKPOINT + (", or a .onnx file of export.py" if program == "serve.py" else "")
    for key in sorted(OmegaConf.missing_keys(cfg)):
        step = f": the checkpoint of a model. Give {allowed}: python {program} ckpt=last\n{TRAIN_FIRST}"
        raise UserError(f"{key} is missing" + (step if key == "ckpt" else f"; add {key}=<value>."))
    check_command_settings(cfg)
    check_secrets({key: str(value) for key, value in config_leaves(OmegaConf.to_container(cfg), "")})
    for key in ("ckpt", "resume", "start_from", "distill"):
        given = cfg.get(key)
        for ckpt in given if OmegaConf.is_list(given) else [given]:
            if ckpt not in (None, "last") and not Path(str(ckpt)).expanduser().exists():
                raise UserError(f"{key}={ckpt} does not exist; give {allowed}: {key}=last")
    if cfg.get("ckpt") == "last" and not any(Path("logs", "runs").glob("**/checkpoints/*.ckpt")):
        raise UserError(f"ckpt=last, but no run in logs/runs has a checkpoint yet. {TRAIN_FIRST}")
    loggers = cfg.get("logger") or ()
    for kind, packages in LOGGER_PACKAGES.items():
        if kind in loggers and not any(map(find_spec, packages)):
            raise UserError(f"logger={kind} needs a package: pip install -e '.[{kind}]'.")


def check_options(config_name: str) -> None:
    """Refuse options that Hydra does not know, such as `--seed 3`, and `null` for one of a group."""
    for group in [each.removesuffix("=null") for each in sys.argv[1:] if each.endswith("=null")]:
        if options := sorted(path.stem for path in (CONFIGS / group).glob("*.yaml")):
            raise UserError(f"{group}=null: leave {group} out, or choose one of its options: {', '.join(options)}.")
    parser = hydra_program.get_args_parser()
    parser.exit_on_error = False
    try:
        known, unknown = parser.parse_known_args()
    except Exception as error:  # argparse.ArgumentError, of a known option with a wrong value
        raise UserError(f"{error}. --help lists what can be set.") from error
    if unknown and known.overrides and not any(each.startswith("-") for each in unknown):
        first = sys.argv.index(known.overrides[0])  # argparse takes no settings on both sides of an option
        words = [each for each in sys.argv if each not in unknown]
        sys.argv[:] = [*words[: first + 1], *unknown, *words[first + 1 :]]
    elif unknown:
        option = next(each for each in unknown if each.startswith("-"))
        key, _, value = option.lstrip("-").partition("=")
        behind = sys.argv[sys.argv.index(option) + 1 :]
        value = value or (behind[0] if behind and "=" not in behind[0] else "true")
        meant = f"{key.replace('-', '_')}={value}"
        try:
            with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
                hydra.compose(config_name, [meant])
        except HydraException as error:
            raise UserError(f"{option} is not an option, and {explain(error)}") from error
        raise UserError(f"{option} is not an option; did you mean {meant}? A setting has no dashes.")


def print_help(program: Callable[[], Any], config_name: str) -> None:
    """Print Hydra's help, broken between words at the terminal's width.

    Left out are other commands' groups, and settings that the options of a group share, which are no options.
    """
    text, groups, width = io.StringIO(), groups_of(config_name), shutil.get_terminal_size().columns
    with redirect_stdout(text), suppress(SystemExit):
        program()
    lists_in_lines = re.sub(  # of YAML
        r":((?:\n *- .*)+)", lambda found: f": [{', '.join(re.findall('- (.*)', found[1]))}]", text.getvalue()
    )
    for line in lists_in_lines.splitlines():
        group = line.partition(": ")[0]
        is_group = ": " in line and (CONFIGS / group).is_dir()
        if not is_group or (group.split("/")[0] in groups and not group.endswith("/settings")):
            indent = " " * (len(line) - len(line.lstrip()) + 2)
            print(textwrap.fill(line, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False))


def groups_of(config_name: str) -> set[str]:
    """The groups in the defaults of a root configuration and of those that it starts from."""
    entries = OmegaConf.load(CONFIGS / f"{config_name}.yaml").defaults
    groups = {str(group) for entry in entries if isinstance(entry, DictConfig) for group in entry}
    return groups.union(*(groups_of(entry) for entry in entries if isinstance(entry, str) and entry != "_self_"))
