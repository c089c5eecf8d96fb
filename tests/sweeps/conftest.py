"""Sweeps inside a test, as `python train.py -m ...` would run them, with a stand-in for the training."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig

from thaw.run.files import write_json


class Trained(list):
    """The configurations that were trained; `fails` returns an exception for those that fail."""

    fails: Callable[[DictConfig], BaseException | None] = staticmethod(lambda cfg: None)


def summary(cfg: DictConfig, val_acc: float) -> dict[str, Any]:
    facts = {"name": cfg.name, "overrides": cfg.overrides, "seed": cfg.seed, "run_dir": cfg.run_dir, "seconds": 1.0}
    facts |= {"val/acc": val_acc, "test/acc": None, "test/acc_low": None, "test/acc_high": None, "n_test": None}
    return facts | {"trainable_params": 10, "total_params": 100, "epochs": 1, "git_commit": "0", "resumed_from": None}


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> Trained:
    """Replaces `train.train`: accuracy is highest at a learning rate of 0.01."""
    import train as script

    done = Trained()

    def train(cfg: DictConfig) -> float:
        cfg.run_dir, cfg.overrides = cfg.run_dir, cfg.overrides  # what only the running job knows
        done.append(cfg.copy())
        if (error := done.fails(cfg)) is not None:
            raise error
        val_acc = 1 - abs(cfg.optim.lr - 0.01)
        write_json(summary(cfg, val_acc), Path(cfg.run_dir) / "summary.json")
        return val_acc

    monkeypatch.setattr(script, "train", train)
    return done


@pytest.fixture
def sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trained: Trained) -> Callable[..., int]:
    """Run `train.py -m <overrides>` in this process in a folder of the test's own; returns the exit status."""
    import train as script
    from thaw.run.command import clear_errors

    monkeypatch.chdir(ROOT)

    def run(*overrides: str, configs: Path = ROOT / "configs") -> int:
        program = [str(ROOT / "train.py"), "--config-path", str(configs), "-m", "test=false", "logger=none"]
        folder = [f"hydra.sweep.dir={tmp_path / 'sweep'}"]
        given = any(override.startswith("hydra.sweep.dir") for override in overrides)
        monkeypatch.setattr(sys, "argv", [*program, *([] if given else folder), *overrides])
        GlobalHydra.instance().clear()
        try:
            with clear_errors():
                script.main()
        except SystemExit as end:
            return int(end.code or 0)
        return 0

    return run
