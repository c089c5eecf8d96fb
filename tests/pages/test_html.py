"""Templates escape what they show, miss nothing silently, and give one file that loads nothing."""

import base64
import re
from pathlib import Path

import pytest
from jinja2 import DictLoader, Environment, PackageLoader, UndefinedError
from jinja2.loaders import ChoiceLoader

from thaw.pages import html

TEMPLATE = """{% extends "base.html" %}{% from "parts.html" import figure, table %}
{% block body %}
{{ table([("name", true), ("score", false)], rows) }}{{ figure("A <picture>", picture) }}
{% endblock %}"""


@pytest.fixture
def page(monkeypatch: pytest.MonkeyPatch) -> None:
    """A template `page.html` beside those of the package."""

    def with_page(loader: PackageLoader, **options: object) -> Environment:
        return Environment(loader=ChoiceLoader([DictLoader({"page.html": TEMPLATE}), loader]), **options)  # type: ignore[arg-type]

    monkeypatch.setattr(html, "Environment", with_page)


def test_a_page_is_one_file_and_escapes_values(page: None, tmp_path: Path) -> None:
    picture = tmp_path / "picture.png"
    picture.write_bytes(b"PNG")
    rows = [[("<b>", "<b>"), ("90 %", 0.9)], [("ok", "ok"), ("-", None)]]
    html.write_page(tmp_path / "deep" / "page.html", "page.html", title="<title>", rows=rows, picture=picture)
    text = (tmp_path / "deep" / "page.html").read_text()
    assert "<title>&lt;title&gt;</title>" in text and 'data-key="&lt;b&gt;">&lt;b&gt;</td>' in text
    assert '<td data-key="0.9">90 %</td>' in text and '<td data-key="">-</td>' in text
    assert f'alt="A &lt;picture&gt;" src="data:image/png;base64,{base64.b64encode(b"PNG").decode()}"' in text
    assert "<b>" not in text and not re.findall(r'(?:src|href)="(?!data:)', text)
    assert "default-src 'none'" in text and "<script>" in text


def test_a_missing_value_is_an_error(page: None, tmp_path: Path) -> None:
    with pytest.raises(UndefinedError, match="rows"):
        html.write_page(tmp_path / "page.html", "page.html", title="x", picture=tmp_path)
    assert not (tmp_path / "page.html").exists()
