"""Requests that get an error for an answer, also those that a web page elsewhere sends."""

import json
import socket
from collections.abc import Sequence
from ipaddress import ip_address
from typing import Any
from urllib.parse import urlsplit

from fastapi import Request, Response
from starlette.datastructures import Headers


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


class OwnPagesOnly:
    """The ASGI application `app`, closed to web pages of other origins.

    A browser sends what a page of any site asks for, also to this machine and its network, and lets the page read the
    answer if the page's own name resolves to this server (DNS rebinding). So the Host of a request must be an address,
    which cannot be rebound, or a name of this server. Its Origin, which browsers send with each POST, must be the same.

    Args:
        host: where the server listens; a name of it, as are `localhost` and the machine's name.
        hosts: more names, which may be origins, too: those of proxies; `*` stands for any.
    """

    def __init__(self, app: Any, host: str, hosts: Sequence[str]) -> None:
        self.app = app
        self.hosts = {name.lower() for name in hosts}
        self.names = {"localhost", socket.gethostname().lower(), host.lower(), *self.hosts}

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        refusal = self.refusal(Headers(scope=scope)) if scope["type"] == "http" else None
        await (refusal or self.app)(scope, receive, send)

    def refusal(self, headers: Headers) -> Response | None:
        host, origin = headers.get("host", "localhost").lower(), headers.get("origin", "").lower()
        if "*" in self.hosts:
            return None
        name = host_name(host)
        if name not in self.names and not is_address(name):
            hint = "ask for its address, or start it with hosts=[<name>]"
            return error_response(421, f"{name[:60]!r} is not a name of this server; {hint}.", {})
        asking = origin.partition("://")[2]
        if origin and asking != host and host_name(asking) not in self.hosts:
            hint = "open the page of the server itself; where a proxy shows it, start the server with hosts=[<name>]"
            return error_response(403, f"pages of {origin[:60]!r} may not use this server; {hint}.", {})
        return None


def host_name(netloc: str) -> str:
    """example.org:80 -> example.org, [::1]:80 -> ::1; "" for what is neither a name nor an address."""
    try:
        return (urlsplit(f"//{netloc}").hostname or "").rstrip(".")
    except ValueError:
        return ""


def is_address(name: str) -> bool:
    try:
        ip_address(name)
    except ValueError:
        return False
    return True
