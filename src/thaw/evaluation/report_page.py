"""The report on checkpoints as one HTML file."""

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from thaw.evaluation.assessment import Assessment
from thaw.evaluation.corruptions import CORRUPTIONS
from thaw.evaluation.errors import WRONG_IMAGES
from thaw.pages.html_page import Cell, page, picture, table


def format_page(assessments: Sequence[Assessment], pairs: Sequence[dict[str, Any]], robustness: Path) -> str:
    """One HTML page; whatever comes from files is escaped."""
    several = len(assessments) > 1
    title = f"{len(assessments)} models compared" if several else assessments[0].label
    first = assessments[0].facts
    parts = [
        f"<h1>{escape(title)}</h1>",
        "" if several else f"<p style='font-size:2.6rem;margin:.6rem 0 0'>{first['test/acc']:.2%}</p>",
        f"<p class=soft>{'on' if several else 'of'} {first['n_test']:,} test digits of {escape(first['dataset'])} "
        f"({escape(first['data_title'])})"
        f"{'' if several else ' are read right'}. Intervals are Wilson's, at 95 %.</p>",
        models_table(assessments),
    ]
    if pairs:
        parts += ["<h2>Are the differences more than chance?</h2>", pairs_table(pairs)]
    parts.append(robustness_text(assessments))
    parts.append(picture("How accuracy falls when digits are harder", robustness))
    for model in assessments:
        parts.append(f"<h1 style='margin-top:3rem'>{escape(model.label)}</h1>" if several else "")
        parts += [picture(name, path) for name, path in model.pictures]
        wrong = Path("." if not several else model.pictures[0][1].parent.name, WRONG_IMAGES)
        parts.append(f"<p class=soft>Every wrong image is listed in {escape(str(wrong))}, beside this page.</p>")
        parts += ["<h2>Each class</h2>", classes_table(model.facts["classes"])]
        if "second" in model.facts:
            parts.append(second_text(model.facts["second"], model.facts["dataset"], len(model.facts["classes"])))
        parts.append(cost_text(model.facts))
    return page(title, parts)


def models_table(assessments: Sequence[Assessment]) -> str:
    head = ["model", "accuracy", "95 % interval", "errors", "ECE", "ECE with T", "corrupted"]
    head += ["parameters", "FLOPs a digit", "digits/s"]
    rows = []
    for model in assessments:
        facts, calibration, cost = model.facts, model.facts["calibration"], model.facts["cost"]
        errors = round((1 - facts["test/acc"]) * facts["n_test"])
        rows.append(
            [
                (escape(model.label), model.label),
                (f"{facts['test/acc']:.2%}", facts["test/acc"]),
                (f"{facts['test/acc_low']:.2%} to {facts['test/acc_high']:.2%}", facts["test/acc_low"]),
                (f"{errors:,}", errors),
                (f"{calibration['ece']:.2%}", calibration["ece"]),
                (f"{calibration['ece_with_temperature']:.2%}", calibration["ece_with_temperature"]),
                (f"{facts['robustness']['mean']:.2%}", facts["robustness"]["mean"]),
                (f"{cost['parameters']:,}", cost["parameters"]),
                ("-" if cost["flops"] is None else f"{cost['flops'] / 1e6:,.1f} M", cost["flops"]),
                (f"{cost['images_per_second']:,.0f}", cost["images_per_second"]),
            ]
        )
    return table(head, {0}, rows, best=False)


def pairs_table(pairs: Sequence[dict[str, Any]]) -> str:
    head = ["first", "second", "only the first is right", "only the second is right", "p"]
    rows: list[list[Cell]] = [
        [
            *((escape(name), name) for name in pair["models"]),
            (f"{pair['only_first_right']:,}", pair["only_first_right"]),
            (f"{pair['only_second_right']:,}", pair["only_second_right"]),
            (f"{pair['p_value']:.2g}", pair["p_value"]),
        ]
        for pair in pairs
    ]
    note = "McNemar's exact test: p is how often models of equal accuracy would differ at least as much."
    if len(pairs) > 1:
        note += f" Of {len(pairs)} pairs, one is below {0.05 / len(pairs):.2g} by chance in at most 5 % of cases."
    return table(head, {0, 1}, rows, best=False) + f"<p class=soft>{note}</p>"


def robustness_text(assessments: Sequence[Assessment]) -> str:
    facts = [model.facts["robustness"] for model in assessments]
    worst = ""
    if len(facts) == 1:
        curves = facts[0]["curves"]
        means = {
            name: [accuracy for at, accuracy in curves[name] if at != corruption.harmless]
            for name, corruption in CORRUPTIONS.items()
        }
        means = {name: accuracies for name, accuracies in means.items() if accuracies}
        said = ", ".join(f"{name} {sum(values) / len(values):.1%}" for name, values in means.items())
        worst = f" Mean over its strengths: {said}."
    return f"<p class=soft>Corrupted are {facts[0]['digits']:,} of the test digits, evenly spread.{worst}</p>"


def classes_table(classes: Sequence[dict[str, Any]]) -> str:
    rows: list[list[Cell]] = [
        [
            (escape(row["class"]), row["class"]),
            *(("-" if row[name] is None else f"{row[name]:.2%}", row[name]) for name in ("precision", "recall")),
            (f"{row['n']:,}", row["n"]),
        ]
        for row in classes
    ]
    return table(["class", "precision", "recall", "n"], {0}, rows, best=False)


def second_text(second: dict[str, Any], own: str, classes: int) -> str:
    return (
        f"<h2>On {escape(second['dataset'])}</h2><p>{second['n_test']:,} test images, {second['test/acc']:.2%} of "
        f"which get the number of their own class ({second['test/acc_low']:.2%} to {second['test/acc_high']:.2%}; "
        f"{1 / classes:.0%} is chance where the classes are other things). "
        f"Mean confidence {second['mean_confidence']:.1%}, on {escape(own)} {second['mean_confidence_own']:.1%}; "
        f"confidence tells the two apart with an area under the ROC curve of {second['auroc']:.3f}.</p>"
    )


def cost_text(facts: dict[str, Any]) -> str:
    cost = facts["cost"]
    lines = {
        "backbone": facts["backbone"],
        "checkpoint": facts["checkpoint"],
        "weights, SHA-256": facts["weights_sha256"],
        "trained by commit": facts["git_commit"],
        "size": f"{cost['checkpoint_mb']:.2f} MB of checkpoint, {cost['weights_mb']:.2f} MB with all weights",
        "time": f"{cost['latency_ms']:.2f} ms for one digit, {cost['images_per_second']:,.0f} digits a second in "
        f"batches of {cost['batch_size']}, on {cost['device']} in {cost['precision']}, {cost['threads']} threads",
    }
    rows = "".join(
        f"<tr><th class=text>{escape(k)}</th><td class='text wide'>{escape(v)}</td></tr>" for k, v in lines.items()
    )
    return f"<h2>The model</h2><div class=scroll><table>{rows}</table></div>"
