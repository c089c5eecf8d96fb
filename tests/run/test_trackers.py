"""MLflow and trackio keep a run in a local store, which is read back with their own clients."""

import errno
import socket
from pathlib import Path
from typing import Any

import pytest
from faults.wandb_server import WandbServer

from thaw.run import loggers, trackers
from thaw.run.errors import UserError

PICTURE = Path(__file__).parents[2] / "docs" / "pictures" / "tutorial" / "letter.png"
METRICS = {"val/acc": 0.5, "val/acc_lr=0.1_wd=0": 0.25}


def settings(folder: Path, **changes: Any) -> dict[str, Any]:
    same = {"project": "thaw", "name": "probe optim.lr=1", "group": None, "dir": str(folder / "store"), "id": None}
    return same | {"run_dir": str(folder / "sweep" / "job")} | changes


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """A token is there, so that trackio would ask the Hub whose it is."""
    monkeypatch.setenv("HF_TOKEN", "hf_none")
    for name in ("MLFLOW_TRACKING_URI", "TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *_, **__: pytest.fail(f"looks up {host}"))


def log(logger: Any, **params: Any) -> str:
    logger.log_hyperparams({"optim": {"lr": 1.0}, **params})
    logger.log_metrics(METRICS, step=3)
    loggers.log_image([logger], "test/picture", PICTURE)
    loggers.add_to_summary([logger], {"seconds": 1.5, "test/acc": None})
    return trackers.tracker_ids([logger])[logger.kind]


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("failed", [False, True])
def test_mlflow(failed: bool, tmp_path: Path) -> None:
    pytest.importorskip("mlflow")
    pytest.importorskip("sqlalchemy")
    given = settings(tmp_path, tags=["MNIST"], tracking_uri=None)
    first = trackers.mlflow_logger(**given)
    run = log(first, seed=0)
    first.finalize("success")  # as Lightning does before the test
    assert first.experiment.get_run(run).info.status == "RUNNING"
    first.finalize("preempted")
    assert first.experiment.get_run(run).info.status == "KILLED"
    later = trackers.mlflow_logger(**given | {"id": run})
    assert log(later, seed=1, resume="last.ckpt") == run
    later.close(failed)  # type: ignore[attr-defined]
    found = later.experiment.get_run(run)
    assert found.info.status == ("FAILED" if failed else "FINISHED")
    assert found.data.params == {"optim/lr": "1.0", "seed": "0", "resume": "last.ckpt"}
    assert found.data.metrics == {"val/acc": 0.5, "val/acc_lr_0.1_wd_0": 0.25, "seconds": 1.5}
    assert found.data.tags["group"] == "sweep" and found.info.run_name == "probe optim.lr=1"
    assert [each.path for each in later.experiment.list_artifacts(run, "test")] == ["test/letter.png"]
    with pytest.raises(UserError, match=r"logger\.mlflow: Run .* not found"):
        _ = trackers.mlflow_logger(**given | {"id": "0" * 32}).experiment


@pytest.mark.parametrize("fault", [500, "refused", "silent", "garbage"])
@pytest.mark.parametrize("after", [None, "log-batch"])
def test_mlflow_without_its_server(
    fault: str | int,
    after: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """It is told once, and nothing else happens."""
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    with WandbServer(fault, after) as server:
        logger = trackers.mlflow_logger(**settings(tmp_path, tags=[], tracking_uri=server.url))
        assert logger.version is None or after
        for step in range(9):
            logger.log_metrics(METRICS, step=step)
        loggers.finish([logger])
    (told,) = [record.getMessage() for record in caplog.records if record.name == "thaw.run.trackers"]
    assert told.startswith("logger.mlflow has failed")


@pytest.mark.usefixtures("no_network")
def test_trackio(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("trackio")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "store"))  # trackio reads it once, when it is imported
    import trackio

    given = settings(tmp_path)
    first = trackers.trackio_logger(**given)
    run = log(first)
    first.finalize("success")
    first.close(False)  # type: ignore[attr-defined]
    assert run == "probe optim.lr=1 (job)"
    later = trackers.trackio_logger(**given | {"run_dir": str(tmp_path / "sweep" / "resumed"), "id": run})
    assert log(later) == run
    later.close(True)  # type: ignore[attr-defined]
    runs = list(trackio.Api().runs("thaw"))
    assert [each.name for each in runs] == [run]
    assert runs[0].config["optim/lr"] == 1.0 and runs[0].config["_Group"] == "sweep"
    assert list((tmp_path / "store").rglob("*.png"))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("fails", [False, True])
def test_tensorboard(
    fails: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.summary.writer.record_writer import RecordWriter

    def no_space(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    logger = loggers.RunTensorBoard(str(tmp_path), "tensorboard", "", False)
    logger.log_metrics({"x": 1.0}, step=0)
    logger.save()
    if fails:
        monkeypatch.setattr(RecordWriter, "write", no_space)
    for step in range(1, 100):
        logger.log_metrics({"x": 2.0}, step=step)
    loggers.log_image([logger], "picture", PICTURE)
    loggers.add_to_summary([logger], {"seconds": 1.0})
    loggers.finish([logger])
    assert caplog.text.count("logger.tensorboard has failed (OSError [Errno 28] No space left on device)") == fails
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert len(events.Scalars("x")) == (1 if fails else 100)
    assert events.Tags()["images"] == ([] if fails else ["picture"])
