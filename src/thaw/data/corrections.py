"""Training images left out, and labels corrected, as CSV files list them: `data.exclude` and `data.relabel`.

clean.py writes such files; one made by hand works, too. A row names an image by `file`, or by `split` and `index` where
the images have no files, and for `data.relabel` its `suggested_label`. Its `given_label` and `image`, the beginning of
the SHA-256 of its pixels, are compared with the data, where they are there. Train and val change, the test split never:
what is listed of it counts in `test/acc`, which is given without these images, too.
"""

import csv
import hashlib
import io
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from thaw.data.images import Images, Source
from thaw.data.splits import SPLITS
from thaw.run.console import say
from thaw.run.errors import UserError, UserFileError

HASH_LENGTH = 16  # hexadecimal digits
OTHER_DATA = "the file was made for other data. Run clean.py on these."
Place = tuple[str, int]  # a split, and the index of an image in it


def image_hash(image: Tensor) -> str:
    """The beginning of the SHA-256 of an image's pixels (C, H, W), by which a row of a CSV file is checked."""
    return hashlib.sha256(image.contiguous().numpy().data).hexdigest()[:HASH_LENGTH]


def correct(
    source: Source,
    names: Mapping[str, Sequence[str]],
    unreadable: Sequence[str],
    exclude: str | None,
    relabel: str | None,
) -> Source:
    """A source without the images that the file `exclude` lists, and with the labels that `relabel` suggests.

    An image that both list is left out. `Source.listed` and `Source.corrections` say what was done.

    Args:
        names: of the files of the images by split, where they have any.
        unreadable: names of files that are left out already; they may be listed.

    Raises:
        UserError: a file that cannot be read or lacks columns, that was made for other data, names an unknown split,
            index, file or label, or leaves nothing to train or to validate on.
    """
    places = defaultdict(list)  # of a file, which a table of pictures may name several times
    for split, files in names.items():
        for index, name in enumerate(files):
            places[name].append((split, index))
    places |= {name: [] for name in unreadable}
    dropped = {split: torch.zeros(len(getattr(source, split).labels), dtype=torch.bool) for split in SPLITS}
    labels = {split: getattr(source, split).labels.clone() for split in SPLITS}
    corrections = {}
    for setting, file in (("exclude", exclude), ("relabel", relabel)):
        if file is None:
            continue
        found: set[Place] = set()
        rows, content_hash = read_corrections(setting, file)
        for number, row in rows:
            where = f"data.{setting}={file}: row {number}"
            if setting == "relabel" and not row.get("suggested_label"):
                continue  # e.g. of a duplicate
            here = find_image(row, where, source, places)
            found.update(here)
            for split, index in here if setting == "relabel" else ():
                labels[split][index] = class_number(row["suggested_label"], where, source)
        for split, index in found if setting == "exclude" else ():
            dropped[split][index] = True
        counts = {split: sum(place[0] == split for place in found) for split in SPLITS}
        if setting == "relabel" and not found:
            raise UserError(
                f"data.relabel={file} suggests no label: fill its column suggested_label, or use data.exclude."
            )
        corrections[setting] = {"file": file, "sha256": content_hash, **counts}
        dropped["test"][[index for split, index in found if split == "test"]] = True
    parts = {split: Images(getattr(source, split).images, labels[split]) for split in ("train", "val")}
    for split, part in parts.items():
        if dropped[split].any():
            if dropped[split].all():
                raise UserError(f"data.exclude={exclude} lists all {len(part.labels):,} {split} images; leave some.")
            parts[split] = part.take(~dropped[split])
    listed = dropped["test"].nonzero()[:, 0].tolist()
    source = source._replace(train=parts["train"], val=parts["val"], listed=listed, corrections=corrections)
    rank_zero_only(say)(f"corrected data: {say_corrections(corrections)}")
    return source


def say_corrections(corrections: Mapping[str, Any]) -> str:
    """What was left out and relabelled, in one line, e.g. for a report."""
    parts = []
    for setting, facts in corrections.items():
        deed = "without" if setting == "exclude" else "new labels of"
        stay = f" ({facts['test']:,} listed test images stay as they are)" if facts["test"] else ""
        parts.append(f"{deed} {facts['train']:,} train and {facts['val']:,} val images of {facts['file']}{stay}")
    return "; ".join(parts)


def read_corrections(setting: str, file: str) -> tuple[list[tuple[int, dict[str, str]]], str]:
    """The rows of a CSV file with their numbers, and its SHA-256; UserError if it lacks a column."""
    try:
        content = Path(file).expanduser().read_bytes()
        reader = csv.DictReader(io.StringIO(content.decode("utf-8-sig"), newline=""))
        rows = list(enumerate(reader, start=1))
    except (OSError, ValueError, RuntimeError, csv.Error) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserFileError(
            f"data.{setting}={file} cannot be read ({reason}); give a CSV file in UTF-8 as clean.py writes it, or null."
        ) from error
    columns = set(reader.fieldnames or ())
    lacks = [] if "file" in columns else sorted({"split", "index"} - columns)
    lacks += ["suggested_label"] * (setting == "relabel" and "suggested_label" not in columns)
    if lacks:
        has = ", ".join(map(str, reader.fieldnames or ())) or "(none)"
        raise UserError(
            f"data.{setting}={file} has the columns {has}; it lacks "
            f"{' and '.join(lacks)}. A file of clean.py has all that is needed."
        )
    if not rows:
        raise UserError(f"data.{setting}={file} lists no image; give another file, or data.{setting}=null.")
    return rows, hashlib.sha256(content).hexdigest()


def find_image(row: Mapping[str, str], where: str, source: Source, places: Mapping[str, list[Place]]) -> list[Place]:
    """The places of the image that a row names, compared with what the row says of it; none of an unreadable file."""
    if file := row.get("file"):
        if file not in places:
            raise UserError(f"{where} names the file {file!r}, which {source.title} does not have; {OTHER_DATA}")
        found = places[file]
    else:
        split, text = row.get("split") or "", row.get("index") or ""
        if split not in SPLITS:
            raise UserError(f"{where} has the split {split!r}; it must be train, val or test.")
        count = len(getattr(source, split).labels)
        if not (text.isascii() and text.isdigit() and int(text) < count):
            raise UserError(
                f"{where} has the index {text!r}, but the {split} images of {source.title} have 0 to {count - 1}; "
                f"{OTHER_DATA}"
            )
        found = [(split, int(text))]
    for split, index in found:
        images, labels = getattr(source, split)
        if labels.ndim == 2:
            raise UserError(
                f"{where}: {source.title} has several labels an image; corrections are for one class an image."
            )
        given = row.get("given_label")
        if given and class_number(given, where, source) != labels[index]:
            right = source.classes[int(labels[index])]
            raise UserError(
                f"{where} has the given label {given!r}, but {split} image {index} has {right!r}; {OTHER_DATA}"
            )
        if not file and row.get("image") and image_hash(images[index]) != row["image"]:
            raise UserError(f"{where}: {split} image {index} of {source.title} has other pixels; {OTHER_DATA}")
    return found


def class_number(name: str, where: str, source: Source) -> int:
    if name not in source.classes:
        raise UserError(f"{where} has the label {name!r}; the classes are {', '.join(source.classes[:20])}.")
    return list(source.classes).index(name)
