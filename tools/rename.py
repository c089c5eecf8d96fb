"""Give the package another name: folder, imports, targets in configurations, documents.    make rename NAME=myproject

Text in which the name is an English word, such as "layers that thaw", stays as it is; so do binary files.
"""

import argparse
import ast
import importlib.util
import keyword
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MIGRATIONS = "run/migrations.py"  # lists former names, so that earlier checkpoints load
WIDTH = 120  # of a line of code

Rule = tuple[re.Pattern[str], str]


class RefusedError(Exception):
    """What is wrong with the name or the checkout, and the next step."""


def run(*command: str) -> str:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RefusedError(f"{' '.join(command)} failed: {(done.stderr or done.stdout).strip()}")
    return done.stdout


def rules(old: str, project: str, new: str, modules: Sequence[str]) -> list[Rule]:
    """Where the name means the package: in code, paths, quotes and a few turns of a sentence."""
    known = "|".join((*modules, r"__\w+__"))
    verbs = "is|has|takes|needs|runs|does|reads|sets|asks|waits|uses|must|cannot|classifies|writes|counts|splits|raises"
    verbs += "|submits|promises|locks|itself|API|and Hydra"
    before = "of|by|with|than|without|beside|from|uses|use|cite|install|The|Importing|module|8000"
    attribute = "\0"  # of an object, by its name: getattr(model, "thaw")
    found = {
        rf"(attr\([\w.]+, [\"']){old}\b": rf"\1{attribute}",
        rf"\b{project}\b": new,
        rf"(?<![\w.])((?:import|from)\s+){old}\b": rf"\1{new}",
        rf"(?<![\w.]){old}(?=\\*\.(?:{known})\b)": new,  # a module, also in a regular expression
        rf"(?<=[\"'`]){old}(?=[\"'`._:/])": new,
        rf"\bsrc/{old}\b": f"src/{new}",
        rf"(?<=/){old}(?=/)": new,
        rf"(::: |_target_=){old}\b": rf"\1{new}",
        rf"\b{old.upper()}_(?=[A-Z])": f"{new.upper()}_",
        rf"(hydra_plugins[./]){old}_": rf"\1{new}_",
        rf"(?<=[\"']){old}_(?=\w)": f"{new}_",
        rf"^({old})(?= = )": new,  # a key of pyproject.toml
        rf"((?:project: |job-name=|title: |site_name: |user\.name=|user\.email=)){old}\b": rf"\1{new}",
        rf"(-t |-v |-o |logs |chown=|1000 |/){old}(?=[ `)-]|$)": rf"\1{new}",  # of docker, and a folder
        rf"^(\s+- ){old}(?=: )": rf"\1{new}",  # the title of a page
        rf"^(# ){old}$": rf"\1{new}",
        rf"\b{old}(?='s\b)": new,
        rf"\b((?:{before}) ){old}\b(?! way)": rf"\1{new}",
        rf"\b{old}(?= (?:{verbs})\b(?!=))": new,
    }
    found[attribute] = old
    return [(re.compile(pattern, re.MULTILINE), to) for pattern, to in found.items()]


def check_name(name: str, old: str) -> None:
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or keyword.iskeyword(name):
        raise RefusedError(
            f"NAME={name} is not the name of a package: lower-case letters, digits and _, no keyword of Python. "
            "Try: make rename NAME=myproject"
        )
    if name == old:
        raise RefusedError(f"NAME={name}: the package has this name already; choose another.")
    taken = next((place for place in (ROOT / name, ROOT / f"{name}.py", ROOT / "src" / name) if place.exists()), None)
    if taken:
        raise RefusedError(f"NAME={name} is taken by {taken.relative_to(ROOT)} here; choose another.")
    if importlib.util.find_spec(name):
        raise RefusedError(f"NAME={name} is taken by an installed package, or by Python; choose another.")


def check_checkout() -> None:
    try:
        changed = run("git", "status", "--porcelain").splitlines()
        inside = Path(run("git", "rev-parse", "--show-toplevel").strip()) == ROOT
    except (RefusedError, FileNotFoundError) as error:
        raise RefusedError(
            f"{ROOT} is not a checkout of git, which makes the change undoable: git init && git add -A && git commit"
        ) from error
    if not inside:
        raise RefusedError(f"{ROOT} lies in another checkout of git; give it its own: git init")
    if changed:
        raise RefusedError(
            f"{len(changed)} files are not committed, such as {changed[0][3:]}; commit or stash them first, so that "
            "the change can be undone."
        )


def renamed(text: str, found: Sequence[Rule]) -> str:
    for pattern, to in found:
        text = pattern.sub(to, text)
    return text


def change(old: str, project: str, new: str) -> int:
    """Write and format every file; returns how many have changed."""
    modules = sorted({path.stem for path in (ROOT / "src" / old).iterdir() if not path.name.startswith(("_", "."))})
    offered = re.search(r"^__all__ = (\[.*\])", (ROOT / "src" / old / "__init__.py").read_text(), re.MULTILINE)
    found = rules(old, project, new, [*modules, *(ast.literal_eval(offered[1]) if offered else ())])
    changed = 0
    for name in run("git", "ls-files", "-z").split("\0"):
        path = ROOT / name
        if not name or path.is_symlink() or not path.is_file():
            continue
        try:
            text = path.read_bytes().decode()
        except UnicodeDecodeError:
            continue  # a picture, a checkpoint
        after = renamed(text, found)
        if name == f"src/{old}/{MIGRATIONS}":
            after = re.sub(r"(?m)^(FORMER_NAMES: [^=]+ = \()", rf'\1"{old}", ', after)
        if after != text:
            path.write_bytes(after.encode())
            changed += 1
    for path in sorted((ROOT / "src").rglob("__pycache__")):
        shutil.rmtree(path)
    run("git", "mv", f"src/{old}", f"src/{new}")
    plugins = Path("src/hydra_plugins")
    for path in sorted((ROOT / plugins).glob(f"{old}_*.py")):
        run("git", "mv", str(plugins / path.name), str(plugins / path.name.replace(old, new, 1)))
    run(sys.executable, "-m", "ruff", "check", "--fix", "--exit-zero", "--quiet", ".")
    run(sys.executable, "-m", "ruff", "format", "--quiet", ".")
    lines = [line for path in ROOT.rglob("*.py") if ".venv" not in path.parts for line in path.read_text().splitlines()]
    if any(len(line) > WIDTH for line in lines):
        settings = ROOT / "pyproject.toml"
        longer = 'ignore = [\n    "E501",  # text around the longer name'
        settings.write_text(settings.read_text().replace("ignore = [", longer, 1))
    run("git", "add", "-A")
    return changed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name")
    name = parser.parse_args().name
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    old, project = settings["tool"]["importlinter"]["root_package"], settings["project"]["name"]
    try:
        check_name(name, old)
        check_checkout()
        if importlib.util.find_spec("ruff") is None:
            raise RefusedError("ruff is missing, which formats the code: pip install -e '.[test]'")
        try:
            changed = change(old, project, name)
        except BaseException:
            run("git", "reset", "--hard", "--quiet")  # nothing was uncommitted
            shutil.rmtree(ROOT / "src" / name, ignore_errors=True)
            raise
    except RefusedError as error:
        sys.exit(f"error: {error}")
    print(f"{changed} files name {name} now, and the package is src/{name}; look at: git diff --cached")
    print(f"next: make test && git commit -m 'The project is called {name}'    to undo: git reset --hard")


if __name__ == "__main__":
    main()
