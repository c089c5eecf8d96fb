"""The same seed trains the same weights, whatever is around the run."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import timm
import torch
from conftest import ROOT, compose_config
from fault_counts import FULL
from PIL import Image
from processes import Forked
from safetensors.torch import save_file

from thaw.data.store import tensors_sha256

Tries = Callable[..., AbstractContextManager[Callable[[str], AbstractContextManager[None]]]]
FOLDER = ROOT / "configs" / "experiment"
EXPERIMENTS = sorted(str(path.relative_to(FOLDER).with_suffix("")) for path in FOLDER.glob("**/*.yaml"))
SMALL = ["data.train_size=48", "data.batch_size=16", "trainer.max_epochs=2", "trainer.check_val_every_n_epoch=1"]
SMALL += ["logger=none", "test=false", "validate=false", "callbacks.sample_grid=null", "callbacks.progress=null"]
TINY = {"embed_dim": 32, "depth": 2, "num_heads": 2}  # what is left of a ViT of the hub
RANDOM = [
    "freeze=full",
    "augment=strong",
    "mix=both",
    "backbone.arguments.drop_path_rate=0.2",
    "model.label_smoothing=0.1",
]
FAULT = f"+callbacks.fault={{_target_:{__name__}.Fault,seed:'${{seed}}'}}"
# train.py in a world in which folders list their files backwards.
BACKWARDS = f"""
import os, runpy, sys

class Entries:
    def __init__(self, path="."):
        with scandir(path) as found:
            self.found = iter(sorted(found, key=lambda entry: entry.name, reverse=True))
    def __iter__(self):
        return self
    def __next__(self):
        return next(self.found)
    def __enter__(self):
        return self
    def __exit__(self, *_):
        pass
    close = __exit__

scandir, listdir = os.scandir, os.listdir
os.scandir, os.listdir = Entries, lambda path=".": sorted(listdir(path), reverse=True)
sys.argv[0] = {str(ROOT / "train.py")!r}
runpy.run_path(sys.argv[0], run_name="__main__")
"""


class Fault(L.Callback):
    """An error in the second epoch of every seed but 0."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.current_epoch and self.seed:
            raise RuntimeError("a fault")


def draw_pictures(folder: Path, numbers: range) -> Path:
    """Two classes of random pixels, in files that are made in the order of the numbers."""
    for number in numbers:
        pixels = np.random.default_rng(number).integers(0, 256, (32, 40, 3), dtype=np.uint8)
        path = folder / f"class{number % 2}" / f"{number:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    return folder


def stand_ins(experiment: str, folder: Path) -> list[str]:
    """What an experiment needs to run without a network: own pictures, and random weights of a small backbone."""
    cfg = compose_config("train", f"experiment={experiment}", f"run_dir={folder}", "overrides=''")
    changes = ["data.source=sample"]
    if "source" not in cfg.data:
        pictures = draw_pictures(folder / "pictures", range(72))
        changes = ["data=folder", f"data.dir={pictures}", "data.image_size=32"]
    if cfg.backbone.get("weights") == "hub":
        is_vit = cfg.backbone.name.startswith("vit")
        torch.manual_seed(0)
        model = timm.create_model(cfg.backbone.name, num_classes=0, **({**TINY, "img_size": 28} if is_vit else {}))
        save_file(model.state_dict(), folder / "own.safetensors")
        changes += [f"backbone.weights={folder / 'own.safetensors'}", f"backbone.image_size={28 if is_vit else 32}"]
        changes += [f"+backbone.arguments.{key}={value}" for key, value in TINY.items() if is_vit]
    return [*changes, *["model.samples=100"] * ("samples" in cfg.model)]


def trained(
    folder: Path,
    *arguments: str,
    threads: int = 1,
    script: Path = ROOT / "train.py",
    cwd: Path = ROOT,
    new_python: bool = False,
    **environment: str,
) -> str:
    """The hash of the last weights of `python train.py <arguments>`, or of the job with seed 0 of a sweep."""
    folder.mkdir(parents=True)
    place = f"hydra.{'sweep' if '-m' in arguments else 'run'}.dir={folder}"
    caches = [] if any("cache.dir" in each for each in arguments) else [f"cache.dir={folder / 'cache'}"]
    path = os.pathsep.join(map(str, [ROOT / "src", ROOT, ROOT / "tests"]))
    settings = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": path, **environment}
    start = subprocess.Popen if new_python else Forked
    with (folder / "printed.txt").open("ab") as output:
        command = [sys.executable, str(script), *arguments, place, *caches]
        status = start(
            command, cwd=cwd, env=settings, stdout=output, **({"stderr": output} if new_python else {})
        ).wait()
    summaries = [path for path in folder.glob("**/summary.json") if json.loads(path.read_text())["seed"] == 0]
    assert status == int(FAULT in arguments) and len(summaries) == 1, (folder / "printed.txt").read_text()[-2000:]
    last = torch.load(summaries[0].parent / "checkpoints" / "last.ckpt", weights_only=True)
    return tensors_sha256(dict(sorted(last["state_dict"].items())))


@pytest.mark.long
def test_every_experiment_again(tmp_path: Path, tries: Tries) -> None:
    """On one thread, and on two. One against two may differ, as numbers are added in another order."""
    with tries("the same run again", harm="lost") as attempt:
        for experiment in EXPERIMENTS:
            own = tmp_path / experiment.replace("/", "_")
            own.mkdir()
            wanted = [f"experiment={experiment}", *SMALL, *stand_ins(experiment, own)]
            for threads in (1, 2):
                with attempt(f"{experiment}, threads: {threads}"):
                    one, other = (trained(own / f"{threads}{name}", *wanted, threads=threads) for name in "ab")
                    assert one == other
    assert trained(tmp_path / "seed", *wanted, "trainer.max_epochs=1", threads=threads) != other, (
        "the hash sees nothing"
    )


def test_what_is_around_a_run(tmp_path: Path, tiny_run: list[str], tries: Tries) -> None:
    run = [*tiny_run, *RANDOM, "trainer.max_epochs=2"]
    with tries("the same run in other surroundings", harm="lost") as attempt:
        alone = trained(tmp_path / "alone", *run)
        with attempt("a logger, a progress bar, another working folder, time zone and locale"):
            more = ["logger=csv", "trainer.enable_progress_bar=true"]
            around = trained(tmp_path / "around", *run, *more, cwd=Path("/"), TZ="Asia/Kathmandu", LC_ALL="C")
            assert around == alone
        if not FULL:
            return
        with attempt("another seed shows in the hash"):
            assert trained(tmp_path / "seed", *run, "data.seed=1") != alone
        with attempt("in a sweep, after a job that failed"):
            assert trained(tmp_path / "sweep", "-m", *run, "seed=1,0", FAULT) == alone
        with attempt("in a queue beside another job"):
            assert trained(tmp_path / "queue", "-m", *run, "seed=1,0", "hydra/launcher=queue") == alone
        for workers in (0, 2):
            with attempt(f"PYTHONHASHSEED={workers}, data.num_workers={workers}"):
                more, place = [f"data.num_workers={workers}"], tmp_path / str(workers)
                assert trained(place, *run, *more, new_python=True, PYTHONHASHSEED=str(workers)) == alone


def test_what_is_cached_and_how_files_are_listed(tmp_path: Path, tiny_run: list[str], tries: Tries) -> None:
    backwards = tmp_path / "backwards.py"
    backwards.write_text(BACKWARDS)
    shape = ["data=folder", "data.image_size=28", "data.channels=1", "backbone.mean=null", "backbone.std=null"]
    run = [
        *(each for each in tiny_run if each != "data.source=sample"),
        *shape,
        "data.train_size=32",
        "trainer.max_epochs=2",
    ]
    forwards = f"data.dir={draw_pictures(tmp_path / 'one', range(72))}"
    with tries("the same run with other caches, and files in another order", harm="lost") as attempt:
        cold = trained(tmp_path / "cold", *run, forwards, f"cache.dir={tmp_path / 'cache'}")
        if FULL:
            with attempt("decoded images and features are cached"):
                assert trained(tmp_path / "warm", *run, forwards, f"cache.dir={tmp_path / 'cache'}") == cold
        with attempt("made and listed backwards in another folder, features in memory"):
            other = f"data.dir={draw_pictures(tmp_path / 'other', range(71, -1, -1))}"
            assert trained(tmp_path / "order", *run, other, "cache.mode=memory", script=backwards) == cold
