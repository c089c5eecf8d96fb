"""Downloads a file over HTTP."""

import ssl
from http.client import HTTPException
from pathlib import Path
from urllib.error import URLError
from urllib.request import Request, urlopen

from thaw.run.console import progress

BLOCK = 2**15  # bytes between two updates of the progress


def save_url(url: str, path: Path, title: str, timeout: float) -> None:
    """Write the content at a URL to a file, under a bar with a title.

    Raises:
        ConnectionError: it cannot be had, or `timeout` seconds passed without an answer; says why in a few words.
    """
    try:
        request = Request(url, headers={"User-Agent": "thaw"})
        with urlopen(request, timeout=timeout) as response, path.open("wb") as file:
            size = int(response.headers["Content-Length"] or 0)
            with progress(title, size, "bytes") as advance:
                while block := response.read(BLOCK):
                    file.write(block)
                    advance(len(block))
    except (URLError, HTTPException, TimeoutError, ConnectionError, ssl.SSLError) as error:
        reason = error.reason if type(error) is URLError else error
        raise ConnectionError(getattr(reason, "strerror", None) or reason) from error
