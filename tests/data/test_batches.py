"""Computing in batches, and images that stand for all."""

import pytest
import torch

from thaw.data.batches import by_batches, evenly_spread


def test_batches_give_what_all_images_at_once_give() -> None:
    images, sizes = torch.randint(0, 256, (7, 1, 28, 28), dtype=torch.uint8), []

    def compute(batch: torch.Tensor) -> torch.Tensor:
        sizes.append(len(batch))
        return batch.float().mean(dim=(1, 2))

    assert torch.equal(by_batches(compute, images, 3), compute(images))
    assert sizes == [3, 3, 1, 7]


def test_progress_of_batches(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("thaw.run.console.LINE_SECONDS", 0)
    by_batches(torch.neg, torch.arange(10), 4)
    assert not capsys.readouterr().out
    by_batches(torch.neg, torch.arange(10), 4, title="negating")
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("negating: 4 of 10 images, about") and second.startswith("negating: 8 of 10 images")


def test_evenly_spread() -> None:
    assert evenly_spread(500, None).tolist() == evenly_spread(500, 900).tolist() == list(range(500))
    chosen = evenly_spread(10_000, 1000)
    assert len(chosen.unique()) == 1000 and chosen[0] == 0 and chosen[-1] == 9999
    assert evenly_spread(100, 5).tolist() == [0, 25, 50, 74, 99]
