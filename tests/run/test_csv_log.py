"""A run resumed in its own folder writes the CSV that it would have written without the break."""

import csv
from pathlib import Path
from typing import Any

import pytest
import torch

from thaw.run.csv_log import RunCSV


def logger(folder: Path, resume: str | None) -> RunCSV:
    return RunCSV(save_dir=str(folder), name="csv", version="", flush_logs_every_n_steps=1, resume=resume)


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "csv" / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def checkpoint(folder: Path, **facts: Any) -> str:
    torch.save({"config": {}, "state_dict": {}, **facts}, folder / "last.ckpt")
    return str(folder / "last.ckpt")


def test_every_row_is_on_disk_at_once(tmp_path: Path) -> None:
    """A run that is killed has nothing left to write."""
    log = logger(tmp_path, None)
    log.log_metrics({"val/acc": 0.5}, step=3)
    log.log_metrics({"train/loss": 0.1}, step=4)
    assert [row["step"] for row in rows(tmp_path)] == ["3", "4"]


def test_goes_on_where_the_checkpoint_was_written(tmp_path: Path) -> None:
    """In its own folder or another one. Steps made again replace those made before, as does an unfinished line."""
    before = logger(tmp_path, None)
    for step in range(4):
        before.log_metrics({"val/acc": step / 10}, step=step)
    saved = checkpoint(tmp_path, csv_rows=before.write_all())
    for step in range(3, 6):
        before.log_metrics({"val/acc": step / 10}, step=step)
    with (tmp_path / "csv" / "metrics.csv").open("a") as file:
        file.write("0.6")
    for folder in (tmp_path / "other", tmp_path):
        after = logger(folder, saved)
        for step in range(4, 7):
            after.log_metrics({"val/acc": step / 10, "new": 1.0}, step=step)
        after.finalize("success")
        assert [(row["step"], row["val/acc"]) for row in rows(folder)] == [(str(s), str(s / 10)) for s in range(7)]
        assert [row["new"] for row in rows(folder)] == [""] * 4 + ["1.0"] * 3
        assert after.write_all() == 7


def test_a_checkpoint_of_an_earlier_version_knows_its_steps(tmp_path: Path) -> None:
    before = logger(tmp_path, None)
    for step in range(6):
        before.log_metrics({"val/acc": step / 10}, step=step)
    loops = {"fit_loop": {"epoch_loop.state_dict": {"_batches_that_stepped": 3}}}
    logger(tmp_path, checkpoint(tmp_path, loops=loops)).log_metrics({"val/acc": 0.3}, step=3)
    assert [row["step"] for row in rows(tmp_path)] == ["0", "1", "2", "3"]


def test_a_new_run_in_an_old_folder_starts_anew(tmp_path: Path) -> None:
    logger(tmp_path, None).log_metrics({"val/acc": 0.5}, step=0)
    log = logger(tmp_path, None)
    log.log_metrics({"val/loss": 1.0}, step=0)
    assert rows(tmp_path) == [{"step": "0", "val/loss": "1.0"}]


def test_a_new_column_never_leaves_a_shorter_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is rewritten then; a run that is killed meanwhile keeps its rows."""
    log, replace, seen = logger(tmp_path, None), Path.replace, []
    log.log_metrics({"val/acc": 0.5}, step=0)

    def watched(path: Path, target: Path) -> Path:
        seen.append([row["step"] for row in rows(tmp_path)])
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", watched)
    log.log_metrics({"test/acc": 0.5}, step=1)
    assert seen == [["0"]] and [row["test/acc"] for row in rows(tmp_path)] == ["", "0.5"]
