"""A comparison runs its stages in order, resumes to the same numbers, and checks all before its first job."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import compose_run
from sweeps.conftest import Trained

from thaw.plan.speed import Speed
from thaw.run.errors import RunPrunedError, UserError
from thaw.run.files import read_json
from thaw.sweeps.compare import check_arguments, check_names
from thaw.sweeps.compare_policies import Candidates, Work, bind_policies
from thaw.sweeps.compare_time import Costs, Timing, too_long
from thaw.sweeps.compare_tries import CompareSettings, best_try, is_at_edge
from thaw.sweeps.runs import Run

SAMPLE = ["data.source=sample", "data.train_size=64", "logger=none", "test=false"]
Compare = Callable[..., int]


@pytest.fixture
def compare(command: Callable[..., int], tmp_path: Path, trained: Trained, monkeypatch: pytest.MonkeyPatch) -> Compare:
    """Run `compare.py` in a folder of the test's own; training, timing and the answer have stand-ins."""

    def bind(configs: dict[str, Any], device: str) -> Candidates:
        step: Any = SimpleNamespace()
        return Candidates({name: Work(1e6, 1e6, 0.0, 1e6, 0, step) for name in configs})

    monkeypatch.setattr("thaw.sweeps.compare.bind_policies", bind)
    monkeypatch.setattr("thaw.plan.speed.measure_speed", lambda *_: Speed(1.0, 0.01, 1e-9, 1e-9))
    monkeypatch.setattr("thaw.sweeps.compare_answer.report_comparison", lambda folder: None)

    def run(*arguments: str, policies: str = "[linear_probe,full]", folder: str = "compared") -> int:
        place = [f"compare.policies={policies}", f"hydra.sweep.dir={tmp_path / folder}"]
        return command("compare.py", *SAMPLE, *place, *arguments)

    return run


def jobs(trained: Trained) -> list[tuple[str, float, int]]:
    names = {1: "full", 2: "linear_probe"}
    return [(names[len(cfg.freeze.rules)], cfg.optim.lr, cfg.seed) for cfg in trained]


STAGES = [
    *(("linear_probe", 0.01, 0), ("full", 0.0005, 0)),
    *(("linear_probe", 0.03, 0), ("full", 0.0015, 0)),  # higher
    *(("linear_probe", 0.0033, 0), ("full", 0.0045, 0)),  # beyond the better one
    *(("linear_probe", 0.01, 1), ("full", 0.0045, 1)),  # the best ones again
]


def test_stages(compare: Compare, trained: Trained, tmp_path: Path) -> None:
    rates = ["compare.lr.linear_probe=0.01", "compare.lr.full=5e-4"]
    assert compare(*rates) == 0
    assert jobs(trained) == STAGES
    assert not any("compare" in cfg or cfg.callbacks.early_stopping or cfg.validate or cfg.test for cfg in trained)
    probe_run, full_run, _, better_run = (Path(cfg.run_dir).name for cfg in trained[:4])
    references = [cfg.callbacks.pruning.reference for cfg in trained]
    assert references == [None, None, probe_run, full_run, probe_run, better_run, None, None]
    facts = read_json(tmp_path / "compared" / "comparison.json")
    probe, full = facts["policies"]
    assert (probe["lr"], probe["at_edge"], full["lr"], full["at_edge"]) == (0.01, False, 0.0045, True)
    assert probe["runs"] == [probe_run, Path(trained[6].run_dir).name]
    assert [(each["lr"], each["state"], each["val/acc"]) for each in full["tries"]] == [
        *((0.0005, "done", 0.9905), (0.0015, "done", 0.9915), (0.0045, "done", 0.9945)),
    ]
    assert facts["budget"] == {"epochs": 10, "images": 640, "tries": 3, "seeds": 2, "minutes": None}
    assert full["train"][-3:] == ["callbacks.early_stopping=null", "freeze=full", "optim.lr=0.0045"]


@pytest.mark.long
def test_more_seeds_add_to_what_is_done(compare: Compare, trained: Trained) -> None:
    assert compare() == 0
    assert compare() == 0
    assert len(trained) == 8  # nothing runs again
    assert compare("compare.seeds=3") == 0
    assert [seed for *_, seed in jobs(trained)[8:]] == [2, 2]


@pytest.mark.long
def test_a_pruned_or_failed_try_ends_itself_alone(compare: Compare, trained: Trained, tmp_path: Path) -> None:
    bad = {0.0033: RunPrunedError("behind"), 0.03: RuntimeError("infinite")}
    trained.fails = lambda cfg: bad.get(cfg.optim.lr)
    assert compare("compare.lr.linear_probe=0.01", "compare.lr.full=5e-4") == 0
    tries = read_json(tmp_path / "compared" / "comparison.json")["policies"][0]["tries"]
    assert [each["state"] for each in tries] == ["done", "failed", "pruned"]
    count = len(trained)
    assert compare("compare.lr.linear_probe=0.01", "compare.lr.full=5e-4") == 0
    assert [cfg.optim.lr for cfg in trained[count:]] == [0.03]  # what failed is retried, what was pruned is not


@pytest.mark.long
def test_an_interrupted_comparison_comes_to_the_same(
    compare: Compare, trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rates = ["compare.lr.linear_probe=0.01", "compare.lr.full=5e-4"]
    for at in (1, 4, 7):
        trained.clear()
        trained.fails = lambda cfg, at=at: KeyboardInterrupt() if len(trained) == at + 1 else None
        assert compare(*rates, folder=f"at{at}") == 130
        assert "To resume, run the same command again" in capsys.readouterr().err
        trained.fails = lambda cfg: None
        assert compare(*rates, folder=f"at{at}") == 0
        assert jobs(trained) == [*STAGES[: at + 1], *STAGES[at:]]
    whole, *others = (read_json(tmp_path / f"at{at}" / "comparison.json") for at in (1, 4, 7))
    assert others == [whole, whole]


@pytest.mark.long
def test_minutes(compare: Compare, trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The most expensive policy is left out by name, the same one when the machine is slower at the next call."""
    assert compare("compare.minutes=0.01") == 1
    said = capsys.readouterr().err
    assert "compare.minutes=0.01 is too little: linear_probe and full" in said and "Set compare.minutes=" in said
    assert not trained
    assert compare("compare.minutes=100") == 0
    assert "in all, about" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("freeze=lora", "freeze=lora: a comparison sets this itself; compare.policies=[...] names the policies."),
        ("seed=1", "compare.seeds=... is the number of seeds"),
        ("optim.lr=1e-3", "is the first of"),
        ("resume=last", "the same command as before continues a comparison"),
        ("data.batch_size=32,64", "data.batch_size=32,64 holds several values"),
    ],
)
def test_refused_arguments(argument: str, words: str) -> None:
    with pytest.raises(UserError) as refused:
        check_arguments(["data=folder", argument])
    assert words in str(refused.value)
    assert check_arguments(["compare.seeds=3", "data=folder"]) == ["data=folder"]


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["lora"], "compare.policies=[lora] leaves nothing to compare; name two or more of full, lora"),
        ([], "train with one: python train.py freeze=full"),
        (["full", "lorra"], "lorra does not exist; did you mean lora?"),
        (["full", "full"], "names a policy twice"),
    ],
)
def test_refused_policies(names: list[str], words: str) -> None:
    with pytest.raises(UserError) as refused:
        check_names(names, ["full", "lora"])
    assert words in str(refused.value)


def test_nothing_starts_after_a_mistake(compare: Compare, trained: Trained, capsys: pytest.CaptureFixture[str]) -> None:
    assert compare("compare.lr.full=-1") == 1
    assert "compare.lr.full=-1 must be a number above 0" in capsys.readouterr().err
    assert not trained


@pytest.mark.long
def test_policies_that_do_not_apply_are_left_out(tmp_path: Path) -> None:
    """By name and with the reason; the cheapest first; what trains the same as another one counts once."""
    configs = {}
    for name in ("full", "lora", "linear_probe", "lp_ft", "attention_only"):
        arguments = ["backbone=timm", "backbone.name=resnet18", "backbone.image_size=32", "trainer.precision=32-true"]
        arguments += [f"freeze={name}", "model.num_classes=10", "trainer.max_epochs=3", "backbone.weights=w"]
        configs[name] = compose_run(tmp_path, *arguments)
    found = bind_policies(configs, "cpu")
    assert [*found.work] == ["linear_probe", "lora", "full"]
    assert found.left_out["lp_ft"] == "it trains what linear_probe trains"
    assert "matches nothing" in found.left_out["attention_only"]
    probe, full = found.work["linear_probe"], found.work["full"]
    assert probe.fill == pytest.approx(full.forward, rel=0.01) and full.fill == 0
    assert full.train == pytest.approx(3 * full.forward, rel=0.05)  # two of the three are backward


@pytest.mark.long
def test_a_comparison_has_one_process(compare: Compare, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from filelock import FileLock

    (tmp_path / "compared").mkdir()
    with FileLock(tmp_path / "compared" / ".comparing.lock"):
        assert compare() == 1
    assert "another process is running" in capsys.readouterr().err


def settings(**changes: Any) -> CompareSettings:
    values: dict[str, Any] = {"policies": "all", "tries": 3, "lr_factor": 3.0, "seeds": 2, "minutes": None}
    return CompareSettings(**(values | {"lr": {"full": 3e-4, "other": 1e-3}} | changes))


def search(accuracy: Callable[[float], float | None], **changes: Any) -> list[float]:
    """The rates that are tried in turn; None is the accuracy of a try that diverges."""
    tried: dict[float, Run] = {}
    for _ in range(changes.get("tries", 3)):
        lr = settings(**changes).next_rate("full", 1e-3, tried)
        found = accuracy(lr)
        tried[lr] = Run(Path("x"), "failed" if found is None else "done", val_acc=found)
    return [*tried]


def test_the_search_for_a_learning_rate() -> None:
    assert search(lambda lr: lr) == [3e-4, 9e-4, 2.7e-3]
    assert search(lambda lr: -lr) == [3e-4, 9e-4, 1e-4]
    assert search(lambda lr: None) == [3e-4, 1e-4, 3.3e-5]
    assert search(lambda lr: None if lr > 5e-4 else lr) == [3e-4, 9e-4, 1e-4]
    assert search(lambda lr: -abs(lr - 8e-4), tries=4) == [3e-4, 9e-4, 2.7e-3, 5.2e-4]  # towards the better neighbour
    assert search(lambda lr: 0.9) == [3e-4, 9e-4, 1e-4]
    assert settings().next_rate("unknown", 0.1, {}) == 0.1  # another optimizer's is in proportion to its own


def test_the_first_of_equal_tries_is_chosen() -> None:
    def run(val_acc: float | None, state: str = "done") -> Run:
        return Run(Path("x"), state, val_acc=val_acc)

    assert best_try({0.1: run(0.9), 0.01: run(0.9), 1.0: run(0.95, "pruned")}) == 0.1
    assert best_try({0.1: run(0.9), 0.01: run(0.92)}) == 0.01
    assert best_try({0.1: run(None, "failed")}) is None
    assert is_at_edge(0.1, [0.1, 0.01, 1.0]) is False and is_at_edge(1.0, [0.1, 0.01, 1.0])
    assert is_at_edge(0.1, [0.1]) is False


def timing() -> Timing:
    """Four jobs of 10, 30 and 60 s, two tests of a second; the first two share a cache."""
    costs = {name: Costs(job, 20.0, cut, 1.0) for name, job, cut in (("a", 10.0, 8), ("b", 30.0, 8), ("c", 60.0, 0))}
    return Timing(costs, tries=3, seeds=2, at_once=1)


def test_what_fits() -> None:
    plan = timing()
    assert [plan.seconds(name) for name in "abc"] == [42.0, 122.0, 242.0]
    assert plan.total(["a", "b"]) == 42 + 122 + 20
    assert plan.fitting(7.5) == ["a", "b", "c"]
    assert plan.fitting(5.0) == ["a", "b"]
    with pytest.raises(UserError, match=r"about 3.1 minutes .* Set compare.minutes=4"):
        plan.fitting(3.0)


def test_what_no_longer_fits() -> None:
    """The middle tries took 10, 30 and 90 s, so that three jobs and two tests of c need 272 s more."""
    measured = {"a": 10.0, "b": 30.0, "c": 90.0}
    assert too_long(timing(), [*"abc"], measured, 10.0) == {}
    late = too_long(timing(), [*"abc"], measured, 5.0)
    assert late == {"c": (272.0, 300.0 - 130.0 - 32.0 - 92.0)}
