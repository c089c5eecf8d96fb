"""Checks the settings of export.py, finds the place of its output and sums up the result."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from thaw.run.errors import UserError

FILE_NAMES = {"onnx": "model.onnx", "torch_export": "model.pt2", "web": "index.html", "hub_folder": "hub"}
FORMATS_WITH = {
    "quantize": ("onnx", "web"),
    "push": ("hub_folder",),
    "license": ("hub_folder",),
    "runtime": ("web",),
}
ACCURACY_LOSS = 0.01  # by int8, above which there is a warning
SIZE_LEFT = 0.7  # of the float32 file, above which there is a warning


def check_request(cfg: DictConfig) -> None:
    """Raise a UserError for settings that do not go together, before anything is loaded."""
    if cfg.format not in FILE_NAMES:
        raise UserError(f"format={cfg.format!r} is unknown; choose one of {', '.join(FILE_NAMES)}.")
    if cfg.quantize not in (None, "int8"):
        raise UserError(f"quantize={cfg.quantize!r} is unknown; choose int8, or null for float32.")
    for key, formats in FORMATS_WITH.items():
        if cfg[key] is not None and cfg.format not in formats:
            wanted = " and ".join(f"format={name}" for name in formats)
            raise UserError(f"{key}={cfg[key]} is for {wanted}, not {cfg.format}; leave {key} out.")
    if cfg.combine or cfg.tta > 1:
        wanted = f"combine={cfg.combine}" if cfg.combine else f"tta={cfg.tta}"
        if cfg.format == "hub_folder":
            raise UserError(
                f"{wanted} is for one file, not format=hub_folder, whose weights are of one timm model; take "
                "format=onnx, or export the checkpoint that eval.py combine=soup writes."
            )
        if cfg.output is None:
            raise UserError(f"{wanted} belongs to no run's folder; say where the file goes: output=model.onnx.")
    elif OmegaConf.is_list(cfg.ckpt) and len(cfg.ckpt) > 1:
        raise UserError(
            f"ckpt lists {len(cfg.ckpt)} checkpoints, and a file has one model; give one, or add combine=average."
        )
    if cfg.push is not None:
        from thaw.export.push import check_push

        check_push(cfg.push)


def destination(cfg: DictConfig, checkpoint: Path) -> Path:
    """The file or folder to write: `output`, else in the run's folder, else beside a checkpoint without a run.

    Raises:
        UserError: `output` does not end as the format does, or is a folder where a file is wanted.
    """
    name = Path(FILE_NAMES[cfg.format])
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
        raise UserError(f"output={cfg.output} must end in {name.suffix}, by which programs know format={cfg.format}.")
    if cfg.format != "hub_folder" and path.is_dir():
        raise UserError(f"output={path} is a folder; give the name of a file in it, e.g. {path / name}.")
    return path


def summary(facts: Mapping[str, Any], path: Path, trained: str) -> str:
    """The measured facts in a few lines; `trained` is the precision of the run."""
    low, high = facts["test_accuracy_interval"]
    lines = [
        f"parity     same classes on {facts['parity_images']:,} images, probabilities within "
        f"{facts['parity_largest_difference']:.2g}",
        f"test       {facts['test_accuracy']:.2%} accuracy, 95 % interval {low:.2%} to {high:.2%}, "
        f"n = {facts['test_images']:,}",
        f"data       {facts['data_source']}",
    ]
    if not trained.startswith("32"):
        lines.append(
            f"precision  fp32; the run was trained and tested in {trained},\n"
            "           so that a few images may get another class"
        )
    size = sum(file.stat().st_size for file in [path, *path.rglob("*")] if file.is_file())
    if "quantized" in facts:
        operators = ", ".join(f"{count} {name}" for name, count in facts["quantized_operators"].items())
        lines[0] += " (fp32)"
        lines += [
            f"int8       {operators}; the same class as fp32 on {facts['agreement_with_fp32']:.2%},",
            f"           probabilities within {facts['largest_difference_to_fp32']:.2g}",
            f"fp32       {facts['fp32_test_accuracy']:.2%} accuracy, {facts['fp32_bytes'] / 1e6:.1f} MB",
        ]
        if size > SIZE_LEFT * facts["fp32_bytes"]:
            lines.append(
                "WARNING    int8 is for matrices; most of this model is convolution or recurrence\n"
                "           and stays float32: leave quantize out."
            )
        if facts["fp32_test_accuracy"] - facts["test_accuracy"] > ACCURACY_LOSS:
            lines.append(f"WARNING    int8 loses more than {ACCURACY_LOSS:.0%} of accuracy here; use the float32 file.")
    return "\n".join([*lines, f"size       {size / 1e6:.1f} MB", "written:", os.path.relpath(path)])
