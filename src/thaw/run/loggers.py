"""Weights & Biases, online where that works and offline where it does not, without asking or waiting."""

import logging
import os
import shlex
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
from requests.utils import get_netrc_auth

from thaw.run.errors import UserError
from thaw.run.trackers import Tracker

log = logging.getLogger(__name__)

WANDB_TIMEOUT = 3.0  # seconds to connect
NO_KEY = "no W&B key is configured"
LOGIN_HOSTS = ("https://api.wandb.ai",)  # `wandb login` may have stored the key under W&B's older address
BETTER: dict[str, Callable[..., float]] = {"val/acc": max, "val/loss": min}


class RunWandb(WandbLogger):
    """Lightning's W&B logger, except that a run's summary holds the best of each metric in `BETTER`, not the last.

    W&B's own way to do that puts `val/acc.max` into the summary, where a table or a W&B sweep looks for `val/acc`.
    """

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        if self._experiment is None:
            try:
                run = super().experiment
            except wandb.Error as error:
                raise UserError(f"logger.wandb cannot start a run: {error}. logger=csv runs without W&B.") from error
            for name in BETTER:
                run.define_metric(name, summary="none", step_metric="trainer/global_step", step_sync=True)
            self.best = {name: run.summary.get(name) for name in BETTER}  # a run that is resumed online has some
            show_in_sweep(Path(run.dir).parent)
        return self._experiment

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        super().log_metrics(metrics, step)
        for name in BETTER.keys() & metrics.keys():
            before = self.best[name]
            self.best[name] = metrics[name] if before is None else BETTER[name](metrics[name], before)
            self.experiment.summary[name] = self.best[name]

    def after_save_checkpoint(self, checkpoint_callback: ModelCheckpoint) -> None:
        if checkpoint_callback.monitor is not None:  # last.ckpt was not chosen by a metric
            super().after_save_checkpoint(checkpoint_callback)


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
) -> Logger:
    """A W&B logger in a mode that is decided before W&B starts; where W&B is disabled, one that does nothing.

    Args:
        project, entity, name, tags, job_type: as in `wandb.init`.
        group: None means the folder above the run's: the experiment, or the sweep that the run is a job of.
        mode: `auto` is WANDB_MODE, or without it online if a key is configured and the server answers.
        log_model: keep the best checkpoint as an artifact. Offline only its path is noted, for `wandb sync` to upload.
        save_code: keep the program and a patch with the uncommitted changes of thaw's own checkout.
        run_dir: the run's folder; W&B writes to `<run_dir>/wandb`.
        id: of the W&B run to continue, or None for a new one.
    """
    if "disabled" in (mode, os.environ.get("WANDB_MODE") if mode == "auto" else None):
        return NoLogger()
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # W&B's own crash telemetry
    os.environ.setdefault("WANDB_SILENT", "true")  # the summary says where the run lies
    try:
        wandb.setup()  # reads both before it prints anything
    except ValidationError as error:
        wrong = [f"WANDB_{str(each['loc'][0]).upper()}={each['input']!r} ({each['msg']})" for each in error.errors()]
        raise UserError(f"W&B refuses the environment: {', '.join(wrong)}. Unset it, or set it as W&B says.") from error
    reason = None if mode == "offline" else why_offline()
    if mode == "online" and reason == NO_KEY:
        raise UserError(f"logger.wandb.mode=online but {reason}; run `wandb login` first, or choose auto or offline.")
    if mode == "auto" and reason not in (None, NO_KEY):
        log.warning("W&B runs offline: %s.", reason)
    return RunWandb(
        project=project,
        entity=entity,
        group=group or Path(run_dir).parent.name,
        name=name.strip(),  # a run without overrides
        tags=[tag[:64] for tag in tags],  # W&B takes no longer ones
        job_type=job_type,
        save_dir=run_dir,
        mode="offline" if mode == "offline" or (mode == "auto" and reason is not None) else "online",
        id=id,
        resume="allow",
        log_model=log_model,
        add_file_policy="immutable",  # else W&B copies each checkpoint before it uploads it
        settings=wandb.Settings(
            silent=True,
            console="off",
            x_save_requirements=False,  # versions are logged
            save_code=save_code,
            git_root=str(Path(__file__).parent),  # W&B would look where the program was started
        ),
    )


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
    """Why W&B cannot run online, or None if it can; answers within `WANDB_TIMEOUT`.

    W&B's own check of a key talks to the server and waits for it, so the key is only looked up here.
    """
    if os.environ.get("WANDB_MODE") in ("offline", "dryrun"):
        return f"WANDB_MODE is {os.environ['WANDB_MODE']}"
    server = wandb.setup().settings.base_url
    in_environment = any(os.environ.get(name) for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE"))
    if not in_environment and not any(get_netrc_auth(host) for host in (server, *LOGIN_HOSTS)):
        return NO_KEY
    url = urlsplit(server)
    port = url.port or (443 if url.scheme == "https" else 80)
    try:
        socket.create_connection((url.hostname or "", port), timeout=WANDB_TIMEOUT).close()
    except OSError as error:
        return f"{url.hostname}:{port} does not answer ({error})"
    return None


def log_image(loggers: list[Logger], key: str, path: Path) -> None:
    """Add a PNG to every logger that takes pictures."""
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            logger.log_image(key, [str(path)])
        elif isinstance(logger, TensorBoardLogger):
            from torchvision.io import decode_image

            logger.experiment.add_image(key, decode_image(str(path)))
        elif isinstance(logger, Tracker):
            logger.add_picture(key, path)


def wandb_run(loggers: list[Logger]) -> wandb.Run | None:
    """The W&B run that is logged to, if there is one."""
    return next((logger.experiment for logger in loggers if isinstance(logger, WandbLogger)), None)


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
    run = wandb_run(loggers)
    for logger in loggers:
        if isinstance(logger, Tracker):
            logger.log_metrics({key: value for key, value in facts.items() if isinstance(value, int | float)})
    if run is not None:
        run.summary.update({key: value for key, value in facts.items() if value is not None})


def finish(loggers: list[Logger]) -> None:
    """Close every logger, W&B's run too: the next job of a sweep would otherwise write into it.

    Called while an exception passes, it marks the run as failed.
    """
    error = sys.exc_info()[0]
    failed = error is not None and error.__name__ != "TrialPruned"  # Optuna's
    for logger in loggers:
        logger.finalize("failed" if failed else "success")
        if isinstance(logger, Tracker):
            logger.close(failed)
    if any(isinstance(logger, WandbLogger) for logger in loggers):
        wandb.finish(exit_code=int(failed))
