"""What thaw is built from, what it downloads, and what it writes: nothing foreign comes in, no secret goes out."""

import io
import os
import re
import subprocess
import sys
import tarfile
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT, needs
from packaging.requirements import Requirement

from thaw.data.mnist import MirrorURL
from thaw.run.command_line import shown_error
from thaw.run.errors import UserError
from thaw.run.loggers import stop_service

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
REQUIREMENTS = [PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()]
HARMFUL = {  # releases that hold foreign code, known faults, or changes that break thaw
    **{"lightning": ["2.6.2", "2.6.3"], "hydra-core": ["1.3.2", "1.4.0"], "filelock": ["3.20.2"]},
    **{"onnx": ["1.20.1"], "pillow": ["12.2.0"], "torch": ["2.5.1"]},
}
MARK = "SeCrEtMaRk"
VARIABLES = ("WANDB_API_KEY", "HF_TOKEN", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN", "AWS_SECRET_ACCESS_KEY")
LEAKS = {
    "a password in a URL": "data.mirrors=['http://user:{}@127.0.0.1:9/mnist']",
    "a server's password": "+logger.mlflow.tracking_uri=https://user:{}@127.0.0.1:9",
    "a token": "name={}",
    "a token of the environment": "name=${{oc.env:HF_TOKEN}}",
}
UNSAFE = {  # what ruff has to refuse in thaw's code
    **{"eval(text)": "S307", "exec(text)": "S102", "pickle.loads(text)": "S301", "yaml.load(text)": "S506"},
    **{"subprocess.run(text, shell=True)": "S602", "os.system(text)": "S605", "tempfile.mktemp()": "S306"},
    **{'open("/tmp/thaw.log", "w")': "S108", "os.chmod(text, 0o777)": "S103", "hashlib.md5(text)": "S324"},
    **{"urllib.request.urlopen(text)": "S310", "requests.get(text, verify=False, timeout=1)": "S501"},
    **{"tarfile.open(text).extractall()": "S202", "telnetlib.Telnet(text)": "S312"},
}


def test_a_run_keeps_no_secret_and_honours_the_umask(
    tries: Any,
    command: Callable[..., int],
    tiny_run: list[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    for number, name in enumerate(VARIABLES):
        monkeypatch.setenv(name, f"{MARK}{number}".ljust(40, "0"))
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    place = [f"hydra.run.dir={tmp_path / 'run'}", f"cache.dir={tmp_path / 'cache'}"]
    probe = [*(each for each in tiny_run if each != "logger=none"), "experiment=vit_linear_probe", *place]
    stop_service()  # that of an earlier run has another umask
    before = os.umask(0o027)
    try:
        assert command("train.py", *probe, "logger=[csv,wandb]", "trainer.max_epochs=1", "test=false") == 0
    finally:
        os.umask(before)
    written = [path for folder in ("run", "cache") for path in [*(tmp_path / folder).rglob("*")]]
    assert len(written) > 20 and any(path.suffix == ".wandb" for path in written)
    with tries("a secret in the environment", harm="let in") as attempt:
        with attempt("the terminal"):
            assert MARK not in "".join(capfd.readouterr())
        for path in written:
            with attempt(path.name):
                assert not path.is_file() or MARK.encode() not in path.read_bytes()
                copied = "code" in path.parts  # by W&B, with the mode of the program
                assert path.is_symlink() or copied or not path.stat().st_mode & 0o027


def test_a_setting_is_no_place_for_a_secret(
    tries: Any,
    command: Callable[..., int],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("HF_TOKEN", f"hf_{MARK}")
    with tries("a secret as a setting", harm="let in") as attempt:
        for what, leak in LEAKS.items():
            with attempt(what):
                given = leak.format(f"hf_{MARK}" if "token" in what else MARK)
                assert command("train.py", f"hydra.run.dir={tmp_path / 'run'}", given) == 1
                said = "".join(capfd.readouterr())
                assert "which the run's files and logs would keep" in said and MARK not in said
                kept = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
                assert not [path for path in kept if MARK.encode() in path.read_bytes()]


def test_an_error_shows_no_password() -> None:
    error = OSError("https://user:secret@host/api refuses")
    assert shown_error(error) == "https://host/api refuses"


def test_the_lint_sees_what_is_unsafe(tries: Any) -> None:
    code = "".join(f"{line}\n" for line in UNSAFE)
    ruff = [Path(sys.executable).with_name("ruff"), "check", "--no-cache", "--output-format=concise", "-"]
    names = ["--stdin-filename", ROOT / "src" / "thaw" / "unsafe.py"]
    imports = "import hashlib, os, pickle, requests, subprocess, tarfile, telnetlib, tempfile, urllib.request, yaml\n"
    found = subprocess.run([*ruff, *names], input=imports + code, cwd=ROOT, capture_output=True, text=True)
    seen = set(re.findall(r"unsafe\.py:(\d+):\d+: (S\d+)", found.stdout))
    with tries("unsafe code", harm="let in") as attempt:
        for number, (line, rule) in enumerate(UNSAFE.items(), start=2):
            with attempt(line):
                assert (str(number), rule) in seen


@pytest.mark.parametrize("name", HARMFUL)
def test_harmful_releases_are_refused(name: str) -> None:
    wanted = [Requirement(each) for group in REQUIREMENTS for each in group]
    (specifier,) = {each.specifier for each in wanted if each.name == name}
    assert not [release for release in HARMFUL[name] if release in specifier]


def test_the_constraints_are_within_the_bounds() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = dict(line.split("==") for line in lines if not line.startswith("#"))
    wanted = [Requirement(each) for group in REQUIREMENTS for each in group]
    assert all(each.specifier.contains(pinned[each.name]) for each in wanted if each.name in pinned)


def test_what_builds_and_publishes_thaw() -> None:
    """GitHub's own actions with no more rights than they need; no script from the net; no root in the image."""
    for path in (ROOT / ".github" / "workflows").glob("*.yml"):
        workflow = yaml.safe_load(path.read_text())
        assert workflow["permissions"] in ({"contents": "read"}, {}), path
        for step in [step for job in workflow["jobs"].values() for step in job["steps"]]:
            action = step.get("uses", "actions/")
            assert action.startswith("actions/")
            assert "checkout" not in action or step["with"] == {"persist-credentials": False}
    places = [*ROOT.glob(".github/workflows/*"), *ROOT.glob(".ci/*"), *ROOT.glob(".devcontainer/*")]
    for path in [*places, ROOT / "Dockerfile", ROOT / "Makefile"]:
        assert not re.search(r"(curl|wget)[^\n]*\|", path.read_text()), path
    assert re.findall(r"^USER (.*)", (ROOT / "Dockerfile").read_text(), re.MULTILINE)[-1] not in ("root", "0")


@needs("export")
def test_a_package_writes_nothing_and_reads_nothing_beside_itself(tries: Any, tmp_path: Path) -> None:
    """The runtime of exported pages, whose archive names files outside of it."""
    from thaw.export.web_runtime import RUNTIME_PARTS, load_runtime

    with tries("an archive that points outside", harm="let in") as attempt:
        for what in ("a link", "a name"):
            with attempt(what):
                path = tmp_path / f"{what}.tgz"
                with tarfile.open(path, "w:gz") as package:
                    for part in RUNTIME_PARTS:
                        member = tarfile.TarInfo(f"package/{part}" if what == "a link" else f"../../{part}")
                        if what == "a link":
                            member.type, member.linkname = tarfile.SYMTYPE, str(ROOT / "LICENSE")
                        package.addfile(member, io.BytesIO())
                with pytest.raises(UserError):
                    load_runtime(str(path))
                assert {each.suffix for each in tmp_path.rglob("*")} == {".tgz"}


def test_a_mirror_is_no_file() -> None:
    (field,) = MirrorURL.__metadata__  # type: ignore[attr-defined]
    (pattern,) = [each.pattern for each in field.metadata if hasattr(each, "pattern")]
    assert re.match(pattern, "https://example.org") and not re.match(pattern, "file:///etc")
