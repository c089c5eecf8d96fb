"""The pages in Markdown as their tests read them: code, commands, links, pictures and headings, each with its line.

Comments before a block of code say what is special about it: `<!-- long -->`, `<!-- not run: reason -->` and
`<!-- setup: command -->`, which is run before it. `<!-- made by: command -->` stands beside a picture.
"""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token

COMMENT = re.compile(r"<!--\s*(long|not run|setup|made by)(?::\s*(.*?))?\s*-->", re.DOTALL)
FILE = re.compile(r"# ([\w./-]+\.\w+)\n")  # the first line of a block that is a file
PLACEHOLDER = re.compile(r"<[a-z][^<>\n|]*>")
OPERATORS = "();<>|&"  # of a shell, between two commands


@dataclass(frozen=True)
class Command:
    """A simple command of a shell, without what stands behind a | or a ;."""

    words: tuple[str, ...]
    line: int
    is_shortened: bool = False  # in a sentence, where what others say already may be left out


@dataclass
class Block:
    language: str
    text: str
    line: int  # of its first line of code, from 1
    long: bool = False
    not_run: bool = False
    setup: list[str] = field(default_factory=list)

    @property
    def file(self) -> str | None:
        """The path that the first line names, if the block is a file."""
        found = FILE.match(self.text)
        return found[1] if found and self.language not in ("bash", "console") else None

    @cached_property
    def steps(self) -> list[tuple[int, str, list[str]]]:
        """Of a shell's block: line, command and output of each; commands that a \\ continues are joined."""
        steps: list[tuple[int, str, list[str]]] = []
        prompt = "$ " if self.language == "console" else ""
        continued = False
        for number, line in enumerate(self.text.splitlines(), self.line):
            if continued:
                first, command, _ = steps[-1]
                steps[-1] = (first, command.removesuffix("\\") + line.strip(), [])
            elif line.startswith(prompt):
                steps.append((number, line.removeprefix(prompt), []))
            elif steps:
                steps[-1][2].append(line)
            continued = line.endswith("\\") and (continued or line.startswith(prompt))
        return [step for step in steps if step[1].strip() and not step[1].lstrip().startswith("#")]


@dataclass
class Link:
    target: str
    line: int
    is_picture: bool


class Page:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.text = path.read_text(encoding="utf-8")
        self.blocks: list[Block] = []
        self.links: list[Link] = []
        self.anchors: list[str] = []
        self.inline: list[tuple[int, str]] = []  # commands in sentences and tables
        self.made_by: list[tuple[int, str]] = []
        tokens = MarkdownIt("commonmark").enable("table").parse(self.text)
        notes: list[tuple[str, str]] = []  # since the last block
        for before, token in zip([None, *tokens], tokens, strict=False):
            if token.type == "html_block":
                notes += self.read_comments(token.content, line_of(token))
            elif token.type in ("fence", "code_block"):
                self.blocks.append(block_of(token, notes))
                notes = []
            elif token.type == "inline":
                self.read_inline(token, is_heading=before is not None and before.type == "heading_open")
                notes = []

    def read_comments(self, text: str, line: int) -> list[tuple[str, str]]:
        notes = COMMENT.findall(text)
        self.made_by += [(line, value) for name, value in notes if name == "made by"]
        return notes

    def read_inline(self, token: Token, is_heading: bool) -> None:
        line = line_of(token)
        for child in token.children or ():
            if child.type == "softbreak":
                line += 1
            elif child.type == "link_open":
                self.links.append(Link(str(child.attrs["href"]), line, is_picture=False))
            elif child.type == "image":
                self.links.append(Link(str(child.attrs["src"]), line, is_picture=True))
            elif child.type == "html_inline":
                self.read_comments(child.content, line)
            elif child.type == "code_inline" and re.match(r"(python \S+\.py|python -m|make|pip) ", child.content + " "):
                self.inline.append((line, child.content))
        if is_heading:
            words = "".join(child.content for child in token.children or () if child.type in ("text", "code_inline"))
            slug = re.sub(r"[^\w\- ]", "", words.lower()).replace(" ", "-")  # as GitHub makes it
            twice = sum(re.fullmatch(rf"{slug}(-\d+)?", other) is not None for other in self.anchors)
            self.anchors.append(f"{slug}-{twice}" if twice else slug)

    @property
    def files(self) -> dict[str, str]:
        """What the page's blocks write: path and text."""
        return {block.file: block.text for block in self.blocks if block.file}

    def commands(self) -> Iterator[Command]:
        """All commands of the page, of blocks that are not run and of comments too."""
        texts = [*self.made_by]
        for block in self.blocks:
            texts += [(block.line, setup) for setup in block.setup]
            if block.language in ("bash", "console", "indented"):
                steps = [step for step in block.steps if not any(line.startswith("error: ") for line in step[2])]
                texts += [(line, command) for line, command, _ in steps]  # without those that are shown to fail
        for is_shortened, found in ((True, self.inline), (False, texts)):
            for line, text in found:
                for words in simple_commands(text):
                    yield Command(tuple(words), line, is_shortened)


def line_of(token: Token) -> int:
    assert token.map is not None
    return token.map[0] + 1


def block_of(token: Token, notes: list[tuple[str, str]]) -> Block:
    is_fence = token.type == "fence"
    block = Block(token.info.strip() if is_fence else "indented", token.content, line_of(token) + is_fence)
    block.long = any(name == "long" for name, _ in notes)
    block.not_run = any(name == "not run" for name, _ in notes)
    block.setup = [value for name, value in notes if name == "setup"]
    return block


def simple_commands(text: str) -> Iterator[list[str]]:
    """The words of each simple command in a line for a shell; those in <> become one word."""
    lexer = shlex.shlex(PLACEHOLDER.sub("placeholder", text), posix=True, punctuation_chars=OPERATORS)
    lexer.whitespace_split = True
    words: list[str] = []
    for word in [*lexer, ";"]:
        if set(word) <= set(OPERATORS):
            if words:
                yield words
            words = []
        elif not word.endswith(("...", "=")) and (words or not re.match(r"[A-Z_]+=", word)):
            words.append(word)
