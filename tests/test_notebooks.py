"""The notebooks run from start to end on the bundled sample, define nothing and are committed with their pictures."""

import ast
import subprocess
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest
from conftest import ROOT
from IPython.core.inputtransformer2 import TransformerManager
from IPython.core.interactiveshell import InteractiveShell
from nbclient import NotebookClient
from processes import Forked

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.fixture
def shell(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[InteractiveShell]:
    """IPython in this process, which has imported what notebooks import; the Python that a cell starts is forked."""
    shell = InteractiveShell.instance()

    def system(line: str) -> None:
        command, _, filtered = shell.var_expand(line, depth=1).partition(" 2>/dev/null | ")
        with (tmp_path / "output").open("w") as output:
            assert Forked(command.split(), stdout=output).wait() == 0, Path(output.name).read_text()
        with Path(output.name).open() as lines:
            subprocess.run(filtered, shell=True, stdin=lines, check=True)  # grep fails if it finds nothing

    monkeypatch.setattr(shell, "system", system)
    yield shell
    InteractiveShell.clear_instance()


@pytest.mark.long
@pytest.mark.parametrize("path", [path for path in NOTEBOOKS if path.stem[0].isdigit()], ids=lambda path: path.stem)
def test_runs(path: Path, shell: InteractiveShell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(path.parent)
    monkeypatch.setenv("CKPT", str(tmp_path / "run"))
    monkeypatch.setenv("SWEEP", str(tmp_path / "sweep"))
    small = "data.train_size=64 data.batch_size=32 trainer.max_epochs=2 validate=false test=false"
    monkeypatch.setenv("OVERRIDES", f"{small} cache.dir={tmp_path / 'cache'}")
    cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    for cell in cells:
        result = shell.run_cell(cell.source)
        result.raise_error()
        shown = "image/png" in shell.display_formatter.format(result.result)[0]
        assert shown == any("image/png" in output.get("data", {}) for output in cell.outputs), cell.source
    assert any("image/png" in str(cell.outputs) for cell in cells)


def test_a_kernel_shows_what_is_said(tmp_path: Path) -> None:
    cell = nbformat.v4.new_code_cell("from thaw.run.console import say\nsay('epoch 1')")
    notebook = nbformat.v4.new_notebook(cells=[cell])
    NotebookClient(notebook, timeout=60, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert "epoch 1" in str(notebook.cells[0].outputs)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_defines_nothing(path: Path) -> None:
    transform = TransformerManager().transform_cell  # magics and shell commands become calls
    cells = [transform(cell.source) for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    nodes = [node for cell in cells for node in ast.walk(ast.parse(cell))]
    assert not [node for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Lambda)]
    assert path.stat().st_size < 1_000_000
