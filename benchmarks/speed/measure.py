"""What all rows of `make bench` share: programs and what they cost, taking turns, and the machine's peak."""

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from thaw.run.stopwatch import STOPWATCH

ROOT = Path(__file__).resolve().parents[2]


class Row(NamedTuple):
    """Of the table. `ratio` says how many times as fast thaw is; of a share or a limit it is that number itself."""

    name: str
    other: str
    ours: str
    ratio: str
    asked: str
    aim: str


class Cost(NamedTuple):
    """Of a program: wall-clock seconds, peak memory in GB (1e9 bytes), and what it printed."""

    seconds: float
    memory: float
    output: str

    @property
    def result(self) -> dict[str, Any]:
        """The line of JSON at its end."""
        return json.loads(self.output.splitlines()[-1])


class Bench:
    """What is measured, and on what: `data` is data.dir, `quick` takes little of everything."""

    def __init__(self, data: str, quick: bool, rounds: int) -> None:
        self.data, self.quick = data, quick
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.rounds = 1 if quick else rounds
        self.size = 2000 if quick else 54000  # training images of a probe
        self.folder = tempfile.TemporaryDirectory(prefix="thaw_bench_")
        self.notes: list[str] = []

    def peak(self) -> float:
        """FLOP/s of matrix products in bf16 now; others may share the machine, so a row measures it in its turns."""
        return matrix_peak(self.device, torch.bfloat16)

    def new_folder(self) -> str:
        return tempfile.mkdtemp(dir=self.folder.name)

    def note(self, text: str) -> None:
        self.notes.append(f"- {text}")
        print(text, flush=True)

    def thaw(
        self, *overrides: str, script: str = "train.py", cache: str = "", sweep: bool = False
    ) -> tuple[Cost, dict]:
        """A command of thaw's in a folder of its own, by default with an empty cache; its cost and its summary.

        Of a sweep the summary is that of the job which was tested, the winner.
        """
        run = self.new_folder()
        where = [f"hydra.{'sweep' if sweep else 'run'}.dir={run}", f"cache.dir={cache or self.new_folder()}"]
        where += ["logger.wandb.mode=offline"] if script == "train.py" else []
        where += ["trainer=gpu"] if self.device == "cuda" else []
        cost = program(script, *(["-m"] if sweep else []), *self.official, *where, *overrides)
        found = [json.loads(path.read_text()) for path in Path(run).glob("*/summary.json" if sweep else "summary.json")]
        return cost, next((summary for summary in found if not sweep or summary["test/acc"]), {})

    @property
    def official(self) -> list[str]:
        return [f"data.dir={self.data}", "data.source=official"]

    def clocked(self, *overrides: str, cache: str = "") -> dict[str, Any]:
        """What `Clock` wrote about a run of train.py."""
        path = Path(self.new_folder(), "clock.json")
        clock = f"+callbacks.clock={{_target_:benchmarks.speed.measure.Clock,path:'{path}'}}"
        self.thaw(*overrides, clock, "test=false", "validate=false", cache=cache)
        return json.loads(path.read_text())

    def other(self, module: str, *arguments: str) -> Cost:
        """Another way: a script of benchmarks/, on the same device."""
        on = ["--device", self.device] if module != "closed_form" else []
        return program("-m", f"benchmarks.{module}", *arguments, *on)


class Clock(L.Callback):
    """Writes to `path`: seconds from the start of this process to the first step, and images/s of the last epoch."""

    def __init__(self, path: str) -> None:
        self.path, self.facts, self.begun = Path(path), dict[str, float](), 0.0

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.begun = time.perf_counter()

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *batch: Any) -> None:
        STOPWATCH.lap()
        self.facts.setdefault("first_step", sum(STOPWATCH.seconds.values()))

    def on_validation_start(self, trainer: Any, pl_module: L.LightningModule) -> None:
        if trainer.strategy.root_device.type == "cuda":
            torch.cuda.synchronize()
        images = len(trainer.datamodule.load().train.labels)
        self.facts["images_per_second"] = images / (time.perf_counter() - self.begun)
        self.path.write_text(json.dumps(self.facts))


def program(*arguments: str) -> Cost:
    """Run a Python program from the root of the project; an error ends the benchmark."""
    start = time.perf_counter()
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen([sys.executable, *arguments], cwd=ROOT, stdout=out, stderr=err)
        _, status, usage = os.wait4(process.pid, 0)
        elapsed = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0), err.seek(0)
        if status:
            raise SystemExit(f"{' '.join(arguments)}\n{err.read()}")
        unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss
        return Cost(elapsed, usage.ru_maxrss * unit / 1e9, out.read())


def in_turn(rounds: int, *functions: Callable[[], Any]) -> list[list[Any]]:
    """What each function returns, called A B C A B C ..."""
    results = [[function() for function in functions] for _ in range(rounds)]
    return [list(column) for column in zip(*results, strict=True)]


def middle(costs: list[Cost]) -> Cost:
    """The one whose seconds are the median (the lower of two)."""
    return sorted(costs)[(len(costs) - 1) // 2]


def rates(rounds: int, *functions: Callable[[], float]) -> list[float]:
    """The median of what each function returns, in turn."""
    return [statistics.median(column) for column in in_turn(rounds, *functions)]


def seconds_of(function: Callable[[], Any], repeats: int = 1) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        function()
    return (time.perf_counter() - start) / repeats


def times(other: float, ours: float) -> str:
    """How many times as fast ours is, of seconds."""
    return f"{other / ours:.2f}"


def forward_flops(model: nn.Module, *shape: int) -> float:
    """Of one image's forward pass (1, C, S, S), by plain attention; a multiplication with its addition is 2."""
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, *shape))
    return counter.get_total_flops()


def matrix_peak(device: str, dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product."""
    side = 4096 if device == "cpu" else 8192
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))

    def product() -> None:
        (a @ b)[0, 0].item()  # waits for a GPU

    product()
    return 2 * side**3 / min(seconds_of(product) for _ in range(5))


def machine() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":")[1].strip() for line in lines if "model name" in line]
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return (
        f"{(names or [platform.processor()])[0]}, {torch.get_num_threads()} threads, {gpu}; torch {torch.__version__}"
    )
