"""HTML pages from Jinja2 templates. A page is one file that loads nothing; values are escaped."""

import base64
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

from thaw.run.files import write_text


def data_uri(picture: Path | bytes) -> str:
    """A PNG file, or its content, as an address that holds its bytes."""
    content = picture if isinstance(picture, bytes) else picture.read_bytes()
    return "data:image/png;base64," + base64.b64encode(content).decode()


def render(template: str, **values: Any) -> str:
    """The text of a page from a file in `templates`.

    Raises:
        jinja2.UndefinedError: the template uses a name that `values` lack.
    """
    pages = Environment(
        loader=PackageLoader("thaw.pages"),
        autoescape=select_autoescape(["html"]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    pages.filters |= {
        "data_uri": data_uri,
        "count": lambda number: f"{number:,}",
        "percent": lambda share: "-" if share is None else f"{share:.2%}",
    }
    return pages.get_template(template).render(values)


def write_page(path: Path, template: str, **values: Any) -> None:
    """Write a page to a file, see `render`."""
    write_text(render(template, **values), path)
