"""A grid is checked before its first job, runs what is not done, and tells by its exit status."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from sweeps.conftest import Trained

Sweep = Callable[..., int]


def rates(trained: Trained) -> list[float]:
    return [cfg.optim.lr for cfg in trained]


def test_every_combination_once(sweep: Sweep, trained: Trained, tmp_path: Path) -> None:
    assert sweep("optim.lr=0.01,0.1", "seed=0,1") == 0
    assert [(cfg.optim.lr, cfg.seed) for cfg in trained] == [(0.01, 0), (0.01, 1), (0.1, 0), (0.1, 1)]
    assert len({cfg.run_dir for cfg in trained}) == 4
    assert all(Path(cfg.run_dir).parent == tmp_path / "sweep" for cfg in trained)
    assert not any(cfg.validate or cfg.test for cfg in trained)


def test_the_same_command_runs_only_what_failed(sweep: Sweep, trained: Trained, capsys) -> None:
    trained.fails = lambda cfg: RuntimeError("out of luck") if cfg.optim.lr == 0.1 else None
    assert sweep("optim.lr=0.01,0.1,0.2") == 1
    assert rates(trained) == [0.01, 0.1, 0.2]  # the failure ended its own job only
    assert "out of luck" in capsys.readouterr().err
    failure = json.loads((Path(trained[1].run_dir) / "failure.json").read_text())
    assert failure["reason"] == "out of luck"
    trained.fails = lambda cfg: None
    assert sweep("optim.lr=0.01,0.1,0.2") == 0
    assert rates(trained) == [0.01, 0.1, 0.2, 0.1]
    assert "2 done already, 1 failed: they are tried again" in capsys.readouterr().out
    assert sweep("optim.lr=0.01,0.1,0.2") == 0
    assert len(trained) == 4


def test_an_interrupted_sweep_goes_on(sweep: Sweep, trained: Trained) -> None:
    trained.fails = lambda cfg: KeyboardInterrupt() if cfg.optim.lr == 0.1 else None
    assert sweep("optim.lr=0.01,0.1,0.2") == 130
    trained.fails = lambda cfg: None
    assert sweep("optim.lr=0.01,0.1,0.2") == 0
    assert rates(trained) == [0.01, 0.1, 0.1, 0.2]


def test_a_wider_grid_takes_the_jobs_that_are_done(sweep: Sweep, trained: Trained) -> None:
    sweep("optim.lr=0.01,0.1")
    assert sweep("optim.lr=0.01,0.1,0.2") == 0
    assert rates(trained) == [0.01, 0.1, 0.2]


def test_the_same_command_has_the_same_folder(sweep: Sweep, trained: Trained, tmp_path: Path) -> None:
    """Whatever the order of what was typed."""
    named = f"hydra.sweep.dir={tmp_path}/${{sweep_key:}}"
    assert sweep(named, "optim.lr=0.01,0.1", "seed=1") == 0
    assert sweep("seed=1", "optim.lr=0.01,0.1", named) == 0
    assert sweep("seed=2", "optim.lr=0.01,0.1", named) == 0
    assert len(trained) == 4
    assert len(list(tmp_path.glob("train_*"))) == 2


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.lr=0.01,fast", "optim.lr='fast' must be of type float"),
        ("trainer.max_epochs=1,2.5", "trainer.max_epochs=2.5 must be of type"),
        ("optim.lr=0.01,1e-2", "the same job 2 times"),
        ("optim.lr=range(2,1)", "gives no value at all"),
        ("optim.rate=0.1,0.2", "optim.rate"),
        ("seed=0,1 trainer=cpu,gpu", "torch sees no GPU"),
        ("hydra/launcher=nowhere seed=0,1", "nowhere"),
        ("hydra.launcher._target_=hydra_plugins.missing.Launcher seed=0,1", "is not installed"),
        ("hydra/launcher=queue hydra.launcher.threads=0 seed=0,1", "hydra.launcher.threads=0 must be"),
    ],
)
def test_nothing_starts_when_a_job_could_not(
    override: str, message: str, sweep: Sweep, trained: Trained, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert sweep(*override.split()) == 1
    assert message in capsys.readouterr().err
    assert not trained
    assert not (tmp_path / "sweep").exists()
