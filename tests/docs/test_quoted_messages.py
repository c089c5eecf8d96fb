"""The page of errors quotes messages that exist: each heading in code style is a message of thaw's source."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
OF_OTHERS = ("operator torchvision", "torch.OutOfMemoryError", "Killed")  # messages of torch and of the shell
LEAST = 8  # characters that a quoted part and a message must share


@cache
def texts() -> list[str]:
    """What stands between the values in each text of the source; a text over several lines is one."""
    found = []
    for path in [*(ROOT / "src").rglob("*.py"), *ROOT.glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found += re.split(r"%s|%d", node.value)
    return [text.strip() for text in found if len(text.strip()) >= LEAST]


def quoted() -> list[str]:
    headings = re.findall(r"^### (.*)$", PAGE, re.MULTILINE)
    return [message for heading in headings for message in re.findall(r"`([^`]+)`", heading)]


@pytest.mark.parametrize("message", [each for each in quoted() if not each.startswith(OF_OTHERS)])
def test_a_quoted_message_is_one_of_the_source(message: str) -> None:
    parts = [part.strip() for part in message.split("...") if len(part.strip()) >= LEAST]
    assert parts
    for part in parts:
        assert any(part in text or text in part for text in texts()), part


def test_a_message_that_is_none_of_the_source_would_be_found() -> None:
    assert len(quoted()) > 20
    assert not any("the cat sat on the mat" in text or text in "the cat sat on the mat" for text in texts())
