"""The numbers of a step are those of torch.manual_seed with a seed of (seed, epoch, batch, rank)."""

from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from numpy.random import SeedSequence

from thaw.callbacks.step_seed import StepSeed


def drawn(seed: int, epoch: int, batch: int, rank: int, device: str = "cpu") -> list[float]:
    trainer: Any = SimpleNamespace(current_epoch=epoch, global_rank=rank)
    module: Any = SimpleNamespace(device=torch.device(device))
    StepSeed(seed).on_train_batch_start(trainer, module, None, batch)
    return torch.rand(3).tolist()


def test_numbers_are_those_of_manual_seed() -> None:
    seen = []
    for place in product((0, 7), (0, 1), (0, 3), (0, 1)):
        got = drawn(*place)
        torch.manual_seed(int(SeedSequence(place).generate_state(1)[0]))
        assert got == torch.rand(3).tolist() == drawn(*place)
        seen.append(tuple(got))
    assert len(set(seen)) == 16  # other numbers for each


def test_the_device_is_seeded_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    seeds: list[int] = []
    monkeypatch.setattr("torch.cuda.manual_seed", seeds.append)
    on_gpu = drawn(1, 2, 3, 4, "cuda")
    assert seeds == [int(SeedSequence((1, 2, 3, 4)).generate_state(1)[0])]
    assert on_gpu == drawn(1, 2, 3, 4) and len(seeds) == 1
