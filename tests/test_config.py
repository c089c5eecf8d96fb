"""Wrong settings get a message with the value, what was allowed and the next step, and a status that is not 0."""

import subprocess
import sys

import pytest
from conftest import ROOT
from omegaconf import OmegaConf

from thaw.config import build_list, check, plain


def run(*arguments: str, script: str = "train.py") -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, script, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["optim.lrr=1"], ["optim.lrr", "allowed in optim: ", "layer_decay"]),
        (["learning_rate=1"], ["learning_rate", "allowed in the top level: ", "seed"]),
        (["backbone=resnet"], ["backbone/resnet", "digits_vit", "vit_small_dinov2"]),
        (["experiment=vit_probe"], ["vit_probe", "vit_linear_probe"]),
    ],
)
def test_unknown_key_or_option(arguments: list[str], expected: list[str]) -> None:
    result = run(*arguments)
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    for part in expected:
        assert part in result.stderr, result.stderr


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["trainer=gpu"], ["accelerator=gpu", "no GPU", "trainer=cpu"]),
        (["data.batch_size=5000", "data.source=sample"], ["data.batch_size=5000", "4,000", "choose at most 4000"]),
        (["backbone.image_size=30"], ["image_size=30", "patch size 7", "28"]),
        (["backbone.weights=nowhere.pth"], ["nowhere.pth", "none, bundled, hub"]),
        (["resume=last", "name=never_run"], ["never_run", "last.ckpt"]),
        (["+callbacks.mine={refresh_rate: 1}"], ["callbacks.mine", "_target_"]),
    ],
)
@pytest.mark.slow
def test_setting_that_cannot_work(arguments: list[str], expected: list[str], tmp_path) -> None:
    if arguments == ["trainer=gpu"]:
        torch = pytest.importorskip("torch")
        if torch.cuda.is_available():
            pytest.skip("there is a GPU here")
    result = run("experiment=vit_linear_probe", "logger=csv", f"hydra.run.dir={tmp_path}", *arguments)
    assert result.returncode == 1
    assert "Traceback" not in result.stderr, result.stderr
    for part in expected:
        assert part in result.stderr, result.stderr
    assert not (tmp_path / "checkpoints").exists()


def test_help_answers_without_heavy_imports() -> None:
    code = "import sys, train; assert not {'torch', 'lightning', 'timm'} & set(sys.modules), sorted(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_build_list() -> None:
    blocks = OmegaConf.create({"a": {"_target_": "builtins.dict", "x": 1}, "off": None})
    assert build_list(blocks, "callbacks") == [{"x": 1}]
    with pytest.raises(ValueError, match=r"callbacks\.a has no _target_"):
        build_list(OmegaConf.create({"a": {"x": 1}}), "callbacks")


def test_plain_keeps_references_but_not_hydras() -> None:
    OmegaConf.register_new_resolver("hydra", lambda key: f"resolved {key}", replace=True)
    cfg = OmegaConf.create({"run_dir": "${hydra:runtime.output_dir}", "lr": 1, "optim": {"lr": "${lr}"}})
    config = plain(cfg)
    assert config == {"run_dir": "resolved runtime.output_dir", "lr": 1, "optim": {"lr": "${lr}"}}


def test_check_counts_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    check(OmegaConf.create({"trainer": {"accelerator": "gpu", "devices": 2}}))
    with pytest.raises(ValueError, match="choose 1 to 2"):
        check(OmegaConf.create({"trainer": {"accelerator": "gpu", "devices": 3}}))
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: False)
    with pytest.raises(ValueError, match="no Mac"):
        check(OmegaConf.create({"trainer": {"accelerator": "mps", "devices": 1}}))
