"""A resumed run equals one that was never interrupted, to the last bit."""

import json
import os
import shlex
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import ROOT, compose_run, needs
from filelock import FileLock
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf
from torch import Tensor

from thaw.run.resume import ended_early, find_saved, resumed_config, why_ended


def weights(run_dir: Path, name: str = "last") -> dict[str, Tensor]:
    return torch.load(run_dir / "checkpoints" / f"{name}.ckpt", weights_only=True)["state_dict"]


@needs("pretrain")
def test_pretraining_starts_from_the_weights_of_another_run(
    train: Callable[..., Path], tiny_run: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    run = ["experiment=pretrain_mae", *tiny_run, "trainer.max_epochs=1"]
    first = train(*run, name="first")
    second = train(*run, f"start_from={first}/checkpoints/last.ckpt", "optim.lr=1e-12", name="second")
    assert f"checkpoint: {os.path.relpath(first)}/checkpoints/last.ckpt (pretrain_mae, " in capsys.readouterr().out
    assert f"start_from: {first}/checkpoints/last.ckpt" in (second / "config.yaml").read_text()
    expected, got = weights(first), weights(second)
    assert all(torch.allclose(tensor, got[name], atol=1e-6) for name, tensor in expected.items())


def test_a_resumed_run_has_the_learning_rate_that_is_typed(train: Callable[..., Path], tiny_run: list[str]) -> None:
    first = train(*tiny_run, "freeze=full", "trainer.max_epochs=2", name="first")
    typed = [f"resume={first}", "trainer.max_epochs=4", "optim.lr=5e-4", "optim.weight_decay=0.2"]
    resumed = train(*typed, name="resumed")
    groups = {
        run: torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["optimizer_states"][0]["param_groups"]
        for run in (first, resumed)
    }
    for before, after in zip(groups[first], groups[resumed], strict=True):
        assert after["initial_lr"] == pytest.approx(before["initial_lr"] / 2)  # tiny_run's is 1e-3
        assert after["weight_decay"] == (0.2 if before["weight_decay"] else 0)


# What is gone on with


def epochs_of(run_dir: Path) -> int:
    return json.loads((run_dir / "summary.json").read_text())["epochs"]


def test_a_finished_run_says_what_to_type(
    train: Callable[..., Path], tiny_run: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    run = train(*tiny_run, "test=false", "trainer.max_epochs=1")
    first = run.rename(run.with_name("first, [a]=b"))
    again = train(f"resume='{first}'", name="again")
    said = capsys.readouterr().out
    assert f"checkpoint: {os.path.relpath(first)}/checkpoints/last.ckpt (train, less than a minute ago, best " in said
    assert "training has ended, after all of trainer.max_epochs=1. To train longer: " in said
    command = said.split("To train longer: python train.py ")[1].splitlines()[0]
    assert epochs_of(again) == 1 and not (again / "checkpoints" / "last.ckpt").exists()
    longer = train(*shlex.split(command), name="longer")
    assert epochs_of(longer) == 2
    from_again = train(f"resume={again}", "trainer.max_epochs=2", name="from again")  # which had trained nothing
    for name, tensor in weights(longer).items():
        assert torch.equal(tensor, weights(from_again)[name]), name


def test_early_stopping_stays_the_end(
    train: Callable[..., Path],
    tiny_run: list[str],
    capsys: pytest.CaptureFixture[str],
    recwarn: pytest.WarningsRecorder,
) -> None:
    stops = "{_target_:thaw.callbacks.monitored_metric.EarlyStopping,monitor:val/acc,mode:max,patience:1,min_delta:1.0}"
    run = [*tiny_run, "test=false", "trainer.max_epochs=6", f"callbacks.early_stopping={stops}"]
    first = train(*run, name="first")
    assert epochs_of(first) == 2  # the first is better than none
    again = train(f"resume={first}", name="again")
    assert "early stopping has ended training, after 2 epochs" in capsys.readouterr().out
    assert epochs_of(again) == 2
    assert epochs_of(train(f"resume={first}", "callbacks.early_stopping.patience=2", name="patient")) == 3
    assert epochs_of(train(f"resume={first}", "callbacks.early_stopping=null", name="whole")) == 6
    assert not [each for each in recwarn if "EarlyStopping" in str(each.message)], "to leave it out is deliberate"


@pytest.mark.parametrize(
    ("trainer", "patience", "ended"),
    [
        ({"max_epochs": 2}, None, ("training has ended, after all of trainer.max_epochs=2", "trainer.max_epochs=4")),
        ({"max_epochs": 3}, None, None),
        (
            {"max_epochs": -1, "max_steps": 8},
            None,
            ("training has ended, after all of trainer.max_steps=8", "+trainer.max_steps=16"),
        ),
        ({"max_epochs": None, "max_steps": 9}, None, None),
        ({"max_steps": -1}, 1, ("early stopping has ended training, after 2 epochs", "callbacks.early_stopping=null")),
        ({"max_epochs": 3}, 0, ("early stopping has ended training, after 2 epochs", "callbacks.early_stopping=null")),
        ({"max_epochs": 3}, 2, None),
    ],
)
def test_why_training_has_ended(trainer: dict, patience: int | None, ended: tuple[str, str] | None) -> None:
    """After two epochs of four steps, the last of which was no better."""
    loops = {"fit_loop": {"epoch_progress": {"current": {"processed": 2}}}}
    checkpoint = {"loops": loops, "global_step": 8, "callbacks": {"EarlyStopping{}": {"wait_count": 1}}}
    cfg = {"trainer": trainer, "callbacks": {"early_stopping": None if patience is None else {"patience": patience}}}
    assert why_ended(checkpoint, OmegaConf.create(cfg)) == ended


def test_a_broken_configuration_of_a_run_without_a_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("[")
    wanted = r"(?s)config\.yaml cannot be read as a configuration of a run .*; give the folder of a run of train\.py\."
    with pytest.raises(ValueError, match=wanted):
        find_saved(str(tmp_path), "", [])


@pytest.mark.parametrize("typed", [[], ["data.dir=here"], ["cache.dir=here"], ["cache=default"], ["data=mnist"]])
def test_places_that_a_run_without_a_checkpoint_names(
    typed: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They are said, and not written to or downloaded into, unless they are typed."""
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    run.mkdir()
    OmegaConf.save(compose_run(run, f"data.dir={elsewhere}", f"cache.dir={elsewhere}"), run / "config.yaml")
    cfg = resumed_config(compose_run(tmp_path / "new", f"resume={run}", *typed), [f"resume={run}", *typed])
    said = capsys.readouterr().out
    assert (f"names cache.dir={elsewhere}, which is not followed" in said) == (
        not any("cache" in each for each in typed)
    )
    assert (f"names data.dir={elsewhere}; type another value" in said) == (not any("data" in each for each in typed))
    assert cfg.cache.dir == ("here" if "cache.dir=here" in typed else "logs/cache")
    assert cfg.data.mirrors == (None if any("data" in each for each in typed) else [])


def test_a_resumed_run_lies_where_its_name_says(
    train: Callable[..., Path], tiny_run: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = train("experiment=compare/lora", *tiny_run, "test=false", "trainer.max_epochs=1")
    monkeypatch.chdir(tmp_path)
    shutil.copytree(run, "logs/runs/other/1")
    for typed, name in (
        ([f"resume={run}"], "compare_lora"),
        (["resume=logs/runs/other/1"], "compare_lora"),
        (["resume=last"], "compare_lora"),
        ([f"resume={run}/checkpoints/last.ckpt", "name=mine"], "mine"),
        (["resume=nowhere"], "train"),  # said later
        ([], "train"),
    ):
        GlobalHydra.instance().clear()
        with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
            cfg = compose("train", typed, return_hydra_config=True)
        assert Path(cfg.hydra.run.dir).parts[:3] == ("logs", "runs", name)


def test_last_is_the_newest_run_although_it_has_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless it ended in another way: it is done or failed, tested learning rates, or still runs."""
    monkeypatch.chdir(tmp_path)
    runs = Path("logs", "runs")
    for age, file in enumerate(("a/1/job.json", "a/1/checkpoints/last.ckpt", "b/2/job.json"), start=-3):
        (runs / file).parent.mkdir(parents=True, exist_ok=True)
        (runs / file).touch()
        os.utime(runs / file, (time.time() + age, time.time() + age))
    assert ended_early("") == ended_early("b") == runs / "b" / "2"
    assert ended_early("a") is None
    with pytest.raises(ValueError, match=r"b/2 holds neither a checkpoint nor config\.yaml.* Type the command"):
        find_saved("last", "", [])
    with FileLock(runs / "b" / "2" / "job.lock"):
        assert ended_early("") is None
    for name in ("summary.json", "failure.json", "lr_find.csv"):
        end = runs / "b" / "2" / name
        end.touch()
        assert ended_early("") is None, name
        end.unlink()
    os.utime(runs / "a" / "1" / "checkpoints" / "last.ckpt")
    assert ended_early("") is None
