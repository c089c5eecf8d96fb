"""Servers inside a test: a real uvicorn on a free port, in a thread, with a model that does as it is told."""

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from thaw.data.readers import ImageReader
from thaw.serve.app import create_app
from thaw.serve.limits import Limits
from thaw.serve.server import Server, open_port

LIMITS = {
    "max_batch": 8,
    "max_queue": 50,
    "max_images": 20,
    "max_body_mb": 0.2,
    "max_connections": 20,
    "request_seconds": 10.0,
}


class StandIn:
    """Class `brightness of the first pixel % 10`, surely. `open` lets it answer; `broken` makes it fail."""

    has_attention = True

    def __init__(self) -> None:
        self.open, self.broken, self.batches = threading.Event(), False, list[int]()
        self.classes = [*"012345678", "<b>nine"]
        self.seen: list[list[int]] = []
        self.open.set()

    def __call__(self, images: Tensor) -> Tensor:
        self.batches.append(len(images))
        self.seen.append(images[:, 0, 0, 0].tolist())
        assert self.open.wait(20)
        if self.broken:
            raise RuntimeError("out of order")
        count = len(self.classes)
        return torch.eye(count)[images[:, 0, 0, 0].long() % count]

    def attention(self, images: Tensor) -> Tensor:
        return torch.full((len(images), 2, 2), 0.25)

    def facts(self) -> dict[str, Any]:
        return {
            "name": "stand-in",
            "classes": self.classes,
            "checkpoint": "/home/someone/runs/a/b/best.ckpt",
        }


@pytest.fixture
def stand_in() -> Iterator[StandIn]:
    model = StandIn()
    yield model
    model.open.set()


@pytest.fixture
def serving() -> Iterator[Callable[..., str]]:
    """Start a server of a model with these limits; returns its address."""
    running: list[tuple[Server, threading.Thread]] = []

    def start(model: Any, reader: ImageReader | None = None, **limits: Any) -> str:
        opened = open_port("127.0.0.1", 0)
        reader = reader or ImageReader("digit", (1, 28, 28))
        server = Server(create_app(model, reader, Limits(**{**LIMITS, **limits}), 1, []))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [opened]})
        thread.start()
        running.append((server, thread))
        address = f"http://127.0.0.1:{opened.getsockname()[1]}"
        while not server.started:
            time.sleep(0.01)
        return address

    yield start
    for server, thread in running:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()
