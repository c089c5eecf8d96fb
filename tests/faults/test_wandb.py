"""Whatever happens to W&B, its server, its process or its folder: training ends as it would without."""

import logging
import os
import random
import signal
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import ROOT
from fault_counts import FULL, sized
from faults.wandb_server import FAULTS, WandbServer
from run.test_loggers import no_settings, settings  # noqa: F401  # the fixture keeps this machine's key out
from run.test_wandb_runs import history, in_csv, records

from thaw.classifier import Classifier
from thaw.run import loggers
from thaw.run.errors import UserError

PHASES = {"from the start": None, "once the key is checked": "Viewer", "in the middle": "file_stream"}
BOUND = 20.0  # seconds more than without a server; the limits below allow 9
Train = Callable[..., Path]


@pytest.fixture(autouse=True)
def short_limits(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A key is configured, and W&B gives up sooner than in a run of the user."""
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_HTTP_TIMEOUT", "2")
    monkeypatch.setattr(loggers, "START_TIMEOUT", 3.0)
    yield
    loggers.stop_service()


@pytest.fixture
def run(train: Train, tiny_run: list[str], caplog: pytest.LogCaptureFixture) -> Callable[..., SimpleNamespace]:
    """Train and return what a user sees: the run's folder, its seconds, its warnings."""
    probe = [*(each for each in tiny_run if each != "logger=none"), "experiment=vit_linear_probe", "cache.mode=off"]
    probe += ["test=false", "trainer.max_epochs=3", "trainer.log_every_n_steps=1"]

    def run(name: str, *overrides: str) -> SimpleNamespace:
        caplog.clear()
        loggers.warn_once.cache_clear()
        started = time.monotonic()
        folder = train(*probe, *overrides, name=name)
        told = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
        return SimpleNamespace(folder=folder, seconds=time.monotonic() - started, told=told)

    return run


WITH_WANDB = ["logger=[csv,wandb]", f"logger.wandb.finish_timeout={sized(1, 3)}"]


def metrics(run_dir: Path) -> list[list[tuple[int, float]]]:
    return [in_csv(run_dir, key) for key in ("train/loss", "val/loss", "val/acc")]


@pytest.fixture(scope="module")
def known() -> dict[str, SimpleNamespace]:
    return {}


@pytest.fixture
def alone(run: Callable[..., SimpleNamespace], known: dict[str, SimpleNamespace]) -> SimpleNamespace:
    """A run without W&B, made once."""
    if not known:
        known["alone"] = run("alone", "logger=csv")
    return known["alone"]


def check(found: SimpleNamespace, alone: SimpleNamespace) -> None:
    """The run is whole, was not held up, and what W&B was to get is on the disk."""
    assert metrics(found.folder) == metrics(alone.folder)
    assert (found.folder / "summary.json").is_file()
    assert found.seconds < alone.seconds + BOUND
    crashed = "HandleAbandonedError" in str(found.told)  # W&B's process, which writes what it has every 15 s
    if FULL and not crashed:
        folder = max((found.folder / "wandb").glob("*run-*-*"), key=lambda path: path.name.startswith("offline"))
        assert history(records(folder), "val/acc") == in_csv(found.folder, "val/acc")


REFUSED = {"wrong key", "forbidden", "project not found", "deleted run", "gone", "null", "garbage"}


def test_a_server_that_fails(
    tries: Any, run: Callable[..., SimpleNamespace], alone: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    every = [(phase, fault) for phase in PHASES for fault in FAULTS]
    telling = [("from the start", "wrong key"), ("in the middle", "error 500")]
    with tries("W&B's server fails", harm="lost") as attempt:
        for phase, fault in every if FULL else telling:
            with attempt(f"{fault} {phase}"), WandbServer(FAULTS[fault], after=PHASES[phase]) as server:
                monkeypatch.setenv("WANDB_BASE_URL", server.url)
                found = run(f"{fault} {phase}", *WITH_WANDB)
                check(found, alone)
                if phase == "in the middle":  # W&B takes any answer without an error for a good one
                    assert fault == "garbage" or "wandb sync" in str(found.told), found.told
                elif "HandleAbandonedError" not in str(found.told):
                    assert sum("W&B runs offline: " in each for each in found.told) == 1, found.told
                    assert ("--relogin" in str(found.told)) == (phase == "from the start" and fault in REFUSED)
            loggers.stop_service()


@pytest.mark.long
def test_a_healthy_server_gets_everything(run: Callable[..., SimpleNamespace], monkeypatch: pytest.MonkeyPatch) -> None:
    with WandbServer() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        found = run("healthy", *WITH_WANDB)
        assert server.seen["file_stream"] and server.seen["file"] and not found.told


@pytest.mark.long
@pytest.mark.parametrize("fault", [None, "error 500", "silent", "slow", "refused"])
def test_logging_waits_for_no_server(fault: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The median of a call with 13 metrics was 0.2 to 0.7 ms for each of them, on two busy cores."""
    metrics = {"train/loss": 1.0} | {f"grad_norm/layer{number}": 1.0 for number in range(12)}
    with WandbServer(FAULTS[fault] if fault else None, after="file_stream") as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        logger = loggers.wandb_logger(**settings(run_dir=str(tmp_path), finish_timeout=1))
        seconds = []
        for step in range(600):
            started = time.monotonic()
            logger.log_metrics(metrics, step=step)
            seconds.append(time.monotonic() - started)
            time.sleep(0.003)
        loggers.finish([logger])
    assert statistics.median(seconds) < 0.01


def core() -> int:
    """The process of W&B that this one has started."""
    found = subprocess.run(["pgrep", "-P", str(os.getpid()), "wandb-core"], capture_output=True, text=True, check=True)
    return int(found.stdout.split()[-1])


def test_its_process_is_killed(
    tries: Any, run: Callable[..., SimpleNamespace], alone: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At a random step; the next run of the same process, as in a sweep, has a new one."""
    drawn = random.Random(0)
    step = Classifier.training_step
    with tries("W&B's process is killed", harm="lost") as attempt:
        for number in range(sized(1, 8)):
            fatal = drawn.randrange(12)

            def kill(self: Classifier, batch: Any, batch_idx: int, fatal: int = fatal) -> Any:
                if self.global_step == fatal:
                    os.kill(core(), signal.SIGKILL)
                return step(self, batch, batch_idx)

            with attempt(f"in step {fatal}"):
                monkeypatch.setattr(Classifier, "training_step", kill)
                found = run(f"killed {number}", *WITH_WANDB, "logger.wandb.mode=offline")
                monkeypatch.setattr(Classifier, "training_step", step)
                assert metrics(found.folder) == metrics(alone.folder)
                assert (found.folder / "summary.json").is_file()
                (told,) = [each for each in found.told if each.startswith("logger.wandb has failed")]
                assert "wandb sync" in told
                later = loggers.wandb_logger(**settings(mode="offline", run_dir=str(found.folder / "later")))
                later.log_metrics({"val/acc": 0.5}, step=0)
                loggers.finish([later])
                assert not later.lost


def test_preempted_when_its_process_is_gone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It gets a cluster's SIGTERM too."""
    logger = loggers.wandb_logger(**settings(mode="offline", run_dir=str(tmp_path)))
    assert logger.experiment
    os.kill(core(), signal.SIGKILL)
    logger.finalize("preempted")
    assert "logger.wandb has failed" in caplog.text


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 kB, of which nothing is left."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "thaw", folder]
    mounted = subprocess.run(command, capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"mounting is not allowed here: {mounted.stderr.strip()}")
    with pytest.raises(OSError), (folder / "ballast").open("wb", buffering=0) as ballast:
        while True:
            ballast.write(bytes(4096))
    yield folder
    loggers.stop_service()
    subprocess.run(["umount", "-l", folder], check=True)


def use(logger: Any) -> None:
    """All that a run does with it."""
    assert logger.name is not None
    logger.log_hyperparams({"optim": {"lr": 1.0}})
    for step in range(100):
        logger.log_metrics({"val/acc": 0.5}, step=step)
    loggers.log_image([logger], "picture", ROOT / "docs" / "pictures" / "tutorial" / "letter.png")
    loggers.add_to_summary([logger], {"seconds": 1.0})
    loggers.where_to_look([logger])
    loggers.finish([logger])


def test_its_folder_is_full(full_disk: Path, caplog: pytest.LogCaptureFixture) -> None:
    use(loggers.wandb_logger(**settings(mode="offline", run_dir=str(full_disk))))
    assert "logger.wandb has failed" in caplog.text and "No space left on device" in caplog.text


def test_its_folder_cannot_be_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """WANDB_DIR, which names no folder, is not asked: a run's files are in its own."""
    monkeypatch.setenv("WANDB_DIR", "/proc/nowhere")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "wandb").write_text("in the way")
    use(loggers.wandb_logger(**settings(mode="offline", run_dir=str(tmp_path / "run"))))
    assert "logger.wandb has failed" in caplog.text


def test_its_process_does_not_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("wandb.sdk.lib.service.service_process.get_core_path", lambda: "/nowhere/wandb-core")
    use(loggers.wandb_logger(**settings(mode="offline", run_dir=str(tmp_path))))
    assert "W&B does not start (" in caplog.text
    with pytest.raises(UserError, match="mode=online but"):
        loggers.wandb_logger(**settings(mode="online", run_dir=str(tmp_path)))


def test_one_warning_for_a_sweep(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    with WandbServer(401) as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        for _ in range(3):
            assert loggers.wandb_logger(**settings())._wandb_init["mode"] == "offline"
    (told,) = [record.getMessage() for record in caplog.records]
    assert "stand-in: 401; `wandb login --relogin` stores another key" in told


def test_online_means_online(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The user who asks for it is told at once; a run without W&B is not what was asked for."""
    with WandbServer(401) as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        with pytest.raises(UserError, match=r"mode=online but .*stand-in: 401.*wandb login --relogin"):
            loggers.wandb_logger(**settings(mode="online"))
    loggers.stop_service()
    with WandbServer(404, after="Viewer") as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        logger = loggers.wandb_logger(**settings(mode="online", run_dir=str(tmp_path)))
        with pytest.raises(UserError, match=r"mode=online but W&B fails .*stand-in: 404"):
            _ = logger.experiment
