"""serve.py as a user starts it."""

import os
import re
import signal
import socket
import sys
import time
from urllib.parse import urlsplit

import pytest
from conftest import compose_config
from omegaconf import OmegaConf
from served import started

import serve
from thaw.serve.limits import limits_of
from thaw.serve.server import open_port


def is_open(address: str) -> bool:
    parts = urlsplit(address)
    try:
        socket.create_connection((parts.hostname, parts.port), timeout=5).close()
    except ConnectionRefusedError:
        return False
    return True


@pytest.mark.long
def test_half_requests_do_not_hold_up_the_stop(linear_probe, tmp_path) -> None:
    """Ctrl-C with connections that are idle, half way through headers and half way through a body.

    Unless told otherwise, the server answers on this machine's own address alone.
    """
    with started(tmp_path, f"ckpt={linear_probe}", "request_seconds=1.0") as (process, address, _):
        parts = urlsplit(address)
        assert parts.hostname == "127.0.0.1"
        assert not is_open(address.replace("127.0.0.1", "127.0.0.2"))
        clients = []
        for sent in (
            b"",
            b"POST /pre",
            b"POST /predict HTTP/1.1\r\nContent-Type: image/png\r\nContent-Length: 9\r\n\r\n",
        ):
            clients.append(socket.create_connection((parts.hostname, parts.port)))
            clients[-1].sendall(sent)
        time.sleep(0.3)
        stopped = time.monotonic()
        os.kill(process.pid, signal.SIGINT)
        assert process.wait(20) == 0
        assert time.monotonic() - stopped < 8
        assert b" 408 " in clients[-1].recv(65536), "who has begun a request is told"
        for client in clients:
            client.close()


@pytest.mark.parametrize("cause", ["fastapi", "port"])
def test_refusals_to_start(cause: str, tmp_path, monkeypatch) -> None:
    """The error comes before the checkpoint is looked for, and no folder is left."""
    monkeypatch.chdir(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        message = f"^port={port} on host=127.0.0.1 is taken; choose another"
        if cause == "fastapi":
            monkeypatch.setitem(sys.modules, "fastapi", None)
            monkeypatch.delitem(sys.modules, "thaw.serve.app")
            message = re.escape("fastapi is missing, which serving needs: pip install -e '.[serve]'")
        with pytest.raises(ValueError, match=message):
            serve.main(compose_config("serve", "ckpt=last", f"port={port}"))
    assert list(tmp_path.iterdir()) == []


def test_addresses() -> None:
    with pytest.raises(ValueError, match=r"^host=999\.1\.1\.1 port=0 cannot be opened .*; use host=127\.0\.0\.1 or"):
        open_port("999.1.1.1", 0)
    with open_port("127.0.0.1", 0) as opened:
        assert opened.getsockname()[0] == "127.0.0.1"


def test_limits_that_make_no_sense() -> None:
    good = {
        "max_batch": 8,
        "max_queue": 50,
        "max_images": 20,
        "max_body_mb": 1,
        "max_connections": 9,
        "request_seconds": 1.0,
    }
    assert limits_of(OmegaConf.create(good)).max_body == 1_000_000
    for name, value in (("max_batch", -1), ("max_queue", 19), ("max_images", 2.5), ("request_seconds", float("inf"))):
        with pytest.raises(ValueError, match=f"^{name}={value}"):
            limits_of(OmegaConf.create({**good, name: value}))
