import json
from pathlib import Path

import pytest

from thaw.evaluation.summary import NOT_TESTED, format_summary
from thaw.run.files import write_json

FACTS = {
    **{"test/acc": 0.99, "test/acc_low": 0.977, "test/acc_high": 0.996, "n_test": 500, "val/acc": 0.985, "epochs": 3},
    **{
        "data_source": "sample",
        "data_title": "the bundled sample of 5,000 digits",
        "dataset": "MNIST",
        "n_train": 4000,
        "n_val": 500,
        "backbone": "vit",
        "weights": "bundled",
    },
    **{"trainable_params": 25, "total_params": 1000, "seconds": 7.25, "run_dir": "logs/runs/x"},
    **{"peak_memory_gb": 1.24, "checkpoint_mb": 0.031},
}


def test_says_what_a_person_wants() -> None:
    text = format_summary(FACTS, "wandb sync X")
    for part in (
        *("sample of 5,000 digits", "weights: bundled", "25 of 1,000 parameters (2.50%)", "99.00% accuracy"),
        *("97.70% to 99.60%", "n = 500", "logs/runs/x", "wandb sync X"),
        "7.2 s, at most 1.2 GB of memory, a checkpoint of 0.03 MB",
    ):
        assert part in text
    assert "test" not in format_summary({**FACTS, **NOT_TESTED}, None)


def test_json_is_whole_or_not_there(tmp_path: Path) -> None:
    write_json(FACTS, tmp_path / "summary.json")
    assert json.loads((tmp_path / "summary.json").read_text()) == FACTS
    with pytest.raises(TypeError):
        write_json({"x": object()}, tmp_path / "summary.json")
    assert json.loads((tmp_path / "summary.json").read_text()) == FACTS
    assert [path.name for path in tmp_path.iterdir()] == ["summary.json"]
