"""Sweeps inside a test, as `python train.py -m ...` would run them, with a stand-in for the training."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig
from sweeps.test_runs import make_run

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


@pytest.fixture
def policies(tmp_path: Path) -> Path:
    """Two policies at three learning rates, three seeds each; the highest of one failed."""
    folder = tmp_path / "sweep"
    for policy in ("lora", "full"):
        for place, lr in enumerate((0.001, 0.01, 0.1)):
            for seed in range(3):
                lost = policy == "full" and lr == 0.1
                val = None if lost else 0.9 + 0.02 * place - 0.01 * seed + 0.005 * (policy == "lora")
                run = make_run(
                    folder / f"{policy}{lr}_{seed}",
                    f"freeze={policy} optim.lr={lr} seed={seed}",
                    val,
                    status="failed" if lost else None,
                    test=0.95 if (policy, lr, seed) == ("lora", 0.1, 0) else None,
                    params=100 if policy == "lora" else 1000,
                    seed=seed,
                    optim__lr=lr,
                    freeze__rules=[{"match": policy, "train": True}],
                )
                (run / "csv").mkdir()
                rows = "epoch,step,train/acc,val/acc\n0,9,,0.5\n0,9,0.4,\n1,19,,0.75\n1,29,,0.8\n2,30,,0.8\n"
                (run / "csv" / "metrics.csv").write_text(rows)
    return folder
