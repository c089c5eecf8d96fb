"""predict.py: from files of any kind to CSV or JSON lines, whole or not at all."""

import csv
import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import compose_config
from PIL import Image, ImageOps

import predict
from thaw.data import sources
from thaw.data.idx import write_idx
from thaw.prediction import find_files, open_output
from thaw.predictor import load_predictor


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Thirty digits, their class in the file name, half of them inverted; an IDX file, and two that are no digits."""
    folder = tmp_path / "digits"
    (folder / "below").mkdir(parents=True)
    test = sources.load("MNIST", "nowhere", "sample", None).test
    for number in range(30):
        image = Image.fromarray(test.images[16 * number].numpy()).resize((150, 150))
        image = ImageOps.invert(image) if number % 2 else image
        image.save(folder / f"{number:02d}_{int(test.labels[16 * number])}.{'png' if number % 3 else 'jpg'}")
    (folder / "below" / "three.idx").write_bytes(write_idx(test.images[:3]))
    (folder / "broken.png").write_bytes(b"no picture")
    (folder / "notes.txt").write_text("not asked for")
    Image.new("RGB", (40, 40), "red").save(folder / "empty.png")
    return folder


def test_csv_of_a_folder(linear_probe: Path, folder: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(ValueError, match="2 of 33 files could not be read"):
        predict.main(compose_config("predict", f"ckpt={linear_probe}", f"inputs=['{folder}']"))
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
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
    assert "neither a PNG" in errors["broken.png"]
    assert "no digit" in errors["empty.png"]


def test_json_lines_in_a_file(linear_probe: Path, folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "new" / "answers.jsonl"
    idx = folder / "below" / "three.idx"
    predict.main(
        compose_config("predict", f"ckpt={linear_probe}", f"inputs=['{idx}','{idx.parent}']", f"output={output}")
    )
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["index"] for row in rows] == [0, 1, 2], "a file that is named twice is read once"
    images = sources.load("MNIST", "nowhere", "sample", None).test.images[:3]
    expected = load_predictor(str(linear_probe))(images)
    torch.testing.assert_close(torch.tensor([row["probabilities"] for row in rows]), expected, rtol=0, atol=1e-6)
    assert [int(row["class"]) for row in rows] == expected.argmax(dim=1).tolist()


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
    with pytest.raises(ValueError, match=r"holds no file that ends in \.png"):
        find_files([str(tmp_path)])
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


def test_inputs_stand_among_settings(command_line: list[str]) -> None:
    assert predict.take_inputs(command_line) == ["x.png", "a=b.png"]
    assert command_line == ["predict.py", "ckpt=last", "~data", "--cfg", "job", "trainer.precision=32-true"]
