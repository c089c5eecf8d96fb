"""Writes ONNX files from a traced program, in float32 or with int8 weights."""

import json
import logging
import re
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch.export import ExportedProgram

from thaw.predict.onnx_model import MISSING, SEAL, seal_onnx
from thaw.run.errors import UserError

OPSET = 20  # onnxruntime reads it since 1.17


def check_onnx_installed() -> None:
    """Raise a UserError that names what to install."""
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError(f"{MISSING} ({error})") from error


def to_onnx(program: ExportedProgram, name: str) -> Any:
    """Convert a traced program, images -> (probabilities,), to an ONNX model.

    Raises:
        UserError: it has an operator that ONNX lacks, or is too large for one file.
    """
    import torch

    size = sum(tensor.nbytes for tensor in program.state_dict.values())
    if size > 0.95 * 2**31:  # bytes, the limit of one file
        raise UserError(
            f"{name} has {size / 1e9:.1f} GB of weights, and one ONNX file holds 2; use format=torch_export."
        )
    try:
        with silence():
            names: Any = {"input_names": ["images"], "output_names": ["probabilities"]}
            converted = torch.onnx.export(program, dynamo=True, opset_version=OPSET, verbose=False, **names)
            assert converted is not None
            model = converted.model_proto
    except Exception as error:  # torch.onnx has classes of its own, around the cause
        reason = next(iter(str(error.__cause__ or error).strip().splitlines()), "no message")
        raise UserError(
            f"torch.onnx cannot convert {name} ({type(error).__name__}: {reason}); "
            "format=torch_export keeps torch's own operators."
        ) from error
    (batch,) = {value.type.tensor_type.shape.dim[0].dim_param for value in model.graph.input}
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param:  # a dimension has either a name or a number
                dim.dim_param = re.sub(rf"\b{batch}\b", "batch", dim.dim_param)
    del model.metadata_props[:]
    for node in model.graph.node:  # the lines in thaw's files that made each operator
        del node.metadata_props[:]
    return model


def save_onnx(model: Any, facts: Mapping[str, Any], path: Path) -> None:
    """Write one file, with the facts and a checksum as its metadata, each value in JSON."""
    import onnx

    onnx.helper.set_model_props(model, {key: json.dumps(value) for key, value in {**facts, SEAL: "0" * 64}.items()})
    path.write_bytes(seal_onnx(model.SerializeToString()))


def to_int8(model: Any) -> tuple[Any, dict[str, int]]:
    """A copy that multiplies by int8 weights, and the number of its integer operators of each kind.

    Weights are rounded once, with a scale for each output; their inputs are rounded when the model runs, by the range
    of each batch. The rest computes in float32.

    Raises:
        UserError: there is no matrix to quantise.
    """
    import onnx
    from onnxruntime.quantization import QuantType, quant_pre_process, quantize_dynamic

    with silence(), tempfile.TemporaryDirectory() as folder:
        plain, prepared, quantised = (Path(folder) / f"{name}.onnx" for name in ("plain", "prepared", "quantised"))
        onnx.save(model, plain)  # given a model in memory, quant_pre_process would lose the weights
        quant_pre_process(plain, prepared, skip_symbolic_shape=True)
        how: Any = {"op_types_to_quantize": ["MatMul"], "per_channel": True, "weight_type": QuantType.QInt8}
        quantize_dynamic(prepared, quantised, **how)
        result = onnx.load(quantised)
    counts = Counter(node.op_type for node in result.graph.node if node.op_type.endswith("Integer"))
    if not counts:
        raise UserError("quantize=int8 found no matrix product with weights in this model; leave quantize out.")
    return result, dict(counts)


@contextmanager
def silence() -> Iterator[None]:
    """Silence the converters, which log each of their steps, below the level of an error."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logging.disable(before)
