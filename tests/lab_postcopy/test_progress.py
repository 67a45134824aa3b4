"""Progress: a line for each phase and now and then one between, bars for people, nothing when nothing was asked for."""

from __future__ import annotations

import io
import sys

import pytest

from vhostuser.tools.postcopy.progress import Bars, Lines, Silent, suited


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_every_phase_is_a_line_with_the_time_since_the_start() -> None:
    stream = io.StringIO()
    with Lines(stream) as progress:
        progress.phase("handshake")
        progress.phase("pages come")
    one, other = stream.getvalue().splitlines()
    assert one.endswith("s] handshake")
    assert other.endswith("s] pages come")


def test_figures_are_told_now_and_then() -> None:
    stream = io.StringIO()
    seldom, often = Lines(stream, every=3600), Lines(stream, every=0)
    seldom.figures(0.5, 0.25, "7 faults")
    assert not stream.getvalue()
    often.figures(0.5, 0.25, "7 faults")
    assert stream.getvalue().endswith("pages  50%, requests  25%, 7 faults\n")


def test_what_is_suited() -> None:
    assert isinstance(suited(io.StringIO()), Lines)
    assert isinstance(suited(Terminal(), quiet=True), Silent)


def test_a_terminal_gets_bars_where_rich_is_installed() -> None:
    pytest.importorskip("rich")
    with suited(Terminal()) as progress:
        assert isinstance(progress, Bars)
        progress.phase("pages come")
        progress.figures(0.5, 0.25, "7 faults")


def test_a_terminal_gets_lines_where_it_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("rich.console", "rich.progress"):
        monkeypatch.setitem(sys.modules, name, None)
    assert isinstance(suited(Terminal()), Lines)
