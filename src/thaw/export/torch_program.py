"""Files of torch.export: a traced program and its facts.

Shapes: N digits, h x w the grid of patches.
"""

import io
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from thaw.export.onnx_model import BATCH

FACTS = "thaw.json"  # among the extra files of the archive


class TorchProgram:
    """Satisfies `thaw.predict.predictor.DigitModel`.

    Args:
        program: of a file that `export.py` wrote.
        metadata: of that file.
    """

    def __init__(self, program: ExportedProgram, metadata: dict[str, Any]) -> None:
        self.module, self.metadata = program.module(), metadata
        self.has_attention = len(program.graph_signature.user_outputs) > 1

    def __call__(self, images: Tensor) -> Tensor:
        """uint8 (N, 28, 28) -> probabilities (N, 10)."""
        return self.run(0, images)

    def attention(self, images: Tensor) -> Tensor:
        """uint8 (N, 28, 28) -> (N, h, w): each patch's share in what the head sees."""
        return self.run(1, images)

    def run(self, output: int, images: Tensor) -> Tensor:
        with torch.inference_mode():
            return torch.cat([self.module(batch)[output] for batch in images.split(BATCH)])

    def facts(self) -> dict[str, Any]:
        """What identifies the model, as values of JSON."""
        return dict(self.metadata)


def save_program(program: ExportedProgram, facts: Mapping[str, Any], path: Path) -> None:
    """One file, which `torch.export.load` reads without thaw."""
    archive = io.BytesIO()  # an error inside torch's writer, such as a full disk, would abort the process
    with warnings.catch_warnings(action="ignore"):
        torch.export.save(program, archive, extra_files={FACTS: json.dumps(facts)})
    path.write_bytes(archive.getbuffer())


def load_program(path: Path) -> TorchProgram:
    """A file that `save_program` wrote."""
    extra = {FACTS: ""}
    with warnings.catch_warnings(action="ignore"), path.open("rb") as file:
        program = torch.export.load(file, extra_files=extra)
    return TorchProgram(program, json.loads(extra[FACTS]))
