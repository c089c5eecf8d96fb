"""Searches with Optuna. Most train nothing: a function of the learning rate writes the summary of a run."""

import itertools
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
from conftest import ROOT
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, open_dict
from optuna.distributions import FloatDistribution
from optuna.trial import FrozenTrial, TrialState
from processes import FORKED, Forked

from thaw.run.files import read_json, write_json
from thaw.sweeps import search as searches
from thaw.sweeps import study as studies

CHEAP = ["logger=none", "test=false", "sweep/pruner=none"]
LR_SPACE = {
    "optim.lr": FloatDistribution(1e-4, 1.0, log=True),
    "optim.weight_decay": FloatDistribution(1e-5, 0.3, log=True),
}
Run = Callable[..., list[FrozenTrial]]


def accuracy(lr: float, weight_decay: float) -> float:
    return 0.99 - 0.02 * (math.log10(lr) + 2) ** 2 - 0.001 * (math.log10(weight_decay + 1e-6) + 3) ** 2


class Fake:
    """A stand-in for training that records its runs."""

    def __init__(self, end: Callable[[int, DictConfig, Sequence[Any]], None] = lambda *_: None) -> None:
        self.end, self.runs = end, []  # type: ignore[var-annotated]

    def __call__(self, cfg: DictConfig, callbacks: Sequence[Any] = ()) -> float:
        self.runs.append(Path(cfg.run_dir).name)
        self.end(len(self.runs) - 1, cfg, callbacks)
        facts = {"name": cfg.name, "overrides": cfg.overrides, "seed": cfg.seed, "run_dir": cfg.run_dir, "epochs": 1}
        value = accuracy(cfg.optim.lr, cfg.optim.weight_decay)
        params = 10 * len(cfg.freeze.rules)
        write_json(
            {**facts, "val/acc": value, "test/acc": None, "trainable_params": params, "seconds": 0.1},
            Path(cfg.run_dir) / "summary.json",
        )
        return value


def compose_sweep(folder: Path, overrides: Sequence[str]) -> DictConfig:
    cfg = compose("sweep", list(overrides), return_hydra_config=True)
    HydraConfig.instance().set_config(cfg)
    with open_dict(cfg):
        del cfg["hydra"]
    cfg.run_dir = str(folder)
    return cfg


@pytest.fixture(autouse=True)
def configs(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(ROOT)
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        yield


@pytest.fixture
def sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """`python sweep.py <overrides>`; returns the trials of the study."""

    def run(
        *overrides: str,
        train: Any = None,
        folder: str = "study",
        cheap: Sequence[str] = CHEAP,
        report: bool = False,
    ) -> list[FrozenTrial]:
        typed = [*cheap, *overrides]
        if not report:
            monkeypatch.setattr("thaw.sweeps.search.report_runs", lambda *_, **__: None)
        cfg = compose_sweep(tmp_path / folder, typed)
        try:
            searches.search(cfg, typed, train or Fake())
        finally:
            run.study = study = stored(cfg)  # type: ignore[attr-defined]
        return study.get_trials() if study else []

    return run


def stored(cfg: DictConfig) -> optuna.Study | None:
    path = Path(cfg.sweep.storage)
    if not path.is_file():
        return None
    return optuna.load_study(study_name=f"{cfg.name}_{cfg.sweep.study}", storage=studies.open_storage(path))


def draw(seed: int, place: int) -> int:
    return int(np.random.SeedSequence([seed, place]).generate_state(1)[0])


SAMPLERS: dict[str, Callable[[int], optuna.samplers.BaseSampler]] = {
    "lr_tpe": lambda seed: optuna.samplers.TPESampler(seed=seed, n_startup_trials=3, multivariate=True),
    "lr_random": lambda seed: optuna.samplers.RandomSampler(seed=seed),
    "lr_cmaes": lambda seed: optuna.samplers.CmaEsSampler(seed=seed, with_margin=True),
}


@pytest.mark.parametrize("name", SAMPLERS)
def test_draws_what_optuna_draws(name: str, sweep: Run) -> None:
    extra = ["sweep.sampler.n_startup_trials=3"] if name == "lr_tpe" else []
    ours = [trial.params for trial in sweep(f"sweep={name}", "sweep.trials=6", "seed=5", *extra)]
    study = optuna.create_study(direction="maximize")
    for place in range(6):
        study.sampler = SAMPLERS[name](draw(5, place))
        trial = study.ask(LR_SPACE)  # type: ignore[arg-type]
        study.tell(trial, accuracy(trial.params["optim.lr"], trial.params["optim.weight_decay"]))
    assert ours == [trial.params for trial in study.trials]
    assert len({params["optim.lr"] for params in ours}) == 6


def test_grid_is_optunas_and_complete(sweep: Run) -> None:
    small = ["sweep=lr_grid", "sweep.space.optim.lr.choices=[1e-3,1e-2]", "sweep.space.optim.weight_decay=null"]
    train = Fake()
    trials = sweep(*small, "++sweep.space.freeze.k={low: 1, high: 5, step: 2}", "freeze=last_blocks", train=train)
    grid = {"optim.lr": [1e-3, 1e-2], "freeze.k": [1, 3, 5]}
    study = optuna.create_study(sampler=optuna.samplers.GridSampler(grid, seed=0))

    def objective(trial: optuna.Trial) -> float:
        return trial.suggest_categorical("optim.lr", grid["optim.lr"]) * trial.suggest_int("freeze.k", 1, 5, step=2)

    study.optimize(objective)
    ours = [(trial.params["optim.lr"], trial.params["freeze.k"]) for trial in trials]
    assert ours == [(trial.params["optim.lr"], trial.params["freeze.k"]) for trial in study.trials]
    assert sorted(ours) == sorted(itertools.product(grid["optim.lr"], grid["freeze.k"]))
    assert len(set(train.runs)) == 6


def test_an_interrupted_study_goes_on_as_if_it_had_not_been(sweep: Run) -> None:
    """Ctrl-C in the third trial: its run starts again in the same folder, and later draws are the same."""
    whole = sweep("sweep.trials=4", "sweep.sampler.n_startup_trials=2", folder="whole")
    first = Fake(lambda place, *_: interrupt() if place == 2 else None)
    with pytest.raises(SystemExit, match="130"):
        sweep("sweep.trials=4", "sweep.sampler.n_startup_trials=2", train=first)
    second = Fake()
    trials = sweep("sweep.trials=4", "sweep.sampler.n_startup_trials=2", train=second)
    assert second.runs[0] == first.runs[2]
    assert len(second.runs) == 2
    complete = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    assert [trial.params for trial in complete] == [trial.params for trial in whole]
    assert [trial.state for trial in trials].count(TrialState.FAIL) == 1


def interrupt() -> None:
    raise KeyboardInterrupt


def test_what_was_reported_before_stays(sweep: Run) -> None:
    def report(place: int, cfg: DictConfig, callbacks: Sequence[Any]) -> None:
        for epoch in (1, 2, 3)[place : place + 2]:
            callbacks[0]._trial.report(0.1 * epoch, epoch)
        if place == 0:
            interrupt()

    train = Fake(report)
    with pytest.raises(SystemExit, match="130"):
        sweep("sweep.trials=1", train=train)
    trials = sweep("sweep.trials=1", train=train)
    assert trials[-1].intermediate_values == pytest.approx({1: 0.1, 2: 0.2, 3: 0.3})


def test_only_what_is_missing_runs(sweep: Run) -> None:
    train = Fake()
    for trials, runs in [(2, 2), (2, 2), (4, 4)]:
        found = sweep(f"sweep.trials={trials}", train=train)
        assert len(found) == len(train.runs) == len(set(train.runs)) == runs


def test_a_failed_trial_ends_nothing_and_is_tried_again(sweep: Run, tmp_path: Path) -> None:
    def fail(place: int, *_: Any) -> None:
        if place == 1:
            raise ValueError("out of luck")

    train = Fake(fail)
    with pytest.raises(SystemExit):
        sweep("sweep.trials=3", train=train)
    failure = read_json(tmp_path / "study" / train.runs[1] / "failure.json")
    assert (failure["status"], failure["reason"]) == ("failed", "ValueError: out of luck")
    trials = sweep("sweep.trials=3", train=train)
    assert len(train.runs) == 4
    assert train.runs[3] == train.runs[1]
    assert [trial.state.name for trial in trials] == ["COMPLETE", "FAIL", "COMPLETE", "COMPLETE"]
    assert not (tmp_path / "study" / train.runs[1] / "failure.json").exists()


def test_the_same_parameters_are_trained_once(sweep: Run) -> None:
    train = Fake()
    one = ["~sweep.space.optim.lr", "+sweep.space.optim.lr={choices: [0.01]}", "sweep.space.optim.weight_decay=null"]
    trials = sweep("sweep=lr_random", *one, "sweep.trials=3", train=train)
    assert len(train.runs) == 1
    assert [trial.values for trial in trials] == [trials[0].values] * 3


def test_pruned_is_not_failed(sweep: Run, tmp_path: Path) -> None:
    def prune(place: int, cfg: DictConfig, callbacks: Sequence[Any]) -> None:
        callbacks[0]._trial.report(0.5 if place else 0.9, 0)
        if callbacks[0]._trial.should_prune():
            raise optuna.TrialPruned("worse than others")

    train = Fake(prune)
    cheap = ["logger=none", "test=false", "sweep.pruner.n_startup_trials=1", "sweep.pruner.n_min_trials=1"]
    trials = sweep("sweep.trials=3", "sweep.pruner.n_warmup_steps=0", train=train, cheap=cheap, report=True)
    assert [trial.state.name for trial in trials] == ["COMPLETE", "PRUNED", "PRUNED"]
    assert read_json(tmp_path / "study" / train.runs[1] / "failure.json")["status"] == "pruned"
    assert "pruned" in (tmp_path / "study" / "report" / "report.csv").read_text()


def test_several_objectives(sweep: Run, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Values in the order of the objectives, each in its direction; the front is optuna's."""
    name = "sweep=accuracy_vs_parameters"
    trials = sweep(name, "sweep.trials=6", "sweep.space.freeze.choices=[linear_probe,last_blocks]", report=True)
    study = sweep.study  # type: ignore[attr-defined]
    assert [direction.name for direction in study.directions] == ["MAXIMIZE", "MINIMIZE"]
    rules = {"linear_probe": 20, "last_blocks": 30}
    decay = compose("train").optim.weight_decay
    for trial in trials:
        params = trial.params
        assert trial.values == pytest.approx([accuracy(params["optim.lr"], decay), rules[params["freeze"]]])
    said = capsys.readouterr().out
    assert "trial 6 of 6: done, val/acc " in said and ", trainable_params " in said
    table, _, where = said.partition("The Pareto front:")
    assert table.count("\nPareto  ") == len(study.best_trials)
    assert all(f"/{trial.user_attrs['folder']}\n" in where for trial in study.best_trials)
    page = (tmp_path / "study" / "report" / "report.html").read_text()
    for title in ("Optimisation history of val/acc", "Importance for val/acc", "val/acc against trainable_params"):
        assert title in page


def test_the_journal_of_a_killed_worker_is_free(tmp_path: Path) -> None:
    """A killed worker leaves Optuna's own lock behind; a new worker would wait half a minute for it."""
    journal = tmp_path / "study.journal"
    program = (
        "import os, signal, sys; from pathlib import Path; from filelock import FileLock;"
        "path = Path(sys.argv[1]); lock = FileLock(path.with_suffix('.journal.flock')); lock.acquire();"
        "os.symlink(path, f'{path}.lock'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", program, str(journal)])
    assert (tmp_path / "study.journal.lock").is_symlink() and (tmp_path / "study.journal.flock").exists()
    started = time.monotonic()
    studies.open_study(journal, "one", {"val/acc": "maximize"}, {})
    assert time.monotonic() - started < 5


def test_a_journal(sweep: Run, tmp_path: Path) -> None:
    journal = f"sweep.storage={tmp_path}/both.journal"
    train = Fake()
    sweep("sweep.trials=2", journal, train=train)
    assert len(sweep("sweep.trials=3", journal, train=train)) == len(train.runs) == 3
    assert len(sweep("sweep.trials=2", journal, "sweep=lr_random", folder="other")) == 2  # another study in it


def test_another_worker_takes_another_trial(sweep: Run, tmp_path: Path) -> None:
    """A second worker asks during a trial: that trial stays with its living worker, and none is one too many."""
    asked = []

    def ask(place: int, cfg: DictConfig, callbacks: Sequence[Any]) -> None:
        typed = [*CHEAP, "sweep.trials=3"]
        plan = searches.prepare(compose_sweep(tmp_path / "study", typed), typed, Fake())
        study = stored(plan.cfg)
        assert study
        if place == 0:
            asked.append(searches.next_trial(plan, study))
        else:
            asked.append(None)
            assert searches.next_trial(plan, study) is None

    train = Fake(ask)
    trials = sweep("sweep.trials=3", train=train)
    assert asked[0] is not None
    assert asked[0][0].number == 1
    assert [trial.state.name for trial in trials] == ["COMPLETE", "RUNNING", "COMPLETE"]
    asked[0][1].release()  # its worker dies
    trials = sweep("sweep.trials=3", train=Fake())
    assert [trial.state.name for trial in trials] == ["COMPLETE", "FAIL", "COMPLETE", "COMPLETE"]
    assert trials[3].params == trials[1].params


BAD = {
    "no such key": (["+sweep.space.optim.rate={low: 1, high: 2}"], r"optim\.rate=1.*optim\.rate is not a setting"),
    "no such option": (["+sweep.space.freeze={choices: [nope]}"], "freeze=nope.*freeze=nope does not exist"),
    "low above high": (["sweep.space.optim.lr.low=2"], r"optim\.lr: low=2 must be less than high=1"),
    "log of zero": (["sweep.space.optim.lr.low=0"], "must be more than 0, as log is true"),
    "no number": (["sweep.space.optim.lr.low=small"], "low='small' must be a number"),
    "no high": (["~sweep.space.optim.lr.high"], "has no high"),
    "unknown word": (["+sweep.space.optim.lr.lo=1"], "lo is unknown"),
    "not a range": (["sweep.space.optim.lr=1"], "neither a range nor choices"),
    "no choices": (["+sweep.space.seed={choices: []}"], "must be a list of at least one value"),
    "choices beside a range": (["+sweep.space.optim.lr.choices=[1]"], "high, log, low is unknown"),
    "wrong type": (["+sweep.space.trainer={max_epochs: {choices: [two]}}"], r"max_epochs='two' must be a whole number"),
    "wrong type of a range": (
        ["+sweep.space.data={batch_size: {low: 1.5, high: 8}}"],
        r"batch_size=1\.5 must be a whole number",
    ),
    "changes nothing": (["+sweep.space.overrides={choices: [a, b]}"], "changes nothing in what is trained"),
    "typed and searched": (["optim.lr=1"], "optim.lr=1 was typed, but sweep.space searches it"),
    "unknown sampler": (["sweep.sampler._target_=optuna.samplers.Best"], "is not a sampler; choose .*TPESampler"),
    "not a sampler": (["sweep.sampler._target_=optuna.pruners.NopPruner"], "is not a sampler"),
    "unknown sampler file": (["sweep/sampler=best"], "Could not find 'sweep/sampler/best'"),
    "one number for CMA-ES": (["sweep=lr_cmaes", "sweep.space.optim.weight_decay=null"], "two or more numbers"),
    "CMA-ES for two": (["sweep/sampler=cmaes", "sweep.objectives=[val/acc,seconds]"], "cannot draw.*multi-objective"),
    "grid without end": (["sweep/sampler=grid"], "optim.lr has no end of values"),
    "unknown objective": (["sweep.objectives=[f1]"], "f1 is not an objective; choose from val/acc"),
    "chosen by test": (["sweep.objectives=[test/acc]"], "test/acc is not an objective"),
    "no objective": (["sweep.objectives=[]"], "must be a list of different metrics"),
    "pruning for two": (["sweep/pruner=median", "sweep.objectives=[val/acc,seconds]"], "choose sweep/pruner=none"),
    "resume": (["resume=last"], "resume=last continues one run"),
    "storage": (["sweep.storage=a.txt"], r"must end in \.db"),
    "devices": (["trainer=gpu", "trainer.devices=64"], "torch sees"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input(what: str, sweep: Run) -> None:
    overrides, message = BAD[what]
    train = Fake()
    with pytest.raises(Exception, match=f"(?s){message}"):
        sweep(*overrides, train=train)
    assert not train.runs


OTHERS = {
    "space": ["sweep.space.optim.lr.high=0.5"],
    "run": ["data.batch_size=7"],
    "objectives": ["sweep.objectives=[val/acc,seconds]"],
}


@pytest.mark.parametrize("what", OTHERS)
def test_a_study_of_another_search(what: str, sweep: Run) -> None:
    sweep("sweep.trials=1")
    train = Fake()
    with pytest.raises(ValueError, match=f"of another search: its {what} is .* Choose a name"):
        sweep("sweep.trials=2", *OTHERS[what], train=train)
    assert not train.runs


def test_a_file_that_is_no_storage(sweep: Run, tmp_path: Path) -> None:
    (tmp_path / "notes.db").write_text("no database " * 1000)
    with pytest.raises(ValueError, match=r"notes\.db cannot be read as a storage of Optuna"):
        studies.open_storage(tmp_path / "notes.db")


def test_without_optuna(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sweep as script

    monkeypatch.delitem(sys.modules, "thaw.sweeps.search")
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ValueError, match=r"sweep\.py needs optuna: pip install -e '\.\[search\]'"):
        script.main(compose_sweep(tmp_path, CHEAP))


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "configs" / "sweep").glob("*.yaml")))
def test_shipped_sweeps(name: str, tmp_path: Path) -> None:
    typed = ["experiment=vit_linear_probe", f"sweep={name}"]
    plan = searches.prepare(compose_sweep(tmp_path, typed), typed, Fake())
    assert plan.name == f"vit_linear_probe_{name}"
    header = (ROOT / "configs" / "sweep" / f"{name}.yaml").read_text()
    assert f"sweep={name}\n" in header


@pytest.mark.parametrize("pruner", sorted(path.stem for path in (ROOT / "configs/sweep/pruner").glob("*.yaml")))
def test_shipped_pruners(pruner: str, sweep: Run) -> None:
    assert len(sweep(f"sweep/pruner={pruner}", "sweep.trials=1", cheap=["logger=none", "test=false"])) == 1


def test_nsga2(sweep: Run) -> None:
    sweep("sweep=accuracy_vs_parameters", "sweep/sampler=nsga2", "sweep.sampler.population_size=2", "sweep.trials=4")


def test_real_trials(sweep: Run, tiny_run: list[str], tmp_path: Path) -> None:
    """Two runs of a second; the winner alone is tested."""
    import train as script

    small = [*tiny_run, "trainer.max_epochs=2", f"cache.dir={tmp_path / 'cache'}"]
    trials = sweep("sweep.trials=2", train=script.train, cheap=small, report=True)
    values = [trial.value for trial in trials]
    assert all(list(trial.intermediate_values) == [0, 1] for trial in trials)
    summaries = [read_json(tmp_path / "study" / trial.user_attrs["folder"] / "summary.json") for trial in trials]
    assert [max(trial.intermediate_values.values()) for trial in trials] == pytest.approx(values, abs=1e-6)
    tested = [place for place, summary in enumerate(summaries) if summary["test/acc"] is not None]
    assert tested == [values.index(max(values))]
    again = sweep("sweep.trials=2", train=script.train, cheap=small, folder="again")
    assert [trial.value for trial in again] == values
    assert not list((tmp_path / "study" / ".running").iterdir())


def test_real_pruning(sweep: Run, tiny_run: list[str], tmp_path: Path) -> None:
    import train as script

    bound = ["sweep/pruner=threshold", "sweep.pruner.lower=1.1", "sweep.pruner.n_warmup_steps=1"]
    small = [*tiny_run, "trainer.max_epochs=5", f"cache.dir={tmp_path / 'cache'}"]
    (trial,) = sweep("sweep.trials=1", *bound, train=script.train, cheap=small)
    assert trial.state == TrialState.PRUNED
    assert list(trial.intermediate_values) == [0, 1]


WORKER = """
import os, runpy, sys, time
from pathlib import Path
sys.path[:0] = [{root!r}, {tests!r}]
import train
from sweeps.test_search import Fake

def slow(place, cfg, callbacks):
    with Path({log!r}).open("a") as log:
        log.write(f"{{os.getpid()}} {{cfg.run_dir}}\\n")
    time.sleep({seconds})

train.train = Fake(slow)
runpy.run_path({root!r} + "/sweep.py", run_name="__main__")
"""


def start_worker(tmp_path: Path, name: str, seconds: float, *overrides: str) -> Forked:
    program = tmp_path / f"{name}.py"
    names = {"root": str(ROOT), "tests": str(ROOT / "tests"), "log": str(tmp_path / "log"), "seconds": seconds}
    program.write_text(WORKER.format(**names))
    command = [sys.executable, str(program), *CHEAP, *overrides, f"hydra.run.dir={tmp_path / 'shared'}"]
    return Forked(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"})


@pytest.mark.slow
@pytest.mark.parametrize("storage", [pytest.param("study.db", marks=pytest.mark.long), "study.journal"])
def test_two_workers_share_a_study(storage: str, tmp_path: Path) -> None:
    """Started at the same time, in an empty folder, they run the wanted number of trials together, none twice."""
    where = f"sweep.storage={tmp_path / 'shared' / storage}"
    workers = [start_worker(tmp_path, name, 0.3, "sweep=lr_random", "sweep.trials=6", where) for name in "ab"]
    assert [worker.wait(120) for worker in workers] == [0, 0]
    lines = [line.split() for line in (tmp_path / "log").read_text().splitlines()]
    assert len(lines) == len({run for _, run in lines}) == 6
    assert len({program for program, _ in lines}) == 2


@pytest.mark.long
def test_a_killed_worker(tmp_path: Path) -> None:
    worker = start_worker(tmp_path, "killed", 60, "sweep.trials=2")
    end = time.monotonic() + 60
    while not (tmp_path / "log").is_file() and worker.poll() is None and time.monotonic() < end:
        time.sleep(0.1)
    worker.kill()
    worker.wait()
    assert start_worker(tmp_path, "next", 0, "sweep.trials=2").wait(60) == 0
    runs = [line.split()[1] for line in (tmp_path / "log").read_text().splitlines()]
    assert len(runs) == 3
    assert runs[1] == runs[0] != runs[2]


@pytest.mark.slow
def test_pruning_of_two_processes_hangs_not(
    sweep: Run, tiny_run: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import train as script

    monkeypatch.setattr(sys, "argv", [str(ROOT / "sweep.py")])
    monkeypatch.setattr("thaw.run.ranks.subprocess", FORKED)
    bound = ["sweep/pruner=threshold", "sweep.pruner.lower=1.1"]
    small = [*tiny_run, "trainer=ddp_cpu", "trainer.max_epochs=5", f"cache.dir={tmp_path}", "test=false"]
    trials = sweep("sweep.trials=2", *bound, train=script.train, cheap=small)
    assert [trial.state for trial in trials] == [TrialState.PRUNED] * 2
    failures = [json.loads(path.read_text()) for path in (tmp_path / "study").glob("*/failure.json")]
    assert [failure["status"] for failure in failures] == ["pruned", "pruned"]
