"""onnxruntime-web, which computes an ONNX file in the browser: one package from the npm registry, downloaded once."""

import base64
import gzip
import hashlib
import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from thaw.run.download import save_url
from thaw.run.errors import UnreachableError, UserError
from thaw.run.files import atomic

VERSION = "1.22.0"  # the smallest build that reads opset 20: later ones are 0.2 to 1.1 MB larger in a page
INTEGRITY = "sha512-Ud/+EBo6mhuaQWt/OjaOk0iNWjXqJoeeMFr6xQEERZdIZH2OWpGzuujz7lfuOBjUa6TEE/sc4nb7Da5dNL34fg=="
PACKAGE = f"onnxruntime-web-{VERSION}.tgz"
REGISTRY = "https://registry.npmjs.org"
RUNTIME_PARTS = (
    "package.json",
    "dist/ort.wasm.min.js",
    "dist/ort-wasm-simd-threaded.mjs",
    "dist/ort-wasm-simd-threaded.wasm",
)
TIMEOUT = 20.0  # seconds without an answer of the registry


class WebRuntime(NamedTuple):
    """The parts of the package that a page holds.

    api: the script that defines `ort`.
    glue: the module that loads the WebAssembly.
    wasm: the WebAssembly for one thread on the CPU, as gzip in base64.
    """

    version: str
    api: str
    glue: str
    wasm: str


def load_runtime(given: str | None) -> WebRuntime:
    """The runtime in a package (.tgz) or its unpacked folder; None takes the package of `VERSION`, see `cached`.

    Raises:
        UserError: a part is missing or unreadable, or the package cannot be downloaded.
    """
    path = cached() if given is None else Path(given).expanduser()
    try:
        if path.is_dir():
            return from_parts(lambda part: (path / part).read_bytes())
        with tarfile.open(path, "r:gz") as package:
            held = {member.name: member for member in package}

            def read(part: str) -> bytes:
                file = package.extractfile(held[f"package/{part}"])
                assert file
                return file.read()

            return from_parts(read)
    except (OSError, EOFError, tarfile.TarError, KeyError, ValueError, AssertionError) as error:
        raise UserError(
            f"runtime={path} is not onnxruntime-web ({type(error).__name__}: {error}); give the package as npm pack "
            f"onnxruntime-web@{VERSION} writes it, or the folder node_modules/onnxruntime-web, with "
            f"{', '.join(RUNTIME_PARTS)}."
        ) from error


def from_parts(read: Callable[[str], bytes]) -> WebRuntime:
    facts, api, glue, wasm = map(read, RUNTIME_PARTS)
    return WebRuntime(json.loads(facts)["version"], script(api), script(glue), packed(wasm))


def script(content: bytes) -> str:
    """JavaScript that may stand in a page: without the address of its source map, and nothing ends its element."""
    return content.decode().partition("//# sourceMappingURL=")[0].replace("</script", r"<\/script")


def packed(content: bytes) -> str:
    """Bytes as gzip, always the same for the same bytes, in base64."""
    return base64.b64encode(gzip.compress(content, 9, mtime=0)).decode()


def cached() -> Path:
    """The package in the user's cache folder; downloaded from the npm registry where it is missing or damaged.

    Raises:
        UnreachableError: it cannot be had, or has not the content that was published.
    """
    folder = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "thaw"
    path = folder / PACKAGE
    if path.is_file() and integrity(path) == INTEGRITY:
        return path
    registry = os.environ.get("NPM_CONFIG_REGISTRY") or REGISTRY
    url = f"{registry.rstrip('/')}/onnxruntime-web/-/{PACKAGE}"
    try:
        with atomic(path) as part:
            save_url(url, part, f"downloading onnxruntime-web {VERSION}", TIMEOUT)
            if (found := integrity(part)) != INTEGRITY:
                raise ConnectionError(f"its content is {found}, published was {INTEGRITY}")
    except ConnectionError as error:
        raise UnreachableError(
            f"{url} could not be downloaded ({error}). Set NPM_CONFIG_REGISTRY to a registry that this machine "
            f"reaches, or run npm pack onnxruntime-web@{VERSION} on another machine and give runtime={PACKAGE}.",
            str(error),
        ) from error
    return path


def integrity(path: Path) -> str:
    """The SHA-512 of a file, as npm writes it."""
    return "sha512-" + base64.b64encode(hashlib.sha512(path.read_bytes()).digest()).decode()
