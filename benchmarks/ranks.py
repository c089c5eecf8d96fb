"""Full fine-tuning by two processes against one, a thread each.    python -m benchmarks.ranks

Both are `train.py` as a user starts it, in turn, with the same number of digits a step on each process; what is timed
is the epochs after the first. It wants two idle cores, and prints the medians and their ratio.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import lightning as L

from thaw.run.console import lenient

ROOT = Path(__file__).parents[1]
RUN = [
    *("experiment=vit_finetune", "average=none", "augment=none", "data.source=sample", "logger=none", "test=false"),
    *("validate=false", "trainer.limit_val_batches=1", "callbacks.progress.refresh_rate=1000"),
    *("callbacks.early_stopping=null", "callbacks.lr_monitor=null", "+callbacks.rate._target_=benchmarks.ranks.Rate"),
]


class Rate(L.Callback):
    """Writes how many training images all processes together took a second, without the first epoch.

    Args:
        path: of the file.
    """

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        self.images, self.seconds, self.started = 0, 0.0, 0.0

    def on_train_epoch_start(self, *_: Any) -> None:
        self.started = time.perf_counter()

    def on_train_batch_end(self, trainer: L.Trainer, model: L.LightningModule, out: Any, batch: Any, _: int) -> None:
        if trainer.current_epoch > 0:
            self.images += len(batch.images) * trainer.world_size
            self.seconds += trainer.is_last_batch * (time.perf_counter() - self.started)  # validation comes later

    def on_train_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.is_global_zero:
            self.path.write_text(str(self.images / self.seconds))


def images_per_second(*overrides: str) -> float:
    """Of one run of train.py with a thread for each process."""
    with tempfile.TemporaryDirectory() as folder:
        rate = Path(folder) / "rate"
        command = [sys.executable, "train.py", *RUN, *overrides, f"+callbacks.rate.path={rate}"]
        done = subprocess.run(
            [*command, f"hydra.run.dir={folder}/run"],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
        return float(rate.read_text())


def measure(rounds: int, *overrides: str) -> float:
    """Print images/s of one and of two processes; returns the ratio of the medians.

    Args:
        rounds: runs of each, in turn.
        overrides: of both, e.g. `data.train_size=512`.
    """
    rates: dict[str, list[float]] = {"cpu": [], "ddp_cpu": []}
    for _ in range(rounds):
        for trainer, measured in rates.items():
            measured.append(images_per_second(f"trainer={trainer}", *overrides))
    one, two = (statistics.median(measured) for measured in rates.values())
    print(f"full fine-tuning, images/s: 1 process {one:,.0f}, 2 processes {two:,.0f}: {two / one:.2f} times")
    for trainer, measured in rates.items():
        print(f"  {trainer}: {', '.join(f'{rate:,.0f}' for rate in measured)}")
    return two / one


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="runs of each kind")
    parser.add_argument("overrides", nargs="*", default=["trainer.max_epochs=3"], help="of both, as for train.py")
    args = parser.parse_args()
    measure(args.rounds, *args.overrides)


if __name__ == "__main__":
    with lenient():
        main()
