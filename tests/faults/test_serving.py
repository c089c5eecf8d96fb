"""A server, in a process of its own, under malformed requests, overload, slow clients and pages of other origins."""

import asyncio
import os
import re
import signal
import socket
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import httpx
import numpy as np
import pytest
from conftest import needs
from fault_counts import FULL, sized
from load import BODY, Load
from malformed_requests import malformed
from served import CHECKPOINT, Served, started

pytestmark = needs("serve")
SECONDS = 1.0  # request_seconds of the server of most tests
JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with started(
        tmp_path_factory.mktemp("served"), f"ckpt={CHECKPOINT}", f"request_seconds={SECONDS}", "max_batch=1"
    ) as served:
        yield served


def ask(address: str) -> bytes:
    response = httpx.post(f"{address}/predict", content=BODY, headers=JSON, timeout=20)
    assert response.status_code == 200, response.text
    return response.content


def everything(client: socket.socket) -> bytes:
    """What the server sends until it closes."""
    received = b""
    with suppress(ConnectionResetError):
        while part := client.recv(65536):
            received += part
    return received


async def exchange(address: str, sent: bytes, seconds: float) -> bytes:
    """What the server answers until it closes, or until its last answer is complete."""
    reader, writer = await asyncio.open_connection(*address.removeprefix("http://").split(":"))
    received = b""
    try:
        writer.write(sent)
        async with asyncio.timeout(seconds):
            while part := await reader.read(65536):
                received += part
                head, _, body = received.rpartition(b"HTTP/1.1 ")[2].partition(b"\r\n\r\n")
                if (length := re.search(rb"content-length: (\d+)", head)) and len(body) >= int(length[1]):
                    break
    except ConnectionError:
        pass
    finally:
        writer.transport.abort()
    return received


def test_malformed_requests(server: Served, tries) -> None:
    """Each gets an answer without a 5xx or a closed connection; a good request afterwards gets the answer of before."""
    count, expected = sized(60, 10_000), ask(server.address)
    memory = []

    async def run() -> None:
        seeds = iter(range(count))
        async with httpx.AsyncClient(headers=JSON, timeout=20) as client:
            await asyncio.gather(*(clients(seeds, client) for _ in range(16)))

    async def clients(seeds: Iterator[int], client: httpx.AsyncClient) -> None:
        for seed in seeds:
            name, sent = malformed(seed)
            with attempt(f"seed {seed}, {name}"):
                received = await exchange(server.address, sent, SECONDS + 20)
                statuses = re.findall(rb"HTTP/1\.1 (\d{3}) [A-Z]", received)
                assert statuses or not received, received[:200]
                assert all(status < b"500" or status == b"503" for status in statuses), received[:500]
                answer = await client.post(f"{server.address}/predict", content=BODY)
                assert answer.content == expected, answer.text
            memory.append(server.megabytes())

    with tries("a malformed request to the server", harm="lost") as attempt:
        asyncio.run(run())
        if FULL:
            with attempt("memory is flat"):
                print(memory[:: count // 20])
                assert memory[-1] < max(memory[: count // 2]) + 50


def test_overload_and_stop(tmp_path: Path, tries) -> None:
    """At twice the sustainable rate: 200 or 503, in bounded time and memory. After SIGTERM what has come is answered."""
    minutes, minute, limit = sized(1, 15), sized(3, 60), 10.0
    samples = []  # seconds, MB, open files

    async def sample(served: Served) -> None:
        while True:
            samples.append((time.monotonic(), served.megabytes(), served.descriptors()))
            await asyncio.sleep(minute / 10)

    async def run(served: Served) -> tuple[float, float, Load, float]:
        rate = await Load(served.address).saturate(32, sized(1, 10))
        load, watch, start = Load(served.address), asyncio.create_task(sample(served)), time.monotonic()
        last = asyncio.create_task(load.offer(2 * rate, minutes * minute + 1))
        await asyncio.sleep(minutes * minute)
        watch.cancel()
        os.kill(served.process.pid, signal.SIGTERM)
        stopped = time.monotonic()
        await last
        return rate, start, load, stopped

    with (
        tries("a minute at twice the rate that the server sustains", harm="lost") as attempt,
        started(tmp_path, f"ckpt={CHECKPOINT}", f"request_seconds={limit}") as served,
    ):
        files = served.descriptors()
        rate, start, load, stopped = asyncio.run(run(served))
        answers, held = load.answers, np.array(samples)
        for n in range(minutes):
            with attempt(f"minute {n}"):
                part = answers.between(start + n * minute, min(start + (n + 1) * minute, stopped - 1))
                assert set(part.status) <= {200, 503}, Counter(part.status)
                accepted = part.seconds[part.status == 200]
                assert len(accepted) > rate * minute / 4, "the server computes while it refuses"
                assert accepted.max() < limit + 1
                print(f"minute {n}: {Counter(part.status)}, {np.percentile(accepted, (50, 99)).round(2)} s,", end=" ")
                print(held[held[:, 0] <= start + (n + 1) * minute][-1, 1:], "MB, files")
        if FULL:
            with attempt("memory is flat"):
                late = held[held[:, 0] > start + 5 * minute]
                slope = np.polyfit(late[:, 0] / 60, late[:, 1], 1)[0]
                print(f"sustained {rate:.0f} a second, offered {2 * rate:.0f}; {slope:.3f} MB a minute")
                assert slope < 1
        with attempt("open files are bounded"):
            assert held[:, 2].max() < files + 2 * 500 + 10
        with tries("SIGTERM to a server under overload", harm="lost") as attempt, attempt("under load"):
            assert served.process.wait(limit + 12) == 0
            assert time.monotonic() - stopped < limit + 12
            assert set(answers.between(start, stopped - 0.5).status) <= {200, 503}
            late = answers.between(stopped + 0.3, np.inf)
            assert len(late.status) and not late.status.any(), "new requests find no server"
