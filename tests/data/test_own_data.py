"""A data module of one's own, from training to every command that takes data from a checkpoint."""

import csv
import json
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import pytest
import torch
import yaml
from conftest import compose_config
from omegaconf import OmegaConf
from own_digits import CLASSES, write_csv

from thaw.data.idx import write_idx
from thaw.data.mnist import load_sample
from thaw.data.module import load_source
from thaw.predict.predictor import load_predictor
from thaw.run.checkpoint import read_checkpoint

FEW = ["robustness.images=20", "robustness.corruptions=[contrast]"]
MLP = ["backbone=mlp", "backbone.hidden=[64]", "freeze=full", "optim.lr=3e-3", "trainer.max_epochs=6", "validate=false"]
SMALL = [*MLP, "logger=none", "cache.mode=off"]
ALLOW = "++allow=[own_digits]"


def command(name: str, folder: Path, *overrides: str) -> None:
    """Run a root script in this process."""
    import_module(name).main(compose_config(name, ALLOW, f"run_dir={folder}", *overrides))


def own_data(tmp_path: Path, **settings: object) -> list[str]:
    """A CSV of five classes, and the overrides by which a user chooses a data module for it."""
    write_csv(tmp_path / "mine.csv", classes=5, rows=500)
    block = {"path": str(tmp_path / "mine.csv"), **settings}
    (tmp_path / "configs/data").mkdir(parents=True)
    (tmp_path / "configs/data/mine.yaml").write_text(yaml.safe_dump(block))
    return [f"hydra.searchpath=[file://{tmp_path / 'configs'}]", "data=mine", "data.batch_size=32"]


@pytest.fixture
def csv_run(train: Callable[..., Path], tmp_path: Path) -> Path:
    """A run on five classes of a CSV, by a subclass of ImageDataModule."""
    settings = {"defaults": ["settings/batches@_here_"], "reader": "digit"}
    return train(*own_data(tmp_path, _target_="own_digits.CSVDigits", **settings), *SMALL)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checkpoints hold paths below the home folder as `~/...`."""
    monkeypatch.setenv("HOME", str(tmp_path))


@pytest.mark.usefixtures("home")
def test_every_command_takes_the_data_of_the_run(csv_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """On the bundled sample, whose labels are others, this model is right less often than by chance."""
    trained = json.loads((csv_run / "summary.json").read_text())
    assert trained["test/acc"] > 0.8 and trained["n_test"] == 100
    assert (trained["dataset"], trained["data_source"]) == ("own digits", "my CSV")

    command("eval", tmp_path / "eval", f"ckpt={csv_run}", *FEW)
    facts = json.loads((tmp_path / "eval/report/report.json").read_text())["models"]["train"]
    assert facts["test/acc"] == trained["test/acc"] and facts["data_source"] == "my CSV"
    assert [row["class"] for row in facts["classes"]] == CLASSES
    assert "100 test images of own digits, my CSV" in (tmp_path / "eval/report/report.html").read_text()

    output = tmp_path / "model.onnx"
    import_module("export").main(compose_config("export", ALLOW, f"ckpt={csv_run}", f"output={output}"))
    exported = capsys.readouterr().out
    assert f"{trained['test/acc']:.2%} accuracy" in exported and "n = 100\ndata       my CSV" in exported

    folder = tmp_path / "hub"
    shared = compose_config("export", ALLOW, f"ckpt={csv_run}", "format=hub_folder", f"output={folder}")
    import_module("export").main(shared)
    card = (folder / "README.md").read_text()
    assert "own digits's 5 classes" in card and "(of my CSV)" in card
    assert "model-index" not in yaml.safe_load(card.split("---")[1])

    command("probe", tmp_path / "probe", f"ckpt={csv_run}", "probe=knn", "probe.k=[1]", "cache.mode=off")
    probed = json.loads((tmp_path / "probe/summary.json").read_text())
    assert (probed["n_train"], probed["n_test"], probed["data_source"]) == (300, 100, "my CSV")


def test_files_that_are_gone_are_an_error(csv_run: Path, tmp_path: Path) -> None:
    moved = (tmp_path / "mine.csv").rename(tmp_path / "moved.csv")
    gone = r"own_digits\.CSVDigits reads are gone: .*mine\.csv.*data\.path"
    with pytest.raises(FileNotFoundError, match=gone):
        command("eval", tmp_path / "gone", f"ckpt={csv_run}")
    with pytest.raises(FileNotFoundError, match=gone):
        import_module("export").main(compose_config("export", ALLOW, f"ckpt={csv_run}"))
    with pytest.raises(
        ValueError, match=r"data\.source=sample: .*CSVDigits has no such setting; it has .*data\.path, "
    ):
        command("eval", tmp_path / "wrong", f"ckpt={csv_run}", "data.source=sample")
    command("eval", tmp_path / "eval", f"ckpt={csv_run}", f"+data.path={moved}", *FEW)
    assert (tmp_path / "eval/report/report.html").is_file()


@pytest.mark.long
def test_a_plain_data_module(train: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run = train(*own_data(tmp_path, _target_="own_digits.PlainDigits", batch_size=32), *SMALL)
    assert "own digits, digits of my own: 5 classes, 300 to train" in capsys.readouterr().out
    trained = json.loads((run / "summary.json").read_text())
    command("eval", tmp_path / "eval", f"ckpt={run}", *FEW)
    facts = json.loads((tmp_path / "eval/report/report.json").read_text())["models"]["train"]
    assert facts["test/acc"] == trained["test/acc"] > 0.8
    assert facts["classes"][0]["class"] == "four"
    for folder in (run, tmp_path / "eval"):
        with (folder / "report/wrong_images.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        assert len(rows) == round(100 * (1 - trained["test/acc"]))
        assert {row["label"] for row in rows} <= {"four", "three", "two", "one", "zero"}

    (tmp_path / "mine.csv").unlink()  # who only predicts needs no data
    (tmp_path / "digit-idx3-ubyte").write_bytes(write_idx(load_sample("MNIST").test.images[:1, 0]))
    asked = [f"ckpt={run}", f"inputs=[{tmp_path / 'digit-idx3-ubyte'}]", f"output={tmp_path / 'answers.csv'}"]
    import_module("predict").main(compose_config("predict", ALLOW, *asked))
    assert "p(four),p(three),p(two),p(one),p(zero)" in (tmp_path / "answers.csv").read_text()


def test_a_checkpoint_without_classes_still_names_them(linear_probe: Path, tmp_path: Path) -> None:
    checkpoint = read_checkpoint(linear_probe / "checkpoints/best.ckpt")
    assert checkpoint.pop("data")["classes"] == [str(digit) for digit in range(10)]
    checkpoint["config"]["data"]["dataset"] = "FashionMNIST"
    torch.save(checkpoint, tmp_path / "old.ckpt")
    assert load_predictor(str(tmp_path / "old.ckpt")).classes[:2] == ["T-shirt/top", "Trouser"]


def test_a_data_module_without_load() -> None:
    data = OmegaConf.create({"_target_": "torch.nn.Identity"})
    with pytest.raises(ValueError, match=r"torch\.nn\.Identity has no method load\(\)"):
        load_source(data, {})


def test_a_folder_that_would_not_be_read_is_an_error(linear_probe: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.dir=/digits would not be read: .*Add data\.source=official"):
        command("eval", tmp_path / "eval", f"ckpt={linear_probe}", "data.dir=/digits")


def test_the_size_of_the_training_split_does_not_matter_for_a_test(linear_probe: Path) -> None:
    """A run on 54,000 digits can be tested on the sample, which has 4,000 to train."""
    data = load_predictor(str(linear_probe)).cfg.data
    assert len(load_source(data, {"train_size": 50_000}).test.labels) == 500
