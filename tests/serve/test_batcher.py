import asyncio
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from thaw.serve.batcher import Answer, Batcher, ModelFailedError
from thaw.serve.refusals import RefusedError


@contextmanager
def batching(model, max_batch: int = 8, max_queue: int = 100) -> Iterator[Batcher]:
    told: list[int] = []
    batcher = Batcher(model, max_batch, max_queue, 1, lambda size, seconds: told.append(size))
    yield batcher
    model.open.set()
    batcher.close(10)
    assert not batcher.is_alive
    assert told == model.batches


def digits(*classes: int) -> np.ndarray:
    images = np.zeros((len(classes), 1, 28, 28), dtype=np.uint8)
    images[:, 0, 0, 0] = classes
    return images


def classes(answer: Answer) -> list[int]:
    return [row.index(1.0) for row in answer.probabilities]


async def until(condition) -> None:
    stop = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < stop
        await asyncio.sleep(0.005)


def test_every_request_gets_its_own_answers_in_order(stand_in) -> None:
    """Requests of 1 to 21 digits, together: batches are full, and each request gets what it asked for."""
    wanted = [torch.randint(0, 10, (size,)).tolist() for size in range(1, 22)]

    async def run() -> list[Answer]:
        with batching(stand_in, max_queue=300) as batcher:
            stand_in.open.clear()
            tasks = [asyncio.create_task(batcher.predict(digits(*some), explain=len(some) % 2 == 0)) for some in wanted]
            await until(lambda: batcher.waiting >= 231 - 8)
            stand_in.open.set()
            return await asyncio.gather(*tasks)

    answers = asyncio.run(run())
    assert [classes(answer) for answer in answers] == wanted
    for some, answer in zip(wanted, answers, strict=True):
        assert answer.attention == ([[[0.25, 0.25], [0.25, 0.25]]] * len(some) if len(some) % 2 == 0 else None)
    assert max(stand_in.batches) == 8
    assert sum(stand_in.batches) == 231
    assert len(stand_in.batches) <= 231 / 8 + 2  # full, but for the first and the last


def test_a_big_request_holds_up_a_small_one_by_one_batch(stand_in) -> None:
    async def run() -> None:
        with batching(stand_in) as batcher:
            stand_in.open.clear()
            big = asyncio.create_task(batcher.predict(digits(*[1] * 80), False))
            await until(lambda: stand_in.batches)
            small = asyncio.create_task(batcher.predict(digits(2), False))
            await asyncio.sleep(0.05)
            stand_in.open.set()
            assert classes(await small) == [2]
            assert classes(await big) == [1] * 80

    asyncio.run(run())
    assert [2 in batch for batch in stand_in.seen].index(True) == 2  # one was running, and one came before it


def test_cancelled_requests_leave_the_queue(stand_in) -> None:
    async def run() -> None:
        with batching(stand_in) as batcher:
            stand_in.open.clear()
            first = asyncio.create_task(batcher.predict(digits(1), False))
            await until(lambda: stand_in.batches)
            gone = asyncio.create_task(batcher.predict(digits(*[5] * 30), False))
            kept = asyncio.create_task(batcher.predict(digits(2), False))
            await until(lambda: batcher.waiting == 31)
            gone.cancel()
            await until(lambda: batcher.waiting == 1)
            first.cancel()  # in the model already: its batch runs, its answer goes nowhere
            stand_in.open.set()
            assert classes(await kept) == [2]
            assert batcher.waiting == 0

    asyncio.run(run())
    assert stand_in.batches == [1, 1]


def test_a_full_queue_refuses(stand_in) -> None:
    async def run() -> None:
        with batching(stand_in, max_queue=10) as batcher:
            batcher.seconds_per_image = 0.5
            stand_in.open.clear()
            first = asyncio.create_task(batcher.predict(digits(1), False))
            await until(lambda: stand_in.batches)
            waiting = asyncio.create_task(batcher.predict(digits(*range(7)), False))
            await until(lambda: batcher.waiting == 7)
            with pytest.raises(RefusedError, match="7 of at most 10 images are waiting, no room for 4 more") as refused:
                await batcher.predict(digits(*range(4)), False)
            assert (refused.value.status, refused.value.retry_after) == (503, 4)  # 7 x 0.5 s
            fits = asyncio.create_task(batcher.predict(digits(1, 2, 3), False))
            await until(lambda: batcher.waiting == 10)
            stand_in.open.set()
            await asyncio.gather(first, waiting, fits)

    asyncio.run(run())


def test_requests_one_after_another(stand_in) -> None:
    """An idle batcher goes on, and knows its speed: the first batch's, to which each later one adds a fifth."""
    told: list[float] = []  # seconds an image

    async def run() -> float:
        batcher = Batcher(stand_in, 8, 100, 1, lambda size, seconds: told.append(seconds / size))
        assert all(worker.daemon for worker in batcher.workers)  # a model that hangs does not keep the process
        for count in (1, 4, 8):
            assert classes(await batcher.predict(digits(*range(count)), False)) == [*range(count)]
            await until(lambda: batcher.idle)
        batcher.close(10)
        return batcher.seconds_per_image

    seconds = asyncio.run(run())
    assert max(told) < 60
    assert seconds == pytest.approx(0.8 * (0.8 * told[0] + 0.2 * told[1]) + 0.2 * told[2])


def test_when_to_try_again(stand_in) -> None:
    """After the waiting images, at the recent speed of all workers; at least a second."""
    batcher = Batcher(stand_in, 8, 100, 2, lambda size, seconds: None)
    batcher.waiting = 30
    assert batcher.retry_after() == 1, "no batch has told the speed yet"
    batcher.seconds_per_image = 0.5
    assert batcher.retry_after() == 8  # 30 x 0.5 s / 2
    batcher.close(10)


@pytest.mark.parametrize("fault", ["exception", "nan"])
def test_a_failing_model_fails_its_batch_and_goes_on(stand_in, fault: str, monkeypatch) -> None:
    async def run() -> None:
        with batching(stand_in) as batcher:
            stand_in.open.clear()
            first = asyncio.create_task(batcher.predict(digits(1), False))
            await until(lambda: stand_in.batches)
            if fault == "exception":
                stand_in.broken = True
            else:
                monkeypatch.setattr(torch, "eye", lambda size: torch.full((size, size), torch.nan))
            big = asyncio.create_task(batcher.predict(digits(*[5] * 30), False))  # of which no second batch is tried
            await until(lambda: batcher.waiting == 30)
            stand_in.open.set()
            for task in (first, big):
                with pytest.raises(ModelFailedError, match="out of order" if fault == "exception" else "not finite"):
                    await task
            await until(lambda: batcher.waiting == 0)
            stand_in.broken = False
            monkeypatch.undo()
            assert classes(await batcher.predict(digits(3), False)) == [3]

    asyncio.run(run())


def test_who_is_told_of_a_batch(stand_in) -> None:
    """All whose images were in one that failed, the rest of which leave the queue; and those beside one that left."""

    async def run() -> None:
        batcher = Batcher(stand_in, 8, 100, 0, lambda size, seconds: None)  # this test is the worker
        tasks = [asyncio.create_task(batcher.predict(digits(*some), False)) for some in ([1], [5] * 30)]
        await until(lambda: batcher.waiting == 31)
        batcher.deliver(batcher.take(), RuntimeError("out of order"))
        for task in tasks:
            with pytest.raises(ModelFailedError, match="out of order"):
                await asyncio.wait_for(task, 5)
        assert batcher.waiting == 0 and not batcher.queue
        left, stays = [asyncio.create_task(batcher.predict(digits(n), False)) for n in (1, 2)]
        await until(lambda: batcher.waiting == 2)
        pieces = batcher.take()
        left.cancel()
        await asyncio.sleep(0)
        batcher.deliver(pieces, batcher.compute(pieces))
        assert classes(await asyncio.wait_for(stays, 5)) == [2]

    asyncio.run(run())


def test_workers_share_a_request_and_keep_its_order(stand_in) -> None:
    """Two workers at once: neither waits for the other, and parts that end out of order are put in order."""
    first, second = threading.Event(), threading.Event()

    class Slow(type(stand_in)):
        def __call__(self, images: torch.Tensor) -> torch.Tensor:
            (first if images[0, 0, 0, 0] == 0 else second).wait(5)
            return super().__call__(images)

    async def run() -> list[int]:
        batcher = Batcher(Slow(), 64, 100, 2, lambda size, seconds: None)
        await until(lambda: batcher.idle == 2)
        wanted = asyncio.create_task(batcher.predict(digits(*range(10)), True))
        await until(lambda: len(batcher.batches_started) == 2)  # five digits each
        second.set()
        await until(lambda: len(batcher.batches_started) == 1)
        assert not wanted.done()
        first.set()
        answer = await wanted
        await asyncio.to_thread(batcher.close, 10)
        assert len(answer.attention or ()) == 10
        return classes(answer)

    assert asyncio.run(run()) == list(range(10))


def test_close_answers_what_waits(stand_in) -> None:
    async def run() -> list[int]:
        batcher = Batcher(stand_in, 8, 100, 1, lambda size, seconds: None)
        stand_in.open.clear()
        tasks = [asyncio.create_task(batcher.predict(digits(*[4] * 20), False)) for _ in range(3)]
        await until(lambda: batcher.waiting == 52)
        closing = asyncio.create_task(asyncio.to_thread(batcher.close, 10))
        stand_in.open.set()
        await closing
        assert not batcher.is_alive
        return [len(answer.probabilities) for answer in await asyncio.gather(*tasks)]

    assert asyncio.run(run()) == [20, 20, 20]
