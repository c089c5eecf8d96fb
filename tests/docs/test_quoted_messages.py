"""The page of errors quotes messages that exist: each heading in code style is a message of thaw's source."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
OF_OTHERS = (
    "operator torchvision",
    "No module named",
    "torch.OutOfMemoryError",
    "Killed",
)  # not ours


@cache
def source() -> str:
    """Every text in the source, also one over several lines."""
    paths = [*(ROOT / "src").rglob("*.py"), *ROOT.glob("*.py")]
    nodes = [node for path in paths for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))]
    return "\n".join(node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str))


def quoted() -> list[str]:
    headings = re.findall(r"^### (.*)$", PAGE, re.MULTILINE)
    return [message for heading in headings for message in re.findall(r"`([^`]+)`", heading)]


def phrases(message: str) -> list[str]:
    """Each three words of a message in turn, without values: words with a digit, a dot or an equals sign."""
    runs = re.split(r"\S*(?:\d|\w\.\w|=|\.\.\.)\S*", message)
    words = [run.split() for run in runs if len(run.strip()) > 5]
    return [" ".join(run[start : start + 3]) for run in words for start in range(max(1, len(run) - 2))]


@pytest.mark.parametrize("message", [each for each in quoted() if not each.startswith(OF_OTHERS)])
def test_a_quoted_message_is_one_of_the_source(message: str) -> None:
    assert any(phrase in source() for phrase in phrases(message)), phrases(message)


def test_the_headings_are_found() -> None:
    assert len(quoted()) > 20
    assert phrases("optim.lr=1,2 holds several values") == ["holds several values"]
