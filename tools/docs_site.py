"""What the site has beyond docs/: pages of the root, generated references, linked files, formulas in MathML.

A hook of mkdocs. Every page keeps its path in the repository, so that its links work there and in the site.
"""

import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from latex2mathml.converter import convert
from markdown import Extension, Markdown
from markdown.treeprocessors import Treeprocessor
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel

from tools import reference

ROOT = Path(__file__).resolve().parent.parent
SHOWN = {".png", ".svg", ".jpg", ".html", ".css", ".js"}  # by a browser, as they are; other files are shown as text
LINK = re.compile(r"\]\(([^\s()#:]+)(?:#[^\s()]*)?\)")


class Formulas(Extension):
    """`$...$` and `$$...$$`, which arithmatex has found, become MathML: the browser draws it without a script."""

    def extendMarkdown(self, md: Markdown) -> None:  # noqa: N802
        md.treeprocessors.register(ToMathML(md), "mathml", 15)  # after inline patterns


class ToMathML(Treeprocessor):
    def run(self, root: ElementTree.Element) -> None:
        for place in root.iter():
            if place.get("class") == "arithmatex" and place.text:
                latex, display = place.text[2:-2], "block" if place.tag == "div" else "inline"  # between \( and \)
                place.text = None
                formula = convert(latex, xmlns="", display=display)
                place.append(ElementTree.fromstring(formula))  # noqa: S314  (of our own pages)


def on_config(config: MkDocsConfig) -> None:
    config.markdown_extensions.append(Formulas())  # type: ignore[arg-type]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """The pages of the root and of docs/ by their paths in the repository, what they link to, and the references."""
    pages = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
    found = dict.fromkeys(pages)
    for path in (waiting := [*pages]):
        links = LINK.findall(path.read_text(encoding="utf-8")) if path.suffix == ".md" else []
        targets = [target for link in links if (target := (path.parent / link).resolve()).is_file()]
        waiting += [target for target in targets if target not in found]
        found |= dict.fromkeys(targets)
    made: dict[str, Any] = {path.relative_to(ROOT).as_posix(): {"abs_src_path": str(path)} for path in found}
    for path in found.keys() - set(pages):
        made[path.relative_to(ROOT).as_posix()]["inclusion"] = InclusionLevel.NOT_IN_NAV
    for name in ("site.css", "iframe-worker.js"):
        made[name] = {"abs_src_path": str(ROOT / "tools" / name)}
    made["docs/reference/configuration.md"] = {"content": reference.configuration()}
    made["docs/reference/api.md"] = {"content": reference.api()}
    collected = Files([])
    for name, source in made.items():
        file = File.generated(config, name, **source)
        if Path(name).suffix not in SHOWN | {".md"}:
            file.dest_uri += ".txt"
        collected.append(file)
    for file in files.media_files():  # of the theme
        if file.src_dir != config.docs_dir:
            collected.append(file)
    return collected
