"""A grid is checked before its first job, runs the jobs that are not done, and exits with 1 if one has failed."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from filelock import FileLock
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf
from sweeps.conftest import Trained

from thaw.run.ranks import run_command
from thaw.sweeps.grid import Job, report_sweep, share_steps
from thaw.sweeps.run_table import read_run_table

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
    assert failure["reason"] == "RuntimeError: out of luck"
    trained.fails = lambda cfg: None
    assert sweep("optim.lr=0.01,0.1,0.2") == 0
    assert rates(trained) == [0.01, 0.1, 0.2, 0.1]
    assert "2 done already, 1 failed: they are retried" in capsys.readouterr().out
    assert sweep("optim.lr=0.01,0.1,0.2") == 0
    assert len(trained) == 4


def test_folds_are_one_setting_with_mean_and_spread(sweep: Sweep, trained: Trained, capsys, tmp_path: Path) -> None:
    """Also where some folds are not typed, or not done."""
    trained.fails = lambda cfg: RuntimeError("no luck") if (cfg.optim.lr, cfg.data.fold) == (0.1, 1) else None
    assert sweep("data.source=sample", "data.fold=0,1", "data.folds=3", "optim.lr=0.01,0.1") == 1
    groups = read_run_table([tmp_path / "sweep"]).groups
    found = [(group.label, group.val and group.val[2], group.mark) for group in groups]
    assert found == [("optim.lr=0.01", 2, "best"), ("optim.lr=0.1", 1, "")]
    said = capsys.readouterr().out
    assert "2 of 3 folds" in said and "1 of 3 folds" in said and "optim.lr=0.1 data.fold=1 seed=0" in said
    assert "± is the sample standard deviation over n folds." in " ".join(said.split())


def test_an_interrupted_sweep_counts_all_its_jobs_and_goes_on(sweep: Sweep, trained: Trained, capsys) -> None:
    trained.fails = lambda cfg: KeyboardInterrupt() if cfg.optim.lr == 0.1 else None
    assert sweep("optim.lr=0.01,0.1,0.2") == 130
    said = capsys.readouterr()
    assert "job 2 of 3, about " in said.out and "job 3 of 3" not in said.out
    assert "3 runs of 3 settings: 1 done, 1 interrupted, 1 waiting." in said.out
    assert "not done: 2 of 3 jobs. To resume, run the same command again:\n  " in said.err
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


def test_an_edit_reaches_no_job_that_was_checked(sweep: Sweep, trained: Trained, tmp_path: Path) -> None:
    """Although Hydra composes each job again when it starts."""
    configs = tmp_path / "configs"
    shutil.copytree(ROOT / "configs", configs)

    def edit(cfg: DictConfig) -> None:
        adamw = configs / "optim" / "adamw.yaml"
        adamw.write_text(adamw.read_text().replace("weight_decay: 0.05", "weight_decay: 0.5"))

    trained.fails = edit
    assert sweep("seed=0,1,2", configs=configs) == 0
    assert [cfg.optim.weight_decay for cfg in trained] == [0.05] * 3
    assert [cfg.seed for cfg in trained] == [0, 1, 2]


@pytest.mark.parametrize("leaving", [SystemExit(0), SystemExit("enough"), MemoryError()])
def test_a_job_that_leaves_the_program_ends_itself_only(leaving, sweep: Sweep, trained: Trained) -> None:
    trained.fails = lambda cfg: leaving if cfg.seed == 1 else None
    assert sweep("seed=0,1,2") == 1
    assert [cfg.seed for cfg in trained] == [0, 1, 2]
    failure = json.loads((Path(trained[1].run_dir) / "failure.json").read_text())
    assert failure["reason"].startswith(type(leaving).__name__)


def test_a_job_that_runs_elsewhere_is_left_alone(sweep: Sweep, trained: Trained, capsys) -> None:
    sweep("seed=0,1")
    (Path(trained[0].run_dir) / "summary.json").unlink()
    with FileLock(Path(trained[0].run_dir) / "job.lock"):
        assert sweep("seed=0,1,2") == 1
    assert [cfg.seed for cfg in trained] == [0, 1, 2]
    assert "1 done already, 1 running in another process, 1 to be run" in capsys.readouterr().out


def test_a_winner_that_cannot_be_tested_hides_no_report(sweep: Sweep, trained: Trained, capsys) -> None:
    assert sweep("test=true", "seed=0,1") == 1  # the stand-in has written no checkpoint
    printed = capsys.readouterr()
    assert "cannot be tested" in printed.err and "does not exist" in printed.err
    assert "2 runs of 1 setting: 2 done" in printed.out


@pytest.mark.parametrize("name", ["it's", "a b", "x=(y),z", "[c]"])
def test_any_folder(name: str, sweep: Sweep, trained: Trained, tmp_path: Path) -> None:
    quoted = str(tmp_path / name).replace("'", "\\'")
    assert sweep(f"hydra.sweep.dir='{quoted}'", "seed=0,1") == 0
    assert {Path(cfg.run_dir).parent for cfg in trained} == {tmp_path / name}
    parser = OverridesParser.create()
    (override,) = (part for part in run_command(tmp_path / name, "job") if part.startswith("hydra.run.dir"))
    assert parser.parse_override(override).value() == str(tmp_path / name)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.lr=0.01,fast", "optim.lr='fast' must be a number above 0"),
        ("trainer.max_epochs=1,2.5", "trainer.max_epochs=2.5 must be a whole number or null"),
        ("optim.lr=0.01,1e-2", "the same job 2 times"),
        ("optim.lr=range(2,1)", "gives no value at all"),
        ("optim.rate=0.1,0.2", "optim.rate"),
        ("optim.lr=interval(0.1,1)", "is a range, but a grid needs values"),
        ("data.fold=4,5 data.source=sample", "data.fold=5 but data.folds=5: folds count from 0 to 4"),
        ("data.fold=0,1 data.folds=1", "data.folds=1 must be a whole number, 2 or more"),
        ("data.fold=-1,0", "data.fold=-1 must be a whole number, 0 or more, or null"),
        ("data.fold=0,1 data.folds=451 data.source=sample", "needs 451 different images of each class to train"),
        (
            "data.fold=0 data.folds=450 seed=0,1 data.train_size=64 data.source=sample",
            "2 seeds x data.folds=450 are more than the 74 images of MNIST",
        ),
        ("name=??? seed=0,1", "name must be given a value"),
        ("+callbacks.mine={_target_:nowhere.Mine} seed=0,1", "callbacks.mine._target_=nowhere.Mine cannot be imported"),
        ("seed=0,1 trainer=cpu,gpu", "torch sees no GPU"),
        ("hydra/launcher=nowhere seed=0,1", "nowhere"),
        ("hydra.launcher._target_=hydra_plugins.missing.Launcher seed=0,1", "is not installed"),
        (
            "hydra/launcher=queue hydra.launcher.threads=0 hydra.launcher.minutes=-1 seed=0,1",
            "threads=0 must be a whole number, 1 or more. hydra.launcher.minutes=-1 must be a number above 0 or null.",
        ),
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


def test_submitit_opens_without_a_warning_of_hydra(sweep: Sweep, recwarn: pytest.WarningsRecorder) -> None:
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher", exc_type=ImportError)
    assert sweep("hydra/launcher=submitit_local", "optim.lr=fast,slow") == 1
    assert not [warning for warning in recwarn if "ConfigStore" in str(warning.message)]


@pytest.mark.parametrize(("wanted", "count"), [("always", 2), (True, 1), (False, 0)])
def test_jobs_say_whether_all_are_tested(
    wanted: str | bool, count: int, sweep: Sweep, trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An experiment may set `test` for its own jobs."""
    assert sweep("optim.lr=0.01,0.1") == 0
    tested: list[Path] = []
    monkeypatch.setattr("thaw.evaluation.evaluate.test_run", lambda folder, *_: tested.append(folder))
    jobs = [Job((), OmegaConf.create({"test": wanted, "cache": {}}), Path(cfg.run_dir)) for cfg in trained]
    assert report_sweep(jobs, tmp_path / "sweep") == 0
    assert tested == [Path(cfg.run_dir) for cfg in trained][:count]


def test_rates_that_are_no_numbers_share_no_steps() -> None:
    """Those of a recipe of your own may be missing, or lists."""
    optims: list[Any] = [None, {}, {"lr": [1e-3, 1e-2], "weight_decay": 0.0}]
    optims += [{"lr": 1e-3, "weight_decay": 0.0}, {"lr": 1, "weight_decay": 0}]
    cfgs = [OmegaConf.create({"optim": optim, "run_dir": "", "overrides": ""}) for optim in optims]
    (bank,) = share_steps([Job((), cfg, Path(str(number))) for number, cfg in enumerate(cfgs)])
    assert bank.settings == [(1e-3, 0.0), (1, 0)]
