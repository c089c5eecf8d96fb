"""A client's connection: uvicorn's, with limits on how long and how much it may hold.

uvicorn itself cannot bound slow clients: `timeout_keep_alive` counts only between two requests, `limit_concurrency`
only requests whose headers have come, and nothing limits the time of headers, a body or an answer that is not read.
"""

import asyncio
import json
from typing import Any

from prometheus_client import Counter
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from thaw.serve.limits import Limits

MAX_HEAD = 32_768  # bytes of a request's line and headers
MAX_PIPELINED = 100  # requests that one client sends before it has an answer: each takes 3 kB and 30 us
LINGER = 3.0  # seconds for the rest of a refused body, so that its sender can read why


class LiveTransport:
    """A transport that drops what is written after its end, as asyncio's do; uvloop's raise an error instead."""

    def __init__(self, transport: asyncio.Transport) -> None:
        self.transport = transport

    def __getattr__(self, name: str) -> Any:
        if name in ("write", "write_eof", "pause_reading", "resume_reading") and self.transport.is_closing():
            return lambda *arguments: None
        return getattr(self.transport, name)


class Connection(HttpToolsProtocol):
    """A timer runs from a request's first byte to its last, another one while an answer is not read.

    The application answers a late body itself (408).
    """

    timer: asyncio.TimerHandle | None = None  # until the request has come, or its sender has read why it is refused
    stalled: asyncio.TimerHandle | None = None  # until the client reads on
    head = 0  # bytes of the request that are not its body: headers, frames of chunks, trailers
    receiving = False  # the headers are complete, the body is not
    refused = False  # what comes now is not read

    def __init__(self, *arguments: Any, limits: Limits, rejected: Counter, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.limits, self.rejected = limits, rejected

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(LiveTransport(transport))  # type: ignore[arg-type]
        transport.set_write_buffer_limits(high=0)  # to hear of every answer that is not read at once
        most = self.limits.max_connections
        if len(self.connections) > most:
            self.rejected.inc()
            self.refuse(503, f"more than {most} connections; try again later.", b"retry-after: 1\r\n")
            if len(self.connections) > 2 * most:  # not even the refused ones have room
                transport.close()
        else:
            self.start_timer(self.limits.request_seconds)

    def connection_lost(self, error: Exception | None) -> None:
        self.stop_timer()
        self.resume_writing()
        super().connection_lost(error)

    def data_received(self, data: bytes) -> None:
        if self.refused or self.transport.is_closing():
            return
        if not self.receiving and self.timer is None and not self.is_answering:
            self.start_timer(self.limits.request_seconds)
        self.head += len(data)
        super().data_received(data)
        if self.head > MAX_HEAD and not self.refused:
            self.refuse(431, f"headers of more than {MAX_HEAD:,} bytes; send fewer.")

    @property
    def is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self.receiving:  # trailers are dropped
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        if len(self.pipeline) >= MAX_PIPELINED:
            raise ValueError("the first of them are answered, then the connection is closed")
        if self.parser.should_upgrade() and {b"content-length", b"transfer-encoding"} & dict(self.headers).keys():
            raise ValueError("the parser would take the body for the next request")
        super().on_headers_complete()
        self.head, self.receiving = 0, True

    def on_body(self, body: bytes) -> None:
        self.head -= 2 * len(body)  # each byte may have one of a chunk's frame
        super().on_body(body)

    def on_message_complete(self) -> None:
        self.head, self.receiving = 0, False
        self.stop_timer()
        super().on_message_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.receiving:  # it was refused before all of it had come
            self.start_timer(LINGER)

    def start_timer(self, seconds: float) -> None:
        self.stop_timer()
        self.timer = self.loop.call_later(seconds, self.end_late_request)

    def stop_timer(self) -> None:
        if self.timer:
            self.timer.cancel()
        self.timer = None

    def end_late_request(self) -> None:
        self.timer = None
        if self.receiving and self.is_answering and not self.refused:
            self.start_timer(LINGER)  # the application says why
        elif self.receiving or self.refused or not self.head:
            self.transport.abort()
        else:
            self.refuse(408, f"no whole request in {self.limits.request_seconds:g} s; send it faster.")

    def pause_writing(self) -> None:
        super().pause_writing()
        self.stalled = self.stalled or self.loop.call_later(self.limits.request_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self.stalled:
            self.stalled.cancel()
        self.stalled = None

    def send_400_response(self, msg: str) -> None:
        self.refuse(400, "this is not a request of HTTP/1.1, or it has both a body and an Upgrade; see /docs.")

    def _unsupported_upgrade_warning(self) -> None:
        """Answer in HTTP/1.1, which a client's Upgrade allows, and close: the parser has dropped what follows."""
        self.cycle.keep_alive, self.refused = False, True

    def refuse(self, status: int, detail: str, header: bytes = b"") -> None:
        """Answer what has come without the application, and close, once its sender has had time to read why.

        Whole requests before it are answered first; then the connection is closed without a word.
        """
        self.refused = True
        if self.receiving and (self.pipeline or self.cycle.response_started):
            self.transport.abort()
            return
        if self.receiving:  # the application need not wait for the rest
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        elif self.is_answering:
            self.cycle.keep_alive = False
            return
        body = json.dumps({"detail": detail}).encode()
        head = b"content-type: application/json\r\nconnection: close\r\ncontent-length: %d\r\n" % len(body)
        self.transport.write(STATUS_LINE[status] + head + header + b"\r\n" + body)
        self.transport.write_eof()
        self.start_timer(LINGER)
