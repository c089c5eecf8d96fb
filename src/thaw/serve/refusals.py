"""Requests that get an error for an answer, also those to another server's name."""

import json
import re
import socket
from collections.abc import Sequence
from ipaddress import ip_address
from typing import Any

from fastapi import Request, Response
from starlette.datastructures import Headers

HOST = re.compile(r"(?:\[([0-9a-f:.]+)\]|([^\[\]@:]+))(?::\d*)?")  # of a request


class RefusedError(Exception):
    """A request that gets an error for an answer.

    Args:
        status: of HTTP.
        detail: for the client: the value, the allowed ones and the next step.
        retry_after: seconds after which it may work, for a 503.
    """

    def __init__(self, status: int, detail: str, retry_after: int | None = None) -> None:
        super().__init__(detail)
        self.status, self.detail, self.retry_after = status, detail, retry_after


def refused(request: Request, error: Any) -> Response:
    headers = {} if error.retry_after is None else {"Retry-After": str(error.retry_after)}
    if error.status in (400, 408):  # so that the server does not wait for the rest of the body
        headers["Connection"] = "close"
    return error_response(error.status, error.detail, headers)


def error_response(status: int, detail: str, headers: dict[str, str]) -> Response:
    return Response(json.dumps({"detail": detail}), status, headers, media_type="application/json")


class OwnNamesOnly:
    """The ASGI application `app`, for requests to a name of this server.

    A browser lets a page of any site read answers of this server if the page's own name resolves to it (DNS rebinding).
    So the Host of a request must be an address, which cannot be rebound, or a name of this server. Other pages need no
    check: no answer permits them to read it, and without a permission they cannot send JSON or pictures.

    Args:
        names: of the server, beside `localhost` and the machine's own; `*` stands for any.
    """

    def __init__(self, app: Any, names: Sequence[str]) -> None:
        self.app = app
        self.names = {"localhost", socket.gethostname().lower(), *map(str.lower, names)}

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        name = host_name(Headers(scope=scope).get("host", "localhost")) if scope["type"] == "http" else "localhost"
        app = self.app
        if name not in self.names and not is_address(name) and "*" not in self.names:
            hint = "ask for its address, or start it with hosts=[<name>]"
            app = error_response(421, f"{name[:60]!r} is not a name of this server; {hint}.", {})
        await app(scope, receive, send)


def host_name(host: str) -> str:
    """example.org:80 -> example.org, [::1]:80 -> ::1; "" for what is neither a name nor an address."""
    found = HOST.fullmatch(host.lower())
    return (found[1] or found[2]).rstrip(".") if found else ""


def is_address(name: str) -> bool:
    try:
        ip_address(name)
    except ValueError:
        return False
    return True
