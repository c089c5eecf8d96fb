"""The cache against a naive loop over the images: computed once, by all processes, and never read when damaged."""

import errno
import os
import re
import shutil
import signal
import threading
import time
from collections.abc import Callable, Mapping
from multiprocessing.synchronize import Event
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from filelock import FileLock
from omegaconf import OmegaConf
from processes import FORKING
from torch import Tensor

from thaw.freezing import cache as feature_cache
from thaw.freezing.cache import FeatureCache, compute_all
from thaw.run.values import check_types

COUNT = 300  # digits: two whole chunks of 128 and a part of one
FACTS = {"weights": "abc"}
QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}


@pytest.fixture(autouse=True)
def nothing_at_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feature_cache, "VERIFIED", {})
    monkeypatch.setattr(feature_cache, "forward_threads", lambda trainer: 1)  # whose chunks are 128 digits


def trainer_of(**changes: Any) -> L.Trainer:
    return L.Trainer(**(QUIET | {"accelerator": "cpu", "devices": 1, "num_sanity_val_steps": 0} | changes))


class Compute:
    """The square of an index; remembers for which digits it was asked."""

    def __init__(self) -> None:
        self.digits: list[int] = []

    def __call__(self, indices: Tensor) -> Tensor:
        self.digits += indices.tolist() if len(indices) > 1 else []  # one digit: only to see the shape
        return torch.stack([indices.float(), indices.float() ** 2], dim=1).repeat(1, 3)[:, :5]


def naive() -> Tensor:
    return torch.stack([Compute()(torch.tensor([digit]))[0] for digit in range(COUNT)])


def get(cache: FeatureCache, compute: Compute, facts: Mapping[str, Any] = FACTS) -> Tensor | None:
    trainer = trainer_of()
    features = cache.features("train", COUNT, compute, 16, facts, trainer)
    cache.summarise(trainer)
    return features


def new(folder: Path, mode: str = "disk", max_gb: float = 1.0) -> FeatureCache:
    """A cache as another process would have it."""
    feature_cache.VERIFIED.clear()
    return FeatureCache(mode, str(folder), max_gb)


# Settings


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mode": "ram"}, "cache.mode='ram' must be auto, off, memory, disk or false."),
        ({"mode": True}, "cache.mode=true must be auto, off"),
        ({"max_gb": 0}, "cache.max_gb=0 must be a number above 0."),
        ({"max_gb": -1.5}, "cache.max_gb=-1.5 must be"),
        ({"max_gb": float("nan")}, "cache.max_gb=nan must be"),
        ({"max_gb": True}, "cache.max_gb=true must be"),
        ({"max_gb": "8"}, "cache.max_gb='8' must be"),
    ],
)
def test_settings_that_cannot_work(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        check_types(OmegaConf.create({"_target_": "thaw.freezing.cache.FeatureCache", **changes}), "cache.")


def test_a_limit_may_be_infinite(tmp_path: Path) -> None:
    features = get(new(tmp_path, max_gb=float("inf")), Compute())
    assert features is not None and torch.equal(features, naive())


@pytest.mark.parametrize("mode", ["auto", "disk", "memory", "off", False])  # False: what YAML reads for off
def test_what_is_said_where_nothing_can_be_cached(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], mode: Any
) -> None:
    cache = new(tmp_path, mode)
    if mode in ("disk", "memory"):
        with pytest.raises(ValueError, match=rf"cache\.mode={mode} can cache nothing: it rains\. Set cache\.mode=auto"):
            cache.refuse("it rains", trainer_of())
    else:
        cache.refuse("it rains", trainer_of())
        assert ("cache: off, it rains" in capsys.readouterr().out) == (mode == "auto")


# Right numbers, computed once


@pytest.mark.parametrize("mode", ["auto", "disk", "memory"])
def test_features_equal_a_naive_loop_over_the_digits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    monkeypatch.setattr("thaw.run.console.LINE_SECONDS", 0)
    compute = Compute()
    features = get(new(tmp_path / "cache", mode), compute)
    assert features is not None and torch.equal(features, naive())
    assert set(compute.digits) == set(range(COUNT)) and len(compute.digits) == 3 * 128
    assert (tmp_path / "cache").exists() == (mode != "memory")
    where = "memory" if mode == "memory" else os.path.relpath(tmp_path / "cache")
    first, second, last = capsys.readouterr().out.splitlines()
    assert first.startswith("features of train images: 128 of 300 images, about 0 s left") and "256 of 300" in second
    assert re.fullmatch(rf"cached features: 300 train images, 0 MB in {where} \(\d+\.\d s\)", last)


def test_two_threads_give_what_one_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feature_cache, "forward_threads", lambda trainer: 2)
    target, compute = torch.empty(COUNT, 5), Compute()
    compute_all(compute, "features", COUNT, 16, target, trainer_of())
    assert torch.equal(target, naive()) and len(compute.digits) == 5 * 64


def test_another_run_computes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    get(new(tmp_path), Compute())
    for mode in ("disk", "auto"):
        compute = Compute()
        features = get(new(tmp_path, mode), compute)
        assert features is not None and torch.equal(features, naive()) and compute.digits == []
    assert capsys.readouterr().out.endswith(" (reused)\n")


def test_the_next_job_of_a_sweep_has_them_at_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, compute = new(tmp_path), Compute()
    first = get(cache, compute)
    monkeypatch.setattr(cache.store, "read", None)
    assert get(cache, compute) is first and len(compute.digits) == 3 * 128
    cache.mode = "memory"
    for job in range(9):
        get(cache, Compute(), facts={"job": job})
        assert len(feature_cache.VERIFIED) <= 4  # of a long sweep


def test_every_fact_is_part_of_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    facts: list[dict[str, Any]] = [
        {"a": 1}, {"a": 2}, {"b": 1}, {"a": "1"}, {"a": None}, {"a": [1, 2]}, {"a": [2, 1]},
        {"a": OmegaConf.create([2, 3])}, {"a": OmegaConf.create({"x": {"y": 1}})},
        {"a": OmegaConf.create({"x": {"y": 2}})},
    ]  # fmt: skip
    for given in facts:
        compute = Compute()
        get(new(tmp_path), compute, facts=given)
        assert compute.digits, given
    for name, changed in (("torch.__version__", "0.1"), ("thaw.freezing.cache.FORMAT", "0")):
        with monkeypatch.context() as patch:
            patch.setattr(name, changed)
            get(new(tmp_path), compute := Compute(), facts=facts[0])
            assert compute.digits, name
    get(new(tmp_path), compute := Compute(), facts={"a": 1})
    assert not compute.digits


def test_each_kind_of_device_has_features_of_its_own(tmp_path: Path) -> None:
    get(new(tmp_path), Compute())
    trainer, compute = trainer_of(), Compute()
    trainer.strategy._root_device = torch.device("mps")  # no kernel runs there
    new(tmp_path).features("train", COUNT, compute, 16, FACTS, trainer)
    assert compute.digits and len([*tmp_path.glob("*.npy")]) == 2


def test_larger_than_the_limit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = COUNT * 5 * 4 / 1e9 * 0.99
    assert get(new(tmp_path, "auto", small), compute := Compute()) is None and not compute.digits
    assert "cache: off, the train features take 0.0 GB, more than cache.max_gb=" in capsys.readouterr().out
    for mode in ("disk", "memory"):
        with pytest.raises(ValueError, match=f"cache.mode={mode}: .* raise it, or set cache.mode=auto or off"):
            get(new(tmp_path, mode, small), Compute())


# Damage, other writers, folders that cannot be used


def json_edited(npy: Path) -> None:
    record = npy.with_suffix(".json")
    record.write_text(record.read_text().replace('"float32"', '"int32"'))


def byte_flipped(npy: Path) -> None:
    content = bytearray(npy.read_bytes())
    content[-7] ^= 1
    npy.write_bytes(content)


def part_of(npy: Path) -> Path:
    """What a process that was killed leaves."""
    return npy.with_name(f".{npy.name}.0.thaw.part")


DAMAGE: dict[str, Callable[[Path], object]] = {
    "truncated": lambda npy: os.truncate(npy, 999),
    "byte flipped": byte_flipped,
    "json edited": json_edited,
    "json missing": lambda npy: npy.with_suffix(".json").unlink(),
    "npy missing": Path.unlink,
    "killed before it was renamed": lambda npy: (npy.rename(part_of(npy)), json_edited(npy)),
    "killed before the json": lambda npy: npy.with_suffix(".json").rename(part_of(npy)),
    "parts left over": lambda npy: [byte_flipped(npy), part_of(npy).write_bytes(b"0" * 999)],
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_what_is_damaged_is_computed_anew(tmp_path: Path, damage: str) -> None:
    get(new(tmp_path), Compute())
    (npy,) = tmp_path.glob("*.npy")
    DAMAGE[damage](npy)
    for expected in (3 * 128, 0):  # once
        features = get(new(tmp_path, "auto"), compute := Compute())
        assert features is not None and torch.equal(features, naive()) and len(compute.digits) == expected
    assert {path.suffix for path in tmp_path.iterdir()} == {".npy", ".json", ".lock"}


def no_space(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def read_only(*_: object, **__: object) -> None:
    raise PermissionError(errno.EACCES, "Permission denied")


@pytest.mark.parametrize("trouble", ["parent is a file", "full", "read-only"])
def test_a_folder_that_cannot_be_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, trouble: str
) -> None:
    folder = tmp_path / "cache"
    if trouble == "parent is a file":
        (tmp_path / "file").touch()
        folder = tmp_path / "file" / "cache"
    elif trouble == "full":
        monkeypatch.setattr(os, "posix_fallocate", no_space)
    else:
        folder.mkdir()
        monkeypatch.setattr(FileLock, "acquire", read_only)
    features = get(new(folder, "auto"), Compute())
    assert features is not None and torch.equal(features, naive())
    assert f"cache: in memory, as cache.dir={folder} cannot be used (" in capsys.readouterr().out
    with pytest.raises(OSError, match=rf"cache\.dir={folder} cannot be used \(.*\)\. Set another cache\.dir"):
        get(new(folder, "disk"), Compute())
    assert not list(tmp_path.glob("cache/*.npy")) and not list(tmp_path.glob("cache/.*.part"))


@pytest.mark.parametrize("trouble", ["full", "removed"])
def test_a_folder_that_fails_when_all_is_computed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, trouble: str
) -> None:
    class Removing(Compute):
        def __call__(self, indices: Tensor) -> Tensor:
            if trouble == "removed" and len(indices) > 1:
                shutil.rmtree(tmp_path / "cache", ignore_errors=True)
            return super().__call__(indices)

    if trouble == "full":
        monkeypatch.setattr(Path, "write_bytes", no_space)
    features = get(new(tmp_path / "cache", "auto"), Removing())
    assert features is not None and torch.equal(features, naive())
    assert f"cache: in memory, as cache.dir={tmp_path / 'cache'} cannot be used (" in capsys.readouterr().out
    with pytest.raises(OSError, match=r"cache\.dir=.* cannot be used \(.*\)\. Set another cache\.dir"):
        get(new(tmp_path / "cache", "disk"), Removing())


@pytest.mark.parametrize("mode", ["auto", "disk"])
def test_an_entry_in_a_folder_that_cannot_be_locked_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    get(new(tmp_path), Compute())
    monkeypatch.setattr(FileLock, "acquire", read_only)
    monkeypatch.setattr(os, "utime", read_only)
    features = get(new(tmp_path, mode), compute := Compute())
    assert features is not None and torch.equal(features, naive()) and not compute.digits


def slow_run(folder: Path, half: Event, seconds: float) -> None:
    """Fill the cache, with a pause in the middle."""

    class Slow(Compute):
        def __call__(self, indices: Tensor) -> Tensor:
            if len(self.digits) == 128:
                half.set()
                time.sleep(seconds)
            return super().__call__(indices)

    get(new(folder), Slow())


@pytest.mark.parametrize("end", ["finishes", "is killed"])
def test_two_runs_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str], end: str) -> None:
    """The second waits for the first, and takes what that wrote or, if it was killed in the middle, its place."""
    half = FORKING.Event()
    first = FORKING.Process(target=slow_run, args=(tmp_path, half, 1.5 if end == "finishes" else 600.0), daemon=True)
    first.start()
    assert half.wait(60)
    assert [path.suffix for path in tmp_path.iterdir() if path.suffix != ".lock"] == [".part"]
    if end == "is killed":
        threading.Timer(1, first.kill).start()
    started = time.monotonic()
    features = get(new(tmp_path), compute := Compute())
    assert time.monotonic() - started > 0.5
    assert "cache: waiting for another run that computes" in capsys.readouterr().out
    assert features is not None and torch.equal(features, naive())
    first.join()
    assert first.exitcode == (0 if end == "finishes" else -signal.SIGKILL)
    assert len(compute.digits) == (0 if end == "finishes" else 3 * 128)
    assert {path.suffix for path in tmp_path.iterdir()} == {".npy", ".json", ".lock"}


@pytest.mark.parametrize("ranks", [2, 3, 5])
def test_ranks_share_the_work_and_give_what_one_gives(tmp_path: Path, ranks: int) -> None:
    expected = get(new(tmp_path), Compute())
    parts: list[list[Tensor]] = []
    computes = [Compute() for _ in range(ranks)]
    for turn in ("compute", "gather"):
        for rank in range(ranks):
            mine: list[Tensor] = []

            def all_gather(part: Tensor, turn: str = turn, mine: list[Tensor] = mine) -> Tensor:
                mine.append(part)
                step = len(mine) - 1
                return torch.stack([other[step] for other in parts] if turn == "gather" else [part] * ranks)

            strategy = SimpleNamespace(root_device=torch.device("cpu"), all_gather=all_gather)
            trainer: Any = SimpleNamespace(world_size=ranks, global_rank=rank, is_global_zero=False, strategy=strategy)
            target = torch.full((COUNT, 5), torch.nan)
            compute_all(computes[rank], "train", COUNT, 16, target, trainer)
            if turn == "compute":
                parts.append(mine)
            else:
                assert expected is not None and torch.equal(target, expected), rank
    assert all(len(compute.digits) < 2 * COUNT for compute in computes)
