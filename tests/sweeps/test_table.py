import json
from pathlib import Path

from thaw.sweeps.table import format_jobs, read_jobs


def job(folder: Path, overrides: str, val: float | None, test: float | None = None, name: str = "probe") -> None:
    folder.mkdir()
    facts = {"name": name, "overrides": overrides, "val/acc": val, "test/acc": test, "run_dir": str(folder)}
    (folder / "summary.json").write_text(json.dumps(facts | {"test/acc_low": test, "test/acc_high": test}))


def test_best_by_validation_first(tmp_path: Path) -> None:
    job(tmp_path / "0", "optim.lr=0.1 seed=1", 0.91)
    job(tmp_path / "1", "optim.lr=0.2 seed=1", None)
    job(tmp_path / "2", "optim.lr=0.3 seed=1", 0.95, test=0.94)
    (tmp_path / "3").mkdir()  # a job that left no summary
    jobs = read_jobs(tmp_path)
    assert [entry["val/acc"] for entry in jobs] == [0.95, 0.91, None]
    lines = format_jobs(jobs, tmp_path).splitlines()
    assert [line.split()[:3] for line in lines[2:5]] == [
        ["best", "optim.lr=0.3", "95.00%"],
        ["optim.lr=0.1", "91.00%", "-"],
        ["optim.lr=0.2", "-", "-"],
    ]
    assert "94.00%" in lines[2]


def test_jobs_of_several_experiments_are_named_by_them(tmp_path: Path) -> None:
    job(tmp_path / "0", "seed=1", 0.91, test=0.9, name="lora")
    job(tmp_path / "1", "seed=1", 0.92, test=0.9, name="full")
    lines = format_jobs(read_jobs(tmp_path), tmp_path).splitlines()
    assert "full" in lines[2] and "lora" in lines[3]
    assert "all were tested, none is chosen by that" in lines[-1]


def test_a_single_job_keeps_its_overrides(tmp_path: Path) -> None:
    job(tmp_path / "0", "optim.lr=0.1", 0.91)
    assert "optim.lr=0.1" in format_jobs(read_jobs(tmp_path), tmp_path)
