from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, compose_config
from omegaconf import DictConfig, OmegaConf

import export
from thaw.export.destination import check_request, destination, summary
from thaw.export.web_runtime import RUNTIME_PARTS
from thaw.run.files import write_text


def request_(**changes: Any) -> DictConfig:
    cfg = OmegaConf.load(ROOT / "configs" / "export.yaml")
    return OmegaConf.merge(cfg, {"ckpt": "run", **changes})  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "tflite"}, "choose one of onnx, torch_export, web, hub_folder"),
        ({"quantize": "int4"}, "choose int8"),
        ({"quantize": "int8", "format": "torch_export"}, "is for format=onnx and format=web, not torch_export"),
        ({"push": "ada/digits"}, "is for format=hub_folder"),
        ({"license": "mit"}, "is for format=hub_folder"),
        ({"ckpt": ["a", "b"]}, "lists 2 checkpoints, and a file has one model; give one, or add combine=average"),
        ({"ckpt": ["a", "b"], "combine": "average"}, "belongs to no run's folder; .* output=model.onnx"),
        ({"tta": 4, "format": "hub_folder"}, "tta=4 is for one file, not format=hub_folder"),
        ({"runtime": "a.tgz"}, "is for format=web, not onnx; leave runtime out"),
    ],
)
def test_settings_that_do_not_go_together(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_request(request_(**changes))


def test_where_it_goes(tmp_path: Path) -> None:
    run = tmp_path / "run" / "checkpoints" / "best.ckpt"
    bare = tmp_path / "best.ckpt"
    assert destination(request_(), run) == tmp_path / "run" / "export" / "model.onnx"
    assert destination(request_(quantize="int8"), run) == tmp_path / "run" / "export" / "model.int8.onnx"
    assert destination(request_(format="torch_export"), run) == tmp_path / "run" / "export" / "model.pt2"
    assert destination(request_(format="hub_folder"), run) == tmp_path / "run" / "export" / "hub"
    assert destination(request_(format="web", quantize="int8"), run) == tmp_path / "run" / "export" / "index.int8.html"
    assert destination(request_(format="web"), bare) == tmp_path / "best.html"
    assert destination(request_(), bare) == tmp_path / "best.onnx"
    assert destination(request_(quantize="int8"), bare) == tmp_path / "best.int8.onnx"
    assert destination(request_(format="hub_folder"), bare) == tmp_path / "best_hub"
    assert destination(request_(output="a/b.onnx"), run) == Path("a/b.onnx")
    with pytest.raises(ValueError, match=r"must end in \.onnx"):
        destination(request_(output="model.pt2"), run)
    (tmp_path / "folder.onnx").mkdir()
    with pytest.raises(ValueError, match="is a folder"):
        destination(request_(output=str(tmp_path / "folder.onnx")), run)


def test_a_warning_where_int8_costs_more_than_a_point(tmp_path: Path) -> None:
    facts: dict[str, Any] = {"parity_images": 500, "parity_largest_difference": 1e-6, "data_source": "mine"}
    facts |= {"test_accuracy": 0.97, "test_accuracy_interval": [0.95, 0.98], "test_images": 500}
    said = summary(facts, tmp_path, "bf16-mixed")
    assert "WARNING" not in said and "fp32; the run was trained and tested in bf16-mixed" in said
    facts |= {"quantized": "int8", "quantized_operators": {"MatMulInteger": 3}, "agreement_with_fp32": 0.9}
    facts |= {"largest_difference_to_fp32": 0.2, "fp32_test_accuracy": 0.975, "fp32_bytes": 10**6}
    said = summary(facts, tmp_path, "32-true")
    assert "WARNING" not in said and "tested in" not in said
    (tmp_path / "weights").write_bytes(bytes(800))
    assert "stays float32" in summary(facts | {"fp32_bytes": 1000}, tmp_path, "32-true")
    assert "more than 1%" in summary(facts | {"fp32_test_accuracy": 0.985}, tmp_path, "32-true")


@pytest.mark.long
def test_command(
    train: Callable[..., Path], tiny_run: list[str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Commands on one run; each leaves what it says and nothing else."""
    run_dir = train(*tiny_run, "trainer.max_epochs=1", "freeze=lora")
    before = {path for path in ROOT.iterdir()}
    capsys.readouterr()
    export.main(compose_config("export", f"ckpt={run_dir}", "quantize=int8"))
    said = capsys.readouterr().out
    assert (
        said.startswith("checkpoint: ")
        and "\ntracing " in said
        and "same classes on 500 images" in said
        and "(fp32)" in said
    )
    export.main(compose_config("export", f"ckpt={run_dir}", "format=hub_folder", "license=mit"))
    for part, text in zip(RUNTIME_PARTS, ('{"version": "1"}', "ort", "glue", "wasm"), strict=True):
        write_text(text, tmp_path / "package" / part)
    export.main(compose_config("export", f"ckpt={run_dir}", "format=web", f"runtime={tmp_path / 'package'}"))
    assert "same classes on 500 images" in capsys.readouterr().out
    assert sorted(path.name for path in (run_dir / "export").iterdir()) == ["hub", "index.html", "model.int8.onnx"]
    assert {path for path in ROOT.iterdir() if path.name not in ("outputs", "__pycache__")} <= before
