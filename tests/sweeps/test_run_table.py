import csv
import re
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from pages.texts import unreadable
from sweeps.test_runs import make_run

from thaw.sweeps.curves import (
    epoch_curve,
    epoch_lines,
    save_epochs,
    save_settings,
    save_swept,
    swept_curves,
    swept_keys,
)
from thaw.sweeps.groups import group_runs
from thaw.sweeps.run_table import write_run_table
from thaw.sweeps.runs import find_runs, read_run

ROOT = Path(__file__).parents[2]
EVIL = "<script>alert('x')</script> & \"q\" | *b*"


class Page(HTMLParser):
    """Text by tag, the attributes of all tags, and whether every tag was closed in its order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: list[tuple[str, str]] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.texts.append((self.open[-1], data))

    def of(self, tag: str) -> list[str]:
        return [text for own, text in self.texts if own == tag]


def test_csv_reads_back_as_the_records(policies: Path, tmp_path: Path) -> None:
    make_run(policies / "odd", 'name="a, b"', 0.123456789012345, params=5, optim__lr=9, name='n"\nx')
    report = write_run_table([policies], tmp_path / "out")
    with (tmp_path / "out" / "report.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    fields = {
        **{"name": "name", "state": "state", "val/acc": "val_acc", "test/acc": "test_acc", "test/acc_low": "test_low"},
        **{"trainable_params": "trainable_params", "seconds": "seconds", "seed": "seed", "folder": "folder"},
        **{"epochs": "epochs", "reason": "reason"},
    }
    assert len(rows) == len(report.runs) == 19
    assert 'n"\nx' in {row["name"] for row in rows}
    for row, run in zip(rows, report.runs, strict=True):
        for name, field in fields.items():
            value = getattr(run, field)
            assert row[name] == ("" if value is None else str(value))
            if isinstance(value, float):
                assert float(row[name]) == value
    assert [row["rank"] for row in rows[:4]] == ["1", "1", "1", "2"]
    assert rows[0]["setting"].endswith("freeze=lora optim.lr=0.1")


def test_markdown_has_a_row_for_each_setting(policies: Path, tmp_path: Path) -> None:
    make_run(policies / "evil", status="failed", name="a|b", optim__lr=7)
    write_run_table([policies], tmp_path / "out")
    text = (tmp_path / "out" / "report.md").read_text()
    rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in text.splitlines() if line.startswith("|")]
    assert {len(row) for row in rows[:7]} == {9} and {len(row) for row in rows[7:]} == {3}
    assert [cell.strip() for cell in rows[2]][:6] == ["**best**", "probe", "lora", "0.1", "93.50% ± 1.00", "3"]
    assert "a\\|b" in text
    for picture in re.findall(r"!\[.*\]\(<(.*)>\)", text):
        assert (tmp_path / "out" / picture).read_bytes().startswith(b"\x89PNG")


def test_html_holds_everything_and_escapes_it(policies: Path, tmp_path: Path) -> None:
    run = make_run(policies / "evil", f"x={EVIL}", status="failed", name=EVIL, optim__lr=7)
    failure = (run / "failure.json").read_text().replace("Traceback: <boom>", "</pre><b>boom</b>")
    (run / "failure.json").write_text(failure)
    (policies / "lora0.1_1" / "summary.json").write_text("{<broken>")
    picture = tmp_path / "more.png"
    picture.write_bytes(b"\x89PNG...")
    write_run_table([policies], tmp_path / "out", [("<More>", picture)])
    html = (tmp_path / "out" / "report.html").read_text()
    page = Page(html)
    assert len(page.of("script")) == len(page.of("style")) == 1
    assert "alert" not in page.of("script")[0]
    assert any(EVIL in text for text in page.of("summary"))
    assert "</pre><b>boom</b>" in page.of("pre")
    assert page.of("h2").count("<More>") == 1
    sources = [value for tag, name, value in page.attributes if tag == "img" and name == "src"]
    assert len(sources) == 4 and all(source.startswith("data:image/png;base64,") for source in sources)
    assert not [name for _, name, _ in page.attributes if name in ("href", "srcset", "onclick", "onload")]
    assert not re.search(r"https?:|//|@import|url\(", re.sub(r"base64,[^\"]*", "", html))
    assert any("lora0.1_1/summary.json cannot be read" in text for text in page.of("li"))
    keys = [value for tag, name, value in page.attributes if tag == "td" and name == "data-key"]
    assert keys[2:4] == ["0.1", "0.935"]  # of the best setting, for sorting: its seeds 0 and 2


def test_curves_over_the_learning_rate(policies: Path) -> None:
    groups = group_runs([read_run(folder, []) for folder in find_runs([policies])])
    assert swept_keys(groups) == ["optim.lr"]
    lora, full = swept_curves(groups, "optim.lr")
    assert (lora.label, full.label) == ("freeze=lora", "freeze=full")
    assert [(point.x, point.seeds) for point in lora.points] == [(0.001, 3), (0.01, 3), (0.1, 3)]
    assert [point.mean for point in lora.points] == pytest.approx([0.895, 0.915, 0.935])
    assert (lora.points[0].low, lora.points[0].high) == pytest.approx((0.885, 0.905))
    assert [point.x for point in full.points] == [0.001, 0.01] and full.lost == [0.1]
    assert lora.joined and full.joined and lora.lost == []


def test_other_swept_numbers_have_curves(tmp_path: Path) -> None:
    for place, (lr, size) in enumerate([(0.1, 32), (0.1, 64), (0.2, 32), (0.2, 64)]):
        overrides = f"optim.lr={lr} data.batch_size={size}"
        make_run(tmp_path / str(place), overrides, 0.9 + place / 100, optim__lr=lr, data__batch_size=size)
    make_run(tmp_path / "other", "", 0.5, name="other", optim__weight_decay=3.0)  # another experiment, nothing swept
    groups = group_runs([read_run(folder, []) for folder in find_runs([tmp_path])])
    assert swept_keys(groups) == ["optim.lr", "data.batch_size"]
    curves = swept_curves(groups, "data.batch_size")
    assert [(curve.label, [point.x for point in curve.points]) for curve in curves] == [
        ("probe optim.lr=0.2", [32, 64]),
        ("probe optim.lr=0.1", [32, 64]),
        ("other", [64]),
    ]
    assert [curve.joined for curve in curves] == [True, True, False]


def test_a_random_search_is_points_and_not_a_line_for_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for place in range(6):
        lr, decay = 0.1 * 1.7**place, 0.01 * (place * 7 % 6)
        make_run(tmp_path / str(place), f"optim.lr={lr}", 0.9, optim__lr=lr, optim__weight_decay=decay)
    groups = group_runs([read_run(folder, []) for folder in find_runs([tmp_path])])
    assert swept_keys(groups) == ["optim.lr", "optim.weight_decay"]
    (curve,) = swept_curves(groups, "optim.lr")
    assert (curve.label, len(curve.points), curve.joined) == ("probe", 6, False)
    drawn = []
    monkeypatch.setattr("thaw.sweeps.curves.save_figure", lambda figure, path: drawn.append(figure))
    for joined in (False, True):
        save_swept([replace(curve, joined=joined)], "optim.lr", tmp_path / "curve.png")
    assert ["-" in [line.get_linestyle() for line in figure.axes[0].lines] for figure in drawn] == [False, True]


def test_a_single_learning_rate_has_no_curve(tmp_path: Path) -> None:
    make_run(tmp_path / "runs" / "0", val=0.9)
    make_run(tmp_path / "runs" / "1", val=0.9, seed=1)
    write_run_table([tmp_path / "runs"], tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["report.csv", "report.html", "report.md"]


def test_one_learning_rate_that_came_to_its_end_is_no_curve(tmp_path: Path) -> None:
    make_run(tmp_path / "runs" / "0", "optim.lr=0.1", 0.9)
    make_run(tmp_path / "runs" / "1", "optim.lr=9.0", status="failed", optim__lr=9.0)
    write_run_table([tmp_path / "runs"], tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.png"))


def test_validation_over_the_epochs_leaves_out_the_last_look_at_the_best(policies: Path) -> None:
    run = read_run(policies / "lora0.1_0", [])
    assert epoch_curve(run) == [(1.0, 0.5), (1.5, 0.75), (2.0, 0.8)]
    assert epoch_curve(read_run(policies / "full0.1_0", []))[-1] == (3.0, 0.8)  # nothing of it says that it ended
    (policies / "lora0.1_0" / "csv" / "metrics.csv").write_text("epoch,val/acc\n0,abc\n")
    assert epoch_curve(run) == []


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures, in place of their files."""
    figures: list[Figure] = []
    monkeypatch.setattr("thaw.sweeps.curves.save_figure", lambda figure, path: figures.append(figure))
    return figures


def log_epochs(run: Path, *accuracies: float) -> None:
    rows = [f"{epoch},{accuracy}\n" for epoch, accuracy in enumerate(accuracies)]
    (run / "csv").mkdir()
    (run / "csv" / "metrics.csv").write_text("epoch,val/acc\n" + "".join(rows))


def test_settings_have_a_named_line_each_and_many_are_grey(tmp_path: Path, drawn: list[Figure]) -> None:
    for place in range(13):
        for seed in range(2):
            name = f"policy{place:02}"
            run = make_run(tmp_path / f"{place}_{seed}", f"name={name}", 0.9 + place / 1000, name=name, seed=seed)
            log_epochs(run, 0.5, 0.9 + place / 1000 + seed / 50)
    runs = [read_run(folder, []) for folder in find_runs([tmp_path])]
    twelve, all_of_them = group_runs(runs[2:]), group_runs(runs)
    assert [accuracies for _, accuracies in epoch_lines(twelve)[0].points] == [
        [0.5, 0.5],
        pytest.approx([0.912, 0.932]),
    ]
    assert save_epochs(twelve, tmp_path / "epochs.png") and save_epochs(all_of_them, tmp_path / "epochs.png")
    few, many = (figure.axes[0] for figure in drawn)
    assert {text.get_text() for text in few.texts} == {f"policy{place:02}" for place in range(1, 13)}
    assert len({line.get_color() for line in few.lines}) == 12
    assert [line.get_linewidth() for line in few.lines] == [2.6] + 11 * [1.4], "the best is thick"
    assert [text.get_text() for text in many.texts] == ["policy12"] and "grey: other settings" in many.get_title("left")
    assert len({line.get_color() for line in many.lines}) == 2
    for figure in drawn:
        assert not unreadable(figure)


def test_every_policy_has_a_row_with_its_seeds(tmp_path: Path, drawn: list[Figure]) -> None:
    for place, policy in enumerate(["full", "lora", "norm_only"]):
        for seed in range(3):
            name = f"{policy}_{seed}"
            make_run(tmp_path / name, f"freeze={policy}", 0.9 + place / 100 + seed / 1000, freeze=policy, seed=seed)
    groups = group_runs([read_run(folder, []) for folder in find_runs([tmp_path])])
    assert save_settings(groups, tmp_path / "settings.png")
    axes = drawn[0].axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == [group.label for group in groups]
    seeds, mean = axes.lines[:2]
    assert (sorted(seeds.get_xdata()), mean.get_xdata()[0]) == (
        pytest.approx([0.92, 0.921, 0.922]),
        pytest.approx(0.921),
    )
    assert axes.get_ylim()[0] > axes.get_ylim()[1], "the best above"
    assert not unreadable(drawn[0])


def test_settings_of_numbers_alone_have_a_curve_and_no_rows(tmp_path: Path, drawn: list[Figure]) -> None:
    for lr in (0.1, 0.2):
        make_run(tmp_path / str(lr), f"optim.lr={lr}", 0.9, optim__lr=lr)
    assert not save_settings(group_runs([read_run(folder, []) for folder in find_runs([tmp_path])]), tmp_path / "x.png")


def test_one_epoch_is_no_curve(tmp_path: Path, drawn: list[Figure]) -> None:
    for place in range(2):
        log_epochs(make_run(tmp_path / str(place), f"optim.lr={place}", 0.9, optim__lr=place), 0.9)
    assert not save_epochs(group_runs([read_run(tmp_path / str(place), []) for place in range(2)]), tmp_path / "x.png")
    assert not drawn


@pytest.mark.parametrize("objectives", [["val/acc"], ["val/acc", "trainable_params"]])
def test_rings_are_where_the_table_has_its_marks(tmp_path: Path, drawn: list[Figure], objectives: list[str]) -> None:
    """Of equal settings one is the best; a search for two objectives has its Pareto front."""
    for lr, accuracy, params in [(0.1, 0.9, 20), (0.2, 0.9, 10), (0.3, 0.9, 10), (0.4, 0.8, 5), (0.5, 0.7, 9)]:
        make_run(tmp_path / str(lr), f"optim.lr={lr}", accuracy, params=params, optim__lr=lr)
    groups = group_runs([read_run(folder, []) for folder in find_runs([tmp_path])], objectives)
    save_swept(swept_curves(groups, "optim.lr"), "optim.lr", tmp_path / "curve.png")
    rings = [line for line in drawn[0].axes[0].lines if line.get_markersize() == 13]
    marked = [group.runs[0].settings["optim.lr"] for group in groups if group.mark]
    assert sorted(x for line in rings for x in line.get_xdata()) == sorted(marked)
    assert marked == ([0.2] if len(objectives) == 1 else [0.2, 0.3, 0.4])


def test_nothing_done_is_a_report_all_the_same(tmp_path: Path) -> None:
    make_run(tmp_path / "runs" / "0", status="killed")
    report = write_run_table([tmp_path / "runs"], tmp_path / "out")
    assert [group.mark for group in report.groups] == [""]
    text = (tmp_path / "out" / "report.md").read_text()
    assert "| killed | probe seed=0 | killed for a reason |" in text and "best" not in text
    Page((tmp_path / "out" / "report.html").read_text())


def test_the_script_needs_neither_torch_nor_hydra(policies: Path) -> None:
    code = (
        "import runpy, sys; sys.argv[1:] = [sys.argv[1]]; runpy.run_path('report.py', run_name='__main__'); "
        "heavy = {'torch', 'lightning', 'wandb', 'hydra', 'pandas'} & set(sys.modules); assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code, str(policies)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "best  lora" in done.stdout
    assert {"report.html", "report.md", "report.csv", "report_optim_lr.png", "report_epochs.png"} <= {
        path.name for path in policies.iterdir()
    }
