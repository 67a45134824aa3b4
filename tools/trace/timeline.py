"""A transcript as a picture: who waits for whom, the rings' states and the phases of postcopy, over time. Pure: the
entries of a transcript in, SVG out.

What belongs here: what is drawn where. What does not: transcripts (``jsonlines``), reading them (``replay``).

Messages come in bursts with long pauses between them, so that the time between two is drawn longer the longer it is,
but by its logarithm; what it is stands below.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from html import escape
from itertools import pairwise
from typing import Any, Final

from vhostuser.protocol.witness import Side, Wire
from vhostuser.tools.trace.words import duration

Entry = dict[str, Any]

_LEFT, _RIGHT, _TOP = 96.0, 24.0, 150.0
_GAP, _LANE, _BAND = 70.0, 26.0, 14.0
_SHORTEST, _BY_TENS = 15.0, 11.0
"""Width between two messages: the least, and what each power of ten above 10 us adds."""
_TOLD = 1_000_000
"""Nanoseconds from which a pause or a wait is told in words."""

# Okabe and Ito's colours, which people tell apart whatever their eyes.
_FRONT, _BACK, _WRONG, _QUIET = "#0072b2", "#d55e00", "#cc0000", "#bbbbbb"
_RINGS: Final = {"stopped": "#dddddd", "starts when kicked": "#f0e442", "runs": "#009e73", "disabled": "#e69f00"}
_PHASES: Final = {"advised": "#dddddd", "listening": "#56b4e9", "awaiting ack": "#009e73", "pages missing": "#cc79a7"}


@dataclass(frozen=True)
class Span:
    """From one time to another, in nanoseconds. end: None where it goes on to the end."""

    what: str
    start: int
    end: int | None = None


@dataclass
class Chart:
    """What a connection's transcript says. rings, phases: spans of states. waits: spans by whose they are."""

    messages: list[Entry] = field(default_factory=list)
    waits: list[tuple[Side, Span]] = field(default_factory=list)
    rings: dict[int, list[Span]] = field(default_factory=dict)
    phases: list[Span] = field(default_factory=list)


def chart(entries: Iterable[Entry], connection: int = 1) -> Chart:
    """Reads one connection's messages."""
    found = Chart()
    pending: dict[tuple[str, int], Span] = {}
    for entry in entries:
        if entry["event"] != "message" or entry["connection"] != connection:
            continue
        found.messages.append(entry)
        key = (entry["socket"], entry["id"])
        if entry["kind"] == "reply" and entry["latency"] is not None:
            pending.pop(key, None)
            asker = Wire(entry["socket"]).asker
            found.waits.append((asker, Span(entry["message"], entry["at"] - entry["latency"], entry["at"])))
        elif entry["awaits"]:
            pending[key] = Span(entry["message"], entry["at"])
        for ring in entry["rings"]:
            _change(found.rings.setdefault(ring["index"], []), _ring(ring), entry["at"])
        phase = _phase(entry, found.phases)
        if phase is not None:
            _change(found.phases, phase, entry["at"])
    found.waits += [(Wire(socket).asker, span) for (socket, _), span in pending.items()]
    return found


def _ring(ring: Entry) -> str:
    if not ring["started"] and not ring["armed"]:
        return "stopped"
    if not ring["enabled"]:
        return "disabled"
    return "runs" if ring["started"] else "starts when kicked"


def _phase(entry: Entry, so_far: Sequence[Span]) -> str | None:
    """The phase that begins with this message; empty: none any more; None: nothing changes."""
    request = entry["kind"] == "request"
    listening = bool(so_far) and so_far[-1].what not in ("", "advised")
    match entry["message"]:
        case "POSTCOPY_ADVISE" if request and not listening:
            return "advised"
        case "POSTCOPY_LISTEN" if not request:
            return "listening"
        case "SET_MEM_TABLE" | "ADD_MEM_REG" if listening and request:
            return "awaiting ack"
        case "POSTCOPY_ACK":
            return "pages missing"
        case "POSTCOPY_END" if not request:
            return ""
    return None


def _change(spans: list[Span], what: str, at: int) -> None:
    if spans and spans[-1].end is None:
        if spans[-1].what == what:
            return
        spans[-1] = Span(spans[-1].what, spans[-1].start, at)
    spans.append(Span(what, at))


class Axis:
    """Where a time is drawn."""

    def __init__(self, times: Iterable[int]) -> None:
        self._times = sorted(set(times)) or [0]
        self._places = [_LEFT + 20]
        for before, after in pairwise(self._times):
            self._places.append(self._places[-1] + _width(after - before))

    @property
    def end(self) -> float:
        """Where the last one is, and a little more."""
        return self._places[-1] + 30

    def at(self, time: int | None) -> float:
        """The place of one of the times; of None the end."""
        return self.end if time is None else self._places[self._times.index(time)]

    def pauses(self) -> Iterator[tuple[float, int]]:
        """Those that are worth telling: the middle, and how long, in nanoseconds."""
        for times, places in zip(pairwise(self._times), pairwise(self._places), strict=True):
            if (length := times[1] - times[0]) >= _TOLD:
                yield sum(places) / 2, length


def _width(nanoseconds: int) -> float:
    return _SHORTEST + _BY_TENS * max(0.0, math.log10(nanoseconds / 10_000))


# ---- drawing


def svg(entries: Iterable[Entry], connection: int = 1) -> str:
    """The picture of one connection. Raises ValueError if the transcript has no message of it."""
    found = chart(entries, connection)
    if not found.messages:
        raise ValueError(f"connection {connection} of this transcript has no message")
    axis = Axis(time for span in _spans(found) for time in (span.start, span.end) if time is not None)
    lanes = [*_lanes(found)]
    bottom = _TOP + _GAP + 34 + _LANE * len(lanes)
    width, height = axis.end + _RIGHT, bottom + 44
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height:.0f}" '
        f'font-family="sans-serif" font-size="10">',
        f'<rect width="{width:.0f}" height="{height:.0f}" fill="white"/>',
        *_pauses(axis, bottom),
        *_sides(found, axis),
        *(part for message in found.messages for part in _message(message, axis)),
        *(part for n, lane in enumerate(lanes) for part in _lane(*lane, axis, _TOP + _GAP + 34 + _LANE * n)),
        *_legend(found, height - 10),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _spans(found: Chart) -> Iterator[Span]:
    yield from (Span("", message["at"], message["at"]) for message in found.messages)
    yield from (span for _, span in found.waits)


def _lanes(found: Chart) -> Iterator[tuple[str, list[Span], dict[str, str]]]:
    yield from ((f"ring {index}", spans, _RINGS) for index, spans in sorted(found.rings.items()))
    if found.phases:
        yield "postcopy", found.phases, _PHASES


def _text(x: float, y: float, text: str, more: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" {more}>{escape(text)}</text>'


def _line(x1: float, y1: float, x2: float, y2: float, more: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" {more}/>'


def _sides(found: Chart, axis: Axis) -> Iterator[str]:
    """A line for each end, thick while it waits for an answer."""
    for side, y, colour in ((Side.FRONTEND, _TOP, _FRONT), (Side.BACKEND, _TOP + _GAP, _BACK)):
        yield _text(8, y + 4, side.value, f'fill="{colour}" font-weight="bold"')
        yield _line(_LEFT, y, axis.end, y, f'stroke="{colour}" stroke-width="1"')
        for span in (span for whose, span in found.waits if whose is side):
            yield from _wait(span, axis, y, colour)


def _wait(span: Span, axis: Axis, y: float, colour: str) -> Iterator[str]:
    start, end = axis.at(span.start), axis.at(span.end)
    unanswered = span.end is None
    stroke = f'stroke="{_WRONG if unanswered else colour}" stroke-width="7" stroke-opacity="0.55"'
    yield _line(start, y, end, y, stroke)
    if span.end is not None and span.end - span.start >= _TOLD:
        yield _text((start + end) / 2, y - 7, duration(span.end - span.start), f'fill="{colour}" text-anchor="middle"')


def _message(message: Entry, axis: Axis) -> Iterator[str]:
    """An arrow from one end to the other, its name above; red where it breaks a rule; a dot for each descriptor."""
    x = axis.at(message["at"])
    down = message["from"] == Side.FRONTEND.value
    start, end = (_TOP, _TOP + _GAP) if down else (_TOP + _GAP, _TOP)
    head = end - 7 if down else end + 7
    colour = _WRONG if message["violations"] or message["faults"] else _FRONT if down else _BACK
    dashed = ' stroke-dasharray="3 2"' if message["kind"] == "reply" else ""
    yield _line(x, start, x, head, f'stroke="{colour}"{dashed}')
    yield f'<path d="M{x - 3:.1f} {head:.1f}h6L{x:.1f} {end:.1f}z" fill="{colour}"/>'
    for number in range(len(message["fds"])):
        y = start + (14 + 7 * number) * (1 if down else -1)
        yield f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5" fill="{colour}"/>'
    if message["kind"] == "request":
        place = f'transform="rotate(-60 {x:.1f} {_TOP - 16:.1f})" fill="{colour}"'
        yield _text(x, _TOP - 16, message["message"], place)


def _lane(name: str, spans: Sequence[Span], colours: dict[str, str], axis: Axis, y: float) -> Iterator[str]:
    yield _text(8, y + 11, name)
    for span in spans:
        if not span.what:
            continue
        start, end = axis.at(span.start), axis.at(span.end)
        box = f'x="{start:.1f}" y="{y:.1f}" width="{end - start:.1f}" height="{_BAND:.0f}"'
        yield f'<rect {box} fill="{colours[span.what]}"><title>{escape(span.what)}</title></rect>'


def _pauses(axis: Axis, bottom: float) -> Iterator[str]:
    for x, length in axis.pauses():
        yield _line(x, _TOP, x, bottom, f'stroke="{_QUIET}" stroke-dasharray="1 3"')
        yield _text(x, bottom + 12, duration(length), 'fill="#666666" text-anchor="middle" font-size="8"')


def _legend(found: Chart, y: float) -> Iterator[str]:
    """What the bands' colours mean, of those that there are."""
    x = _LEFT
    told = {span.what: colours[span.what] for _, spans, colours in _lanes(found) for span in spans if span.what}
    for what, colour in told.items():
        yield f'<rect x="{x:.0f}" y="{y - 9:.0f}" width="10" height="10" fill="{colour}"/>'
        yield _text(x + 14, y, what)
        x += 26 + 6 * len(what)
