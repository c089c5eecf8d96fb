"""Exports a predictor to one checked file: ONNX, torch.export's, or a page that holds the ONNX file."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from thaw.data.batches import by_batches
from thaw.data.images import Source
from thaw.export.facts import check_parity, model_facts, parity_sample, tested_facts
from thaw.export.onnx_file import OPSET, check_onnx_installed, save_onnx, to_int8, to_onnx
from thaw.export.portable import portable, trace
from thaw.export.torch_program import load_program, save_program
from thaw.export.web_page import load_page, save_page
from thaw.export.web_runtime import load_runtime
from thaw.predict.onnx_model import load_onnx
from thaw.predict.predictor import Predictor
from thaw.run.console import say
from thaw.run.files import atomic


class FileFormat(NamedTuple):
    """The functions that write a traced model with its facts and load it."""

    save: Callable[[Any, Mapping[str, Any], Path], None]
    load: Callable[[Path], Any]


FILE_FORMATS = {
    "onnx": FileFormat(save_onnx, load_onnx),
    "torch_export": FileFormat(save_program, load_program),
}
ONNX = ("onnx", "web")  # the formats that hold an ONNX file


def export_file(
    predictor: Predictor, source: Source, format: str, quantize: str | None, path: Path, runtime: str | None = None
) -> dict[str, Any]:
    """Write a file and check it; it replaces an earlier file at `path` only if it passes.

    Args:
        predictor: in fp32 on the CPU; what the policy added is merged into its model where it can be.
        source: of the images for comparison and test.
        format: `web` or one of `FILE_FORMATS`.
        quantize: `int8`, for `onnx` and `web`, or None.
        runtime: for `web`, see `thaw.export.web_runtime.load_runtime`.

    Returns the facts in the file.

    Raises:
        UserError: the model cannot be exported, or the file does not compute what the model does.
    """
    if format in ONNX:
        check_onnx_installed()
    if format == "web":
        how = FileFormat(partial(save_page, runtime=load_runtime(runtime)), load_page)
    else:
        how = FILE_FORMATS[format]
    save, load = how
    sample = parity_sample(predictor, source.test)
    model = portable(predictor)
    facts = model_facts(predictor, format)
    say(f"tracing {predictor.name}")
    exported: Any = trace(model, predictor.name, predictor.data["shape"])
    if format in ONNX:
        say("converting it to ONNX")
        exported = to_onnx(exported, predictor.name)
        facts["opset"] = OPSET
    with atomic(path) as part:
        save(exported, facts, part)
        written = load(part)
        say(f"comparing {len(sample[0]):,} predictions with the trained model's")
        facts |= check_parity(written, *sample)
        probabilities = by_batches(written, source.test.images, title="test accuracy")
        facts |= tested_facts(probabilities, source)
        if quantize:
            fp32 = {"fp32_test_accuracy": facts["test_accuracy"], "fp32_bytes": part.stat().st_size}
            say("quantising the weights to int8")
            exported, operators = to_int8(exported)
            save(exported, facts, part)
            rounded = by_batches(load(part), source.test.images, title="test accuracy in int8")
            same = (rounded.argmax(dim=1) == probabilities.argmax(dim=1)).float().mean()
            facts |= tested_facts(rounded, source) | fp32
            facts |= {
                "quantized": "int8",
                "quantized_operators": operators,
                "agreement_with_fp32": round(float(same), 6),
                "largest_difference_to_fp32": float((rounded - probabilities).abs().max()),
            }
        save(exported, facts, part)  # once more, now with the measured facts
        assert load(part).facts().keys() >= facts.keys()
    return facts
