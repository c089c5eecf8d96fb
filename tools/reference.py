"""The generated pages of the site: every setting, from the YAML and the signatures, and the Python API.

They are made at each build rather than committed: a change of a comment or a docstring is in them at once.
"""

import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from griffe import Docstring, DocstringSectionParameters

from thaw.run.migrations import CONFIGS
from thaw.run.targets import import_target
from thaw.run.values import COMMAND_SETTINGS, annotated_arguments, in_words
from tools.schemas import comments

COMMANDS = ("train", "compare", "sweep", "eval", "probe", "clean", "predict", "export", "serve", "plan")
GROUPS = {
    "data": "Where images come from.",
    "augment": "Random changes of the training images.",
    "mix": "Training images mixed with one another.",
    "backbone": "The pretrained model, or a baseline that is trained from scratch.",
    "head": "From features to classes.",
    "freeze": "What trains, and when: a policy is an ordered list of rules.",
    "optim": "Optimizer, learning rate and its schedule.",
    "average": "An average of the weights over the steps.",
    "model": "The classifier, or an objective of pretraining.",
    "trainer": "Where and how long: the arguments of Lightning's Trainer.",
    "callbacks": "What happens around a step.",
    "logger": "Where metrics are logged; several: `logger=[csv,tensorboard]`.",
    "cache": "The output of frozen layers is computed once.",
    "probe": "Probes of frozen features, for `probe.py`.",
    "sweep": "Hyperparameter search, for `sweep.py`.",
    "sweep/sampler": "How a search draws its values.",
    "sweep/pruner": "When a search ends a bad trial early.",
    "hydra/launcher": "How the jobs of a sweep are started.",
    "experiment": "Whole runs: settings of several groups.",
    "debug": "For trying things out.",
}
API = {
    "From a script": ["thaw.load", "thaw.Model", "thaw.freeze"],
    "Data": [
        "thaw.data.images.Images",
        "thaw.data.images.Source",
        "thaw.data.module.ImageDataModule",
        "thaw.data.readers.ImageReader",
    ],
    "Model": [
        "thaw.classifier.Classifier",
        "thaw.task.SingleLabel",
        "thaw.models.backbone.Backbone",
        "thaw.models.heads.LinearHead",
        "thaw.optim.OptimizerRecipe",
    ],
    "Freezing": [
        "thaw.freezing.policy.FreezePolicy",
        "thaw.freezing.policy.Rule",
        "thaw.freezing.policy.Thaw",
        "thaw.freezing.lora.add_lora",
        "thaw.freezing.dora.add_dora",
        "thaw.freezing.ssf.add_ssf",
        "thaw.freezing.adapter.add_adapters",
        "thaw.freezing.prompt.add_prompts",
        "thaw.freezing.surgical.choose_blocks",
        "thaw.freezing.cache.FeatureCache",
    ],
}


class Setting(NamedTuple):
    key: str
    default: str
    meaning: str


def api() -> str:
    """The page of the Python API: names, whose docstrings mkdocstrings fills in."""
    parts = ["# Python API\n\nThe classes and functions that your own code calls, from their docstrings.\n"]
    for title, names in API.items():
        parts += [f"## {title}\n", *(f"::: {name}\n" for name in names)]
    return "\n".join(parts)


def configuration() -> str:
    """The page of all settings, from the files in configs/."""
    parts = [
        "# Configuration reference\n",
        "Every setting with its default, as `configs/` has it. `group=option` chooses a file, `key=value` sets a key: "
        "`python train.py backbone=vit_tiny optim.lr=1e-3`. `+key=value` adds a key that is not listed, such as "
        "another argument of Lightning's Trainer. `--help` lists the groups, and `--cfg job` prints the result.\n",
        "## Commands\n",
    ]
    for name in COMMANDS:
        script = "-m thaw.plan" if name == "plan" else f"{name}.py"
        parts += [
            f"### {script.removeprefix('-m ')}\n",
            f"`python {script}`\n",
            described(CONFIGS / f"{name}.yaml", "", {}),
        ]
    for group, meaning in GROUPS.items():
        parts += [f"## {group}\n", f"{meaning}\n"]
        listed: dict[str, Setting] = {}
        files = [path for path in sorted(CONFIGS.rglob("*.yaml")) if group_of(path) == group]
        for path in sorted(files, key=lambda path: (path.parent.name == "settings", bool(bases_of(path)), path)):
            option = path.relative_to(CONFIGS / group).with_suffix("").as_posix()
            title = f"{group}={option}" if path.parent.name != "settings" else f"settings of {path.stem}"
            parts += [f"### {title}\n", described(path, group.replace("/", "."), listed)]
    return "\n".join(parts)


def bases_of(path: Path) -> list[str]:
    """Other options of its group that a file starts from."""
    defaults = defaults_of(yaml.compose(path.read_text(encoding="utf-8")))
    return [name for name in defaults if (path.parent / f"{name}.yaml").is_file()]


def group_of(path: Path) -> str:
    """The longest group that a file lies in."""
    name = path.relative_to(CONFIGS).as_posix()
    return max((group for group in GROUPS if name.startswith(f"{group}/")), key=len, default="")


def described(path: Path, package: str, listed: dict[str, Setting]) -> str:
    """A file's head comment, what it starts from, and a table of the keys that no earlier option of its group has so.

    Where a file starts from another option, a key without a comment has the meaning that is listed there.
    """
    text = path.read_text(encoding="utf-8")
    comment = [line.lstrip("# ") for line in takewhile(lambda line: line.startswith("#"), text.splitlines())]
    head = [line for line in comment if not line.startswith(("@package", "yaml-language-server"))]
    if "@package _global_" in comment:
        package, listed = "", {}  # a whole run is shown whole
    root = yaml.compose(text)
    found = read_settings(root, text.splitlines(), comments([path]))
    settings = [each._replace(key=f"{package}.{each.key}".lstrip(".")) for each in found]
    if bases_of(path):
        earlier = {each.key: listed[each.key].meaning for each in settings if each.key in listed}
        settings = [each._replace(meaning=each.meaning or earlier.get(each.key, "")) for each in settings]
    new = [each for each in settings if listed.get(each.key) != each]
    listed.update({each.key: each for each in settings})
    lines = [prose(head)] if head else []
    if starts_from := [word for word in defaults_of(root) if word != "_self_" and not word.startswith("hydra/")]:
        lines += [f"Starts from {', '.join(f'`{word}`' for word in starts_from)}.\n"]
    if new:
        lines += ["| key | default | meaning |\n|---|---|---|"]
        lines += [f"| `{each.key}` | {code(each.default)} | {each.meaning} |" for each in new]
    if len(new) < len(settings):
        lines += ["\nThe other keys are as above." if new else "The keys are as above."]
    return "\n".join(lines) + "\n"


def read_settings(
    node: yaml.MappingNode, lines: Sequence[str], notes: Mapping[str, str], place: str = ""
) -> Iterator[Setting]:
    """Every key below a node, with the comment behind it, else what the docstring of its class says, and its type."""
    values = {key.value: value for key, value in node.value}
    annotations, words = arguments_of(values["_target_"].value) if "_target_" in values else ({}, {})
    for key, value in values.items():
        name = f"{place}{key}"
        if key.startswith("_") or name in ("defaults", "hydra"):
            continue
        meaning = notes.get(name) or words.get(key, "").rstrip(".")
        if isinstance(value, yaml.MappingNode) and value.value and not value.flow_style:
            if meaning:
                yield Setting(name, "", cell(meaning))
            yield from read_settings(value, lines, notes, f"{name}.")
        elif meaning or not text_of(value, lines).startswith("${"):  # else another key's value, passed on
            annotation = annotations.get(key, COMMAND_SETTINGS.get(name))
            allowed = f" *({cell(in_words(annotation))})*" if annotation else ""
            yield Setting(name, text_of(value, lines), f"{cell(meaning)}{allowed}".strip())


def arguments_of(target: str) -> tuple[dict[str, Any], dict[str, str]]:
    """Annotations and descriptions of what a class or function takes."""
    if not target.startswith("thaw."):
        return {}, {}
    found = import_target(target)
    words: dict[str, str] = {}
    for each in reversed(found.__mro__ if isinstance(found, type) else [found]):
        if str(each.__module__).startswith("thaw."):
            docstring = Docstring(inspect.cleandoc(each.__doc__ or ""))
            for section in docstring.parse("google", warnings=False):
                if isinstance(section, DocstringSectionParameters):
                    words |= {name: part.description for part in section.value for name in part.name.split(", ")}
    return annotated_arguments(found), words


def text_of(value: yaml.Node, lines: Sequence[str]) -> str:
    """A value as the file has it."""
    start, end = value.start_mark, value.end_mark
    if isinstance(value, yaml.ScalarNode) and start.line == end.line:
        return lines[start.line][start.column : end.column]
    return re.sub(r"\s+", " ", value.start_mark.buffer[start.index : end.index].rstrip("\0"))  # type: ignore[index]


def defaults_of(root: yaml.MappingNode) -> list[str]:
    for key, value in root.value:
        if key.value == "defaults":
            return [as_option(item) for item in value.value]
    return []


def as_option(item: yaml.Node) -> str:
    if isinstance(item, yaml.ScalarNode):
        return item.value
    ((key, value),) = item.value
    several = isinstance(value, yaml.SequenceNode)
    chosen = f"[{','.join(each.value for each in value.value)}]" if several else value.value
    return f"{key.value.removeprefix('override ').lstrip('/')}={chosen}"


def prose(lines: list[str]) -> str:
    """Comments as Markdown: commands become code, and other lines a paragraph."""
    text = ""
    for line in lines:
        text += f"\n\n    {line}\n\n" if line.startswith("python ") else f"{cell(line)}\n"
    return f"{text}\n"


def code(text: str) -> str:
    return f"`{text.replace('|', chr(92) + '|')}`" if text else ""


def cell(text: str) -> str:
    """Text of a comment in a table: no HTML, no new column."""
    return re.sub(r"\s+", " ", text).replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*").replace("_", "\\_")
