"""Weights & Biases, online where that works and offline where it does not, without asking or waiting."""

import logging
import os
import shlex
import signal
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import wandb
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.loggers.logger import rank_zero_experiment
from lightning.pytorch.utilities import rank_zero_only
from pydantic import ValidationError

from thaw.run.command_line import shown_error
from thaw.run.console import warn_once
from thaw.run.errors import UserError, is_interruption
from thaw.run.trackers import Tracker, survives

log = logging.getLogger(__name__)
wandb_log = log.getChild("wandb")
wandb_log.setLevel(logging.WARNING)
wandb_log.addFilter(lambda record: "Timed out finishing" not in record.getMessage())  # `RunWandb.lose` says it

CONNECT_TIMEOUT = 3.0  # seconds
START_TIMEOUT = 30.0
OFFLINE = "W&B runs offline: {}."
NO_KEY = "no W&B key is configured; `wandb login` stores one"
LOGIN_HOSTS = ("https://api.wandb.ai",)  # `wandb login` may have stored the key under W&B's older address
BETTER: dict[str, Callable[..., float]] = {"val/acc": max, "val/loss": min}


class RunWandb(WandbLogger, Tracker):
    """Lightning's W&B logger, except that a run's summary holds the best of each metric in `BETTER`, not the last.

    W&B's own way to do that puts `val/acc.max` into the summary, where a table or a W&B sweep looks for `val/acc`.
    Where W&B fails at the start, the run is logged offline, unless `must_be_online`; later, it goes on without W&B.
    """

    kind = "wandb"
    must_be_online = False

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        if self._experiment is None and not self.lost:
            self.start()
        return self._experiment

    def start(self) -> None:
        try:
            run = super().experiment
            for name in BETTER:
                run.define_metric(name, summary="none", step_metric="trainer/global_step", step_sync=True)
            self.best = {name: run.summary.get(name) for name in BETTER}  # a run that is resumed online has some
            show_in_sweep(Path(run.dir).parent)
        except wandb.errors.UsageError as error:
            raise UserError(f"logger.wandb cannot start a run: {error}. logger=csv runs without W&B.") from error
        except Exception as error:
            if self.must_be_online:
                step = "logger.wandb.mode=auto would run offline"
                raise UserError(f"logger.wandb.mode=online but W&B fails ({shown_error(error)}). {step}.") from error
            if self._experiment is not None or self._wandb_init["mode"] == "offline":
                self.lose(error)
                return
            warn_once(OFFLINE.format(shown_error(error)))
            stop_service()
            self._wandb_init["mode"] = "offline"
            self.start()

    @property
    def run_id(self) -> str | None:
        return str(self._experiment.id) if self._experiment is not None else None

    def next_step(self) -> str:
        if self._experiment is None:
            return super().next_step()
        return f"Upload what it has: wandb sync {shlex.quote(os.path.relpath(Path(self._experiment.dir).parent))}"

    @rank_zero_only
    @survives
    def log_hyperparams(self, params: Any) -> None:
        super().log_hyperparams(params)

    @rank_zero_only
    @survives
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        super().log_metrics(metrics, step)
        for name in BETTER.keys() & metrics.keys():
            before = self.best[name]
            self.best[name] = metrics[name] if before is None else BETTER[name](metrics[name], before)
            self.experiment.summary[name] = self.best[name]

    def add_picture(self, key: str, path: Path) -> None:
        self.log_metrics({key: [wandb.Image(str(path))]})

    @rank_zero_only
    @survives
    def add_facts(self, facts: Mapping[str, Any]) -> None:
        self.experiment.summary.update({key: value for key, value in facts.items() if value is not None})

    @rank_zero_only
    @survives
    def finalize(self, status: str) -> None:
        super().finalize(status)
        if status == "preempted" and self._experiment is not None:
            self._experiment.mark_preempting()
            self.end(128 + signal.SIGTERM)

    @rank_zero_only
    def close(self, failed: bool) -> None:
        self.end(int(failed))
        if self.lost:
            stop_service()

    @survives
    def end(self, status: int) -> None:
        if self._experiment is not None:
            self._experiment.finish(exit_code=status)

    def after_save_checkpoint(self, checkpoint_callback: ModelCheckpoint) -> None:
        if checkpoint_callback.monitor is not None:  # last.ckpt was not chosen by a metric
            super().after_save_checkpoint(checkpoint_callback)


class RunTensorBoard(TensorBoardLogger, Tracker):
    """Lightning's TensorBoard logger, except that the run goes on where its file cannot be written."""

    kind = "tensorboard"
    run_id = None

    def __init__(self, save_dir: str, name: str, version: str, default_hp_metric: bool) -> None:
        super().__init__(save_dir, name, version, default_hp_metric=default_hp_metric)

    log_metrics = rank_zero_only(survives(TensorBoardLogger.log_metrics))
    log_hyperparams = rank_zero_only(survives(TensorBoardLogger.log_hyperparams))
    save = rank_zero_only(survives(TensorBoardLogger.save))
    finalize = rank_zero_only(survives(TensorBoardLogger.finalize))

    @rank_zero_only
    @survives
    def add_picture(self, key: str, path: Path) -> None:
        from torchvision.io import decode_image

        self.experiment.add_image(key, decode_image(str(path)))

    def add_facts(self, facts: Mapping[str, Any]) -> None:
        pass

    def close(self, failed: bool) -> None:
        pass


class NoLogger(Logger):
    """Takes the place of a logger and drops what it is given: callbacks such as LearningRateMonitor need a logger."""

    name = version = ""

    def log_metrics(self, *_: Any, **__: Any) -> None:
        pass

    log_hyperparams = log_metrics


def wandb_logger(
    project: str,
    entity: str | None,
    group: str | None,
    name: str,
    tags: Sequence[str],
    job_type: str,
    mode: Literal["auto", "online", "offline", "disabled"],
    log_model: bool,
    save_code: bool,
    run_dir: str,
    id: str | None,
    finish_timeout: float,
) -> Logger:
    """A W&B logger in a mode that is decided before W&B starts; where W&B is disabled, one that does nothing.

    Args:
        project, entity, name, tags, job_type: as in `wandb.init`.
        group: None means the folder above the run's: the experiment, or the sweep that the run is a job of.
        mode: `auto` is WANDB_MODE, or without it online if a key is configured and the server accepts it.
        log_model: keep the best checkpoint as an artifact. Offline only its path is noted, for `wandb sync` to upload.
        save_code: keep the program and a patch with the uncommitted changes of thaw's own checkout.
        run_dir: the run's folder; W&B writes to `<run_dir>/wandb`.
        id: of the W&B run to continue, or None for a new one.
        finish_timeout: seconds for the last uploads at the end of the run; `wandb sync` uploads what is missing then.
    """
    wanted = os.environ.get("WANDB_MODE", mode) if mode == "auto" else mode
    if wanted == "disabled":
        return NoLogger()
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # W&B's own crash telemetry
    os.environ.setdefault("WANDB_SILENT", "true")  # the summary says where the run lies
    try:
        wandb.termsetup(wandb.setup().settings, wandb_log)  # setup() reads both before it prints anything
    except ValidationError as error:
        wrong = [f"WANDB_{str(each['loc'][0]).upper()}={each['input']!r} ({each['msg']})" for each in error.errors()]
        raise UserError(f"W&B refuses the environment: {', '.join(wrong)}. Unset it, or set it as W&B says.") from error
    except Exception as error:
        if mode == "online":
            raise UserError(f"logger.wandb.mode=online but W&B does not start ({shown_error(error)}).") from error
        log.warning("W&B does not start (%s). The run goes on without it.", shown_error(error))
        return NoLogger()
    offline = wanted in ("offline", "dryrun")
    reason = None if offline else why_offline()
    if reason is not None:
        if mode == "online":
            raise UserError(f"logger.wandb.mode=online but {reason}; choose auto or offline, which need no server.")
        if reason != NO_KEY:
            warn_once(OFFLINE.format(reason))  # not for each job of a sweep
    logger = RunWandb(
        project=project,
        entity=entity,
        group=group or Path(run_dir).parent.name,
        name=name.strip(),  # a run without overrides
        tags=[tag[:64] for tag in tags],  # W&B takes no longer ones
        job_type=job_type,
        save_dir=run_dir,
        mode="offline" if offline or reason else "online",
        id=id,
        resume="allow",
        log_model=log_model,
        add_file_policy="immutable",  # else W&B copies each checkpoint before it uploads it
        settings=wandb.Settings(
            silent=True,
            console="off",
            init_timeout=START_TIMEOUT,
            finish_timeout=finish_timeout,
            finish_timeout_raises=True,  # W&B would only print it
            x_save_requirements=False,  # versions are logged
            save_code=save_code,
            git_root=str(Path(__file__).parent),  # W&B would look where the program was started
        ),
    )
    wandb.util.pd_available = "pandas" in sys.modules  # else W&B imports it, to look for tables among the metrics
    del logger._wandb_init["anonymous"]  # W&B warns that it means nothing, even if it is None
    logger.must_be_online = mode == "online"
    return logger


def stop_service() -> None:
    """End W&B's own process, which may be gone already, and its run; the next run starts a new one."""
    for end in (wandb.finish, wandb.teardown):
        with suppress(Exception, SystemExit):
            end(exit_code=1)
    wandb.run = None  # which wandb.finish leaves if the process is gone; Lightning would log the next run there


def show_in_sweep(folder: Path) -> None:
    """Link a W&B run's folder, if it is `<sweep>/<job>/wandb/<run>`, into `<sweep>/wandb`.

    There W&B shows and uploads the sweep as a whole. `wandb leet` lists folders by their names, so that the test of the
    winner, which continues a finished run in a second folder, is under a name that only `wandb sync` takes.
    """
    job, sweep = folder.parents[1], folder.parents[2]
    if not (sweep / "multirun.yaml").is_file():
        return
    name = f"test-of-{folder.name}" if (job / "summary.json").is_file() else folder.name
    link = sweep / "wandb" / name
    link.parent.mkdir(exist_ok=True)
    with suppress(OSError):  # it is there already, or this file system has no links
        link.symlink_to(os.path.relpath(folder, link.parent), target_is_directory=True)


def why_offline() -> str | None:
    """Why W&B cannot run online, or None if it can.

    Answers within `CONNECT_TIMEOUT` and the time that W&B gives one request, which is WANDB_HTTP_TIMEOUT or 10 s.
    """
    from requests.utils import get_netrc_auth

    server = wandb.setup().settings.base_url
    in_environment = any(os.environ.get(name) for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE"))
    if not in_environment and not any(get_netrc_auth(host) for host in (server, *LOGIN_HOSTS)):
        return NO_KEY
    url = urlsplit(server)
    port = url.port or (443 if url.scheme == "https" else 80)
    try:
        socket.create_connection((url.hostname or "", port), timeout=CONNECT_TIMEOUT).close()
        wandb.login(verify=True)
    except OSError as error:
        return f"{url.hostname}:{port} does not answer ({error})"
    except wandb.Error as error:
        if any(words in str(error) for words in ("in time", "deadline", "Timeout")):
            return f"{url.hostname}:{port} does not answer in time"
        return f"{shown_error(error)}; `wandb login --relogin` stores another key"
    return None


def log_image(loggers: list[Logger], key: str, path: Path) -> None:
    """Add a PNG to every logger that takes pictures."""
    for logger in loggers:
        if isinstance(logger, Tracker):
            logger.add_picture(key, path)


def log_page(loggers: list[Logger], path: Path) -> None:
    """Add an HTML page to W&B's run."""
    for logger in loggers:
        if isinstance(logger, RunWandb):
            logger.log_metrics({"report/page": wandb.Html(str(path), inject=False)})


def wandb_run(loggers: list[Logger]) -> "wandb.Run | None":
    """The W&B run that is logged to, if there is one."""
    runs = [logger.experiment for logger in loggers if isinstance(logger, WandbLogger)]
    return next((run for run in runs if isinstance(run, wandb.Run)), None)


def link_earlier_folders(loggers: list[Logger], run_dir: Path) -> None:
    """Link the folders that an offline W&B run has in the run that is resumed, beside its new one.

    There `where_to_look` and whoever uploads the run find all of them.
    """
    run = wandb_run(loggers)
    if run is None:
        return
    here = Path(run.dir).parents[1]
    for folder in (run_dir / "wandb").glob(f"offline-run-*-{run.id}"):
        with suppress(OSError):  # it is there already, or this file system has no links
            (here / folder.name).symlink_to(os.path.relpath(folder.resolve(), here), target_is_directory=True)


def where_to_look(loggers: list[Logger]) -> list[str]:
    """How to see the run in W&B: its address, or two commands that show and upload an offline run."""
    run = wandb_run(loggers)
    if run is None:
        return []
    if not run.settings._offline:
        return [str(run.url)]
    folder = Path(run.dir).parent
    every = f"offline-run-*-{run.id}*"  # a run that went on has several folders
    parent, name = shlex.quote(os.path.relpath(folder.parent)), folder.name
    upload = every if len(list(folder.parent.glob(every))) > 1 else name
    return [f"wandb leet {parent}/{name}", f"wandb sync {parent}/{upload}"]


def add_to_summary(loggers: list[Logger], facts: Mapping[str, Any]) -> None:
    """Put facts of a finished run, such as its time and size, into its summary in W&B, MLflow and trackio."""
    for logger in loggers:
        if isinstance(logger, Tracker):
            logger.add_facts(facts)


def finish(loggers: list[Logger]) -> None:
    """Close every logger, W&B's run too: the next job of a sweep would otherwise write into it.

    Called while an exception passes, it marks the run as failed; after Ctrl-C as preempted, as it can be resumed.
    """
    error = sys.exc_info()[1]
    if error is not None and is_interruption(error):
        for logger in loggers:
            logger.finalize("preempted")
        return
    failed = error is not None and type(error).__name__ != "TrialPruned"  # Optuna's
    for logger in loggers:
        logger.finalize("failed" if failed else "success")
        if isinstance(logger, Tracker):
            logger.close(failed)
