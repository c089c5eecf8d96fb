"""Damaged and hostile files of data and weights: each is refused by our own error, or read as what it says.

A mutant that is taken must give the values of the original, or those that a trusted reader (numpy, Pillow, pyarrow,
torch, a few lines of our own) gives for it; that reader compares the checksums that a format has. A crash, ten seconds
without an answer, or more than a GB of memory is a failure: mutants are read in a process of their own.
"""

import csv
import gzip
import hashlib
import io
import json
import logging
import os
import re
import signal
import struct
import time
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random
from types import MappingProxyType, SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torchvision.datasets
from fault_counts import FULL, sized
from faults.mutator import mutate, mutate_member, mutate_png, png_chunk, zipped
from PIL import Image, ImageOps
from processes import FORKING

from thaw.data import mnist
from thaw.data.arrays import find_arrays, to_images, to_labels
from thaw.data.folder import list_table
from thaw.data.huggingface import HuggingFaceData
from thaw.data.pictures import PICTURE_FORMATS, open_picture
from thaw.data.readers import ImageReader
from thaw.data.splits import SPLIT_WORDS
from thaw.data.store import KNOWN, TensorStore
from thaw.data.torchvision import TorchvisionData, images_of
from thaw.models.pretrained import check_fit, read_weights
from thaw.predict.onnx_model import SEAL, SEALED, load_onnx, seal_onnx, unsealed
from thaw.predict.predictor import load_predictor
from thaw.run.checkpoint import load_checkpoint
from thaw.run.errors import UserError

SECONDS, GROWTH = 10, 1_000_000  # that a file may take; kB
Values = list[Any]
Mutation = Callable[[Random, bytes], bytes]


class Kind(NamedTuple):
    """A kind of file.

    Attributes:
        original: a whole one.
        name: of the file.
        read: by thaw.
        trusted: by other code, which checks all checksums; None where nothing but the original may be taken.
        mutations: each is tried as often as the others.
        hostile: further files by what they are.
        share: how many mutants there are for each of another kind; below 1 where reading takes long.
    """

    original: bytes
    name: str
    read: Callable[[Path], Values]
    trusted: Callable[[bytes], Values] | None
    mutations: tuple[Mutation, ...] = (mutate,)
    hostile: Mapping[str, bytes] = MappingProxyType({})
    share: float = 1


# Values


def flat(tree: Any) -> Values:
    """Arrays and texts in nested dictionaries and lists, in their order."""
    if isinstance(tree, torch.Tensor):
        tree = tree.detach()
        bits = tree.contiguous().reshape(-1).view(torch.uint8) if tree.numel() < 10**6 else tree.reshape(-1)[:0]
        return [f"{tree.dtype} {tuple(tree.shape)}", bits.numpy().tobytes()]
    if isinstance(tree, np.ndarray):
        return [f"{tree.dtype} {tree.shape}", tree.tobytes()]
    if isinstance(tree, dict):
        return [part for key, value in tree.items() for part in (repr(key), *flat(value))]
    if isinstance(tree, list | tuple):
        return [part for value in tree for part in flat(value)]
    return [repr(tree)]


# Arrays

PIXELS = np.random.default_rng(0).integers(256, size=(6, 5, 4), dtype=np.uint8)
LABELS = np.arange(6) % 3
HUGE = 2**32 - 1


def idx(*sizes: int, content: bytes = b"") -> bytes:
    return bytes([0, 0, 8, len(sizes)]) + struct.pack(f">{len(sizes)}I", *sizes) + content


def idx_by_hand(content: bytes) -> Values:
    if content[:2] == b"\x1f\x8b":
        content = gzip.decompress(content)
    zeros, kind, ndim = struct.unpack(">HBB", content[:4])
    assert (zeros, kind) == (0, 8)
    array = np.frombuffer(content, np.uint8, offset=4 + 4 * ndim)
    return flat(array.reshape(struct.unpack(f">{ndim}I", content[4 : 4 + 4 * ndim])))


def idx_file_by_hand(content: bytes) -> Values:
    return ["images", *idx_by_hand(content)]


def repacked(rng: Random, content: bytes) -> bytes:
    return gzip.compress(mutate(rng, gzip.decompress(content)), mtime=0)


def read_array_files(path: Path) -> Values:
    found = [(said["kind"], array, name) for name, said, array in find_arrays(path.parent)]
    if path.suffix == ".npz" and len(found) < 2:
        raise UserError("it has no images, or no labels")  # as ArrayData says
    for kind, array, name in found:
        with suppress(UserError):  # of another shape or type; nothing else
            to_images(array, name) if kind == "images" else to_labels(array, name)
    return [part for kind, array, _ in sorted(found, key=lambda each: each[0]) for part in (kind, *flat(array))]


def npy(array: np.ndarray, **options: Any) -> bytes:
    np.save(file := io.BytesIO(), array, **options)
    return file.getvalue()


def numpy_reads(content: bytes) -> Values:
    """What numpy reads of an .npz whose checksums hold."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        assert archive.testzip() is None
        found = {name.removesuffix(".npy"): archive.read(name) for name in archive.namelist()}
    arrays = {
        name: np.load(io.BytesIO(found[name]), allow_pickle=False) for name in ("images", "labels") if name in found
    }
    return [part for name, array in arrays.items() for part in (name, *flat(array))]


def npy_by_numpy(content: bytes) -> Values:
    return ["images", *flat(np.load(io.BytesIO(content), allow_pickle=False))]


def loadtxt_reads(content: bytes) -> Values:
    text = content.decode("utf-8-sig")
    table = np.loadtxt(io.StringIO(text), np.float32, delimiter=",", skiprows=int(not text[:1].isdigit()), ndmin=2)
    return ["images", *flat(table[:, 1:]), "labels", *flat(table[:, 0])]


def npy_header(shape: str = "(6, 5, 4)", dtype: str = "'|u1'", content: bytes = PIXELS.tobytes()) -> bytes:
    header = f"{{'descr': {dtype}, 'fortran_order': False, 'shape': {shape}, }}".encode()
    header += b" " * (-(len(header) + 11) % 64) + b"\n"
    return b"\x93NUMPY\1\0" + struct.pack("<H", len(header)) + header + content


IMAGES, TARGETS = ("images.npy", npy(PIXELS)), ("labels.npy", npy(LABELS))
NPZ = zipped([IMAGES, TARGETS])
HEADERS = {
    **{
        f"of the shape {shape}": npy_header(shape)
        for shape in ("(4611686018427387904,)", "(10**11,)", "(99999999999,)")
    },
    **{f"of the shape {shape}": npy_header(shape) for shape in ("(-6, 5, 4)", "(True,)", "(0, 9)", "(" * 999)},
    **{f"of {dtype}": npy_header("(120,)", dtype) for dtype in ("'|O'", "'|V1'", "[('a', '|u1')]", "'|S0'", "'|i99'")},
    "of subarrays": npy_header("(60,)", "('|u1', (2,))"),
    "of objects": npy(np.array([{}]), allow_pickle=True),
}
ODD_ZIPS = {
    "with a member twice": zipped([IMAGES, ("images.npy", npy(255 - PIXELS)), TARGETS]),
    "with text for an array": zipped([("images.npy", b"hello"), TARGETS]),
    "with a zip file in it": zipped([("images.npz", NPZ), ("images.npy", NPZ)]),
    "encrypted": re.sub(rb"(?s)(PK\x01\x02.{4})\x00", lambda found: found[1] + b"\1", NPZ),
    "packed by an unknown method": re.sub(rb"(?s)(PK\x01\x02.{6})\x00", lambda found: found[1] + b"\x63", NPZ),
    "that is an .npy": IMAGES[1],
    "that is a gzip file": gzip.compress(NPZ),
    "a bomb": zipped([("images.npy", npy_header("(99999999999,)", content=bytes(10**7)))], zipfile.ZIP_DEFLATED),
}


# Pictures


def encoded(format: str, **options: Any) -> bytes:
    pixels = np.random.default_rng(1).integers(256, size=(24, 32, 3), dtype=np.uint8)
    picture: Image.Image = Image.fromarray(pixels).resize((40, 32))
    if format == "GIF":
        picture = picture.convert("P")
    exif = Image.Exif()
    exif[0x112] = 6
    picture.save(
        file := io.BytesIO(), format, **({"exif": exif} if format in ("PNG", "JPEG", "WEBP") else {}), **options
    )
    return file.getvalue()


def seen(picture: Image.Image) -> Values:
    return [picture.mode, picture.size, picture.convert("RGBA").tobytes()]


def read_picture(path: Path) -> Values:
    content = path.read_bytes()
    picture, _ = open_picture(content, path.name, 1000)
    for kind, shape in (("photo", (3, 24, 24)), ("digit", (1, 28, 28))):
        reading = ImageReader(kind, shape).picture(content, path.name)
        assert reading.error or (reading.image is not None and reading.image.shape == shape)
    return seen(picture)


def pillow_reads(content: bytes) -> Values:
    picture: Image.Image = Image.open(io.BytesIO(content), formats=PICTURE_FORMATS)
    if picture.format == "PNG":
        verified = Image.open(io.BytesIO(content))
        verified.verify()  # the CRC of each chunk
    picture.load()
    with suppress(Exception):  # odd EXIF data
        if all(value == value for value in picture.getexif().values()):
            picture = ImageOps.exif_transpose(picture)
    return seen(picture)


def png_of(width: int, height: int, *more: bytes, bits: int = 16, rows: int | None = None) -> bytes:
    """A PNG that states a size, and holds that many black rows, or others."""
    packer, row, parts = zlib.compressobj(9), bytes(1 + width * bits // 8), []
    for _ in range(height if rows is None else rows):
        parts.append(packer.compress(row))
    data = b"".join(parts) + packer.flush()
    head = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(more) + png_chunk(b"IDAT", data) + png_chunk(b"IEND", b"")


def bombs() -> dict[str, bytes]:
    black = io.BytesIO()
    Image.new("L", (3000, 2000)).save(black, "JPEG", progressive=True)
    jpeg = black.getvalue()
    scan = jpeg[jpeg.rfind(b"\xff\xda") : -2]
    text = png_chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(10**8), 1))
    return {
        "JPEG of 3,000 scans": jpeg[:-2] + scan * 3000 + jpeg[-2:],
        "PNG of 8,000 x 8,000": png_of(8000, 8000, bits=8, rows=1),
        **{f"PNG of 7,000 x 7,000 with {rows} rows": png_of(7000, 7000, rows=rows) for rows in (9, 7000) if FULL},
        "PNG with 100 MB of text": png_of(9, 9, text),
        "TIFF of 20,000 frames": tiff_of(20_000),
        "TIFF whose frames form a circle": tiff_of(20_000, circle=True),
    }


def tiff_of(frames: int, circle: bool = False) -> bytes:
    fields = [(256, 4, 1), (257, 4, 1), (258, 3, 8), (259, 3, 1), (262, 3, 1), (273, 4, 0), (279, 4, 1)]
    entries = struct.pack("<H", len(fields)) + b"".join(
        struct.pack("<HHII", tag, kind, 1, v) for tag, kind, v in fields
    )
    size = len(entries) + 4
    nexts = [8 + size * (number + 1) for number in range(frames - 1)] + [8 if circle else 0]
    return b"II*\0" + struct.pack("<I", 8) + b"".join(entries + struct.pack("<I", each) for each in nexts)


# Tables

ROWS = [{"file": f"{number}.png", "label": "ab"[number % 2], "split": "train"} for number in range(9)]


def read_rows(path: Path) -> Values:
    return [f"{file.name} {file.label} {file.split}" for file in list_table(path, path.parent)]


def parquet(**options: Any) -> bytes:
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), file := io.BytesIO(), **options)
    return file.getvalue()


def pyarrow_reads(content: bytes) -> Values:
    import pyarrow.parquet

    rows = pyarrow.parquet.read_table(io.BytesIO(content)).to_pylist()
    return [f"{row['file']} {row['label']} {SPLIT_WORDS[row['split']] if 'split' in row else ''}" for row in rows]


def table_of(**columns: Any) -> bytes:
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table(columns), file := io.BytesIO())
    return file.getvalue()


def same_rows(count: int) -> bytes:
    import pyarrow

    column = pyarrow.DictionaryArray.from_arrays(pyarrow.array(np.zeros(count, np.int8)), ["a"])
    return table_of(file=column, label=column)


def csv_reads(content: bytes) -> Values:
    rows = csv.DictReader(io.StringIO(content.decode("utf-8-sig"), newline=""))
    return [f"{row['file']} {row['label']} {SPLIT_WORDS[row['split']] if 'split' in row else ''}" for row in rows]


# Weights

STATE = {"a.weight": torch.arange(12.0).reshape(3, 4), "b": torch.arange(5.0).bfloat16(), "n": torch.tensor(7)}


def safetensors_of(state: dict[str, torch.Tensor]) -> bytes:
    from safetensors.torch import save

    return save(state, {"note": "x"})


def safetensors_by_hand(content: bytes) -> Values:
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    header.pop("__metadata__", None)
    kinds = {
        "F32": torch.float32,
        "BF16": torch.bfloat16,
        "F16": torch.float16,
        "I64": torch.int64,
        "F64": torch.float64,
    }
    kinds |= {"I32": torch.int32, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "BOOL": torch.bool}
    state = {}
    for name, facts in header.items():
        start, end = facts["data_offsets"]
        data = bytearray(content[8 + size + start : 8 + size + end])
        whole = torch.frombuffer(data, dtype=torch.uint8) if data else torch.zeros(0, dtype=torch.uint8)
        state[name] = whole.view(kinds[facts["dtype"]]).reshape(facts["shape"])
    return flat(dict(sorted(state.items())))


def with_header(rng: Random, content: bytes) -> bytes:
    """Mutate the JSON of a safetensors file, whose length then fits."""
    size = int.from_bytes(content[:8], "little")
    header = mutate(rng, content[8 : 8 + size])
    return len(header).to_bytes(8, "little") + header + content[8 + size :]


def header_of(facts: Any, data: bytes = bytes(8)) -> bytes:
    text = facts if isinstance(facts, bytes) else json.dumps(facts).encode()
    return len(text).to_bytes(8, "little") + text + data


def tensor_at(start: int, end: int, shape: list[int], dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def torch_file(content: Any, **options: Any) -> bytes:
    torch.save(content, file := io.BytesIO(), **options)
    return file.getvalue()


def torch_reads(content: bytes) -> Values:
    """What torch reads of a file whose checksums hold."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        assert archive.testzip() is None
    return flat(torch.load(io.BytesIO(content), weights_only=True))


CHECKPOINT = {"config": {"name": "x", "model": {"lr": 0.1}}, "state_dict": STATE, "git_commit": "abc", "epoch": 3}


# Models


PROBE = Path(__file__).parents[1] / "checkpoints" / "linear_probe.ckpt"
ODD_VALUES = (None, -1, 2**63, float("nan"), "", "${x}", [], {}, ["x"], b"x", True, torch.zeros(2, 3))


def change_leaf(rng: Random, content: bytes) -> bytes:
    """Put an odd value, or many nested lists, into a checkpoint, anywhere but in its configuration."""
    checkpoint = torch.load(io.BytesIO(content), weights_only=True)
    node, key = checkpoint, rng.choice([key for key in checkpoint if key != "config"])
    while isinstance(node[key], dict | list) and node[key] and rng.random() < 0.7:
        node = node[key]
        key = rng.choice([*node] if isinstance(node, dict) else range(len(node)))
    node[key] = rng.choice((*ODD_VALUES, nested := []))
    for _ in range(150 if node[key] is nested else 0):
        nested.append(nested := [])
    return torch_file(checkpoint)


def no_crash(path: Path) -> Values:
    """Predict with a model. What is taken may predict anything: its file says so."""
    load_predictor(str(path))(torch.zeros(2, 1, 28, 28, dtype=torch.uint8))
    return []


def onnx_model() -> bytes:
    """A linear classifier of 4 x 5 pixels as export.py writes it, with its hash."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    nodes = [
        helper.make_node("Cast", ["images"], ["x"], to=TensorProto.FLOAT),
        helper.make_node("Flatten", ["x"], ["flat"]),
        helper.make_node("MatMul", ["flat", "w"], ["logits"]),
        helper.make_node("Softmax", ["logits"], ["probabilities"]),
    ]
    given = helper.make_tensor_value_info("images", TensorProto.UINT8, ["batch", 1, 5, 4])
    answer = helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["batch", 3])
    weights = numpy_helper.from_array(np.linspace(-0.1, 0.1, 60, dtype=np.float32).reshape(20, 3), "w")
    graph = helper.make_graph(nodes, "it", [given], [answer], [weights])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    facts = {"thaw": "1", "dataset": "x", "classes": ["a", "b", "c"], "reader": "photo", SEAL: "0" * 64}
    onnx.helper.set_model_props(model, {key: json.dumps(value) for key, value in facts.items()})
    return seal_onnx(model.SerializeToString())


def resealed(rng: Random, content: bytes) -> bytes:
    """A mutant with the hash of its own content, as an attacker writes it."""
    found = SEALED.search(changed := mutate(rng, content))
    return seal_onnx(unsealed(changed, found)) if found else changed


def read_onnx(path: Path) -> Values:
    return flat(load_onnx(path)(torch.from_numpy(PIXELS[:, None])).numpy())


def onnxruntime_computes(content: bytes) -> Values:
    import onnxruntime

    found = SEALED.search(content)
    assert found is None or seal_onnx(unsealed(content, found)) == content
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    return flat(session.run(["probabilities"], {"images": PIXELS[:, None]})[0])


# Data sets whose files have names of their own

MNIST = "train-images-idx3-ubyte.gz"


def read_mnist(path: Path) -> Values:
    found = mnist.read_official("MNIST", MNIST, path, time.monotonic_ns())
    if isinstance(found, str):
        raise UserError(found)
    return flat(found)


def read_emnist(path: Path) -> Values:
    how = SimpleNamespace(dir=path.parents[2], download=False, name="EMNIST")
    settings = {"root": how.dir, "split": "letters", "train": True}
    dataset = TorchvisionData.open(how, torchvision.datasets.EMNIST, settings)  # type: ignore[arg-type]
    return flat([*images_of(dataset, "it")])


def emnist_by_hand(content: bytes) -> Values:
    images = np.frombuffer(content, np.uint8, offset=16).reshape(struct.unpack(">III", content[4:16]))
    assert content[:4] == bytes([0, 0, 8, 3])
    return flat([torch.from_numpy(images.transpose(0, 2, 1)[:, None].copy()), torch.from_numpy(LABELS)])


def read_pets(path: Path) -> Values:
    settings = dict.fromkeys(HuggingFaceData.__dataclass_fields__)
    settings |= {"name": str(path.parent), "image_size": 8, "channels": 3, "val_share": 0.2, "test_share": 0.2}
    settings |= {"skip_unreadable": False, "cache_dir": str(path.parents[1] / "decoded"), "max_gb": 1.0}
    KNOWN.clear()
    source = HuggingFaceData(**settings).read()  # type: ignore[arg-type]
    parts = (source.train, source.val, source.test)
    pairs = [(source.classes[y], x.numpy().tobytes()) for part in parts for x, y in zip(*part, strict=True)]
    return sorted(pairs)


def pillow_and_pyarrow_read(content: bytes) -> Values:
    import pyarrow.parquet

    rows = pyarrow.parquet.read_table(io.BytesIO(content)).to_pylist()
    pictures = [Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB") for row in rows]
    pixels = [np.asarray(picture).transpose(2, 0, 1).tobytes() for picture in pictures]
    return sorted((("dog", "cat")[row["label"]], each) for row, each in zip(rows, pixels, strict=True))


def paths_for_pictures(path: str) -> bytes:
    return table_of(image=[{"bytes": None, "path": path}] * 12, label=[0, 1] * 6)


def pets() -> bytes:
    import datasets

    rows: dict[str, list[Any]] = {"image": [], "label": []}
    for number in range(24):
        Image.fromarray(np.full((8, 8, 3), 9 * number, np.uint8)).save(file := io.BytesIO(), "PNG")
        rows["image"].append({"bytes": file.getvalue(), "path": None})
        rows["label"].append(number % 2)
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=["dog", "cat"]))
    datasets.Dataset.from_dict(rows, features).to_parquet(file := io.BytesIO())
    return file.getvalue()


# What thaw itself keeps

KEY, FACTS = "0123456789abcdef", {"weights": "abc", "size": [28, 28]}


def entry(folder: Path, known: dict[str, Any] | None) -> tuple[bytes, bytes]:
    store = TensorStore(folder, 1e6)
    with store.lock(KEY):
        target = store.create(KEY, (2, 5, 4), torch.uint8 if known else torch.float32)
        target.copy_(torch.arange(40).reshape(2, 5, 4))
        store.commit(KEY, FACTS, target, known)
    return store.path(KEY).read_bytes(), store.path(KEY).with_suffix(".json").read_bytes()


def read_entry(path: Path) -> Values:
    """An entry of which one file is the mutant and the other is beside it, whole."""
    store = TensorStore(path.parent, 1e6)
    for whole in path.parent.glob("*.whole"):
        whole.with_suffix("").write_bytes(whole.read_bytes())
    read = store.read(KEY, FACTS)
    if read is None:
        raise UserError("is damaged and will be computed again")
    known = store.record(KEY)
    return [*flat(read), repr(known.get("order"))]


def kinds(folder: Path) -> dict[str, Kind]:
    plain = idx(*PIXELS.shape, content=PIXELS.tobytes())
    gz = gzip.compress(plain, mtime=0)
    found = {
        "IDX": Kind(
            *(plain, "idx/images-idx3-ubyte", read_array_files, idx_file_by_hand),
            hostile={
                "with a size of 0 beside huge ones": idx(0, HUGE, HUGE, HUGE),
                "of 255 dimensions": idx(*[1] * 255, content=b"a"),
            },
        ),
        "IDX in gzip": Kind(
            *(gz, "gz/images-idx3-ubyte.gz", read_array_files, idx_file_by_hand, (mutate, repacked)),
            hostile={
                "bomb": gzip.compress(bytes(10**6)) * 1000,
                "bomb that states its size": gzip.compress(idx(10**7, 10**4, 9)) + gzip.compress(bytes(10**6)) * 1000,
                "that states more than it holds": gzip.compress(idx(HUGE, 28, 28)),
            },
        ),
        "npy": Kind(IMAGES[1], "npy/images.npy", read_array_files, npy_by_numpy, hostile=HEADERS),
        "npz": Kind(
            *(NPZ, "npz/arrays.npz", read_array_files, numpy_reads, (mutate, mutate_member)),
            hostile=ODD_ZIPS
            | {f"with an array {name}": zipped([("images.npy", each)]) for name, each in HEADERS.items()},
        ),
        "CSV of pixels": Kind(
            b"label,a,b,c,d\n1,0,255,3,4\n0,9,8,7,6\n", "csv/pixels.csv", read_array_files, loadtxt_reads
        ),
        "parquet": Kind(
            *(parquet(), "table.parquet", read_rows, pyarrow_reads),
            hostile={
                "of 2 million equal rows": same_rows(2 * 10**6),
                "with a NUL in a name": table_of(file=["a\0b"], label=["x"]),
                "with lists for splits": table_of(file=["a"], label=["x"], split=[["train"]]),
                "with bytes and structures": table_of(file=[b"\xff"], label=[{"a": [1]}]),
            },
        ),
        "CSV of files": Kind(
            "\n".join(["file,label,split", *(",".join(row.values()) for row in ROWS)]).encode(),
            *("table.csv", read_rows, csv_reads),
            hostile={
                "with a NUL in a name": b"file,label\na\0b,x\n",
                "with a huge field": b"file,label\n" + b"a" * 10**6,
            },
        ),
        "safetensors": Kind(
            *(safetensors_of(STATE), "weights.safetensors", read_tensors, safetensors_by_hand, (mutate, with_header)),
            hostile={
                "with a header of a billion bytes": (10**9).to_bytes(8, "little") + b"{}",
                "with a header of 2^63 bytes": (2**63).to_bytes(8, "little") + b"{}",
                "with nested JSON": header_of(b"[" * 10**6),
                "with overlapping tensors": header_of({"a": tensor_at(0, 8, [2]), "b": tensor_at(4, 8, [1])}),
                "with a huge tensor": header_of({"a": tensor_at(0, 2**62, [2**60])}),
                "with a shape that overflows": header_of({"a": tensor_at(0, 8, [2**33, 2**33])}),
                "of strange numbers": header_of({"a": tensor_at(0, 8, [16], "F4")}),
                "with a hole": header_of({"a": tensor_at(4, 8, [1])}),
            },
        ),
        "pth": Kind(
            *(torch_file(STATE), "weights.pth", read_tensors, torch_reads, (mutate, mutate_member)),
            hostile={"of an old version, cut off": torch_file(STATE, _use_new_zipfile_serialization=False)[:-9]},
        ),
        "ckpt": Kind(
            *(torch_file(CHECKPOINT), "last.ckpt", read_tensors, torch_reads, (mutate, mutate_member)),
            hostile={
                "of an old version": torch_file(CHECKPOINT, _use_new_zipfile_serialization=False),
                "that is compressed": compressed(torch_file(CHECKPOINT)),
            },
        ),
    }
    for format in PICTURE_FORMATS:
        mutations = (mutate, mutate_png) if format == "PNG" else (mutate,)
        found[format] = Kind(encoded(format), f"picture.{format.lower()}", read_picture, pillow_reads, mutations)
    torchvision.datasets.MNIST.resources = [(MNIST, hashlib.md5(gz).hexdigest())] * 4
    mnist.UNPACKED_MD5 = {"MNIST": (hashlib.md5(plain).hexdigest(),) * 4}
    large = {"of 65 MB": gzip.compress(bytes(10**6)) * 65} if FULL else {}
    found["an official file of MNIST"] = Kind(gz, MNIST, read_mnist, None, (mutate, repacked), large)
    emnist = folder / "EMNIST" / "raw"
    emnist.mkdir(parents=True, exist_ok=True)
    for split in ("train", "test"):
        (emnist / f"emnist-letters-{split}-images-idx3-ubyte").write_bytes(plain)
        (emnist / f"emnist-letters-{split}-labels-idx1-ubyte").write_bytes(
            idx(6, content=LABELS.astype(np.uint8).tobytes())
        )
    name = "EMNIST/raw/emnist-letters-train-images-idx3-ubyte"
    found["EMNIST of torchvision"] = Kind(plain, name, read_emnist, emnist_by_hand)
    found["ONNX"] = Kind(onnx_model(), "model.onnx", read_onnx, onnxruntime_computes, (mutate, resealed))
    whole = PROBE.read_bytes()
    found["a checkpoint's values"] = Kind(whole, "model.ckpt", no_crash, None, (change_leaf,), share=0.3)
    if FULL:
        (folder / "pets").mkdir(exist_ok=True)
        hostile = {f"with the path {each}": paths_for_pictures(each) for each in ("/dev/zero", "/etc/passwd", "x\0y")}
        how = pets(), "pets/train.parquet", read_pets, pillow_and_pyarrow_read
        found["parquet of pictures"] = Kind(*how, hostile=hostile, share=0.2)
    found["TIFF in LZW"] = Kind(encoded("TIFF", compression="tiff_lzw"), "lzw.tiff", read_picture, pillow_reads)
    found["JPEG in scans"] = Kind(encoded("JPEG", progressive=True), "scans.jpg", read_picture, pillow_reads)
    found["PNG"] = found["PNG"]._replace(hostile=bombs())
    for name, known in (("features", None), ("decoded images", {"order": {"train": [2, 0, 1]}, "lines": []})):
        for number, suffix in enumerate((".npy", ".json")):
            place = folder / f"{name} {suffix}"
            whole = entry(place, known)
            place.joinpath(f"{KEY}{('.json', '.npy')[number]}.whole").write_bytes(whole[1 - number])
            found[f"cached {name}, {suffix}"] = Kind(whole[number], f"{place.name}/{KEY}{suffix}", read_entry, None)
    return found


def compressed(content: bytes) -> bytes:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return zipped([(name, archive.read(name)) for name in archive.namelist()], zipfile.ZIP_DEFLATED)


def read_tensors(path: Path) -> Values:
    if path.suffix == ".ckpt":
        return flat(load_checkpoint(path))
    state = read_weights(path)
    check_fit(path, "it", state, STATE)
    return flat(dict(sorted(state.items())) if path.suffix == ".safetensors" else state)


# Each mutant in another process


def answers(folder: Path, first: int, count: int, pipe: Connection) -> None:
    """Read `count` mutants of each kind and the hostile files, from the `first` on.

    Sends the number and title of each before it is read, then what is wrong with that, and whether the file was taken.
    """
    logging.disable()
    warnings.simplefilter("ignore")
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends the process
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # where the libraries of C write
    all_kinds = kinds(folder)
    originals = {name: original_values(kind, folder / kind.name) for name, kind in all_kinds.items()}
    assert all(values or all_kinds[name].read is no_crash for name, values in originals.items())
    files: list[tuple[str, int | str]] = [
        (name, number) for name, kind in all_kinds.items() for number in range(round(count * kind.share))
    ]
    files += [(name, title) for name, kind in all_kinds.items() for title in kind.hostile]
    for number, (name, which) in enumerate(files):
        if number >= first:
            kind = all_kinds[name]
            pipe.send((number, name, which))
            if isinstance(which, str):
                content = kind.hostile[which]
            else:
                content = kind.mutations[which % len(kind.mutations)](Random(f"{name} {which}"), kind.original)
            pipe.send(tried(kind, content, folder / kind.name, originals[name]))
    pipe.send(None)


def tried(kind: Kind, content: bytes, path: Path, original: Values) -> tuple[str, bool]:
    """What is wrong with the reading of a file, if anything is, and whether the file was taken."""
    path.write_bytes(content)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before, taken, wrong = peak(), False, ""
    signal.alarm(SECONDS)
    try:
        values = kind.read(path)
        taken = True
    except UserError:
        pass
    except Exception as error:
        wrong = f"{type(error).__name__}: {error}"[:200]
    signal.alarm(0)
    if (grown := peak() - before) > GROWTH:
        wrong += f" took {grown:,} kB"
    if taken and values not in [original, *trusted(kind, content)]:
        wrong += f" was read as {str(values)[:200]}"
    return wrong, taken


def peak() -> int:
    """The most kB that the process has held since the last reset."""
    found = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())
    assert found
    return int(found[1])


def original_values(kind: Kind, path: Path) -> Values:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(kind.original)
    return kind.read(path)


def trusted(kind: Kind, content: bytes) -> Values:
    """What other code reads, in a list; an empty one if it refuses the file, or there is none."""
    if kind.trusted:
        with suppress(Exception):
            return [kind.trusted(content)]
    return []


def outcomes(folder: Path, count: int) -> Iterator[tuple[str, int | str, str, bool]]:
    """Kind and number or title of each file, what is wrong with its reading, and whether it was taken."""
    first, finished = 0, False
    while not finished:
        ours, theirs = FORKING.Pipe()
        child = FORKING.Process(target=answers, args=(folder, first, count, theirs), daemon=True)
        child.start()
        theirs.close()
        try:
            while (file := ours.recv()) is not None:
                number, name, which = file
                first = number + 1
                yield (name, which, *ours.recv())
            finished = True
        except EOFError:  # the process has ended
            child.join()
            assert first, "the originals cannot be made"
            yield name, which, f"ended the process with the status {child.exitcode}", False
        child.join()


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc")
def test_mutated_files(tmp_path: Path, tries: Callable[..., Any]) -> None:
    taken: dict[str, list[bool]] = {}
    with tries("a mutated file", harm="let in") as attempt:
        for name, which, wrong, was_taken in outcomes(tmp_path, sized(12, 400)):
            taken.setdefault(name, []).append(was_taken)
            with attempt(f"{name} {which}"):
                assert not wrong, wrong
    assert not [name for name, each in taken.items() if all(each) and len(each) > 9]  # some of every kind are refused
