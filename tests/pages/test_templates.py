"""Pages of results in a browser as narrow as a phone, in light and in dark."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from sweeps.test_runs import make_run

from thaw.data.images import Images
from thaw.evaluation.assessment import Assessment
from thaw.evaluation.assessment_files import write_assessments
from thaw.evaluation.metrics import accuracy_facts
from thaw.evaluation.robustness import SETS
from thaw.pages.figures import new_figure, save_figure

PUBLISHED = SETS["cifar10_c"].published
LONG = "a_rather/long-path/" * 12
CUT_OFF = """() => [...document.querySelectorAll("h1, h2, p, td, th, li, summary, img, pre")].filter(element => {
  const box = element.getBoundingClientRect(), scrolls = element.closest(".scroll, figure, pre");
  const cut = element.clientWidth && element.scrollWidth > element.clientWidth + 1;
  return !scrolls && (box.left < 0 || box.right > innerWidth || cut);
}).map(element => element.outerHTML.slice(0, 200))"""


def sweep_page(folder: Path) -> Path:
    for place in range(3):
        overrides = f"optim.lr=0.{place + 1} backbone.weights=/{LONG}{place} data.source=sample"
        make_run(folder / "runs" / str(place), overrides, 0.9, test=0.9, optim__lr=place + 1)
    make_run(folder / "runs" / "lost", f"data.dir={LONG}", status="failed", optim__lr=9)
    pytest.importorskip("thaw.sweeps.run_table").write_run_table([folder / "runs"], folder)
    return folder / "report.html"


def class_row(number: int) -> dict[str, Any]:
    """Class 1 is absent, and the last ones have the lowest recall."""
    recall, n = (None, 0) if number == 1 else (0.9 - number / 1000, 2)
    return {"class": LONG if number == 0 else f"class {number}", "precision": 0.5, "recall": recall, "n": n}


def evaluation_page(folder: Path, classes: int = 2) -> Path:
    """Of two models that know nothing."""
    test = Images(torch.zeros(4, 1, 28, 28, dtype=torch.uint8), torch.tensor([0, 1, 0, 1]))
    logits = torch.eye(2)[[0, 1, 1, 1]]
    save_figure(new_figure(10, 4), folder / "picture.png")
    facts = {
        **{
            "name": "probe",
            "overrides": f"backbone.weights={LONG}",
            "backbone": "digits_vit",
            "checkpoint": f"/{LONG}best.ckpt",
        },
        **{"dataset": "MNIST", "data_source": "a sample", "weights_sha256": "a" * 64},
        **accuracy_facts(logits.argmax(dim=1), test.labels),
        **{"git_commit": "b" * 40, "backbone": "digits_vit"},
        **{"val/acc": 0.5, "test/top5": 0.9, "test/balanced_acc": 0.8, "test/acc_unlisted": 0.7},
        "corrections": {"exclude": {"file": "label.csv", "sha256": "c" * 64, "train": 3, "val": 0, "test": 1}},
        "classes": [class_row(number) for number in range(classes)],
        "calibration": {"ece": 0.1, "temperature": 1.0, "ece_with_temperature": 0.1},
        "robustness": {
            **{"set": "cifar10_c", "images": 4, "mean": 0.25, "means": {name: 0.25 for name in PUBLISHED}},
            "curves": {name: [(0, 0.5), (1, 0.25)] for name in PUBLISHED},
        },
        "cost": {
            **{"parameters": 10**7, "flops": 10**9, "images_per_second": 1e4, "latency_ms": 1.0, "batch_size": 500},
            **{"checkpoint_mb": 1.0, "weights_mb": 10.0, "device": "cpu", "precision": "bf16-mixed", "threads": 1},
        },
    }
    pictures = [("Where it errs", folder / "picture.png")]
    models = [Assessment(label, facts, logits, test, pictures) for label in ("probe 1", "probe 2")]
    return write_assessments(models, folder)


@pytest.mark.parametrize("classes", [2, 37])
def test_scores_of_each_class(tmp_path: Path, classes: int) -> None:
    """In order of few, the worst first of many, with the rest folded away; absent is neither 0 nor 0 %."""
    page = evaluation_page(tmp_path, classes).read_text()
    first = page[page.index("Each class") : page.index("The model")]
    names = re.findall(r'data-key="(?:class |a_rather)(\d*)', first)
    assert '<td data-key="">-</td><td data-key="0.5">50.00%</td><td data-key="0">absent</td>' in first
    assert ("90.00%" in page) and ("80.00%" in page), "top-5 and balanced accuracy"
    if classes == 2:
        assert names == ["", "1"] and "<details>" not in page
    else:
        order = ["36", "35", "34", "33", "32", "31", "30", "29", "28", "27"]
        assert names[:10] == names[10:20] == order and names[-2:] == ["", "1"]
        assert "The 10 of 37 classes with the lowest recall (1 absent):" in first
        assert first.index("<details>") > first.index("class 27") and "37 classes" in page


@pytest.mark.slow
@pytest.mark.parametrize("write", [sweep_page, evaluation_page])
def test_nothing_is_cut_off_and_only_tables_and_pictures_scroll(browser, tmp_path: Path, write) -> None:
    path = write(tmp_path / f"a_folder_{'x' * 60}")
    backs = set()
    for width, scheme in [(360, "light"), (360, "dark"), (1200, "light")]:
        context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
        page = context.new_page()
        page.goto(path.as_uri())
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.evaluate(CUT_OFF) == []
        backs.add(page.evaluate("getComputedStyle(document.body).backgroundColor"))
        context.close()
    assert len(backs) == 2, "light and dark"
