"""A configuration from a file can name what it is meant for and nothing else, and nothing else is imported."""

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import ROOT
from omegaconf import OmegaConf

from thaw.run import checkpoint as checkpoints
from thaw.run.config import plain
from thaw.run.targets import LIGHTNING, check_targets, config_leaves

CHECKPOINT = ROOT / "tests" / "checkpoints" / "linear_probe.ckpt"
FILE = Path("run.ckpt")


@pytest.fixture(scope="module")
def config() -> dict[str, Any]:
    return checkpoints.read_checkpoint(CHECKPOINT)["config"]


NAMES = [
    *("os.system", "os.makedirs", "posix.system", "subprocess.getoutput", "builtins.exec", "builtins.list"),
    *("shutil.copy", "urllib.request.urlretrieve", "pathlib.Path.write_text", "logging.FileHandler"),
    *("runpy.run_path", "torch.load", "torch.save", "torch.hub.load", "numpy.save", "numpy.load"),
    *("torch.optim.os.makedirs", "hydra.utils.get_method", "hydra.utils.get_class", "hydra.utils.call"),
    *("hydra.utils.instantiate", "omegaconf.OmegaConf.save", "functools.partial", "importlib.import_module"),
    *("torch.nn.Linear", "thaw.run.config.os.makedirs", "thaw.freezing.lora.re.compile"),
    *("thaw.run.checkpoint.torch.load", "thaw.data.mnist.gzip.open", "thaw.run.files.write_json"),
    *("thaw.data.mnist.fetch", "thaw.data.mnist.download", "thaw.plan.__main__.main"),
    *("thaw.export.hub_folder.CardModel", "thaw.run.ranks.end_with", "thaw.run.checkpoint.load_model"),
    *("thaw.run.config.build", "thaw.models.backbone.nn.Linear", "thaw", "thaw.models"),
    *("timm.optim.create_optimizer_v2", "timm.create_model", "lightning.pytorch.loggers.CSVLogger"),
    *("thaw_evil.Model", "payload_module.anything"),
]


@pytest.mark.parametrize("name", [*NAMES, ""])
def test_other_names_are_refused_wherever_they_stand(
    config: dict[str, Any], name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "payload_module.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    block = {"_target_": name, "path": "x"}
    places = [("head",), ("model", "optim"), ("model", "freeze", "lora"), ("callbacks", "mine"), ("logger", "mine")]
    for place in places:
        inside = {"_target_": "torch.optim.SGD", "_args_": [block]}
        for given in (block, {**block, "_partial_": True}, [1, [block]], inside):
            changed = copy.deepcopy(config)
            node = changed
            for key in place[:-1]:
                node = node[key]
            node[place[-1]] = given
            with pytest.raises(ValueError, match=r"is refused and was not run|cannot be imported"):
                check_targets(changed, FILE, allow=[])


@pytest.mark.parametrize(
    "value",
    [
        *("${oc.env:HOME}", "${oc.decode:'{_target_: os.makedirs}'}", "${oc.create:{_target_: os.makedirs}}"),
        *("${oc.select:none,{_target_: os.makedirs}}", "${hydra:runtime.cwd}", "a ${oc.env:HOME} b", "${now:%Y}"),
        *("${oc.select:none,[1]}", "${${oc.env:HOME}}", "${run_id:x}", "\\${oc.env:HOME}"),
    ],
)
def test_resolvers_are_refused(config: dict[str, Any], value: str) -> None:
    for key in ("_target_", "norm"):
        with pytest.raises(ValueError, match=r"is refused|is not run"):
            check_targets({**config, "head": {**config["head"], key: value}}, FILE, allow=[])
    with pytest.raises(ValueError, match="refused"):
        check_targets({**config, "head": {"_target_": {"x": value}}}, FILE, allow=[])


def test_references_to_other_keys_are_allowed(config: dict[str, Any]) -> None:
    references = ["${backbone}", "${data.batch_size}", "${.norm}", "${..seed}", "${oc.select:freeze.add,null}"]
    for value in [*references, "a ${seed} b", "${oc.select:backbone.name,${backbone._target_}}"]:
        check_targets({**config, "name": value}, FILE, allow=[])


def test_what_configurations_name_is_allowed() -> None:
    """All that train.yaml may be composed of, and optimizers of torch and timm."""
    names = ["torch.optim.NAdam", "timm.optim.Lion", "timm.optim.Adan"]
    for path in (ROOT / "configs").rglob("*.yaml"):
        if not {"hydra", "sweep", "compare.yaml"} & set(path.relative_to(ROOT / "configs").parts):
            content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
            names += [value for place, value in config_leaves(content, "") if place.endswith("_target_")]
    assert set(names) >= LIGHTNING
    for name in names:
        check_targets({"head": {"_target_": name}}, FILE, allow=[])


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


def test_the_check_comes_with_reading(tmp_path: Path) -> None:
    checkpoint = torch.load(CHECKPOINT, weights_only=True)
    for key, value in {
        "config": {**checkpoint["config"], "head": {"_target_": "os.makedirs", "name": str(tmp_path / "RAN")}},
        "wandb_id": "${oc.env:HOME}",
        "wandb_id ": {"_target_": "os.makedirs", "name": str(tmp_path / "RAN")},
    }.items():
        torch.save({**checkpoint, key.strip(): value}, tmp_path / "evil.ckpt")
        with pytest.raises(ValueError, match=r"is refused|is not the id"):
            checkpoints.read_checkpoint(tmp_path / "evil.ckpt")
    assert not (tmp_path / "RAN").exists()
    torch.save({**checkpoint, "wandb_id": "my.run of 2026"}, tmp_path / "own_id.ckpt")
    assert checkpoints.read_checkpoint(tmp_path / "own_id.ckpt")["wandb_id"] == "my.run of 2026"
