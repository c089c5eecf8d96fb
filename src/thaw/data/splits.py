"""Which files are trained on, validated and tested on, where that is not given: a fixed function of their content."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from thaw.data.decode import Order, some
from thaw.run.console import plural

SPLITS = ("train", "val", "test")


class ListedFile(NamedTuple):
    """A picture file: its place in the folder of the data, its class, and its split, or "" if none is given."""

    name: str
    label: str
    split: str
    size: int = 0  # bytes
    modified: int = 0  # nanoseconds since 1970


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
    equal: dict[str, dict[int, str]] = defaultdict(dict)  # by hash: the files, and their splits
    for number in sorted(hashes, key=lambda number: (hashes[number], number)):
        file, content = files[number], hashes[number]
        split = chosen[content] if file.split in ("", "train") else file.split
        parts[split][file.label].append(number)
        equal[content][number] = split
    order = {}
    for split, classes in parts.items():
        places = {number: (i + 0.5) / len(part) for part in classes.values() for i, number in enumerate(part)}
        order[split] = sorted(places, key=lambda number: (places[number], hashes[number], number))
    lines = []
    for word, kinds in (
        ("classes", {content: {files[number].label for number in group} for content, group in equal.items()}),
        ("splits", {content: set(group.values()) for content, group in equal.items()}),
    ):
        names = [" = ".join(files[number].name for number in equal[each]) for each in kinds if len(kinds[each]) > 1]
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
