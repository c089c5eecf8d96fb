import json
import statistics
from pathlib import Path
from typing import Any

import pytest
import yaml

from thaw.sweeps.cells import format_count
from thaw.sweeps.groups import group_runs
from thaw.sweeps.runs import DONE, Run, find_runs, read_run, settings_of, split_overrides

CONFIG: dict[str, Any] = {
    "name": "probe",
    "seed": 0,
    "run_dir": "",
    "overrides": "",
    "logger": {"csv": {"save_dir": "${run_dir}"}},
    "cache": {"dir": "logs/cache"},
    "data": {"dir": "data", "seed": "${seed}", "batch_size": 64},
    "freeze": {"rules": [{"match": ".*", "train": True}]},
    "optim": {"lr": 0.1, "weight_decay": 0.0},
}


def make_run(
    folder: Path,
    overrides: str = "",
    val: float | None = None,
    status: str | None = None,
    test: float | None = None,
    params: int = 10,
    **keys: Any,
) -> Path:
    """A run folder: done if it has `val`, else as `status` says; `keys` such as `optim__lr` change its config."""
    folder.mkdir(parents=True)
    config = json.loads(json.dumps(CONFIG | {"overrides": overrides, "run_dir": str(folder)}))
    for key, value in keys.items():
        *inner, last = key.split("__")
        place = config
        for name in inner:
            place = place[name]
        place[last] = value
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    facts = {"name": config["name"], "overrides": overrides, "seed": config["seed"], "seconds": 1.5}
    if status is not None:
        facts |= {"status": status, "reason": f"{status} for a reason", "traceback": "Traceback: <boom>"}
        (folder / "failure.json").write_text(json.dumps(facts))
    elif val is not None:
        facts |= {"val/acc": val, "test/acc": test, "test/acc_low": test and test - 0.01, "epochs": 2}
        facts |= {"test/acc_high": test and test + 0.01, "trainable_params": params}
        (folder / "summary.json").write_text(json.dumps(facts))
    return folder


def read(*folders: Path) -> tuple[list[Run], list[str]]:
    warnings: list[str] = []
    return [read_run(folder, warnings) for folder in find_runs(folders)], warnings


def test_runs_that_differ_in_their_seed_alone_are_one_setting(tmp_path: Path) -> None:
    accuracies = [0.91, 0.935, 0.92]
    for seed, accuracy in enumerate(accuracies):
        keys = {"data__dir": f"/node{seed}", "cache__dir": f"cache{seed}", "logger": None if seed else {}}
        make_run(tmp_path / f"a{seed}", f"seed={seed}", accuracy, test=accuracy - 0.01, seed=seed, **keys)
    make_run(tmp_path / "b", "optim.lr=0.2 seed=0", 0.925, optim__lr=0.2)
    make_run(tmp_path / "c", "data.seed=7", 0.5, data__seed=7)  # other data, not another seed of the run
    runs, warnings = read(tmp_path)
    first, second, third = group_runs(runs)
    assert not warnings
    assert (second.val, second.test) == (
        (pytest.approx(statistics.mean(accuracies)), pytest.approx(statistics.stdev(accuracies)), 3),
        (pytest.approx(statistics.mean(accuracies) - 0.01), pytest.approx(statistics.stdev(accuracies)), 3),
    )
    assert [run.seed for run in second.runs] == [1, 2, 0]  # the best first
    assert (first.label, first.val, first.test) == ("optim.lr=0.2", (0.925, None, 1), None)
    assert (second.label, third.label) == ("probe", "data.seed=7")


def test_folds_are_averaged_over_their_seeds_and_kept_from_other_folds(tmp_path: Path) -> None:
    """scikit-learn's cross_val_score gives the same mean; three folds, five folds and none are three settings."""
    accuracies = {(0, 0): 0.9, (0, 1): 0.94, (1, 0): 0.8, (1, 1): 0.82, (2, 0): 0.7}
    for (fold, seed), accuracy in accuracies.items():
        data = CONFIG["data"] | {"fold": fold, "folds": 3}
        make_run(tmp_path / f"{fold}{seed}", f"data.fold={fold} seed={seed}", accuracy, seed=seed, data=data)
    make_run(tmp_path / "five", "data.fold=0 data.folds=5", 0.6, data=CONFIG["data"] | {"fold": 0, "folds": 5})
    make_run(tmp_path / "none", "", 0.5, data=CONFIG["data"] | {"fold": None, "folds": 3})
    make_run(tmp_path / "earlier", "seed=1", 0.4, seed=1)  # of a version without folds
    runs, warnings = read(tmp_path)
    three, five, none = group_runs(runs)
    by_fold = [0.92, 0.81, 0.7]
    assert three.val == (pytest.approx(statistics.mean(by_fold)), pytest.approx(statistics.stdev(by_fold)), 3)
    assert (format_count(three), format_count(five), format_count(none)) == ("3 folds", "1 of 5 folds", "2")
    assert (three.folds, five.folds, none.folds) == (3, 5, None) and not warnings
    assert (five.val, none.val) == (
        (0.6, None, 1),
        (pytest.approx(0.45), pytest.approx(statistics.stdev([0.4, 0.5])), 2),
    )
    assert three.runs[0].repeat_name == "data.fold=0 seed=1"
    assert {three.label, five.label, none.label} == {"data.folds=3", "data.folds=5", "data.folds=-"}


def test_a_seed_that_ran_twice_counts_once(tmp_path: Path) -> None:
    for place, (seed, accuracy) in enumerate([(0, 0.9), (0, 0.92), (1, 0.95)]):
        make_run(tmp_path / str(place), val=accuracy, seed=seed)
    (group,) = group_runs(read(tmp_path)[0])
    assert group.val == (pytest.approx(0.93), pytest.approx(statistics.stdev([0.91, 0.95])), 2)


def test_order_is_by_validation_then_fewer_parameters_then_name(tmp_path: Path) -> None:
    make_run(tmp_path / "0", "x=many", 0.9, test=0.99, params=30, optim__lr=1)
    make_run(tmp_path / "1", "x=zz", 0.9, params=20, optim__lr=2)
    make_run(tmp_path / "2", "x=aa", 0.9, params=20, optim__lr=3)
    make_run(tmp_path / "3", "x=best", 0.91, test=0.5, params=99, optim__lr=4)
    make_run(tmp_path / "4", "x=unknown", optim__lr=5)
    assert [group.label for group in group_runs(read(tmp_path)[0])] == ["x=best", "x=aa", "x=zz", "x=many", "x=unknown"]


def test_the_front_of_a_search_is_marked_and_ties_are_settled_once(tmp_path: Path) -> None:
    for place, (accuracy, params) in enumerate([(0.9, 10), (0.9, 10), (0.95, 20), (0.95, 30), (0.8, 5), (0.7, 7)]):
        make_run(tmp_path / str(place), f"x={place}", accuracy, params=params, optim__lr=place + 1)
    runs = read(tmp_path)[0]
    marks = [(group.label, group.mark) for group in group_runs(runs)]
    assert marks == [("x=2", "best"), *((f"x={place}", "") for place in (3, 0, 1, 4, 5))]
    front = group_runs(runs, ["val/acc", "trainable_params"])
    assert [group.label for group in front if group.mark == "Pareto"] == ["x=2", "x=0", "x=1", "x=4"]
    assert [group.label for group in group_runs(runs, ["trainable_params"]) if group.mark] == ["x=4"]


def test_states_and_reasons(tmp_path: Path) -> None:
    make_run(tmp_path / "0", val=0.9)
    for place, status in enumerate(["failed", "pruned", "killed", "timeout"], start=1):
        make_run(tmp_path / str(place), status=status, seed=place)
    make_run(tmp_path / "5")
    make_run(tmp_path / "6", val=0.8, seed=6)
    (tmp_path / "6" / "failure.json").write_text('{"status": "failed"}')  # of an earlier try
    runs, _ = read(tmp_path)
    assert [run.state for run in runs] == [DONE, "failed", "pruned", "killed", "timeout", "interrupted", DONE]
    assert [run.reason for run in runs[:3]] == ["", "failed for a reason", "pruned for a reason"]
    assert runs[1].traceback == "Traceback: <boom>" and runs[5].reason == "ended before it was done"
    (group,) = group_runs(runs)
    assert group.val == (pytest.approx(0.85), pytest.approx(statistics.stdev([0.8, 0.9])), 2)


def test_broken_files_are_named_and_the_others_count(tmp_path: Path) -> None:
    make_run(tmp_path / "0", val=0.9)
    make_run(tmp_path / "1", val=0.8, seed=1)
    (tmp_path / "1" / "summary.json").write_text('{"val/acc": 0.')
    make_run(tmp_path / "2", val=0.7, seed=2)
    (tmp_path / "2" / "config.yaml").write_text("a: [")
    make_run(tmp_path / "3", seed=3)
    (tmp_path / "3" / "summary.json").write_text('{"val/acc": "high", "seed": [1], "seconds": NaN, "name": "p"}')
    make_run(tmp_path / "4", seed=4)
    (tmp_path / "4" / "summary.json").write_text("[1, 2]")
    runs, warnings = read(tmp_path)
    assert [run.state for run in runs] == [DONE, "interrupted", DONE, DONE, "interrupted"]
    assert [run.val_acc for run in runs] == [0.9, None, 0.7, None, None]
    assert len(group_runs(runs)) == 2  # without its configuration, run 2 cannot be told to be of the same setting
    for part in ("1/summary.json", "2/config.yaml", "val/acc is 'high'", "seconds is nan", "seed is", "4/summary.json"):
        assert sum(part in line for line in warnings) == 1, (part, warnings)


def test_every_run_is_found_once(tmp_path: Path) -> None:
    run = make_run(tmp_path / "sweep" / "a", val=0.9)
    make_run(tmp_path / "sweep" / "deeper" / "b", val=0.9)
    for hidden in ("checkpoints", "wandb", ".hydra"):
        make_run(run / hidden, val=0.1)
    (tmp_path / "sweep" / "loop").symlink_to(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path / "sweep")
    found = find_runs([tmp_path / "sweep", tmp_path / "link", run, tmp_path])
    assert [path.name for path in found] == ["a", "b"]


def test_a_folder_without_runs_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere is not a folder; give"):
        find_runs([tmp_path / "nowhere"])
    make_run(tmp_path / "some" / "a")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty holds no run.*logs/sweeps"):
        find_runs([tmp_path / "some", tmp_path / "empty"])


def test_overrides_are_split_where_a_key_begins() -> None:
    text = "optim.lr=0.1 +a.b=[1, 2] ~callbacks.finite_loss seed=3 data.source=sample cache.dir=/c data.dir=/d"
    assert split_overrides(text) == ("optim.lr=0.1", "+a.b=[1, 2]", "~callbacks.finite_loss", "data.source=sample")
    assert split_overrides(None) == split_overrides("") == ()


def test_a_name_that_was_typed_is_said_once(tmp_path: Path) -> None:
    make_run(tmp_path / "0", "name=mine optim.lr=0.1", 0.9, name="mine")
    make_run(tmp_path / "1", "optim.lr=0.2", 0.8, optim__lr=0.2)
    labels = [group.label for group in group_runs(read(tmp_path)[0])]
    assert labels == ["mine optim.lr=0.1", "probe optim.lr=0.2"]


def test_settings_with_the_same_overrides_are_told_apart_by_their_configuration(tmp_path: Path) -> None:
    make_run(tmp_path / "0", "optim.lr=0.1", 0.9, data__batch_size=64)
    make_run(tmp_path / "1", "optim.lr=0.1", 0.8, data__batch_size=128)
    make_run(tmp_path / "2", "optim.lr=0.1", 0.7, data__batch_size=128, name="other")
    labels = [group.label for group in group_runs(read(tmp_path)[0])]
    assert labels == ["probe data.batch_size=64", "probe data.batch_size=128", "other"]


def test_seeds_that_choose_other_blocks_are_one_setting() -> None:
    """Unless the blocks are typed."""
    of = {"freeze": {"k": 1, "chosen": [1]}, "overrides": "freeze=surgical seed=1"}
    other = {"freeze": {"k": 1, "chosen": [2]}, "overrides": "freeze=surgical seed=2"}
    assert settings_of(of) == settings_of(other) == {"freeze.k": 1}
    typed = [settings_of(each | {"overrides": f"freeze.chosen={each['freeze']['chosen']}"}) for each in (of, other)]
    assert typed[0] != typed[1]
