"""Features and decoded images that fill a disk: how fast batches come, beside what the disk itself reads.

python -m benchmarks.large_cache --gb 20 --folder <on the disk to measure>

Makes random features and images of so many GB in turn, as a run stores them, and removes them again. Before each pass
the pages of the file leave memory, so that all is read from the disk, as in each epoch over a file that is far larger
than memory. Each pass takes at most `--seconds`. Then a linear probe trains on 1,281,167 x 768 features, in memory and
from the disk, and `thaw.plan` predicts it. Writes benchmarks/large_cache.md.
"""

import argparse
import math
import mmap
import os
import random
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest.mock import patch

import lightning as L
import torch
from torch import Tensor

import thaw.data.store
from thaw.data.images import Images
from thaw.data.loader import BatchSampler, ImageDataset, ImageLoader
from thaw.data.store import TensorStore
from thaw.plan.__main__ import make_plans
from thaw.plan.costs import cache_line
from thaw.plan.settings import compose_run, read_arguments
from thaw.run.claims import total_memory
from thaw.run.config import build
from thaw.run.console import lenient, quiet_libraries, say
from thaw.run.files import write_text

KEY, FACTS = "0" * 16, {"made": "for a benchmark"}
BLOCK = 1 << 22  # bytes that the disk reads at once, in order
CLASSES, IMAGES, PROBE_BATCH = 1000, 1_281_167, 1024  # ImageNet-1k
MEMORY = 2.5  # GB that are read from memory
FREE = 10e9  # bytes of the disk that stay free
ROWS = {"features": ((768,), torch.float32, 512), "decoded images": ((3, 224, 224), torch.uint8, 128)}  # and a batch


def fill(store: TensorStore, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """An entry of random numbers, as a run stores it."""
    with store.lock(KEY):
        target = store.create(KEY, shape, dtype)
        noise = torch.randint(0, 256, (min(len(target), 4096), *shape[1:]), dtype=torch.uint8)
        for part in target.split(len(noise)):
            part.copy_(noise[: len(part)])
        with patch.object(thaw.data.store, "HASHED", 0):  # opening it would read it
            store.commit(KEY, FACTS, target, known={})
    with store.path(KEY).open("rb") as file:
        os.fsync(file.fileno())
    return target


def forget(store: TensorStore) -> None:
    """Take the file's pages out of memory; nothing may have it mapped."""
    with store.path(KEY).open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def rate(sizes: Iterable[int], seconds: float) -> float:
    """Bytes a second of an iterator that reads, in GB/s, for at most so many seconds."""
    iterator = iter(sizes)
    next(iterator)  # an order has been drawn
    begun, total = time.perf_counter(), 0
    for size in iterator:
        total += size
        if time.perf_counter() - begun > seconds:
            break
    return total / (time.perf_counter() - begun) / 1e9


def direct_reads(path: Path, size: int, threads: int, ordered: bool) -> Iterator[int]:
    """Reads of `size` bytes past the page cache, as dd and fio do them."""
    file = os.open(path, os.O_RDONLY | os.O_DIRECT)
    starts = range(0, path.stat().st_size - size, size)
    buffers = [mmap.mmap(-1, size) for _ in range(threads)]
    try:
        order = starts if ordered else random.sample(starts, min(len(starts), 1 << 20))

        def read(share: int) -> int:
            return sum(os.preadv(file, [buffers[share]], start) for start in chunk[share::threads])

        with ThreadPoolExecutor(threads) as pool:
            for first in range(0, len(order), 64 * threads):
                chunk = order[first : first + 64 * threads]
                yield sum(pool.map(read, range(threads)))
    finally:
        os.close(file)


def dataset_of(rows: Tensor, kind: str) -> ImageDataset:
    """A training split of these features or images."""
    labels = torch.arange(len(rows)) % CLASSES
    if kind == "decoded images":
        return ImageDataset(Images(rows, labels))
    dataset = ImageDataset(Images(torch.empty(len(rows), 1, 1, 1, dtype=torch.uint8), labels))
    dataset.features = rows
    return dataset


def loader(dataset: ImageDataset, batch_size: int, shuffle: bool) -> ImageLoader:
    return ImageLoader(dataset, sampler=BatchSampler(dataset, batch_size, shuffle, 0, 1, 0), batch_size=None)


def batch_bytes(dataset: ImageDataset, batch_size: int, shuffle: bool) -> Iterator[int]:
    for batch in loader(dataset, batch_size, shuffle):
        yield (batch.images if batch.features is None else batch.features).nbytes


def measure(kind: str, gigabytes: float, folder: Path, seconds: float) -> dict[str, float]:
    """GB/s by what was read and how."""
    row, dtype, batch_size = ROWS[kind]
    size = math.prod(row) * dtype.itemsize
    store = TensorStore(folder, math.inf)
    fill(store, (int(gigabytes * 1e9 / size), *row), dtype)
    path, pages = store.path(KEY), math.ceil(size / mmap.PAGESIZE) * mmap.PAGESIZE
    ways = {
        "in order": (BLOCK, 1, True),
        "rows, one at a time": (pages, 1, False),
        "rows, 16 at a time": (pages, 16, False),
    }
    found = {f"the disk, {name}": rate(direct_reads(path, *way), seconds) for name, way in ways.items()}
    for order in ("in order", "shuffled", "shuffled, from memory"):
        for who, small in (("thaw", thaw.data.store.HASHED), ("without reading ahead", math.inf)):
            forget(store)
            rows = store.read(KEY, FACTS)
            assert rows is not None
            if "memory" in order:
                rows = rows[: int(MEMORY * 1e9 / size)]
                rows.sum()
            with patch.object(thaw.data.store, "HASHED", small):
                found[f"{who}, {order}"] = rate(
                    batch_bytes(dataset_of(rows, kind), batch_size, "shuffled" in order), seconds
                )
            del rows
    path.unlink()
    return found


def probe_epochs(images: int, folder: Path) -> list[float]:
    """Seconds of two epochs of a linear probe of ViT-B; the first one reads the features from the disk."""
    store = TensorStore(folder, math.inf)
    fill(store, (images, *ROWS["features"][0]), torch.float32)
    forget(store)
    settings, _ = read_arguments([])
    cfg = compose_run(settings, "vit_base", "linear_probe", ["backbone.weights=none", f"model.num_classes={CLASSES}"])
    model, clock = build(cfg.model), Clock()
    model.backbone.fresh = frozenset()  # no weights are needed
    rows = store.read(KEY, FACTS)
    assert rows is not None
    batches = loader(dataset_of(rows, "features"), PROBE_BATCH, shuffle=True)
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = L.Trainer(
        max_epochs=2, precision=settings.precision, use_distributed_sampler=False, callbacks=[clock], **quiet
    )
    trainer.fit(model, batches)
    store.path(KEY).unlink()
    return clock.epochs


class Clock(L.Callback):
    """Seconds of each epoch."""

    def __init__(self) -> None:
        self.epochs: list[float] = []

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.begun = time.perf_counter()

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.epochs.append(time.perf_counter() - self.begun)


def table(rows: dict[str, dict[str, float]]) -> str:
    """GB/s of both kinds, a row for each way to read."""
    lines = ["| GB/s | " + " | ".join(rows) + " |", "|---" * (len(rows) + 1) + "|"]
    ways = next(iter(rows.values()))
    return "\n".join(
        lines + [f"| {way} | " + " | ".join(f"{each[way]:.2f}" for each in rows.values()) + " |" for way in ways]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gb", type=float, default=20)
    parser.add_argument("--folder", type=Path, required=True, help="on the disk to measure")
    parser.add_argument("--seconds", type=float, default=4, help="of a pass, at most")
    parser.add_argument("--images", type=int, default=IMAGES, help="that the probe trains on")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    needed = max(arguments.gb, arguments.images * 3072 / 1e9) * 1e9 + FREE
    if needed > (free := shutil.disk_usage(arguments.folder).free):
        parser.error(f"--folder has {free / 1e9:.0f} GB free, {needed / 1e9:.0f} are needed; choose a smaller --gb")
    quiet_libraries()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        found = {kind: measure(kind, arguments.gb, Path(name), arguments.seconds) for kind in ROWS}
        say(table(found))
        probes = {count: probe_epochs(count, Path(name)) for count in (arguments.images // 10, arguments.images)}
    disk, ram = found["features"]["the disk, in order"], total_memory() / 1e9
    wanted = ["model=vit_base", "policy=linear_probe", "image_size=224", f"dataset={arguments.images}"]
    settings, plans = make_plans([*wanted, f"disk={disk:.2f}", f"ram={ram:.0f}"])
    lines = [
        f"{count:,} images of {count * 3072 / 1e9:.2f} GB: first epoch {first:.1f} s, second {second:.1f} s"
        for count, (first, second) in probes.items()
    ]
    text = f"""# A cache of {arguments.gb:g} GB

Made by `python -m benchmarks.large_cache --gb {arguments.gb:g}` on {os.cpu_count()} cores and {ram:.0f} GB of memory.
Features are 768 in fp32 (3 kB) in batches of {ROWS["features"][-1]}, images 3 x 224 x 224 (151 kB) in batches of
{ROWS["decoded images"][-1]}, as `ImageLoader` gives them to a run. Each way starts with no page of the file in memory
(`posix_fadvise`), but for "from memory", and reads for at most {arguments.seconds:g} s. "The disk" reads past the page
cache; its rows are whole pages.

{table(found)}

A linear probe of ViT-B with {CLASSES:,} classes, batches of {PROBE_BATCH:,}, bf16-mixed:

- {f"{chr(10)}- ".join(lines)}
- `thaw.plan`, told this disk and memory, predicts: {cache_line(plans[0], settings)}
"""
    write_text(text, Path(__file__).with_suffix(".md"))
    say(text)


if __name__ == "__main__":
    with lenient():
        main()
