"""Whether a sweep whose jobs are killed and raise ends as an undisturbed one.    python -m benchmarks.sweeps

A queue of 20 jobs, of which 3 are killed and 2 raise an error; then the same command runs again.
It takes some minutes on two cores.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer

from thaw.run.console import lenient

ROOT = Path(__file__).parent.parent
JOBS = [
    *("-m", "experiment=vit_linear_probe", "data.source=sample", "logger=csv", "seed=range(20)", "test=false"),
    *("data.batch_size=256", "trainer.max_epochs=4", "trainer.plugins.0.seconds=0"),
]
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


def sweep(folder: Path, *more: str) -> tuple[subprocess.CompletedProcess, dict[int, dict[str, Any]]]:
    """Run the sweep in a folder; returns how it ended, and the outcome of each finished job."""
    fault = f"+callbacks.fault={{_target_:benchmarks.sweeps.Fault,marks:'{folder}_marks',seed:'${{seed}}'}}"
    command = [sys.executable, "train.py", *JOBS, fault, f"hydra.sweep.dir={folder}", f"cache.dir={folder}_cache"]
    ended = subprocess.run([*command, *more], cwd=ROOT, capture_output=True, text=True)
    return ended, dict(outcome(path) for path in folder.glob("*/summary.json"))


def outcome(summary: Path) -> tuple[int, dict[str, Any]]:
    """The seed of a job; its validation accuracy, when its summary was written, and its last weights."""
    facts = json.loads(summary.read_text())
    last = torch.load(summary.parent / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    return facts["seed"], {"val/acc": facts["val/acc"], "written": summary.stat().st_mtime_ns, "weights": last}


def equal(one: dict[str, Any], other: dict[str, Any]) -> bool:
    weights = zip(one["weights"].values(), other["weights"].values(), strict=True)
    return one["val/acc"] == other["val/acc"] and all(torch.equal(a, b) for a, b in weights)


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="thaw_sweeps_") as name:
        folder = Path(name)
        for kind in ("disturbed", "calm"):
            (folder / f"{kind}_marks").mkdir()
        for seed in FAULTS:  # as if each had had its fault
            (folder / "calm_marks" / str(seed)).touch()
        first, before = sweep(folder / "disturbed", "hydra/launcher=queue")
        second, after = sweep(folder / "disturbed", "hydra/launcher=queue")
        _, calm = sweep(folder / "calm")
    again = [seed for seed in before if before[seed]["written"] != after[seed]["written"]]
    print("\n".join(line for line in second.stdout.splitlines() if "jobs in" in line))
    print(f"first: {len(before)} of 20 done, exit status {first.returncode}")
    print(f"again: {len(after)} of 20 done, exit status {second.returncode}; run twice: {again or 'none'}")
    same = sum(equal(after[seed], calm[seed]) for seed in calm)
    print(f"{same} of {len(calm)} jobs have the weights and the accuracy of the undisturbed sweep, to the bit")


if __name__ == "__main__":
    with lenient():
        main()
