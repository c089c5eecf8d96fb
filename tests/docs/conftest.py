"""A copy of the checkout, in which the pages are run."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT


@pytest.fixture(scope="session")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of this checkout, with an environment in .venv that make takes for installed, and nothing in logs/."""
    place = tmp_path_factory.mktemp("checkout") / "thaw"
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, check=True, text=True).stdout.split("\0")
    for name in filter(None, names):
        if (ROOT / name).is_file():
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, place / name)
    author = ["-c", "user.name=thaw", "-c", "user.email=thaw@localhost"]
    for words in (["init", "-q"], ["add", "-A"], [*author, "commit", "-qm", "A copy"]):
        subprocess.run(["git", *words], cwd=place, check=True)
    (place / ".venv").mkdir()
    for path in Path(sys.prefix).iterdir():
        if not path.name.startswith(".installed"):
            (place / ".venv" / path.name).symlink_to(path)
    for extra in ("", "-test", "-docs"):
        (place / ".venv" / f".installed{extra}").touch()
    return place
