"""Models compared on the same N images: a paired test, its correction for several tests, and an interval."""

from collections.abc import Sequence

import numpy as np
from scipy.signal import fftconvolve
from scipy.stats import binom, norm


def sign_flip_test(differences: np.ndarray) -> float:
    """The exact two-sided p-value of paired differences, whole numbers (N,), under random signs (Fisher 1935).

    It is the share of all 2**N choices of signs whose sum is at least as far from 0 as the sum of the differences. The
    differences of one size contribute a binomial number of pluses, so that the distribution of the sum is a convolution
    of a few binomials. Differences of -1, 0 and 1, of two models that are right or wrong, make it McNemar's exact test.
    """
    sizes, counts = np.unique(np.abs(differences[differences != 0]), return_counts=True)
    chances = np.ones(1)  # of each sum of the differences with a plus, from 0 on
    for size, count in zip(sizes.tolist(), counts.tolist(), strict=True):
        own = np.zeros(size * count + 1)
        own[::size] = binom.pmf(np.arange(count + 1), count, 0.5)
        chances = fftconvolve(chances, own)
    sums = 2 * np.arange(len(chances)) - np.abs(differences).sum()
    return float(np.clip(chances[np.abs(sums) >= abs(differences.sum())].sum(), 0, 1))


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values corrected for their number, so that any false alarm among them is as rare as for one (Holm 1979)."""
    order = np.argsort(p_values, kind="stable")
    factors = len(p_values) - np.arange(len(p_values))  # the smallest counts for all, the next for one less
    corrected = np.empty(len(p_values))
    corrected[order] = np.minimum(1, np.maximum.accumulate(factors * np.asarray(p_values, dtype=float)[order]))
    return corrected.tolist()


def difference_interval(differences: np.ndarray, comparisons: int) -> tuple[float, float]:
    """The interval of the mean of paired differences (N,), each from -1 to 1, at 95 % for so many of them together.

    Two more images, half of them different, keep it from vanishing where no images differ (Agresti & Min 2005).
    """
    total = len(differences) + 2
    mean = differences.sum() / total
    spread = np.sqrt(np.square(differences).sum() + 1 - total * mean**2) / total
    reach = norm.isf(0.025 / comparisons) * spread
    return float(mean - reach), float(mean + reach)
