"""Slow and silent clients: each connection ends in bounded time, and others are served meanwhile."""

import json
import re
import socket
import time
from urllib.parse import urlsplit

import httpx
import pytest

HEAD = b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
ROWS = [[207] + [0] * 27] + [[0] * 28] * 27
BODY = json.dumps({"images": [ROWS]}).encode()
WHOLE = HEAD + b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY
SECONDS = 0.6  # the servers' time limit here


@pytest.fixture
def address(stand_in, serving) -> str:
    return serving(stand_in, request_seconds=SECONDS)


def connect(address: str) -> socket.socket:
    parts = urlsplit(address)
    return socket.create_connection((parts.hostname, parts.port), timeout=15)


def everything(client: socket.socket) -> bytes:
    """What the server sends until it closes."""
    received = b""
    try:
        while part := client.recv(65536):
            received += part
    except ConnectionResetError:
        pass
    return received


def answer_of(client: socket.socket) -> tuple[int, str]:
    """Status and detail of the one answer that comes before the server closes."""
    head, _, body = everything(client).partition(b"\r\n\r\n")
    assert b"content-type: application/json" in head.lower(), head
    return int(head.split()[1]), json.loads(body)["detail"]


HALVES = {
    "half a line": (b"POST /pre", 408, "no whole request in 0.6 s"),
    "half the headers": (HEAD, 408, "no whole request in 0.6 s"),
    "no body": (HEAD + b"Content-Length: 100\r\n\r\n", 408, "only 0 bytes came in 0.6 s"),
    "half a body": (WHOLE[:-100], 408, f"only {len(BODY) - 100:,} bytes came in 0.6 s"),
    "half a chunk": (HEAD + b"Transfer-Encoding: chunked\r\n\r\n50\r\nabc", 408, "only 3 bytes came"),
    "no http": (b"\x16\x03\x01\x02\x00 hello\r\n\r\n", 400, "not a request of HTTP/1.1"),
    "endless header": (HEAD + b"X: " + b"x" * 100_000, 431, "headers of more than 32,768 bytes"),
    "endless line": (b"GET /" + b"x" * 100_000, 431, "headers of more than 32,768 bytes"),
}


def test_half_a_request(address: str) -> None:
    """A client that stops half way gets the reason and is disconnected; the next request is served."""
    for name, (sent, status, reason) in HALVES.items():
        started = time.monotonic()
        with connect(address) as client:
            client.sendall(sent)
            found, detail = answer_of(client)
            assert (found, reason in detail) == (status, True), (name, found, detail)
        assert time.monotonic() - started < SECONDS + 4, name
    assert httpx.post(f"{address}/predict", json={"images": [ROWS]}).status_code == 200


def test_a_refused_body_is_not_read_for_ever(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The 413 comes at once; a client that dribbles on afterwards is disconnected."""
    monkeypatch.setattr("thaw.serve.connection.LINGER", 1.0)
    with connect(address) as client:
        client.sendall(HEAD + b"Content-Length: 100000000\r\n\r\n")
        assert b" 413 " in client.recv(65536)
        started = time.monotonic()
        with pytest.raises(OSError):
            while time.monotonic() - started < 10:
                client.sendall(b"x")
                time.sleep(0.05)
        assert time.monotonic() - started < 4


def test_keep_alive_and_pipelining(address: str) -> None:
    """The limits leave honest clients alone: many requests on one connection, also several at once, and pauses."""
    with connect(address) as client:
        for _ in range(2):
            client.sendall(WHOLE * 3)
            received = b""
            while received.count(b'"class":"7"') < 3:
                part = client.recv(65536)
                assert part
                received += part
            time.sleep(SECONDS * 1.5)


UPGRADE = b"Connection: Upgrade\r\nUpgrade: h2c\r\n"
CLOSING = {
    "garbage after a request": (WHOLE + b"\0garbage\r\n\r\n", [b"200"]),
    "garbage after two": (WHOLE * 2 + b"\0garbage\r\n\r\n", [b"200", b"200"]),
    "garbage in a body": (HEAD + b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello?", [b"400"]),
    "garbage after an answer": (b"GET / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n", [b"200"]),
    "150 requests at once": (b"GET /healthz HTTP/1.1\r\n\r\n" * 150, [b"200"] * 101),
    "an upgrade": (b"GET /healthz HTTP/1.1\r\n" + UPGRADE + b"\r\n" + WHOLE, [b"200"]),
    "an upgrade with a body": (WHOLE.replace(b"\r\n\r\n", b"\r\n" + UPGRADE + b"\r\n", 1) + WHOLE, [b"400"]),
}


def test_answers_before_the_end(address: str) -> None:
    """Whole requests are answered before the connection ends on what follows them; nothing is answered twice."""
    for name, (sent, statuses) in CLOSING.items():
        with connect(address) as client:
            client.sendall(sent)
            if name == "garbage after an answer":
                time.sleep(0.1)
                client.sendall(b"?")
            assert re.findall(rb"HTTP/1.1 (\d+) ", everything(client)) == statuses, name


def test_too_many_connections(stand_in, serving) -> None:
    address = serving(stand_in, max_connections=3, request_seconds=SECONDS)
    held = [connect(address) for _ in range(3)]
    time.sleep(0.1)
    response = httpx.get(f"{address}/healthz")
    assert response.status_code == 503
    assert response.headers["Retry-After"]
    assert "more than 3 connections" in response.json()["detail"]
    time.sleep(SECONDS * 2)  # those who said nothing are gone
    assert "\nthaw_rejected_total 1.0\n" in httpx.get(f"{address}/metrics").text
    assert httpx.get(f"{address}/healthz").status_code == 200
    for client in held:
        client.close()


def test_unfinished_bodies_are_bounded_together(stand_in, serving) -> None:
    """All clients together may send eight times one body's limit; later ones get a 503 until there is room."""
    address = serving(stand_in, request_seconds=2.0)
    held = []
    for _ in range(8):
        held.append(connect(address))
        held[-1].sendall(HEAD + b"Content-Length: 200000\r\n\r\n" + bytes(199_999))
    time.sleep(0.3)
    with connect(address) as client:
        client.sendall(HEAD + b"Content-Length: 1000\r\n\r\n" + bytes(999))
        head, _, body = client.recv(65536).partition(b"\r\n\r\n")
        assert b" 503 " in head
        assert b"retry-after: 1" in head.lower()
        assert "bytes of requests are being read" in json.loads(body)["detail"]
    for client in held:
        client.close()
    time.sleep(0.2)
    assert httpx.post(f"{address}/predict", json={"images": [ROWS]}).status_code == 200
