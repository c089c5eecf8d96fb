"""The tests of the pages fail for each kind of mistake, and name its line."""

from collections.abc import Callable
from pathlib import Path

import pytest
from docs.test_pages import dead_links, wrong_commands
from markdown_pages import Page
from page_run import difference, run_page

GOOD = """# A page

[below](#what-it--does) and [on another page](other.md).

![a picture](picture.png) <!-- made by: python train.py debug=fast -->

## What it & does

```bash
python train.py -m experiment=vit_linear_probe \\
    optim.lr=1e-3,1e-2 seed=1  # two
CUDA_VISIBLE_DEVICES= python eval.py ckpt=<run folder> | tee report.txt
python probe.py probe=knn
python predict.py ckpt=last pictures/
python serve.py ckpt=last port=8001
pip install -e '.[search]'
make lint
python -m thaw.plan policy=full
```

`python report.py logs/sweeps --out table`, and `python train.py ...` with `configs/data/digits.yaml`:

```yaml
# configs/data/digits.yaml
defaults:
  - mnist
source: sample
```

```bash
python train.py data=digits data.train_size=100
```

```python
print("all")
```
"""
MISTAKES = [  # what is right, what is wrong, its line and the message
    ("(#what-it--does)", "(#what)", 3, "no such heading"),
    ("(other.md)", "(another.md)", 3, "no file"),
    ("debug=fast", "debug=fats", 5, "fats"),
    ("1e-3,1e-2", "1e-3,fast", 10, "fast"),
    ("eval.py", "evaluate.py", 12, "there is no evaluate.py"),
    ("probe=knn", "probe=kmm", 13, "kmm"),
    ("ckpt=last", "", 14, "ckpt must be given"),
    ("port=8001", "prot=8001", 15, "prot"),
    ("'.[search]'", "'.[serach]'", 16, "no extra serach"),
    ("make lint", "make lnit", 17, "no target lnit"),
    ("thaw.plan", "thaw.plam", 18, "there is no module thaw.plam"),
    ("--out", "--output", 21, "no option --output"),
    ("data.train_size", "data.train_sizes", 31, "data.train_sizes"),
    ('print("all")', 'print("all"', 35, "never closed"),
]


@pytest.fixture
def page(tmp_path: Path) -> Callable[[str], Page]:
    def write(text: str) -> Page:
        for name in ("picture.png", "other.md"):
            (tmp_path / name).touch()
        (tmp_path / "page.md").write_text(text)
        return Page(tmp_path / "page.md")

    return write


def test_mistakes_are_found(page: Callable[[str], Page], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def found(text: str) -> list[tuple[int, str]]:
        return sorted([*dead_links(page(text)), *wrong_commands(page(text), tmp_path / "files", monkeypatch)])

    assert not found(GOOD)
    wrong_page = GOOD
    for right, wrong, *_ in MISTAKES:
        assert right in wrong_page
        wrong_page = wrong_page.replace(right, wrong, 1)
    for (line, said), (_, wrong, expected_line, message) in zip(found(wrong_page), MISTAKES, strict=True):
        assert line == expected_line and message in said, wrong


RUN = """
<!-- setup: echo prepared > file -->
```console
$ cat file
prepared
$ printf 'one\\ntwo\\nval/acc 98.10%% in 3.2 s\\n'; exit 1
...
val/acc 97.90% in 12 s
```

```yaml
# folder/a.yaml
key: value
```

```bash
grep -q value folder/a.yaml  # a comment
git status | cat
```

<!-- not run: it fails -->
```bash
false
```

```python
number = 1
```

```python
import thaw

assert number == 1 and thaw.__file__.startswith("PLACE")
```
"""
WRONG_RUNS = [
    ("```console\n$ echo steady\nready\n```", 2, "no line like\n    ready"),
    ("```console\n$ echo 97.9 %\n77.9 %\n```", 2, "77.9"),
    ("```console\n$ echo a; echo b\na\n```", 2, "more than the page shows"),
    ("Text\n\n```bash\ntrue\nfalse\n```", 4, "this command failed: false"),
    ("```bash\nls <run folder>\n```", 2, "<run folder> means nothing here"),
    ("```python\nassert 1 == 2\n```", 2, "AssertionError"),
]


@pytest.mark.long
def test_a_page_runs(page: Callable[[str], Page], checkout: Path, tmp_path: Path) -> None:
    run_page(page(RUN.replace("PLACE", str(tmp_path / "run"))), checkout, tmp_path / "run")


def test_a_picture_says_how_it_is_made(page: Callable[[str], Page]) -> None:
    (found,) = dead_links(page("# A page\n\n![a picture](picture.png)\n"))
    assert found[0] == 3 and "made by" in found[1]


@pytest.mark.long
@pytest.mark.parametrize(("text", "line", "message"), WRONG_RUNS)
def test_a_page_that_is_wrong_fails(
    text: str, line: int, message: str, page: Callable[[str], Page], checkout: Path, tmp_path: Path
) -> None:
    with pytest.raises(pytest.fail.Exception) as failure:
        run_page(page(text), checkout, tmp_path / "run")
    assert message in str(failure.value) and f"page.md:{line}:" in str(failure.value)


@pytest.mark.parametrize(
    ("expected", "printed", "same"),
    [
        ("run logs/runs/a/2026-11-25_23-56-41-448380", "run logs/runs/a/2027-01-02_03-04-05-678901", True),
        ("test/acc  97.40%, n = 500", "test/acc 97.60%,  n = 500", True),
        ("1,930 of 2,684,170 parameters", "1,930 of 2,684,171 parameters", False),
        ("cost 7.3 s, at most 1.1 GB", "cost 12 s, at most 900 MB", True),
        ("commit 1a2b3c4d", "commit 99ffee0", True),
        ("wandb sync ...", "wandb sync logs/x", True),
        ("exactly 3 runs", "exactly 4 runs", False),
    ],
)
def test_lines_are_alike(expected: str, printed: str, same: bool) -> None:
    assert (difference([expected], [printed]) is None) == same
