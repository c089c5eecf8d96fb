"""The package of the runtime: from a registry on this machine, from the cache, from a file and from a folder."""

import gzip
import io
import json
import tarfile
import threading
from base64 import b64decode
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from thaw.export import web_runtime
from thaw.export.web_runtime import PACKAGE, RUNTIME_PARTS, VERSION, integrity, load_runtime
from thaw.run.errors import UnreachableError, UserError

SCRIPT = b"ort = '</script>';\n//# sourceMappingURL=a"
CONTENT = dict(zip(RUNTIME_PARTS, [b'{"version": "1.2.3"}', SCRIPT, b"glue", b"\0asm"], strict=True))


def package(content: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as archive:
        for name, part in content.items():
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(part)
            archive.addfile(member, io.BytesIO(part))
    return file.getvalue()


class Registry(ThreadingHTTPServer):
    """Answers every request with `content`, or with 404 where that is empty."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.content, self.asked = b"", list[str]()
        self.url = f"http://127.0.0.1:{self.server_port}/npm"


class Handler(BaseHTTPRequestHandler):
    server: Registry

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        if not self.server.content:
            return self.send_error(404)
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.server.content)))
        self.end_headers()
        self.wfile.write(self.server.content)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Registry]:
    """A registry whose package is the one that was published; the cache is empty."""
    with Registry() as server:
        server.content = package(CONTENT)
        (tmp_path / "published.tgz").write_bytes(server.content)
        monkeypatch.setattr(web_runtime, "INTEGRITY", integrity(tmp_path / "published.tgz"))
        monkeypatch.setenv("NPM_CONFIG_REGISTRY", server.url + "/")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


def test_downloaded_once(registry: Registry, tmp_path: Path) -> None:
    first = load_runtime(None)
    assert (first.version, first.glue) == ("1.2.3", "glue")
    assert first.api == "ort = '<\\/script>';\n"  # what would end the element in a page is escaped
    assert gzip.decompress(b64decode(first.wasm)) == b"\0asm"
    assert load_runtime(None) == first
    assert registry.asked == [f"/npm/onnxruntime-web/-/{PACKAGE}"]
    (tmp_path / "cache/thaw" / PACKAGE).write_bytes(b"cut off")
    assert load_runtime(None) == first and len(registry.asked) == 2
    assert [path.name for path in (tmp_path / "cache/thaw").iterdir()] == [PACKAGE]


def altered(registry: Registry) -> str:
    registry.content = package({**CONTENT, RUNTIME_PARTS[1]: b"steal()"})
    return "its content is sha512-.*, published was sha512-"


def absent(registry: Registry) -> str:
    registry.content = b""
    return "Not Found"


def offline(registry: Registry) -> str:
    registry.shutdown()
    registry.server_close()
    return "Connection refused"


@pytest.mark.parametrize("fault", [altered, absent, offline])
def test_it_cannot_be_had(registry: Registry, fault: Callable[[Registry], str], tmp_path: Path) -> None:
    reason = fault(registry)
    step = rf"Set NPM_CONFIG_REGISTRY .* npm pack onnxruntime-web@{VERSION} on another machine and give runtime="
    with pytest.raises(UnreachableError, match=rf"{registry.url}/.* could not be downloaded \(.*{reason}.*\)\. {step}"):
        load_runtime(None)
    assert not any((tmp_path / "cache/thaw").iterdir())


def test_a_package_or_a_folder_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "own.tgz").write_bytes(package(CONTENT))
    for name, part in CONTENT.items():
        (tmp_path / "folder" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "folder" / name).write_bytes(part)
    assert load_runtime(str(tmp_path / "own.tgz")) == load_runtime(str(tmp_path / "folder"))
    (tmp_path / "folder" / RUNTIME_PARTS[3]).unlink()
    (tmp_path / "less.tgz").write_bytes(package({RUNTIME_PARTS[0]: json.dumps({"version": "1"}).encode()}))
    (tmp_path / "cut.tgz").write_bytes(package(CONTENT)[:-40])
    (tmp_path / "text.tgz").write_text("no archive")
    for name in ("folder", "less.tgz", "cut.tgz", "text.tgz", "nowhere"):
        with pytest.raises(
            UserError, match=rf"runtime=.*{name} is not onnxruntime-web .* give the package as npm pack"
        ):
            load_runtime(str(tmp_path / name))
