"""The OpenAPI description of `POST /predict`, whose bytes the server reads and writes itself."""

from typing import Any

from pydantic import BaseModel

from thaw.serve.answers import PredictResponse
from thaw.serve.limits import Limits
from thaw.serve.request_reader import FILE_TYPES, RequestReader

EMPTY, STROKE = [0] * 28, [0] * 13 + [255] * 3 + [0] * 12
PICTURE_EXAMPLE = {
    "summary": "a picture, and an explanation with the answer",
    "value": {"images": ["data:image/png;base64,iVBORw0KGgo..."], "explain": True},
}
DIGIT_EXAMPLE = {
    "summary": "28 x 28 pixels as in MNIST: ink 255, ground 0",
    "value": {"images": [[EMPTY] * 4 + [STROKE] * 20 + [EMPTY] * 4]},
}


class ErrorResponse(BaseModel):
    detail: str


def predict_docs(reader: RequestReader, limits: Limits) -> dict[str, Any]:
    """Arguments of `FastAPI.post` that describe the body, the answer and the errors."""
    errors = {
        400: "the connection ended before the body did, or the request is not HTTP",
        408: f"the request took longer than {limits.request_seconds:g} s to come",
        413: f"more than {limits.max_images:,} images or {limits.max_body:,} bytes",
        415: "another Content-Type",
        421: "the Host is not a name of this server",
        422: "not an image, no digit for a model of digits, or JSON of another form; `detail` names the value",
        503: "too many images are waiting; Retry-After says for how many seconds",
    }
    content: dict[str, Any] = {kind: {"schema": {"type": "string", "format": "binary"}} for kind in FILE_TYPES}
    pixels = {"pixels": DIGIT_EXAMPLE} if reader.reader.kind == "digit" else {}
    examples = {**pixels, "picture": PICTURE_EXAMPLE}
    content["application/json"] = {"schema": reader.form.model_json_schema(), "examples": examples}
    return {
        "response_model": PredictResponse,
        "response_description": "a prediction for each image, in order",
        "responses": {status: {"description": text, "model": ErrorResponse} for status, text in errors.items()},
        "openapi_extra": {"requestBody": {"required": True, "content": dict(sorted(content.items()))}},
    }
