"""The speed claims, measured next to the textbook way on this machine.    python -m benchmarks.bench

Each ratio is of medians of runs taken in turn. It takes about 25 minutes on two cores and wants the machine for itself;
`--quick` takes few digits and epochs, to see that everything runs. Writes benchmarks/results.md.
"""

import argparse
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
from thaw.data.images import Images
from thaw.data.mnist import MNISTData, load_mnist
from thaw.data.module import ImageDataset
from thaw.data.preprocess import Preprocess
from thaw.freezing import cache as feature_cache
from thaw.models.backbone import Backbone
from thaw.run.config import build_list, settle
from thaw.run.console import lenient, quiet_libraries
from thaw.run.files import write_text

ROOT = Path(__file__).resolve().parents[1]
RATES = "1e-4,2e-4,5e-4,1e-3,2e-3,3e-3,5e-3,7e-3,1e-2,2e-2,3e-2,5e-2,1e-1"  # 13
PARTS = ("main_job", "last_blocks", "fine_tuning", "pipeline", "photo_pipelines", "feature_passes")
HEAD = """# Speed

Written by `make bench`{quick} in {minutes:.0f} minutes on: {machine}.

Each figure is the median of runs taken in turn. The textbook way is `benchmarks/textbook.py`: torchvision
transforms of one image at a time, two workers, fp32, the frozen backbone under no_grad in each epoch. One of
its runs is measured whole, and its epochs again between ours; 13 runs are 13 times that.
The backbones of the feature passes have random weights, as speed needs no others; the ViT-S/14 is of DINOv2's
architecture (`backbone=vit_small_dinov2`).
[once.md](once.md) has figures that were measured once.

| | textbook | thaw | times | goal |
|---|---|---|---|---|
"""


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


class Bench:
    """The rows of the table; `data` is data.dir, `quick` takes little of everything."""

    def __init__(self, data: str, quick: bool) -> None:
        self.data, self.quick = data, quick
        self.digits = 2000 if quick else 54000
        self.epochs = 2 if quick else 20
        self.rounds = 1 if quick else 2
        self.rows: list[str] = []
        self.notes: list[str] = []
        self.folder = tempfile.mkdtemp()
        self.run = ""  # folder of the latest probe
        self.peaks = {name: matrix_peak(dtype) for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16))}
        speeds = ", ".join(f"{name} {peak / 1e9:,.0f} GFLOP/s" for name, peak in self.peaks.items())
        self.note(f"Matrix product of 4096 x 4096: {speeds}.")

    def row(self, name: str, textbook: str, thaw: str, ratio: float | None, goal: str) -> None:
        self.rows.append(f"| {name} | {textbook} | {thaw} | {f'{ratio:.1f}' if ratio else ''} | {goal} |")
        print(self.rows[-1], flush=True)

    def note(self, text: str) -> None:
        self.notes.append(f"- {text}")
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

    def probe(self, *overrides: str, sweep: bool = False) -> tuple[float, str, float]:
        """The main job, with an empty cache."""
        cache = tempfile.mkdtemp(dir=self.folder)
        self.run = tempfile.mkdtemp(dir=self.folder)
        data = (f"data.dir={self.data}", "data.source=official", f"data.train_size={self.digits}")
        command = ("train.py", *(["-m"] if sweep else []), "experiment=vit_linear_probe", *data, f"cache.dir={cache}")
        where = f"hydra.{'sweep' if sweep else 'run'}.dir={self.run}"
        return self.command(*command, "logger.wandb.mode=offline", where, *overrides)

    def textbook(self, *arguments: str) -> dict[str, Any]:
        return json.loads(self.command("benchmarks/textbook.py", "--data-dir", self.data, *arguments)[1])

    def main_job(self) -> None:
        """The linear probe and the sweep of 13 learning rates: command to test accuracy, every job 20 epochs."""
        same = (f"trainer.max_epochs={self.epochs}", "callbacks.early_stopping=null")
        job = ("--train-size", str(self.digits), "--batch-size", "1024", "--lr", "3e-2")
        found: list[tuple[float, float]] = []

        def thaw() -> float:
            seconds, _, memory = self.probe(*same)
            summary = json.loads(Path(self.run, "summary.json").read_text())
            found.append((summary["test/acc"], memory))
            return seconds

        ours, whole, epochs = [thaw()], self.textbook(*job, "--epochs", str(self.epochs)), []
        for _ in range(self.rounds - 1):  # short textbook runs between ours; the first was whole
            ours.append(thaw())
            epochs += self.textbook(*job, "--epochs", "2")["epoch_seconds"]
        epochs += whole["epoch_seconds"]
        theirs = whole["seconds"] - sum(whole["epoch_seconds"]) + self.epochs * statistics.median(epochs)
        mine = statistics.median(ours)
        sweep = statistics.median(self.probe(*same, f"optim.lr={RATES}", sweep=True)[0] for _ in range(self.rounds))
        one, many = in_turn(
            self.rounds, lambda: self.probe()[0], lambda: self.probe(f"optim.lr={RATES}", sweep=True)[0]
        )
        self.row(
            f"linear probe, {self.epochs} epochs, {self.digits:,} digits, command to test accuracy",
            f"{theirs:.0f} s, {whole['test_acc']:.2%}",
            f"{mine:.1f} s, {found[0][0]:.2%}",
            theirs / mine,
            "30",
        )
        name = f"13 learning rates, {self.epochs} epochs each"
        self.row(name, f"{13 * theirs:,.0f} s", f"{sweep:.0f} s", 13 * theirs / sweep, "200")
        name = "sweep of 13 against one run, as the experiment is"
        self.row(name, f"{one:.1f} s", f"{many:.1f} s", many / one, "at most 2")
        memory = max(memory for _, memory in found)
        self.row("peak memory of the main job", "", f"{memory:.2f} GB", None, "at most 3 GB")

    # Inside this process

    def fit(self, experiment: str, *overrides: str) -> tuple[float, float]:
        """Seconds of `Trainer.fit` and training images per second of its last epoch; the cache is cold."""
        GlobalHydra.instance().clear()
        run = tempfile.mkdtemp(dir=self.folder)
        settings = [f"experiment={experiment}", f"data.dir={self.data}", "data.source=official", "logger=csv"]
        settings += [f"run_dir={run}", f"cache.dir={run}/cache", "overrides=''", "callbacks.early_stopping=null"]
        with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
            cfg = compose("train", [*settings, *overrides])
        with open_dict(cfg):
            cfg.pop("hydra", None)
            cfg.callbacks.pop("progress")
        settle(cfg)
        L.seed_everything(0, verbose=False)
        data, model, clock = instantiate(cfg.data), instantiate(cfg.model), Clock()
        callbacks, logger = [clock, *build_list(cfg.callbacks, "callbacks")], build_list(cfg.logger, "logger")
        trainer = instantiate(cfg.trainer, callbacks=callbacks, logger=logger, enable_progress_bar=False)
        elapsed = seconds_of(lambda: trainer.fit(model, data))
        feature_cache.VERIFIED.clear()
        return elapsed, len(data.load().train.labels) / clock.training[-1]

    def last_blocks(self) -> None:
        size = f"data.train_size={min(self.digits, 20000)}"
        same = ("vit_last_blocks", "augment=none", "trainer.max_epochs=5", size)
        off, on = in_turn(self.rounds, lambda: self.fit(*same, "cache.mode=off")[0], lambda: self.fit(*same)[0])
        name = "last 2 of 6 blocks trainable, 5 epochs, cold cache"
        self.row(name, f"{off:.0f} s without the cache", f"{on:.0f} s", off / on, "2.5")
        self.note(
            "Last 2 of 6 blocks: a step without the cache is 4 frozen blocks forward and 2 blocks forward and backward "
            "(three times a forward), with it the latter alone: at most (4 + 6) / 6 = 1.7 times, less the pass itself. "
            "2.5 times needs 18 frozen blocks for 2 trainable ones, as in a ViT-L."
        )

    def fine_tuning(self) -> None:
        size = 640 if self.quick else 4000

        def theirs() -> float:
            arguments = ("--thaw", "all", "--train-size", str(size), "--epochs", "2")
            return float(self.textbook(*arguments)["train_images_per_second"])

        def ours(*overrides: str) -> float:
            settings = ("augment=none", f"data.train_size={size}", "trainer.max_epochs=2", *overrides)
            return self.fit("vit_finetune", *settings)[1]

        slow, fast, full = in_turn(self.rounds, theirs, ours, lambda: ours("trainer.precision=32-true"))
        compiled = ours("model.compile=true", "trainer.max_epochs=3")
        self.row("full fine-tuning, images/s", f"{slow:,.0f}", f"{fast:,.0f}", fast / slow, "2.5")
        share = 3 * flops(load_backbone("digits_vit", fused_attention=False)) * fast / self.peaks["bf16"]
        self.note(
            f"Full fine-tuning of the bundled ViT: {fast:,.0f} images/s, {share:.0%} of the bf16 peak (a step "
            f"counted as three forward passes); in fp32 {full:,.0f}; with model.compile=true, once compiled, "
            f"{compiled:,.0f}."
        )

    def pipeline(self) -> None:
        source = load_mnist("MNIST", self.data, "official", None)
        source = source._replace(train=source.train.take(slice(20000)))
        backbone = load_backbone("digits_vit", fused_attention=False)
        theirs = textbook.TextbookDataModule(source, backbone, 512, affine=True).train_dataloader()
        for _ in theirs:  # starts the workers
            pass
        places = {"dataset": "MNIST", "dir": self.data, "source": "official", "mirrors": None, "reader": "digit"}
        batches = {"train_size": 20000, "batch_size": 512, "eval_batch_size": 512, "num_workers": 0, "seed": 0}
        data = MNISTData(
            **places, **batches, class_weights=None, sampler="shuffled", fold=None, folds=5, exclude=None, relabel=None
        )
        loader = data.train_dataloader()
        augment, preprocess = load_augment("affine"), Preprocess(28, 1, backbone.mean, backbone.std)

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

    def photo_pipelines(self) -> None:
        """Augmented batches of decoded photographs, and how long a training step waits for one."""
        crop = load_augment("none", flip=0.5, crop_area=0.08)
        pad = load_augment("padded", padding_mode="constant")
        for side, number, batch, augment, goal in ((224, 1024, 64, crop, "1"), (32, 20480, 512, pad, "10")):
            images = torch.randint(256, (number // (4 if self.quick else 1), 3, side, side), dtype=torch.uint8)
            data, order = ImageDataset(Images(images, torch.zeros(len(images)))), torch.randperm(len(images))
            theirs = textbook.photo_loader(images, batch, padded=augment is pad)
            for _ in theirs:  # starts the workers
                pass
            slow, fast = in_turn(
                3 * self.rounds,
                lambda images=images, loader=theirs: len(images) / seconds_of(lambda: [None for _ in loader]),
                lambda data=data, order=order, batch=batch, augment=augment: (
                    len(data) / seconds_of(lambda: [augment(data[part].images) for part in order.split(batch)])
                ),
            )
            name = f"{'padded' if augment is pad else 'random resized'} crop and flip at 3 x {side} x {side}, images/s"
            self.row(name, f"{slow:,.0f} (2 workers)", f"{fast:,.0f}", fast / slow, goal)
            if augment is crop:
                step = training_step(load_backbone("efficientnet_lite0", weights="none"), batch)
                name = "wait for these crops, in a step of EfficientNet-Lite0 on 64 of them"
                self.row(name, "", f"{batch / fast / step:.1%} of {step:.1f} s", None, "at most 3%")

    def feature_passes(self) -> None:
        """Forward in bf16 with plain attention, as the cache does, against eager fp32 with timm's fused attention."""
        backbones = (
            ("digits_vit", "digits_vit", 4096, ""),
            ("vit_small_dinov2", "ViT-S/14 with random weights", 256, "3"),
        )
        for name, title, digits, goal in backbones:
            ours, theirs = (load_backbone(name, fused_attention=fused, weights="none") for fused in (False, True))
            images = torch.randn(digits // (8 if self.quick else 1), ours.channels, ours.image_size, ours.image_size)

            @torch.no_grad()
            def rate(backbone: Backbone, bf16: bool, chunk: int, images: torch.Tensor = images) -> float:
                with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                    return len(images) / seconds_of(lambda: [backbone(part) for part in images.split(chunk)])

            rate(ours, True, 128), rate(theirs, False, 128)
            chunk = feature_cache.TOKENS["cpu"] // ours.num_tokens
            slow, fast = in_turn(
                self.rounds, lambda r=rate, m=theirs: r(m, False, 128), lambda r=rate, m=ours, c=chunk: r(m, True, c)
            )
            share = fast * flops(ours) / self.peaks["bf16"]
            self.row(
                f"{title} at {ours.image_size} px, feature pass, images/s",
                f"{slow:,.0f} (eager fp32)",
                f"{fast:,.0f}, {share:.0%} of the bf16 peak",
                fast / slow,
                goal,
            )


def load_backbone(name: str, **changes: Any) -> Backbone:
    config = {**OmegaConf.to_container(OmegaConf.load(textbook.CONFIGS / f"{name}.yaml")), **changes}
    del config["_target_"]
    return Backbone(**config).eval()


def load_augment(name: str, **changes: Any) -> Augment:
    files = [OmegaConf.load(textbook.CONFIGS.parent / "augment" / f"{file}.yaml") for file in ("none", name)]
    config = OmegaConf.to_container(OmegaConf.merge(*files)) | changes
    return Augment(**{key: value for key, value in config.items() if key not in ("defaults", "_target_")})


def training_step(backbone: Backbone, batch: int) -> float:
    """Seconds of a forward and a backward pass in bf16."""
    images = torch.randn(batch, backbone.channels, backbone.image_size, backbone.image_size)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            features = backbone.train()(images)
        features.float().square().mean().backward()

    step()
    return statistics.median(seconds_of(step) for _ in range(3))


def flops(backbone: Backbone) -> float:
    """Of one image's forward pass; a multiplication with its addition is 2."""
    image = torch.zeros(1, backbone.channels, backbone.image_size, backbone.image_size)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        backbone(image)
    return counter.get_total_flops()


def matrix_peak(dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product."""
    a, b = torch.randn(4096, 4096).to(dtype), torch.randn(4096, 4096).to(dtype)
    a @ b
    return 2 * 4096**3 / min(seconds_of(lambda: a @ b) for _ in range(5))


def machine() -> str:
    names = [line.split(":")[1] for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    name = names[0].strip() if names else platform.processor()
    return f"{name}, {torch.get_num_threads()} threads, {gpu}; torch {torch.__version__}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="data", help="data.dir of the official files (fetched if missing)")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", nargs="*", choices=PARTS, help="parts to run; results.md is not written")
    args = parser.parse_args()
    quiet_libraries()
    load_mnist("MNIST", args.data, "official", None)
    started = time.monotonic()
    bench = Bench(str(Path(args.data).resolve()), args.quick)
    if not torch.cuda.is_available():
        bench.note("No GPU was at hand: there are no rows for one.")
    for part in args.only or PARTS:
        getattr(bench, part)()
    if args.only:
        return
    quick = " --quick: too small to mean much" if args.quick else ""
    head = HEAD.format(quick=quick, minutes=(time.monotonic() - started) / 60, machine=machine())
    write_text(head + "\n".join([*bench.rows, "", *bench.notes, ""]), ROOT / "benchmarks" / "results.md")


if __name__ == "__main__":
    with lenient():
        main()
