"""Parts of a run on their own: the source's link, the command line of a back-end, memory that the machine lacks."""

from __future__ import annotations

from pathlib import Path

import pytest

from vhostuser.tools.postcopy import guest as guest_module
from vhostuser.tools.postcopy.guest import Guest, GuestError
from vhostuser.tools.postcopy.options import parse
from vhostuser.tools.postcopy.pages import Pages, PagesError
from vhostuser.tools.postcopy.plan import Area, Plan, Shape, make_plan
from vhostuser.tools.postcopy.source import Link, pieces
from vhostuser.tools.postcopy.subject import Place, command_line
from vhostuser.tools.postcopy.truth import Truth

MIB = 1 << 20


def plan(page_size: int = 4096) -> Plan:
    return make_plan(Shape(4 * max(2 * MIB, 2 * page_size), 2, page_size, 1, 6000))


def test_what_goes_over_the_link_takes_its_turn() -> None:
    link = Link(1000)
    assert link.through(500, now=10.0) == 10.5
    assert link.through(500, now=10.1) == 11.0
    assert link.through(500, now=20.0) == 20.5


def test_a_link_without_a_limit_takes_no_time() -> None:
    assert Link(0).through(1 << 30, now=3.0) == 3.0


def test_zeros_are_cut_out_page_by_page() -> None:
    page, zero = b"x" * 8, bytes(8)
    assert list(pieces(page + zero + zero + page + page, 8)) == [(0, page), (8, 16), (24, page + page)]
    assert list(pieces(zero, 8)) == [(0, 8)]
    half = bytes(4) + b"x" * 4
    assert list(pieces(half, 8)) == [(0, half)]


def test_names_in_a_command_are_filled_in_word_by_word() -> None:
    place = Place(Path("/a b/s"), Path("/d"), Path("/w"))
    words = command_line("blk --socket={socket} '{disk} {other}' --wake {wake} -n{number}", 3, place)
    assert words == ["blk", "--socket=/a b/s", "/d {other}", "--wake", "/w", "-n3"]


@pytest.mark.parametrize("one_file", [False, True], ids=["files", "one-file"])
def test_emptied_memory_reads_as_zeros_and_stays_empty(one_file: bool) -> None:
    with Guest(plan(), one_file=one_file) as guest:
        guest.write(0, b"content")
        assert (guest.present, guest.read(Area(0, 7))) == (1, b"content")
        guest.empty()
        assert guest.read(Area(0, 7)) == bytes(7)
        assert guest.read(Area(1 << 30, 2 * MIB)) == bytes(2 * MIB)
        assert guest.present == 0


def test_regions_in_one_file_do_not_lie_upon_each_other() -> None:
    with Guest(plan(), one_file=True) as guest:
        guest.write(0, b"below")
        guest.write(1 << 30, b"above")
        assert (guest.read(Area(0, 5)), guest.read(Area(1 << 30, 5))) == (b"below", b"above")
        assert guest.present == 2
        assert len({region.region.inode for region in guest.memory.regions}) == 1


@pytest.mark.parametrize("content", ["1\n", None], ids=["too-few", "none"])
def test_huge_pages_that_are_not_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: str | None) -> None:
    free = tmp_path / "free_hugepages"
    if content is not None:
        free.write_text(content)
    monkeypatch.setattr(guest_module, "_FREE", free)
    with pytest.raises(GuestError, match=r"^--page-size=2M: [^\n]*2 MiB[^\n]*$"):
        Guest(plan(2 * MIB))


def test_neighbouring_pages_are_put_together_and_regions_are_not() -> None:
    made = plan()
    pages = [4096, 0, 3 * 4096, 4 * MIB - 4096, 1 << 30]
    assert made.runs(pages) == [Area(0, 8192), Area(3 * 4096, 4096), Area(4 * MIB - 4096, 4096), Area(1 << 30, 4096)]


def test_pages_that_cannot_be_placed_are_not_waited_for(permitted: None) -> None:
    options = parse("test", ["--memory=8"])
    made = plan()
    with Guest(made) as guest, Pages(guest.memory, Truth(made, 1), made, options, options.wakes[0]) as pages:
        pages.check()
        pages.release()
        pages.check()
        pages._server.pause()
        with pytest.raises(PagesError, match=r"^pages cannot be placed any more: [^\n]*$"):
            pages.check()
