"""What docs/fork.md promises: another name, and rooms that are removed. A copy of the checkout is changed and tried."""

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import REMOVABLE, ROOT
from test_rooms import REMOVALS

from tools.rename import RefusedError, check_checkout, check_name, main, renamed, rules

FEW = ("experiment=vit_linear_probe", "data.source=sample", "data.train_size=300", "data.batch_size=50", "logger=none")
SCRIPTS = ("train", "eval", "predict", "probe", "clean", "report", "export", "serve", "sweep", "compare")
TESTS = ("tests/run/test_targets.py", "tests/test_configs.py", "tests/test_task.py", "tests/test_rooms.py")
OWN = rules("thaw", "thaw-vit", "pets", ["data", "load", "plan"])


@pytest.fixture
def copied(checkout: Path, tmp_path: Path) -> Callable[..., str]:
    """Runs a command in a copy of the checkout and returns what it prints; a status other than 0 fails the test."""
    place = tmp_path / "copy"
    shutil.copytree(checkout, place, symlinks=True)

    def run(*words: str) -> str:
        environment = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "PYTHONPATH": str(place / "src")}
        done = subprocess.run(words, cwd=place, env=environment, capture_output=True, text=True)
        assert not done.returncode, f"{' '.join(words)}\n{done.stdout[-6000:]}\n{done.stderr[-3000:]}"
        return done.stdout

    return run


def try_out(run: Callable[..., str], *tests: str) -> None:
    """Lint, types, import rules, configurations, a few tests, a training, an evaluation, each command's help."""
    python = ".venv/bin/python"
    run(python, "-m", "ruff", "check", ".")
    run(python, "-m", "ruff", "format", "--check", ".")
    run(python, "-m", "mypy")
    run(python, "-m", "pytest", "-q", "-x", "-m", "not slow and not long", "-k", "not two_batches", *tests, *TESTS)
    run(python, "train.py", *FEW, "trainer.max_epochs=1")
    run(python, "eval.py", "ckpt=last", "robustness.images=10", "wandb=false")
    for script in SCRIPTS:
        if run("git", "ls-files", f"{script}.py"):
            assert f"python {script}.py" in run(python, f"{script}.py", "--help")


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("room", REMOVABLE)
def test_a_room_can_be_removed(room: str, copied: Callable[..., str]) -> None:
    """Of the remaining tests those that name every room; all would take the time of a whole run for each room."""
    copied("bash", "-c", REMOVALS[room])
    try_out(copied, "tests/test_messages.py", "tests/run/test_command.py")


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_another_name(copied: Callable[..., str]) -> None:
    copied(".venv/bin/python", "tools/rename.py", "digitlab")
    left = copied("git", "grep", "-nIE", r"(import|from|module) thaw\b|\bthaw-vit|THAW_|src/thaw|[\"'=]thaw\b")
    kept = ("FORMER_NAMES", "tools/rename.py", "tests/docs/test_fork.py", "attr(", "benchmarks/")
    assert not [line for line in left.splitlines() if not any(name in line for name in kept)]
    try_out(copied, "tests/run/test_migrations.py", "tests/run/test_checkpoint.py")


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("from thaw.data import x", "from pets.data import x"),
        ('    "import thaw\\n",', '    "import pets\\n",'),  # of a notebook
        ("_target_: thaw.data.X", "_target_: pets.data.X"),
        (r"match=r'_target_=thaw\.data\.X'", r"match=r'_target_=pets\.data\.X'"),
        ('logging.getLogger("thaw")', 'logging.getLogger("pets")'),
        ("python -m thaw.plan; src/thaw/data", "python -m pets.plan; src/pets/data"),
        ("hydra_plugins.thaw_sweeps.X", "hydra_plugins.pets_sweeps.X"),
        ("pip install 'thaw-vit[search]'", "pip install 'pets[search]'"),
        ('"THAW_PARENT"', '"PETS_PARENT"'),
        ("a checkpoint of thaw; thaw's rule", "a checkpoint of pets; pets's rule"),
        ("model = thaw.load(path)", "model = pets.load(path)"),
        ('getattr(module, "thaw", None)', None),
        ("self.thaw.apply(0); thaw.apply(0); thaw.epochs", None),
        ("layers that thaw; no thaw schedule; # What to thaw; Thaw", None),
    ],
)
def test_where_the_name_is_that_of_the_package(before: str, after: str | None) -> None:
    assert renamed(before, OWN) == (after or before)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("9x", "not the name of a package"),
        ("My-Project", "not the name of a package"),
        ("class", "not the name of a package"),
        ("thaw", "has this name already"),
        ("torch", "an installed package"),
        ("json", "an installed package, or by Python"),
        ("tests", "is taken by tests here"),
        ("train", r"is taken by train\.py here"),
    ],
)
def test_a_name_that_cannot_be(name: str, message: str) -> None:
    with pytest.raises(RefusedError, match=message):
        check_name(name, "thaw")


def test_only_a_clean_checkout_is_renamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tools.rename.ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    with pytest.raises(RefusedError, match="is not a checkout of git"):
        check_checkout()
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    check_checkout()
    (tmp_path / "mine.txt").touch()
    with pytest.raises(RefusedError, match=r"1 files are not committed, such as mine\.txt; commit or stash"):
        check_checkout()


def test_a_failure_leaves_the_tree_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "src" / "thaw"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("import thaw.data\n")
    (tmp_path / "pyproject.toml").write_bytes((ROOT / "pyproject.toml").read_bytes())
    author = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["add", "-A"], [*author, "commit", "-qm", "all"]):
        subprocess.run(["git", *words], cwd=tmp_path, check=True)
    monkeypatch.setattr("tools.rename.ROOT", tmp_path)
    monkeypatch.setattr(sys, "executable", "false")  # in place of ruff
    monkeypatch.setattr(sys, "argv", ["rename.py", "pets"])
    with pytest.raises(SystemExit, match=r"error: false .* failed"):
        main()
    assert (package / "__init__.py").read_text() == "import thaw.data\n" and not (tmp_path / "src" / "pets").exists()
    assert not subprocess.run(["git", "status", "--porcelain"], cwd=tmp_path, capture_output=True).stdout
