"""The pages say what is true: links lead somewhere, commands and options exist, and blocks of code run.

Under the marker `long` every block of a page runs in its order in one copy of the checkout, and what it prints is
compared with the page. A page without a block marked long runs in every test run, in processes that are forked.
"""

import ast
import copy
import importlib.util
import re
import tomllib
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, compose_config
from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from markdown_pages import Command, Page
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from page_run import run_page

from predict import take_inputs
from thaw.plan.settings import compose_run, read_arguments
from thaw.run.command import explain
from thaw.run.errors import UserError
from thaw.run.values import check_command_settings, check_types

PATHS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
TARGETS = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
GENERATED = {ROOT / "docs" / "reference" / name for name in ("configuration.md", "api.md")}  # by the site alone
pages = pytest.mark.parametrize("path", PATHS, ids=lambda path: path.relative_to(ROOT).as_posix())
Problems = Iterator[tuple[int, str]]
page_of = cache(Page)


def assert_none(path: Path, problems: Problems) -> None:
    __tracebackhide__ = True
    if found := [f"{path}:{line}: {problem}" for line, problem in problems]:
        pytest.fail("\n".join(found), pytrace=False)


@pages
def test_links_lead_somewhere(path: Path) -> None:
    assert_none(path, dead_links(page_of(path)))


def dead_links(page: Page) -> Problems:
    commands = [line for line, _ in page.made_by] + [command.line for command in page.commands()]
    for link in page.links:
        if re.match(r"[a-z]+:", link.target):
            continue
        name, _, anchor = link.target.partition("#")
        target = (page.path.parent / name).resolve() if name else page.path
        if target in GENERATED:
            continue
        if not target.exists():
            yield link.line, f"the link {link.target} leads to no file: there is no {target}"
        elif anchor and anchor not in (anchors := page_of(target).anchors):
            yield link.line, f"{link.target}: the page has no such heading; its anchors are {', '.join(anchors)}"
        if link.is_picture and not any(abs(link.line - line) <= 3 for line in commands):
            yield (
                link.line,
                f"nothing near says how {link.target} is made; write <!-- made by: command --> below the picture",
            )


@pages
def test_commands_exist(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_none(path, wrong_commands(page_of(path), tmp_path, monkeypatch))


def wrong_commands(page: Page, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Problems:
    """Commands with a wrong script, key, option, make target or extra, and Python that does not compile."""
    for name, text in page.files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(ROOT)
    for command in page.commands():
        try:
            check_words(command, tmp_path if page.files else None)
        except Exception as error:
            yield command.line, f"{' '.join(command.words)}\n    {explain(error)}"
    for block in page.blocks:
        try:
            if block.language == "python":
                ast.parse(block.text)
        except SyntaxError as error:
            yield block.line + (error.lineno or 1) - 1, f"{error.msg}: {error.text}"
    for number, line in enumerate(page.text.splitlines(), 1):
        for extra in ",".join(re.findall(r"(?:\.|thaw-vit)\[([\w,]+)\]", line)).split(","):
            if extra and extra not in EXTRAS:
                yield number, f"there is no extra {extra}; pyproject.toml has {', '.join(EXTRAS)}"


def check_words(command: Command, written: Path | None) -> None:
    """Raise an error if a command cannot work; `written` is a folder with files that its page writes."""
    words = list(command.words)
    if words[0] == "make":
        if wrong := [word for word in words[1:] if "=" not in word and word[0] != "-" and word not in TARGETS]:
            raise UserError(f"Makefile has no target {', '.join(wrong)}")
        return
    module = words[words.index("-m") + 1] if "python" in words and "-m" in words[:3] else ""
    script = next((word for word in words if word.endswith(".py")), None)
    if module.startswith(("thaw", "benchmarks", "tools")):
        found = importlib.util.find_spec(module)
        if not found or not found.origin:
            raise UserError(f"there is no module {module}")
        source, name, arguments = Path(found.origin), module.rpartition(".")[2], words[words.index(module) + 1 :]
        source = source.with_name("__main__.py") if source.stem == "__init__" else source
    elif script and "python" in words[0]:
        places = [place / script for place in (ROOT, written) if place]
        source = next(filter(Path.is_file, places), places[0])
        if not source.is_file():
            raise UserError(f"there is no {script}")
        name, arguments = source.stem, words[words.index(script) + 1 :]
    else:
        return
    if "--help" in arguments:
        return
    if module == "thaw.plan":
        settings, overrides = read_arguments(arguments)
        for model, policy in product(settings.model.split(","), settings.policy.split(",")):
            compose_run(settings, model, policy, overrides)
    elif source.parent == ROOT and (ROOT / "configs" / f"{name}.yaml").is_file():
        check_settings(name, arguments, written, command.is_shortened)
    else:
        for option in [word.partition("=")[0] for word in arguments if word.startswith("--")]:
            if f'"{option}"' not in source.read_text():
                raise UserError(f"{source.name} has no option {option}")


def check_settings(name: str, arguments: Sequence[str], written: Path | None, is_shortened: bool) -> None:
    known, unknown = get_args_parser().parse_known_args(arguments)
    if unknown:
        raise UserError(f"{unknown[0]} is not an option of {name}.py")
    overrides = ["", *known.overrides]
    if name == "predict":
        take_inputs(overrides)
    if known.info:
        return
    searched = [f"hydra.searchpath=['file://{written}/configs']"] if written and (written / "configs").is_dir() else []
    choices: list[list[str]] = []
    for override in OverridesParser.create().parse_overrides(overrides[1:]):
        if known.multirun and override.is_sweep_override():
            key = override.get_key_element()
            choices.append([f"{key}={value}" for value in override.sweep_string_iterator()])
        else:
            choices.append([str(override.input_line)])
    first = [each[0] for each in choices]
    check_composed(name, (*searched,), (*first,), is_shortened)
    for number, each in enumerate(choices):
        for value in each[1:]:
            if (ROOT / "configs" / f"{value.replace('=', '/')}.yaml").is_file():
                continue  # another option of a group; test_configs composes them all
            check_composed(name, (*searched,), (*first[:number], value, *first[number + 1 :]), is_shortened)


@cache
def check_composed(name: str, searched: tuple[str, ...], overrides: tuple[str, ...], is_shortened: bool) -> None:
    """Values are set in a configuration that is composed once for all commands with the same options of groups."""
    parsed = OverridesParser.create().parse_overrides([*overrides])
    values = [each for each in parsed if re.fullmatch(r"[\w.]+=.*", str(each.input_line)) and not is_group(each)]
    cfg = copy.deepcopy(composed(name, *searched, *(str(each.input_line) for each in parsed if each not in values)))
    try:
        for each in values:
            OmegaConf.update(cfg, each.key_or_group, each.value(), merge=not isinstance(each.value(), dict))
    except OmegaConfBaseException:
        composed(name, *searched, *overrides)  # for the message that a user sees
        raise
    if (missing := OmegaConf.missing_keys(cfg)) and not is_shortened:
        raise UserError(f"{', '.join(sorted(missing))} must be given")
    for key in {"run_dir", "overrides"} & set(cfg):
        cfg[key] = "placeholder"
    check_command_settings(cfg)
    check_types(cfg)


def is_group(override: Override) -> bool:
    return override.key_or_group.startswith("hydra") or (ROOT / "configs" / override.key_or_group).is_dir()


@cache
def composed(name: str, *overrides: str) -> DictConfig:
    return compose_config(name, *overrides)


def runnable() -> Iterator[Any]:
    for path in PATHS:
        blocks = [block for block in page_of(path).blocks if block.language in ("bash", "console", "python")]
        marks = [pytest.mark.long, pytest.mark.timeout(3600)] if any(block.long for block in blocks) else []
        if not all(block.not_run for block in blocks):
            yield pytest.param(path, id=path.relative_to(ROOT).as_posix(), marks=marks)


@pytest.mark.parametrize("path", [*runnable()])
def test_blocks_run(path: Path, checkout: Path, tmp_path: Path) -> None:
    run_page(page_of(path), checkout, tmp_path)
