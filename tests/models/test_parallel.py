"""Forward passes in several threads against the same pass in one."""

import threading
from collections.abc import Callable, Iterator

import lightning as L
import pytest
import torch
from torch import Tensor

from thaw.models.backbone import Backbone
from thaw.models.parallel import forward_in_threads, forward_threads, map_in_threads


@pytest.fixture(autouse=True)
def two_cores() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def trainer(precision: str = "bf16-mixed") -> L.Trainer:
    return L.Trainer(accelerator="cpu", devices=1, precision=precision, logger=False, enable_checkpointing=False)


def test_outputs_come_in_order_and_do_not_pile_up() -> None:
    ready, together = [0], threading.Barrier(2, timeout=60)  # breaks where one thread computes alone

    def compute(item: int) -> tuple[int, int]:
        together.wait()
        ready[0] += 1
        return item, torch.get_num_threads()

    for item, (output, cores) in enumerate(map_in_threads(compute, range(10), 2)):
        assert (output, cores) == (item, 1)
        assert ready[0] <= item + 4
    assert item == 9 and torch.get_num_threads() == 2
    seen: list[int] = []
    later = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    later.start()
    later.join()
    assert seen == [2]


def test_an_error_in_a_thread_is_raised() -> None:
    with pytest.raises(ZeroDivisionError):
        list(map_in_threads(lambda item: 1 / item, [1, 0, 1, 1, 1], 2))
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize("precision", ["bf16-mixed", "32-true"])
def test_a_batch_in_two_threads_is_the_batch_in_one(backbone: Callable[..., Backbone], precision: str) -> None:
    model, images, one = backbone(), torch.randn(37, 1, 28, 28), trainer(precision)
    threads: set[int] = set()

    def forward(part: Tensor) -> Tensor:
        threads.add(threading.get_ident())
        return model(part)

    with torch.no_grad(), one.precision_plugin.forward_context():
        expected = model(images)
    features = forward_in_threads(forward, images, one)
    torch.testing.assert_close(features, expected, rtol=1e-6, atol=1e-6)
    assert threading.get_ident() not in threads and not features.requires_grad


def test_where_one_thread_computes() -> None:
    assert forward_threads(trainer()) == 2
    assert forward_threads(trainer("bf16-true")) == 1  # torch's default type is one of the process
    torch.set_num_threads(1)
    assert forward_threads(trainer()) == 1
