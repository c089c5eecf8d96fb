"""The tutorial: pages equal their notebooks, languages share their code, and the notebook runs as it is printed."""

import re
import resource
import shutil
from pathlib import Path

import nbformat
import pytest
from conftest import ROOT
from nbclient import NotebookClient
from nbformat import NotebookNode

from tools.tutorial import PAGES, PICTURES, SOURCE, code_cells, shown, to_markdown

MADE = ("configs", "src", "notebooks", "logs/.gitkeep", "train.py", "probe.py", "predict.py", "export.py", "serve.py")


def read(path: Path) -> NotebookNode:
    return nbformat.read(path, as_version=4)


def printed(notebook: NotebookNode) -> str:
    return "\n".join(shown(cell)[0] for cell in code_cells(notebook))


def seconds_of_children() -> float:
    """CPU time of the processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_page_is_its_notebook(path: Path) -> None:
    """`python tools/tutorial.py` would change nothing."""
    assert PAGES[path].read_text(encoding="utf-8") == to_markdown(read(path), PAGES[path])


def test_pictures_are_those_of_the_cells() -> None:
    pictures = {f"{cell.id}.png": shown(cell)[1] for cell in code_cells(read(SOURCE)) if shown(cell)[1]}
    assert {path.name: path.read_bytes() for path in PICTURES.iterdir()} == pictures
    assert len(pictures) > 15


def test_languages_share_code_and_outputs() -> None:
    parts = ("id", "source", "outputs", "execution_count")
    same = re.compile(r"\$\$.*?\$\$|\]\(\.\./.*?\)", re.DOTALL)
    english, chinese = (read(path).cells for path in PAGES)
    assert [cell.cell_type for cell in english] == [cell.cell_type for cell in chinese]
    for one, other in zip(english, chinese, strict=True):
        if one.cell_type == "code":
            assert [one[part] for part in parts] == [other[part] for part in parts]
            assert ("alt" in one.metadata) == ("alt" in other.metadata) == bool(shown(one)[1])
        else:
            assert same.findall(one.source) == same.findall(other.source)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_accuracies_in_the_text_are_printed(path: Path) -> None:
    notebook = read(path)
    texts = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    for number in re.findall(r"\d+\.\d+ ?%", texts):
        assert number.replace(" ", "") in printed(notebook).replace(" ", "")


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_runs_from_an_empty_clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In ten minutes of two cores, with as many lines and the same pictures as in the notebook."""
    for name in MADE:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy2
        (tmp_path / name).parent.mkdir(exist_ok=True)
        copy(ROOT / name, tmp_path / name)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "src"))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    notebook, before = read(SOURCE), read(SOURCE)
    started = seconds_of_children()
    resources = {"metadata": {"path": str(tmp_path / "notebooks")}}
    NotebookClient(notebook, timeout=1800, resources=resources).execute()
    assert seconds_of_children() - started < 2 * 600
    for old, new in zip(code_cells(before), code_cells(notebook), strict=True):
        (old_text, old_picture), (text, picture) = shown(old), shown(new)
        assert (old_picture is None) == (picture is None), new.source
        assert len(text.splitlines()) == len(old_text.splitlines()), text
