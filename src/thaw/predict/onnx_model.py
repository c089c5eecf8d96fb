"""An exported ONNX file as a model that predicts, computed by onnxruntime."""

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from thaw.data.batches import by_batches
from thaw.predict.predictor import checked_record
from thaw.run.errors import UserError

ONLY = "An ONNX file gives probabilities only;"
SEAL = "file_sha256"  # key of the metadata: the SHA-256 of the file, in which 64 zeros stand in its place
SEALED = re.compile(SEAL.encode() + rb'\x12\x42"([0-9a-f]{64})"')  # as protobuf writes it
MISSING = "ONNX files need onnxruntime, which is not installed; run: pip install -e '.[export]'."


class OnnxModel:
    """Satisfies `thaw.predict.predictor.ImageModel`; may be called by several threads at once."""

    has_attention = False

    def __init__(self, session: Any, metadata: dict[str, Any], data: Mapping[str, Any]) -> None:
        self.session, self.metadata, self.data = session, metadata, data
        self.takes_channels = len(session.get_inputs()[0].shape) == 4  # files of earlier versions take (N, 28, 28)

    def __call__(self, images: Tensor) -> Tensor:
        """uint8 (N, C, H, W) -> probabilities (N, K)."""
        shape = tuple(self.data["shape"])
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1:] != shape:
            given = f"{images.dtype} {tuple(images.shape)}"
            raise UserError(
                f"Images must be uint8 (N, {', '.join(map(str, shape))}), not {given}; convert and stack them."
            )
        if not len(images):  # an empty batch could end the process
            return torch.zeros(0, len(self.data["classes"]))
        return by_batches(self.run, images.cpu())

    def run(self, images: Tensor) -> Tensor:
        images = images if self.takes_channels else images[:, 0]
        return torch.from_numpy(self.session.run(["probabilities"], {"images": images.numpy()})[0])

    def features(self, images: Tensor) -> Tensor:
        raise UserError(f"{ONLY} for features load the checkpoint of the run.")

    def attention(self, images: Tensor) -> Tensor:
        raise UserError(f"{ONLY} for attention maps load the checkpoint of the run.")

    def facts(self) -> dict[str, Any]:
        return dict(self.metadata)


def load_onnx(path: Path) -> OnnxModel:
    """Load an ONNX file that `export.py` wrote; those of earlier versions have no checksum.

    Raises:
        UserError: there is no such file, it is damaged, export.py did not write it, or onnxruntime is not installed.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise UserError(MISSING) from error
    if not path.is_file():
        raise UserError(f"{path} is not a file; give one that export.py wrote.")
    content = path.read_bytes()
    if (seal := SEALED.search(content)) and seal[1].decode() != hashlib.sha256(unsealed(content, seal)).hexdigest():
        raise UserError(f"{path} is damaged: its content has another SHA-256 than it states. Export the model again.")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors
    options.intra_op_num_threads = torch.get_num_threads()  # onnxruntime does not read OMP_NUM_THREADS
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # idle threads would slow other programs
    try:
        session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"], enable_fallback=0)
        inputs = [(given.name, given.type, given.shape[1:]) for given in session.get_inputs()]
        outputs = [output.name for output in session.get_outputs()]
        stored = session.get_modelmeta().custom_metadata_map
        texts = stored if "thaw" in stored else {}
        metadata = {key: json.loads(value) for key, value in texts.items() if key != SEAL}
    except Exception as error:  # onnxruntime's classes share no other parent
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(
            f"{path} cannot be read as an ONNX model ({reason}). Give a file that export.py wrote."
        ) from error
    known = [given[:2] for given in inputs] == [("images", "tensor(uint8)")] and outputs[:1] == ["probabilities"]
    if not known or "thaw" not in stored:
        raise UserError(
            f"{path} is an ONNX model, but not one of thaw's: it takes {inputs} and gives {outputs}, expected uint8 "
            "images, probabilities and thaw's metadata. Give a file that export.py wrote."
        )
    shape = inputs[0][2] if len(inputs[0][2]) == 3 else [1, *inputs[0][2]]
    data = {"name": metadata.get("dataset"), "origin": "", "classes": metadata.get("classes"), "shape": shape}
    return OnnxModel(session, metadata, checked_record({**data, "reader": metadata.get("reader", "digit")}, path))


def unsealed(content: bytes, seal: re.Match[bytes]) -> bytes:
    """The content of an ONNX file with zeros in place of its own SHA-256."""
    return content[: seal.start(1)] + b"0" * 64 + content[seal.end(1) :]


def seal_onnx(content: bytes) -> bytes:
    """Replace the zeros that are the value of `SEAL` in an ONNX file by its SHA-256."""
    seal = SEALED.search(content)
    assert seal
    return content[: seal.start(1)] + hashlib.sha256(content).hexdigest().encode() + content[seal.end(1) :]
