"""Every command and every snippet of the documentation is run, here or by the test that its mark names.

How a block is marked: tests/docs/blocks.py. What it finds when it is run: tests/docs/runner.py.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.docs import links, options
from tests.docs.blocks import ROOT, SHELL, Block, MarkError, blocks, complaints, pages, sequences
from tests.docs.resembles import resembles
from tests.docs.runner import BlockFailed, run

PAGES = pages()


def read(page: Path) -> list[Block]:
    try:
        return list(blocks(str(page.relative_to(ROOT)), page.read_text()))
    except MarkError:
        return []  # test_marks_say_what_is_so tells


BLOCKS = [block for page in PAGES for block in read(page)]


@pytest.fixture
def directory() -> Iterator[Path]:
    """Its path is short enough for a socket in it, which tmp_path's need not be."""
    with tempfile.TemporaryDirectory(prefix="vhu-") as name:
        yield Path(name)


def case(sequence: list[Block]) -> pytest.param:
    """With the time that it may take: a guest boots in some seconds, or in many on a busy machine."""
    guest = any("qemu-system" in block.text for block in sequence)
    marks = [pytest.mark.interop, pytest.mark.timeout(170)] if guest else []
    return pytest.param(sequence, 150 if guest else 50, id=str(sequence[0]), marks=marks)


@pytest.mark.parametrize(("sequence", "patience"), [case(sequence) for sequence in sequences(BLOCKS)])
def test_a_block_does_what_the_page_says(sequence: list[Block], patience: float, directory: Path) -> None:
    run(sequence, directory, patience)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_marks_say_what_is_so(page: Path) -> None:
    assert [line for block in blocks(str(page.relative_to(ROOT)), page.read_text()) for line in complaints(block)] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_paths_lead_somewhere(page: Path) -> None:
    assert list(links.broken(page)) == []


def test_options_exist() -> None:
    used = {option: str(page.relative_to(ROOT)) for page in PAGES for option in options.named(page.read_text())}
    used |= {option: str(b) for b in BLOCKS if b.language in SHELL for option in options.in_commands(b.text)}
    unknown = {option: place for option, place in used.items() if option not in options.known()}
    assert unknown == {}, "no program of ours has these; those of others belong to FOREIGN in tests/docs/options.py"


# ---- the harness itself


def one(*lines: str) -> Block:
    (block,) = blocks("page.md", "\n".join(lines))
    return block


def test_a_block_without_a_mark_is_run_here() -> None:
    assert one("```sh", "true", "```").run_here
    assert one("text", "", "```python", "pass", "```").run_here
    assert not one("```json", "{}", "```").run_here
    assert not one("<!-- run by tests/x.py::test_x -->", "```sh", "true", "```").run_here


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (["<!-- run by tests/nowhere.py::test_x -->", "```sh", "true", "```"], "no such file"),
        (["<!-- run by tests/docs/test_pages.py -->", "```sh", "true", "```"], "name the test"),
        (["<!-- run by tests/docs/test_pages.py::test_gone -->", "```sh", "true", "```"], "has no 'test_gone'"),
        (["<!-- run by .ci/run -->", "```sh", "rm -rf build", "```"], "runs none of these"),
        (["<!-- quoted from examples/ramdisk.py -->", "```python", "x = nonsense", "```"], "does not stand in"),
        (["```", "vhostuser doctor --json", "```"], "looks like a command"),
        (["<!-- in the background -->", "```json", "{}", "```"], "no block of"),
    ],
)
def test_what_is_wrong_with_a_mark_is_said(lines: list[str], said: str) -> None:
    (complaint,) = complaints(one(*lines))
    assert said in complaint
    assert "page.md:" in complaint


@pytest.mark.parametrize(
    "lines",
    [
        ["<!-- run by test -->", "", "Then:", "```sh", "true", "```"],
        ["<!-- exits badly -->", "```sh", "true", "```"],
        ["```sh", "true", "```", "<!-- after: true -->"],
    ],
)
def test_a_mark_that_belongs_to_nothing_is_an_error(lines: list[str]) -> None:
    with pytest.raises(MarkError):
        list(blocks("page.md", "\n".join(lines)))


@pytest.mark.parametrize(
    "lines",
    [
        ["```sh", "false", "true", "```"],
        ["<!-- exits 1 -->", "```sh", "true", "```"],
        ["<!-- before: false -->", "```sh", "true", "```"],
        ["```console", "$ echo one", "two", "```"],
        ["```python", "raise ValueError", "```"],
        ["```sh", "true", "```", "<!-- continues -->", "```sh", "false", "```"],
    ],
)
def test_what_fails_is_found(lines: list[str], directory: Path) -> None:
    with pytest.raises(BlockFailed, match=r"page\.md:"):
        run(list(blocks("page.md", "\n".join(lines))), directory)


@pytest.mark.parametrize(
    "lines",
    [
        ["<!-- exits 3 -->", "```sh", "exit 3", "```"],
        ["<!-- before: touch /tmp/it", "-->", "<!-- after: test -e here -->", "```sh", "mv /tmp/it here", "```"],
        ["<!-- in the background -->", "<!-- after: echo done -->", "```sh", "sleep 1000", "```"],
        ["```console", "$ echo one; echo two; echo three", "one", "...", "$ true", "```"],
        ["<!-- before: import asyncio -->", "```python", "await asyncio.sleep(0)", "```"],
        ["<!-- saved as x -->", "```json", "{}", "```", "<!-- continues -->", "```sh", "test $(cat x) = '{}'", "```"],
    ],
)
def test_what_does_its_part_passes(lines: list[str], directory: Path) -> None:
    run(list(blocks("page.md", "\n".join(lines))), directory)


def test_what_a_program_says_may_be_abridged() -> None:
    assert resembles("a 1\nb\nc [2]*?\n", "a ...\n...\nc [2]*?")
    assert not resembles("a 1\nb\n", "a ...\nc")
