"""The API through a real server: answers, and errors for bad input."""

import base64
import concurrent.futures
import gzip
import io
import json
import re
import struct
import time
import zlib
from typing import Any

import httpx
import numpy as np
import torch
from PIL import Image

from thaw.data.idx import write_idx
from thaw.data.readers import ImageReader
from thaw.predict.predictor import load_predictor

ROWS = [[207] + [0] * 27] + [[0] * 28] * 27  # which the stand-in takes for a 7


def png(size: tuple[int, int] = (100, 100)) -> bytes:
    picture = Image.new("L", size)
    picture.paste(255, (40, 20, 60, 80))
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


def bomb(side: int) -> bytes:
    """A PNG of some 100 bytes that claims side x side pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 6, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(99))) + chunk(b"IEND", b"")
    )


def idx(*shape: int) -> bytes:
    """Each image with one bright pixel, which the stand-in takes for a 5."""
    images = torch.zeros(shape, dtype=torch.uint8)
    images[(..., *[0] * (len(shape) - 1))] = 255
    return write_idx(images)


def post(address: str, content: Any, kind: str = "application/json") -> httpx.Response:
    body = json.dumps(content).encode() if isinstance(content, dict) else content
    return httpx.post(f"{address}/predict", content=body, headers={"Content-Type": kind}, timeout=20)


def test_answers_equal_the_predictors(linear_probe, serving) -> None:
    """Rows of pixels and an IDX file, split over several batches, get the model's own answers."""
    predictor = load_predictor(str(linear_probe), precision="32-true")
    address = serving(predictor, request_seconds=20.0)
    images = torch.randint(0, 256, (20, 28, 28), dtype=torch.uint8)
    images[:, 0] = images[:, -1] = images[:, :, 0] = images[:, :, -1] = 0  # a dark ground
    expected, maps = predictor(images[:, None]), predictor.attention(images[:, None])
    asked = {"images": images.tolist(), "explain": True}
    as_json, as_file = post(address, asked).json(), post(address, write_idx(images), "application/octet-stream").json()
    for answer in (as_json, as_file):
        probabilities = torch.tensor([one["probabilities"] for one in answer["predictions"]])
        torch.testing.assert_close(probabilities, expected, atol=1e-6, rtol=1e-4)
        assert [one["index"] for one in answer["predictions"]] == expected.argmax(dim=1).tolist()
        assert [one["class"] for one in answer["predictions"]] == [str(i) for i in expected.argmax(dim=1).tolist()]
        assert [one["confidence"] for one in answer["predictions"]] == [max(row) for row in probabilities_of(answer)]
    assert torch.tensor([one["input"] for one in as_json["predictions"]]).equal(images.long())
    attention = torch.tensor([one["attention"] for one in as_json["predictions"]])
    torch.testing.assert_close(attention, maps, atol=1e-4, rtol=1e-2)
    assert "input" not in as_file["predictions"][0]


def probabilities_of(answer: dict[str, Any]) -> list[list[float]]:
    return [one["probabilities"] for one in answer["predictions"]]


def test_pictures(stand_in, serving) -> None:
    """A picture may come as a body, in base64 of any kind or as a data URL."""
    address, content = serving(stand_in), png()
    text = base64.b64encode(content).decode()
    safe, wrapped = base64.urlsafe_b64encode(content).decode(), base64.encodebytes(content).decode()
    kinds = (text, safe, wrapped, wrapped.replace("\n", "\r\n"), safe.rstrip("="), text.rstrip("="))
    for picture in (*kinds, f"data:image/png;base64,{text}", f"data:image/jpg;base64,{wrapped}"):
        seen = post(address, {"images": [picture], "explain": True}).json()["predictions"][0]["input"]
        pixels = np.array(seen)
        assert pixels.shape == (28, 28)
        assert pixels[4:24].max(axis=1).min() > 200, "20 rows high, as MNIST scales it"
    for kind in ("image/png", "image/jpg", "image/webp"):
        assert post(address, content, kind).status_code == 200
    assert len(post(address, gzip.compress(idx(5, 28, 28)), "application/octet-stream").json()["predictions"]) == 5


def test_pictures_in_colour(stand_in, serving) -> None:
    """A model of photographs takes pictures and rows of [r, g, b], and answers its input as a PNG."""
    stand_in.classes = ["ants, red", 'b"ees"', "<b>ü数</b>"]
    address = serving(stand_in, ImageReader("photo", (3, 32, 40)))
    noise = Image.effect_noise((90, 60), 90).convert("RGB")
    file = io.BytesIO()
    noise.save(file, "PNG")
    pixels = np.random.default_rng(0).integers(0, 256, (32, 40, 3), dtype=np.uint8)
    sent = [base64.b64encode(file.getvalue()).decode(), pixels.tolist()]
    answer = post(address, {"images": sent, "explain": True}).json()["predictions"]
    [read] = ImageReader("photo", (3, 32, 40)).file(file.getvalue(), "it")
    for one, image in zip(answer, (read.image, pixels.transpose(2, 0, 1)), strict=True):
        shown = Image.open(io.BytesIO(base64.b64decode(one["input"].removeprefix("data:image/png;base64,"))))
        assert np.array_equal(np.asarray(shown).transpose(2, 0, 1), image)
        assert one["class"] == stand_in.classes[one["index"]] and one["index"] == image[0, 0, 0] % 3
        assert len(one["attention"]) == 2 and one["warning"] is None
    assert post(address, file.getvalue(), "image/png").json()["predictions"][0]["index"] == answer[0]["index"]
    assert len(post(address, idx(5, 28, 28), FILE).json()["predictions"]) == 5, "grey images in another size"
    for wrong, place in (([ROWS], "images[0][0][0]: "), ([[[[0] * 4] * 40] * 32], "images[0][0][0]: ")):
        response = post(address, {"images": wrong})
        assert response.status_code == 422 and response.json()["detail"].startswith(place), response.text
    info = httpx.get(f"{address}/info").json()
    assert (info["shape"], info["reader"], info["classes"]) == ([3, 32, 40], "photo", stand_in.classes)
    schema = httpx.get(f"{address}/openapi.json").json()
    assert "32 rows of 40 pixels, which are lists of red, green and blue" in json.dumps(schema)


def test_memory_of_large_images_is_bounded(stand_in, serving) -> None:
    """Tiny pictures become large images: as many are taken as fit into the memory of eight bodies."""
    address = serving(stand_in, ImageReader("photo", (3, 224, 224)))  # 1.4 MB beside a body hold nine
    limits = httpx.get(f"{address}/info").json()["limits"]
    assert (limits["max_images"], limits["max_queue"]) == (9, 9)
    tiny = base64.b64encode(png((1, 1))).decode()
    assert len(post(address, {"images": [tiny] * 9}).json()["predictions"]) == 9
    response = post(address, {"images": [tiny] * 10})
    assert response.status_code == 413 and "10 images in one request; at most 9" in response.json()["detail"]


JPEG_CUT = b"\xff\xd8\xff\xe0" + bytes(50)
FILE = "application/octet-stream"
BAD = {
    "not an image": (b"hello", "image/png", 422, "the body is not a PNG, JPEG"),
    "damaged": (JPEG_CUT, "image/jpeg", 422, "the body"),
    "cut": (png()[:-40], "image/png", 422, "damaged"),
    "empty file": (b"", FILE, 422, "is empty"),
    "empty json": (b"", "application/json", 422, "Invalid JSON"),
    "no ink": (png((30, 15)), "image/png", 422, "shows no digit"),
    "bomb": (bomb(50_000), "image/png", 422, "claims 2,500,000,000 pixels"),
    "bomb in base64": (
        {"images": [base64.b64encode(bomb(50_000)).decode()]},
        "application/json",
        422,
        "claims 2,500,000,000 pixels",
    ),
    "gzip bomb": (gzip.compress(bytes(70_000_000)), FILE, 422, "holds more than 64,000,000 bytes"),
    "too large": (bytes(100_000_000), FILE, 413, "100,000,000 bytes or more; at most 200,000"),
    "10,000 tiny images": (idx(10_000, 1, 1), FILE, 413, "10,000 images in one request; at most 20"),
    "10,000 images": (gzip.compress(idx(10_000, 28, 28)), FILE, 413, "10,000 images in one request; at most 20"),
    "too many in json": ({"images": ["x"] * 21}, "application/json", 413, "21 images in one request; at most 20"),
    "idx of labels": (idx(12), FILE, 422, "(12,)"),
    "not json": (b"{", "application/json", 422, "Invalid JSON"),
    "other json": (b"[1]", "application/json", 422, "the body"),
    "wrong name": ({"imges": [ROWS]}, "application/json", 422, "images: Field required"),
    "extra name": ({"images": [ROWS], "model": "/etc/passwd"}, "application/json", 422, "model: Extra inputs"),
    "no images": ({"images": []}, "application/json", 422, "images: "),
    "nan": (json.dumps({"images": [[[float("nan")] * 28] * 28]}).encode(), "application/json", 422, "got nan"),
    "infinite": (json.dumps({"images": [[[float("inf")] * 28] * 28]}).encode(), "application/json", 422, "got inf"),
    "fraction": ({"images": [[[0.5] * 28] * 28]}, "application/json", 422, "images[0][0][0]: "),
    "true": ({"images": [[[True] * 28] * 28]}, "application/json", 422, "images[0][0][0]: "),
    "256": ({"images": [[*ROWS[:27], [0] * 27 + [256]]]}, "application/json", 422, "images[0][27][27]: "),
    "27 rows": ({"images": [ROWS, ROWS[:27]]}, "application/json", 422, "images[1]: "),
    "a number": ({"images": [7]}, "application/json", 422, "images[0]: "),
    "not base64": ({"images": ["ä"]}, "application/json", 422, "images[0] is not base64"),
    "a url": ({"images": ["http://example.com/a.png"]}, "application/json", 422, "images[0] is not base64"),
    "a data url of text": ({"images": ["data:text/html,x"]}, "application/json", 422, "images[0] starts with"),
    "a file of the server": ({"images": ["file:///etc/passwd"]}, "application/json", 422, "images[0] is not base64"),
    "explain": ({"images": [ROWS], "explain": "yes"}, "application/json", 422, "explain: "),
    "form": (b"a=b", "application/x-www-form-urlencoded", 415, "application/x-www-form-urlencoded"),
}


def test_one_bad_image_is_named(stand_in, serving) -> None:
    """Whatever is wrong with one of many images, the 422 says which image it is."""
    address, good = serving(stand_in), base64.b64encode(png()).decode()
    blank = [[0] * 28] * 28
    images = np.zeros((5, 28, 28), np.uint8)
    images[:, 5:20, 13:16] = 255
    images[3] = 9
    for bad in (base64.b64encode(png()[:-40]).decode(), base64.b64encode(png((30, 15))).decode(), "", "AAAA", blank):
        response = post(address, {"images": [good, ROWS, bad, good]})
        assert response.status_code == 422
        assert response.json()["detail"].startswith("images[2] "), response.text
    for sent in (images, np.pad(images, ((0, 0), (2, 2), (2, 2)))):
        sent[3] = 9
        response = post(address, write_idx(torch.from_numpy(sent)), FILE)
        assert response.status_code == 422
        assert response.json()["detail"].startswith("the body, image 3, shows no digit"), response.text
    assert not stand_in.batches


def test_warnings(stand_in, serving) -> None:
    """Warnings name two digits in one picture, and rows scaled to 0 and 1 or dark on bright; others get none."""
    stroke = np.zeros((28, 28), np.uint8)
    stroke[4:24, 13:16] = 255
    file = io.BytesIO()
    Image.fromarray(np.tile(stroke, 2)).save(file, "PNG")
    two = base64.b64encode(file.getvalue()).decode()
    sent = [stroke.tolist(), two, (stroke // 255).tolist(), (255 - stroke).tolist()]
    answer = post(serving(stand_in), {"images": sent, "explain": True}).json()["predictions"]
    for one, word in zip(answer, (None, "more than one digit", "0 and 1", "ground"), strict=True):
        assert one["warning"] == word or word in one["warning"]
    for one in (answer[0], answer[2], answer[3]):
        assert np.abs(np.array(one["input"]) - stroke).mean() < 1


def test_bad_input_gets_a_reason(stand_in, serving) -> None:
    address = serving(stand_in, request_seconds=5.0)
    for name, (content, kind, status, reason) in BAD.items():
        started = time.monotonic()
        try:
            response = post(address, content, kind)
        except httpx.TransportError as error:
            raise AssertionError(name) from error
        assert response.status_code == status, (name, response.text)
        assert list(response.json()) == ["detail"], name
        assert reason in response.json()["detail"], (name, response.text)
        assert len(response.text) < 400, name
        assert time.monotonic() - started < 3, name
    assert post(address, {"images": [ROWS]}).json()["predictions"][0]["class"] == "7"
    assert stand_in.batches == [1], "the model has seen nothing bad"
    for method, path, status in (("GET", "/predict", 405), ("GET", "/nowhere", 404), ("POST", "/", 405)):
        response = httpx.request(method, address + path)
        assert (response.status_code, list(response.json())) == (status, ["detail"])


def test_many_errors_are_one(stand_in, serving) -> None:
    """From a body full of wrong values only the first error is kept: all would need far more memory than the body."""
    address = serving(stand_in, max_body_mb=10.0)
    response = post(address, b'{"images":[' + b"[[1]]," * 1_000_000 + b"[[1]]]}")
    assert response.status_code == 422
    assert len(response.text) < 400


def test_body_is_counted_where_no_length_is_given(stand_in, serving) -> None:
    address, sent = serving(stand_in), 0

    def endless():
        nonlocal sent
        for _ in range(2_000):
            sent += 50_000
            yield bytes(50_000)

    response = httpx.post(f"{address}/predict", content=endless(), headers={"Content-Type": FILE}, timeout=20)
    assert response.status_code == 413


def test_overload_is_told_and_passes(stand_in, serving) -> None:
    """While the model is busy 50 images wait and others get 503 with Retry-After; later requests are answered."""
    address = serving(stand_in)
    stand_in.open.clear()
    body = {"images": [ROWS] * 10}
    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        waiting = [pool.submit(post, address, body) for _ in range(12)]
        while sum(done.done() for done in waiting) < 6:
            time.sleep(0.02)
        assert metric(address, "thaw_images_waiting") > 40
        stand_in.open.set()
        responses = [done.result() for done in waiting]
    statuses = [response.status_code for response in responses]
    assert set(statuses) == {200, 503}
    assert statuses.count(200) in (5, 6)  # 50 waiting, and up to 8 in the model
    for response in responses:
        if response.status_code == 503:
            assert int(response.headers["Retry-After"]) >= 1
            assert "images are waiting" in response.json()["detail"]
    assert post(address, body).status_code == 200
    assert metric(address, "thaw_rejected_total") == statuses.count(503)
    assert metric(address, "thaw_images_waiting") == 0


def test_a_slow_model_is_given_up_on(stand_in, serving) -> None:
    """503 after the time limit; digits of requests that timed out are not computed; /healthz says it is stuck."""
    address = serving(stand_in, request_seconds=0.3)
    stand_in.open.clear()
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        responses = list(pool.map(lambda _: post(address, {"images": [ROWS]}), range(4)))
    assert [response.status_code for response in responses] == [503] * 4
    assert all("no answer within 0.3 s" in response.json()["detail"] for response in responses)
    assert httpx.get(f"{address}/healthz").status_code == 503
    computed = sum(stand_in.batches)
    stand_in.open.set()
    assert post(address, {"images": [ROWS]}).status_code == 200
    assert sum(stand_in.batches) == computed + 1
    assert httpx.get(f"{address}/healthz").json() == {"status": "ok"}


def test_a_failing_model_is_500(stand_in, serving) -> None:
    address = serving(stand_in)
    stand_in.broken = True
    response = post(address, {"images": [ROWS]})
    assert (response.status_code, list(response.json())) == (500, ["detail"])
    assert "out of order" not in response.text
    stand_in.broken = False
    assert post(address, {"images": [ROWS]}).status_code == 200


def metric(address: str, name: str) -> float:
    found = re.search(rf"^{re.escape(name)} (\S+)$", httpx.get(f"{address}/metrics").text, flags=re.MULTILINE)
    assert found, name
    return float(found[1])


def test_metrics_info_and_docs(stand_in, serving) -> None:
    address = serving(stand_in)
    for count in (1, 8, 3):
        post(address, {"images": [ROWS] * count})
    post(address, b"{")
    httpx.get(f"{address}/made-up-1")
    httpx.get(f"{address}/made-up-2")
    assert metric(address, 'thaw_requests_total{path="/predict",status="200"}') == 3
    assert metric(address, 'thaw_requests_total{path="/predict",status="422"}') == 1
    assert metric(address, 'thaw_requests_total{path="other",status="404"}') == 2
    assert metric(address, "thaw_images_total") == 12
    assert metric(address, "thaw_batch_size_count") == 3
    assert metric(address, 'thaw_batch_size_bucket{le="4.0"}') == 2
    assert metric(address, 'thaw_request_seconds_count{path="/predict"}') == 4
    info = httpx.get(f"{address}/info").json()
    assert info["checkpoint"] == "a/b/best.ckpt", "where the server keeps its files is not told"
    assert info["has_attention"]
    assert info["limits"]["max_images"] == 20
    schema = httpx.get(f"{address}/openapi.json").json()
    assert set(schema["paths"]) == {"/predict", "/healthz", "/info", "/metrics"}
    body = schema["paths"]["/predict"]["post"]["requestBody"]["content"]
    assert set(body["application/json"]["schema"]["properties"]) == {"images", "explain"}
    example = body["application/json"]["examples"]["pixels"]["value"]
    assert post(address, example).status_code == 200, "the example works"
    described = schema["paths"]["/predict"]["post"]
    assert "image/png" in body and "413" in described["responses"]
    assert "Retry-After" in described["responses"]["503"]["description"]
    assert set(schema["components"]["schemas"]["Prediction"]["properties"]) >= {"class", "warning", "attention"}
    stand_in.classes = ["\udcff", "caf\xe9"]  # the name of a folder may be any bytes
    assert httpx.get(f"{serving(stand_in)}/info").json()["classes"] == stand_in.classes
    for path in ("/", "/docs"):
        page = httpx.get(address + path)
        assert not re.search(r"(src|href)=.?https?:", page.text), "nothing from the net"
        for file in re.findall(r'(?:src|href)="(docs-files/[^"]+)"', page.text):
            assert httpx.get(f"{address}/{file}").status_code == 200
        policy = page.headers["Content-Security-Policy"]
        assert "unsafe" not in policy and "default-src 'none'" in policy
    assert httpx.get(f"{address}/docs-files/none.js").status_code == 404
