"""The tables and the picture of docs/results.md, from the folders of the comparisons that the page names.

python -m benchmarks.answers mnist_100=logs/compare/train_5c1f0e ants_bees=logs/compare/train_9d7a31

Each block of the page between `<!-- answer: NAME -->` and `<!-- end -->` is written anew, so that no figure is typed.
"""

import re
import sys
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from thaw.pages.figures import ACCENT, FILL, SMALL, new_figure, plain_axes, save_figure
from thaw.run.console import lenient, plural
from thaw.run.files import read_json, write_text
from thaw.sweeps.cells import format_score, format_seconds
from thaw.sweeps.runs import read_run

ROOT = Path(__file__).resolve().parents[1]
PAGE, PICTURE = ROOT / "docs" / "results.md", ROOT / "docs" / "pictures" / "results.png"
HEADER = ("policy", "validation", "test, each seed", "test against the best", "p", "trains", "one run", "rate")


def answer_block(folder: Path, answer: dict[str, Any]) -> str:
    """What was run and for how long, the sentence, and the table, as Markdown."""
    policies = read_json(folder / "comparison.json")["policies"]
    chosen = {each["policy"]: each["runs"] for each in policies}
    tried = {each["run"] for policy in policies for each in policy["tries"]}
    runs = [read_run(folder / name, []) for name in sorted(tried.union(*chosen.values()))]
    seconds = sum(run.seconds or 0 for run in runs)
    rows = sorted((row for row in answer["policies"] if row["n_test"]), key=lambda row: -row["val/acc"])
    budget = answer["budget"]
    facts = [
        f"{next(run.data for run in runs if run.data)}, {rows[0]['n_test']:,} test images",
        f"each run sees {budget['images']:,} images ({plural(budget['epochs'], 'epoch')})",
        f"{plural(len(runs), 'run')} for {len(rows)} policies, {format_seconds(seconds)} in all without the tests",
    ]
    lines = [f"{'; '.join(facts)}.", "", f"> {answer['sentence']}", ""]
    lines += [f"| {' | '.join(HEADER)} |", "|---" * len(HEADER) + "|"]
    lines += [policy_row(row, [read_run(folder / name, []).test_acc for name in chosen[row["policy"]]]) for row in rows]
    if any(row["lr_at_edge"] for row in rows):
        lines += ["", r"\* the best rate is the lowest or the highest of those that were tried."]
    return "\n".join(lines)


def policy_row(row: dict[str, Any], seeds: list[float | None]) -> str:
    against = p_value = "-"
    if row["difference"] is not None:
        points = [100 * row[key] for key in ("difference", "difference_low", "difference_high")]
        against = "{:+.2f} ({:+.2f} to {:+.2f})".format(*points)
        p_value = "< 0.001" if row["p_holm"] < 0.001 else f"{row['p_holm']:.2g}"
    cells = [
        f"`{row['policy']}`" + (f" **{row['mark']}**" if row["mark"] else ""),
        format_score((row["val/acc"], row["val/acc_std"], row["seeds"])),
        ", ".join(f"{seed:.2%}" for seed in seeds if seed is not None),
        against,
        p_value,
        f"{row['trainable_params']:,}",
        format_seconds(row["seconds"]),
        f"{row['lr']:g}" + r" \*" * row["lr_at_edge"],
    ]
    return f"| {' | '.join(cells)} |"


def draw(answers: dict[str, dict[str, Any]], titles: dict[str, str]) -> None:
    """Test accuracy with its 95 % interval, a panel for each comparison; policies with fewer parameters come first."""
    tested = {name: [row for row in answer["policies"] if row["n_test"]] for name, answer in answers.items()}
    every = sorted((row for rows in tested.values() for row in rows), key=lambda row: row["trainable_params"])
    names = list(dict.fromkeys(row["policy"] for row in every))
    figure = new_figure(1.5 + 2 * len(answers), 1.2 + 0.28 * len(names))
    panels: list[Axes] = [*figure.subplots(1, len(answers), sharey=True, squeeze=False)[0]]
    for panel, (name, rows) in zip(panels, tested.items(), strict=True):
        plain_axes(panel)
        for row in rows:
            place, color = names.index(row["policy"]), ACCENT if row["mark"] else FILL
            panel.hlines(place, 100 * row["test/acc_low"], 100 * row["test/acc_high"], color=color, alpha=0.5)
            panel.plot(100 * row["test/acc"], place, "o", color=color, markersize=5)
        panel.set_title(titles[name].replace(", ", ",\n"), fontsize=SMALL)
        panel.set_xlabel("test accuracy (%)", fontsize=SMALL)
        panel.tick_params(labelsize=SMALL)
    panels[0].set_yticks(range(len(names)), names)
    panels[0].invert_yaxis()
    save_figure(figure, PICTURE)


def main(arguments: list[str]) -> None:
    page = PAGE.read_text(encoding="utf-8")
    answers = {}
    for name, _, folder in (argument.partition("=") for argument in arguments):
        answers[name] = read_json(Path(folder) / "answer.json")
        before, marker, rest = page.partition(f"<!-- answer: {name} -->\n")
        if not marker:
            sys.exit(f"{PAGE.name} has no block <!-- answer: {name} -->.")
        block = answer_block(Path(folder), answers[name])
        page = f"{before}{marker}\n{block}\n\n<!-- end -->{rest.partition('<!-- end -->')[2]}"
    sections = re.findall(r"^## (.+)\n(?:(?!## ).*\n)*?<!-- answer: (\w+) -->", page, flags=re.MULTILINE)
    draw(answers, {name: title for title, name in sections})
    write_text(page, PAGE)


if __name__ == "__main__":
    with lenient():
        main(sys.argv[1:])
