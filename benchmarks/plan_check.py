"""What thaw.plan predicts next to what a CPU measures.    python -m benchmarks.plan_check

Memory: a process per case, which fits three steps with Lightning as train.py does, twice; the peak of resident memory
in the second over what was held after the first: the digits, and the code that oneDNN makes for each shape. Buffers of
64 KiB and more go back to the system when they are freed, so that this is what a step needs and not what the C library
keeps.
Time: all cases in turn on one thread of one process, the fastest of their steps in seconds of the CPU, which other
programs disturb less than those of the clock. Each is predicted from its FLOPs and the FLOP/s of another case: the
first of its backbone, and the first of all.
"""

import argparse
import gc
import json
import logging
import os
import re
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig

from thaw.freezing.cache import VERIFIED
from thaw.plan.__main__ import compose_run, read_arguments
from thaw.plan.dry_step import Step, dry_step
from thaw.run.console import lenient

CASES = [  # backbone, image size, policy, batch, cache; time is calibrated on the first of each backbone
    ("vit_small", 64, "full", 128, "off"),
    ("vit_small", 64, "full", 32, "off"),
    ("vit_small", 112, "full", 32, "off"),
    ("vit_small", 64, "last_blocks", 128, "off"),
    ("vit_small", 64, "linear_probe", 128, "off"),
    ("digits_vit", 28, "full", 128, "off"),
    ("digits_vit", 28, "last_blocks", 128, "off"),
    ("digits_vit", 28, "last_blocks", 128, "memory"),
    ("digits_vit", 28, "linear_probe", 128, "off"),
    ("vit_tiny", 64, "full", 128, "off"),
    ("vit_tiny", 64, "last_blocks", 128, "off"),
    ("vit_tiny", 64, "linear_probe", 128, "off"),
    ("vit_tiny", 112, "lora", 64, "off"),
    ("vit_tiny", 224, "full", 8, "off"),
]
WITHIN = 0.15
STEPS = 6
RETURNED = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


class Clock(L.Callback):
    """Seconds of the CPU in each step."""

    def __init__(self) -> None:
        self.steps: list[float] = []
        self.begun = 0.0

    def on_train_batch_start(self, *_: Any) -> None:
        self.begun = time.process_time()

    def on_train_batch_end(self, *_: Any) -> None:
        self.steps.append(time.process_time() - self.begun)


def compose_case(case: tuple, precision: str) -> DictConfig:
    backbone, size, policy, batch, cache = case
    settings, _ = read_arguments([f"batch_size={batch}", f"image_size={size}", f"precision={precision}"])
    few = ["data.source=sample", f"data.train_size={STEPS * batch}"]
    return compose_run(settings, backbone, policy, ["backbone.fused_attention=false", *few, f"cache.mode={cache}"])


def fit(cfg: DictConfig, steps: int, datamodule: L.LightningDataModule | None = None) -> list[float]:
    """Seconds of each step of a real training, with random weights."""
    VERIFIED.clear()  # features are computed anew
    cfg = cfg.copy()
    cfg.backbone.weights = "none"
    model = instantiate(cfg.model)
    model.backbone.fresh = frozenset()
    clock = Clock()
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = L.Trainer(
        max_epochs=1,
        limit_train_batches=steps,
        limit_val_batches=0,
        precision=cfg.trainer.precision,
        gradient_clip_val=cfg.trainer.gradient_clip_val,
        accelerator="cpu",
        devices=1,
        callbacks=[clock],
        enable_model_summary=False,
        **quiet,
    )
    trainer.fit(model, datamodule or instantiate(cfg.data))
    return clock.steps


def resident(key: str) -> int:
    """Bytes of VmRSS (now) or VmHWM (peak) of this process."""
    found = re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) * 1024


def peak_of(case: tuple, precision: str) -> int:
    """Bytes that a case needs; to be called in a process of its own."""
    cfg = compose_case(case, precision)
    datamodule = instantiate(cfg.data)
    fit(cfg, 3, datamodule)
    VERIFIED.clear()
    gc.collect()
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # starts VmHWM anew
    fit(cfg, 3, datamodule)
    return resident("VmHWM") - before


def check_memory(precision: str) -> list[tuple[str, float, float]]:
    rows = []
    for case in CASES:
        command = [sys.executable, "-m", "benchmarks.plan_check", "--precision", precision, "--case", json.dumps(case)]
        child = subprocess.run(command, env=os.environ | RETURNED, capture_output=True, text=True)
        if child.returncode:
            raise SystemExit(child.stderr)
        step = predict(case, precision)
        state = step.weights + step.gradients + step.optimizer
        planned = max(state + step.activations, step.weights + step.filling)
        if case[-1] == "memory":
            planned += step.kept * (STEPS * case[3] + 500)  # training and validation digits
        rows.append((describe(case), planned / 1e6, int(child.stdout.split()[-1]) / 1e6))
    return rows


def predict(case: tuple, precision: str) -> Step:
    return dry_step(compose_case(case, precision), "cpu")


def work_of(case: tuple, step: Step) -> float:
    """FLOPs of a step."""
    frozen = step.frozen_flops if case[-1] == "off" else 0
    return case[3] * (frozen + step.forward_flops + step.backward_flops)


def check_time(precision: str, rounds: int) -> list[tuple[str, float, float, float]]:
    """Name, milliseconds measured, predicted from the first case of the same backbone, and from the first of all."""
    seconds: dict[tuple, list[float]] = {case: [] for case in CASES}
    for _ in range(rounds):
        for case in CASES:
            seconds[case] += fit(compose_case(case, precision), STEPS)[2:]
    measured = {case: 1e3 * min(steps) for case, steps in seconds.items()}
    work = {case: work_of(case, predict(case, precision)) for case in CASES}
    rows = []
    for case in CASES:
        own = next(first for first in CASES if first[0] == case[0])
        known = [work[case] / work[first] * measured[first] for first in (own, CASES[0])]
        rows.append((describe(case), measured[case], *known))
    return rows


def describe(case: tuple) -> str:
    backbone, size, policy, batch, cache = case
    return f"{backbone:<11}{size:>4} px  {policy:<13}{batch:>4} images  cache {cache:<7}"


def verdict(predicted: float, measured: float) -> str:
    ratio = predicted / measured
    return f"{ratio:5.2f} {'  ' if abs(ratio - 1) <= WITHIN else ' !'}"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--precision", default="bf16-mixed")
    parser.add_argument("--what", choices=("memory", "time", "both"), default="both")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--case", type=json.loads)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    if options.case:
        print(peak_of(tuple(options.case), options.precision))
        return
    if options.what != "time":
        print(f"memory, {options.precision}: predicted MB, measured MB, ratio (! beyond {WITHIN:.0%})", flush=True)
        for name, predicted, measured in check_memory(options.precision):
            print(f"{name} {predicted:8.1f} {measured:8.1f} {verdict(predicted, measured)}", flush=True)
    if options.what != "memory":
        torch.set_num_threads(1)
        rows = check_time(options.precision, options.rounds)
        print(f"time of a step, {options.precision}, one thread: ms measured; predicted / measured from the FLOP/s of")
        print("the first case of the same backbone, and of the first case of all")
        for name, measured, *predicted in rows:
            print(f"{name} {measured:8.1f}  {'  '.join(verdict(each, measured) for each in predicted)}")


if __name__ == "__main__":
    with lenient():
        main()
