"""Dynamic batching: threads run the model, and requests that arrive while all are busy are the next batch.

No request waits for a batch to fill. An idle server answers one image at once; under load batches grow by themselves.
On a CPU one thread for each core, each with its own batch, does more than all cores on one batch: no core waits for
another. Requests are numpy arrays until they are a batch: a call into torch releases Python's lock, and the event loop
would then wait for the model's thread to get it back. The batcher is our own: those of Triton, BentoML and Ray Serve
come with a server of their own.
"""

import asyncio
import contextlib
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch

from thaw.predict.predictor import ImageModel
from thaw.serve.refusals import RefusedError

log = logging.getLogger(__name__)


class Answer(NamedTuple):
    """For N images: probabilities (N, C), and if asked for each patch's share (N, h, w) in what the head sees."""

    probabilities: list[list[float]]
    attention: list[list[list[float]]] | None


class QueuedRequest:
    """The images of one request; `taken` of them are in batches so far, `missing` have no answer yet."""

    def __init__(self, images: np.ndarray, explain: bool, answer: asyncio.Future[Answer]) -> None:
        self.images, self.explain, self.answer = images, explain, answer
        self.taken, self.missing = 0, len(images)
        self.parts = Answer([[]] * len(images), [[]] * len(images) if explain else None)


Piece = tuple[QueuedRequest, slice]


class Batcher:
    """Answers requests of any size with batches of at most `max_batch` images.

    A request that does not fit into a batch goes back to the end of the queue, so that a big one delays a small one by
    one batch. Idle workers share the waiting images.

    Args:
        model: may be called by several threads at once.
        max_batch, max_queue: images in a batch, and waiting.
        workers: threads that run the model, each on one core.
        told: called with the size and the seconds of each batch, on a worker's thread.
    """

    def __init__(
        self, model: ImageModel, max_batch: int, max_queue: int, workers: int, told: Callable[[int, float], None]
    ) -> None:
        self.model, self.max_batch, self.max_queue = model, max_batch, max_queue
        self.told = told
        self.queue: deque[QueuedRequest] = deque()
        self.waiting = 0  # images in the queue
        self.changed = threading.Condition()
        self.closing = False
        self.idle = 0  # workers that wait for a batch
        self.batches_started: dict[int, float] = {}  # by busy worker
        self.seconds_per_image = 0.0  # of one worker
        self.attending = threading.Lock()  # recording attention changes the model while it lasts
        self.workers = [
            threading.Thread(target=self.work, args=(n,), name=f"model {n}", daemon=True) for n in range(workers)
        ]
        for worker in self.workers:
            worker.start()

    @property
    def is_alive(self) -> bool:
        return all(worker.is_alive() for worker in self.workers)

    async def predict(self, images: np.ndarray, explain: bool) -> Answer:
        """uint8 (N, C, H, W) -> the answer; if the caller is cancelled, its images leave the queue.

        Raises:
            RefusedError: the queue has no room.
        """
        explain = explain and self.model.has_attention
        job = QueuedRequest(images, explain, asyncio.get_running_loop().create_future())
        with self.changed:
            if self.waiting + len(images) > self.max_queue:
                raise RefusedError(
                    503,
                    f"{self.waiting:,} of at most {self.max_queue:,} images are waiting, no room for {len(images):,} "
                    "more; try again later.",
                    self.retry_after(),
                )
            self.queue.append(job)
            self.waiting += len(images)
            self.changed.notify()
        try:
            return await job.answer
        except asyncio.CancelledError:
            self.drop(job)
            raise

    def retry_after(self) -> int:
        """Seconds until the waiting images will be done, at the recent speed."""
        return max(1, math.ceil(self.waiting * self.seconds_per_image / len(self.workers)))

    @property
    def stuck(self) -> float:
        """Seconds that the longest running batch has taken so far."""
        now = time.monotonic()
        return max((now - started for started in list(self.batches_started.values())), default=0.0)

    def drop(self, job: QueuedRequest) -> None:
        with self.changed:
            if job in self.queue:
                self.queue.remove(job)
                self.waiting -= len(job.images) - job.taken

    def take(self) -> list[Piece]:
        """Wait for the next batch; it is empty when the batcher closes and the queue is empty."""
        with self.changed:
            self.idle += 1
            self.changed.wait_for(lambda: self.queue or self.closing)
            pieces: list[Piece] = []
            room = min(self.max_batch, math.ceil(self.waiting / self.idle))
            self.idle -= 1
            while self.queue and room:
                job = self.queue.popleft()
                stop = min(job.taken + room, len(job.images))
                pieces.append((job, slice(job.taken, stop)))
                room -= stop - job.taken
                self.waiting -= stop - job.taken
                job.taken = stop
            if pieces and job.taken < len(job.images):
                self.queue.append(job)
            if self.queue:
                self.changed.notify()  # another worker takes its share
            return pieces

    def work(self, number: int) -> None:
        torch.set_num_threads(1)  # for this thread: OpenMP has a team of threads for each caller
        while pieces := self.take():
            started = self.batches_started[number] = time.monotonic()
            answers: list[Answer] | Exception
            try:
                answers = self.compute(pieces)
            except Exception as error:
                log.exception("the model failed on a batch of %d requests", len(pieces))
                answers = error
            seconds, size = time.monotonic() - started, sum(piece.stop - piece.start for _, piece in pieces)
            del self.batches_started[number]
            self.seconds_per_image += (seconds / size - self.seconds_per_image) * (0.2 if self.seconds_per_image else 1)
            self.told(size, seconds)
            with contextlib.suppress(RuntimeError):  # the event loop is closed: nobody waits any more
                pieces[0][0].answer.get_loop().call_soon_threadsafe(self.deliver, pieces, answers)

    def compute(self, pieces: list[Piece]) -> list[Answer]:
        """One call of the model for all pieces, and one for the attention of the requests that ask for it."""
        images = torch.from_numpy(np.concatenate([job.images[piece] for job, piece in pieces]))  # (N, C, H, W)
        probabilities = self.model(images)  # (N, C)
        if not probabilities.isfinite().all():
            raise FloatingPointError("the model's probabilities are not finite")
        rows, maps = iter(probabilities.tolist()), iter(list[Any]())
        if explained := [job.images[piece] for job, piece in pieces if job.explain]:
            with self.attending:
                maps = iter(self.model.attention(torch.from_numpy(np.concatenate(explained))).tolist())  # (N, h, w)
        counts = [(job.explain, piece.stop - piece.start) for job, piece in pieces]
        return [Answer(list(islice(rows, n)), list(islice(maps, n)) if explain else None) for explain, n in counts]

    def deliver(self, pieces: list[Piece], answers: list[Answer] | Exception) -> None:
        """On the event loop: give each request its part, and its answer after the last one."""
        for place, (job, piece) in enumerate(pieces):
            if job.answer.done():  # cancelled, or failed with an earlier part
                continue
            if isinstance(answers, Exception):
                self.drop(job)
                job.answer.set_exception(ModelFailedError(str(answers)))
                continue
            job.parts.probabilities[piece] = answers[place].probabilities
            if job.parts.attention is not None:
                job.parts.attention[piece] = answers[place].attention or []
            job.missing -= piece.stop - piece.start
            if not job.missing:
                job.answer.set_result(job.parts)

    def close(self, seconds: float) -> None:
        """Answer the waiting requests, then end; takes at most so many seconds."""
        with self.changed:
            self.closing = True
            self.changed.notify_all()
        stop = time.monotonic() + seconds
        for worker in self.workers:
            worker.join(max(0.0, stop - time.monotonic()))


class ModelFailedError(Exception):
    """The model raised an exception on the batch with this request."""
