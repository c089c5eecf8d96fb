"""The tables and the picture of docs/results.md, from the folders of the comparisons that the page names.

python -m benchmarks.answers mnist_100=logs/compare/train_5c1f0e ants_bees=logs/compare/train_9d7a31

Each block of the page between `<!-- answer: NAME -->` and `<!-- end -->` is written anew, so that no figure is typed.
"""

import re
import sys
from pathlib import Path

from matplotlib.axes import Axes

from thaw.pages.figures import ACCENT, FILL, SMALL, new_figure, plain_axes, save_figure
from thaw.run.console import plural
from thaw.run.files import write_text
from thaw.sweeps.cells import format_score, format_seconds
from thaw.sweeps.compare_answer import Answer, find_answer, format_p, test_interval
from thaw.sweeps.compare_results import Comparison, PolicyResult, read_comparison
from thaw.sweeps.runs import find_runs, read_run

ROOT = Path(__file__).resolve().parents[1]
PAGE, PICTURE = ROOT / "docs" / "results.md", ROOT / "docs" / "pictures" / "results.png"


def answer_block(comparison: Comparison) -> str:
    """What was run and for how long, the sentence, and the table, as Markdown."""
    answer = find_answer(comparison)
    runs = [read_run(folder, []) for folder in find_runs([comparison.folder])]
    minutes = sum(run.seconds or 0 for run in runs) / 60
    budget = comparison.budget
    facts = [
        f"{comparison.data}; {len(comparison.labels):,} test images",
        f"each run sees {budget['images']:,} images ({plural(budget['epochs'], 'epoch')})",
        f"{len(comparison.policies)} policies, {plural(len(runs), 'run')}, {minutes:.0f} min in all",
    ]
    lines = [f"{'; '.join(facts)}.", "", f"> {answer.sentence}", ""]
    lines += ["| policy | validation | test, each seed | test against the best | p | trains | one run | rate |"]
    lines += ["|---|---|---|---|---|---|---|---|"]
    lines += [policy_row(answer, policy) for policy in comparison.finished]
    notes = [f"{each['policy']} was left out: {each['reason']}" for each in comparison.left_out]
    if any(policy.at_edge for policy in comparison.finished):
        notes.append("\\* the best of the learning rates that were tried is the lowest or the highest of them.")
    return "\n".join([*lines, *(f"\n{note}" for note in notes)])


def policy_row(answer: Answer, policy: PolicyResult) -> str:
    seeds = ", ".join(f"{each.right.mean():.2%}" for each in policy.predictions)
    verdict = answer.verdicts.get(policy.name)
    against, p_value = "-", "-"
    if verdict:
        against = f"{100 * verdict.difference:+.2f} ({100 * verdict.low:+.2f} to {100 * verdict.high:+.2f})"
        p_value = format_p(verdict.p_holm).removeprefix("p ").removeprefix("= ")
    mark = f" **{answer.mark(policy)}**" if answer.mark(policy) else ""
    cells = [f"`{policy.name}`{mark}", format_score(policy.val), seeds, against, p_value]
    cells += [f"{policy.params:,}", format_seconds(policy.seconds), f"{policy.lr:g}{' *' * policy.at_edge}"]
    return f"| {' | '.join(cells)} |"


def draw(comparisons: dict[str, Comparison], titles: dict[str, str]) -> None:
    """Test accuracy with its 95 % interval, a panel for each comparison; the policies in the order of the first."""
    names = list(dict.fromkeys(policy.name for each in comparisons.values() for policy in each.tested))
    figure = new_figure(3 + 2 * len(comparisons), 1.2 + 0.28 * len(names))
    panels: list[Axes] = [*figure.subplots(1, len(comparisons), sharey=True, squeeze=False)[0]]
    for panel, (key, comparison) in zip(panels, comparisons.items(), strict=True):
        plain_axes(panel)
        answer = find_answer(comparison)
        for policy in comparison.tested:
            low, high = test_interval(policy)
            place = names.index(policy.name)
            color = ACCENT if answer.mark(policy) else FILL
            panel.hlines(place, 100 * (low or 0), 100 * (high or 0), color=color, alpha=0.5)
            panel.plot(100 * policy.test_acc, place, "o", color=color, markersize=5)
        panel.set_title(titles[key].replace(", ", ",\n"), fontsize=SMALL)
        panel.set_xlabel("test accuracy (%)", fontsize=SMALL)
        panel.tick_params(labelsize=SMALL)
    panels[0].set_yticks(range(len(names)), names)
    panels[0].invert_yaxis()
    PICTURE.parent.mkdir(exist_ok=True)
    save_figure(figure, PICTURE)


def main(arguments: list[str]) -> None:
    page = PAGE.read_text(encoding="utf-8")
    comparisons = {}
    for name, _, folder in (argument.partition("=") for argument in arguments):
        comparison = comparisons[name] = read_comparison(Path(folder))
        before, marker, rest = page.partition(f"<!-- answer: {name} -->\n")
        if not marker:
            sys.exit(f"{PAGE.name} has no block <!-- answer: {name} -->.")
        page = f"{before}{marker}{answer_block(comparison)}\n<!-- end -->{rest.partition('<!-- end -->')[2]}"
    sections = re.findall(r"^## (.+)\n(?:(?!## ).*\n)*?<!-- answer: (\w+) -->", page, flags=re.MULTILINE)
    draw(comparisons, {name: title for title, name in sections})
    write_text(page, PAGE)


if __name__ == "__main__":
    main(sys.argv[1:])
