"""An open-loop load on a server: requests leave when they are due, whether or not earlier ones are answered."""

import asyncio
import json
import random
import re
from array import array
from typing import NamedTuple
from urllib.parse import urlsplit

import numpy as np

STROKE = np.pad(np.full((20, 3), 255), ((4, 4), (13, 12))).tolist()  # 28 x 28 pixels
BODY = json.dumps({"images": [STROKE]}, separators=(",", ":")).encode()
REQUEST = b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
REQUEST += b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY


class Caller(asyncio.Protocol):
    """One connection, for one request at a time."""

    answered: asyncio.Future[int] | None = None
    lost = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport, self.received = transport, b""

    async def ask(self) -> int:
        """The status of the answer; 0 if the server closes without one."""
        self.answered = asyncio.get_running_loop().create_future()
        self.transport.write(REQUEST)  # type: ignore[attr-defined]
        self.data_received(b"")  # a server that refuses the connection does not wait for a request
        if self.lost and not self.answered.done():
            self.answered.set_result(0)
        return await self.answered

    def data_received(self, data: bytes) -> None:
        self.received += data
        head, _, body = self.received.partition(b"\r\n\r\n")
        length = re.search(rb"content-length: (\d+)", head)
        if length and len(body) >= int(length[1]) and self.answered and not self.answered.done():
            self.received = b""
            self.answered.set_result(int(head[9:12]))

    def connection_lost(self, error: Exception | None) -> None:
        self.lost = True
        if self.answered and not self.answered.done():
            self.answered.set_result(0)


class Answers(NamedTuple):
    """Of many requests: when each was due and left, its status, 0 for none, and the seconds from due to the answer."""

    due: np.ndarray
    left: np.ndarray
    status: np.ndarray
    seconds: np.ndarray

    def between(self, start: float, stop: float) -> "Answers":
        """The requests that left between these moments."""
        chosen = (start <= self.left) & (self.left < stop)
        return Answers(*(column[chosen] for column in self))


class Load:
    """Requests to the server at `address`, on connections that are used again."""

    def __init__(self, address: str) -> None:
        parts = urlsplit(address)
        self.server, self.free = (parts.hostname, parts.port), list[Caller]()
        self.rows = array("d")

    @property
    def answers(self) -> Answers:
        return Answers(*np.array(self.rows).reshape(-1, 4).T)

    async def ask(self, due: float) -> None:
        loop, status, caller = asyncio.get_running_loop(), 0, None
        left = loop.time()
        while self.free and self.free[-1].transport.is_closing():
            self.free.pop()
        try:
            caller = self.free.pop() if self.free else (await loop.create_connection(Caller, *self.server))[1]
            status = await caller.ask()
        except ConnectionError:
            pass
        self.rows.extend((due, left, status, loop.time() - due))
        if caller and status == 200:
            self.free.append(caller)
        elif caller:  # the server closes a connection that it refuses
            caller.transport.close()

    async def saturate(self, connections: int, seconds: float) -> float:
        """Answers a second where each connection asks again when it has its answer."""
        loop = asyncio.get_running_loop()
        stop = loop.time() + seconds

        async def repeat() -> None:
            while loop.time() < stop:
                await self.ask(loop.time())

        await asyncio.gather(*(repeat() for _ in range(connections)))
        return (self.answers.status == 200).sum() / seconds

    async def offer(self, rate: float, seconds: float) -> None:
        """Requests at random times, `rate` a second (a Poisson process); returns when the last one is answered."""
        loop, chance, tasks = asyncio.get_running_loop(), random.Random(0), set[asyncio.Task[None]]()
        due, stop = loop.time(), loop.time() + seconds
        while (due := due + chance.expovariate(rate)) < stop:
            await asyncio.sleep(max(0.0, due - loop.time()))
            tasks.add(task := loop.create_task(self.ask(due)))
            task.add_done_callback(tasks.discard)
        await asyncio.gather(*tasks)
