"""What a page says above its table: experiment, overrides, data, checkpoint, time and command."""

import json
from pathlib import Path

import pytest
import yaml
from sweeps.test_runs import make_run

from thaw.sweeps.groups import group_runs
from thaw.sweeps.heading import describe_runs, range_of, title_of
from thaw.sweeps.run_table import write_run_table
from thaw.sweeps.runs import find_runs, read_run

COMMAND = "python train.py -m experiment=probe 'optim.lr=0.1, 0.2' seed=0,1"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two learning rates, two seeds each."""
    for place, (lr, seed) in enumerate([(0.1, 0), (0.1, 1), (0.2, 0), (0.2, 1)]):
        overrides = f"data.source=sample optim.lr={lr} seed={seed}"
        run = make_run(tmp_path / "sweep" / str(place), overrides, 0.9 + lr / 10, seed=seed, optim__lr=lr)
        facts = json.loads((run / "summary.json").read_text())
        (run / "summary.json").write_text(json.dumps(facts | {"dataset": "MNIST", "data_source": "5,000 digits"}))
        record = {"command": COMMAND, "started": f"2026-01-02 03:0{place}"}
        (run / "record.yaml").write_text(yaml.safe_dump(record))
    (tmp_path / "sweep" / "2" / "checkpoints").mkdir()
    (tmp_path / "sweep" / "2" / "checkpoints" / "best.ckpt").touch()
    return tmp_path / "sweep"


def test_all_that_its_files_say(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    groups = group_runs([read_run(path, []) for path in find_runs([folder])])
    assert title_of(groups) == "probe: optim.lr"
    assert dict(describe_runs(groups, [folder])) == {
        "experiment": "probe",
        "overrides": "data.source=sample",
        "varied": "optim.lr: 0.2, 0.1; seed: 0, 1",
        "data": "MNIST, 5,000 digits",
        "best checkpoint": "sweep/2/checkpoints/best.ckpt",
        "started": "2026-01-02 03:00 to 2026-01-02 03:03",
        "folder": "sweep",
        "command": COMMAND,
    }


def test_it_stands_above_the_table(folder: Path, tmp_path: Path) -> None:
    write_run_table([folder], tmp_path / "out")
    page, text = ((tmp_path / "out" / name).read_text() for name in ("report.html", "report.md"))
    assert "<h1>probe: optim.lr</h1>" in page and text.startswith("# probe: optim.lr\n\n- experiment: probe\n")
    assert f"{COMMAND.replace(chr(39), '&#39;')}</code>" in page and f"- command: {COMMAND}\n" in text


def test_files_that_say_nothing_and_many_experiments(tmp_path: Path) -> None:
    for place in range(9):
        make_run(tmp_path / str(place), status="killed", name=f"policy{place}")
    groups = group_runs([read_run(path, []) for path in find_runs([tmp_path])])
    assert title_of(groups) == "policy0 and 8 other experiments"
    facts = dict(describe_runs(groups, [tmp_path]))
    assert range_of(["0.5", *map(str, range(9))]) == "0 to 8 (10 values)" and range_of(["b", "a"]) == "b, a"
    assert facts["experiment"] == "policy0, policy1, policy2, policy3, policy4, policy5 and 3 more"
    assert set(facts) == {"experiment", "folder"}
