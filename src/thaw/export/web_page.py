"""Writes one HTML page that holds an ONNX model and its runtime, and draws and answers in the browser."""

import base64
import gzip
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from thaw.export.onnx_file import save_onnx
from thaw.export.web_runtime import WebRuntime, packed
from thaw.pages.html import write_page
from thaw.predict.onnx_model import OnnxModel, load_onnx
from thaw.run.errors import UserError

DROPPED = 8  # of the 24 bits of a float32's fraction: those of a trained weight are noise, which gzip cannot shorten


def save_page(model: Any, facts: Mapping[str, Any], path: Path, runtime: WebRuntime) -> None:
    """Write a page with an ONNX model, whose weights are first rounded in place to 16 significant bits."""
    from onnx import TensorProto, numpy_helper

    for tensor in model.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT:
            tensor.CopyFrom(numpy_helper.from_array(rounded(numpy_helper.to_array(tensor)), tensor.name))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.onnx"
        save_onnx(model, facts, file)
        write_page(path, "web.html", model=packed(file.read_bytes()), facts=facts, runtime=runtime)


def rounded(values: np.ndarray) -> np.ndarray:
    """float32 to the nearest with `DROPPED` fewer bits, a half to even: a relative error of at most 2^-16.

    Weights in float16 or bfloat16, as the bundled ones, stay as they are.
    """
    bits = values.ravel().view(np.uint32)
    nearest = (bits + (1 << DROPPED - 1) - 1 + (bits >> DROPPED & 1)) >> DROPPED << DROPPED
    return np.where(np.isfinite(values), nearest.view(np.float32).reshape(values.shape), values)


def load_page(path: Path) -> OnnxModel:
    """The ONNX model in a page that `save_page` wrote.

    Raises:
        UserError: the file holds none.
    """
    found = re.search(r'id="onnx">([^<]+)<', path.read_text(encoding="utf-8"))
    if not found:
        raise UserError(f"{path} holds no ONNX model; give a page of export.py format=web.")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.onnx"
        file.write_bytes(gzip.decompress(base64.b64decode(found[1])))
        return load_onnx(file)
