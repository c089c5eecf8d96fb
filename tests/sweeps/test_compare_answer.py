"""The answer of a comparison, from folders that were written by hand."""

import csv
import io
import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from pages.texts import unreadable
from rich.console import Console
from sweeps.test_run_table import Page
from sweeps.test_runs import make_run

from thaw.evaluation.metrics import accuracy_facts
from thaw.evaluation.predictions import write_predictions
from thaw.sweeps import compare_page, compare_pictures, curves
from thaw.sweeps.compare_answer import comparison_table, find_answer, report_comparison
from thaw.sweeps.compare_results import read_comparison

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    # of each policy: validation accuracy, share of right test images of each seed, seconds, and more
    def comparison(policies: dict[str, dict[str, Any]], images: int = 400, classes: int = 10, **facts: Any) -> Path:
        folder, rng, entries = tmp_path / "comparison", np.random.default_rng(0), []
        labels = torch.from_numpy(rng.integers(0, classes, images))
        hard = torch.from_numpy(
            rng.random(images)
        )  # an image is right up to the accuracy of a model, and a little noise
        for name, given in policies.items():
            runs = []
            for seed, accuracy in enumerate(given.get("test", [None])):
                run = f"{name}_{seed}"
                make_run(folder / run, f"freeze={name} seed={seed}", given.get("val"), params=given.get("params", 10))
                runs.append(run)
                if given.get("val") is None:
                    continue
                path = folder / run / "summary.json"
                summary = json.loads(path.read_text()) | {"classes": [f"class {n}" for n in range(classes)]}
                summary |= {"seed": seed, "seconds": given["seconds"], "peak_memory_gb": 1.5}
                if accuracy is not None:
                    right = hard + 0.02 * torch.from_numpy(rng.standard_normal(images)) < accuracy
                    answers = torch.where(right, labels, (labels + 1 + seed) % classes)
                    logits = 5 * torch.nn.functional.one_hot(answers, classes).double()
                    write_predictions(
                        torch.arange(images), logits, labels, summary["classes"], [], path.parent / "report"
                    )
                    summary |= accuracy_facts(answers, labels)
                path.write_text(json.dumps(summary))
            tries = [{"lr": lr, "state": "done", "val/acc": 0.5, "run": runs[0]} for lr in (0.01, 0.1)]
            entry = {"policy": name, "lr": 0.1, "at_edge": True, "tries": tries, "runs": runs}
            entry |= {"train": [f"freeze={name}", "optim.lr=0.1"]}
            entries.append(entry | given.get("entry", {}))
        budget = {"epochs": 2, "images": 800, "tries": 2, "seeds": 2, "minutes": None}
        contract = {"policies": entries, "left_out": [], "budget": budget, "typed": ["data.source=sample"]} | facts
        (folder / "comparison.json").write_text(json.dumps(contract))
        return folder

    return comparison


THREE: dict[str, dict[str, Any]] = {
    "full": {"val": 0.98, "test": [0.95, 0.95], "seconds": 90.0, "params": 1000},
    "lora": {"val": 0.97, "test": [0.945, 0.95], "seconds": 60.0, "params": 100},
    "head": {"val": 0.90, "test": [0.7, 0.7], "seconds": 5.0, "params": 10},
}


def test_the_cheapest_is_the_fastest_that_is_not_measurably_worse(write: Write) -> None:
    answer = find_answer(read_comparison(write(THREE)))
    assert answer.best and answer.cheapest
    assert (answer.best.name, answer.cheapest.name) == ("full", "lora")
    assert answer.verdicts["head"].p_holm < 0.001 and answer.verdicts["head"].high < 0
    assert answer.verdicts["lora"].p_holm > 0.05
    assert answer.sentence.startswith(
        "full is the best by validation (98.00%, the mean of 2 seeds). lora is the cheapest"
    )
    assert "1.0 min instead of 1.5 min" in answer.sentence and "sign-flip" in answer.how
    assert "Holm" in answer.how and "2 comparisons" in answer.how
    assert any("at the edge" in note and "full (0.1, the highest)" in note for note in answer.notes)


def test_equal_times_are_decided_by_the_trained_parameters(write: Write) -> None:
    close = THREE | {"lora": THREE["lora"] | {"seconds": 88.0}, "head": THREE["head"] | {"test": [0.949, 0.95]}}
    answer = find_answer(read_comparison(write(close | {"head": close["head"] | {"seconds": 91.0}})))
    assert answer.cheapest and answer.cheapest.name == "head"


def test_where_every_cheaper_policy_is_worse_the_best_is_the_cheapest(write: Write) -> None:
    answer = find_answer(read_comparison(write({name: THREE[name] for name in ("full", "head")})))
    assert answer.cheapest is answer.best
    assert (
        "nothing cheaper will do: each that trains faster is measurably worse on the 400 test images" in answer.sentence
    )
    assert "corrected" not in answer.how  # a single comparison


def test_one_seed_each_is_mcnemars_test(write: Write) -> None:
    answer = find_answer(read_comparison(write({name: one | {"test": one["test"][:1]} for name, one in THREE.items()})))
    assert "McNemar" in answer.how and "of one seed" in answer.sentence
    assert answer.verdicts["head"].p_holm == pytest.approx(answer.verdicts["head"].p_value * 2)


def test_a_policy_that_is_better_on_the_test_images_is_named_but_not_chosen_as_best(write: Write) -> None:
    answer = find_answer(read_comparison(write(THREE | {"lora": THREE["lora"] | {"test": [0.999, 0.999]}})))
    assert answer.best and answer.best.name == "full"
    assert any(note.startswith("lora is better than full on the test images") for note in answer.notes)
    assert "lora scores higher on the 400 test images" in answer.sentence


@pytest.mark.parametrize(
    ("policies", "said"),
    [
        ({"full": {"val": None}, "lora": {"val": None}}, "No policy has finished yet."),
        ({"full": THREE["full"], "lora": {"val": None}}, "no other policy has finished"),
        ({name: one | {"test": [None]} for name, one in THREE.items()}, "no policy is tested"),
        (THREE | {"full": THREE["full"] | {"test": [None]}}, "it is not tested"),
        ({"full": THREE["full"], "lora": THREE["lora"] | {"test": [None]}}, "no other policy is tested"),
    ],
)
def test_a_comparison_that_is_not_finished_gets_a_sensible_answer(
    write: Write, policies: dict[str, dict[str, Any]], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compare_page, "save_costs", lambda *arguments: arguments[-1].touch())
    monkeypatch.setattr(compare_page, "save_tries", lambda *arguments: False)
    report_comparison(folder := write(policies, left_out=[{"policy": "dora", "reason": "too slow"}]))
    facts = json.loads((folder / "answer.json").read_text())
    assert said in facts["sentence"] and facts["cheapest"] is None
    assert "dora was left out: too slow" in facts["notes"]
    assert bool(facts["command"]) == any(one["val"] for one in policies.values())
    if any(one["val"] is None for one in policies.values()):
        assert any(
            note.startswith("lora has no result (2 learning rates: 2 done; 1 seed: 1") for note in facts["notes"]
        )


def test_other_test_images_are_not_compared(write: Write) -> None:
    folder = write(THREE)
    other = folder / "head_0" / "report" / "predictions.csv"
    other.write_text("".join(other.read_text().splitlines(keepends=True)[:-1]))
    comparison = read_comparison(folder)
    (head,) = (policy for policy in comparison.policies if policy.name == "head")
    assert len(head.predictions) == 1 and "head was tested on other images" in comparison.warnings[0]


@pytest.fixture
def undrawn_pictures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that would be written; their files are empty."""
    drawn: list[Figure] = []

    def keep(figure: Figure, path: Path) -> None:
        drawn.append(figure)
        path.touch()

    for module in (compare_pictures, curves):
        monkeypatch.setattr(module, "save_figure", keep)
    return drawn


def test_the_files_hold_all_numbers(write: Write, undrawn_pictures: list[Figure]) -> None:
    report_comparison(folder := write(THREE))
    with (folder / "comparison.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    facts = json.loads((folder / "answer.json").read_text())
    assert [(row["policy"], row["mark"]) for row in rows] == [("full", "best"), ("lora", "cheapest"), ("head", "")]
    for row, policy in zip(rows, facts["policies"], strict=True):
        assert row == {key: "" if value is None else str(value) for key, value in policy.items()}
    right = [
        sum(line.split(",")[1] == line.split(",")[2] for line in path.read_text().splitlines()[1:]) / 400
        for path in sorted(folder.glob("lora_*/report/predictions.csv"))
    ]
    assert float(rows[1]["test/acc"]) == pytest.approx(sum(right) / 2)
    page = Page((folder / "report.html").read_text())
    assert facts["sentence"] in page.of("p") and facts["command"] in page.of("pre")
    assert "Where they differ" in page.of("h1") and "The images are not shown" in " ".join(page.of("li"))
    assert not any(unreadable(figure) for figure in undrawn_pictures)


def test_classes_agreement_and_disputed_images_are_counted_right(write: Write) -> None:
    comparison = read_comparison(write(THREE, images=200, classes=4))
    accuracies, agreements = compare_pictures.class_accuracies(comparison), compare_pictures.agreements(comparison)
    full, lora, head = ([each.answers for each in policy.predictions] for policy in comparison.tested)
    labels = comparison.labels
    assert accuracies[2, 0] == pytest.approx(np.mean([(one == labels)[labels == 2].mean() for one in full]))
    assert agreements[0, 2] == agreements[2, 0] == pytest.approx(np.mean([(a == b).mean() for a in full for b in head]))
    assert agreements[1, 1] == pytest.approx((lora[0] == lora[1]).mean())
    disputed = compare_page.find_disputed(comparison)
    first = disputed[0]
    place = first.index
    models = [*full, *lora, *head]
    assert first.right == pytest.approx(np.mean([one[place] == labels[place] for one in models]))
    assert abs(first.right - 0.5) == min(
        abs(np.mean([one[n] == labels[n] for one in models]) - 0.5) for n in range(200)
    )
    assert first.answers[0][0] == f"class {labels[place]}" == first.label


def test_no_two_policies_look_alike() -> None:
    assert len({compare_pictures.style_of(place) for place in range(144)}) == 144


@pytest.mark.parametrize(("policies", "classes"), [(2, 2), pytest.param(18, 1000, marks=pytest.mark.long)])
def test_many_policies_and_classes_are_readable(
    write: Write, undrawn_pictures: list[Figure], policies: int, classes: int
) -> None:
    many = {
        f"policy_name_{n}": {
            "val": 0.97 - 0.001 * n,
            "test": [0.96 - 0.002 * n],
            "seconds": 5.0 * 1.3**n,
            "params": 9**n,
        }
        for n in range(policies)
    }
    comparison = read_comparison(write(many, images=4000, classes=classes))
    compare_page.write_comparison_page(comparison, find_answer(comparison))
    assert len(undrawn_pictures) == 4
    for figure in undrawn_pictures:
        assert not unreadable(figure) and max(figure.get_size_inches()) < 15


@pytest.mark.parametrize("width", [80, 120])
def test_the_table_fits_a_terminal(write: Write, width: int) -> None:
    names = {
        "linear_probe": THREE["head"],
        "attention_only": THREE["full"] | {"params": 304_123_456},
        "lora": THREE["lora"],
    }
    comparison = read_comparison(write(names))
    file = io.StringIO()
    Console(file=file, width=width).print(comparison_table(comparison, find_answer(comparison), width))
    text = file.getvalue()
    assert max(map(len, text.splitlines())) <= width
    assert all(name in text for name in names) and "304,123,456" in text and "98.00%" in text


def test_the_command_is_quoted_for_the_shell(write: Write) -> None:
    train = ["data=folder", "data.dir='my pets'", "callbacks.early_stopping=null", "freeze=lora", "optim.lr=0.1"]
    answer = find_answer(read_comparison(write(THREE | {"lora": THREE["lora"] | {"entry": {"train": train}}})))
    assert shlex.split(answer.command) == ["python", "train.py", *train]
