"""An exported ONNX file as a model that predicts; inside, onnxruntime and numpy do all of it.

Shapes: N digits, h x w the grid of patches.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

BATCH = 500  # digits at a time
MISSING = "ONNX files need onnxruntime, which is not installed; run: pip install -e '.[export]'."


class OnnxModel:
    """Satisfies `thaw.predict.predictor.DigitModel`; may be called by several threads at once.

    Args:
        session: onnxruntime's, of a file that `export.py` wrote.
        metadata: of that file.

    Attributes:
        has_attention: whether `attention` works.
    """

    def __init__(self, session: Any, metadata: dict[str, Any]) -> None:
        self.session, self.metadata = session, metadata
        self.has_attention = "attention" in [output.name for output in session.get_outputs()]

    def __call__(self, images: Tensor) -> Tensor:
        """uint8 (N, 28, 28) -> probabilities (N, 10)."""
        return self.run("probabilities", images)

    def attention(self, images: Tensor) -> Tensor:
        """uint8 (N, 28, 28) -> (N, h, w): each patch's share in what the head sees.

        Raises:
            ValueError: the backbone has no attention between all its patches.
        """
        if not self.has_attention:
            raise ValueError(
                f"{self.metadata['backbone']} has no attention between all its patches; attention maps need a ViT or "
                "an EVA."
            )
        return self.run("attention", images)

    def run(self, output: str, images: Tensor) -> Tensor:
        """One of the file's outputs, batch by batch; what only the others need is not computed."""
        from onnxruntime import RunOptions

        if images.dtype != torch.uint8 or images.ndim != 3 or images.shape[1:] != (28, 28):
            raise ValueError(f"Digits must be uint8 (N, 28, 28), not {images.dtype} {tuple(images.shape)}.")
        options = RunOptions()
        options.only_execute_path_to_fetches = True
        digits = images.cpu().numpy() if len(images) else np.zeros((1, 28, 28), np.uint8)  # none could end the process
        parts = [
            self.session.run([output], {"images": digits[start : start + BATCH]}, options)[0]
            for start in range(0, len(digits), BATCH)
        ]
        return torch.from_numpy(np.concatenate(parts)[: len(images)])

    def facts(self) -> dict[str, Any]:
        """What identifies the model, as values of JSON."""
        return dict(self.metadata)


def load_onnx(path: Path) -> OnnxModel:
    """An ONNX file that `export.py` wrote.

    Raises:
        ValueError: no such file, or not one of these, or onnxruntime is not installed.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise ValueError(MISSING) from error
    if not path.is_file():
        raise ValueError(f"{path} is no file; give one that export.py wrote.")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors
    options.intra_op_num_threads = torch.get_num_threads()  # onnxruntime itself knows nothing of OMP_NUM_THREADS
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # idle threads would slow other programs
    try:
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's classes share no parent but this
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"{path} cannot be read as an ONNX model ({reason}). Give a file that export.py wrote."
        ) from error
    inputs = [(given.name, given.type, given.shape[1:]) for given in session.get_inputs()]
    outputs = [output.name for output in session.get_outputs()]
    stored = session.get_modelmeta().custom_metadata_map
    known = inputs == [("images", "tensor(uint8)", [28, 28])] and outputs[:1] == ["probabilities"]
    if not known or "thaw" not in stored:
        raise ValueError(
            f"{path} is an ONNX model, but not one of thaw's: it takes {inputs} and gives {outputs}, expected uint8 "
            "images (N, 28, 28), probabilities and thaw's metadata. Give a file that export.py wrote."
        )
    return OnnxModel(session, {key: json.loads(value) for key, value in stored.items()})
