"""Runs of two processes (gloo) against one process at the same global batch, and of two that torchrun starts."""

import gc
import json
import os
import re
import sys
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed.run
from conftest import ROOT
from lightning.fabric.plugins.environments.lightning import find_free_network_port
from processes import Forked
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

Train = Callable[..., Path]
pytestmark = pytest.mark.usefixtures("undrawn")

DDP, FSDP = ["trainer=ddp_cpu"], ["trainer=fsdp", "trainer.accelerator=cpu", "trainer.devices=2"]
POLICIES: dict[str, tuple[list[str], list[str]]] = {
    "full": (DDP, ["freeze=full"]),
    "gradual": (DDP, ["freeze=gradual", "trainer.max_epochs=5"]),
    "last_blocks and EMA": (DDP, ["freeze=last_blocks", "freeze.k=1", "average=ema"]),
    "lora": (DDP, ["freeze=lora"]),
    "lp_ft": (DDP, ["freeze=lp_ft", "freeze.probe_epochs=1"]),
    "full in shards": (FSDP, ["freeze=full"]),
    "linear_probe in shards": (FSDP, ["freeze=linear_probe"]),
    "lora in shards": (FSDP, ["freeze=lora"]),
    "ssf": (DDP, ["freeze=ssf", "freeze.ssf.last=2"]),
    "ssf in shards": (FSDP, ["freeze=ssf"]),
    "dora in shards": (FSDP, ["freeze=dora"]),
    "adapter": (DDP, ["freeze=adapter"]),
    "prompt in shards": (FSDP, ["freeze=prompt"]),
    "surgical": (DDP, ["freeze=surgical", "freeze.k=1"]),
}
LIKE_OTHERS = [
    "full",  # as gradual in its last epochs, without cached features
    "lora",
    "lp_ft",
    *[*POLICIES][6:],
]  # added parameters are reduced and sharded like all others
PLAIN_SUMS = (
    "pretrain_autoregressive",
    "pretrain_gan",
    "pretrain_mae",
)  # whose loss is a mean over the images of a process
OBJECTIVES = sorted(path.stem for path in (ROOT / "configs" / "experiment").glob("pretrain_*.yaml"))
# AdamW makes steps of what is rounding: gradients of the processes are summed in another order.
SGD = ["optim=sgd", "optim.optimizer.fused=false", "optim.lr=0.05"]


RECORD = f"+callbacks.record={{_target_:{__name__}.RankRecord,folder:'${{run_dir}}'}}"


class RankRecord(L.Callback):
    """Writes for every epoch which images a rank trained on; unless in shards, also weights, gradients and wrappers."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)
        self.batches: list[list[int]] = []
        self.gradients: list[dict[str, Tensor]] = []

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        self.batches.append(batch.indices.tolist())

    def on_before_optimizer_step(self, trainer: L.Trainer, module: L.LightningModule, optimizer: Any) -> None:
        self.gradients.append({n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None})

    def on_train_epoch_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        record: dict[str, Any] = {"batches": self.batches}
        if trainer.current_epoch == trainer.max_epochs - 1:
            gc.collect()
            record["wrappers"] = sum(type(each) is DistributedDataParallel for each in gc.get_objects())
        if not hasattr(trainer.strategy, "device_mesh"):
            record |= {"weights": dict(module.state_dict()), "gradients": self.gradients}
        torch.save(record, self.folder / f"rank{trainer.global_rank}_epoch{trainer.current_epoch}.pt")
        self.batches, self.gradients = [], []


class SameDraws(L.Callback):
    """Random numbers of a step are drawn for the images of all processes, and each process takes those of its own.

    A draw is known by its first dimension, which holds the process's images once or several times.
    """

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        torch.manual_seed(batch_idx)  # for draws that are no image's own
        generator = torch.Generator().manual_seed(batch_idx)
        ranks, rank, own = trainer.world_size, trainer.global_rank, len(batch.images)

        def drawn(draw: Callable[..., Tensor]) -> Callable[..., Tensor]:
            def of_all(*shape: Any, **_: Any) -> Tensor:
                size = shape[0] if isinstance(shape[0], (tuple, list, torch.Size)) else shape
                if not size or size[0] % own:
                    return draw(size, generator=generator)
                times = size[0] // own
                numbers = draw((times, ranks * own, *size[1:]), generator=generator)
                return numbers[:, rank * own : (rank + 1) * own].reshape(size)

            return of_all

        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(torch, "rand", drawn(torch.rand))
        self.patch.setattr(torch, "randn", drawn(torch.randn))

    def on_train_batch_end(self, *_: Any) -> None:
        self.patch.undo()


def checkpoint(run_dir: Path, name: str = "last") -> dict[str, Any]:
    return torch.load(run_dir / "checkpoints" / f"{name}.ckpt", weights_only=True)


def assert_close(weights: dict[str, Tensor], others: dict[str, Tensor]) -> None:
    """Gradients are summed in another order, so to about 1e-5."""
    assert weights.keys() <= others.keys()  # a checkpoint of shards holds the frozen ones too
    for name, tensor in weights.items():
        torch.testing.assert_close(others[name], tensor, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def both(train: Train, *overrides: str, trainer: list[str] = DDP) -> tuple[Path, Path]:
    """The folders of a run of one process and of one of two."""
    folders = []
    for name, own in (("one", ["data.batch_size=16"]), ("two", ["data.batch_size=8", *trainer])):
        folders.append(train(*overrides, *own, "cache.dir=${run_dir}/cache", RECORD, name=name))
    one, two = folders
    return one, two


def records(run_dir: Path, rank: int) -> list[dict[str, Any]]:
    """Of each epoch."""
    return [torch.load(path, weights_only=True) for path in sorted(run_dir.glob(f"rank{rank}_epoch*.pt"))]


def check_images(first: list[dict[str, Any]], second: list[dict[str, Any]], images: int) -> None:
    """Both ranks together see each image once an epoch, in another order each time."""
    orders = [list(chain(*one["batches"], *other["batches"])) for one, other in zip(first, second, strict=True)]
    assert all(sorted(order) == list(range(images)) for order in orders)
    assert orders[0] != orders[-1] or len(orders) == 1
    for one, other in zip(first, second, strict=True):
        assert len(one["batches"]) == len(other["batches"]), "ranks of different numbers of steps wait for each other"


def check_ranks(expected: dict[str, Any], first: dict[str, Any], second: dict[str, Any], place: str) -> None:
    """The same gradients and weights on both ranks after an epoch of 4 steps, close to those of one process."""
    assert_equal(first["weights"], second["weights"], place)
    assert_close(expected["weights"], first["weights"])
    assert len(expected["gradients"]) == 4
    for wanted, got, other in zip(expected["gradients"], first["gradients"], second["gradients"], strict=True):
        assert_equal(got, other, place)
        assert wanted.keys() == got.keys()
        for name, gradient in wanted.items():
            torch.testing.assert_close(got[name], gradient, rtol=1e-3, atol=1e-5, msg=f"{place} {name}")


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor], place: str) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), f"{place}: {name}"


def cached(run_dir: Path) -> dict[str, bytes]:
    files = (run_dir / "cache").glob("*")
    return {path.name: path.read_bytes() for path in files if path.suffix != ".lock"}


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.long if name in LIKE_OTHERS else ()) for name in POLICIES],
)
def test_a_policy(train: Train, tiny_run: list[str], capsys: pytest.CaptureFixture[str], name: str) -> None:
    """With clipped gradients."""
    trainer, policy = POLICIES[name]
    run = [*tiny_run, *SGD, "trainer.max_epochs=2", "trainer.gradient_clip_val=0.5", "trainer.num_sanity_val_steps=0"]
    one, two = both(train, *run, *policy, trainer=trainer)
    first, second = records(two, 0), records(two, 1)
    check_images(first, second, images=64)
    if trainer == DDP:
        for epoch, expected in enumerate(records(one, 0)):
            check_ranks(expected, first[epoch], second[epoch], f"{name}, epoch {epoch}")
        left = [rank[-1]["wrappers"] for rank in (first, second)]
        assert left == [1, 1], "an earlier wrapper and its hooks are still there"
    averaged = name == "last_blocks and EMA"
    for part in ("state_dict", "current_weights") if averaged else ("state_dict",):
        assert_close(checkpoint(one)[part], checkpoint(two)[part])
    facts = [json.loads((folder / "summary.json").read_text()) for folder in (one, two)]
    for key in ("val/acc", "test/acc", "n_test", "trainable_params", "total_params"):
        assert facts[0][key] == facts[1][key], key
    assert facts[0]["n_test"] == 500
    if trainer == DDP:
        ends_in_features = [500] * (name not in ("gradual", "lp_ft"))  # else the test starts from pixels
        check_features(one, two, capsys.readouterr().out, [64, 500, *ends_in_features] if name != "full" else [])


@pytest.mark.long
@pytest.mark.parametrize("trainer", [DDP, FSDP], ids=["ddp", "fsdp"])
@pytest.mark.parametrize("name", ["adopt", "lion", "muon", "schedulefree"])
def test_an_optimizer(train: Train, tiny_run: list[str], name: str, trainer: list[str]) -> None:
    """In 64 bits, where rounding makes no steps of its own; in shards, which cannot, nearly all weights are equal."""
    precision = "64-true" if trainer == DDP else "32-true"
    run = [*tiny_run, f"optim={name}", "freeze=full", "trainer.max_epochs=1", "test=false"]
    run = [each for each in run if not each.startswith("trainer.precision")] + [f"trainer.precision={precision}"]
    refused = {"muon": "trainer=fsdp shards the matrices", "schedulefree": "trainer=fsdp cannot average weights"}
    if name in refused and trainer == FSDP:
        with pytest.raises(ValueError, match=refused[name]):
            train(*run, *trainer)
        return
    one, two = (checkpoint(folder)["state_dict"] for folder in both(train, *run, trainer=trainer))
    if trainer == DDP:
        assert_close(one, two)
    same = [torch.isclose(two[name], tensor, rtol=1e-4, atol=1e-5).flatten() for name, tensor in one.items()]
    assert torch.cat(same).double().mean() > 0.99


def check_features(one: Path, two: Path, printed: str, sizes: list[int]) -> None:
    """Cached features of splits of these sizes are the same bytes, and each run computes them once."""
    features = cached(one)
    assert features == cached(two)
    assert len(features) == 2 * len(sizes)
    lines = {0: 0, 2: 1, 3: 2}[len(sizes)]  # of a run: training and validation, and the test
    assert len(re.findall(r"cached features: .* \(\d+\.\d s\)", printed)) == 2 * lines
    shapes = [json.loads(content)["shape"][0] for name, content in features.items() if name.endswith(".json")]
    assert sorted(shapes) == sizes


@pytest.mark.long
def test_cached_features_in_bf16(train: Train, tiny_run: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    run = ["freeze=last_blocks", "freeze.k=1", "cache.mode=disk", "trainer.precision=bf16-mixed", "test=false"]
    one, two = both(train, *tiny_run, *run, "trainer.max_epochs=1")
    check_features(one, two, capsys.readouterr().out, [64, 500])


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.long if name in PLAIN_SUMS else ()) for name in OBJECTIVES]
)
def test_an_objective(train: Train, tiny_run: list[str], name: str) -> None:
    draws = f"+callbacks.draws={{_target_:{__name__}.SameDraws}}"
    run = [f"experiment={name}", *tiny_run, "optim.optimizer._target_=torch.optim.SGD", "~optim.optimizer.betas"]
    run += ["optim.optimizer.fused=false", "optim.lr=0.05", "augment=affine", draws]
    run += ["backbone.arguments.depth=2", "backbone.weights=none"]
    one, two = both(train, *run, "trainer.max_epochs=1", "trainer.limit_val_batches=0")
    assert checkpoint(one)["state_dict"].keys() == checkpoint(two)["state_dict"].keys()
    assert_close(checkpoint(one)["state_dict"], checkpoint(two)["state_dict"])


@pytest.mark.parametrize(
    ("before", "after"), [("one", "shards"), pytest.param("shards", "one", marks=pytest.mark.long)]
)
def test_a_run_goes_on_in_shards_or_whole(train: Train, tiny_run: list[str], before: str, after: str) -> None:
    """A checkpoint of whole tensors, which refers to frozen weights, continues in shards, and the other way round."""
    kinds = {"one": ["data.batch_size=16", "trainer=cpu"], "shards": ["data.batch_size=8", *FSDP]}
    fixed = ["trainer.precision=32-true", "trainer.enable_progress_bar=false", "trainer.max_epochs=2"]
    run = [*tiny_run, "freeze=last_blocks", "freeze.k=1", "+optim.optimizer.eps=1e-3", "test=false"]
    run += ["callbacks.last_checkpoint.filename='{epoch}'", "callbacks.last_checkpoint.save_top_k=-1"]
    whole = train(*run, *kinds["one"], *fixed, name="whole")
    first = train(*run, *kinds[before], *fixed, name="first") if before == "shards" else whole
    second = train(f"resume='{first}/checkpoints/epoch=0.ckpt'", *kinds[after], *fixed, name="second")
    expected, got = checkpoint(whole, "epoch=1"), checkpoint(second, "epoch=1")
    assert_close(expected["state_dict"], got["state_dict"])
    assert got["global_step"] == expected["global_step"] == 8


# torchrun

PROBE = ["experiment=vit_linear_probe", "trainer=ddp_cpu", "data.source=sample", "data.train_size=65"]
PROBE += ["data.batch_size=16", "trainer.max_epochs=2"]


@pytest.fixture
def environment() -> dict[str, str]:
    """For a process that imports this file."""
    plain = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
    return plain | {"PYTHONPATH": os.pathsep.join([str(ROOT / "tests"), *filter(None, [plain.get("PYTHONPATH")])])}


@pytest.mark.long
def test_torchrun_makes_one_run(tmp_path: Path, environment: dict[str, str]) -> None:
    """One folder, one W&B run, every image once (65 are no whole number of batches)."""
    torchrun = [str(ROOT / "tests" / "screens" / "light.py"), torch.distributed.run.__file__, "--nproc_per_node=2"]
    forked = ["--run-path", "--start-method=fork", str(ROOT / "train.py")]  # instead of two new Pythons
    command = [sys.executable, *torchrun, *forked, *PROBE, RECORD, f"cache.dir={tmp_path / 'cache'}"]
    with (tmp_path / "output").open("w") as output:
        assert Forked(command, cwd=tmp_path, env=environment, stdout=output).wait() == 0, Path(output.name).read_text()
    (run_dir,) = (tmp_path / "logs" / "runs" / "vit_linear_probe").iterdir()
    assert len(list(run_dir.glob("wandb/offline-run-*/*.wandb"))) == 1
    assert (tmp_path / "output").read_text().count("1,930 of 2,684,170 parameters train") == 1
    check_images(records(run_dir, 0), records(run_dir, 1), images=65)


def test_ranks_with_different_settings_do_not_train(tmp_path: Path, environment: dict[str, str]) -> None:
    """The learning rate differs once it is resolved; whoever is first to say so ends the run, and nobody waits.

    Ranks that rank 0 starts cannot differ: it writes out for them what resolvers give.
    """
    run_dir = tmp_path / "run"
    command = [sys.executable, str(ROOT / "train.py"), *PROBE, "logger=csv", f"hydra.run.dir={run_dir}"]
    command += ["+rates=[0.1,0.2]", "optim.lr='${rates.${oc.env:LOCAL_RANK,0}}'", f"cache.dir={tmp_path / 'cache'}"]
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(find_free_network_port()), "WORLD_SIZE": "2"}
    processes = []
    for rank in ("0", "1"):
        with (tmp_path / f"output{rank}").open("w") as output:
            mine = environment | place | {"RANK": rank, "LOCAL_RANK": rank}
            processes.append(Forked(command, cwd=tmp_path, env=mine, stdout=output))
    assert all(process.wait(120) != 0 for process in processes)
    said = "".join((tmp_path / f"output{rank}").read_text() for rank in (0, 1))
    assert "optim.lr is 0.1 on rank 0 and 0.2 on rank 1" in said
    assert "Start all of them with the same command line" in said
    assert not (run_dir / "checkpoints").exists() and not (run_dir / "summary.json").exists()
    assert json.loads((run_dir / "failure.json").read_text())["status"] == "failed"
