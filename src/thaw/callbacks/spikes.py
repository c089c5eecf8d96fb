"""Gradient norms that stick out of a run, found as they come."""

from typing import Any

import torch
from torch import Tensor

WINDOW = 100  # steps whose median a norm is compared with
FEWEST = 20  # steps before the first comparison
TIMES = 10.0  # a spike is more than so many times the median


class Spikes:
    """Counts the steps whose gradient norm is more than `TIMES` the usual one, for each of G series of norms.

    The usual norm is the median of the last `WINDOW` steps, or the highest such median so far if that is more: late in
    training most gradients are tiny, and that of one hard image among them does no harm.

    Norms that are not finite are left out: the loss scaler of trainer.precision=16-mixed skips these steps.

    Attributes:
        count: spikes of each series (G,).
        first: the step of the first one, counted from 1; 0 if there is none (G,).
        most: how many times the usual norm the largest one is; 0 if there is none (G,).
    """

    def __init__(self, series: int) -> None:
        self.recent = torch.zeros(0, series)
        self.usual = torch.zeros(series)  # the highest median so far
        self.count, self.first = (torch.zeros(series, dtype=torch.long) for _ in range(2))
        self.most = torch.zeros(series)

    def add(self, norms: Tensor, step: int) -> None:
        """Norms of consecutive steps (S, G), the last of which is `step`."""
        norms = norms.where(norms.isfinite(), torch.nan)
        known, steps = len(self.recent), len(norms)
        padding = torch.full((WINDOW - known, norms.shape[1]), torch.nan)
        series = torch.cat([padding, self.recent, norms])  # (WINDOW + S, G)
        before = series.unfold(0, WINDOW, 1)[:steps]  # (S, G, WINDOW): the steps before each
        enough = before.isfinite().sum(dim=2) >= FEWEST
        medians = before.nanmedian(dim=2).values.where(enough, 0)
        usual = torch.cat([self.usual[None], medians]).cummax(dim=0).values[1:]  # (S, G)
        times = (norms / usual).where(enough & (usual > 0), 0).nan_to_num()
        spikes = times > TIMES
        numbers = torch.arange(step - steps + 1, step + 1)[:, None]
        earliest = numbers.where(spikes, step + 1).min(dim=0).values
        self.first = self.first.where((self.first > 0) | ~spikes.any(dim=0), earliest)
        self.count += spikes.sum(dim=0)
        self.most = torch.maximum(self.most, times.where(spikes, 0).max(dim=0).values)
        self.usual, self.recent = usual[-1], series[-WINDOW:][-(known + steps) :].clone()

    def facts(self, series: int) -> dict[str, Any]:
        """Of one series, as values of JSON; None where no step was compared."""
        if not self.usual[series]:
            return {}
        count = int(self.count[series])
        return {
            "gradient_spikes": count,
            "first_spike": int(self.first[series]) if count else None,
            "largest_spike": round(float(self.most[series]), 1) if count else None,
        }
