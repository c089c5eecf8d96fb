"""What `callbacks.step_monitor` costs: runs with and without it, in turn.    python -m benchmarks.monitor

Each pair is two equal runs, one with the callback; an epoch's cost is the processor time of its training, which other
programs on the machine disturb less than wall-clock time. The first epoch, which counts FLOPs, is shown by itself. The
share is the median over pairs. It trains on `--data`, the folder of MNIST's files (data.dir), or on the bundled sample.
"""

import argparse
import statistics
import tempfile
import time
from typing import Any

import lightning as L
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.utils import instantiate

from benchmarks.speed.measure import ROOT
from thaw.run.config import build_list, settle
from thaw.run.console import lenient, quiet_libraries

JOBS = {  # the cheapest steps that there are, and those of fine-tuning
    "linear probe on cached features": ["experiment=vit_linear_probe", "trainer.max_epochs=8"],
    "LoRA": ["experiment=vit_finetune", "freeze=lora", "augment=none", "data.train_size=512", "trainer.max_epochs=2"],
    "full fine-tuning": ["experiment=vit_finetune", "data.train_size=512", "trainer.max_epochs=2"],
}


class ProcessorTime(L.Callback):
    """Seconds of the processor that each epoch trained."""

    def __init__(self) -> None:
        self.epochs: list[float] = []
        self.begun = 0.0

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *batch: Any) -> None:
        if batch[-1] == 0:
            self.begun = time.process_time()

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.epochs.append(time.process_time() - self.begun)


def run(overrides: list[str], monitored: bool) -> list[float]:
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"), tempfile.TemporaryDirectory() as folder:
        same = [
            "logger=csv",
            "model.num_classes=10",
            "test=false",
            "callbacks.early_stopping=null",
            f"run_dir={folder}",
            "overrides=''",
        ]
        cfg = compose("train", [*overrides, *same, *([] if monitored else ["callbacks.step_monitor=null"])])
        settle(cfg)
        L.seed_everything(0, verbose=False)
        clock = ProcessorTime()
        model, datamodule = instantiate(cfg.model), instantiate(cfg.data)
        callbacks = [*build_list(cfg.callbacks, "callbacks"), clock]
        loggers = build_list(cfg.logger, "logger")
        instantiate(cfg.trainer, callbacks=callbacks, logger=loggers, _convert_="all").fit(model, datamodule)
    return clock.epochs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default=None, help="folder of MNIST's files")
    parser.add_argument("--pairs", type=int, default=9)
    arguments = parser.parse_args()
    data = [f"data.dir={arguments.data}", "data.source=official"] if arguments.data else ["data.source=sample"]
    quiet_libraries()
    with lenient():
        for name, job in JOBS.items():
            run([*job, *data], True)  # fills the cache, measures the peak
            first, later = [], []
            for pair in range(arguments.pairs):
                times = {monitored: run([*job, *data], monitored) for monitored in (pair % 2 == 0, pair % 2 == 1)}
                first.append(times[True][0] / times[False][0] - 1)
                later.append(sum(times[True][1:]) / sum(times[False][1:]) - 1)
            spread = statistics.stdev(later) / len(later) ** 0.5
            shares = f"{statistics.median(later):+.2%} (standard error {spread:.2%})"
            print(f"{name}: {shares} of an epoch, {statistics.median(first):+.2%} of the first", flush=True)


if __name__ == "__main__":
    main()
