"""Files of torch.export: a traced program and its facts, which `torch.export.load` reads without thaw."""

import io
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from thaw.data.batches import by_batches

FACTS_FILE = "thaw.json"  # among the extra files of the archive


class TorchProgram:
    """A traced program that predicts; `metadata` are the facts in its file."""

    def __init__(self, program: ExportedProgram, metadata: dict[str, Any]) -> None:
        self.module, self.metadata = program.module(), metadata

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Tensor:
        """uint8 (N, C, H, W) -> probabilities (N, K)."""
        return by_batches(lambda batch: self.module(batch)[0], images)

    def facts(self) -> dict[str, Any]:
        return dict(self.metadata)


def save_program(program: ExportedProgram, facts: Mapping[str, Any], path: Path) -> None:
    archive = io.BytesIO()  # an error inside torch's writer, such as a full disk, would abort the process
    with warnings.catch_warnings(action="ignore"):
        torch.export.save(program, archive, extra_files={FACTS_FILE: json.dumps(facts)})
    path.write_bytes(archive.getbuffer())


def load_program(path: Path) -> TorchProgram:
    extra = {FACTS_FILE: ""}
    with warnings.catch_warnings(action="ignore"), path.open("rb") as file:
        program = torch.export.load(file, extra_files=extra)
    return TorchProgram(program, json.loads(extra[FACTS_FILE]))
