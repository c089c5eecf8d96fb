"""predict.py: from files of any kind to CSV or JSON lines, whole or not at all."""

import csv
import io
import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import compose_config
from PIL import Image, ImageOps
from rich.console import Console

import predict
from thaw.data.idx import write_idx
from thaw.data.mnist import load_mnist
from thaw.data.readers import ImageReader, Reading
from thaw.predict.prediction import (
    COLUMNS,
    LAST_COLUMNS,
    Read,
    RowWriter,
    find_files,
    open_output,
    predictions,
    read_file,
)
from thaw.predict.predictor import load_predictor


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Thirty digits, named by their class, half of them inverted; an IDX file, and two pictures without a digit."""
    folder = tmp_path / "digits"
    (folder / "below").mkdir(parents=True)
    test = load_mnist("MNIST", "nowhere", "sample", None).test
    for number in range(30):
        image = Image.fromarray(test.images[16 * number, 0].numpy()).resize((150, 150))
        image = ImageOps.invert(image) if number % 2 else image
        image.save(folder / f"{number:02d}_{int(test.labels[16 * number])}.{'png' if number % 3 else 'jpg'}")
    (folder / "below" / "three.idx").write_bytes(write_idx(test.images[:3, 0]))
    (folder / "broken.png").write_bytes(b"no picture")
    (folder / "notes.txt").write_text("not asked for")
    Image.new("RGB", (40, 40), "red").save(folder / "empty.png")
    return folder


def test_csv_of_a_folder(
    linear_probe: Path, folder: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("thaw.run.console.LINE_SECONDS", 0)
    with pytest.raises(ValueError, match="2 of 35 rows have no prediction"):
        predict.main(compose_config("predict", f"ckpt={linear_probe}", f"inputs=['{folder}']"))
    printed = capsys.readouterr()
    assert re.search(r"^predicting: 1 of 33 files, about \d+ s left$", printed.err, re.MULTILINE)
    rows = list(csv.DictReader(io.StringIO(printed.out)))
    assert len(rows) == 30 + 3 + 2
    digits = [row for row in rows if "_" in Path(row["file"]).stem]
    right = sum(row["class"] == Path(row["file"]).stem[-1] for row in digits)
    assert right >= 28
    for row in digits:
        chances = {c: float(row[f"p({c})"]) for c in "0123456789"}
        assert sum(chances.values()) == pytest.approx(1, abs=1e-4)
        assert float(row["confidence"]) == max(chances.values()) == chances[row["class"]]
    assert [row["index"] for row in rows if row["file"].endswith("three.idx")] == ["0", "1", "2"]
    errors = {Path(row["file"]).name: row["error"] for row in rows if row["error"]}
    assert "is not a PNG" in errors["broken.png"]
    assert "no digit" in errors["empty.png"]


@pytest.mark.parametrize("output", ["null", "rows.csv"])
def test_a_bar_only_where_no_rows_are_seen(
    linear_probe: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, output: str
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    terminal = Console(file=io.StringIO(), force_terminal=True, width=80)
    monkeypatch.setattr("thaw.run.console.console", lambda stderr=False: terminal)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.chdir(tmp_path)
    idx = folder / "below" / "three.idx"
    predict.main(compose_config("predict", f"ckpt={linear_probe}", f"inputs=['{idx}']", f"output={output}"))
    assert ("predicting" in terminal.file.getvalue()) == (output == "rows.csv")  # type: ignore[attr-defined]


def test_json_lines_in_a_file(linear_probe: Path, folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "new" / "answers.jsonl"
    idx = folder / "below" / "three.idx"
    predict.main(
        compose_config("predict", f"ckpt={linear_probe}", f"inputs=['{idx}','{idx.parent}']", f"output={output}")
    )
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["index"] for row in rows] == [0, 1, 2], "a file that is named twice is read once"
    images = load_mnist("MNIST", "nowhere", "sample", None).test.images[:3]
    expected = load_predictor(str(linear_probe))(images)
    torch.testing.assert_close(torch.tensor([row["probabilities"] for row in rows]), expected, rtol=0, atol=1e-6)
    assert [int(row["class"]) for row in rows] == expected.argmax(dim=1).tolist()


def test_one_bad_image_is_one_row(linear_probe: Path, tmp_path: Path) -> None:
    """A blank image in an IDX file costs its row alone, and file names of any encoding are written."""
    images = load_mnist("MNIST", "nowhere", "sample", None).test.images[:4].clone()
    images[2] = 0
    (tmp_path / "four-ubyte").write_bytes(write_idx(images[:, 0]))
    names = {os.fsdecode(b"latin1-\xe4.png"): "latin1-\\xe4.png", "ümlaut-数.png": "ümlaut-数.png"}
    for name in names:
        Image.fromarray(images[0, 0].numpy()).save(tmp_path / name)
    two = np.concatenate([images[0, 0].numpy(), images[1, 0].numpy()], axis=1)
    Image.fromarray(two).save(tmp_path / "two.png")
    for output in (tmp_path / "out" / "answers.csv", tmp_path / "out" / "answers.jsonl"):
        with pytest.raises(ValueError, match="1 of 7 rows have no prediction"):
            predict.main(
                compose_config("predict", f"ckpt={linear_probe}", f"inputs=['{tmp_path}']", f"output={output}")
            )
        text = output.read_text(encoding="utf-8")
        rows = (
            list(csv.DictReader(text.splitlines()))
            if output.suffix == ".csv"
            else list(map(json.loads, text.splitlines()))
        )
        output.unlink()
        four = [row for row in rows if row["file"].endswith("four-ubyte")]
        assert [bool(row["class"]) for row in four] == [True, True, False, True]
        assert "image 2, shows no digit" in four[2]["error"]
        assert {Path(row["file"]).name for row in rows} == {"four-ubyte", "two.png", *names.values()}
        warnings = {Path(row["file"]).name: row["warning"] for row in rows if row["warning"]}
        assert list(warnings) == ["two.png"]
        assert "more than one digit" in warnings["two.png"]


def test_standard_output_of_another_encoding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (tmp_path / "out").open("w", encoding="cp1252") as console:
        monkeypatch.setattr(sys, "stdout", console)
        with open_output(None, "csv") as (file, format):
            RowWriter(file, format, ["0"]).write(
                dict.fromkeys((*COLUMNS, "probabilities", *LAST_COLUMNS), None) | {"file": "ü数"}
            )
    assert (tmp_path / "out").read_text(encoding="cp1252").splitlines()[1].startswith("ü\\u6570,")


def test_probabilities_that_are_not_finite_are_an_error() -> None:
    readings = [Read("x", place, Reading(np.zeros((1, 28, 28), np.uint8))) for place in range(3)]

    def model(images: torch.Tensor) -> torch.Tensor:
        return torch.tensor([[0.9, 0.1], [float("nan")] * 2, [float("inf"), 0.0]])

    rows = list(predictions(model, readings, ["a", "b"]))  # type: ignore[arg-type]
    assert [row["class"] for row in rows] == ["a", None, None]
    assert all("not finite" in row["error"] for row in rows[1:])


def test_what_is_taken_from_a_folder_and_what_is_left_out(tmp_path: Path) -> None:
    """Pictures that cannot be read get a row; hidden files are counted, others named."""
    (tmp_path / ".git").mkdir()
    for name in ("a.heic", "b.JFIF", "c.svg", "._c.png", ".DS_Store", ".git/d.png", "notes.txt", "labels.csv"):
        (tmp_path / name).write_bytes(b"x")
    for name, format in (("no suffix", "PNG"), ("e.bmp", "BMP"), ("f.webp", "WEBP")):
        Image.new("L", (9, 9)).save(tmp_path / name, format)
    files, left_out = find_files([str(tmp_path)])
    assert {file.name for file in files} == {"a.heic", "b.JFIF", "c.svg", "no suffix", "e.bmp", "f.webp"}
    assert left_out == [f"files of {tmp_path} left out: 3 hidden and 2 that are not pictures (labels.csv, notes.txt)"]
    [read] = read_file(tmp_path / "a.heic", ImageReader("digit", (1, 28, 28)))
    assert "a.heic is not a PNG" in read.reading.error


def test_an_interrupted_output_leaves_the_old_one(tmp_path: Path) -> None:
    output = tmp_path / "answers.csv"
    output.write_text("before")
    with pytest.raises(KeyboardInterrupt), open_output(str(output), "csv") as (file, _):
        file.write("half")
        raise KeyboardInterrupt
    assert output.read_text() == "before"
    assert list(tmp_path.iterdir()) == [output]


@pytest.mark.parametrize("output", ["answers.txt", "answers", "answers.json"])
def test_unknown_formats(output: str) -> None:
    with pytest.raises(ValueError, match="choose csv or jsonl"), open_output(output, "csv"):
        pass


def test_nothing_to_read(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ValueError, match=r"holds no picture.* 1 that are not pictures \(notes\.txt\)"):
        find_files([str(tmp_path)])
    with pytest.raises(ValueError, match="is neither a file nor a folder"):
        find_files(["x" * 300])
    with pytest.raises(ValueError, match=r"'missing\.png' is neither"):
        find_files(["missing.png"])
    with pytest.raises(ValueError, match="Nothing to predict"):
        find_files([])


@pytest.fixture
def command_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[str]]:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a=b.png").touch()
    words = ["predict.py", "ckpt=last", "x.png", "a=b.png", "~data", "--cfg", "job", "trainer.precision=32-true"]
    monkeypatch.setattr(sys, "argv", words)
    yield words


def test_a_long_setting_is_no_name(command_line: list[str]) -> None:
    command_line.append(f"inputs=[{','.join(['folder/picture.png'] * 20)}]")
    assert predict.take_inputs(command_line) == ["x.png", "a=b.png"]
    assert command_line[-1].startswith("inputs=[")


def test_inputs_stand_among_settings(command_line: list[str]) -> None:
    assert predict.take_inputs(command_line) == ["x.png", "a=b.png"]
    assert command_line == ["predict.py", "ckpt=last", "~data", "--cfg", "job", "trainer.precision=32-true"]


def test_photographs_get_the_accuracy_of_the_test(
    train: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Pictures of differing sizes, formats and orientations in a folder of classes with odd names."""
    names, random = ["black, & white", 'a "b" <i>', "üñ"], np.random.default_rng(0)
    for split, count in (("train", 12), ("val", 3), ("test", 10)):
        for label, name in enumerate(names):
            for number in range(count):
                height, width = random.integers(30, 200, 2)
                colour = np.eye(3)[label] * 60 + 90
                pixels = np.clip(random.normal(colour, 70, (height, width, 3)), 0, 255).astype(np.uint8)
                path = tmp_path / "my pictures" / split / name / f"{number}.{'jpg' if number % 2 else 'png'}"
                path.parent.mkdir(parents=True, exist_ok=True)
                turned = Image.Exif()
                turned[0x0112] = 1 + number % 8
                Image.fromarray(pixels).resize((int(width), int(height))).save(path, exif=turned)
    folder = tmp_path / "my pictures"
    small = ["experiment=baseline/convnet", "backbone.widths=[4,8]", "backbone.channels=3", "backbone.image_size=16"]
    few = ["trainer.max_epochs=2", "data.batch_size=12", "augment=none", "logger=none"]
    run = train("data=folder", f"data.dir='{folder}'", *small, *few)
    tested = json.loads((run / "summary.json").read_text())
    assert tested["n_test"] == 30 and 0.3 < tested["test/acc"] < 1, "some are wrong"
    capsys.readouterr()
    predict.main(compose_config("predict", f"ckpt={run}", f"inputs=['{folder / 'test'}']"))
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert list(rows[0])[4:-2] == [f"p({name})" for name in sorted(names)]
    assert np.mean([row["class"] == Path(row["file"]).parent.name for row in rows]) == pytest.approx(tested["test/acc"])
    with pytest.raises(ValueError, match=r"reader=digit makes no images of the shape \(3, 16, 16\)"):
        predict.main(compose_config("predict", f"ckpt={run}", f"inputs=['{folder}']", "reader=digit"))
