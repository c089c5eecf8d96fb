"""Every speed claim, measured next to the textbook way on this machine.    python -m benchmarks.bench

Each ratio is of medians of runs taken in turn. It takes about 40 minutes on two cores and wants the machine for itself;
`--quick` takes few digits and epochs, to see that everything runs. Writes benchmarks/results.md and results.png.
"""

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.utils import instantiate
from omegaconf import OmegaConf, open_dict
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import textbook
from thaw.data.augment import Augment
from thaw.data.datamodule import MNISTDataModule
from thaw.data.mnist import load_mnist
from thaw.data.preprocess import Preprocess
from thaw.freezing import features as feature_cache
from thaw.models.backbone import Backbone
from thaw.pages.figures import save_figure
from thaw.run.config import build_list, settle
from thaw.run.console import lenient, quiet_libraries
from thaw.run.files import write_text

ROOT = Path(__file__).resolve().parents[1]
RATES = "1e-4,2e-4,5e-4,1e-3,2e-3,3e-3,5e-3,7e-3,1e-2,2e-2,3e-2,5e-2,1e-1"  # 13
AFFINE = {"degrees": 10.0, "translate": 0.07, "scale": 0.1, "shear": 0.0}
OTHERS = {"elastic": 0.0, "elastic_sigma": 4.0, "thickness": 0.0, "erase": 0.0}


def in_turn(rounds: int, *functions: Callable[[], float]) -> list[float]:
    """The median of what each function returns, called A B A B ..."""
    results = [[function() for function in functions] for _ in range(rounds)]
    return [statistics.median(column) for column in zip(*results, strict=True)]


def seconds_of(function: Callable[[], Any], repeats: int = 1) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        function()
    return (time.perf_counter() - start) / repeats


class Clock(L.Callback):
    """Seconds that each epoch trained."""

    def __init__(self) -> None:
        self.training: list[float] = []
        self.begun = 0.0

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.begun = time.perf_counter()

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.training.append(time.perf_counter() - self.begun)


class FirstStep(L.Callback):
    """Prints how long after the command the first training step ended; see `startup`."""

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == 1:
            print(f"first step after {textbook.seconds():.2f}", flush=True)


class Bench:
    """The rows of the table; `data` is data.dir, `quick` takes little of everything."""

    def __init__(self, data: str, quick: bool) -> None:
        self.data, self.quick = data, quick
        self.digits = 2000 if quick else 54000
        self.epochs = 2 if quick else 20
        self.rounds = 1 if quick else 2
        self.rows: list[tuple[str, str, str, str, str]] = []
        self.notes: list[str] = []
        self.folder = tempfile.mkdtemp()

    def row(self, name: str, textbook: str, thaw: str, ratio: float | None, goal: str) -> None:
        self.rows.append((name, textbook, thaw, f"{ratio:.1f}" if ratio else "", goal))
        print(" | ".join(self.rows[-1]), flush=True)

    def note(self, text: str) -> None:
        self.notes.append(text)
        print(text, flush=True)

    # What a user types, as processes of their own

    def command(self, *arguments: str) -> tuple[float, str, float]:
        """Wall-clock seconds, standard output and peak memory in GB of a Python program."""
        start = time.perf_counter()
        with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
            process = subprocess.Popen([sys.executable, *arguments], cwd=ROOT, stdout=out, stderr=err)
            _, status, usage = os.wait4(process.pid, 0)
            elapsed = time.perf_counter() - start
            out.seek(0), err.seek(0)
            if status:
                raise SystemExit(f"{' '.join(arguments)}\n{err.read()}")
            return elapsed, out.read(), usage.ru_maxrss * 1024 / 1e9

    def probe(self, *overrides: str, cold: bool = True, sweep: bool = False) -> tuple[float, str, float]:
        """The main job; `cold` starts with an empty cache."""
        cache = tempfile.mkdtemp(dir=self.folder) if cold else f"{self.folder}/warm"
        run = f"hydra.sweep.dir={tempfile.mkdtemp(dir=self.folder)}" if sweep else f"hydra.run.dir={self.folder}/probe"
        return self.command(
            *("train.py", *(["-m"] if sweep else []), "experiment=vit_linear_probe", f"data.dir={self.data}"),
            *(
                "data.source=official",
                f"data.train_size={self.digits}",
                f"cache.dir={cache}",
                "logger.wandb.mode=offline",
            ),
            *(run, *overrides),
        )

    def textbook(self, *arguments: str) -> dict[str, Any]:
        return json.loads(self.command("benchmarks/textbook.py", "--data-dir", self.data, *arguments)[1])

    def main_job(self) -> None:
        """The linear probe and the sweep of 13 learning rates: command to test accuracy, every job 20 epochs."""
        same = (f"trainer.max_epochs={self.epochs}", "callbacks.early_stopping=null")
        job = ("--train-size", str(self.digits), "--batch-size", "1024", "--lr", "3e-2")

        def thaw() -> float:
            seconds, _, memory = self.probe(*same)
            summary = json.loads(Path(f"{self.folder}/probe/summary.json").read_text())
            found.append((summary["test/acc"], memory))
            return seconds

        found: list[tuple[float, float]] = []
        short = 2  # epochs of the textbook runs between ours; the first is whole
        ours, whole, epochs = [thaw()], self.textbook(*job, "--epochs", str(self.epochs)), []
        for _ in range(self.rounds - 1):
            ours.append(thaw())
            epochs += self.textbook(*job, "--epochs", str(short))["epoch_seconds"]
        epochs += whole["epoch_seconds"]
        theirs = whole["seconds"] - sum(whole["epoch_seconds"]) + self.epochs * statistics.median(epochs)
        accuracy = f"{found[0][0]:.2%}"
        self.row(
            f"linear probe, {self.epochs} epochs, {self.digits:,} digits, command to test accuracy",
            f"{theirs:.0f} s, {whole['test_acc']:.2%}",
            f"{statistics.median(ours):.1f} s, {accuracy}",
            theirs / statistics.median(ours),
            "30",
        )
        sweeps = [self.probe(*same, f"optim.lr={RATES}", sweep=True)[0] for _ in range(self.rounds)]
        sweep = statistics.median(sweeps)
        self.row(
            f"13 learning rates, {self.epochs} epochs each",
            f"{13 * theirs:,.0f} s",
            f"{sweep:.0f} s",
            13 * theirs / sweep,
            "200",
        )
        one, many = in_turn(
            self.rounds, lambda: self.probe()[0], lambda: self.probe(f"optim.lr={RATES}", sweep=True)[0]
        )
        self.row(
            "sweep of 13 against one run, as the experiment is",
            f"{one:.1f} s",
            f"{many:.1f} s",
            many / one,
            "at most 2",
        )
        self.row(
            "peak memory of the main job", "", f"{max(memory for _, memory in found):.2f} GB", None, "at most 3 GB"
        )

    def precisions(self) -> None:
        """Validation accuracy of the probe on features in fp32 and in what `auto` takes, three seeds each."""
        for precision in ("32-true", "auto"):
            _, printed, _ = self.probe(f"trainer.precision={precision}", "seed=0,1,2", sweep=True)
            accuracies = re.findall(r"seed=\d +([\d.]+)%", printed)
            self.note(
                f"Linear probe in precision {precision}, validation accuracy of 3 seeds: "
                f"{', '.join(f'{value} %' for value in sorted(accuracies))}."
            )

    def startup(self) -> None:
        """Where the time from the command to the first training step goes, with a warm cache."""
        self.probe("trainer.max_epochs=1", cold=False)
        step = ("trainer.max_epochs=1", "+callbacks.first_step._target_=benchmarks.bench.FirstStep")
        first = []
        for _ in range(self.rounds):
            output = self.probe(*step, cold=False)[1]
            first.append(float(output.split("first step after ")[1].split()[0]))
        imports, before = [], "hydra"
        for module in ("torch", "torchvision.datasets", "lightning", "timm", "thaw.classifier"):
            code = f"import time, {before}; s = time.perf_counter(); import {module}; print(time.perf_counter() - s)"
            imports.append((module, statistics.median(float(self.command("-c", code)[1]) for _ in range(self.rounds))))
            before += f", {module}"
        listed = ", ".join(f"{module.split('.')[0]} {seconds:.1f} s" for module, seconds in imports)
        total = sum(seconds for _, seconds in imports)
        self.note(
            f"Start-up: {statistics.median(first):.1f} s from the command to the first training step, warm cache; "
            f"imports in turn: {listed}; together {total:.1f} s."
        )
        for flag in (("--help",), ("--cfg", "job")):
            elapsed = statistics.median(self.command("train.py", *flag)[0] for _ in range(self.rounds))
            self.note(f"`python train.py {' '.join(flag)}`: {elapsed:.2f} s.")

    # Inside this process

    def fit(self, experiment: str, *overrides: str) -> tuple[float, float]:
        """Seconds of `Trainer.fit` and training images per second of its last epoch."""
        GlobalHydra.instance().clear()
        run = tempfile.mkdtemp(dir=self.folder)
        settings = [
            f"experiment={experiment}",
            f"data.dir={self.data}",
            "data.source=official",
            "logger=csv",
            *overrides,
        ]
        with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
            cfg = compose("train", [*settings, f"run_dir={run}", "overrides=''", "callbacks.early_stopping=null"])
        with open_dict(cfg):
            cfg.pop("hydra", None)
            cfg.callbacks.pop("progress")
        if not any(override.startswith("cache.dir") for override in overrides):
            cfg.cache.dir = f"{run}/cache"
        settle(cfg)
        L.seed_everything(0, verbose=False)
        data, model, clock = instantiate(cfg.data), instantiate(cfg.model), Clock()
        callbacks = [clock, *build_list(cfg.callbacks, "callbacks")]
        trainer = instantiate(
            cfg.trainer, callbacks=callbacks, logger=build_list(cfg.logger, "logger"), enable_progress_bar=False
        )
        elapsed = seconds_of(lambda: trainer.fit(model, data))
        feature_cache.VERIFIED.clear()
        return elapsed, len(data.load().train.labels) / clock.training[-1]

    def last_blocks(self) -> None:
        size = f"data.train_size={min(self.digits, 20000)}"
        same = ("vit_last_blocks", "augment=none", "trainer.max_epochs=5", size)
        off, on = in_turn(self.rounds, lambda: self.fit(*same, "cache.mode=off")[0], lambda: self.fit(*same)[0])
        self.row(
            "last 2 of 6 blocks thawed, 5 epochs, cold cache",
            f"{off:.0f} s without the cache",
            f"{on:.0f} s",
            off / on,
            "2.5",
        )
        self.note(
            "Last 2 of 6 blocks: a step without the cache is 4 frozen blocks forward and 2 blocks forward and backward "
            "(three times a forward), with it the latter alone: at most (4 + 6) / 6 = 1.7 times, less the pass itself. "
            "2.5 times needs 18 frozen blocks for 2 thawed ones, as in a ViT-L."
        )

    def fine_tuning(self) -> None:
        size = 640 if self.quick else 4000

        def theirs() -> float:
            return float(
                self.textbook("--thaw", "all", "--train-size", str(size), "--epochs", "2")["train_images_per_second"]
            )

        def ours(*overrides: str) -> float:
            settings = ("augment=none", f"data.train_size={size}", "trainer.max_epochs=2", *overrides)
            return self.fit("vit_finetune", *settings)[1]

        slow, fast, full = in_turn(self.rounds, theirs, ours, lambda: ours("trainer.precision=32-true"))
        compiled = ours("model.compile=true", "trainer.max_epochs=3")
        self.row("full fine-tuning, images/s", f"{slow:,.0f}", f"{fast:,.0f}", fast / slow, "2.5")
        share = 3 * self.flops(self.backbone("digits_vit", fused_attention=False)) * fast / self.peaks["bf16"]
        self.note(
            f"Full fine-tuning of the bundled ViT: {fast:,.0f} images/s, {share:.0%} of the bf16 peak (a step "
            f"counted as three forward passes); in fp32 {full:,.0f}; with model.compile=true, once compiled, "
            f"{compiled:,.0f}."
        )

    def pipeline(self) -> None:
        source = load_mnist("MNIST", self.data, "official", None)
        source = source._replace(train=source.train.take(slice(20000)))
        backbone = self.backbone("digits_vit", fused_attention=False)
        theirs = textbook.TextbookDataModule(source, backbone, 512, affine=True).train_dataloader()
        for _ in theirs:  # starts the workers
            pass
        data = MNISTDataModule("MNIST", self.data, "official", None, 20000, 512, 512, 0, 0)
        loader = data.train_dataloader()
        augment, preprocess = Augment(**AFFINE, **OTHERS), Preprocess(28, 1, backbone.mean, backbone.std)

        def ours() -> None:
            for batch in loader:
                preprocess(augment(batch.images))

        slow, fast, plain = in_turn(
            self.rounds,
            lambda: 20000 / seconds_of(lambda: [None for _ in theirs]),
            lambda: 20000 / seconds_of(ours, 5),
            lambda: 20000 / seconds_of(lambda: [None for _ in loader], 5),
        )
        self.row("input pipeline with affine, images/s", f"{slow:,.0f} (2 workers)", f"{fast:,.0f}", fast / slow, "10")
        self.note(f"Batches without augmentation or normalisation: {plain:,.0f} images/s.")

    def backbone(self, name: str, **changes: Any) -> Backbone:
        config = {
            **OmegaConf.to_container(OmegaConf.load(textbook.CONFIGS / f"{name}.yaml")),
            **changes,
        }
        del config["_target_"]
        return Backbone(**config).eval()

    def flops(self, backbone: Backbone) -> float:
        """Of one image's forward pass; a multiplication with its addition is 2."""
        image = torch.zeros(1, backbone.channels, backbone.image_size, backbone.image_size)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            backbone(image)
        return counter.get_total_flops()

    def matrix_peaks(self) -> None:
        self.peaks = {}
        for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
            a, b = torch.randn(4096, 4096).to(dtype), torch.randn(4096, 4096).to(dtype)
            a @ b
            self.peaks[name] = 2 * 4096**3 / min(seconds_of(lambda a=a, b=b: a @ b) for _ in range(5))
        self.note(
            f"Matrix product of 4096 x 4096: fp32 {self.peaks['fp32'] / 1e9:,.0f} GFLOP/s, "
            f"bf16 {self.peaks['bf16'] / 1e9:,.0f} GFLOP/s."
        )

    def feature_passes(self) -> None:
        """Forward in bf16 with plain attention, as the cache does, against eager fp32 with timm's fused attention."""
        for name, digits, goal in (("digits_vit", 4096, ""), ("vit_small_dinov2", 256, "3")):
            ours, theirs = (self.backbone(name, fused_attention=fused, weights="none") for fused in (False, True))
            images = torch.randn(digits // (8 if self.quick else 1), ours.channels, ours.image_size, ours.image_size)

            @torch.no_grad()
            def rate(backbone: Backbone, bf16: bool, chunk: int, images: torch.Tensor = images) -> float:
                def run() -> None:
                    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                        for part in images.split(chunk):
                            backbone(part)

                return len(images) / seconds_of(run)

            rate(ours, True, 128), rate(theirs, False, 128)
            chunk = feature_cache.TOKENS["cpu"] // ours.num_tokens
            slow, fast = in_turn(
                self.rounds, lambda r=rate, m=theirs: r(m, False, 128), lambda r=rate, m=ours, c=chunk: r(m, True, c)
            )
            share = fast * self.flops(ours) / self.peaks["bf16"]
            size = f"{ours.image_size} px"
            self.row(
                f"{name} at {size}, feature pass, images/s",
                f"{slow:,.0f} (eager fp32)",
                f"{fast:,.0f}, {share:.0%} of the bf16 peak",
                fast / slow,
                goal,
            )

    def attention(self) -> None:
        """Fused against plain attention, forward and in a training step."""
        for name, count in (("digits_vit", 256), ("vit_small_dinov2", 32)):
            for bf16 in (True, False):
                models = [self.backbone(name, fused_attention=fused, weights="none").train() for fused in (True, False)]
                images = torch.randn(count, models[0].channels, models[0].image_size, models[0].image_size)

                def step(model: Backbone, train: bool, images: torch.Tensor = images, bf16: bool = bf16) -> float:
                    def run() -> None:
                        with torch.set_grad_enabled(train), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                            features = model(images)
                        if train:
                            features.float().square().mean().backward()

                    return len(images) / seconds_of(run)

                tasks = [(model, train) for train in (False, True) for model in models]
                for task in tasks:
                    step(*task)
                rates = in_turn(self.rounds, *(lambda task=task, step=step: step(*task) for task in tasks))
                self.note(
                    f"Attention, {name}, {'bf16' if bf16 else 'fp32'}, images/s: forward fused {rates[0]:,.0f}, plain "
                    f"{rates[1]:,.0f}; forward and backward fused {rates[2]:,.0f}, plain {rates[3]:,.0f}."
                )

    # The picture

    def curves(self) -> None:
        """Seconds against number of digits, of thawed blocks and of learning rates, with and without the cache."""
        sizes = [500, 1000, 2000] if self.quick else [1000, 4000, 16000, 54000]
        probe = ("vit_linear_probe", "trainer.max_epochs=5", "data.batch_size=256")
        digits = [
            [self.fit(*probe, f"data.train_size={size}", f"cache.mode={mode}")[0] for mode in ("off", "auto")]
            for size in sizes
        ]
        blocks = list(range(0, 7, 3 if self.quick else 1))
        thawed = []
        for count in blocks:
            freeze = [f"freeze.k={count}"] if 0 < count < 6 else [f"freeze={'full' if count else 'linear_probe'}"]
            few = (
                "vit_last_blocks",
                "augment=none",
                f"data.train_size={640 if self.quick else 4000}",
                "trainer.max_epochs=5",
            )
            thawed.append([self.fit(*few, *freeze, f"cache.mode={mode}")[0] for mode in ("off", "auto")])
        rates = [1, 4, 7, 10, 13]
        one_off = next(seconds[0] for size, seconds in zip(sizes, digits, strict=True) if size >= 1000)
        shared = f"cache.dir={self.folder}/curve"
        size = f"data.train_size={next(size for size in sizes if size >= 1000)}"
        spent = [self.fit(*probe, size, shared)[0] for _ in range(13)]
        draw(
            ROOT / "benchmarks" / "results.png",
            [
                ("training digits", sizes, digits, "linear probe, 5 epochs"),
                ("thawed blocks of 6", blocks, thawed, "5 epochs"),
                (
                    "learning rates",
                    rates,
                    [[n * one_off, sum(spent[:n])] for n in rates],
                    "linear probes, 5 epochs each",
                ),
            ],
        )


def draw(path: Path, panels: list[tuple[str, list[int], list[list[float]], str]]) -> None:
    """One panel a curve, without and with the cache."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.4), layout="constrained", dpi=110)
    for axes, (label, places, seconds, title) in zip(figure.subplots(1, len(panels)), panels, strict=True):
        for column, (name, colour) in enumerate(
            (("every epoch from pixels", "#b2182b"), ("frozen part kept", "#2166ac"))
        ):
            values = [pair[column] for pair in seconds]
            axes.plot(places, values, "o-", color=colour, label=name, markersize=4)
        axes.set_xlabel(label)
        axes.set_ylabel("seconds")
        axes.set_title(title, fontsize=10)
        axes.set_ylim(bottom=0)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    figure.axes[0].legend(frameon=False, fontsize=9)
    save_figure(figure, path)


def machine() -> str:
    model = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        "",
    )
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return f"{model or platform.processor()}, {torch.get_num_threads()} threads, {gpu}; torch {torch.__version__}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="data", help="data.dir of the official files (fetched if missing)")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument(
        "--only", nargs="*", help="parts to run, e.g. pipeline feature_passes; results.md is not written"
    )
    args = parser.parse_args()
    quiet_libraries()
    load_mnist("MNIST", args.data, "official", None)
    bench = Bench(str(Path(args.data).resolve()), args.quick)
    if not torch.cuda.is_available():
        bench.note("No GPU was at hand: there are no rows for one.")
    bench.matrix_peaks()
    parts = (
        "main_job",
        "precisions",
        "last_blocks",
        "fine_tuning",
        "pipeline",
        "feature_passes",
        "attention",
        "startup",
        "curves",
    )
    started = time.monotonic()
    for part in args.only or parts:
        getattr(bench, part)()
    if args.only:
        return
    table = [
        "# Speed",
        "",
        f"Written by `make bench`{' --quick: too small to mean much' if args.quick else ''} in "
        f"{(time.monotonic() - started) / 60:.0f} minutes on: {machine()}.",
        "",
        "Each figure is the median of runs taken in turn. The textbook way is `benchmarks/textbook.py`: torchvision",
        "transforms of one image at a time, two workers, fp32, the frozen backbone under no_grad in each epoch. One of",
        "its runs is measured whole, and its epochs again between ours; 13 runs are 13 times that.",
        "`vit_small_dinov2` has random weights here: the preset's architecture alone counts for speed.",
        "",
        "| | textbook | thaw | times | goal |",
        "|---|---|---|---|---|",
        *(f"| {' | '.join(row)} |" for row in bench.rows),
        "",
        *(f"- {note}" for note in bench.notes),
        "",
        "![cost against number of digits, of thawed blocks, of learning rates](results.png)",
        "",
    ]
    write_text("\n".join(table), ROOT / "benchmarks" / "results.md")


if __name__ == "__main__":
    with lenient():
        main()
