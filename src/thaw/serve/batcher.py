"""Dynamic batching: a few threads run the model, and what arrives while all are busy is their next batch.

Nothing waits for a batch to fill. An idle server answers one digit at once; under load batches grow by themselves. On a
CPU a thread for each core, with a batch of its own, does more than all cores on one batch: no core waits for another.
Digits are numpy's until they are a batch: a call into torch gives Python's lock away, and on the event loop's thread it
would wait for the model's to get it back.
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
from typing import NamedTuple

import numpy as np
import torch

from thaw.predict.predictor import DigitModel
from thaw.serve.limits import RefusedError

log = logging.getLogger(__name__)


class Answer(NamedTuple):
    """Of N digits: probabilities (N, C), and where the model looked (N, h, w) if that was asked for."""

    probabilities: list[list[float]]
    attention: list[list[list[float]]] | None


class Job:
    """The digits of one request.

    Attributes:
        taken: how many of them went into batches so far.
        parts: the answers to these, as far as they are known, by the place of their first digit.
    """

    def __init__(self, images: np.ndarray, explain: bool, answer: asyncio.Future[Answer]) -> None:
        self.images, self.explain, self.answer = images, explain, answer
        self.taken, self.parts = 0, dict[int, Answer]()

    @property
    def is_answered(self) -> bool:
        return sum(len(part.probabilities) for part in self.parts.values()) == len(self.images)

    def whole(self) -> Answer:
        """The parts as one, in the order of the images."""
        parts = [self.parts[start] for start in sorted(self.parts)]
        if len(parts) == 1:
            return parts[0]
        attention = None
        if parts[0].attention is not None:
            attention = [image for part in parts for image in part.attention or ()]
        return Answer([row for part in parts for row in part.probabilities], attention)


Piece = tuple[Job, slice]


class Batcher:
    """Answers requests of any size with batches of at most `max_batch` digits.

    A request that does not fit one batch goes to the end of the queue after each: a big one delays a small one by one
    batch. Workers that are idle share what waits.

    Args:
        model: may be called by several threads at once.
        max_batch, max_queue: digits in a batch, and waiting.
        workers: threads that run the model, each on one core.
        told: called with the size and the seconds of each batch, on a worker's thread.
    """

    def __init__(
        self, model: DigitModel, max_batch: int, max_queue: int, workers: int, told: Callable[[int, float], None]
    ) -> None:
        self.model, self.max_batch, self.max_queue = model, max_batch, max_queue
        self.told = told
        self.queue: deque[Job] = deque()
        self.waiting = 0  # digits in the queue
        self.changed = threading.Condition()
        self.closing = False
        self.idle = 0  # workers that wait for a batch
        self.batches_started: dict[int, float] = {}  # of each worker that runs one
        self.seconds_per_image = 0.0  # of one worker
        self.attending = threading.Lock()  # recording attention changes the model for as long as it lasts
        self.workers = [
            threading.Thread(target=self.work, args=(n,), name=f"model {n}", daemon=True) for n in range(workers)
        ]
        for worker in self.workers:
            worker.start()

    @property
    def is_alive(self) -> bool:
        return all(worker.is_alive() for worker in self.workers)

    async def predict(self, images: np.ndarray, explain: bool) -> Answer:
        """uint8 (N, 28, 28) -> the answer; a cancelled caller's digits leave the queue.

        Raises:
            RefusedError: the queue has no room.
        """
        job = Job(images, explain, asyncio.get_running_loop().create_future())
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
        """Seconds until what waits now will be done, at the recent speed."""
        return max(1, math.ceil(self.waiting * self.seconds_per_image / len(self.workers)))

    @property
    def stuck(self) -> float:
        """Seconds that the longest running batch has taken so far."""
        now = time.monotonic()
        return max((now - started for started in list(self.batches_started.values())), default=0.0)

    def drop(self, job: Job) -> None:
        with self.changed:
            if job in self.queue:
                self.queue.remove(job)
                self.waiting -= len(job.images) - job.taken

    def take(self) -> list[Piece]:
        """The next batch, waited for; nothing when closing and all is answered."""
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
                self.changed.notify()  # another worker has its share of it
            return pieces

    def work(self, number: int) -> None:
        torch.set_num_threads(1)  # counts for this thread: OpenMP has a team for each that calls it
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
            with contextlib.suppress(RuntimeError):  # the event loop was closed: nobody waits any more
                pieces[0][0].answer.get_loop().call_soon_threadsafe(self.deliver, pieces, answers)

    def compute(self, pieces: list[Piece]) -> list[Answer]:
        """One call of the model for all, and one for the attention of those who want it."""
        images = torch.from_numpy(np.concatenate([job.images[piece] for job, piece in pieces]))  # (N, 28, 28)
        probabilities = self.model(images)  # (N, C)
        if not probabilities.isfinite().all():
            raise FloatingPointError("the model's probabilities are not finite")
        rows = iter(probabilities.tolist())
        explained = [job.images[piece] for job, piece in pieces if job.explain and self.model.has_attention]
        shares: list[list[list[float]]] = []
        if explained:
            with self.attending:
                shares = self.model.attention(torch.from_numpy(np.concatenate(explained))).tolist()  # (N, h, w)
        maps = iter(shares)
        answers = []
        for job, piece in pieces:
            count = piece.stop - piece.start
            attention = list(islice(maps, count)) if job.explain and self.model.has_attention else None
            answers.append(Answer(list(islice(rows, count)), attention))
        return answers

    def deliver(self, pieces: list[Piece], answers: list[Answer] | Exception) -> None:
        """On the event loop: give each request its part, and its answer after the last one."""
        for place, (job, piece) in enumerate(pieces):  # of a request that failed the other parts go nowhere
            if job.answer.done():
                continue
            if isinstance(answers, Exception):
                self.drop(job)
                job.answer.set_exception(ModelFailedError(str(answers)))
                continue
            job.parts[piece.start] = answers[place]
            if job.is_answered:
                job.answer.set_result(job.whole())

    def close(self, seconds: float) -> None:
        """Answer what waits, then end; at most this long."""
        with self.changed:
            self.closing = True
            self.changed.notify_all()
        stop = time.monotonic() + seconds
        for worker in self.workers:
            worker.join(max(0.0, stop - time.monotonic()))


class ModelFailedError(Exception):
    """The model raised an exception on the batch that a request was in."""
