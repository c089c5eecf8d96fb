"""A client's connection: uvicorn's, with limits on how long and how much it may hold.

uvicorn itself cannot bound slow clients: `timeout_keep_alive` counts only between two requests, `limit_concurrency`
only requests whose headers have come, and nothing limits the time of headers, a body or an answer that is not read.
"""

import asyncio
import json
from typing import Any

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from thaw.serve.limits import Limits

MAX_HEAD = 32_768  # bytes of a request's line and headers
LINGER = 3.0  # seconds for the rest of a refused body, so that its sender can read why


class Connection(HttpToolsProtocol):
    """A timer runs from a request's first byte to its last, another one while an answer is not read.

    The application answers a late body itself (408).
    """

    timer: asyncio.TimerHandle | None = None  # until the request has come
    stalled: asyncio.TimerHandle | None = None  # until the client reads on
    head = 0  # bytes of the request before its headers are complete
    receiving = False  # the headers are complete, the body is not

    def __init__(self, *arguments: Any, limits: Limits, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.limits = limits

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=0)  # to hear of every answer that is not read at once
        most = self.limits.max_connections
        if len(self.connections) > 2 * most:
            transport.abort()
        elif len(self.connections) > most:
            self.refuse(503, f"more than {most} connections; try again later.", b"retry-after: 1\r\n")
        else:
            self.start_timer(self.limits.request_seconds)

    def connection_lost(self, error: Exception | None) -> None:
        self.stop_timer()
        self.resume_writing()
        super().connection_lost(error)

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        if not self.receiving:
            if self.timer is None and not self.is_answering:
                self.start_timer(self.limits.request_seconds)
            self.head += len(data)
        super().data_received(data)
        if not self.receiving and self.head > MAX_HEAD and not self.transport.is_closing():
            self.refuse(431, f"headers of more than {MAX_HEAD:,} bytes; send fewer.")

    @property
    def is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def on_headers_complete(self) -> None:
        self.head, self.receiving = 0, True
        super().on_headers_complete()

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
        if self.receiving and self.is_answering:
            self.start_timer(LINGER)  # the application says why
        elif self.receiving or not self.head:
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
        self.refuse(400, f"this is not an HTTP request ({msg.rstrip('.').lower()}); see /docs.")

    def refuse(self, status: int, detail: str, header: bytes = b"") -> None:
        """Answer without the application, and close."""
        body = json.dumps({"detail": detail}).encode()
        head = b"content-type: application/json\r\nconnection: close\r\ncontent-length: %d\r\n" % len(body)
        self.transport.write(STATUS_LINE[status] + head + header + b"\r\n" + body)
        self.transport.close()
