from itertools import product

import numpy as np
import pytest
import torch
from scipy.stats import false_discovery_control, permutation_test

from thaw.evaluation.metrics import mcnemar
from thaw.evaluation.paired import difference_interval, holm, sign_flip_test


@pytest.mark.parametrize("images", [1, 7, 200, 5000])
def test_with_one_seed_each_it_is_mcnemars_exact_test(images: int) -> None:
    rng = np.random.default_rng(images)
    first, second = rng.random(images) < 0.9, rng.random(images) < 0.88
    *_, p_value = mcnemar(torch.tensor(first), torch.tensor(second))
    assert sign_flip_test(first.astype(int) - second.astype(int)) == pytest.approx(p_value, rel=1e-6)


def test_it_counts_all_choices_of_signs() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        differences = rng.integers(-3, 4, size=9)
        sums = [abs(np.dot(signs, differences)) for signs in product((-1, 1), repeat=9)]
        share = np.mean(np.array(sums) >= abs(differences.sum()))
        assert sign_flip_test(differences) == pytest.approx(share)
    exact = permutation_test((differences,), np.sum, permutation_type="samples", n_resamples=np.inf)
    assert sign_flip_test(differences) == pytest.approx(exact.pvalue)
    assert sign_flip_test(np.zeros(5, dtype=int)) == 1.0
    assert sign_flip_test(np.ones(60, dtype=int)) == pytest.approx(2 * 0.5**60, abs=1e-15)


def test_false_alarms_are_as_rare_as_they_should_be() -> None:
    """Three seeds of each of two equally good policies, on images of different difficulty."""
    rng = np.random.default_rng(0)
    alarms = []
    for _ in range(600):
        chance = rng.beta(4, 1, size=(300, 1))  # that a model of either policy is right
        first, second = ((rng.random((300, 3)) < chance).sum(axis=1) for _ in range(2))
        alarms.append(sign_flip_test(first - second) < 0.05)
    assert 0.03 < np.mean(alarms) < 0.07


def test_holm_corrects_as_published_and_rejects_step_by_step() -> None:
    # p.adjust(c(0.01, 0.02, 0.03, 0.04, 0.05), "holm") of R
    assert holm([0.01, 0.02, 0.03, 0.04, 0.05]) == pytest.approx([0.05, 0.08, 0.09, 0.09, 0.09])
    assert holm([0.04]) == [0.04] and holm([]) == [] and holm([0.9, 0.8]) == [1.0, 1.0]
    rng = np.random.default_rng(0)
    for _ in range(50):
        p_values = rng.random(6) ** 3
        rejected = set()
        for place, which in enumerate(np.argsort(p_values)):
            if p_values[which] > 0.05 / (6 - place):  # Holm's procedure ends at the first that is kept
                break
            rejected.add(int(which))
        corrected = holm(p_values.tolist())
        assert {which for which, value in enumerate(corrected) if value <= 0.05} == rejected
        assert all(np.array(corrected) >= false_discovery_control(p_values) - 1e-12)  # which is more lenient


def test_an_interval_covers_the_difference() -> None:
    low, high = difference_interval(np.zeros(100), 1)
    assert -0.03 < low < 0 < high < 0.03  # though no images differ
    rng = np.random.default_rng(0)
    covered = []
    for _ in range(1000):
        shares = rng.choice([-1.0, 0.0, 1.0], size=400, p=[0.04, 0.9, 0.06])
        low, high = difference_interval(shares, 1)
        wide_low, wide_high = difference_interval(shares, 10)
        covered.append(low <= 0.02 <= high)
        assert wide_low < low < high < wide_high
    assert 0.93 < np.mean(covered) < 0.97
