import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from conftest import ROOT
from small_models import augmentation

import thaw
from thaw.data.images import Source
from thaw.data.mnist import SAMPLE
from thaw.export import export_file as module
from thaw.export.export_file import export_file
from thaw.export.onnx_file import save_onnx
from thaw.export.portable import Portable
from thaw.export.portable import portable as real_portable
from thaw.predict.average import Views
from thaw.predict.onnx_model import SEAL, load_onnx
from thaw.predict.predictor import Predictor, average


def largest(one: Any, other: Any) -> float:
    return float((torch.as_tensor(one) - torch.as_tensor(other)).abs().max())


def test_onnxruntime_gives_what_the_predictor_gives(kind: str, exported: Callable[..., Any]) -> None:
    _, wanted, facts, path, source = exported(kind, "onnx")
    images = source.train.images[:501]
    assert facts["parity_images"] == 60 and facts["parity_largest_difference"] < 1e-5

    session = onnxruntime.InferenceSession(path)  # nothing of thaw
    for count in (1, 2, 501):
        (probabilities,) = session.run(None, {"images": images[:count].numpy()})
        assert largest(probabilities, wanted[:count]) < 1e-5
        assert np.allclose(probabilities.sum(axis=1), 1, atol=1e-5)

    model = load_onnx(path)
    assert largest(model(images), wanted) < 1e-5
    assert model(images[:0]).shape == (0, len(source.classes))
    with pytest.raises(ValueError, match="attention maps load the checkpoint"):
        model.attention(images)
    with pytest.raises(ValueError, match="features load the checkpoint"):
        model.features(images)
    assert largest(thaw.load(path).predict(images[:9].numpy()), wanted[:9]) < 1e-5


@pytest.mark.parametrize(
    ("kinds", "settings"),
    [
        pytest.param(
            ("vit", "convnet"),
            {"degrees": 20.0, "translate": 0.1, "elastic": 1.0, "thickness": 0.5, "erase": 0.5},
            marks=pytest.mark.long,
        ),
        pytest.param(("photo_in_grey",), {"flip": 0.5, "crop_area": 0.4, "contrast": 0.3}, marks=pytest.mark.long),
        pytest.param(("photo_in_grey",), {"flip": 0.5, "crop_padding": 4}, marks=pytest.mark.long),
    ],
)
def test_an_average_over_models_and_views_is_one_file(
    kinds: tuple[str, ...], settings: dict[str, float], made: Callable[..., Any], tmp_path: Path
) -> None:
    predictors, sources = zip(*map(made, kinds), strict=True)
    images = sources[0].train.images[:64]
    together = average(predictors, Views(augmentation(**settings), 3, images.shape[1:]), "average")
    wanted = together(images)
    facts = export_file(together, sources[0], "onnx", None, tmp_path / "model.onnx")
    (given,) = onnxruntime.InferenceSession(tmp_path / "model.onnx").run(None, {"images": images.numpy()})
    assert largest(given, wanted) < 1e-5 and facts["parity_largest_difference"] < 1e-5
    single = [predictor(images) for predictor in predictors]
    assert largest(wanted, sum(single) / len(single)) > 1e-3, "views change something"
    assert load_onnx(tmp_path / "model.onnx").facts() == facts


@pytest.mark.parametrize("name", ["vit_56px_rgb", "lora_class_and_mean", "lstm", "photo_convnet"])
def test_torch_export_loads_without_thaw(name: str, exported: Callable[..., Any]) -> None:
    _, wanted, facts, path, source = exported(name, "torch_export")
    extra = {"thaw.json": ""}
    loaded = torch.export.load(path, extra_files=extra).module()
    for count in (1, 501):
        assert largest(loaded(source.train.images[:count])[0].detach(), wanted[:count]) < 1e-5
    assert json.loads(extra["thaw.json"]) == facts
    assert str(ROOT).encode() not in path.read_bytes()


def test_metadata(exported: Callable[..., Any]) -> None:
    predictor, _, facts, path, source = exported("lora_class_and_mean", "onnx")
    stored = onnxruntime.InferenceSession(path).get_modelmeta().custom_metadata_map
    assert {key: json.loads(value) for key, value in stored.items() if key != SEAL} == facts
    assert load_onnx(path).facts() == facts
    merged = predictor.facts()  # LoRA is in the matrices by now
    assert facts["weights_sha256"] == merged["weights_sha256"] and facts["parameters"] == merged["parameters"]
    assert facts["classes"] == [str(digit) for digit in range(10)]
    assert facts["trained_commit"] == "c0ffee"
    right = (predictor(source.test.images).argmax(dim=1) == source.test.labels).float().mean()
    assert facts["test_accuracy"] == pytest.approx(float(right), abs=1e-6)
    low, high = facts["test_accuracy_interval"]
    assert low < facts["test_accuracy"] < high and facts["test_images"] == 60 and facts["data_source"] == SAMPLE
    content = path.read_bytes()
    assert str(ROOT).encode() not in content and str(path.parent.parent).encode() not in content
    onnx.checker.check_model(onnx.load(path), full_check=True)
    (given,) = onnx.load(path).graph.input
    assert given.type.tensor_type.shape.dim[0].dim_param == "batch"


def test_needs_onnxruntime_and_numpy_alone(exported: Callable[..., Any], source: Source, tmp_path: Path) -> None:
    """The lines of docs/deploy.md, where nothing else that thaw needs can be imported."""
    _, wanted, _, path, _ = exported("vit", "onnx")
    np.save(tmp_path / "images.npy", source.train.images[:60].numpy())
    (tmp_path / "model.onnx").symlink_to(path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "deploy.md").read_text(encoding="utf-8"), re.DOTALL)
    (code,) = (block for block in blocks if "onnxruntime" in block)
    assert len([line for line in code.splitlines() if line.strip()]) <= 5
    blocked = "import sys\nfor name in ('torch', 'thaw', 'lightning', 'timm', 'onnx'): sys.modules[name] = None\n"
    done = subprocess.run([sys.executable, "-c", blocked + code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.findall(r"\d", done.stdout) == [str(digit) for digit in wanted[:60].argmax(dim=1).tolist()]


@pytest.mark.parametrize("format", ["onnx", "torch_export"])
def test_a_file_that_computes_something_else_gets_no_name(
    format: str,
    tiny_vit: Callable[..., Predictor],
    source: Source,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def wrong(predictor: Predictor) -> Portable:
        model = real_portable(predictor)
        model.preprocess.mean += 0.01
        return model

    monkeypatch.setattr(module, "portable", wrong)
    folder = tmp_path / "export"
    folder.mkdir()
    (folder / "model.onnx").write_text("the old one")
    with pytest.raises(ValueError, match=r"not the trained one.*differ.*up to"):
        export_file(tiny_vit(), source, format, None, folder / "model.onnx")
    assert [file.name for file in folder.iterdir()] == ["model.onnx"]
    assert (folder / "model.onnx").read_text() == "the old one"


@pytest.mark.parametrize("name", ["vit", "lstm"])
def test_int8(name: str, exported: Callable[..., Any], source: Source) -> None:
    predictor, _, facts, path, _ = exported(name, "onnx", "int8")
    wanted = predictor(source.test.images)
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    assert path.stat().st_size < facts["fp32_bytes"]
    rounded = torch.from_numpy(onnxruntime.InferenceSession(path).run(None, {"images": source.test.images.numpy()})[0])
    same = (rounded.argmax(dim=1) == wanted.argmax(dim=1)).float().mean()
    assert facts["agreement_with_fp32"] == pytest.approx(float(same), abs=1e-6) and same > 0.8
    assert facts["largest_difference_to_fp32"] == pytest.approx(largest(rounded, wanted), abs=1e-4)
    right = (rounded.argmax(dim=1) == source.test.labels).float().mean()
    assert facts["test_accuracy"] == pytest.approx(float(right), abs=1e-6)
    assert load_onnx(path).facts()["quantized"] == "int8"
    if name == "vit":  # 4 matrices in each block, and the head
        assert facts["quantized_operators"] == {"MatMulInteger": 2 * 4 + 1}


def test_other_files(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not a file"):
        load_onnx(tmp_path / "none.onnx")
    (tmp_path / "text.onnx").write_text("no model")
    with pytest.raises(ValueError, match="cannot be read"):
        load_onnx(tmp_path / "text.onnx")
    value = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])
    result = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1])
    graph = onnx.helper.make_graph([onnx.helper.make_node("Relu", ["x"], ["y"])], "other", [value], [result])
    opset = onnx.helper.make_opsetid("", 20)
    onnx.save(onnx.helper.make_model(graph, opset_imports=[opset], ir_version=9), tmp_path / "other.onnx")
    with pytest.raises(ValueError, match="not one of thaw's"):
        load_onnx(tmp_path / "other.onnx")


def test_images_of_another_kind(exported: Callable[..., Any]) -> None:
    model = load_onnx(exported("pixels", "onnx").path)
    for wrong in (
        torch.zeros(2, 28, 28),
        torch.zeros(2, 3, 28, 28, dtype=torch.uint8),
        torch.zeros(2, 28, 28, dtype=torch.uint8),
    ):
        with pytest.raises(ValueError, match="must be uint8"):
            model(wrong)


def test_files_of_earlier_versions_take_images_without_channels(exported: Callable[..., Any], tmp_path: Path) -> None:
    """Their input is (N, 28, 28), and their facts name neither shape nor reader."""
    _, wanted, facts, path, source = exported("vit", "onnx")
    model = onnx.load(path)
    (given,) = model.graph.input
    given.name = "pixels"
    for node in model.graph.node:
        node.input[:] = ["pixels" if name == "images" else name for name in node.input]
    old = onnx.helper.make_tensor_value_info("images", onnx.TensorProto.UINT8, ["batch", 28, 28])
    model.graph.input.remove(given)
    model.graph.input.append(old)
    axes = onnx.helper.make_tensor("axes", onnx.TensorProto.INT64, [1], [1])
    model.graph.initializer.append(axes)
    model.graph.node.insert(0, onnx.helper.make_node("Unsqueeze", ["images", "axes"], ["pixels"]))
    save_onnx(
        model, {key: value for key, value in facts.items() if key not in ("shape", "reader")}, tmp_path / "old.onnx"
    )
    loaded = load_onnx(tmp_path / "old.onnx")
    assert largest(loaded(source.train.images[:501]), wanted) < 1e-5
    assert loaded.data["classes"] == [*"0123456789"]
    assert (loaded.data["shape"], loaded.data["reader"]) == ((1, 28, 28), "digit")
    save_onnx(model, {**facts, "classes": 10}, tmp_path / "wrong.onnx")
    with pytest.raises(ValueError, match=r"wrong\.onnx holds data.classes=10: Input should be a valid list"):
        load_onnx(tmp_path / "wrong.onnx")


def test_facts_of_photographs(exported: Callable[..., Any]) -> None:
    _, _, facts, path, source = exported("photo_convnet", "onnx")
    model = load_onnx(path)
    assert facts["input"].startswith("uint8 (N, 3, 32, 32), N of 1 or more: 0 to 255, the centre square")
    assert facts["output"] == "probabilities (N, 37), in the order of classes"
    assert facts["classes"] == model.data["classes"] == source.classes
    assert (facts["dataset"], facts["reader"], facts["shape"]) == ("my pictures", "photo", [3, 32, 32])
