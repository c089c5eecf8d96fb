"""Uploads to a stand-in for the Hugging Face hub on this machine."""

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from thaw.export.push import check_push, push


class Hub(ThreadingHTTPServer):
    """Answers a small upload as the hub does, and records the requests."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.received: list[tuple[str, str | None, bytes]] = []
        self.status = 200


class Answer(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.reply({}, 404)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.received.append((self.path, self.headers.get("Authorization"), body))
        if self.server.status != 200:
            self.reply({"error": "You may not write here"}, self.server.status)
        elif self.path == "/api/repos/create":
            self.reply({"url": f"{self.server.url}/ada/digits", "name": "ada/digits"}, 200)
        elif "/preupload/" in self.path:
            files = [{"path": file["path"], "uploadMode": "regular"} for file in json.loads(body)["files"]]
            self.reply({"files": [{**file, "shouldIgnore": False} for file in files]}, 200)
        elif "/commit/" in self.path:
            url = f"{self.server.url}/ada/digits/commit/{'a' * 40}"
            self.reply({"success": True, "commitOid": "a" * 40, "commitUrl": url, "hookOutput": ""}, 200)
        else:  # checks of the card
            self.reply({"errors": [], "warnings": []}, 200)

    def reply(self, answer: dict[str, Any], status: int) -> None:
        body = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    server = Hub()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.url)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_of_ada")
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "README.md").write_text("---\nlicense: mit\n---\n# Digits\n")
    (tmp_path / "hub" / "model.safetensors").write_bytes(bytes(range(200)))
    return tmp_path / "hub"


@pytest.mark.parametrize("private", [True, False])
def test_push(hub: Hub, folder: Path, private: bool) -> None:
    said = push(folder, "ada/digits", private)
    assert said.endswith(f"{hub.url}/ada/digits/commit/{'a' * 40}")
    sent = {path: body for path, _, body in hub.received}
    assert {token for _, token, _ in hub.received if token} == {"Bearer hf_of_ada"}
    created = json.loads(sent["/api/repos/create"])
    assert (created["name"], created["organization"]) == ("digits", "ada")
    asked = created.get("private", created.get("visibility"))  # the client's versions say it in either way
    assert asked in ((True, "private") if private else (False, "public", None))
    (commit,) = (body for path, body in sent.items() if "/commit/" in path)
    lines = [json.loads(line) for line in commit.splitlines()]
    files = {
        line["value"]["path"]: base64.b64decode(line["value"]["content"]) for line in lines if line["key"] == "file"
    }
    assert files == {file.name: file.read_bytes() for file in folder.iterdir()}


def test_a_hub_that_refuses(hub: Hub, folder: Path) -> None:
    hub.status = 403
    with pytest.raises(ValueError, match=r"refuses.*hf upload ada/digits"):
        push(folder, "ada/digits", True)
    assert len(list(folder.iterdir())) == 2


def test_a_hub_out_of_reach(hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ConnectionError, match=r"127.0.0.1:9 cannot be reached.*hf upload ada/digits"):
        push(folder, "ada/digits", True)
    assert len(list(folder.iterdir())) == 2


def test_what_can_be_told_without_a_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_of_ada")
    check_push("ada/digits")
    for wrong in ("digits", "a/b/c", "https://huggingface.co/ada/digits"):
        with pytest.raises(ValueError, match="<user>/<name>"):
            check_push(wrong)
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(ValueError, match="needs a token"):
        check_push("ada/digits")
