"""MLflow and trackio: runs in a store on this machine, or on a server that the settings or the environment name."""

import getpass
import logging
import os
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from functools import wraps
from io import StringIO
from pathlib import Path
from typing import Any
from unittest.mock import patch

from lightning.fabric.utilities.logger import _convert_params, _flatten_dict
from lightning.pytorch.loggers import Logger, MLFlowLogger
from lightning.pytorch.loggers.logger import rank_zero_experiment
from lightning.pytorch.utilities import rank_zero_only

from thaw.run.command_line import shown_error
from thaw.run.errors import UserError

log = logging.getLogger(__name__)


def survives(method: Callable[..., None]) -> Callable[..., None]:
    """Let a failure in a method of a logger end the logging to it, not the run."""

    @wraps(method)
    def call(self: "Tracker", *args: Any, **kwargs: Any) -> None:
        if self.lost:
            return
        try:
            method(self, *args, **kwargs)
        except UserError:
            raise
        except Exception as error:
            self.lose(error)

    return call


class Tracker(Logger):
    """A logger that also takes pictures and final facts, and whose run a later process can continue.

    Attributes:
        kind: its name in `logger=`.
        lost: it has failed, and is left alone from then on.
    """

    kind: str
    lost = False

    def lose(self, error: BaseException) -> None:
        """Say once that this logger has failed."""
        self.lost = True
        if isinstance(error.__cause__, OSError):  # of which Lightning makes another one for TensorBoard
            error = error.__cause__
        reason = f"{type(error).__name__} {shown_error(error)}".strip()
        log.warning("logger.%s has failed (%s). The run goes on without it. %s", self.kind, reason, self.next_step())

    def next_step(self) -> str:
        return "Its other loggers have everything."

    @property
    def run_id(self) -> str | None:
        """Of the run that a resumed run continues; None on all processes but the first."""
        raise NotImplementedError

    def add_picture(self, key: str, path: Path) -> None:
        raise NotImplementedError

    def add_facts(self, facts: Mapping[str, Any]) -> None:
        self.log_metrics({key: value for key, value in facts.items() if isinstance(value, int | float)})

    def close(self, failed: bool) -> None:
        """The run has ended; Lightning's `finalize` comes after training, before the test."""
        raise NotImplementedError


WRONG_SETTING = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")  # codes of MLflow's errors


class RunMLflow(MLFlowLogger, Tracker):
    """Lightning's MLflow logger, except that a run may be resumed, and has ended when the whole run has."""

    kind = "mlflow"

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        from mlflow.exceptions import MlflowException

        try:
            return None if self.lost else super().experiment
        except MlflowException as error:
            if error.error_code in WRONG_SETTING:
                raise UserError(f"logger.mlflow: {shown_error(error)}. logger=csv runs without MLflow.") from error
            self.lose(error)

    @rank_zero_only
    @survives
    def log_hyperparams(self, params: Any) -> None:
        """MLflow refuses to change a parameter: a resumed run adds what is new."""
        self.experiment.update_run(self.run_id, status="RUNNING")
        known = self.experiment.get_run(self.run_id).data.params
        flat = _flatten_dict(_convert_params(params))
        super().log_hyperparams({key: value for key, value in flat.items() if key not in known})

    @rank_zero_only
    @survives
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """MLflow takes no `=` in names, as in `val/acc_lr=0.01_wd=0`."""
        super().log_metrics({name.replace("=", "_"): value for name, value in metrics.items()}, step)

    @rank_zero_only
    @survives
    def add_picture(self, key: str, path: Path) -> None:
        self.experiment.log_artifact(self.run_id, str(path), os.path.dirname(key))  # noqa: PTH120  (no path)

    def finalize(self, status: str = "success") -> None:
        if status == "preempted":
            self.end("KILLED")

    def close(self, failed: bool) -> None:
        self.end("FAILED" if failed else "FINISHED")

    @rank_zero_only
    @survives
    def end(self, status: str) -> None:
        if self._initialized:
            self.experiment.set_terminated(self.run_id, status)


def mlflow_logger(
    project: str,
    name: str,
    group: str | None,
    tags: Sequence[str],
    tracking_uri: str | None,
    dir: str,
    run_dir: str,
    id: str | None,
) -> Logger:
    """A logger for MLflow that sends no telemetry.

    Args:
        project: the experiment's name in MLflow.
        name, group, tags: of the run; group as for `thaw.run.loggers.wandb_logger`.
        tracking_uri: None means MLFLOW_TRACKING_URI, or without it a SQLite file in `dir`.
        dir: for that file, and pictures of its runs.
        id: of the run to continue, or None for a new one.
    """
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # read when mlflow is imported
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")  # seconds; a server that has gone would hold up the run
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    for chatty in ("alembic.runtime.migration", "lightning.pytorch.loggers.mlflow"):  # as a new store is made
        logging.getLogger(chatty).setLevel(logging.ERROR)
    uri, folder = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI"), Path(dir).absolute()
    if uri is None:
        folder.mkdir(parents=True, exist_ok=True)
        uri = f"sqlite:///{folder}/mlflow.db"
    artifacts = None if uri.startswith("http") else (folder / "artifacts").as_uri()
    described = {"group": group or Path(run_dir).parent.name, "tags": ", ".join(tags), "run_dir": run_dir}
    return RunMLflow(project, name.strip(), uri, described, artifact_location=artifacts, run_id=id)


class RunTrackio(Tracker):
    """A run in trackio, which is known by its name: each has the name of its folder in its own."""

    kind = "trackio"

    def __init__(self, project: str, name: str, group: str, id: str | None) -> None:
        super().__init__()
        self.project, self.id, self.group = project, id or name, group
        self._run: Any = None

    name = property(lambda self: self.project)
    version = property(lambda self: self.id)

    @property
    def run_id(self) -> str | None:
        return self.id

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        if self._run is None:
            import trackio
            import trackio.run

            local = not any(os.environ.get(name) for name in ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL"))
            named = {"_get_default_namespace": getpass.getuser} if local else {}  # trackio's asks the Hub
            with redirect_stdout(StringIO()), patch.dict(vars(trackio.run), named):
                self._run = trackio.init(
                    project=self.project,
                    name=self.id,
                    group=self.group,
                    resume="allow",
                    embed=False,
                    auto_log_gpu=False,
                    auto_log_cpu=False,
                )
        return self._run

    @rank_zero_only
    @survives
    def log_hyperparams(self, params: Any, *_: Any, **__: Any) -> None:
        from trackio.utils import to_json_safe

        self.experiment.config.update(to_json_safe(_flatten_dict(_convert_params(params))))  # kept by the first log

    @rank_zero_only
    @survives
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self.experiment.log(dict(metrics), step=step)

    @rank_zero_only
    @survives
    def add_picture(self, key: str, path: Path) -> None:
        import trackio

        self.experiment.log({key: trackio.Image(str(path))})

    def finalize(self, status: str) -> None:
        if status == "preempted":
            self.close(False)

    @rank_zero_only
    @survives
    def close(self, failed: bool) -> None:
        if self._run is None:
            return
        import trackio

        with redirect_stdout(StringIO()):
            if failed:  # runs have no state in trackio
                self._run.alert("failed", level=trackio.AlertLevel.ERROR)
            trackio.finish()
        self._run = None


def trackio_logger(project: str, name: str, group: str | None, dir: str, run_dir: str, id: str | None) -> Logger:
    """A logger for trackio.

    Args:
        project, name, group: of the run; group as for `thaw.run.loggers.wandb_logger`.
        dir: its store; TRACKIO_DIR, if set, has precedence.
        id: name of the run to continue, or None for a new one.
    """
    os.environ.setdefault("TRACKIO_DIR", str(Path(dir).absolute()))  # read when trackio is imported
    folder = Path(run_dir)
    name = re.sub(r"[/\\$]", "_", f"{name.strip()} ({folder.name})")  # part of a path, and of a checkpoint
    return RunTrackio(project, name, group or folder.parent.name, id)


def tracker_ids(loggers: Sequence[Logger]) -> dict[str, str]:
    """The runs that a resumed run continues, by the kind of logger; for checkpoints."""
    ids = {logger.kind: logger.run_id for logger in loggers if isinstance(logger, Tracker)}
    return {kind: id for kind, id in ids.items() if isinstance(id, str)}
