"""What a sweep costs per job, and whether a disturbed one ends as if nothing had happened.

python -m benchmarks.sweeps            both; some minutes on two cores
python -m benchmarks.sweeps cost       13 learning rates in one process, features at hand: seconds per job
python -m benchmarks.sweeps disturbed  20 jobs in a queue, 3 killed and 2 raising; the same command again
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer

from thaw.run.console import lenient

ROOT = Path(__file__).parent.parent
PROBE = ["experiment=vit_linear_probe", "data.source=sample", "logger=csv"]
RATES = [1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1, 0.2, 0.5, 1.0]
FAULTS = {1: "kill", 6: "kill", 13: "kill", 4: "raise", 17: "raise"}  # seed -> what happens after two epochs


class Fault(Callback):
    """Kills or fails the jobs of some seeds after their second epoch, once for each seed.

    Args:
        marks: a folder that remembers which seeds have had their fault.
        seed: of this job.
    """

    def __init__(self, marks: str, seed: int) -> None:
        self.mark, self.fault = Path(marks) / str(seed), FAULTS.get(seed)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.current_epoch < 2 or self.fault is None or self.mark.exists():
            return
        self.mark.touch()
        if self.fault == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise RuntimeError("a fault that was put in")


def train(*arguments: str) -> tuple[float, subprocess.CompletedProcess]:
    """Run train.py; returns the seconds it took, and how it ended."""
    started = time.monotonic()
    command = [sys.executable, str(ROOT / "train.py"), *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return time.monotonic() - started, done


def cost(folder: Path) -> None:
    """Wall clock of a 13-value grid, divided by 13, and of one job alone."""
    cache = f"cache.dir={folder / 'cache'}"
    train(*PROBE, cache, f"hydra.run.dir={folder / 'warm'}")
    one, _ = train(*PROBE, cache, f"hydra.run.dir={folder / 'one'}")
    rates = "optim.lr=" + ",".join(map(str, RATES))
    seconds, done = train("-m", *PROBE, cache, rates, f"hydra.sweep.dir={folder / 'grid'}")
    assert done.returncode == 0, done.stderr
    print(f"13 jobs: {seconds:.1f} s, {seconds / 13:.2f} s a job; one alone {one:.1f} s (sample, features at hand)")


def disturbed(folder: Path) -> None:
    """20 jobs in a queue with faults, then the same command; compared with a sweep without faults."""
    jobs = [
        "-m",
        *PROBE,
        f"cache.dir={folder / 'cache'}",
        "seed=range(20)",
        "test=false",
        "trainer.plugins.0.seconds=0",
    ]
    jobs += ["data.batch_size=256", "trainer.max_epochs=4"]
    marks = {name: folder / "marks" / name for name in ("disturbed", "calm")}
    for path in marks.values():
        path.mkdir(parents=True)
    for seed in FAULTS:  # has had its fault
        (marks["calm"] / str(seed)).touch()

    def sweep(name: str, *more: str) -> subprocess.CompletedProcess:
        fault = f"+callbacks.fault={{_target_:benchmarks.sweeps.Fault,marks:'{marks[name]}',seed:'${{seed}}'}}"
        return train(*jobs, fault, f"hydra.sweep.dir={folder / name}", *more)[1]

    first = sweep("disturbed", "hydra/launcher=queue")
    before = outcomes(folder / "disturbed")
    second = sweep("disturbed", "hydra/launcher=queue")
    after = outcomes(folder / "disturbed")
    sweep("calm")
    calm = outcomes(folder / "calm")
    again = [seed for seed in before if before[seed]["written"] != after[seed]["written"]]
    print("\n".join(line for line in second.stdout.splitlines() if "jobs in" in line))
    print(
        f"first: {len(before)} of 20 done, exit status {first.returncode}; "
        f"again: {len(after)} of 20 done, exit status {second.returncode}; run twice: {again or 'none'}"
    )
    same = sum(equal(after[seed], calm[seed]) for seed in calm)
    print(f"{same} of {len(calm)} jobs have the weights and the accuracy of the undisturbed sweep, to the bit")


def outcomes(sweep: Path) -> dict[int, dict[str, Any]]:
    """For each seed that is done: its summary, when that was written, and its last weights."""
    found = {}
    for path in sweep.glob("*/summary.json"):
        facts = json.loads(path.read_text())
        last = torch.load(path.parent / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        found[facts["seed"]] = {"val/acc": facts["val/acc"], "written": path.stat().st_mtime_ns, "weights": last}
    return found


def equal(one: dict[str, Any], other: dict[str, Any]) -> bool:
    weights = zip(one["weights"].values(), other["weights"].values(), strict=True)
    return one["val/acc"] == other["val/acc"] and all(torch.equal(a, b) for a, b in weights)


def main() -> None:
    wanted = sys.argv[1:] or ["cost", "disturbed"]
    folder = Path(tempfile.mkdtemp(prefix="thaw_sweeps_"))
    try:
        for name in wanted:
            {"cost": cost, "disturbed": disturbed}[name](folder)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    with lenient():
        main()
