"""Write the pages of the tutorial from its notebooks, so that page and notebook cannot drift apart.

    jupyter execute --inplace notebooks/tutorial.ipynb    # run the English notebook
    python tools/tutorial.py                              # the rest follows from it

The English notebook is the source of code and outputs: the Chinese one takes over both and has texts of its own. A page
is its notebook in Markdown: texts as they are, code and its output as blocks, pictures as files.
"""

import base64
import re
from pathlib import Path

import nbformat
from nbformat import NotebookNode

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "notebooks" / "tutorial.ipynb"
PAGES = {SOURCE: ROOT / "docs" / "tutorial.md", ROOT / "notebooks" / "tutorial_zh.ipynb": ROOT / "docs/zh/tutorial.md"}
PICTURES = ROOT / "docs" / "pictures" / "tutorial"
NOT_RUN = "<!-- not run: a cell of the notebook, which is run as a whole -->"


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def copy_code(source: NotebookNode, target: NotebookNode) -> None:
    """Give the code cells of `target`, of which there must be as many, the code and outputs of those of `source`."""
    for theirs, own in zip(code_cells(source), code_cells(target), strict=True):
        for part in ("id", "source", "outputs", "execution_count"):
            own[part] = theirs[part]


def to_markdown(notebook: NotebookNode, page: Path) -> str:
    """The notebook as the text of `page`, whose place decides what links are relative to."""
    to_root = "../" * len(page.parent.relative_to(ROOT).parts)
    to_docs = to_root.removesuffix("../")
    parts = []
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            parts.append(re.sub(r"\]\(\.\./(docs/)?", lambda way: "](" + (to_docs if way[1] else to_root), cell.source))
            continue
        text, picture = shown(cell)
        if cell.source.startswith("!"):
            command = cell.source.removeprefix("!")
            parts.append(f"{NOT_RUN}\n" + fence("console", f"$ {command}\n{text}"))
        else:
            language = "text" if cell.source.startswith("%") else "python"
            parts.append(f"{NOT_RUN}\n" + fence(language, cell.source))
            parts += [fence("text", text)] if text else []
        if picture:
            path = f"{to_docs}{PICTURES.relative_to(ROOT / 'docs')}/{cell.id}.png"
            parts.append(f"![{cell.metadata.alt}]({path})\n<!-- made by: python tools/tutorial.py -->")
    return "\n\n".join(parts) + "\n"


def shown(cell: NotebookNode) -> tuple[str, bytes | None]:
    """What a cell prints, and the picture that it shows."""
    text, picture = "", None
    for output in cell.outputs:
        if output.output_type == "stream":
            text += output.text
        elif "image/png" in output.data:
            picture = base64.b64decode(output.data["image/png"])
        else:
            text += output.data["text/plain"]
    return re.sub(r" *\r?\n", "\n", text).strip("\n"), picture


def fence(language: str, text: str) -> str:
    return f"```{language}\n{text.rstrip()}\n```"


def main() -> None:
    source = nbformat.read(SOURCE, as_version=4)
    for path, page in PAGES.items():
        notebook = nbformat.read(path, as_version=4)
        copy_code(source, notebook)
        nbformat.write(notebook, path)
        page.parent.mkdir(exist_ok=True)
        page.write_text(to_markdown(notebook, page), encoding="utf-8")
    PICTURES.mkdir(exist_ok=True)
    for cell in code_cells(source):
        if picture := shown(cell)[1]:
            (PICTURES / f"{cell.id}.png").write_bytes(picture)


if __name__ == "__main__":
    main()
