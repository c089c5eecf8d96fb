"""A folder of photographs, or a table of files, as a source of data: its splits, and what bad input gets."""

import copy
import csv
import os
import zlib
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import compose_run
from omegaconf import DictConfig
from PIL import Image

from thaw.data.folder import FolderData
from thaw.data.images import Images, Source
from thaw.data.pictures import LARGEST
from thaw.data.readers import ImageReader
from thaw.data.store import KNOWN
from thaw.run.config import build
from thaw.run.values import check_types

SIZE = 12  # pixels, as the pictures have
COLOURS = {"ant": (200, 30, 30), "bee": (30, 200, 30), "wasp": (30, 30, 200)}


@pytest.fixture(autouse=True)
def known() -> None:
    KNOWN.clear()


def put(folder: Path, *names: str) -> None:
    """Write pictures whose colour is that of the class in their name, and of which no two are equal."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        colour = next((colour for word, colour in COLOURS.items() if word in name), (90, 90, 90))
        pixels = np.full((12, 12, 3), colour, dtype=np.uint8)
        pixels[:3] = [ord(letter) for letter in name[-7:-4].rjust(3)]
        pixels[3] = zlib.crc32(name.encode()) % 251
        Image.fromarray(pixels).save(path)


def numbered(place: str, count: int) -> list[str]:
    return [f"{place}/{number:03}.png" for number in range(count)]


@cache
def shipped() -> DictConfig:
    return compose_run(Path("nowhere"), "data=folder").data


def data(folder: Path, **changes: Any) -> FolderData:
    """The data module that the shipped configuration builds."""
    cfg = copy.deepcopy(shipped())
    cfg.merge_with({"dir": str(folder), "cache_dir": str(folder.parent / "cache"), "image_size": SIZE, **changes})
    return build(cfg)


def read(folder: Path, **changes: Any) -> Source:
    return data(folder, **changes).load()


def sizes(source: Source) -> tuple[int, int, int]:
    return len(source.train.labels), len(source.val.labels), len(source.test.labels)


def check_colours(source: Source) -> None:
    """The label of each image is that of its colour."""
    for images, labels in (source.train, source.val, source.test):
        for image, label in zip(images, labels.tolist(), strict=True):
            word = next(word for word in COLOURS if word in source.classes[label])
            assert image[:, 6, 6].tolist() == list(COLOURS[word])


def test_a_folder_for_each_class(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "insects"
    put(folder, *numbered("ant", 20), *numbered("bee/more/and more", 20), *numbered("bee", 20))
    source = read(folder)
    assert source.classes == ["ant", "bee"] and source.shape == (3, SIZE, SIZE)
    assert sizes(source) == (42, 9, 9)
    assert source.title == f"insects, the folder {folder}"
    check_colours(source)
    assert "splits: test takes 15% of each class; val takes 15% of each class" in capsys.readouterr().out
    again = data(folder, seed=5).load()  # another seed, the same splits
    assert all(torch.equal(getattr(source, split).images, getattr(again, split).images) for split in ("val", "test"))


@pytest.mark.parametrize("word", ["val", "valid", "validation"])
def test_given_splits(tmp_path: Path, word: str, capsys: pytest.CaptureFixture[str]) -> None:
    for split, count in (("train", 10), (word, 3), ("test", 4)):
        put(tmp_path / "in", *numbered(f"{split}/ant", count), *numbered(f"{split}/bee", count))
    source = read(tmp_path / "in")
    assert sizes(source) == (20, 6, 8)
    check_colours(source)
    assert "splits: " not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "line", "expected"),
    [
        (["train"], "test takes 15% of each class in train; val takes 15% of each class in train", (28, 6, 6)),
        (["train", "test"], "val takes 15% of each class in train", (34, 6, 40)),
        (
            ["train", "val"],
            "val is the test split, as there is no test; val takes 15% of each class in train",
            (34, 6, 40),
        ),
    ],
)
def test_missing_splits_come_from_train(
    tmp_path: Path, given: list[str], line: str, expected: tuple, capsys: pytest.CaptureFixture[str]
) -> None:
    for split in given:
        put(tmp_path / "in", *numbered(f"{split}/ant", 20), *numbered(f"{split}/bee", 20))
    source = read(tmp_path / "in")
    assert sizes(source) == expected
    assert f"splits: {line}\n" in capsys.readouterr().out


def test_splits_are_views_of_one_tensor(tmp_path: Path) -> None:
    put(tmp_path / "in", *numbered("ant", 20), *numbered("bee", 20))
    source = read(tmp_path / "in")
    assert len({part.images.untyped_storage().data_ptr() for part in (source.train, source.val, source.test)}) == 1
    assert isinstance(source.train, Images) and source.train.images.is_contiguous()


def test_one_channel_and_another_size(tmp_path: Path) -> None:
    put(tmp_path / "in", *numbered("ant", 20), *numbered("bee", 20))
    assert read(tmp_path / "in", channels=1, image_size=9).shape == (1, 9, 9)


def test_classes_that_are_numbers_come_in_their_order(tmp_path: Path) -> None:
    put(tmp_path / "in", *(name for label in (0, 2, 10, 1) for name in numbered(str(label), 5)))
    assert read(tmp_path / "in").classes == ["0", "1", "2", "10"]


def test_a_users_picture_is_read_as_training_reads_it(tmp_path: Path) -> None:
    """Also a JPEG that is decoded at a part of its size."""
    folder = tmp_path / "in"
    put(folder, *numbered("train/ant", 10), *numbered("train/bee", 10), "test/bee/1.png")
    random = np.random.default_rng(0)
    Image.fromarray(random.integers(0, 256, (90, 110, 3), dtype=np.uint8)).save(folder / "test" / "bee" / "1.jpg")
    (folder / "test" / "bee" / "1.png").unlink()
    source = read(folder)
    [reading] = ImageReader("photo", source.shape).file((folder / "test" / "bee" / "1.jpg").read_bytes(), "it")
    assert reading.image is not None and np.array_equal(reading.image, source.test.images[0].numpy())


# A table


def write_table(path: Path, rows: list[dict[str, Any]]) -> str:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return str(path)


def rows_of(names: list[str], **more: Any) -> list[dict[str, Any]]:
    return [{"file": name, "label": "ant" if "ant" in name else "bee", **more} for name in names]


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_a_table(tmp_path: Path, kind: str) -> None:
    names = [*numbered("flat/ant, or", 20), *numbered("flat/bee", 20)]
    put(tmp_path / "in", *names, "flat/not in the table.png")
    rows = rows_of(names[:15] + names[20:35], split="train") + rows_of(names[15:20] + names[35:], split="test")
    if kind == "csv":
        table = write_table(tmp_path / "table.csv", rows)
    else:
        pyarrow = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pyarrow.Table.from_pylist(rows), table := str(tmp_path / "table.parquet"))
    source = read(tmp_path / "in", table=table)
    assert sizes(source) == (26, 4, 10)
    check_colours(source)


def test_a_table_without_splits_and_with_numbers_as_labels(tmp_path: Path) -> None:
    put(tmp_path / "in", *numbered("flat", 20))
    rows = [{"label": number % 2, "file": tmp_path / "in" / f"flat/{number:03}.png"} for number in range(20)]
    source = read(tmp_path / "in", table=write_table(tmp_path / "table.csv", rows))
    assert sizes(source) == (12, 4, 4) and source.classes == ["0", "1"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"name,label\nx.png,ant\n", "row 1 is {'name': 'x.png', 'label': 'ant'}; it must have a file"),
        (b"file,label\nx.png,ant\ny.png,\n", "row 2 is {'file': 'y.png', 'label': ''}; it must have"),
        (b"file,label,split\nx.png,ant,dev\n", "row 1 is {'file': .*, 'split': 'dev'}; .*train, val or test"),
        (b"file,label\n\xff\xfe.png,ant\n", "cannot be read .* give CSV in UTF-8, or parquet"),
        (b"", "holds no picture of a class"),
        (None, r"cannot be read \(No such file or directory\)"),
    ],
)
def test_tables_that_cannot_work(tmp_path: Path, content: bytes | None, message: str) -> None:
    put(tmp_path / "in", "x.png", "y.png")
    if content is not None:
        (tmp_path / "table.csv").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read(tmp_path / "in", table=str(tmp_path / "table.csv"))


def test_a_parquet_file_that_is_none(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    (tmp_path / "table.parquet").write_bytes(b"file,label\n")
    with pytest.raises(ValueError, match=r"cannot be read .* give CSV in UTF-8, or parquet"):
        read(tmp_path, table=str(tmp_path / "table.parquet"))


# Bad input


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.dir is missing: set it to a folder"):
        data(tmp_path, dir=None).load()
    with pytest.raises(OSError, match=r"nowhere cannot be read as a folder \(No such file or directory\)"):
        read(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"file cannot be read as a folder \(Not a directory\)"):
        read(tmp_path / "file")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "holds no picture of a class; a classifier needs two"),
        (["loose.png", "other.png"], "holds no picture of a class"),
        (numbered("ant", 9), "holds one class, ant; a classifier needs two classes. Each folder in data.dir"),
        ([*numbered("train/ant", 9)], "holds one class, ant"),
        (numbered("ant", 2) + numbered("bee", 2), "in has no picture for val and test. Add some"),
    ],
)
def test_too_few_pictures(tmp_path: Path, names: list[str], message: str) -> None:
    (tmp_path / "in").mkdir()
    put(tmp_path / "in", *names)
    with pytest.raises(ValueError, match=message):
        read(tmp_path / "in")


def test_a_folder_too_high(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put(tmp_path / "in", *numbered("insects/train/ant", 3), *numbered("insects/val/bee", 3))
    with pytest.raises(ValueError, match=r"in holds no folder train, but .*in/insects does: set data\.dir to that one"):
        read(tmp_path / "in")
    put(tmp_path / "two", *numbered("small/ant", 9), *numbered("large/bee", 9))
    assert read(tmp_path / "two").classes == ["large", "small"]
    said = f"the classes are the folders large, small of {tmp_path / 'two'}, though all pictures lie deeper"
    assert (
        f"{said}, in folders ant, bee; if those are the classes, set data.dir one folder deeper"
        in capsys.readouterr().out
    )
    put(tmp_path / "two", "small/1.png")
    read(tmp_path / "two")
    assert "deeper" not in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["pipe", "device", "too large"])
def test_files_that_never_end_are_not_read(kind: str, tmp_path: Path) -> None:
    put(tmp_path / "in", *numbered("ant", 9), *numbered("bee", 9))
    odd = tmp_path / "in" / "ant" / "odd.png"
    if kind == "pipe":
        os.mkfifo(odd)
    elif kind == "device":
        odd.symlink_to("/dev/zero")
    else:
        odd.touch()
        os.truncate(odd, LARGEST + 1)
    wanted = "has 100,000,001 bytes" if kind == "too large" else "is not a file of bytes on a disk"
    with pytest.raises(ValueError, match=rf"1 of 19 pictures cannot be read: \S*odd\.png {wanted}"):
        read(tmp_path / "in")


def test_a_class_with_one_picture_is_trained_on_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put(tmp_path / "in", *numbered("ant", 20), *numbered("bee", 20), "wasp/1.png")
    source = read(tmp_path / "in")
    assert source.train.labels.tolist().count(2) == 1
    printed = capsys.readouterr().out
    assert "1 of 3 classes have no val images and do not count in val/acc: wasp" in printed
    assert "1 of 3 classes have no test images and have no recall: wasp" in printed


def test_stray_files_are_passed_over_with_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "in"
    put(folder, *numbered("ant", 10), *numbered("bee", 10), "loose.png", ".hidden/ant.png", "ant/._000.png")
    for name in (".DS_Store", "ant/Thumbs.db", "bee/notes.txt", "bee/phone.heic"):
        (folder / name).write_bytes(b"other")
    assert sum(sizes(read(folder))) == 20
    names = ".DS_Store, .hidden/ant.png, ant/._000.png, ant/Thumbs.db, bee/notes.txt, bee/phone.heic, loose.png"
    assert f"passed over 7 files in {folder}, not a picture in a class: {names}\n" in capsys.readouterr().out


def test_folders_beside_the_splits_are_passed_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put(tmp_path / "in", *numbered("train/ant", 10), *numbered("train/bee", 10), "extra/ant/1.png", "train/2.png")
    assert sum(sizes(read(tmp_path / "in"))) == 20
    assert "not a picture in a class: extra/ant/1.png, train/2.png\n" in capsys.readouterr().out


def test_names_with_spaces_and_letters_of_any_language(tmp_path: Path) -> None:
    folder = tmp_path / "meine Fotos 写真"
    put(folder, *numbered("ant Ärger é", 9), *numbered("bee 蜂", 9), "bee 蜂/ein Bild.PNG")
    source = read(folder)
    assert (
        source.classes == ["ant Ärger é", "bee 蜂"] and source.name == "meine Fotos 写真" and sum(sizes(source)) == 19
    )
    check_colours(source)


def test_links(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A link to a class is followed, one that leads in a circle is not, one that leads nowhere cannot be read."""
    folder = tmp_path / "in"
    put(folder, *numbered("ant", 10))
    put(tmp_path / "elsewhere", *numbered("bee", 10))
    (folder / "bee").symlink_to(tmp_path / "elsewhere" / "bee")
    (folder / "ant" / "up").symlink_to(folder)
    (folder / "ant" / "itself").symlink_to("itself")
    source = read(folder)
    assert source.classes == ["ant", "bee"] and sum(sizes(source)) == 20
    assert "ant/itself, ant/up (a link in a circle)" in capsys.readouterr().out
    (folder / "ant" / "gone.png").symlink_to("nowhere.png")
    with pytest.raises(
        ValueError, match=r"1 of 21 pictures cannot be read: ant/gone.png cannot be read \(No such file"
    ):
        read(folder)
    assert sum(sizes(read(folder, skip_unreadable=True))) == 20


def test_a_split_may_be_a_link_and_links_to_each_other_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "in"
    for split in ("train", "test"):
        put(folder, *numbered(f"{split}/ant", 10), *numbered(f"{split}/bee", 10))
    (folder / "val").symlink_to("test")
    (folder / "train" / "ant" / "bees").symlink_to(folder / "train" / "bee")
    (folder / "train" / "bee" / "ants").symlink_to(folder / "train" / "ant")
    assert sizes(read(folder)) == (40, 20, 20)
    assert "train/ant/bees/ants (a link in a circle), train/bee/ants/bees (a link in" in capsys.readouterr().out


def test_the_same_picture_in_two_classes_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "in"
    put(folder, *numbered("ant", 10), *numbered("bee", 10))
    (folder / "bee" / "copy.png").write_bytes((folder / "ant" / "003.png").read_bytes())
    source = read(folder)
    assert (
        "1 picture in several classes or splits: ant/003.png = bee/copy.png. Keep each in one of them." in caplog.text
    )
    pictures = [{image.numpy().tobytes() for image in part.images} for part in (source.train, source.val, source.test)]
    assert not pictures[0] & pictures[1] and not pictures[0] & pictures[2] and not pictures[1] & pictures[2]


def test_odd_pictures_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "in"
    put(folder, *numbered("ant", 10), *numbered("bee", 10))
    Image.new("RGB", (30_000, 10)).save(folder / "ant" / "long.png")
    Image.new("RGB", (1, 1)).save(folder / "ant" / "dot.png")
    assert sum(sizes(read(folder))) == 22
    assert "ant/long.png: its middle square is less than a tenth of it" in caplog.text
    assert "ant/dot.png: its short side has less than 8 pixels" in caplog.text
    Image.new("1", (8_000, 7_000)).save(folder / "ant" / "bomb.png")  # 7 kB
    with pytest.raises(ValueError, match=r"1 of 23 .*: ant/bomb.png claims 56,000,000 pixels, more than 50,000,000"):
        read(folder)
    assert sum(sizes(read(folder, skip_unreadable=True))) == 22
    assert "left out 1 picture that cannot be read: ant/bomb.png claims" in caplog.text


def test_a_changed_file_is_decoded_again(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    put(folder, *numbered("ant", 10), *numbered("bee", 10))
    first = read(folder)
    put(folder, "ant/900.png")
    (folder / "ant/900.png").replace(folder / "ant/003.png")
    os.utime(folder / "ant/003.png", ns=(0, 1))
    second = read(folder)
    assert sizes(second) == sizes(first)
    everything = [torch.cat([source.train.images, source.val.images, source.test.images]) for source in (first, second)]
    assert [(images[:, 0, 0, 0] == ord("9")).sum() for images in everything] == [0, 1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"channels": 4}, "data.channels=4 must be 1 or 3"),
        ({"channels": 2}, "data.channels=2 must be 1 or 3"),
        ({"val_share": 0.0}, "data.val_share=0.0 must be a number above 0 and below 1"),
        ({"val_share": 0.5, "test_share": 0.5}, "data.val_share=0.5 and data.test_share=0.5 leave nothing to train on"),
        ({"max_gb": 1e-6}, "22 images of 3 x 12 x 12 take 9.5e-06 GB, more than data.max_gb=1e-06"),
    ],
)
def test_settings_that_cannot_work(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    put(tmp_path / "in", *numbered("ant", 10), *numbered("bee", 12))
    cfg = copy.deepcopy(shipped())
    cfg.merge_with(changes)
    with pytest.raises(ValueError, match=message):
        check_types(cfg, "data.")
        read(tmp_path / "in", **changes)
