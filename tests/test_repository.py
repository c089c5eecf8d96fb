"""Around the code: workflows call targets that exist, and the version and the extras are the same everywhere."""

import re
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from conftest import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
TARGETS = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def steps(workflow: Path) -> Iterator[tuple[dict, dict]]:
    """Each step of a workflow, with its job's matrix."""
    for job in yaml.safe_load(workflow.read_text())["jobs"].values():
        yield from ((step, job.get("strategy", {}).get("matrix", {})) for step in job["steps"])


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_makes_what_exists(workflow: Path) -> None:
    for step, matrix in steps(workflow):
        for target in re.findall(r"^make (\$\{\{ matrix\.(\w+) \}\}|[\w-]+)", step.get("run", ""), re.MULTILINE):
            assert set(matrix[target[1]] if target[1] else [target[0]]) <= TARGETS


def test_the_matrix_is_every_version_that_the_project_names() -> None:
    (matrix,) = {id(matrix): matrix for _, matrix in steps(ROOT / ".github" / "workflows" / "tests.yml")}.values()
    names = [name.rpartition(" ")[2] for name in PROJECT["classifiers"] if ":: Python :: 3." in name]
    assert matrix["python"] == names
    assert PROJECT["requires-python"] == f">={names[0]}"


def test_the_version_is_the_same_everywhere() -> None:
    version = PROJECT["version"]
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == version
    headings = re.findall(r"^## \[(.*?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[:2] == ["Unreleased", version]


def test_a_tag_is_released_with_its_part_of_the_changelog(tmp_path: Path) -> None:
    (script,) = [
        step["run"] for step, _ in steps(ROOT / ".github" / "workflows" / "release.yml") if "awk" in step.get("run", "")
    ]
    (tmp_path / "pyproject.toml").write_text('[project]\nversion = "0.2.0"\n')
    (tmp_path / "CHANGELOG.md").write_text(
        "# C\n\n## [Unreleased]\n\nnew\n\n## [0.2.0] - today\n\nthis\n\n## [0.1.0]\n\nold\n"
    )
    for tag, status in (("v0.2.0", 0), ("v0.3.0", 1)):
        command = ["bash", "-e", "-o", "pipefail", "-c", script]
        done = subprocess.run(command, cwd=tmp_path, env={"GITHUB_REF_NAME": tag, "PATH": "/usr/bin:/bin"}, check=False)
        assert done.returncode == status
    assert (tmp_path / "notes.md").read_text().split() == ["this"]


def test_extras_are_named_one_way() -> None:
    extras = PROJECT["optional-dependencies"]
    apart = {"mlflow", "trackio"}  # whose requirements are older than what the others have
    of_users = {name for name in extras if name not in ("all", "mutants", "docs", "test")} - apart
    assert extras["all"] == [f"{PROJECT['name']}[{','.join(name for name in extras if name in of_users)}]"]
    code = [path for folder in ("src", "configs") for path in (ROOT / folder).rglob("*.*")]
    code = [path for path in code if path.suffix in (".py", ".yaml")]
    for path in [*code, *ROOT.glob("*.py"), ROOT / "Makefile", ROOT / "Dockerfile"]:  # pages have tests of their own
        text = path.read_text(encoding="utf-8")
        assert f"{PROJECT['name']}[" not in text, path
        assert set(re.findall(r"pip install -e '\.\[([a-z,]+)\]'", text)) <= extras.keys(), path
