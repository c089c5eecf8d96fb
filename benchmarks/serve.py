"""Throughput of a server next to the plain call of its model, and latency at half load.

    python -m benchmarks.serve --ckpt <run folder>

Saturation is `wrk`, a closed loop: each connection asks again when it has its answer. Half load is an open loop of our
own: requests leave at random times of the given mean rate, whether or not earlier ones are answered, and latency counts
from the moment at which a request was due. Both run on the same cores as the server. It wants an idle machine.
"""

import argparse
import asyncio
import contextlib
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

import torch

from thaw.data.idx import write_idx
from thaw.data.mnist import load_mnist
from thaw.run.console import lenient
from thaw.serve.server import keep_memory, spared_collector

ROOT = Path(__file__).parents[1]
BATCH = 64  # images: `max_batch`, and what the plain call gets at a time
CONNECTIONS = {"JSON, 1 image": 128, "IDX, 16 images": 16, "IDX, 64 images": 4}


class Load(NamedTuple):
    """A kind of request: its body, and how many images it holds."""

    body: bytes
    kind: str
    images: int


def loads() -> dict[str, Load]:
    """Real digits, as clients would send them."""
    digits = load_mnist("MNIST", ROOT / "data", "sample", None).test.images
    pixels = json.dumps({"images": [digits[7, 0].tolist()]}, separators=(",", ":")).encode()
    idx = {f"IDX, {n} images": Load(write_idx(digits[:n, 0]), "application/octet-stream", n) for n in (16, 64)}
    return {"JSON, 1 image": Load(pixels, "application/json", 1), **idx}


def plain(ckpt: str, precision: str, seconds: float) -> float:
    """Images a second of the model alone, in a process of its own."""
    command = ["-m", "benchmarks.serve", "--ckpt", ckpt, "--plain", precision, "--seconds", str(seconds)]
    ended = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, check=True)
    return float(ended.stdout)


def call_plainly(ckpt: str, precision: str, seconds: float) -> float:
    from thaw.predict.predictor import load_predictor

    keep_memory()  # as the server does
    predictor = load_predictor(ckpt, precision=precision)
    images = load_mnist("MNIST", ROOT / "data", "sample", None).test.images[:BATCH]
    for _ in range(10):
        predictor(images)
    times, stop = list[float](), time.perf_counter() + seconds
    while time.perf_counter() < stop:
        started = time.perf_counter()
        predictor(images)
        times.append(time.perf_counter() - started)
    return BATCH * len(times) / sum(times)


@contextlib.contextmanager
def server(ckpt: str, precision: str, overrides: list[str]) -> Iterator[str]:
    """The address of serve.py in a process of its own."""
    command = [sys.executable, "serve.py", f"ckpt={ckpt}", f"trainer.precision={precision}", "port=0", *overrides]
    process = subprocess.Popen([*command, f"max_batch={BATCH}"], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout
    try:
        found = next(filter(None, (re.search(r"http://\S+", line) for line in process.stdout)), None)
        assert found, "serve.py did not start"
        yield found[0]
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0


def saturate(address: str, load: Load, connections: int, seconds: float) -> tuple[float, float, float]:
    """Images a second, and the median and 99th percentile of latency in ms, of wrk's closed loop."""
    with tempfile.TemporaryDirectory() as folder:
        body, script = Path(folder) / "body", Path(folder) / "post.lua"
        body.write_bytes(load.body)
        script.write_text(
            f'local file = io.open("{body}", "rb")\nwrk.body = file:read("*a")\nfile:close()\n'
            f'wrk.method = "POST"\nwrk.headers["Content-Type"] = "{load.kind}"\n'
        )
        command = ["wrk", "-t1", f"-c{connections}", f"-d{seconds:.0f}s", "--latency", "-s", str(script)]
        printed = subprocess.run([*command, f"{address}/predict"], capture_output=True, text=True, check=True).stdout
    assert "Non-2xx" not in printed, printed
    rate = float(re.findall(r"Requests/sec:\s+(\S+)", printed)[0])
    return rate * load.images, *(milliseconds(printed, percent) for percent in ("50%", "99%"))  # type: ignore[return-value]


def milliseconds(printed: str, percent: str) -> float:
    number, unit = re.findall(rf"{percent}\s+([\d.]+)(us|ms|s)", printed)[0]
    return float(number) * {"us": 1e-3, "ms": 1, "s": 1e3}[unit]


class Client(asyncio.Protocol):
    """One connection, for one request at a time."""

    answered: asyncio.Future[bytes] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport, self.received = transport, bytearray()

    def data_received(self, data: bytes) -> None:
        self.received += data
        head, _, body = self.received.partition(b"\r\n\r\n")
        length = re.search(rb"content-length: (\d+)", head)
        if length and len(body) >= int(length[1]):
            self.received = bytearray()
            assert self.answered
            self.answered.set_result(bytes(head[:15]))

    def connection_lost(self, error: Exception | None) -> None:
        if self.answered and not self.answered.done():
            self.answered.set_exception(ConnectionResetError("the server closed a connection that it owed an answer"))


async def pace(address: str, load: Load, rate: float, seconds: float) -> list[float]:
    """Latencies in ms of requests that are due at random times, `rate` a second (a Poisson process)."""
    parts, loop = urlsplit(address), asyncio.get_running_loop()
    head = f"Host: localhost\r\nContent-Type: {load.kind}\r\nContent-Length: {len(load.body)}\r\n\r\n"
    request, latencies, free = b"POST /predict HTTP/1.1\r\n" + head.encode() + load.body, list[float](), list[Client]()

    async def ask(due: float) -> None:
        while free and free[-1].transport.is_closing():  # idle for long: the server has closed it
            free.pop()
        client = free.pop() if free else (await loop.create_connection(Client, parts.hostname, parts.port))[1]
        client.answered = loop.create_future()
        client.transport.write(request)  # type: ignore[attr-defined]
        status = await client.answered
        assert b" 200" in status, status
        latencies.append(1e3 * (loop.time() - due))
        free.append(client)

    due, stop, tasks, chance = loop.time(), loop.time() + seconds, set(), random.Random(0)
    while due < stop:
        due += chance.expovariate(rate)
        await asyncio.sleep(max(0, due - loop.time()))
        tasks.add(task := loop.create_task(ask(due)))
        task.add_done_callback(tasks.discard)
    await asyncio.gather(*tasks)
    for client in free:
        client.transport.close()
    return latencies


def measure(ckpt: str, precision: str, seconds: float, overrides: list[str]) -> None:
    """Print a table of one precision: the plain call is measured before and after the server."""
    rows, before = [], plain(ckpt, precision, seconds)
    with server(ckpt, precision, overrides) as address:
        for name, load in loads().items():
            saturate(address, load, CONNECTIONS[name], 2)
            images, middle, worst = saturate(address, load, CONNECTIONS[name], seconds)
            latencies = asyncio.run(pace(address, load, images / load.images / 2, seconds))
            percentiles = statistics.quantiles(latencies, n=100)
            rows.append((name, images, middle, worst, percentiles[49], percentiles[98], len(latencies)))
    alone = statistics.mean((before, after := plain(ckpt, precision, seconds)))
    print(f"\n{precision}: the plain call has {alone:,.0f} images/s ({before:,.0f} before, {after:,.0f} after)")
    print("| request | share of the plain call | images/s | p50, p99 saturated | p50, p99 at half load |")
    print("|---|---|---|---|---|")
    for name, images, middle, worst, half_middle, half_worst, count in rows:
        print(
            f"| {name} | {images / alone:.0%} | {images:,.0f} | {middle:.1f}, {worst:.1f} ms "
            f"| {half_middle:.1f}, {half_worst:.1f} ms ({count:,} requests) |",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt", required=True, help="last, a run folder or a checkpoint")
    parser.add_argument("--precision", nargs="+", default=["32-true", "bf16-mixed"])
    parser.add_argument("--seconds", type=float, default=10.0, help="of each phase")
    parser.add_argument("--override", nargs="*", default=[], help="of serve.py, e.g. workers=1")
    parser.add_argument("--plain", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.plain:
        print(call_plainly(given.ckpt, given.plain, given.seconds))
        return
    print(f"{os.cpu_count()} cores, torch {torch.__version__}, {given.seconds:g} s a phase, {given.ckpt}")
    with spared_collector():  # pauses of this process would be taken for the server's
        for precision in given.precision:
            measure(given.ckpt, precision, given.seconds, given.override)


if __name__ == "__main__":
    with lenient():
        main()
