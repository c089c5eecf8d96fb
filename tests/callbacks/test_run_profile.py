"""debug=profile: every second of a run is in one row of the table."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from thaw.callbacks import run_profile
from thaw.callbacks.run_profile import RunProfile
from thaw.run.stopwatch import Stopwatch


@pytest.mark.usefixtures("undrawn")
def test_a_run(
    train: Callable[..., Path], tiny_run: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    profiles: list[RunProfile] = []
    watch = Stopwatch("before")
    monkeypatch.setattr(run_profile, "STOPWATCH", watch)
    monkeypatch.setattr("train.STOPWATCH", watch)
    monkeypatch.setattr(run_profile.atexit, "register", lambda report: profiles.append(report.__self__))
    run = train(*tiny_run, "debug=profile", "test=true", "validate=true", "trainer.max_epochs=1")
    (profile,) = profiles
    profile.report()
    seconds = json.loads((run / "profile.json").read_text())
    assert sum(seconds.values()) == pytest.approx(sum(watch.seconds.values()), abs=0.1)
    assert watch.parts == ["summary, end of the loggers"]
    wanted = {"before", "imports", "data and model", "cached features", "checkpoints", "predictions and pictures"}
    assert {*wanted, "training: model", "validation: model", "best weights: model", "test: model"} <= {*watch.seconds}
    said = capsys.readouterr().out
    assert "part of the run" in said and f"written to {run}/profile.json" in said
