"""What export.py was asked for, where it goes, and what is said of it in the end."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

NAMES = {"onnx": "model.onnx", "torch_export": "model.pt2", "hub_folder": "hub"}
DROP = 0.01  # of accuracy by quantising, from which on it is a warning
MOST = 0.7  # of the size in float32, likewise


def check_request(cfg: DictConfig) -> None:
    """Refuse settings that do not go together, before anything is loaded.

    Raises:
        ValueError: says what was allowed.
    """
    if cfg.format not in NAMES:
        raise ValueError(f"format={cfg.format!r} is unknown; choose one of {', '.join(NAMES)}.")
    if cfg.quantize not in (None, "int8"):
        raise ValueError(f"quantize={cfg.quantize!r} is unknown; choose int8, or null for float32.")
    if cfg.quantize and cfg.format != "onnx":
        raise ValueError(f"quantize={cfg.quantize} is for format=onnx, not {cfg.format}; leave quantize out.")
    for key in ("push", "license"):
        if cfg[key] is not None and cfg.format != "hub_folder":
            raise ValueError(f"{key}={cfg[key]} is for format=hub_folder, not {cfg.format}; leave {key} out.")
    if cfg.push is not None:
        from thaw.export.push import check_push

        check_push(cfg.push)


def destination(cfg: DictConfig, checkpoint: Path) -> Path:
    """The file or folder that is written: `output`, or in the run's folder, or beside a checkpoint without a run.

    Raises:
        ValueError: `output` has another ending than the format, or something of another kind is there.
    """
    name = Path(NAMES[cfg.format])
    if cfg.quantize:
        name = name.with_suffix(f".{cfg.quantize}{name.suffix}")
    if cfg.output is not None:
        path = Path(cfg.output).expanduser()
    elif checkpoint.parent.name == "checkpoints":
        path = checkpoint.parent.parent / "export" / name
    else:
        path = checkpoint.with_name(checkpoint.stem + "_hub" if cfg.format == "hub_folder" else checkpoint.stem)
        path = path.with_name(path.name + "".join(name.suffixes))
    if path.suffix != name.suffix and name.suffix:
        raise ValueError(f"output={cfg.output} must end in {name.suffix}, by which programs know format={cfg.format}.")
    if cfg.format != "hub_folder" and path.is_dir():
        raise ValueError(f"output={path} is a folder; give the name of a file in it, e.g. {path / name}.")
    return path


def summary(facts: Mapping[str, Any], path: Path) -> str:
    """What was measured, in a few lines."""
    low, high = facts["test_accuracy_interval"]
    lines = [
        f"parity     same classes on {facts['parity_digits']:,} test digits, probabilities differ by at most "
        f"{facts['parity_largest_difference']:.2g}",
        f"test       {facts['test_accuracy']:.2%} accuracy, 95 % interval {low:.2%} to {high:.2%}, "
        f"n = {facts['test_digits']:,} ({facts['data_title']})",
    ]
    size = sum(file.stat().st_size for file in [path, *path.rglob("*")] if file.is_file())
    if "quantized" in facts:
        operators = ", ".join(f"{count} {name}" for name, count in facts["quantized_operators"].items())
        lines[0] += " before int8"
        lines += [
            f"int8       {operators}; the same class as fp32 on {facts['agreement_with_fp32']:.2%}, probabilities "
            f"differ by at most {facts['largest_difference_to_fp32']:.2g}",
            f"fp32       {facts['fp32_test_accuracy']:.2%} accuracy, {facts['fp32_bytes'] / 1e6:.1f} MB",
        ]
        if size > MOST * facts["fp32_bytes"]:
            lines.append(
                "WARNING    int8 is for matrices; most of this model is convolution or recurrence: float32 still."
            )
        if facts["fp32_test_accuracy"] - facts["test_accuracy"] > DROP:
            lines.append(f"WARNING    int8 loses more than {DROP:.0%} of accuracy here; use the float32 file.")
    return "\n".join([*lines, f"written    {os.path.relpath(path)}, {size / 1e6:.1f} MB"])
