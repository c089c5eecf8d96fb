"""The answer of a comparison: the best policy by validation, and the cheapest that the test cannot tell from it."""

import csv
import io
import os
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from thaw.evaluation.paired import difference_interval, holm, sign_flip_test
from thaw.run.console import UNBOUNDED, console, plural, say, say_fitted
from thaw.run.files import write_json, write_text
from thaw.sweeps.cells import Cell, format_score, format_seconds, shown
from thaw.sweeps.compare_results import Comparison, PolicyResult, read_comparison
from thaw.sweeps.ending import first_that_fits
from thaw.sweeps.groups import ABSENT

ALPHA = 0.05
SAME_TIME = 1.1  # training times up to this ratio count as equal, as repeated runs differ by as much
COARSE = 0.01  # half an interval of differences, above which the answer says that the test split is small
POLICY_FIELDS = (
    *("policy", "mark", "lr", "lr_at_edge", "val/acc", "val/acc_std", "seeds", "test/acc", "test/acc_low"),
    *("test/acc_high", "n_test", "difference", "difference_low", "difference_high", "p", "p_holm"),
    *("trainable_params", "seconds", "peak_memory_gb", "state"),
)


@dataclass(frozen=True)
class Verdict:
    """Another policy against the best by validation: `difference` in test accuracy, its 95 % interval, p-values."""

    difference: float
    low: float
    high: float
    p_value: float
    p_holm: float

    @property
    def worse(self) -> bool:
        return self.p_holm < ALPHA and self.difference < 0

    @property
    def better(self) -> bool:
        return self.p_holm < ALPHA and self.difference > 0


@dataclass(frozen=True)
class ComparisonAnswer:
    """What a comparison says; `best` and `cheapest` are None where there is none. `verdicts` are by policy."""

    best: PolicyResult | None
    cheapest: PolicyResult | None
    verdicts: Mapping[str, Verdict]
    sentence: str
    how: str
    notes: list[str]
    command: str

    def mark(self, policy: PolicyResult) -> str:
        names = {"best": self.best, "cheapest": self.cheapest}
        return ", ".join(name for name, one in names.items() if one is policy)


def test_against(best: PolicyResult, others: Sequence[PolicyResult]) -> dict[str, Verdict]:
    """The paired test of each tested policy against the best, over the same test images.

    Per image the difference is that of the shares of seeds that are right, as a whole number.
    """
    ours, seeds = best.right, len(best.predictions)
    units = [each.right * seeds - ours * len(each.predictions) for each in others]
    p_values = [sign_flip_test(unit) for unit in units]
    verdicts = {}
    for other, unit, p_value, corrected in zip(others, units, p_values, holm(p_values), strict=True):
        shares = unit / (seeds * len(other.predictions))
        verdicts[other.name] = Verdict(
            float(shares.mean()), *difference_interval(shares, len(others)), p_value, corrected
        )
    return verdicts


def find_answer(comparison: Comparison) -> ComparisonAnswer:
    """Judge the policies that have finished."""
    finished = comparison.finished
    best = finished[0] if finished else None
    others = [policy for policy in comparison.tested if policy is not best]
    verdicts = test_against(best, others) if best and best.predictions and others else {}
    equal = [policy for policy in finished if policy is best or is_eligible(verdicts.get(policy.name))]
    cheapest = find_cheapest(equal) if verdicts else None
    return ComparisonAnswer(
        best,
        cheapest,
        verdicts,
        say_answer(comparison, best, cheapest, verdicts),
        say_how(comparison, verdicts),
        say_notes(comparison, best, cheapest, verdicts),
        shlex.join(["python", "train.py", *(cheapest or best).train]) if best else "",
    )


def is_eligible(verdict: Verdict | None) -> bool:
    return verdict is not None and not verdict.worse


def find_cheapest(policies: Sequence[PolicyResult]) -> PolicyResult:
    """The policy that trains fastest; of those that are about as fast the one with the fewest trained parameters."""
    times = [policy.seconds for policy in policies if policy.seconds is not None]
    fast = [policy for policy in policies if not times or (policy.seconds or np.inf) <= SAME_TIME * min(times)]
    return min(fast, key=lambda policy: (policy.params is None, policy.params or 0, policy.seconds or 0.0))


def say_answer(
    comparison: Comparison, best: PolicyResult | None, cheapest: PolicyResult | None, verdicts: Mapping[str, Verdict]
) -> str:
    """One or two sentences, for the head of the page."""
    if best is None or best.val is None:
        return "No policy has finished yet."
    mean, _, seeds = best.val
    over = f", the mean of {seeds} seeds" if seeds > 1 else ", of one seed"
    sentence = f"{best.name} is the best by validation ({mean:.2%}{over})"
    images = plural(len(comparison.labels), "test image")
    if cheapest is None:
        why = "no other policy has finished" if len(comparison.finished) == 1 else why_untested(comparison, best)
        return f"{sentence}; {why}, so that there is nothing to tell it from."
    if cheapest is best:
        faster = [each for each in comparison.finished if (each.seconds or 0) * SAME_TIME < (best.seconds or 0)]
        reason = f"each that trains faster is measurably worse on the {images}" if faster else "none trains faster"
        return f"{sentence}, and nothing cheaper will do: {reason}."
    verdict = verdicts[cheapest.name]
    relation = (
        f"scores higher on the {images}" if verdict.better else f"is the cheapest that the {images} cannot tell from it"
    )
    times = f"trains in {format_seconds(cheapest.seconds)} instead of {format_seconds(best.seconds)}"
    change = f"{abs(verdict.difference) * 100:.2f} points {'lower' if verdict.difference < 0 else 'higher'}"
    change = "equal" if verdict.difference == 0 else change
    interval = f"95 % interval {100 * verdict.low:+.2f} to {100 * verdict.high:+.2f}"
    return (
        f"{sentence}. {cheapest.name} {relation}: its test accuracy, {cheapest.test_acc:.2%}, is {change} "
        f"({interval}; {say_p(verdict.p_holm)}), and it {times}."
    )


def why_untested(comparison: Comparison, best: PolicyResult) -> str:
    if not comparison.tested:
        return "no policy is tested"
    return "it is not tested" if not best.predictions else "no other policy is tested"


def say_how(comparison: Comparison, verdicts: Mapping[str, Verdict]) -> str:
    """How the policies were compared, in one line."""
    if not verdicts:
        return ""
    single = all(len(policy.predictions) == 1 for policy in comparison.tested)
    test = (
        "McNemar's exact test of which images are right"
        if single
        else "an exact sign-flip test of the share of seeds that are right"
    )
    corrected = (
        f", p and intervals corrected for {len(verdicts)} comparisons (Holm 1979, Bonferroni)"
        if len(verdicts) > 1
        else ""
    )
    return (
        f"How: each policy against the best by validation, over the same {len(comparison.labels):,} test images, by "
        f"{test}, two-sided at {100 * ALPHA:.0f} %{corrected}; cheap is a short training time, then few "
        "trained parameters."
    )


def say_notes(
    comparison: Comparison, best: PolicyResult | None, cheapest: PolicyResult | None, verdicts: Mapping[str, Verdict]
) -> list[str]:
    """What a reader must know to believe the answer, a sentence or two each."""
    notes = []
    if verdicts:
        unseen = [each for each in verdicts.values() if each.p_holm >= ALPHA]
        widest = max(((each.high - each.low) / 2 for each in unseen), default=0.0)
        if widest > COARSE:
            notes.append(
                f"{plural(len(comparison.labels), 'test image')} are few: differences up to {100 * widest:.1f} points "
                "may go unseen, and policies that are not told apart need not be equal."
            )
        notes.append(
            "The test speaks of the models that were trained, not of every training: another seed changes accuracies "
            "by the ± of the table."
        )
    for policy in comparison.tested:
        if (verdict := verdicts.get(policy.name)) and verdict.better and best:
            notes.append(
                f"{policy.name} is better than {best.name} on the test images ({say_p(verdict.p_holm)}), but not "
                "on validation, which alone chooses the best."
            )
    edges = [f"{policy.name} ({policy.lr:g}, {policy.edge})" for policy in comparison.finished if policy.at_edge]
    if edges:
        notes.append(f"Best learning rate at the edge of those tried: {', '.join(edges)}; a wider range may give more.")
    wanted = comparison.budget.get("seeds") or 0
    for policy in comparison.finished:
        if policy.val and policy.val[2] < max(wanted, len(policy.group.runs)):
            notes.append(f"{policy.name}: {policy.val[2]} of {plural(wanted, 'seed')} done.")
    if comparison.tested and (lacking := [each.name for each in comparison.finished if not each.predictions]):
        notes.append(f"Without a test: {', '.join(lacking)}.")
    for policy in comparison.policies:
        if not policy.val:
            notes.append(f"{policy.name} has no result ({policy.what_happened}).")
    notes += [f"{each['policy']} was left out: {each['reason']}" for each in comparison.left_out]
    return notes


def report_comparison(folder: Path) -> None:
    """Write `report.html`, `comparison.csv`, `answer.json` and pictures into the folder of a comparison; print it.

    It takes what has finished, however little, and reads files alone.
    """
    from thaw.sweeps.compare_page import write_comparison_page

    comparison = read_comparison(folder)
    answer = find_answer(comparison)
    rows = [policy_facts(comparison, answer, policy) for policy in comparison.policies]
    write_text(format_rows(rows), folder / "comparison.csv")
    names = {name: one and one.name for name, one in (("best", answer.best), ("cheapest", answer.cheapest))}
    texts = {name: getattr(answer, name) for name in ("sentence", "how", "notes", "command")}
    more = {"left_out": comparison.left_out, "budget": comparison.budget, "typed": comparison.typed}
    write_json({**names, **texts, "policies": rows, **more}, folder / "answer.json")
    with console().status("drawing pictures, writing the report"):
        write_comparison_page(comparison, answer)
    show_comparison(comparison, answer)


def policy_facts(comparison: Comparison, answer: ComparisonAnswer, policy: PolicyResult) -> dict[str, Any]:
    """All numbers of a policy by `POLICY_FIELDS`, None where there is none."""
    mean, spread, seeds = policy.val or (None, None, 0)
    low, high = policy.test_interval or (None, None)
    values = {
        "policy": policy.name,
        "mark": answer.mark(policy),
        "lr": policy.lr,
        "lr_at_edge": policy.at_edge,
        **{"val/acc": mean, "val/acc_std": spread, "seeds": seeds},
        "test/acc": policy.test_acc,
        **{"test/acc_low": low, "test/acc_high": high},
        "n_test": len(comparison.labels) if policy.predictions else None,
        **dict.fromkeys(("difference", "difference_low", "difference_high", "p", "p_holm")),
        **{"trainable_params": policy.params, "seconds": policy.seconds, "peak_memory_gb": policy.memory},
        "state": "done" if policy.val else policy.what_happened,
    }
    if verdict := answer.verdicts.get(policy.name):
        names = ("difference", "difference_low", "difference_high", "p", "p_holm")
        values |= dict(zip(names, asdict(verdict).values(), strict=True))
    return values


def format_rows(rows: Sequence[Mapping[str, Any]]) -> str:
    file = io.StringIO()
    writer = csv.DictWriter(file, POLICY_FIELDS)
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def policy_cells(answer: ComparisonAnswer, policy: PolicyResult) -> dict[str, Cell]:
    """The cells of a policy by the titles of their columns."""
    interval, verdict = policy.test_interval, answer.verdicts.get(policy.name)
    ends = f" [{interval[0]:.2%}, {interval[1]:.2%}]" if interval else ""
    difference, p_value = (verdict.difference, verdict.p_holm) if verdict else (None, None)
    return {
        "policy": (policy.name, policy.name),
        "val/acc": (format_score(policy.val), policy.val and policy.val[0]),
        "test/acc": (shown(policy.test_acc, ".2%") + ends, policy.test_acc),
        "vs best": (ABSENT if difference is None else f"{100 * difference:+.2f}", difference),
        "p": (ABSENT if p_value is None else format_p(p_value), p_value),
        "trained": (shown(policy.params, ","), policy.params),
        "time": (format_seconds(policy.seconds), policy.seconds),
        "memory": (f"{policy.memory:.1f} GB" if policy.memory else ABSENT, policy.memory),
        "lr": (shown(policy.lr, "g") + "*" * policy.at_edge, policy.lr),
    }


def format_p(p_value: float) -> str:
    return "<0.001" if p_value < 0.001 else f"{p_value:.3f}"


def say_p(p_value: float) -> str:
    return "p < 0.001" if p_value < 0.001 else f"p = {p_value:.3f}"


def show_comparison(comparison: Comparison, answer: ComparisonAnswer) -> None:
    """Print the table, the sentence, its notes and the command."""
    say()
    if comparison.finished:
        out = console()
        say_fitted(comparison_table(comparison, answer, out.width if out.is_terminal else UNBOUNDED))
        say()
    say_fitted(answer.sentence)
    for text in filter(None, [answer.how, *answer.notes, *comparison.warnings]):
        say_fitted(text)
    say(f"\nreport.html, comparison.csv and answer.json are in:\n  {os.path.relpath(comparison.folder)}")
    if answer.command:
        say(f"To train {(answer.cheapest or answer.best).name}:")  # type: ignore[union-attr]
        say(f"  {answer.command}", "cyan")


def comparison_table(comparison: Comparison, answer: ComparisonAnswer, width: int) -> Table:
    """A row for each finished policy in so many columns: texts are broken first, then costs are left to the page."""
    rows = [(answer.mark(policy), policy_cells(answer, policy)) for policy in comparison.finished]

    def table(breaks: bool, without: Sequence[str]) -> Table:
        titles = [title for title in rows[0][1] if title not in without]
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
        for title in (*([] if breaks else [""]), "policy"):
            table.add_column(title, overflow="fold")
        for title in titles[1:]:
            table.add_column(title.replace(" ", "\n") if breaks else title, justify="right", no_wrap=True)
        for mark, cells in rows:
            texts = [cells[title][0] for title in titles]
            if breaks:
                texts = [re.sub(r" (?=[\[\u00b1])", "\n", text) for text in texts]
                texts[0] += f"\n{mark}" if mark else ""
            table.add_row(*([] if breaks else [mark]), *texts, style="bold green" if mark else None)
        return table

    return first_that_fits((table(False, ()), table(True, ()), table(True, ("memory", "lr"))), width)
