"""Runs the application: opens the port, and stops on SIGTERM or Ctrl-C."""

import asyncio
import errno
import functools
import math
import select
import signal
import socket
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI

from thaw.run.console import say
from thaw.run.errors import UserError
from thaw.serve.connection import Connection

BACKLOG = 1024  # connections that wait to be accepted
ROUNDS = 5  # of the event loop, more than it takes from a connection that is accepted to its request


def open_port(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes any free one.

    Raises:
        UserError: the port is taken, or the address is not this machine's.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family, backlog=BACKLOG)
    except OSError as error:
        reasons = {
            errno.EADDRINUSE: f"port={port} on host={host} is taken; choose another, or port=0 for any free one.",
            errno.EACCES: f"port={port} is reserved for the system; choose one of 1024 or above.",
        }
        other = f"host={host} port={port} cannot be opened ({error}); use host=127.0.0.1 or 0.0.0.0."
        raise UserError(reasons.get(error.errno or 0, other)) from error


class Server(uvicorn.Server):
    """uvicorn's, which also tells the application at once that it will stop; a second signal ends the process."""

    def __init__(self, app: FastAPI) -> None:
        self.fastapi = app
        limits = app.state.limits
        options: dict[str, Any] = {"ws": "none", "log_config": None, "access_log": False, "proxy_headers": False}
        options["http"] = functools.partial(Connection, limits=limits, rejected=app.state.rejected)
        options["timeout_graceful_shutdown"] = math.ceil(limits.request_seconds) + 1
        options["headers"] = [("X-Content-Type-Options", "nosniff"), ("Cross-Origin-Resource-Policy", "same-origin")]
        options["log_level"] = "error"  # or each malformed request would be a line of the log
        super().__init__(uvicorn.Config(app, server_header=False, **options))

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.should_exit:
            signal.signal(sig, signal.SIG_DFL)
            signal.raise_signal(sig)
        self.fastapi.state.stopping = True
        super().handle_exit(sig, frame)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Accept and read first what the system received while this process was busy: to close would drop it."""
        for _ in range(BACKLOG):
            if not select.select(sockets or (), (), (), 0)[0]:
                break
            await asyncio.sleep(0)  # uvloop accepts one connection in each round of its loop
        for _ in range(ROUNDS):
            await asyncio.sleep(0)
        await super().shutdown(sockets)


def serve(app: FastAPI, opened: socket.socket, ready: str) -> None:
    """Print `ready` and serve until SIGTERM or Ctrl-C; then answer the requests that have come, and return."""
    server = Server(app)

    def stop(number: int, frame: FrameType | None) -> None:  # uvicorn raises the signal again after its stop
        server.should_exit = True

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    say(ready)  # from now on a signal ends it in order
    server.run(sockets=[opened])
