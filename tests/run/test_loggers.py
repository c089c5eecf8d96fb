"""W&B runs online or offline by what is configured and reachable; it never asks and never waits."""

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import wandb
from hydra.utils import instantiate
from omegaconf import OmegaConf

from thaw.run import loggers
from thaw.run.errors import UserError
from thaw.run.values import check_types


@pytest.fixture(autouse=True)
def no_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """No key, mode or server of the machine that runs the tests."""
    wandb.teardown()  # it remembers its settings for the whole process
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    yield
    wandb.teardown()


def settings(**changed: object) -> dict:
    names = {"project": "p", "entity": None, "group": None, "name": "n", "tags": ["t"], "job_type": "train"}
    kept = {"log_model": False, "save_code": True, "run_dir": "/x/sweep/0", "id": None, "finish_timeout": 60}
    return names | {"mode": "auto"} | kept | changed


def test_offline_without_a_key() -> None:
    assert loggers.why_offline() == loggers.NO_KEY
    logger = loggers.wandb_logger(**settings())
    assert logger._wandb_init["mode"] == "offline"
    assert logger._wandb_init["group"] == "sweep"  # the folder above the run's
    assert "WANDB_MODE" not in os.environ  # which would decide for the next job of a sweep too


def test_a_key_in_netrc_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password " + "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    assert "127.0.0.1:9 does not answer" in str(loggers.why_offline())


def test_the_users_mode_counts(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """And is not worth a warning."""
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr(socket, "create_connection", lambda *args, **kwargs: pytest.fail("connects"))
    assert loggers.wandb_logger(**settings())._wandb_init["mode"] == "offline"
    assert not caplog.records


def test_offline_asks_no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """A key is configured, so that `auto` would ask."""
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setattr(socket, "create_connection", lambda *args, **kwargs: pytest.fail("connects"))
    assert loggers.wandb_logger(**settings(mode="offline"))._wandb_init["mode"] == "offline"


@pytest.mark.parametrize(("mode", "variable"), [("auto", "disabled"), ("disabled", "online"), ("disabled", None)])
def test_disabled_writes_nothing(
    mode: str, variable: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if variable:
        monkeypatch.setenv("WANDB_MODE", variable)
    picture = tmp_path / "picture.png"
    logger = loggers.wandb_logger(**settings(mode=mode, run_dir=str(tmp_path / "run"), id="abc"))
    quiet = {"accelerator": "cpu", "enable_checkpointing": False, "default_root_dir": str(tmp_path)}
    trainer = instantiate({"_target_": "lightning.Trainer", **quiet}, logger=[logger])  # as a run does
    for one in trainer.loggers:
        one.log_metrics({"x": 1.0}, step=1)
        one.log_hyperparams({"x": 1.0})
    loggers.log_image(trainer.loggers, "picture", picture)
    loggers.add_to_summary(trainer.loggers, {"seconds": 1.0})
    assert not loggers.where_to_look(trainer.loggers)
    loggers.finish(trainer.loggers)
    assert list(tmp_path.iterdir()) == []


def test_wrong_modes() -> None:
    block = OmegaConf.create(settings(mode="on") | {"_target_": "thaw.run.loggers.wandb_logger"})
    with pytest.raises(ValueError, match="mode='on' must be auto, online, offline or disabled"):
        check_types(block)
    with pytest.raises(ValueError, match="wandb login"):
        loggers.wandb_logger(**settings(mode="online"))


def test_a_finished_run_is_not_written_on(tmp_path: Path) -> None:
    """Two jobs in one process are two W&B runs."""
    ids = []
    for job in ("0", "1"):
        logger = loggers.wandb_logger(**settings(run_dir=str(tmp_path / job)))
        ids.append(logger.experiment.id)
        logger.log_metrics({"x": 1.0})
        assert "wandb sync" in str(loggers.where_to_look([logger]))
        loggers.finish([logger])
    assert ids[0] != ids[1]
    for job, run in zip(("0", "1"), ids, strict=True):
        assert list((tmp_path / job / "wandb").glob(f"offline-run-*-{run}/*.wandb"))


def test_what_wandb_refuses_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"logger\.wandb cannot start a run: Invalid project name 'a/b'"):
        _ = loggers.wandb_logger(**settings(project="a/b", mode="offline", run_dir=str(tmp_path))).experiment
    wandb.teardown()
    monkeypatch.setenv("WANDB_SILENT", "")
    with pytest.raises(UserError, match=r"W&B refuses the environment: WANDB_SILENT='' \(.*\)\. Unset it"):
        loggers.wandb_logger(**settings())
