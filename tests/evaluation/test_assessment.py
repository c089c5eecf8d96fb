"""eval.py on a real run: the numbers that training printed, a page that needs nothing else, W&B, and two models."""

import csv
import json
import os
import re
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import compose_config
from sklearn.metrics import roc_auc_score

from thaw.data.images import Images
from thaw.data.mnist import load_mnist
from thaw.evaluation import assessment
from thaw.evaluation.assessment import Assessment, assess, images_to_predict, second_facts
from thaw.evaluation.assessment_files import compare_pairs, write_assessments
from thaw.predict.predictor import load_predictor
from thaw.run.checkpoint import read_checkpoint

FEW = ["robustness.corruptions=[rotate,stripe,gaussian_noise]", "robustness.severities=[5,3]", "robustness.images=100"]


def evaluate(folder: Path, *overrides: str) -> Path:
    """Run eval.py in this process; returns the report's folder."""
    import_module("eval").main(compose_config("eval", *FEW, *overrides, f"run_dir={folder}"))
    return folder / "report"


@pytest.fixture
def empty_grids(monkeypatch: pytest.MonkeyPatch) -> None:
    """Grids of images, which take long to draw, are empty files."""

    def touch(*arguments: Any) -> None:
        arguments[-1].parent.mkdir(parents=True, exist_ok=True)
        arguments[-1].touch()

    for module in ("assessment", "pictures"):
        monkeypatch.setattr(f"thaw.evaluation.{module}.save_images", touch)


@pytest.fixture
def run(train: Callable[..., Path]) -> Path:
    few = ["data.source=sample", "data.train_size=1500", "trainer.max_epochs=2"]
    return train("experiment=vit_linear_probe", *few, "logger=csv")


@pytest.mark.slow
def test_report_of_one_run(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("thaw.run.console.LINE_SECONDS", 0)
    folder = evaluate(tmp_path / "eval", f"ckpt={run}")
    summary = json.loads((run / "summary.json").read_text())
    printed = capsys.readouterr().out
    assert f"test/acc {summary['test/acc']:.2%}, 95 % interval" in printed
    total = re.search(r"evaluating vit_linear_probe: ([\d,]+) test, validation and corrupted images", printed)
    assert total and f"vit_linear_probe: 500 of {total[1]} images, about" in printed
    assert printed.endswith(f"report:\n{os.path.relpath(folder / 'report.html')}\n")
    names = [
        "attention",
        "confusion_matrix",
        "corruptions",
        "least_certain",
        "reliability",
        "robustness",
        "worst_images",
    ]
    assert sorted(path.stem for path in folder.glob("*.png")) == names
    facts = json.loads((folder / "report.json").read_text())["models"]["vit_linear_probe"]
    assert {key: facts[key] for key in ("test/acc", "test/acc_low", "test/acc_high", "n_test")} == {
        key: summary[key] for key in ("test/acc", "test/acc_low", "test/acc_high", "n_test")
    }
    recalled = sum(row["recall"] * row["n"] for row in facts["classes"])
    assert recalled == pytest.approx(500 * summary["test/acc"], abs=1e-3)
    assert facts["cost"]["parameters"] == summary["total_params"]
    # a multiplication and an addition each for 16 tokens: patches, then per block 12 D^2 and attention 2 T D, and head
    width, tokens, depth = 192, 16, 6
    matrices = tokens * (49 * width + depth * (12 * width**2 + 2 * tokens * width)) + 10 * width
    assert facts["cost"]["flops"] == 2 * matrices
    curves = facts["robustness"]["curves"]
    assert [severity for severity, _ in curves["rotate"]] == [0, 3, 5]
    assert curves["rotate"][0] == curves["stripe"][0], "uncorrupted, the same digits"
    assert curves["rotate"][0][1] > curves["rotate"][2][1]
    assert len(curves["stripe"]) == 2, "which has no severity"
    assert facts["test/corruption_acc"] == pytest.approx(sum(facts["robustness"]["means"].values()) / 3)
    page = (folder / "report.html").read_text()
    assert len(re.findall("data:image/png;base64,", page)) == len(names)
    assert not re.findall(r'(?:src|href)="(?!data:)', page)


@pytest.mark.slow
@pytest.mark.usefixtures("empty_grids")
def test_two_models_are_compared(
    linear_probe: Path, train: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """And their average with both."""
    few = ["data.source=sample", "logger=csv", "trainer.max_epochs=1", "data.train_size=300", "data.batch_size=100"]
    ckpts = f"ckpt=[{linear_probe},{train('experiment=baseline/mlp', *few, 'test=false')}]"
    folder = evaluate(tmp_path / "eval", ckpts, "combine=average")
    report = json.loads((folder / "report.json").read_text())
    pair, *others = report["comparison"]
    assert [other["models"][1] for other in others] == ["average", "average"]
    costs = [facts["cost"] for facts in report["models"].values()]
    for key in ("parameters", "flops"):
        assert costs[0][key] + costs[1][key] == costs[2][key], "an average costs as much as both"
    assert report["models"]["average"]["combined"]["members"] == pair["models"]
    assert report["models"]["average"]["test/acc"] > report["models"]["baseline_mlp"]["test/acc"]
    assert re.search(r"average +\d\S+% +\d\S+% +[\d,]+ +\d", capsys.readouterr().out)
    assert pair["models"] == ["vit_linear_probe", "baseline_mlp"]
    accuracies = [report["models"][name]["test/acc"] for name in pair["models"]]
    assert (pair["only_first_right"] - pair["only_second_right"]) / 500 == pytest.approx(accuracies[0] - accuracies[1])
    assert pair["p_value"] < 1e-6
    page = (folder / "report.html").read_text()
    assert page.count('alt="Where it looks') == 1, "an MLP looks nowhere"


@pytest.mark.long
def test_report_goes_to_the_runs_wandb_run(
    train: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Assessment] = []

    def assess_once(*arguments: Any) -> Assessment:
        if not made:
            made.append(assess(*arguments))
        return made[0]

    monkeypatch.setattr(assessment, "assess", assess_once)
    run = train(
        *("experiment=vit_linear_probe", "data.source=sample", "data.train_size=512", "data.batch_size=256"),
        *("logger=wandb", "logger.wandb.mode=offline", "trainer.max_epochs=1", "validate=false", "test=false"),
    )
    wandb_id = read_checkpoint(run / "checkpoints" / "best.ckpt")["wandb_id"]
    before = set(run.glob("wandb/offline-run-*"))
    evaluate(tmp_path / "eval", f"ckpt={run}")
    (added,) = set(run.glob("wandb/offline-run-*")) - before
    assert added.name.endswith(wandb_id)
    media = {path.name.rsplit("_", 2)[0] for path in added.glob("files/media/**/*") if path.is_file()}
    assert {"reliability", "robustness", "attention", "page"} <= media
    evaluate(tmp_path / "eval", f"ckpt={run}", "wandb=false")
    assert len(set(run.glob("wandb/offline-run-*")) - before) == 1


def test_second_dataset(linear_probe: Path) -> None:
    """Noise in place of another dataset, whose files need a network: what is said of it holds for any."""
    predictor = load_predictor(str(linear_probe))
    source = load_mnist("MNIST", "nowhere", "sample", None)
    noise = torch.randint(0, 256, source.test.images.shape, generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    other = source._replace(test=source.test._replace(images=noise))
    facts = second_facts(
        other._replace(name="KMNIST"), predictor, predictor.logits(source.test.images), lambda done: None
    )
    assert 0.03 < facts["test/acc"] < 0.2
    own, others = (predictor(images).amax(dim=1) for images in (source.test.images, noise))
    assert facts["mean_confidence"] == pytest.approx(float(others.mean()))
    assert facts["mean_confidence_own"] == pytest.approx(float(own.mean()))
    is_own = torch.cat([torch.ones(500), torch.zeros(500)])
    assert facts["auroc"] == pytest.approx(roc_auc_score(is_own, torch.cat([own, others])), abs=1e-4)


@pytest.mark.usefixtures("empty_grids")
def test_a_class_without_images(linear_probe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has no example among the pictures, no recall and no share in any number."""
    shown: list[torch.Tensor] = []
    monkeypatch.setattr(assessment, "save_attention", lambda images, *_: shown.append(images))
    predictor, source = load_predictor(str(linear_probe)), load_mnist("MNIST", "nowhere", "sample", None)
    kept = (source.test.labels != 3) & (source.test.labels != 8)
    test = source.test.take(kept)
    nothing = {"images": 20, "corruptions": [], "severities": [3]}
    second = source._replace(test=source.test.take(slice(40)), name="<KMNIST>")
    done: list[int] = []
    found = assess("one", predictor, source._replace(test=test), second, nothing, tmp_path, done.append)
    assert sum(done) == images_to_predict(source._replace(test=test), second, nothing)
    (images,) = shown
    firsts = [255 - test.images[test.labels == c][0] for c in (0, 1, 2, 4, 5, 6, 7, 9)]  # as ink on paper
    assert torch.equal(images, torch.stack(firsts))
    rows = {row["class"]: row for row in found.facts["classes"]}
    assert rows["3"]["n"] == 0 and rows["3"]["recall"] is None and rows["4"]["recall"] > 0.8
    json.dumps(found.facts, allow_nan=False)
    (tmp_path / "attention.png").touch()
    page = write_assessments([found], tmp_path).read_text()
    assert re.search(r'<td class="text" data-key="3">3</td><td .*>-</td><td .*>absent</td>', page)
    assert "<h2>On &lt;KMNIST&gt;</h2>" in page and f"{found.facts['second']['test/acc']:.2%} of 40 test images" in page
    assert "10% is chance" in page
    with (tmp_path / "wrong_images.csv").open(newline="") as file:
        wrong = list(csv.DictReader(file))
    assert len(wrong) == round(len(test.labels) * (1 - found.facts["test/acc"]))
    assert all(str(int(test.labels[int(row["index"])])) == row["label"] != row["answer"] for row in wrong)


def assessment_of(images: torch.Tensor, labels: list[int], answers: list[int], **facts: str) -> Assessment:
    test = Images(images, torch.tensor(labels))
    given = {"dataset": "pets", "data_source": "the folder pets"} | facts
    return Assessment("a", given, torch.eye(2)[answers], test, [])


def test_which_models_can_be_compared() -> None:
    """Those tested on the same images, which two models may have taken at two sizes."""
    photos, labels = torch.zeros(4, 3, 8, 8, dtype=torch.uint8), [0, 1, 0, 1]
    first = assessment_of(photos, labels, [0, 1, 0, 0])
    larger = assessment_of(torch.zeros(4, 3, 9, 9, dtype=torch.uint8), labels, [0, 0, 1, 1])
    (pair,) = compare_pairs([first, larger])
    assert (pair["only_first_right"], pair["only_second_right"]) == (2, 1)
    others = [
        assessment_of(photos + 1, labels, labels),
        assessment_of(photos[:3], labels[:3], labels[:3]),
        assessment_of(larger.test.images, [1, 0, 1, 0], labels),
        assessment_of(larger.test.images, labels, labels, data_source="the folder cats"),
    ]
    for other in others:
        with pytest.raises(ValueError, match=r"a and a have other test images \(pets, the folder pets, and pets, the"):
            compare_pairs([first, larger, other])


def test_second_dataset_that_is_not_there(linear_probe: Path, tmp_path: Path) -> None:
    settings = [f"data.dir={tmp_path / 'none'}", "data.mirrors=[]"]
    with pytest.raises(ConnectionError, match="FashionMNIST"):
        evaluate(tmp_path / "eval", f"ckpt={linear_probe}", "data=fashion_mnist", *settings)
    assert not (tmp_path / "eval" / "report").exists()
