"""The fenced blocks of the documentation, and the marks above them that say how a block is run.

What belongs here: Markdown as text, marks, what is wrong with them. What does not: running anything (``runner``).

A mark is an HTML comment, which no reader sees, directly above the block. Without one, a block of shell commands or
of Python is run as it stands. Its marks:

    <!-- run by tests/interop/test_disk.py::test_reads_and_writes -->    it is not run here: that test does the same;
                                                                        several with commas, or a script (.ci/run)
    <!-- quoted from examples/ramdisk.py -->    each of its lines (but "..." and comments) stands there too, in order
    <!-- before: COMMANDS -->                   run first, on one line or on many; in the language of the block
    <!-- after: COMMANDS -->                    run then
    <!-- in the background -->                  shell only: it does not end by itself, and is ended after the rest
    <!-- exits 1 -->                            shell only: the status of its last command
    <!-- saved as disk.py -->                   the reader saves it in a file of that name
    <!-- continues -->                          in the same directory and shell as the block above
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parents[2]

SHELL: Final = frozenset({"sh", "bash", "shell", "console"})
RUNNABLE: Final = SHELL | {"python"}

_FENCE = re.compile(r"^(?P<indent>\s*)(?P<ticks>```+)(?P<language>[\w-]*)\s*$")
_COMMENT = re.compile(r"<!--(.*?)-->", re.DOTALL)
_MARKS = {
    "run by": re.compile(r"run by (?P<value>.+)", re.DOTALL),
    "quoted from": re.compile(r"quoted from (?P<value>\S+)"),
    "before": re.compile(r"before:(?P<value>.*)", re.DOTALL),
    "after": re.compile(r"after:(?P<value>.*)", re.DOTALL),
    "in the background": re.compile(r"in the background(?P<value>)"),
    "exits": re.compile(r"exits (?P<value>\d+)"),
    "saved as": re.compile(r"saved as (?P<value>[\w./-]+)"),
    "continues": re.compile(r"continues(?P<value>)"),
}


@dataclass(frozen=True)
class Block:
    """One fenced block: where its fence is, its text, its marks by their names."""

    page: str
    line: int
    language: str
    text: str
    marks: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def run_here(self) -> bool:
        """Is it the harness that runs it, or needs it?"""
        if {"run by", "quoted from"} & self.marks.keys():
            return False
        return self.language in RUNNABLE or "saved as" in self.marks


class MarkError(Exception):
    """A comment that begins like a mark and is none, or stands above nothing."""


def pages() -> list[Path]:
    """Every page of the project that people read."""
    found = {*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/**/*.md")}
    return sorted(path for path in found if "_build" not in path.parts)


def blocks(page: str, text: str) -> Iterator[Block]:
    """The blocks of a page. Raises MarkError."""
    lines = text.splitlines()
    number = above = 0
    while number < len(lines):
        opening = _FENCE.match(lines[number])
        if not opening:
            number += 1
            continue
        end = _closing(lines, number, opening["ticks"])
        body = "\n".join(line.removeprefix(opening["indent"]) for line in lines[number + 1 : end])
        marks = _marks(f"{page}:{number + 1}", "\n".join(lines[above:number]))
        yield Block(page, number + 1, opening["language"], body + "\n", marks)
        number = above = end + 1
    _marks(f"{page}: end", "\n".join([*lines[above:], "."]))


def sequences(found: Sequence[Block]) -> list[list[Block]]:
    """The blocks that are run here: each with those that continue it. Raises MarkError."""
    whole: list[list[Block]] = []
    for block in (block for block in found if block.run_here):
        if "continues" not in block.marks:
            whole.append([block])
        elif whole and whole[-1][0].page == block.page:
            whole[-1].append(block)
        else:
            raise MarkError(f"{block}: continues, but no block above it is run")
    return whole


def _closing(lines: list[str], opening: int, ticks: str) -> int:
    return next((n for n in range(opening + 1, len(lines)) if lines[n].strip() == ticks), len(lines))


def _marks(place: str, above: str) -> dict[str, str]:
    """The marks among the comments of the text between two blocks; they must be the last of it."""
    found = {}
    for comment in _COMMENT.finditer(above):
        mark = _mark(place, comment[1].strip())
        if mark is None:
            continue
        if _COMMENT.sub("", above[comment.end() :]).strip():
            raise MarkError(f"{place}: the mark {comment[0]!r} stands above text and not directly above a block")
        found[mark[0]] = mark[1]
    return found


def _mark(place: str, words: str) -> tuple[str, str] | None:
    for name, pattern in _MARKS.items():
        if matched := pattern.fullmatch(words):
            return name, matched["value"].strip()
        if words.startswith(name):
            raise MarkError(f"{place}: {words!r} is no mark; tests/docs/blocks.py has the list")
    return None


# ---- is what a mark says so?


def complaints(block: Block) -> Iterator[str]:
    """What is wrong with the marks of a block, a line each."""
    if "run by" in block.marks:
        for test in block.marks["run by"].split(","):
            yield from (f"{block}: run by {test.strip()}: {why}" for why in _untrue_test(test.strip(), block))
    if "quoted from" in block.marks:
        yield from (f"{block}: {why}" for why in _unquoted(block))
    if block.language not in RUNNABLE and block.marks.keys() - {"saved as", "continues"}:
        yield f"{block}: has marks, but is no block of {', '.join(sorted(RUNNABLE))}"
    if not block.language and (command := _like_a_command(block.text)):
        yield f"{block}: {command!r} looks like a command; say that it is sh, or text"


def _untrue_test(test: str, block: Block) -> Iterator[str]:
    name, _, function = test.partition("::")
    path = ROOT / name
    if not path.is_file():
        yield "there is no such file"
        return
    text = path.read_text()
    if path.suffix == ".py":
        functions = {node.name for node in ast.walk(ast.parse(text)) if isinstance(node, _FUNCTIONS)}
        if not function or function not in functions or not function.startswith("test_"):
            yield f"name the test: {name} has no {function or 'TEST'!r}"
    elif not any(line.split("#")[0].strip() in text for line in block.text.splitlines() if line.strip()):
        yield "it runs none of these commands"


_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def _unquoted(block: Block) -> Iterator[str]:
    path = ROOT / block.marks["quoted from"]
    if not path.is_file():
        yield f"quoted from {path}: there is no such file"
        return
    source = iter([_code(line) for line in path.read_text().splitlines()])
    for line in block.text.splitlines():
        if _code(line) not in ("", "...") and _code(line) not in source:
            yield f"{line!r} does not stand in {block.marks['quoted from']}, or not behind the line before it"
            return


_COMMAND = re.compile(
    r"\$ |vhostuser(-\w+)? (--|[a-z]+ --)|python3? [-\w/]+\.py|pip install |tools/\w+( |$)|qemu-system-\w+ -|sudo "
)


def _code(line: str) -> str:
    return re.sub(r"\s+# .*$", "", line).strip()


def _like_a_command(text: str) -> str:
    return next((line for line in text.splitlines() if _COMMAND.match(line)), "")
