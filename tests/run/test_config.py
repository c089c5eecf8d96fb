"""From composed configuration to objects, and what `auto` means on a machine."""

from pathlib import Path

import pytest
from conftest import compose_run
from omegaconf import OmegaConf

from thaw.run.config import backbone_name, build_list, plain, settle, yaml_text


def test_build_list() -> None:
    blocks = OmegaConf.create({"a": {"_target_": "builtins.dict", "x": 1}, "off": None})
    assert build_list(blocks, "callbacks") == [{"x": 1}]
    with pytest.raises(ValueError, match=r"callbacks\.a={'x': 1} has no _target_"):
        build_list(OmegaConf.create({"a": {"x": 1}}), "callbacks")


def test_plain_keeps_references_but_not_hydras() -> None:
    OmegaConf.register_new_resolver("hydra", lambda key: f"resolved {key}", replace=True)
    cfg = OmegaConf.create({"run_dir": "${hydra:runtime.output_dir}", "lr": 1, "optim": {"lr": "${lr}"}})
    config = plain(cfg)
    assert config == {"run_dir": "resolved runtime.output_dir", "lr": 1, "optim": {"lr": "${lr}"}}


def test_yaml_text_reads_back_and_is_omegaconfs(tmp_path: Path) -> None:
    def one_line(text: str) -> str:
        return text.replace("\n  ", " ")  # long text may break elsewhere

    texts = ["1e-3", "1_0", "no", "null", "0x1f", "1:30", "2026-11-27", "${optim.lr}", "'"]
    texts += ["", " a", "a: b", "é\n", "x " * 90]
    shared = [0.9, 0.999]  # twice, without an anchor
    config = {"texts": texts, "lr": 1e-05, "inf": float("inf"), "none": None, "a": shared, "b": shared, "1": {2: {}}}
    for each in (config, plain(compose_run(tmp_path))):
        assert OmegaConf.to_container(OmegaConf.create(yaml_text(each))) == each
        assert one_line(yaml_text(each)) == one_line(OmegaConf.to_yaml(each))
    assert yaml_text({"path": tmp_path}) == f"path: {tmp_path}\n"


def settled(accelerator: str, devices: object = 1, precision: str = "auto", fused: object = "auto") -> tuple:
    trainer = {"accelerator": accelerator, "devices": devices, "precision": precision}
    cfg = OmegaConf.create({"trainer": trainer, "backbone": {"fused_attention": fused}})
    settle(cfg)
    return cfg.trainer.precision, cfg.backbone.fused_attention


def test_settle_counts_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    settled("gpu", 2, "32-true")
    with pytest.raises(ValueError, match="choose 1 to 2"):
        settled("gpu", 3)
    with pytest.raises(ValueError, match="choose 1 to 2"):
        settled("gpu", [0, 1, 2])
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    with pytest.raises(ValueError, match="no GPU"):
        settled("gpu")
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: False)
    with pytest.raises(ValueError, match="not a Mac"):
        settled("mps")


@pytest.mark.parametrize("accelerator", ["cpu", "auto"])
@pytest.mark.parametrize(
    ("avx", "amx", "precision"), [(True, False, "bf16-mixed"), (False, True, "bf16-mixed"), (False, False, "32-true")]
)
def test_settle_on_a_cpu(
    accelerator: str, avx: bool, amx: bool, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.cpu._is_avx512_bf16_supported", lambda: avx)
    monkeypatch.setattr("torch.cpu._is_amx_tile_supported", lambda: amx)
    assert settled(accelerator) == (precision, False)


@pytest.mark.parametrize("accelerator", ["gpu", "cuda", "auto"])
@pytest.mark.parametrize(("native", "precision"), [(True, "bf16-mixed"), (False, "32-true")])
def test_settle_on_a_gpu(accelerator: str, native: bool, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Emulated bf16, as on GPUs before Ampere, is slower than fp32; what the CPU can do does not count."""
    monkeypatch.setattr("torch.accelerator.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation=True: native or including_emulation)
    monkeypatch.setattr("torch.cpu._is_avx512_bf16_supported", lambda: not native)
    assert settled(accelerator) == (precision, True)


def test_settle_on_a_mac(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: True)
    monkeypatch.setattr("torch.cpu._is_avx512_bf16_supported", lambda: True)
    assert settled("mps") == ("32-true", True)


@pytest.mark.parametrize(("precision", "fused"), [("16-mixed", True), ("64-true", False)])
def test_settle_leaves_choices_alone(precision: str, fused: bool) -> None:
    assert settled("cpu", precision=precision, fused=fused) == (precision, fused)


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        ([], "digits_vit"),
        (["backbone.image_size=56", "backbone.arguments.drop_path_rate=0.1"], "digits_vit"),
        (["backbone.weights=none"], "vit_tiny_patch16_224 with patch_size 7, depth 6"),
        (["backbone.weights=runs/w.pth"], "vit_tiny_patch16_224 with patch_size 7, depth 6 from w.pth"),
        (["backbone=vit_small_dinov2"], "vit_small_patch14_dinov2.lvd142m"),
        (["backbone=vit_small_dinov2", "backbone.weights=none"], "vit_small_patch14_dinov2"),
        (["backbone=vit_small_dinov2", "backbone.weights=w.pth"], "vit_small_patch14_dinov2 from w.pth"),
        (["backbone=convnet"], "convnet"),
    ],
)
def test_a_backbone_is_called_after_its_weights(overrides: list[str], name: str, tmp_path: Path) -> None:
    cfg = compose_run(tmp_path, *overrides)
    assert backbone_name(cfg.backbone) == name
    assert list(cfg.logger.wandb.tags) == ["MNIST", name]
