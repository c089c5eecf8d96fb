"""JSON schemas of the YAML in configs/, by which an editor completes keys, shows their comments and marks errors.

python -m tools.schemas                # into build/schemas, where .vscode/settings.json finds them

The keys of a block are the arguments of the class that its `_target_` names, with their types, as when a run checks its
configuration. Keys of no class are those of the shipped files. An interpolation such as `${seed}` stands for any value.
"""

import inspect
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from pydantic import ConfigDict, PydanticUserError, TypeAdapter
from pydantic.json_schema import GenerateJsonSchema

from thaw.freezing.policy import Rule
from thaw.run.command import groups_of
from thaw.run.files import write_json
from thaw.run.migrations import CONFIGS
from thaw.run.targets import import_target
from thaw.run.values import AUTO, COMMAND_SETTINGS, annotated_arguments

Schema = dict[str, Any]
OUTPUT = CONFIGS.parent / "build" / "schemas"
DRAFT = "http://json-schema.org/draft-07/schema#"
REFERENCE = {"type": "string", "pattern": r"\$\{|^\?\?\?$"}  # ???: whoever uses the file must set it
ANY_BLOCK = {"type": "object", "required": ["_target_"]}
OF_HYDRA: Schema = {"^_(partial|args|recursive|convert)_$": {}}
NAMED_BLOCKS = ("callbacks", "logger")  # groups to which one adds blocks of one's own
OF_EXPERIMENTS = {"job_type": {"type": "string", "description": "of the run in W&B"}}  # read where it is given
NO_BLOCKS = ("experiment", "debug", "hydra/help", "hydra/job_logging", "hydra/hydra_logging")


class SettingSchema(GenerateJsonSchema):
    """A type that YAML has no value of, such as an optimizer, is a block that names its class."""

    def handle_invalid_for_json_schema(self, schema: Any, error_info: str) -> Schema:
        return ANY_BLOCK


def schemas() -> dict[str, Schema]:
    """The schema of each group's files by the group's name, and `experiment`, which holds those of all groups."""
    of_groups = {group: group_schema(group) for group in block_groups()}
    paths = root_files()
    root = block([*map(read, paths)], comments(paths))
    properties = root["properties"] | OF_EXPERIMENTS
    for key in COMMAND_SETTINGS.keys() & properties:
        properties[key] = properties[key] | setting(typed(COMMAND_SETTINGS[key]))
    for group in {group for path in paths for group in groups_of(path.stem)} & of_groups.keys():
        properties[group] = setting(of_groups[group], {"type": "null"})
    choices = {f"override /{group}": choice(group) for group in {*of_groups, "experiment", "debug"}}
    entries = [{"type": "object", "properties": choices}, {"type": "string"}]
    properties |= {"defaults": {"type": "array", "items": {"anyOf": entries}}, "hydra": {"type": "object"}}
    return {**of_groups, "experiment": {**root, "properties": properties}}


def root_files() -> list[Path]:
    """The configurations of the commands that experiments are for."""
    return [path for name in ("train", "sweep", "compare") if (path := CONFIGS / f"{name}.yaml").exists()]


def block_groups() -> list[str]:
    """The groups whose files are blocks of one key; those of experiment and debug belong to the root."""
    folders = {path.parent.relative_to(CONFIGS).as_posix() for path in CONFIGS.glob("*/**/*.yaml")}
    groups = {folder.removesuffix("/settings") for folder in folders}
    return sorted(group for group in groups if not group.startswith(NO_BLOCKS))


def group_schema(group: str) -> Schema:
    """The schema of a group's files; a group in its folder is a key of it, as `sampler` of `sweep`."""
    files = [*(CONFIGS / group).glob("*.yaml"), *(CONFIGS / group).glob("settings/*.yaml")]
    paths = sorted(path for path in files if "# @package _global_" not in path.read_text(encoding="utf-8"))
    inner = [name for name in block_groups() if Path(name).parent.as_posix() == group]
    of_roots = [of_root for path in root_files() if (of_root := read(path).get(group))]
    schema = block([*map(read, paths), *of_roots], comments(paths), group)
    properties = schema["anyOf"][0]["properties"] if "anyOf" in schema else schema["properties"]
    properties |= {Path(name).name: setting(group_schema(name), {"type": "null"}) for name in inner}
    properties["defaults"] = {"type": "array"}
    if group == "freeze":
        rule = TypeAdapter(Rule).json_schema()
        keys = {key: setting(schema) for key, schema in rule["properties"].items()}
        properties["rules"] = setting(
            {"type": "array", "items": {**rule, "properties": keys, "additionalProperties": False}}
        )
    return schema


def choice(group: str) -> Schema:
    """The schema of an option of a group in a list of defaults; several where blocks have names."""
    options = sorted(
        path.relative_to(CONFIGS / group).with_suffix("").as_posix() for path in (CONFIGS / group).rglob("*.yaml")
    )
    one = {"enum": [option for option in options if not option.startswith("settings/")]}
    return setting(one, {"type": "array", "items": one}, {"type": "null"})


def read(path: Path) -> dict[str, Any]:
    """A file's keys; Hydra's own are left out."""
    found: Any = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    return {key: value for key, value in found.items() if key not in ("defaults", "hydra")}


def comments(paths: Iterable[Path]) -> dict[str, str]:
    """The comment behind each key, by the key's dotted name; of several the first file's."""
    found: dict[str, str] = {}
    for path in paths:
        text = path.read_text(encoding="utf-8")
        collect_comments(yaml.compose(text, yaml.CSafeLoader), text.splitlines(), "", found)
    return found


def collect_comments(node: yaml.Node, lines: Sequence[str], place: str, found: dict[str, str]) -> None:
    for key, value in node.value if isinstance(node, yaml.MappingNode) else ():
        last = key if isinstance(value, yaml.CollectionNode) and not value.flow_style else value
        comment = re.match(r":?\s*# *(.+)", lines[last.end_mark.line][last.end_mark.column :])
        if comment:
            words = [comment[1]]
            for line in lines[last.end_mark.line + 1 :]:  # the comment continues far to the right
                if not (more := re.match(r"\s{20,}# *(.+)", line)):
                    break
                words.append(more[1])
            found.setdefault(f"{place}{key.value}", " ".join(words))
        collect_comments(value, lines, f"{place}{key.value}.", found)


def block(variants: Sequence[Mapping[str, Any]], notes: Mapping[str, str], group: str = "", place: str = "") -> Schema:
    """The schema of a mapping that looks like one of `variants`.

    Its keys are the arguments of the classes that these name, or where they name none their own keys.
    """
    targets = import_targets(variants)
    parameters = [each for target in targets.values() for each in inspect.signature(target).parameters.values()]
    is_open = any(each.kind is each.VAR_KEYWORD for each in parameters) or (bool(place) and not targets)
    keys = [each.name for each in parameters if each.kind is not each.VAR_KEYWORD]
    if is_open or not targets:
        keys += [key for variant in variants for key in variant if key != "_target_"]
    annotations = [annotated_arguments(target) for target in targets.values()]
    properties = {}
    for key in dict.fromkeys(keys):
        kinds = [typed(each[key]) for each in annotations if key in each] or [{}]
        kinds += [{"const": "auto"}] if key in AUTO else []
        kinds += [{"type": "null"}] if any(variant.get(key, "") is None for variant in variants) else []
        if inner := [variant[key] for variant in variants if variant.get(key) and isinstance(variant[key], dict)]:
            others = [kind for kind in alternatives(kinds) if kind and kind.get("type") != "object"]
            kinds = [block(inner, notes, group, f"{place}{key}."), {"type": "null"}, *others]
        note = {"description": notes[place + key]} if place + key in notes else {}
        properties[key] = setting(*kinds) | note
    more = setting(ANY_BLOCK, {"type": "null"}) if group in NAMED_BLOCKS and not place else is_open
    schema = {"type": "object", "properties": properties, "patternProperties": OF_HYDRA, "additionalProperties": more}
    if not targets:
        return schema
    properties["_target_"] = {"enum": sorted(targets)}
    others_class = {"_target_": {"type": "string", "not": {"enum": sorted(targets)}}}
    return {"anyOf": [schema, {**ANY_BLOCK, "properties": others_class}]}


def import_targets(variants: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The classes that blocks name; without those of extras that are not installed."""
    found = {}
    for name in {str(variant["_target_"]) for variant in variants if "_target_" in variant}:
        try:
            found[name] = import_target(name)
        except ImportError:
            continue
    return found


def typed(annotation: Any) -> Schema:
    """The schema of an annotation's values; of what pydantic cannot check it is that of any value."""
    try:
        adapter = TypeAdapter(annotation, config=ConfigDict(arbitrary_types_allowed=True))
        return adapter.json_schema(schema_generator=SettingSchema)
    except PydanticUserError:
        return {}


def alternatives(kinds: Iterable[Schema]) -> list[Schema]:
    """The schemas of which a value has to fit one, each once."""
    found: list[Schema] = []
    for kind in kinds:
        found += [each for each in kind.get("anyOf", [kind]) if each not in found]
    return found


def setting(*kinds: Schema) -> Schema:
    """The schema of a value that fits one of `kinds` or refers to another key."""
    found = alternatives(kinds)
    return {} if {} in found else {"anyOf": [*found, REFERENCE]}


def main() -> None:
    folder = Path(sys.argv[1]) if sys.argv[1:] else OUTPUT
    for name, schema in schemas().items():
        write_json({"$schema": DRAFT, **schema}, folder / f"{name.replace('/', '_')}.json")
    print(f"JSON schemas of configs/: {folder}")


if __name__ == "__main__":
    main()
