"""The site builds without a warning, lacks no setting, and is read without a server."""

import re
from pathlib import Path

import pytest
import yaml
from conftest import ROOT
from mkdocs.commands.build import build
from mkdocs.config import load_config
from test_configs import GROUPS, names

from tools.docs_site import Formulas

PHONE = {"width": 360, "height": 800}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the site; a dead link, an anchor that is missing or a page outside the navigation is an error."""
    folder = tmp_path_factory.mktemp("site")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.syspath_prepend(str(ROOT))
        build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(folder), strict=True))
    return folder


def test_nothing_is_fetched_from_elsewhere(built: Path) -> None:
    for path in built.rglob("*.html"):
        for tag in re.findall(r"<(?:script|link|img|iframe|source)\b[^>]*>", path.read_text(encoding="utf-8")):
            assert "//" not in tag or 'rel="canonical"' in tag, f"{path}: {tag}"


def test_the_reference_has_every_option_and_key(built: Path) -> None:
    page = (built / "docs" / "reference" / "configuration.html").read_text(encoding="utf-8")
    assert not [f"{group}={name}" for group in GROUPS for name in names(group) if f"{group}={name}" not in page]
    for path in (ROOT / "configs").glob("*.yaml"):
        keys = yaml.safe_load(path.read_text(encoding="utf-8")).keys() - {"defaults", "hydra", "run_dir", "overrides"}
        assert not [key for key in keys if f"<code>{key}" not in page], path


def test_the_reference_says_default_range_and_meaning(built: Path) -> None:
    page = re.sub("<.*?>", "", (built / "docs" / "reference" / "configuration.html").read_text(encoding="utf-8"))
    row = page[page.index("optim.layer_decay\n") :].split("\n\n")[0].split("\n")
    assert row[:3] == [
        "optim.layer_decay",
        "1.0",
        "each layer down multiplies the learning rate by this (a number above 0 and at most 1)",
    ]


def test_formulas_are_mathml() -> None:
    from markdown import Markdown

    markdown = Markdown(
        extensions=["pymdownx.arithmatex", Formulas()], extension_configs={"pymdownx.arithmatex": {"generic": True}}
    )
    html = markdown.convert("A $x_1^2$ in `$code$`, and 5 $ or 6 $.\n\n$$\\frac{a}{b}$$\n")
    assert "<msubsup><mi>x</mi><mn>1</mn><mn>2</mn></msubsup>" in html and "<code>$code$</code>" in html
    assert 'display="block"><mrow><mfrac>' in html.replace("<mrow><mrow>", "<mrow>") and "5 $ or 6 $" in html


@pytest.mark.long
def test_no_page_is_wider_than_a_phone(built: Path, browser) -> None:
    page = browser.new_page(viewport=PHONE)
    requests: list[str] = []
    page.on("request", lambda request: requests.append(request.url))
    for path in sorted(built.rglob("*.html")):
        page.goto(path.as_uri())
        assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"], path
    assert all(url.startswith(("file:", "data:", "blob:", "about:")) for url in requests)


@pytest.mark.long
def test_the_search_works_from_disk(built: Path, browser) -> None:
    page = browser.new_page(viewport={"width": 1280, "height": 800})
    page.goto((built / "docs" / "zoo.html").as_uri())
    page.keyboard.press("/")
    page.keyboard.type("preemption")
    page.wait_for_selector(".md-search-result__link", timeout=10_000)
    assert "preemption" in page.inner_text(".md-search-result__list").lower()
