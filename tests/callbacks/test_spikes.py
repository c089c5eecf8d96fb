"""Spikes of the gradient norm against a naive loop, however the steps are read."""

import statistics

import torch

from thaw.callbacks.spikes import FEWEST, TIMES, WINDOW, Spikes


def naive(norms: list[float]) -> list[int]:
    """Steps, from 1, whose norm is more than `TIMES` the highest median so far."""
    spikes, usual = [], 0.0
    for place, norm in enumerate(norms):
        before = [each for each in norms[max(0, place - WINDOW) : place] if each != float("inf")]
        if len(before) < FEWEST:
            continue
        usual = max(usual, statistics.median_low(before))
        if norm != float("inf") and norm > TIMES * usual:
            spikes.append(place + 1)
    return spikes


def test_spikes_are_those_of_a_loop() -> None:
    generator = torch.Generator().manual_seed(0)
    norms = torch.randn(2, 400, generator=generator).exp()
    norms[0, [3, 50, 51, 250]] *= 300
    norms[1] *= torch.linspace(1, 0, 400).exp()
    norms[1, [30, 31]] = torch.inf  # steps that a loss scaler skips
    expected = [naive(each.tolist()) for each in norms]
    assert len(expected[0]) >= 3 and 51 in expected[0]
    spikes, step = Spikes(2), 0
    for size in (1, 7, 150, 30, 212):  # as they are read when something is logged
        step += size
        spikes.add(norms[:, step - size : step].T, step)
    assert step == 400
    assert spikes.count.tolist() == [len(each) for each in expected]
    assert spikes.first.tolist() == [each[0] if each else 0 for each in expected]
    assert spikes.facts(0)["largest_spike"] > TIMES


def test_tiny_gradients_late_in_training_make_no_spikes_of_hard_images() -> None:
    norms = torch.cat([torch.full((100,), 2.0), torch.full((300,), 0.001)])
    norms[350] = 1.5
    spikes = Spikes(1)
    spikes.add(norms[:, None], 400)
    assert spikes.facts(0) == {"gradient_spikes": 0, "first_spike": None, "largest_spike": None}
    assert Spikes(1).facts(0) == {}  # nothing was compared
