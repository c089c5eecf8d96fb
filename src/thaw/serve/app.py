"""The API and the drawing page of one model, as a FastAPI application."""

import asyncio
import base64
import dataclasses
import hashlib
import json
import logging
import math
import re
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi_offline import FastAPIOffline
from starlette.exceptions import HTTPException

from thaw.data.readers import ImageReader
from thaw.pages.html import render
from thaw.predict.predictor import ImageModel
from thaw.serve.answers import to_json
from thaw.serve.batcher import Batcher, ModelFailedError
from thaw.serve.docs import predict_docs
from thaw.serve.limits import Limits
from thaw.serve.metrics import CountedRequests, Metrics
from thaw.serve.refusals import OwnNamesOnly, RefusedError, error_response, refused
from thaw.serve.request_reader import FILE_TYPES, RequestReader

log = logging.getLogger(__name__)

PATHS = frozenset({"/", "/predict", "/healthz", "/info", "/metrics", "/docs", "/openapi.json"})
JSON = "application/json"
DOCS_FILES = "/docs-files"  # the address of the files of /docs
DOCS_PARTS = {"js": "swagger-ui-bundle.js", "css": "swagger-ui.css", "favicon": "favicon.png"}


def create_app(model: ImageModel, reader: ImageReader, limits: Limits, workers: int, hosts: Sequence[str]) -> FastAPI:
    """The application that uvicorn serves; `reader` makes the model's images, `workers` threads run the model.

    `hosts` are names of the server, see `OwnNamesOnly`.

    The server sets `app.state.stopping` before it ends.
    """
    limits = limits.for_images_of(math.prod(reader.shape))
    metrics, requests = Metrics(limits.max_batch), RequestReader(reader, limits)
    batcher = Batcher(model, limits.max_batch, limits.max_queue, workers, metrics.batch)
    metrics.waiting.set_function(lambda: batcher.waiting)
    facts = {**public(model.facts()), "shape": reader.shape, "reader": reader.kind}
    names = list(map(str, facts["classes"]))

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(batcher.close, limits.request_seconds)
        requests.decoders.shutdown(wait=False, cancel_futures=True)

    app = FastAPIOffline(  # its /docs loads nothing from the network
        docs_url=None,  # below, with security headers
        redoc_url=None,
        redirect_slashes=False,  # it would redirect to any Host that a client names
        static_url=DOCS_FILES,
        title="thaw",
        version=str(facts.get("git_commit", ""))[:12] or "unknown",
        description=f"Predicts the class of an image by the model {facts.get('name', 'without a name')!a}.",
        lifespan=lifespan,
    )
    app.state.stopping, app.state.limits, app.state.rejected = False, limits, metrics.rejected
    app.add_middleware(OwnNamesOnly, names=hosts)
    app.add_middleware(CountedRequests, metrics=metrics, paths=PATHS)
    app.add_exception_handler(RefusedError, refused)
    app.add_exception_handler(HTTPException, not_here)
    app.add_exception_handler(ModelFailedError, failed)  # the batcher has logged it
    app.add_exception_handler(Exception, failed)

    @app.post("/predict", summary="Classify images", **predict_docs(requests, limits))
    async def predict(request: Request) -> Response:
        """One or many images, as JSON or as one picture or IDX file."""
        deadline = asyncio.get_running_loop().time() + limits.request_seconds
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != JSON and kind not in FILE_TYPES:
            allowed = f"send {JSON} as in /docs, or a file as {', '.join(FILE_TYPES)}"
            raise RefusedError(415, f"Content-Type {kind[:60]!r} is not read; {allowed}.")
        try:
            received = await requests.read(request, kind, deadline)
            async with asyncio.timeout_at(deadline):
                answer = await batcher.predict(received.images, received.explain)
        except TimeoutError:
            reason = f"no answer within {limits.request_seconds:g} s; try again later, or with fewer images."
            raise RefusedError(503, reason, batcher.retry_after()) from None
        if received.explain:  # large inputs take long to write
            written = await requests.in_thread(to_json, answer, received, names)
        else:
            written = to_json(answer, received, names)
        return Response(written, media_type=JSON)

    @app.get("/healthz", summary="200 if the server can serve, else 503")
    async def healthz() -> Response:
        if app.state.stopping:
            raise RefusedError(503, "the server is stopping; ask another one.", retry_after=1)
        if not batcher.is_alive or batcher.stuck > limits.request_seconds:
            reason = f"the model has not answered for {batcher.stuck:.0f} s; restart the server."
            raise RefusedError(503, reason, retry_after=1)
        return Response('{"status":"ok"}', media_type=JSON)

    @app.get("/info", summary="Facts about the model, and the limits")
    async def info() -> Response:
        return Response(about, media_type=JSON)

    @app.get("/metrics", summary="For Prometheus", response_class=Response)
    async def text_of_metrics() -> Response:
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    about = json.dumps({**facts, "has_attention": model.has_attention, "limits": dataclasses.asdict(limits)})
    page = html(render("draw.html"), "")
    files: Any = {f"swagger_{kind}_url": f"{DOCS_FILES[1:]}/{name}" for kind, name in DOCS_PARTS.items()}
    shown = get_swagger_ui_html(openapi_url="openapi.json", title="thaw API", **files)
    docs = html(bytes(shown.body).decode(), "'self'")

    @app.get("/", include_in_schema=False)
    async def draw() -> Response:
        return page

    @app.get("/docs", include_in_schema=False)
    async def docs_page() -> Response:
        return docs

    return app


def html(page: str, files: str) -> Response:
    """A page that may use its own inline style and script, requests to this server, and nothing else.

    Except for scripts, styles and pictures from `files`, a source of a content security policy.
    """

    def allowed(tag: str) -> str:
        texts = re.findall(rf"<{tag}>(.*?)</{tag}>", page, flags=re.DOTALL)
        digests = (base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in texts)
        return " ".join([*filter(None, [files]), *(f"'sha256-{digest}'" for digest in digests)])

    policy = (
        f"default-src 'none'; script-src {allowed('script')}; style-src {allowed('style')}; connect-src 'self'; "
        f"img-src data: {files}; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    headers = {
        "Content-Security-Policy": policy,
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }
    return Response(page, headers=headers, media_type="text/html")


def public(facts: dict[str, Any]) -> dict[str, Any]:
    """A model's facts for clients: only the end of the checkpoint's path, which names the run."""
    return {key: "/".join(Path(value).parts[-3:]) if key == "checkpoint" else value for key, value in facts.items()}


def not_here(request: Request, error: Any) -> Response:
    if error.status_code == 405:
        error.detail = f"{request.method} {request.url.path} is not allowed; see /docs"
    elif error.status_code == 404:
        error.detail = f"{request.url.path[:80]} is not here; allowed are {', '.join(sorted(PATHS))}"
    return error_response(error.status_code, f"{error.detail}.", dict(error.headers or {}))


def failed(request: Request, error: Exception) -> Response:
    return error_response(500, "the server failed on this request; its log says why.", {})
