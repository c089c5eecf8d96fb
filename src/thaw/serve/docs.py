"""The API's description: what OpenAPI cannot read off the code, and a page of it that needs no network."""

import json
from html import escape
from typing import Any

from pydantic import BaseModel

from thaw.pages.html_page import page
from thaw.serve.answers import PredictResponse
from thaw.serve.limits import Limits
from thaw.serve.requests import FILE_TYPES, PredictRequest

EMPTY, STROKE = [0] * 28, [0] * 13 + [255] * 3 + [0] * 12
EXAMPLES = {
    "pixels": {
        "summary": "28 x 28 pixels as in MNIST: ink 255, ground 0",
        "value": {"images": [[EMPTY] * 4 + [STROKE] * 20 + [EMPTY] * 4]},
    },
    "picture": {
        "summary": "a picture, and an explanation with the answer",
        "value": {"images": ["data:image/png;base64,iVBORw0KGgo..."], "explain": True},
    },
}
ANSWER = {
    "predictions": [
        {
            "class": "7",
            "index": 7,
            "confidence": 0.98,
            "probabilities": [0.001, 0.002, 0.004, 0.002, 0.001, 0.001, 0.001, 0.98, 0.003, 0.005],
            "warning": None,
        }
    ]
}


def predict_docs(limits: Limits) -> dict[str, Any]:
    """The body, answers and errors of `POST /predict`, whose bytes we read and write ourselves."""
    error = {"type": "object", "properties": {"detail": {"type": "string"}}, "required": ["detail"]}
    errors = {
        400: "the connection ended before the body did, or no HTTP",
        408: f"the request took longer than {limits.request_seconds:g} s to come",
        413: f"more than {limits.max_images:,} images or {limits.max_body:,} bytes",
        415: "another Content-Type",
        422: "not an image, no digit on it, or JSON of another form; `detail` names the value",
        503: "too many images are waiting; Retry-After says for how many seconds",
    }
    file = {"schema": {"type": "string", "format": "binary"}}
    return {
        "requestBody": {
            "required": True,
            "content": {
                "application/json": {"schema": inlined(PredictRequest), "examples": EXAMPLES},
                **dict.fromkeys(FILE_TYPES, file),
            },
        },
        "responses": {
            "200": {
                "description": "a prediction for each image, in order",
                "content": {"application/json": {"schema": inlined(PredictResponse), "example": ANSWER}},
            },
            **{
                str(status): {"description": text, "content": {"application/json": {"schema": error}}}
                for status, text in errors.items()
            },
        },
    }


def inlined(model: type[BaseModel]) -> dict[str, Any]:
    """A model's JSON schema with what it refers to in place: references would be looked up in the whole document."""
    schema = model.model_json_schema()
    parts = schema.pop("$defs", {})

    def resolved(node: Any) -> Any:
        if isinstance(node, list):
            return [resolved(item) for item in node]
        if not isinstance(node, dict):
            return node
        if "$ref" in node:
            return resolved(parts[node["$ref"].rpartition("/")[2]])
        return {key: resolved(value) for key, value in node.items()}

    return resolved(schema)


def docs_page(schema: dict[str, Any]) -> str:
    """An OpenAPI description as one HTML page."""
    parts = [
        f"<h1>{escape(schema['info']['title'])}</h1><p>{escape(schema['info']['description'])}</p>"
        "<p class=soft>For programs: <a href=openapi.json>openapi.json</a>. To draw: <a href='.'>the page</a>.</p>"
    ]
    for path, methods in schema["paths"].items():
        for method, operation in methods.items():
            parts.append(f"<h2>{method.upper()} {escape(path)}</h2><p>{escape(operation['summary'])}</p>")
            if body := operation.get("requestBody"):
                parts += [content_of("Send", kind, content) for kind, content in body["content"].items()]
            for status, answer in operation["responses"].items():
                parts.append(f"<p><code>{status}</code> {escape(answer['description'])}</p>")
                if status == "200":
                    parts += [
                        content_of("Answer", kind, content) for kind, content in answer.get("content", {}).items()
                    ]
    return page(f"{schema['info']['title']} API", parts)


def content_of(verb: str, kind: str, content: dict[str, Any]) -> str:
    """A body: its examples, and its schema to be unfolded."""
    if content.get("schema", {}).get("format") == "binary":
        return f"<p>{verb} <code>{escape(kind)}</code>: one file</p>"
    examples = [example["value"] for example in content.get("examples", {}).values()]
    examples += [content["example"]] if "example" in content else []
    shown = "".join(f"<pre>{escape(shortened(json.dumps(example)))}</pre>" for example in examples)
    schema = escape(json.dumps(content.get("schema", {}), indent=1))
    unfolded = f"<details><summary>schema</summary><pre>{schema}</pre></details>"
    return f"<p>{verb} <code>{escape(kind)}</code></p>{shown}{unfolded}"


def shortened(text: str) -> str:
    return text if len(text) <= 400 else f"{text[:300]} ... {text[-60:]}"
