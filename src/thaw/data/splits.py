"""Which images are trained on, validated and tested on, where that is not given: a fixed function of their content."""

import hashlib
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Annotated, NamedTuple, TypeAlias

import torch
from lightning.pytorch.utilities import rank_zero_only
from pydantic import Field

from thaw.data.images import Images
from thaw.run.console import plural, say, some
from thaw.run.errors import UserError

SplitShare: TypeAlias = Annotated[float, Field(gt=0, lt=1, strict=True)]
SPLITS = ("train", "val", "test")
SPLIT_WORDS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}


class ListedFile(NamedTuple):
    """A picture file: its place in the folder of the data, its class, and its split, or "" if none is given."""

    name: str
    label: str
    split: str
    size: int = 0  # bytes
    modified: int = 0  # nanoseconds since 1970


def plan_splits(
    given: Collection[str], val_share: float, test_share: float, place: str
) -> tuple[dict[str, str], dict[str, float]]:
    """The use of each given split, and the shares of train for those that are missing; prints what it decides.

    Where train and val are given but no test, val becomes the test split, as nothing may be chosen on what is reported.
    """
    given = {*given} - {""}
    if given and "train" not in given:
        raise UserError(f"{place} has the splits {', '.join(sorted(given))}, but no train.")
    if val_share + test_share >= 1:
        raise UserError(
            f"data.val_share={val_share} and data.test_share={test_share} leave nothing to train on; their sum must be "
            "below 1."
        )
    lines, uses = [], {split: split for split in given}
    if given == {"train", "val"}:
        uses["val"] = "test"
        lines.append("val is the test split, as there is no test")
    shares = {"test": test_share, "val": val_share}
    shares = {split: share for split, share in shares.items() if split not in uses.values()}
    where = " in train" if given else ""
    lines += [f"{split} takes {share:.0%} of each class{where}" for split, share in shares.items()]
    if lines:
        rank_zero_only(say)(f"splits: {'; '.join(lines)}")
    return uses, shares


def choose_splits(pairs: Iterable[tuple[str, str]], shares: Mapping[str, float]) -> dict[str, str]:
    """The split of each content, from pairs of class and hash: shares of each class in the order of the hashes.

    A class of three contents or more has at least one in each of the splits, a smaller one has all in train. Equal
    images are in one split, even if their classes differ.
    """
    contents = defaultdict(set)
    for label, content in pairs:
        contents[label].add(content)
    chosen: dict[str, str] = {}
    for _, pool in sorted(contents.items()):
        free = [content for content in sorted(pool) if content not in chosen]
        for split, share in shares.items():
            wanted = max(1, round(share * len(pool))) if len(pool) >= 3 else 0
            wanted = max(0, wanted - sum(chosen.get(content) == split for content in pool))
            chosen |= dict.fromkeys(free[:wanted], split)
            free = free[wanted:]
        chosen |= dict.fromkeys(free, "train")
    return chosen


def split_images(
    splits: Mapping[str, Images], val_share: float, test_share: float, place: str
) -> tuple[Images, Images, Images]:
    """Train, val and test of images in memory, in their order; what is missing is taken from train by content."""
    uses, shares = plan_splits(splits, val_share, test_share, place)
    found = {uses[split]: images for split, images in splits.items()}
    if shares:
        train = found["train"]
        hashes = [hashlib.sha256(image.contiguous().numpy().data).hexdigest() for image in train.images]
        chosen = choose_splits(zip(map(str, train.labels.tolist()), hashes, strict=True), shares)
        for split in ("train", *shares):
            found[split] = train.take(torch.tensor([chosen[content] == split for content in hashes]))
    return found["train"], found["val"], found["test"]


def split_files(
    files: Sequence[ListedFile], shares: Mapping[str, float], hashes: Mapping[int, str]
) -> tuple[dict[str, list[int]], list[str]]:
    """The numbers of the files with a hash by split, in the order of the hashes, and lines about equal files."""
    in_train = [number for number in hashes if files[number].split == "train"]
    chosen = choose_splits([(files[number].label, hashes[number]) for number in in_train], shares)
    split_of = {number: files[number].split for number in hashes} | {n: chosen[hashes[n]] for n in in_train}
    order: dict[str, list[int]] = {split: [] for split in SPLITS}
    equal = defaultdict(list)  # numbers by hash
    for number in sorted(hashes, key=lambda number: (hashes[number], number)):
        order[split_of[number]].append(number)
        equal[hashes[number]].append(number)
    groups = [group for group in equal.values() if len({(files[n].label, split_of[n]) for n in group}) > 1]
    names = [" = ".join(files[number].name for number in group) for group in groups]
    line = f"{plural(len(names), 'picture')} in several classes or splits: {some(names)}. Keep each in one of them."
    return order, [line] if names else []
