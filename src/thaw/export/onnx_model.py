"""An exported ONNX file as a model that predicts, computed by onnxruntime."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from thaw.data.batches import by_batches
from thaw.run.errors import UserError

MISSING = "ONNX files need onnxruntime, which is not installed; run: pip install -e '.[export]'."


class OnnxModel:
    """Satisfies `thaw.predict.predictor.ImageModel`; may be called by several threads at once."""

    has_attention = False

    def __init__(self, session: Any, metadata: dict[str, Any]) -> None:
        self.session, self.metadata = session, metadata

    def __call__(self, images: Tensor) -> Tensor:
        """uint8 (N, 1, 28, 28) -> probabilities (N, 10)."""
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1:] != (1, 28, 28):
            given = f"{images.dtype} {tuple(images.shape)}"
            raise UserError(f"Images must be uint8 (N, 1, 28, 28), not {given}; convert and stack them.")
        if not len(images):  # an empty batch could end the process
            return torch.zeros(0, len(self.metadata["classes"]))
        return by_batches(self.run, images.cpu())

    def run(self, images: Tensor) -> Tensor:
        return torch.from_numpy(self.session.run(["probabilities"], {"images": images.numpy()})[0])

    def attention(self, images: Tensor) -> Tensor:
        raise UserError("An ONNX file gives probabilities only; for attention maps load the checkpoint of the run.")

    def facts(self) -> dict[str, Any]:
        return dict(self.metadata)


def load_onnx(path: Path) -> OnnxModel:
    """Load an ONNX file that `export.py` wrote.

    Raises:
        UserError: there is no such file, export.py did not write it, or onnxruntime is not installed.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise UserError(MISSING) from error
    if not path.is_file():
        raise UserError(f"{path} is not a file; give one that export.py wrote.")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors
    options.intra_op_num_threads = torch.get_num_threads()  # onnxruntime does not read OMP_NUM_THREADS
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # idle threads would slow other programs
    try:
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's classes share no other parent
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{path} cannot be read as an ONNX model ({reason}). Give a file that export.py wrote."
        ) from error
    inputs = [(given.name, given.type, given.shape[1:]) for given in session.get_inputs()]
    outputs = [output.name for output in session.get_outputs()]
    stored = session.get_modelmeta().custom_metadata_map
    known = inputs == [("images", "tensor(uint8)", [1, 28, 28])] and outputs[:1] == ["probabilities"]
    if not known or "thaw" not in stored:
        raise UserError(
            f"{path} is an ONNX model, but not one of thaw's: it takes {inputs} and gives {outputs}, expected uint8 "
            "images (N, 1, 28, 28), probabilities and thaw's metadata. Give a file that export.py wrote."
        )
    return OnnxModel(session, {key: json.loads(value) for key, value in stored.items()})
