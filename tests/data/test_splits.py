"""Splits that are a function of the content: shares of each class, equal files together."""

from collections import Counter

import pytest

from thaw.data.splits import ListedFile, split_files

SHARES = {"test": 0.2, "val": 0.1}


def listed(split: str = "train", **counts: int) -> list[ListedFile]:
    return [ListedFile(f"{label}/{i}", label, split) for label, count in counts.items() for i in range(count)]


def hashes_of(files: list[ListedFile]) -> dict[int, str]:
    """A different content for each file, in an order that is not theirs."""
    return {number: f"{hash((number * 7919) % 1009):04}{file.name}" for number, file in enumerate(files)}


def test_each_class_gives_its_share() -> None:
    files = listed(ants=50, bees=20)
    order, lines = split_files(files, SHARES, hashes_of(files))
    counts = {split: Counter(files[number].label for number in part) for split, part in order.items()}
    assert counts == {"train": {"ants": 35, "bees": 14}, "val": {"ants": 5, "bees": 2}, "test": {"ants": 10, "bees": 4}}
    assert sorted(number for part in order.values() for number in part) == list(range(70)) and not lines


def test_the_split_follows_the_content_not_the_names() -> None:
    files = listed(ants=50, bees=20)
    hashes = hashes_of(files)
    before, _ = split_files(files, SHARES, hashes)
    renamed = [file._replace(name=f"new/{file.name}") for file in reversed(files)]
    after, _ = split_files(renamed, SHARES, {69 - number: content for number, content in hashes.items()})
    for split in before:
        assert [69 - number for number in after[split]] == list(before[split])


@pytest.mark.parametrize(("count", "splits"), [(1, {"train"}), (2, {"train"}), (3, {"train", "val", "test"})])
def test_small_classes(count: int, splits: set[str]) -> None:
    files = listed(rare=count, ants=40)
    order, _ = split_files(files, SHARES, hashes_of(files))
    assert {split for split, part in order.items() if any(files[number].label == "rare" for number in part)} == splits


def test_equal_files_lie_in_one_split_even_in_two_classes() -> None:
    """Each content is there three times: twice in one class and once in the other."""
    files = listed(ants=60, bees=30)
    hashes = {number: f"{number % 30:02}" for number in range(90)}
    order, lines = split_files(files, SHARES, hashes)
    seen = {split: {hashes[number] for number in part} for split, part in order.items()}
    assert sum(map(len, seen.values())) == 30 and all(seen.values())
    [line] = lines
    assert (
        line.startswith("30 pictures in several classes or splits: ants/0 = ants/30 = bees/0, ") and "20 more" in line
    )


def test_equal_files_count_in_the_share_of_the_second_class() -> None:
    """The second class has the files that the first one gives to test, and 16 of its own: none of those is needed."""
    files = listed(ants=20, bees=20)
    hashes = {number: f"{number if number < 24 else number + 100:03}" for number in range(40)}
    hashes |= {number: f"{number - 20:03}" for number in range(20, 24)}
    order, _ = split_files(files, SHARES, hashes)
    assert sorted(order["test"]) == [0, 1, 2, 3, 20, 21, 22, 23]


def test_given_splits_stay_and_a_picture_in_two_of_them_is_named() -> None:
    files = [*listed(ants=20, bees=20), *listed("test", ants=5, bees=5)]
    files[40] = files[40]._replace(name="test/ants/0")
    hashes = hashes_of(files)
    hashes[40] = hashes[3]
    order, lines = split_files(files, {"val": 0.1}, hashes)
    assert sorted(order["test"]) == list(range(40, 50)) and len(order["val"]) == 4
    assert lines == ["1 picture in several classes or splits: ants/3 = test/ants/0. Keep each in one of them."]


def test_what_has_no_hash_is_in_no_split() -> None:
    files = listed(ants=10, bees=10)
    hashes = hashes_of(files)
    del hashes[4]
    order, _ = split_files(files, SHARES, hashes)
    assert sorted(number for part in order.values() for number in part) == [n for n in range(20) if n != 4]
