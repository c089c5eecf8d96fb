"""Counts of requests and batches, for Prometheus at `/metrics`."""

import time
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

TIME_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)  # seconds


class Metrics:
    """Counters in a registry of their own, so that two servers in a process do not share them."""

    def __init__(self, max_batch: int) -> None:
        self.registry = registry = CollectorRegistry()
        sizes = [2**power for power in range(max_batch.bit_length())]
        self.requests = Counter("thaw_requests", "Answered requests.", ["path", "status"], registry=registry)
        self.seconds = Histogram(
            "thaw_request_seconds", "From headers to answer.", ["path"], buckets=TIME_BUCKETS, registry=registry
        )
        self.rejected = Counter(
            "thaw_rejected", "Requests and connections refused for want of room (503).", registry=registry
        )
        self.images = Counter("thaw_images", "Classified images.", registry=registry)
        self.batch_size = Histogram("thaw_batch_size", "Images in a batch.", buckets=sizes, registry=registry)
        self.batch_seconds = Histogram("thaw_batch_seconds", "Of a batch.", buckets=TIME_BUCKETS, registry=registry)
        self.waiting = Gauge("thaw_images_waiting", "Images in the queue.", registry=registry)

    def batch(self, size: int, seconds: float) -> None:
        self.images.inc(size)
        self.batch_size.observe(size)
        self.batch_seconds.observe(seconds)

    def text(self) -> bytes:
        return generate_latest(self.registry)


class CountedRequests:
    """The ASGI application `app` with its requests counted.

    Args:
        paths: counted by name; all others count as `other`, or clients could create any number of counters.
    """

    def __init__(self, app: Any, metrics: Metrics, paths: frozenset[str]) -> None:
        self.app, self.metrics, self.paths = app, metrics, paths
        self.seconds = {path: metrics.seconds.labels(path) for path in (*paths, "other")}

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        started = time.perf_counter()
        path = scope["path"] if scope["path"] in self.paths else "other"

        async def counted(message: Any) -> None:
            if message["type"] == "http.response.start":
                self.seconds[path].observe(time.perf_counter() - started)
                self.metrics.requests.labels(path, message["status"]).inc()
                if message["status"] == 503:
                    self.metrics.rejected.inc()
            await send(message)

        await self.app(scope, receive, counted)
