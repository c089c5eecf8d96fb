"""A server, in a process of its own, under malformed requests, overload, slow clients and pages of other origins."""

import asyncio
import os
import re
import shutil
import signal
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import numpy as np
import pytest
from conftest import ROOT
from fault_counts import FULL, sized
from load import BODY, REQUEST, Load
from malformed_requests import malformed
from processes import Forked
from served import CHECKPOINT, Served, started

from thaw.serve.connection import LINGER
from thaw.serve.server import open_port

SECONDS = 5.0 if FULL else 1.5  # request_seconds of the server of most tests
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


def connect(address: str, sent: bytes) -> socket.socket:
    parts = urlsplit(address)
    client = socket.create_connection((parts.hostname, parts.port), timeout=10)
    client.sendall(sent)
    return client


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
        new = httpx.Limits(max_keepalive_connections=0)  # a connection may be closed for idling as it is used again
        async with httpx.AsyncClient(headers=JSON, timeout=20, limits=new) as client:
            await asyncio.gather(*(clients(seeds, client) for _ in range(32)))

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
                assert memory[-1] < max(memory[: count // 2]) + 100


CHUNKED = b"POST /predict HTTP/1.1\r\nContent-Type: image/png\r\nTransfer-Encoding: chunked\r\n\r\n"
ENDLESS = {  # what comes first, and what then comes again and again
    "lines of headers": (b"GET / HTTP/1.1\r\n", b"A: b\r\n" * 10_000),
    "trailers": (CHUNKED + b"0\r\n", b"A: b\r\n" * 10_000),
    "one trailer": (CHUNKED + b"0\r\nA: ", b"b" * 60_000),
    "the extension of a chunk": (CHUNKED + b"5;", b"b" * 60_000),
    "chunks of a byte": (CHUNKED, b"1\r\na\r\n" * 10_000),
    "a body": (CHUNKED, b"ea60\r\n" + b"a" * 60_000 + b"\r\n"),
    "requests whose answers are not read": (b"", b"GET / HTTP/1.1\r\n\r\n" * 10_000),
}


def test_endless_requests(server: Served, tries) -> None:
    """What never ends takes no more memory than the largest body that is allowed."""
    ask(server.address)
    with tries("a request that never ends", harm="lost") as attempt:
        for name, (first, again) in ENDLESS.items():
            with attempt(name), connect(server.address, first) as client:
                before = server.megabytes()
                with suppress(OSError):
                    for _ in range(1_000):
                        client.sendall(again)
                assert server.megabytes() < before + 30
                ask(server.address)


def test_overload_and_stop(tmp_path: Path, tries) -> None:
    """At twice the sustainable rate: 200 or 503 in bounded time and memory. After SIGTERM all that came is answered."""
    minutes, minute, limit = sized(1, 15), sized(2, 60), 10.0
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
            assert [*tmp_path.iterdir()] == [served.log]


def test_stop_of_a_busy_server(tmp_path: Path, tries) -> None:
    """Requests that came while the server had no time for them, before SIGTERM, are answered as well."""
    with (
        tries("SIGTERM before the server has read its requests", harm="lost") as attempt,
        started(tmp_path, f"ckpt={CHECKPOINT}", "max_batch=1") as served,
    ):
        clients = [connect(served.address, REQUEST) for _ in range(20)]
        for client in clients:
            while not (part := client.recv(65536)).endswith(b"]}"):  # headers and body may come apart
                assert part, "the server closes without an answer"
        os.kill(served.process.pid, signal.SIGSTOP)
        for client in clients:
            client.sendall(REQUEST)  # on a connection that waits for the next request
        clients += [connect(served.address, REQUEST) for _ in range(60)]
        time.sleep(0.5)  # the system delivers the last packets
        os.kill(served.process.pid, signal.SIGTERM)
        os.kill(served.process.pid, signal.SIGCONT)
        for n, client in enumerate(clients):
            with attempt(f"connection {n}"), client:
                assert everything(client).startswith(b"HTTP/1.1 200")
        assert served.process.wait(12) == 0


SLOW = {  # what comes at once, and what then comes every second
    "headers": (REQUEST[:30], b"x"),
    "a body": (REQUEST[:-100], b" "),
    "a chunk": (CHUNKED + b"50\r\n", b"x"),
    "nothing": (b"", b""),
    "no reading": (b"GET /docs-files/swagger-ui-bundle.js HTTP/1.1\r\n\r\n" * 20, b""),  # 1.5 MB each
}


def test_slow_clients(server: Served, tries) -> None:
    """Clients that send a byte a second, or do not read, are disconnected in time; others are served meanwhile."""
    files, expected = server.descriptors(), ask(server.address)
    slow = [(name, connect(server.address, SLOW[name][0])) for _ in range(sized(8, 40)) for name in SLOW]
    started = time.monotonic()
    with tries("a client that sends a byte a second, or does not read", harm="lost") as attempt:
        while server.descriptors() > files and time.monotonic() - started < 20:
            with attempt("another client"):
                asked = time.monotonic()
                assert ask(server.address) == expected
                assert time.monotonic() - asked < 2
            for name, client in slow:
                with suppress(OSError):
                    client.send(SLOW[name][1])
            time.sleep(sized(0, 1) or 0.2)
        assert time.monotonic() - started < SECONDS + LINGER + 4
        for n, (name, client) in enumerate(slow):
            with attempt(f"client {n}, {name}"), client:
                said = everything(client)
                assert re.findall(rb"HTTP/1\.1 (\d+)", said)[:1] in (
                    [b"200"] if name == "no reading" else [],
                    [b"408"],
                ), said


HOSTS = {"127.0.0.1": 200, "localhost:8000": 200, "LOCALHOST.": 200, "[::1]:8000": 200, "192.168.7.7:80": 200}
HOSTS |= dict.fromkeys(("evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1.evil.example"), 421)
HOSTS |= dict.fromkeys(("evil.example@localhost.evil.example", "[", "[::1].evil.example", "0x7f.evil"), 421)
SIMPLE = ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=b", "")  # need no preflight


def test_other_origins(server: Served, tries) -> None:
    """A page of another origin can neither read an answer nor have one computed, also under a name of its own."""

    def images() -> bytes:
        return re.findall(rb"thaw_images_total (\S+)", httpx.get(f"{server.address}/metrics").content)

    before, evil = images(), {"Origin": "http://evil.example"}
    preflight = evil | {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "content-type"}
    asked = [("GET", path, {"Host": host}, status) for host, status in HOSTS.items() for path in ("/", "/info")]
    asked += [("POST", "/predict", JSON | {"Host": host}, status) for host, status in HOSTS.items() if status == 421]
    asked += [("POST", "/predict", evil | {"Content-Type": name}, 415) for name in SIMPLE]
    asked += [("OPTIONS", path, preflight, 405) for path in ("/predict", "/info")] + [("GET", "/info", evil, 200)]
    with tries("a web page of another origin asks the server", harm="let in") as attempt:
        for method, path, headers, status in asked:
            with attempt(f"{method} {path} {headers}"):
                content = BODY if method == "POST" else None
                response = httpx.request(method, server.address + path, headers=headers, content=content)
                assert response.status_code == status, response.text
                assert not [name for name in response.headers if name.startswith("access-control")]
                assert response.headers["x-content-type-options"] == "nosniff"
                assert response.headers["cross-origin-resource-policy"] == "same-origin"
        with attempt("no image was classified"):
            assert images() == before


def test_checkpoint_changed_while_served(tmp_path: Path, tries) -> None:
    """The server answers with what it has loaded, and a second signal ends it at once."""
    copied = tmp_path / "best.ckpt"
    shutil.copy(CHECKPOINT, copied)
    changes: dict[str, Callable[[], object]] = {
        "overwritten": lambda: copied.write_bytes(bytes(copied.stat().st_size)),
        "cut off": lambda: os.truncate(copied, 0),
        "replaced": lambda: shutil.copy(ROOT / "tests" / "checkpoints" / "lora.ckpt", copied),
        "deleted": copied.unlink,
    }
    with started(tmp_path, f"ckpt={copied}") as served:
        about = httpx.get(f"{served.address}/info").content
        expected = ask(served.address)
        with tries("a checkpoint changed while it is served", harm="lost") as attempt:
            for name, change in changes.items():
                with attempt(name):
                    change()
                    assert ask(served.address) == expected
                    assert httpx.get(f"{served.address}/info").content == about
        with (
            tries("a second signal to a server that waits for a client", harm="lost") as attempt,
            attempt("SIGTERM"),
            connect(served.address, REQUEST[:-1]),
        ):
            time.sleep(0.2)
            os.kill(served.process.pid, signal.SIGTERM)
            time.sleep(0.3)
            assert served.process.poll() is None, "it waits for the rest of the request"
            os.kill(served.process.pid, signal.SIGTERM)
            assert served.process.wait(1) == -signal.SIGTERM


def test_port_in_use_and_a_kill(server: Served, tmp_path: Path, tries) -> None:
    """A second server does not start; the first one serves on. Killed, it leaves no process, and its port is free."""
    port = urlsplit(server.address).port
    with tries("a second server on the same port", harm="lost") as attempt, attempt("port"):
        with (tmp_path / "printed").open("w") as output:
            command = [sys.executable, str(ROOT / "serve.py"), f"ckpt={CHECKPOINT}", f"port={port}"]
            assert Forked(command, cwd=tmp_path, stdout=output).wait(60) == 1
        message = f"error: port={port} on host=127.0.0.1 is taken; choose another, or port=0 for any free one.\n"
        assert (tmp_path / "printed").read_text().endswith(message)
        ask(server.address)
    with tries("SIGKILL to a server", harm="lost") as attempt, attempt("kill"):
        assert not (server.proc / "task" / str(server.process.pid) / "children").read_text(), (
            "it has started no process"
        )
        server.process.kill()
        server.process.wait()
        open_port("127.0.0.1", port).close()
