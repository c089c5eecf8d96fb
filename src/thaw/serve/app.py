"""The API and the page of one model, as a FastAPI application."""

import asyncio
import base64
import dataclasses
import hashlib
import json
import logging
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.resources import files
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException

from thaw.predict.predictor import DigitModel
from thaw.serve.answers import to_json
from thaw.serve.batcher import Batcher, ModelFailedError
from thaw.serve.docs import docs_page, predict_docs
from thaw.serve.limits import Limits, RefusedError
from thaw.serve.metrics import CountedRequests, Metrics
from thaw.serve.requests import FILE_TYPES, RequestReader

log = logging.getLogger(__name__)

PATHS = frozenset({"/", "/predict", "/healthz", "/info", "/metrics", "/docs", "/openapi.json"})
JSON = "application/json"


def create_app(model: DigitModel, limits: Limits, workers: int) -> FastAPI:
    """What uvicorn serves: so many threads run the model.

    `app.state.stopping` is set when the server is about to end.
    """
    metrics, reader = Metrics(limits.max_batch), RequestReader(limits)
    batcher = Batcher(model, limits.max_batch, limits.max_queue, workers, metrics.batch)
    metrics.waiting.set_function(lambda: batcher.waiting)
    facts = public(model.facts())
    names = list(map(str, facts["classes"]))

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(batcher.close, limits.request_seconds)
        reader.decoders.shutdown(wait=False, cancel_futures=True)

    app = FastAPI(
        title="thaw",
        version=str(facts.get("git_commit", ""))[:12] or "unknown",
        description=f"Which digit it is: {facts.get('name', 'a model')} as an API.",
        docs_url=None,  # FastAPI's own loads its parts from the net
        redoc_url=None,
        lifespan=lifespan,
    )
    app.state.stopping = False
    app.state.limits = limits
    app.add_middleware(CountedRequests, metrics=metrics, paths=PATHS)
    app.add_exception_handler(RefusedError, refused)
    app.add_exception_handler(HTTPException, not_here)
    app.add_exception_handler(ModelFailedError, failed)  # the batcher has logged it
    app.add_exception_handler(Exception, failed)

    @app.post("/predict", summary="Which class each image is", openapi_extra=predict_docs(limits))
    async def predict(request: Request) -> Response:
        """One or many images, as JSON or as one picture or IDX file."""
        deadline = asyncio.get_running_loop().time() + limits.request_seconds
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != JSON and kind not in FILE_TYPES:
            raise RefusedError(
                415,
                f"Content-Type {kind!r} is not read; send {JSON} as in /docs, or a file as {', '.join(FILE_TYPES)}.",
            )
        try:
            digits = await reader.read(request, kind, deadline)
            async with asyncio.timeout_at(deadline):
                answer = await batcher.predict(digits.images, digits.explain)
        except TimeoutError:
            raise RefusedError(
                503,
                f"no answer within {limits.request_seconds:g} s; try again later, or with fewer images.",
                batcher.retry_after(),
            ) from None
        return Response(to_json(answer, digits, names), media_type=JSON)

    @app.get("/healthz", summary="Whether it can serve: 200, else 503")
    async def healthz() -> Response:
        if app.state.stopping:
            raise RefusedError(503, "the server is stopping; ask another one.", retry_after=1)
        if not batcher.is_alive or batcher.stuck > limits.request_seconds:
            raise RefusedError(
                503, f"the model has not answered for {batcher.stuck:.0f} s; restart the server.", retry_after=1
            )
        return Response('{"status":"ok"}', media_type=JSON)

    @app.get("/info", summary="Which model this is, and what it takes")
    async def info() -> dict[str, Any]:
        return {**facts, "has_attention": model.has_attention, "limits": dataclasses.asdict(limits)}

    @app.get("/metrics", summary="For Prometheus", response_class=Response)
    async def text_of_metrics() -> Response:
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    page = (files("thaw.serve") / "page.html").read_text(encoding="utf-8")
    policy = content_policy(page)

    @app.get("/", include_in_schema=False)
    async def draw() -> Response:
        return html(page, policy)

    @app.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        content = docs_page(app.openapi())
        return html(content, content_policy(content))

    return app


def html(content: str, policy: str) -> Response:
    headers = {
        "Content-Security-Policy": policy,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }
    return Response(content, headers=headers, media_type="text/html")


def content_policy(page: str) -> str:
    """Allows the page its own style and script, by their hashes, requests to this server, and nothing else."""

    def hashes(tag: str) -> str:
        texts = re.findall(rf"<{tag}>(.*?)</{tag}>", page, flags=re.DOTALL)
        digests = (base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in texts)
        return " ".join(f"'sha256-{digest}'" for digest in digests) or "'none'"

    return (
        f"default-src 'none'; script-src {hashes('script')}; style-src {hashes('style')}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def public(facts: dict[str, Any]) -> dict[str, Any]:
    """A model's facts for anyone: of its checkpoint's path the end, which names the run."""
    return {key: "/".join(Path(value).parts[-3:]) if key == "checkpoint" else value for key, value in facts.items()}


def refused(request: Request, error: Any) -> Response:
    headers = {} if error.retry_after is None else {"Retry-After": str(error.retry_after)}
    if error.status in (400, 408):  # the rest of the body is not waited for
        headers["Connection"] = "close"
    return error_response(error.status, error.detail, headers)


def not_here(request: Request, error: Any) -> Response:
    if error.status_code == 405:
        error.detail = f"{request.method} {request.url.path} is not allowed; see /docs"
    elif error.status_code == 404:
        error.detail = f"{request.url.path[:80]} is not here; allowed are {', '.join(sorted(PATHS))}"
    return error_response(error.status_code, f"{error.detail}.", dict(error.headers or {}))


def failed(request: Request, error: Exception) -> Response:
    return error_response(500, "the server failed on this request; its log says why.", {})


def error_response(status: int, detail: str, headers: dict[str, str]) -> Response:
    return Response(json.dumps({"detail": detail}), status, headers, media_type=JSON)
