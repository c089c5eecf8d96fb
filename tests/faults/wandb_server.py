"""A stand-in of W&B's server, and MLflow's, on 127.0.0.1, healthy or broken in one of many ways."""

import json
import socket
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

BUCKET = {"id": "b", "displayName": "n", "config": "{}", "project": {"id": "p", "name": "p", "entity": {"name": "e"}}}
FAULTS: dict[str, str | int] = {  # what each request gets; a number is the status of an answer
    **{"error 500": 500, "error 503": 503, "too many requests": 429, "wrong key": 401, "forbidden": 403},
    **{"project not found": 404, "deleted run": 409, "gone": 410},
    **{name: name for name in ("null", "garbage", "reset", "silent", "slow", "redirect", "refused")},
}


class WandbServer(ThreadingHTTPServer):
    """Answers W&B's client as far as a run needs it, until `after`, an operation of W&B's, has been answered.

    All later requests, or all if `after` is None, meet with `fault`, a value of `FAULTS`. `seen` counts the operations;
    "file_stream" are metrics.
    """

    daemon_threads = True
    request_queue_size = 100

    def __init__(self, fault: str | int | None = None, after: str | None = None) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.after, self.seen, self.closed = after, Counter[str](), threading.Event()
        self.fault, self.next_fault = (fault, None) if after is None else (None, fault)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()
        if self.fault == "refused":
            self.close()

    def close(self) -> None:
        if not self.closed.is_set():
            self.closed.set()
            self.shutdown()
            self.server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """The client has gone away, which W&B's may do."""

    def __enter__(self) -> "WandbServer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: WandbServer

    def log_message(self, *_: Any) -> None:
        pass

    def answer(self) -> None:
        content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        asked = json.loads(content) if self.path == "/graphql" else {}
        name = asked.get("operationName") or self.path.partition("?")[0].rpartition("/")[2]
        self.server.seen[name] += 1
        self.meet(self.server.fault, asked.get("variables") or {}, name)
        if name == self.server.after:
            self.server.fault = self.server.next_fault
            if self.server.fault == "refused":
                self.server.close()

    do_GET = do_POST = do_PUT = answer  # noqa: N815  (http.server's names)

    def meet(self, fault: str | int | None, variables: dict[str, Any], name: str) -> None:
        if isinstance(fault, int):
            message = f"stand-in: {fault}"
            self.send(json.dumps({"errors": [{"message": message}], "error": message}).encode(), fault)
        elif fault == "silent":
            self.server.closed.wait(600)
        elif fault in ("reset", "refused"):
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            self.connection.close()
        elif fault == "garbage":
            self.send(b"\x00\xff<html>{" * 50)
        elif fault == "null":
            self.send(b'{"data": {}}')
        elif fault == "redirect":
            self.send(b"", 302, Location=self.server.url + self.path)
        else:
            data = self.data(name, variables)
            self.send(json.dumps({"data": data} | data).encode(), slow=fault == "slow")

    def data(self, name: str, variables: dict[str, Any]) -> dict[str, Any]:
        """What the healthy server answers."""
        files = [{"name": each, "uploadUrl": f"{self.server.url}/storage/file"} for each in variables.get("files", [])]
        known = {
            "Viewer": {"viewer": {"id": "1", "entity": "e", "username": "u", "flags": "{}", "teams": {"edges": []}}},
            "UpsertBucket": {"upsertBucket": {"bucket": BUCKET | {"name": variables.get("name")}, "inserted": True}},
            "get-by-name": {"experiment": {"experiment_id": "1"}},  # MLflow's
            "create": {"run": {"info": {"run_id": "r", "run_uuid": "r", "experiment_id": "1", "status": "RUNNING"}}},
            "CreateRunFiles": {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": files}},
        }
        return known.get(name, {})

    def send(self, body: bytes, status: int = 200, slow: bool = False, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        for start in range(0, len(body), 1 if slow else 2**16):
            self.wfile.write(body[start : start + (1 if slow else 2**16)])
            if slow and self.server.closed.wait(1):
                return
