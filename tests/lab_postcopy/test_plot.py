"""What is drawn, as numbers; and that it can be drawn, where matplotlib is installed."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from vhostuser.tools.postcopy.plot import Bars, PlotError, Points, bars, draw, require, timeline
from vhostuser.tools.postcopy.record import Event, Happening, Record
from vhostuser.tools.postcopy.report import Result
from vhostuser.tools.postcopy.rules import judge

Good = Callable[..., Record]
MIB = 1 << 20
PAGE = 4096


def test_times_count_from_the_first_kick_and_places_without_the_holes(good: Good) -> None:
    record = good()
    record.events = [Event(12_500_000, Happening.PLACED, None, (1 << 30) + MIB, PAGE)]
    assert timeline(record).placed == Points([3.5], [3.0])


def test_a_run_of_pages_is_a_point_for_each(good: Good) -> None:
    record = good()
    record.events = [Event(10_000_000, Happening.WOKEN, 0, 0, 3 * PAGE)]
    assert len(timeline(record).lanes[0].wakes.ms) == 3


def test_a_lane_for_each_client_and_one_for_our_threads_if_they_waited(good: Good) -> None:
    record = good(2)
    assert [lane.name for lane in timeline(record).lanes] == ["blk 0", "blk 1"]
    record.events.append(Event(10_000_000, Happening.FAULT, None, 0, PAGE))
    assert [lane.name for lane in timeline(record).lanes] == ["blk 0", "blk 1", ""]


def test_bars_cover_what_was_seen_and_no_more(good: Good) -> None:
    record = good(2)
    record.events = [replace(e, at=e.at - 80_000) if (e.client, e.kind) == (1, "woken") else e for e in record.events]
    assert bars(record) == Bars([4, 5, 6, 7], [("blk 0", [0, 0, 2]), ("blk 1", [2, 0, 0])])
    assert bars(Record()) == Bars([], [])


@pytest.mark.parametrize("kind", ["svg", "png"])
@pytest.mark.parametrize("runs", [1, 3], ids=["one", "three"])
def test_it_can_be_drawn(good: Good, tmp_path: Path, kind: str, runs: int) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / f"picture.{kind}"
    record = good(2)
    draw([Result({}, record, judge(record))] * runs, path)
    assert path.read_bytes().startswith({"svg": b"<?xml", "png": b"\x89PNG"}[kind])


def test_a_run_without_a_fault_can_be_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    draw([Result({}, Record(), judge(Record()))], tmp_path / "picture.svg")


def test_without_matplotlib_it_is_said_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(PlotError, match=r"^--plot needs matplotlib: pip install 'vhostuser\[plots\]'$"):
        require()


def test_a_file_that_cannot_be_written_is_said_in_one_line(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    with pytest.raises(PlotError, match=r"^--plot: .*: No such file or directory$"):
        draw([Result({}, Record(), judge(Record()))], tmp_path / "nowhere" / "picture.svg")
