"""Which files are trained on, validated and tested on, where that is not given: a fixed function of their content."""

import hashlib
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from typing import Annotated, NamedTuple, TypeAlias

import torch
from lightning.pytorch.utilities import rank_zero_only
from pydantic import Field

from thaw.data.decode import Order, some
from thaw.data.images import Images
from thaw.run.console import plural, say
from thaw.run.errors import UserError

SplitShare: TypeAlias = Annotated[float, Field(gt=0, lt=1, strict=True)]
SPLITS = ("train", "val", "test")


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

    Where train and val are given but no test, val is what is tested on, as nothing may be chosen on the test split.
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
        lines.append("what lies in val is tested on, as there is no test")
    shares = {"test": test_share, "val": val_share}
    shares = {split: share for split, share in shares.items() if split not in uses.values()}
    where = " in train" if given else ""
    lines += [f"{split} takes {share:.0%} of each class{where}" for split, share in shares.items()]
    if lines:
        rank_zero_only(say)(f"splits: {'; '.join(lines)}")
    return uses, shares


def split_images(
    splits: Mapping[str, Images], val_share: float, test_share: float, place: str
) -> tuple[Images, Images, Images]:
    """Train, val and test of images in memory, in their order; what is missing is taken from train by content."""
    uses, shares = plan_splits(splits, val_share, test_share, place)
    found = {uses[split]: images for split, images in splits.items()}
    if shares:
        train = found["train"]
        files = [ListedFile("", str(label), "train") for label in train.labels.tolist()]
        hashes = [hashlib.sha256(image.contiguous().numpy().data).hexdigest() for image in train.images]
        chosen = choose_splits(files, shares, dict(enumerate(hashes)))
        for split in ("train", *shares):
            found[split] = train.take(torch.tensor([chosen[content] == split for content in hashes]))
    return found["train"], found["val"], found["test"]


def split_files(
    files: Sequence[ListedFile], shares: Mapping[str, float], hashes: Mapping[int, str]
) -> tuple[Order, list[str]]:
    """The numbers of the readable files by split, and lines about equal files.

    The classes of a split are evenly mixed, so that its first files are a good sample of it.

    Args:
        shares: of the training files of each class, for splits that are missing; see `choose_splits`.
        hashes: of the content of the readable files, by number.
    """
    chosen = choose_splits(files, shares, hashes)
    parts: dict[str, dict[str, list[int]]] = {split: defaultdict(list) for split in SPLITS}
    equal, split_of = defaultdict(list), {}  # numbers by hash, splits by number
    for number in sorted(hashes, key=lambda number: (hashes[number], number)):
        given, label = files[number].split, files[number].label
        split_of[number] = chosen[hashes[number]] if given in ("", "train") else given
        parts[split_of[number]][label].append(number)
        equal[hashes[number]].append(number)
    order = {}
    for split, classes in parts.items():
        places = {number: (i + 0.5) / len(part) for part in classes.values() for i, number in enumerate(part)}
        order[split] = sorted(places, key=lambda number: (places[number], hashes[number], number))
    lines = []
    for word, of in (("classes", lambda number: files[number].label), ("splits", lambda number: split_of[number])):
        several = [group for group in equal.values() if len({of(number) for number in group}) > 1]
        names = [" = ".join(files[number].name for number in group) for group in several]
        if names:
            lines.append(f"{plural(len(names), 'picture')} in several {word}: {some(names)}. Keep each in one of them.")
    return order, lines


def choose_splits(
    files: Sequence[ListedFile], shares: Mapping[str, float], hashes: Mapping[int, str]
) -> dict[str, str]:
    """The split of each content that no split is given for: a share of each class, in the order of the hashes.

    A class of three files or more has at least one in each of the splits, a smaller one has all in train. Equal files
    are in one split, even if their classes differ.
    """
    contents = defaultdict(set)
    for number, content in hashes.items():
        if files[number].split in ("", "train"):
            contents[files[number].label].add(content)
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
