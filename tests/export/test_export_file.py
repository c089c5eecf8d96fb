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

from thaw.data.images import Source
from thaw.export import export_file as module
from thaw.export.export_file import export_file
from thaw.export.onnx_model import load_onnx
from thaw.export.portable import Portable
from thaw.export.portable import portable as real_portable
from thaw.predict.predictor import Predictor

KINDS: dict[str, list[str]] = {
    "vit": [],
    "vit_56px_rgb": ["backbone.image_size=56", "backbone.arguments.patch_size=14", "backbone.channels=3"],
    "lora_class_and_mean": [
        *("freeze=lora", "backbone.arguments.class_token=true", "backbone.arguments.global_pool=token"),
        *("backbone.pool=class_and_mean", "head.norm=batch"),
    ],
    "mlp_head": ["head=mlp"],
    "bank": ["head=lr_bank", "freeze=full", "head.lrs=[1e-3,1e-2]"],
    "convnet": ["experiment=baseline/convnet", "backbone.widths=[8,16]"],
    "lenet5": ["experiment=baseline/lenet5"],
    "mlp": ["experiment=baseline/mlp", "backbone.hidden=[32]"],
    "lstm": ["experiment=baseline/rnn", "backbone.hidden_size=16"],
    "gru": ["experiment=baseline/rnn", "backbone.hidden_size=16", "backbone.cell=gru", "backbone.num_layers=2"],
    "pixels": ["experiment=baseline/logistic_regression"],
}
FIVE_LINES = """
import json, numpy, onnxruntime
session = onnxruntime.InferenceSession("model.onnx")
classes = json.loads(session.get_modelmeta().custom_metadata_map["classes"])
probabilities = session.run(["probabilities"], {"images": numpy.load("digits.npy")})[0]
print([classes[k] for k in probabilities.argmax(axis=1)])
"""


@pytest.fixture
def kind(build: Callable[..., Predictor], tiny_vit: Callable[..., Predictor]) -> Callable[[str], Predictor]:
    """Builds one of `KINDS`."""
    return lambda name: (build if "experiment=" in "".join(KINDS[name]) else tiny_vit)(*KINDS[name])


def largest(one: Any, other: Any) -> float:
    return float((torch.as_tensor(one) - torch.as_tensor(other)).abs().max())


@pytest.mark.parametrize("name", KINDS)
def test_onnxruntime_gives_what_the_predictor_gives(
    name: str, kind: Callable[[str], Predictor], source: Source, tmp_path: Path
) -> None:
    predictor = kind(name)
    images = source.train.images[:501]
    wanted = predictor(images)
    maps = predictor.attention(images) if predictor.has_attention else None
    facts = export_file(predictor, source, "onnx", None, tmp_path / "model.onnx")
    assert facts["parity_digits"] == 60 and facts["parity_largest_difference"] < 1e-5

    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")  # nothing of thaw
    for count in (1, 2, 501):
        outputs = session.run(None, {"images": images[:count].numpy()})
        assert largest(outputs[0], wanted[:count]) < 1e-5
        assert np.allclose(outputs[0].sum(axis=1), 1, atol=1e-5)
        if maps is not None:
            assert largest(outputs[1], maps[:count]) < 1e-5
    assert len(outputs) == 1 + (maps is not None)

    model = load_onnx(tmp_path / "model.onnx")
    assert model.has_attention is predictor.has_attention
    assert largest(model(images), wanted) < 1e-5
    assert model(images[:0]).shape == (0, 10)
    if maps is not None:
        assert largest(model.attention(images), maps) < 1e-5
        assert model.attention(images[:0]).shape == (0, *maps.shape[1:])
    else:
        with pytest.raises(ValueError, match="no attention"):
            model.attention(images)


@pytest.mark.parametrize("name", ["vit_56px_rgb", "lora_class_and_mean", "lstm", "convnet"])
def test_torch_export_loads_without_thaw(
    name: str, kind: Callable[[str], Predictor], source: Source, tmp_path: Path
) -> None:
    predictor = kind(name)
    images = source.train.images[:501]
    wanted = predictor(images)
    facts = export_file(predictor, source, "torch_export", None, tmp_path / "model.pt2")
    extra = {"thaw.json": ""}
    loaded = torch.export.load(tmp_path / "model.pt2", extra_files=extra).module()
    for count in (1, 501):
        assert largest(loaded(images[:count])[0].detach(), wanted[:count]) < 1e-5
    assert json.loads(extra["thaw.json"]) == facts
    assert str(ROOT).encode() not in (tmp_path / "model.pt2").read_bytes()


def test_metadata(tiny_vit: Callable[..., Predictor], source: Source, tmp_path: Path) -> None:
    predictor = tiny_vit("freeze=lora")
    facts = export_file(predictor, source, "onnx", None, tmp_path / "model.onnx")
    stored = onnxruntime.InferenceSession(tmp_path / "model.onnx").get_modelmeta().custom_metadata_map
    assert {key: json.loads(value) for key, value in stored.items()} == facts
    assert load_onnx(tmp_path / "model.onnx").facts() == facts
    merged = predictor.facts()  # LoRA is in the matrices by now
    assert facts["weights_sha256"] == merged["weights_sha256"] and facts["parameters"] == merged["parameters"]
    assert facts["classes"] == [str(digit) for digit in range(10)]
    assert facts["trained_commit"] == "c0ffee"
    right = (predictor(source.test.images).argmax(dim=1) == source.test.labels).float().mean()
    assert facts["test_accuracy"] == pytest.approx(float(right), abs=1e-6)
    low, high = facts["test_accuracy_interval"]
    assert low < facts["test_accuracy"] < high and facts["test_digits"] == 60 and facts["data_source"] == "sample"
    content = (tmp_path / "model.onnx").read_bytes()
    assert str(ROOT).encode() not in content and str(tmp_path).encode() not in content
    onnx.checker.check_model(onnx.load(tmp_path / "model.onnx"), full_check=True)
    (given,) = onnx.load(tmp_path / "model.onnx").graph.input
    assert given.type.tensor_type.shape.dim[0].dim_param == "batch"


def test_needs_onnxruntime_and_numpy_alone(tiny_vit: Callable[..., Predictor], source: Source, tmp_path: Path) -> None:
    """The README's lines, where nothing else that thaw needs can be imported."""
    predictor = tiny_vit()
    wanted = predictor(source.test.images)
    export_file(predictor, source, "onnx", None, tmp_path / "model.onnx")
    np.save(tmp_path / "digits.npy", source.test.images.numpy())
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    code = next((block for block in blocks if "onnxruntime" in block), FIVE_LINES)
    assert len([line for line in code.splitlines() if line.strip()]) <= 5
    blocked = "import sys\nfor name in ('torch', 'thaw', 'lightning', 'timm', 'onnx'): sys.modules[name] = None\n"
    done = subprocess.run([sys.executable, "-c", blocked + code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.findall(r"\d", done.stdout) == [str(digit) for digit in wanted.argmax(dim=1).tolist()]


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
def test_int8(name: str, kind: Callable[[str], Predictor], source: Source, tmp_path: Path) -> None:
    predictor = kind(name)
    wanted = predictor(source.test.images)
    path = tmp_path / "model.int8.onnx"
    facts = export_file(predictor, source, "onnx", "int8", path)
    assert [file.name for file in tmp_path.glob("*.onnx")] == ["model.int8.onnx"]
    assert path.stat().st_size < facts["fp32_bytes"]
    rounded = torch.from_numpy(
        onnxruntime.InferenceSession(path).run(["probabilities"], {"images": source.test.images.numpy()})[0]
    )
    same = (rounded.argmax(dim=1) == wanted.argmax(dim=1)).float().mean()
    assert facts["agreement_with_fp32"] == pytest.approx(float(same), abs=1e-6) and same > 0.8
    assert facts["largest_difference_to_fp32"] == pytest.approx(largest(rounded, wanted), abs=1e-4)
    right = (rounded.argmax(dim=1) == source.test.labels).float().mean()
    assert facts["test_accuracy"] == pytest.approx(float(right), abs=1e-6)
    assert load_onnx(path).facts()["quantized"] == "int8"
    if name == "vit":  # 4 matrices in each block, and the head; not the product of attention maps
        assert facts["quantized_operators"] == {"MatMulInteger": 2 * 4 + 1}


def test_what_is_no_file_of_ours(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no file"):
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


def test_digits_of_another_kind(build: Callable[..., Predictor], source: Source, tmp_path: Path) -> None:
    export_file(build(*KINDS["pixels"]), source, "onnx", None, tmp_path / "model.onnx")
    model = load_onnx(tmp_path / "model.onnx")
    for wrong in (torch.zeros(2, 28, 28), torch.zeros(2, 1, 28, 28, dtype=torch.uint8)):
        with pytest.raises(ValueError, match="must be uint8"):
            model(wrong)
