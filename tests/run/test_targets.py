"""A configuration from a file can name what it is meant for; tests/faults/test_untrusted.py has what it cannot."""

import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT
from omegaconf import OmegaConf

from thaw.run import checkpoint as checkpoints
from thaw.run.config import plain
from thaw.run.errors import UserError
from thaw.run.targets import LIGHTNING, check_targets, config_leaves

CHECKPOINT = ROOT / "tests" / "checkpoints" / "linear_probe.ckpt"
FILE = Path("run.ckpt")
PLACES = ("callbacks.x", "logger.x", "trainer", "trainer.strategy", "trainer.profiler", "data", "head")


@pytest.fixture(scope="module")
def config() -> dict[str, Any]:
    return checkpoints.read_checkpoint(CHECKPOINT)["config"]


def test_references_to_other_keys_are_allowed(config: dict[str, Any]) -> None:
    references = ["${backbone}", "${data.batch_size}", "${.norm}", "${..seed}", "${oc.select:freeze.add,null}"]
    for value in [*references, "a ${seed} b", "${oc.select:backbone.name,${backbone._target_}}"]:
        check_targets({**config, "name": value}, FILE, allow=[])


def allows(place: str, name: str) -> bool:
    config = OmegaConf.create()
    OmegaConf.update(config, place, {"_target_": name})
    try:
        check_targets(OmegaConf.to_container(config), FILE, allow=[])  # type: ignore[arg-type]
    except UserError:
        return False
    return True


def test_what_configurations_name_is_allowed() -> None:
    """All that train.yaml may be composed of, and optimizers of torch and timm."""
    names = ["torch.optim.NAdam", "timm.optim.Lion", "timm.optim.Adan"]
    for path in (ROOT / "configs").rglob("*.yaml"):
        if not {"hydra", "sweep", "clean.yaml", "compare.yaml"} & set(path.relative_to(ROOT / "configs").parts):
            content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
            names += [value for place, value in config_leaves(content, "") if place.endswith("_target_")]
    assert set(names) >= LIGHTNING
    for name in names:
        assert any(allows(place, name) for place in PLACES), name


def test_a_package_of_the_users_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Is allowed by its name; what it imports from elsewhere is not, nor is it imported before it is allowed."""
    package = tmp_path / "mypackage"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "heads.py").write_text("import os\nfrom torch import nn\nclass Head(nn.Linear): pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    config = {"head": {"_target_": "mypackage.heads.Head"}}
    for allow in ([], ["my"], ["heads"], ["mypackage.other"]):
        with pytest.raises(ValueError, match=r"allow=\[mypackage\]"):
            check_targets(config, FILE, allow)
    assert "mypackage" not in sys.modules
    for allow in (["mypackage"], ["mypackage.heads"], ["mypackage.heads.Head"]):
        check_targets(config, FILE, allow)
    for name in ("mypackage.heads.os.makedirs", "mypackage.heads.nn.Linear"):
        with pytest.raises(ValueError, match="is refused"):
            check_targets({"head": {"_target_": name}}, FILE, ["mypackage"])


def test_a_run_writes_what_may_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a resolver gives is written out, also in lists; references stay."""
    monkeypatch.setenv("PLACE", "here")
    cfg = OmegaConf.create({"a": "${oc.env:PLACE}/x", "b": ["${a}", {"c": "${oc.env:PLACE}"}], "d": "${a}"})
    config = plain(cfg)
    assert config == {"a": "here/x", "b": ["${a}", {"c": "here"}], "d": "${a}"}
    check_targets(config, FILE, allow=[])
