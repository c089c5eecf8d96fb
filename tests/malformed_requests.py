"""Requests that no honest client sends, from a seeded generator: `malformed(seed)`."""

import base64
import gzip
import io
import json
import struct
import zlib
from collections.abc import Callable
from functools import cache
from random import Random

from load import BODY, REQUEST
from PIL import Image

KINDS: list[Callable[[Random], bytes]] = []
HOST = b"Host: localhost\r\n"
JSON = "application/json"


def malformed(seed: int) -> tuple[str, bytes]:
    """What is wrong, and all that the client sends."""
    chance = Random(seed)
    kind = chance.choice(KINDS)
    return kind.__name__, kind(chance)


def kind(make: Callable[[Random], bytes]) -> Callable[[Random], bytes]:
    KINDS.append(make)
    return make


def post(body: bytes, content_type: str = JSON, length: object = None, more: bytes = b"") -> bytes:
    sent = len(body) if length is None else length
    head = f"Content-Type: {content_type}\r\nContent-Length: {sent}\r\n".encode("latin-1")
    return b"POST /predict HTTP/1.1\r\n" + HOST + head + more + b"\r\n" + body


def chunked(frames: bytes, more: bytes = b"") -> bytes:
    head = b"Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n"
    return b"POST /predict HTTP/1.1\r\n" + HOST + head + more + b"\r\n" + frames


def get(target: bytes, more: bytes = b"") -> bytes:
    return b"GET " + target + b" HTTP/1.1\r\n" + HOST + more + b"\r\n"


def mutated(content: bytes, chance: Random) -> bytes:
    """Bytes replaced, left out, doubled or cut off."""
    changed = bytearray(content)
    for _ in range(chance.randint(1, 4)):
        place = chance.randrange(len(changed) or 1)
        match chance.randrange(4):
            case 0:
                changed[place : place + 1] = chance.randbytes(1)
            case 1:
                del changed[place : place + chance.choice((1, 8, 100))]
            case 2:
                changed[place:place] = changed[place : place + chance.choice((1, 8, 100))]
            case _:
                del changed[place:]
    return bytes(changed)


@cache
def picture(form: str) -> bytes:
    drawn = Image.new("RGB", (90, 70))
    drawn.paste((250, 250, 200), (40, 10, 50, 60))
    file = io.BytesIO()
    drawn.save(file, form)
    return file.getvalue()


@kind
def random_bytes(chance: Random) -> bytes:
    return chance.randbytes(chance.choice((1, 10, 1_000, 60_000))) + chance.choice((b"", b"\r\n\r\n"))


@kind
def other_protocols(chance: Random) -> bytes:
    hello = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + chance.randbytes(500)
    lines = (b"GET /\r\n", b"GET / HTTP/0.9\r\n\r\n", b"GET / HTTP/2.0\r\n\r\n", b"GET / HTTP/1.1\n\n", b"\r\n" * 9)
    more = (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0", b"SSH-2.0-x\r\n", b"*1\r\n$4\r\nPING\r\n", hello)
    return chance.choice((*lines, *more))


@kind
def damaged_requests(chance: Random) -> bytes:
    return mutated(chance.choice((REQUEST, get(b"/info"), post(picture("PNG"), "image/png"))), chance)


@kind
def methods(chance: Random) -> bytes:
    names = (b"HEAD", b"PUT", b"DELETE", b"TRACE", b"OPTIONS", b"PATCH", b"CONNECT", b"BREW", b"get", b"", b"G" * 9_000)
    target = chance.choice((b"/", b"/predict", b"/docs-files/favicon.png", b"*", b"localhost:80"))
    return chance.choice(names) + b" " + target + b" HTTP/1.1\r\n" + HOST + b"\r\n"


@kind
def targets(chance: Random) -> bytes:
    parts = (
        b"..",
        b"%2e%2e",
        b"%00",
        b"%2f",
        b"\\",
        b"etc/passwd",
        b"%ed%a0%80",
        b"%",
        b"%zz",
        b"docs-files",
        b"%0d%0aX:y",
    )
    parts += (
        b"//evil.example",
        b"http://evil.example/",
        b";",
        b"?" + b"q" * 500,
        b"#",
        b"\xff",
        b"~",
        b"predict",
        b" ",
    )
    start = chance.choice((b"/", b"/docs-files/", b"/docs/", b"//", b"", b"/predict/"))
    return get(start + b"/".join(chance.choices(parts, k=chance.randint(1, 6))))


@kind
def long_targets(chance: Random) -> bytes:
    return get(b"/" + chance.choice((b"a", b"%61", b"a/", b"?a=", b"../")) * chance.choice((1_000, 9_000, 50_000)))


@kind
def headers(chance: Random) -> bytes:
    odd = (b"X: a\r\n folded\r\n", b"X : y\r\n", b": y\r\n", b"X\r\n", b"X: \0\r\n", b"X: \xff\xfe\r\n", b"\xff: y\r\n")
    odd += (b"Host: evil.example\r\n", b"Host: \xff\r\n", b"Host: [\r\n", b"Host:\r\n", b"Expect: 100-continue\r\n")
    odd += (b"Expect: 200-ok\r\n", b"Origin: null\r\n", b"Origin: \xff\r\n", b"Connection: close, keep-alive\r\n")
    odd += (b"Range: bytes=0-0,1-,-5,9-3\r\n", b"If-Modified-Since: Foo, 99 Xxx 99999 99:99:99\r\n", b"Range: x\r\n")
    odd += (b"Content-Encoding: gzip\r\n", b"Accept-Encoding: ,;q=nan\r\n", b"Cookie: " + b"a=b;" * 900 + b"\r\n")
    more = b"".join(chance.choices(odd, k=chance.randint(1, 5)))
    if chance.random() < 0.3:
        return get(chance.choice((b"/docs-files/favicon.png", b"/info", b"/")), more)
    return post(BODY, more=more)


@kind
def header_bombs(chance: Random) -> bytes:
    line = chance.choice((b"X: y\r\n", b"A:\r\n", b"X: " + b"y" * 5_000 + b"\r\n", b"X" * 5_000 + b": y\r\n"))
    return get(b"/healthz", line * chance.choice((100, 5_000, 30_000)))


@kind
def wrong_lengths(chance: Random) -> bytes:
    size = len(BODY)
    lengths = (
        0,
        1,
        size - 1,
        size + 1,
        size + 10_000,
        -1,
        "+5",
        "0x10",
        "1e3",
        " ",
        "",
        "9" * 30,
        2**64 - 1,
        2**63,
        "5 5",
    )
    twice = b"Content-Length: %d\r\n" % chance.choice((size, 0, 5)) * chance.randint(0, 1)
    return post(BODY, length=chance.choice(lengths), more=twice)


@kind
def wrong_chunks(chance: Random) -> bytes:
    whole = b"%x\r\n" % len(BODY) + BODY + b"\r\n0\r\n"
    frames = (
        b"zz\r\n",
        b"-5\r\nhello\r\n",
        b"f" * 17 + b"\r\n",
        b"5\r\nhello",
        b"5\r\nhelloo\r\n0\r\n\r\n",
        b"0\r\n",
        b"5",
        b"",
    )
    frames += (
        b"5;" + b"x" * 60_000,
        b"1\r\na\r\n" * 10_000,
        whole + b"A: b\r\n" * 9_000,
        whole + b"A: " + b"b" * 60_000,
    )
    frames += (b"%x\r\n" % 2**40 + BODY, whole + b"Content-Length: 5\r\n\r\n", b"5\nhello\n0\n\n", b"\r\n\r\n")
    return chunked(chance.choice(frames))


@kind
def smuggled_requests(chance: Random) -> bytes:
    hidden = get(b"/metrics")
    coding = chance.choice(
        (b"chunked", b"xchunked", b"chunked, identity", b"\tchunked", b"chunked\r\nTransfer-Encoding: x")
    )
    lengths = b"Content-Length: %d\r\n" % chance.choice((0, 4, len(hidden)))
    head = b"POST /predict HTTP/1.1\r\n" + HOST + lengths + b"Transfer-Encoding: " + coding + b"\r\n\r\n"
    upgrade = post(hidden, more=b"Connection: Upgrade\r\nUpgrade: " + chance.choice((b"h2c", b"websocket")) + b"\r\n")
    return chance.choice((head + b"0\r\n\r\n" + hidden, head + hidden, upgrade, upgrade + hidden))


@kind
def pipelines(chance: Random) -> bytes:
    parts = (REQUEST, get(b"/healthz"), post(b"{"), chance.randbytes(50), chunked(b"zz\r\n"), post(b"x", "image/png"))
    return b"".join(chance.choices(parts, k=chance.choice((2, 5, 40))))


@kind
def unfinished_bodies(chance: Random) -> bytes:
    return REQUEST[: -chance.randint(1, len(BODY) - 1)]


@kind
def content_types(chance: Random) -> bytes:
    names = ("text/plain", "application/x-www-form-urlencoded", "application/json; charset=utf-16", "\xff" * 9_000, "")
    return post(BODY, chance.choice((*names, "image/svg+xml", "image/*", "application/json" * 900, "image/png;" * 99)))


@kind
def multipart(chance: Random) -> bytes:
    part = b"--b\r\nContent-Disposition: form-data; name=x; filename=../../x\r\n\r\nx\r\n"
    return post(
        part * chance.choice((1, 5_000)) + chance.choice((b"", b"--b--\r\n")), "multipart/form-data; boundary=b"
    )


@kind
def other_json(chance: Random) -> bytes:
    values = (None, True, -1, 256, 0.5, "", "x", [], {}, [[]], [[[]]], [None], {"images": []}, 10**30, "\0", "é" * 50)
    rows = chance.choice((1, 27, 28, 29)) * [chance.choice((1, 28, 29)) * [chance.choice(values)]]
    content = {chance.choice(("images", "image", "explain", "")): chance.choice((rows, [rows], *values))}
    return post(json.dumps(content | {"explain": chance.choice((*values, False))}).encode())


@kind
def damaged_json(chance: Random) -> bytes:
    changes = (
        b"NaN",
        b"1e999",
        b"-Infinity",
        b"9" * 5_000,
        b"00",
        b"1_0",
        b"'",
        b"\xff",
        b"\\ud800",
        b"/*",
        b"true",
        b"",
    )
    wrong = (
        BODY.replace(b"255", chance.choice(changes), 1),
        mutated(BODY, chance),
        BODY.decode().encode("utf-16"),
        b"\xef\xbb\xbf" + BODY,
    )
    return post(chance.choice(wrong))


@kind
def json_bombs(chance: Random) -> bytes:
    many = chance.choice((1_000, 20_000, 20_000, 500_000))
    deep = chance.choice((b"[", b'{"a":', b'[{"images":'))
    names = b",".join(b'"%x":1' % n for n in range(many))
    bodies = (b'{"images":' + deep * many, b"{" + names + b"}", b'{"images":[' + b"[[1]]," * many + b"[[1]]]}")
    bodies += (
        b'{"images":' + b"9" * many + b"}",
        b'{"images":["' + b"\\u0041" * many + b'"]}',
        b'{"images":{' + names + b"}}",
    )
    return post(chance.choice(bodies))


@kind
def damaged_base64(chance: Random) -> bytes:
    text = base64.b64encode(picture("PNG")).decode()
    place = chance.randrange(len(text))
    odd = chance.choice(("=", "%", "\0", " ", "é", "-_", "====", "data:image/png;base64,", "," * 9))
    return post(json.dumps({"images": [text[:place] + odd + text[place + chance.randint(0, 3) :]]}).encode())


@kind
def damaged_files(chance: Random) -> bytes:
    form = chance.choice(("PNG", "JPEG", "BMP", "GIF", "TIFF", "WEBP", "IDX", "gzip"))
    idx = struct.pack(">4B3I", 0, 0, 8, 3, 2, 28, 28) + bytes(2 * 28 * 28)
    content = {"IDX": idx, "gzip": gzip.compress(idx)}.get(form) or picture(form)
    return post(
        mutated(content, chance), chance.choice((f"image/{form.lower()}", "image/png", "application/octet-stream"))
    )


@cache
def bomb(name: str, side: int) -> bytes:
    """A small file that claims side x side pixels, or holds a thousand times its size."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    start = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 6, 0, 0, 0))
    match name:
        case "pixels":
            return start + chunk(b"IDAT", zlib.compress(bytes(3_000_000))) + chunk(b"IEND", b"")
        case "text":
            return start + chunk(b"zTXt", b"x\0\0" + zlib.compress(bytes(9_000_000))) + chunk(b"IEND", b"")
        case "idx":
            return struct.pack(">4B3I", 0, 0, 8, 3, side, side, side)
        case _:
            return gzip.compress(bytes(70_000_000), 1)


@kind
def file_bombs(chance: Random) -> bytes:
    content = bomb(chance.choice(("pixels", "text", "idx", "gzip")), chance.choice((3_000, 50_000, 2**31 - 1)))
    return post(content, chance.choice(("image/png", "application/octet-stream")))
