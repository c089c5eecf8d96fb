"""One client's connection: uvicorn's, with limits on how long and how much it may hold."""

import asyncio
import json
from typing import Any

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from thaw.serve.limits import Limits

MAX_HEAD = 32_768  # bytes of a request's line and headers
LINGER = 3.0  # seconds for the rest of a body that was refused, so that its sender can read why


class Connection(HttpToolsProtocol):
    """Ends what uvicorn would wait for without end: a request that does not come, and an answer that is not read.

    A timer runs from a request's first byte to its last. The application answers a late body itself (408).
    """

    def __init__(self, *arguments: Any, limits: Limits, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.limits = limits
        self.timer: asyncio.TimerHandle | None = None  # until the request has come
        self.stalled: asyncio.TimerHandle | None = None  # until the client reads on
        self.head = 0  # bytes of the request that came before its headers were complete
        self.receiving = False  # the headers are complete, the body is not

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=0)  # hear of every answer that is not read at once
        if len(self.connections) > 2 * self.limits.max_connections:
            transport.abort()
        elif len(self.connections) > self.limits.max_connections:
            self.refuse(503, f"more than {self.limits.max_connections} connections; try again later.", retry=True)
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
            if self.timer is None and not self.answering:
                self.start_timer(self.limits.request_seconds)
            self.head += len(data)
        super().data_received(data)
        if not self.receiving and self.head > MAX_HEAD and not self.transport.is_closing():
            self.refuse(431, f"headers of more than {MAX_HEAD:,} bytes; send fewer.")

    @property
    def answering(self) -> bool:
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
        if self.receiving:  # refused before all of it was here
            self.start_timer(LINGER)

    def start_timer(self, seconds: float) -> None:
        self.stop_timer()
        self.timer = self.loop.call_later(seconds, self.too_late)

    def stop_timer(self) -> None:
        if self.timer:
            self.timer.cancel()
        self.timer = None

    def too_late(self) -> None:
        self.timer = None
        if self.receiving and self.answering:
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
        self.refuse(400, f"this is no HTTP request ({msg.rstrip('.').lower()}); see /docs.")

    def refuse(self, status: int, detail: str, retry: bool = False) -> None:
        """Answer where no application was asked, and close."""
        body = json.dumps({"detail": detail}).encode()
        head = b"content-type: application/json\r\nconnection: close\r\ncontent-length: %d\r\n" % len(body)
        self.transport.write(STATUS_LINE[status] + head + b"retry-after: 1\r\n" * retry + b"\r\n" + body)
        self.transport.close()
