"""What clean.py finds: planted errors, and each of its parts against a naive loop, scikit-learn or cleanlab."""

import csv
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cleanlab.filter import find_label_issues
from cleanlab.outlier import OutOfDistribution
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from thaw.cleaning.label_issues import label_issues, label_scores
from thaw.cleaning.pixels import exposure_issues, pixel_correlation
from thaw.cleaning.probabilities import neighbours, out_of_fold, votes
from thaw.cleaning.search import copies, mean_distance, robust_z
from thaw.data.folds import number_contents
from thaw.data.images import Images
from thaw.data.mnist import load_mnist

RNG = torch.Generator().manual_seed(0)
LABELS = torch.arange(90) % 3
FEATURES = torch.randn(90, 6, generator=RNG) + 2 * torch.nn.functional.one_hot(LABELS, 6)
CLEAN = ["data=arrays", "data.reader=digit", "backbone=pixels", "cache.mode=off"]


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def save(path: Path, **splits: Images) -> str:
    arrays = {f"{split}_images": images.numpy() for split, (images, _) in splits.items()}
    np.savez(path, **arrays, **{f"{split}_labels": labels.numpy() for split, (_, labels) in splits.items()})
    return f"data.path={path}"


def test_planted_errors_are_found(command: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Wrong labels, copies within and between splits, a blank and a bright image, and noise."""
    digits = load_mnist("MNIST", "data", "sample", None)
    parts = (digits.train.take(slice(900)), digits.val.take(slice(100)), digits.test.take(slice(150)))
    train, val, test = (Images(part.images.clone(), part.labels.clone()) for part in parts)
    right = {int((train.labels == n).nonzero()[7]): n for n in (0, 1, 6)}  # usual digits
    train.labels[[*right]] = torch.tensor([(n + 5) % 10 for n in right.values()])
    noise = torch.randint(-3, 4, (1, 28, 28), generator=RNG)
    train.images[500], train.labels[500] = train.images[20], train.labels[20]
    train.images[510], train.labels[510] = (test.images[30] + noise).clamp(0, 255).byte(), test.labels[30]
    train.images[520], train.labels[520] = val.images[40], val.labels[40]
    train.images[530], val.images[50] = 7, 250
    test.images[60] = torch.randint(0, 256, (1, 28, 28), generator=RNG)
    path = save(tmp_path / "digits.npz", train=train, val=val, test=test)
    folder, settings = tmp_path / "found", ["search.label_threshold=0.05", "search.outlier_z=2"]
    assert command("clean.py", *CLEAN, path, *settings, f"hydra.run.dir={folder}") == 0
    rows = rows_of(folder / "findings.csv")
    found = {(row["kind"], row["split"], int(row["index"])): row for row in rows}
    for index, label in right.items():
        row = found["label", "train", index]
        assert row["given_label"] == str((label + 5) % 10) and row["suggested_label"] == str(label)
    likes = {key: row["like"] for key, row in found.items() if key[0] == "duplicate"}
    expected = {500: "train 20", 510: "test 30", 520: "val 40"}
    assert likes == {("duplicate", "train", index): like for index, like in expected.items()}
    assert {("blank", "train", 530), ("blank", "val", 50), ("outlier", "test", 60)} <= set(found)
    for kind in {row["kind"] for row in rows}:
        scores = [float(row["score"]) for row in rows if row["kind"] == kind]
        assert scores == sorted(scores) and rows_of(folder / f"{kind}.csv") == [r for r in rows if r["kind"] == kind]
    summary = json.loads((folder / "clean.json").read_text())
    assert summary["found"]["duplicate"] == {"train": 3} and (folder / "findings.png").stat().st_size > 10_000
    printed = capsys.readouterr().out
    assert f"python train.py data=arrays {path} data.reader=digit data.exclude=" in printed
    assert command("clean.py", *CLEAN, path, "data.train_size=50") == 1
    assert "data.train_size=50: clean.py looks at all images as they are; leave it out" in capsys.readouterr().err
    assert command("clean.py", *CLEAN, path, "views=2", "augment=none", f"hydra.run.dir={tmp_path / 'views'}") == 1
    assert "views=2 needs an augmentation that draws views" in capsys.readouterr().err


def test_without_cleanlab(command: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setitem(sys.modules, "cleanlab.filter", None)
    assert command("clean.py", "data.source=sample") == 1
    assert "clean.py needs cleanlab, which is not installed; run: pip install -e '.[clean]'" in capsys.readouterr().err


def test_probabilities_out_of_fold_are_scikit_learns() -> None:
    """And of two views the mean counts, while the first alone is fitted."""
    fold_of, other = torch.arange(90) // 18, FEATURES + 0.3
    expected = np.zeros((2, 90, 3))
    for fold in range(5):
        held_out = (fold_of == fold).numpy()
        scaler = StandardScaler().fit(FEATURES[~held_out])
        model = LogisticRegression(C=0.1, tol=1e-8).fit(scaler.transform(FEATURES[~held_out]), LABELS[~held_out])
        for number, view in enumerate((FEATURES, other)):
            expected[number, held_out] = model.predict_proba(scaler.transform(view[held_out]))
    ours = [out_of_fold(views, LABELS, fold_of, 3, 0.1).numpy() for views in ([FEATURES], [FEATURES, other])]
    np.testing.assert_allclose(ours[0], expected[0], atol=1e-3)
    np.testing.assert_allclose(ours[1], expected.mean(axis=0), atol=1e-3)


def test_neighbours_and_votes_are_those_of_a_loop() -> None:
    """Of four equal images none is its own neighbour."""
    features = FEATURES.clone()
    features[[10, 20, 30]] = features[0].clone()
    similarities, indices = neighbours(features, features, 2, "some", own=True)
    for at, (found, values) in enumerate(zip(indices.tolist(), similarities.tolist(), strict=True)):
        cosines = torch.nn.functional.cosine_similarity(features, features[at : at + 1])
        cosines[at] = -2
        assert at not in found and values == pytest.approx(sorted(cosines.tolist(), reverse=True)[:2], abs=1e-5)
    similarities, indices = neighbours(FEATURES[:7], FEATURES, 4, "some", own=False)
    assert indices[:, 0].tolist() == list(range(7))
    shares = votes(similarities, LABELS[indices], 3)
    for at in range(7):
        weights = np.exp(similarities[at].double().numpy() / 0.07)
        sums = [weights[(LABELS[indices[at]] == label).numpy()].sum() for label in range(3)]
        np.testing.assert_allclose(shares[at], np.array(sums) / sum(sums), rtol=1e-3, atol=1e-6)


def test_wrong_labels_are_cleanlabs_or_those_below_a_threshold() -> None:
    given = LABELS.clone()
    given[[4, 40, 77]] = (given[[4, 40, 77]] + 1) % 3
    probabilities = out_of_fold([FEATURES], given, torch.arange(90) % 5, 3, 0.1)
    arrays = given.numpy(), probabilities.double().numpy()
    ranked = find_label_issues(*arrays, return_indices_ranked_by="self_confidence")
    assert label_issues(given, probabilities, None).tolist() == ranked.tolist() and {4, 40, 77} & {*ranked.tolist()}
    own = probabilities[torch.arange(90), given]
    np.testing.assert_allclose(label_scores(given, probabilities), own, rtol=1e-6)
    below = [at for at in own.argsort().tolist() if own[at] < 0.3]
    assert label_issues(given, probabilities, 0.3).tolist() == below
    ones = torch.ones(90, dtype=torch.long)
    others = [at for at in probabilities[:, 1].argsort().tolist() if probabilities[at].argmax() != 1]
    assert label_issues(ones, probabilities, None).tolist() == others and len(others) > 50


def test_distances_order_images_as_cleanlabs_score_of_outliers_does() -> None:
    similarities, _ = neighbours(FEATURES, FEATURES, 10, "some", own=True)
    distances = mean_distance(similarities)
    theirs = OutOfDistribution({"k": 10}).fit_score(features=FEATURES.numpy(), verbose=False)  # cosine above 3 columns
    np.testing.assert_array_equal(distances.argsort(descending=True), np.argsort(theirs, kind="stable"))
    z = robust_z(torch.tensor([1.0, 10.0]), torch.tensor([0.1, 1.0, 1.0, 10.0, 10.0, 0.1, 1.0]).log10().exp())
    assert z[0] == 0 and z[1] > 1


def test_copies_are_those_of_a_loop() -> None:
    images = torch.randint(0, 256, (9, 3, 4, 4), dtype=torch.uint8, generator=RNG)
    images[4], images[7] = images[1], (images[2] * 0.5).byte()
    images[6] = images[1] + (images[1] < 128)
    places = [("train", n) for n in range(5)] + [("val", 0), ("val", 1), ("test", 0), ("test", 1)]
    near = torch.tensor([[other for other in range(9) if other != at] for at in range(9)])
    found = {at: like for at, like, _ in copies(images, places, number_contents(images), near, least=0.99)}
    assert found == {1: 6, 4: 1, 2: 7}  # the test or validation image is the original; equal bytes before similar ones
    pairs = torch.tensor([[0, 3], [2, 7], [1, 6]])
    expected = [np.corrcoef(images[one].flatten(), images[two].flatten())[0, 1] for one, two in pairs.tolist()]
    ours = pixel_correlation(images[pairs[:, 0]], images[pairs[:, 1]])
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-6)


def test_exposure() -> None:
    images = torch.randint(60, 200, (6, 3, 20, 20), dtype=torch.uint8, generator=RNG)
    images[1], images[2], images[4] = 90, images[2] // 6, 255 - images[4] // 6
    images[5] = 0
    images[5, :, :4] = 200  # mostly dark, as digits are
    assert [(at, kind) for at, kind, _ in exposure_issues(images)] == [(1, "blank"), (2, "dark"), (4, "bright")]
    assert all(0 <= score < 0.2 for _, _, score in exposure_issues(images))
