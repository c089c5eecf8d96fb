"""Dynamic batching: one thread runs the model, and what arrives meanwhile is its next batch.

Nothing waits for a batch to fill. An idle server answers one digit at once; under load batches grow by themselves.
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

from thaw.predictor import DigitModel
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
        parts: the answers to these, as far as they are known.
    """

    def __init__(self, images: np.ndarray, explain: bool, answer: asyncio.Future[Answer]) -> None:
        self.images, self.explain, self.answer = images, explain, answer
        self.taken, self.parts = 0, list[Answer]()

    def whole(self) -> Answer:
        """The parts as one, in the order of the images."""
        if len(self.parts) == 1:
            return self.parts[0]
        attention = None
        if self.parts[0].attention is not None:
            attention = [image for part in self.parts for image in part.attention or ()]
        return Answer([row for part in self.parts for row in part.probabilities], attention)


Piece = tuple[Job, slice]


class Batcher:
    """Answers requests of any size with batches of at most `max_batch` digits.

    A request that does not fit one batch goes to the end of the queue after each: a big one delays a small one by one
    batch.

    Args:
        model: called by one thread only.
        max_batch, max_queue: digits in a batch, and waiting.
        threads: that the model computes with.
        told: called with the size and the seconds of each batch, on the model's thread.
    """

    def __init__(
        self, model: DigitModel, max_batch: int, max_queue: int, threads: int, told: Callable[[int, float], None]
    ) -> None:
        self.model, self.max_batch, self.max_queue = model, max_batch, max_queue
        self.threads, self.told = threads, told
        self.queue: deque[Job] = deque()
        self.waiting = 0  # digits in the queue
        self.changed = threading.Condition()
        self.closing = False
        self.batch_started: float | None = None
        self.seconds_per_image = 0.0
        self.thread = threading.Thread(target=self.work, name="model", daemon=True)
        self.thread.start()

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
        return max(1, math.ceil(self.waiting * self.seconds_per_image))

    @property
    def stuck(self) -> float:
        """Seconds that the running batch has taken so far."""
        started = self.batch_started
        return 0.0 if started is None else time.monotonic() - started

    def drop(self, job: Job) -> None:
        with self.changed:
            if job in self.queue:
                self.queue.remove(job)
                self.waiting -= len(job.images) - job.taken

    def take(self) -> list[Piece]:
        """The next batch, waited for; nothing when closing and all is answered."""
        with self.changed:
            self.changed.wait_for(lambda: self.queue or self.closing)
            pieces: list[Piece] = []
            room = self.max_batch
            while self.queue and room:
                job = self.queue.popleft()
                stop = min(job.taken + room, len(job.images))
                pieces.append((job, slice(job.taken, stop)))
                room -= stop - job.taken
                self.waiting -= stop - job.taken
                job.taken = stop
            if pieces and job.taken < len(job.images):
                self.queue.append(job)
            return pieces

    def work(self) -> None:
        torch.set_num_threads(self.threads)  # counts for this thread: OpenMP has a team for each that calls it
        while pieces := self.take():
            started = self.batch_started = time.monotonic()
            answers: list[Answer] | Exception
            try:
                answers = self.compute(pieces)
            except Exception as error:
                log.exception("the model failed on a batch of %d requests", len(pieces))
                answers = error
            seconds, size = time.monotonic() - started, sum(piece.stop - piece.start for _, piece in pieces)
            self.batch_started = None
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
        for place, (job, piece) in enumerate(pieces):
            if job.answer.done():
                continue
            if isinstance(answers, Exception):
                self.drop(job)
                job.answer.set_exception(ModelFailedError(str(answers)))
                continue
            job.parts.append(answers[place])
            if piece.stop == len(job.images):
                job.answer.set_result(job.whole())

    def close(self, seconds: float) -> None:
        """Answer what waits, then end; at most this long."""
        with self.changed:
            self.closing = True
            self.changed.notify()
        self.thread.join(seconds)


class ModelFailedError(Exception):
    """The model raised an exception on the batch that a request was in."""
