"""Probes against scikit-learn and naive loops, and probe.py on real digits."""

import inspect
import json
import math
import re
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT, compose_config
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from thaw.data.mnist import SAMPLE, load_mnist
from thaw.evaluation import probes
from thaw.evaluation.metrics import accuracy_interval
from thaw.evaluation.probes import Choice, Labelled, knn, logistic_regression, score
from thaw.evaluation.propagation import propagation, prototype
from thaw.models.logistic import fit_logistic, standardisation
from thaw.run.checkpoint import load_model, read_checkpoint
from thaw.run.values import check_types

PROBES: dict[str, Callable[..., Choice]] = {"knn": knn, "logistic_regression": logistic_regression}
FEW_LABEL_PROBES: dict[str, Callable[..., Choice]] = {"propagation": propagation, "prototype": prototype}
KNN = {"fixed_k": 1, "metric": "cosine", "vote": "majority", "temperature": 0.07}
FIT = {"max_iterations": 2000, "tolerance": 1e-7}
REGRESSION = FIT | {"fixed_C": 0.1}
FEW = ["data.source=sample", "data.train_size=300", "trainer.precision=32-true"]


def blobs(count: int, seed: int, dtype: torch.dtype = torch.float32) -> Labelled:
    """Overlapping clouds of four classes, labelled 1, 3, 5, 7, of unequal scale and far from the origin."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 4, (count,), generator=generator)
    centres = torch.randn(4, 6, generator=torch.Generator().manual_seed(9), dtype=dtype)
    features = centres[labels] + 1.1 * torch.randn(count, 6, generator=generator, dtype=dtype)
    return Labelled(features * torch.tensor([1, 2, 5, 0.1, 1, 1], dtype=dtype) + 3, 2 * labels + 1)


TRAIN, VAL, TEST = blobs(400, 0), blobs(150, 1), blobs(130, 2)


# Nearest neighbours


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_knn_equals_scikit_learn(metric: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes, "SIMILARITIES", 400 * 64)  # three chunks, the last not full
    several = knn(TRAIN, VAL, k=[1, 4, 7, 400], **KNN | {"metric": metric})
    for k in (1, 4, 7, 400):
        reference = KNeighborsClassifier(k, metric=metric, algorithm="brute").fit(*map(np.asarray, TRAIN))
        alone = knn(TRAIN, VAL, k=[k], **KNN | {"metric": metric})
        assert alone.predict(TEST.features).tolist() == reference.predict(np.asarray(TEST.features)).tolist()
        assert several.candidates[k] == alone.candidates[k] == reference.score(*map(np.asarray, VAL))


def naive_weighted_vote(query: Tensor, k: int, temperature: float) -> int:
    cosines = [float(query @ other / query.norm() / other.norm()) for other in TRAIN.features]
    votes = dict.fromkeys(sorted(set(TRAIN.labels.tolist())), 0.0)
    for place in sorted(range(len(cosines)), key=lambda place: -cosines[place])[:k]:
        votes[int(TRAIN.labels[place])] += math.exp(cosines[place] / temperature)
    return max(votes, key=votes.__getitem__)


@pytest.mark.parametrize(("k", "temperature"), [(5, 0.07), (60, 0.07), (400, 0.02)])
def test_weighted_vote_equals_a_naive_loop(k: int, temperature: float) -> None:
    choice = knn(TRAIN, VAL, k=[k], **KNN | {"vote": "weighted", "temperature": temperature})
    queries = TEST.features[:40]
    expected = [naive_weighted_vote(query, k, temperature) for query in queries]
    assert choice.predict(queries).tolist() == expected
    if k > 5:  # a majority would say something else
        assert knn(TRAIN, VAL, k=[k], **KNN).predict(queries).tolist() != expected


def test_votes_for_many_classes_equal_scikit_learns(monkeypatch: pytest.MonkeyPatch) -> None:
    """200 classes, of which 3 never occur in training; their images are never classified correctly."""
    monkeypatch.setattr(probes, "SIMILARITIES", 2**14)
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 200, (700,), generator=generator)
    features = torch.randn(200, 16, generator=generator)[labels] + torch.randn(700, 16, generator=generator)
    train = Labelled(features[:500], torch.where(labels[:500] < 3, 3, labels[:500]))
    val = Labelled(features[500:], labels[500:])
    reference = KNeighborsClassifier(9, metric="cosine", algorithm="brute").fit(*map(np.asarray, train))
    choice = knn(train, val, k=[9], **KNN)
    assert choice.candidates[9] == reference.score(*map(np.asarray, val))
    fitted = logistic_regression(train, val, C=[1.0], **REGRESSION)
    answers = fitted.predict(val.features)
    assert not (set(answers.tolist()) & {0, 1, 2}) and fitted.candidates[1.0] == (answers == val.labels).double().mean()


def test_a_cold_vote_does_not_overflow() -> None:
    """As the temperature falls to 0 the nearest digit decides alone."""
    cold = knn(TRAIN, VAL, k=[50], **KNN | {"vote": "weighted", "temperature": 1e-6})
    assert torch.equal(cold.predict(TEST.features), knn(TRAIN, VAL, k=[1], **KNN).predict(TEST.features))


def test_a_tie_goes_to_the_lowest_label() -> None:
    train = Labelled(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([7, 2]))
    choice = knn(train, train, k=[2], **KNN)
    assert choice.predict(torch.tensor([[1.0, 0.1], [0.1, 1.0]])).tolist() == [2, 2]


# Logistic regression


@pytest.mark.parametrize("c", [1e-3, 0.1, 1.0, 100.0])
def test_logistic_regression_equals_scikit_learn(c: float) -> None:
    scaler = StandardScaler().fit(np.asarray(TRAIN.features, dtype=float))
    scaled, val, test = (scaler.transform(np.asarray(split.features, dtype=float)) for split in (TRAIN, VAL, TEST))
    reference = LogisticRegression(C=c, tol=1e-10, max_iter=10_000).fit(scaled, np.asarray(TRAIN.labels))
    choice = logistic_regression(TRAIN, VAL, C=[c], **REGRESSION)
    assert choice.predict(TEST.features).tolist() == reference.predict(test).tolist()
    assert choice.candidates == {c: reference.score(val, np.asarray(VAL.labels))}
    assert choice.num_parameters == reference.coef_.size + reference.intercept_.size
    for dtype, tolerance in ((torch.float32, 1e-3), (torch.float64, 1e-5)):
        targets = (TRAIN.labels - 1) // 2
        start = torch.zeros(4, 6, dtype=dtype), torch.zeros(4, dtype=dtype)
        weight, bias, gradient = fit_logistic(torch.tensor(scaled, dtype=dtype), targets, c, *start, **FIT)
        scale = abs(reference.coef_).max()
        assert np.abs(weight.numpy() - reference.coef_).max() < tolerance * scale
        intercept = reference.intercept_ - reference.intercept_.mean()  # the same for all classes changes nothing
        assert np.abs((bias - bias.mean()).numpy() - intercept).max() < tolerance * scale
        assert dtype == torch.float32 or gradient <= FIT["tolerance"]


def test_warm_starts_end_where_cold_ones_do() -> None:
    """The order of the candidates and where each starts decide nothing."""
    together = logistic_regression(TRAIN, VAL, C=[10, 1e-4, 0.1], **REGRESSION)
    assert list(together.candidates) == [1e-4, 0.1, 10]
    alone = {c: logistic_regression(TRAIN, VAL, C=[c], **REGRESSION).candidates[c] for c in (1e-4, 0.1, 10)}
    assert together.candidates == alone


def test_a_fit_that_has_not_converged_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    logistic_regression(TRAIN, VAL, C=[10], **REGRESSION | {"max_iterations": 2})
    assert "not converged: the gradient is" in capsys.readouterr().out
    logistic_regression(TRAIN, VAL, C=[10], **REGRESSION | {"tolerance": 1e-5})
    assert "not converged" not in capsys.readouterr().out


def test_standardisation_equals_scikit_learn() -> None:
    features = torch.cat([TRAIN.features, torch.full((400, 1), -0.42420956), torch.zeros(400, 1)], dim=1)  # constant
    scaler = StandardScaler().fit(features.double().numpy())
    mean, std = standardisation(features)
    assert np.allclose(mean, scaler.mean_, atol=1e-6) and np.allclose(std, scaler.scale_, rtol=1e-6)
    assert std[-2:].tolist() == [1, 1]


# What is chosen, on what


def mislabelled(data: Labelled) -> Labelled:
    return Labelled(data.features, torch.full_like(data.labels, 99))


@pytest.mark.parametrize(
    "probe", [partial(knn, k=[1, 5, 200], **KNN), partial(logistic_regression, C=[1e-5, 1e-2, 1.0], **REGRESSION)]
)
def test_validation_chooses_where_the_test_split_would_choose_otherwise(probe: Callable[..., Choice]) -> None:
    choice = probe(TRAIN, VAL)
    worst = min(choice.candidates, key=choice.candidates.__getitem__)
    (name,) = {"k", "C"} & set(probe.keywords)  # type: ignore[attr-defined]
    other = probe(TRAIN, VAL, **{name: [worst]})
    test = Labelled(TEST.features, other.predict(TEST.features))  # on these labels the worst candidate is perfect
    assert score(other, test)["test/acc"] == 1 > score(choice, test)["test/acc"]
    assert choice.chosen == max(choice.candidates, key=choice.candidates.__getitem__) != worst
    alone = probe(TRAIN, VAL, **{name: [choice.chosen]})
    assert torch.equal(choice.predict(TEST.features), alone.predict(TEST.features))
    assert score(choice, mislabelled(TEST))["test/acc"] == 0


@pytest.mark.parametrize(
    ("probe", "fixed"),
    [(partial(knn, k=[5, 50], **KNN), 1), (partial(logistic_regression, C=[1.0], **REGRESSION), 0.1)],
)
def test_without_validation_the_fixed_candidate_is_taken(probe: Callable[..., Choice], fixed: float) -> None:
    """Images without a label are left out."""
    (name,) = {"k", "C"} & set(probe.keywords)  # type: ignore[attr-defined]
    some = torch.arange(400) % 3 == 0
    few = Labelled(TRAIN.features, torch.where(some, TRAIN.labels, -1))
    choice = probe(few, Labelled(*(part[:0] for part in VAL)))
    assert choice.candidates == {fixed: None} and choice.chosen == fixed
    alone = probe(Labelled(*(part[some] for part in TRAIN)), VAL, **{name: [fixed]})
    assert torch.equal(choice.predict(TEST.features), alone.predict(TEST.features))


def test_the_smallest_of_equal_candidates_is_chosen() -> None:
    train = Labelled(torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.1, 1.0]]), torch.tensor([0, 0, 1, 1]))
    assert knn(train, train, k=[2, 1], **KNN).chosen == 1
    assert logistic_regression(train, train, C=[3.0, 1.0, 2.0], **REGRESSION).chosen == 1


def test_score() -> None:
    choice = Choice("k", {1: 0.5}, 1, lambda features: features[:, 0].long(), 0)
    got = score(choice, Labelled(torch.tensor([[1.0], [2.0], [3.0], [4.0]]), torch.tensor([1, 2, 3, 9])))
    low, high = accuracy_interval(3, 4)
    assert got == {"test/acc": 0.75, "test/acc_low": low, "test/acc_high": high, "n_test": 4}


# Bad input


COUNTS, POSITIVES = (
    f"a list of 1 or more, each item a {each}" for each in ("whole number, 1 or more", "number above 0")
)


@pytest.mark.parametrize(
    ("name", "values", "allowed"),
    [
        ("k", [[], 5, [1, 0], [2.5], [True]], COUNTS),
        ("metric", ["manhattan"], "cosine or euclidean"),
        ("vote", ["unanimous"], "majority or weighted"),
        ("temperature", [0, math.nan], "a number above 0; 0.07 is common"),
        ("C", [[], [1.0, 0.0], None, [-1], [math.inf], [math.nan], ["1"]], POSITIVES),
        ("max_iterations", [0], "a whole number, 1 or more"),
        ("tolerance", [0.0], "a number above 0; e.g. 1e-5"),
    ],
)
def test_settings_out_of_range(name: str, values: list[Any], allowed: str) -> None:
    target = "logistic_regression" if name in ("C", "max_iterations", "tolerance") else "knn"
    for value in values:
        block = OmegaConf.create({"_target_": f"thaw.evaluation.probes.{target}", name: value})
        shown = "null" if value is None else repr(value)
        with pytest.raises(ValueError, match=re.escape(f"probe.{name}={shown} must be {allowed}.")):
            check_types(block, "probe.")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": [3, 401]}, "probe.k=401 is more than the 400 training images"),
        ({"vote": "weighted", "metric": "euclidean"}, "probe.vote=weighted needs probe.metric=cosine, not euclidean"),
    ],
)
def test_knn_settings_that_cannot_work(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        knn(TRAIN, VAL, **{"k": [1], **KNN, **changes})


@pytest.mark.parametrize("probe", [partial(knn, k=[1], **KNN), partial(logistic_regression, C=[1.0], **REGRESSION)])
def test_features_that_cannot_work(probe: Callable[..., Choice]) -> None:
    broken = TRAIN.features.clone()
    broken[[3, 3, 50], [0, 1, 2]] = torch.tensor([math.nan, math.inf, -math.inf])
    with pytest.raises(ValueError, match="2 of 400 training images have features that are not finite"):
        probe(Labelled(broken, TRAIN.labels), VAL)
    with pytest.raises(ValueError, match="2 of 400 validation images"):
        probe(TRAIN, Labelled(broken, TRAIN.labels))
    with pytest.raises(ValueError, match="2 of 400 test images"):
        score(probe(TRAIN, VAL), Labelled(broken, TRAIN.labels))
    with pytest.raises(ValueError, match="All 400 training images are of class 5; a probe needs two"):
        probe(Labelled(TRAIN.features, torch.full((400,), 5)), VAL)


# probe.py


def probe(run_dir: Path, *overrides: str) -> dict[str, Any]:
    """Run probe.py with overrides, as the command line would; returns its summary."""
    import_module("probe").main(compose_config("probe", *overrides, f"run_dir={run_dir}", "overrides=''"))
    return json.loads((run_dir / "summary.json").read_text())


@pytest.mark.parametrize("option", [*PROBES, *FEW_LABEL_PROBES])
def test_settings_equal_the_signature(option: str) -> None:
    """No default hides in Python."""
    block = OmegaConf.load(ROOT / "configs" / "probe" / f"{option}.yaml")
    parameters = inspect.signature((PROBES | FEW_LABEL_PROBES)[option]).parameters
    assert {key for key in block if not str(key).startswith("_")} == set(parameters) - {"train", "val"}
    assert all(parameter.default is parameter.empty for parameter in parameters.values())


def test_a_probe_reuses_what_a_linear_probe_cached(
    train: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    few = [*FEW, f"cache.dir={tmp_path / 'cache'}"]
    untested = ["validate=false", "test=false"]
    train("experiment=vit_linear_probe", "logger=csv", "data.batch_size=100", "trainer.max_epochs=1", *untested, *few)
    assert "cached features: 300 train + 500 val images, 1 MB in" in capsys.readouterr().out
    trained = json.loads((tmp_path / "runs/test/run/summary.json").read_text())
    monkeypatch.setattr("thaw.freezing.cache.VERIFIED", {})  # as in another process
    monkeypatch.setattr("thaw.evaluation.probes.SIMILARITIES", 100_000)  # two batches of queries
    monkeypatch.setattr("thaw.run.console.LINE_SECONDS", 0)
    summary = probe(tmp_path / "knn", "probe=knn", "probe.k=[1, 5]", *few)
    printed = capsys.readouterr().out
    assert re.search(r"cached features: 300 train \+ 500 val images, 1 MB in \S+ \(reused\)", printed)
    assert re.search(r"^neighbours of validation images: \d+ of 500 images, about \d+ s left$", printed, re.MULTILINE)
    assert "k = 5        val/acc" in printed and "the best of 2 on validation" in printed
    assert set(trained) - {"training"} <= set(summary)
    assert summary["test/acc"] > 0.9 and summary["val/acc"] > 0.9 and summary["n_test"] == 500
    assert summary["chosen"]["k"] in (1, 5) and [job["k"] for job in summary["candidates"]] == [1, 5]
    assert (summary["backbone"], summary["weights"]) == ("digits_vit", "bundled")
    assert summary["trainable_params"] == 0


def test_logistic_regression_on_pixels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without a model the features are computed, not cached; test=false leaves the test split alone."""
    where = f"cache.dir={tmp_path / 'cache'}"
    monkeypatch.setattr("thaw.run.console.LINE_SECONDS", 0)
    regression = ["probe=logistic_regression", "probe.C=[1e-2, 2e-2]"]
    summary = probe(tmp_path / "run", *regression, "backbone=pixels", where, *FEW)
    assert summary["test/acc"] > 0.7 and summary["trainable_params"] == 7850 == summary["total_params"]
    assert not (tmp_path / "cache").exists()
    assert "logistic regression: 1 of 2 fits, about" in capsys.readouterr().out
    summary = probe(tmp_path / "untested", "probe=knn", "backbone=pixels", "test=false", where, *FEW)
    assert summary["test/acc"] is None and "of test images" not in capsys.readouterr().out


def test_probe_of_a_checkpoint(train: Callable[..., Path], tmp_path: Path) -> None:
    """The features are those of the trained backbone in eval mode, on the data it was trained on."""
    where = f"cache.dir={tmp_path / 'cache'}"
    small = ["backbone=mlp", "backbone.hidden=[64]", "backbone.dropout=0.5", "freeze=full", "test=false"]
    run_dir = train(*small, *FEW, "data.batch_size=50", "trainer.max_epochs=3", "logger=csv")
    summary = probe(tmp_path / "probe", f"ckpt={run_dir}", "data.train_size=300", "probe.k=[1, 7]", where, FEW[-1])
    assert summary["checkpoint"] == summary["weights"] == str(run_dir / "checkpoints" / "best.ckpt")
    assert (summary["data_source"], summary["n_train"], summary["backbone"]) == (SAMPLE, 300, "mlp")
    model = load_model(read_checkpoint(run_dir / "checkpoints" / "best.ckpt"))
    digits = load_mnist("MNIST", "data", "sample", None)
    with torch.no_grad():
        train_split, val = (
            Labelled(model.backbone(model.preprocess(images)), labels)
            for images, labels in ((part[:300] for part in digits.train), digits.val)
        )
    expected = knn(train_split, val, k=[1, 7], **KNN | {"vote": "weighted"})
    assert [job["val/acc"] for job in summary["candidates"]] == list(expected.candidates.values())
    with pytest.raises(ValueError, match=r"brings its own backbone; leave out backbone.image_size, or ckpt"):
        probe(tmp_path / "wrong", f"ckpt={run_dir}", "backbone.image_size=56")


def test_several_processes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"trainer.devices=2: a probe runs on one"):
        probe(tmp_path, "trainer=ddp_cpu", "backbone=pixels", *FEW)


def test_sweep_of_two_jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Each job of a multirun writes a summary into its own folder."""
    GlobalHydra.instance().clear()
    jobs = ["-m", "probe=knn,logistic_regression", "backbone=pixels", f"hydra.sweep.dir={tmp_path}", *FEW]
    monkeypatch.setattr("sys.argv", ["probe.py", "--config-path", str(ROOT / "configs"), *jobs])
    import_module("probe").main()
    summaries = [json.loads((tmp_path / job / "summary.json").read_text()) for job in ("0", "1")]
    assert [(summary["probe"], summary["name"]) for summary in summaries] == [(name, name) for name in PROBES]
    assert all(summary["test/acc"] > 0.7 for summary in summaries)
    assert capsys.readouterr().out.count("95 % interval") == 2
    assert "probe=knn" in summaries[0]["overrides"]
