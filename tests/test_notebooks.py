"""The notebooks run from start to end on the bundled sample, define nothing and are committed with their pictures."""

import ast
import os
import sys
from pathlib import Path

import nbformat
import pytest
from conftest import ROOT
from IPython.core.inputtransformer2 import TransformerManager
from nbclient import NotebookClient

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def count_pictures(notebook: nbformat.NotebookNode) -> int:
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return sum("image/png" in output.get("data", {}) for output in outputs)


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CKPT", str(tmp_path / "run"))
    monkeypatch.setenv("SWEEP", str(tmp_path / "sweep"))
    monkeypatch.setenv(
        "OVERRIDES",
        f"data.train_size=256 trainer.max_epochs=2 validate=false test=false cache.dir={tmp_path / 'cache'}",
    )
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=240, resources={"metadata": {"path": str(path.parent)}}).execute()
    assert count_pictures(notebook) == count_pictures(nbformat.read(path, as_version=4)) > 0


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_defines_nothing(path: Path) -> None:
    transform = TransformerManager().transform_cell  # magics and shell commands become calls
    cells = [transform(cell.source) for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    nodes = [node for cell in cells for node in ast.walk(ast.parse(cell))]
    assert not [node for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Lambda)]
    assert path.stat().st_size < 1_000_000
