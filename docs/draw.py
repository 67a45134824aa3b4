"""Draws the state machines of the handbook from their tables in protocol/, as SVG: python docs/draw.py

A test compares the files with what this makes of the tables. What belongs here: where states stand on the page. What
does not: states and transitions (``vhostuser.protocol.ring``, ``vhostuser.protocol.postcopy``).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from html import escape
from pathlib import Path
from typing import Final, NamedTuple

from vhostuser.protocol.postcopy import HANDSHAKE, LOST, Effect, Postcopy
from vhostuser.protocol.ring import RING, Ring, RingEvent

HERE: Final = Path(__file__).parent

_WIDTH, _HEIGHT, _LINE = 210, 64, 15
_STYLE = (
    "text{font:13px sans-serif;text-anchor:middle;fill:#1f2328}.state{fill:#f6f8fa;stroke:#57606a}"
    ".runs{fill:#dafbe1}.title{font-weight:bold}.edge{fill:none;stroke:#0969da;marker-end:url(#head)}"
    ".label{font-size:11px;fill:#0550ae;paint-order:stroke;stroke:#fff;stroke-width:4px}"
)


class State(NamedTuple):
    """A box: its middle, its lines of text. lit: something happens in it."""

    x: float
    y: float
    lines: tuple[str, ...]
    lit: bool = False


Edges = Mapping[tuple[str, str], list[str]]


def picture(width: int, height: int, states: Mapping[str, State], edges: Edges) -> str:
    """The whole drawing. edges: labels of the arrows from one state to another."""
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">',
        f"<style>{_STYLE}</style>",
        '<defs><marker id="head" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0 10 5 0 10z" fill="#0969da"/></marker></defs>',
        f'<rect width="{width}" height="{height}" fill="#fff"/>',
    ]
    arrows = [_arrow(states[a], states[b], labels) for (a, b), labels in edges.items()]
    parts += [path for path, _ in arrows]
    parts += [line for state in states.values() for line in _box(state)]
    parts += [label for _, labels in arrows for label in labels]
    return "\n".join([*parts, "</svg>"]) + "\n"


def _box(state: State) -> Iterator[str]:
    left, top = state.x - _WIDTH / 2, state.y - _HEIGHT / 2
    kind = "state runs" if state.lit else "state"
    yield f'<rect class="{kind}" x="{left:g}" y="{top:g}" width="{_WIDTH}" height="{_HEIGHT}" rx="8"/>'
    first = state.y - (len(state.lines) - 1) * _LINE / 2 + 4
    for number, line in enumerate(state.lines):
        kind = ' class="title"' if not number else ""
        yield f'<text{kind} x="{state.x:g}" y="{first + number * _LINE:g}">{escape(line)}</text>'


def _arrow(start: State, end: State, labels: list[str]) -> tuple[str, list[str]]:
    """A curve that bends to its right, so that those of both directions part; its labels stand on the bend."""
    length = math.hypot(end.x - start.x, end.y - start.y)
    across = (-(end.y - start.y) / length, (end.x - start.x) / length)
    bend = 26 + length / 14
    middle = ((start.x + end.x) / 2 + across[0] * 2 * bend, (start.y + end.y) / 2 + across[1] * 2 * bend)
    a, b = _border(start, middle), _border(end, middle)
    path = f'<path class="edge" d="M{a[0]:.1f} {a[1]:.1f}Q{middle[0]:.1f} {middle[1]:.1f} {b[0]:.1f} {b[1]:.1f}"/>'
    # Across the page, the labels of a diagonal would lie on those of the edges that it crosses.
    t = 0.8 if start.x != end.x and start.y != end.y else 0.5
    x, y = ((1 - t) ** 2 * a[n] + 2 * t * (1 - t) * middle[n] + t**2 * b[n] for n in (0, 1))
    top = y - (len(labels) - 1) * 6.5 + 4
    anchor = "middle" if start.x != end.x else "end" if middle[0] < start.x else "start"
    x += {"middle": 0, "end": -5, "start": 5}[anchor]
    texts = [
        f'<text class="label" style="text-anchor:{anchor}" x="{x:.1f}" y="{top + n * 13:.1f}">{escape(label)}</text>'
        for n, label in enumerate(labels)
    ]
    return path, texts


def _border(state: State, towards: tuple[float, float]) -> tuple[float, float]:
    """Where the line from the middle of the box to a point leaves the box."""
    dx, dy = towards[0] - state.x, towards[1] - state.y
    scale = min(_WIDTH / 2 / abs(dx) if dx else math.inf, _HEIGHT / 2 / abs(dy) if dy else math.inf)
    return state.x + dx * scale, state.y + dy * scale


# ---- ring states

_EVENTS: Final = {
    RingEvent.KICK: "kick",
    RingEvent.POLL: "SET_VRING_KICK without fd",
    RingEvent.STOP: "GET_VRING_BASE",
    RingEvent.ENABLE: "SET_VRING_ENABLE 1",
    RingEvent.DISABLE: "SET_VRING_ENABLE 0",
    RingEvent.RESET: "RESET_DEVICE",
}


def _ring_state(started: bool, enabled: bool) -> str:
    return f"{'started' if started else 'stopped'}, {'enabled' if enabled else 'disabled'}"


def ring_states() -> str:
    """Started and enabled, and what leads from one to the other."""
    states, edges = {}, dict[tuple[str, str], list[str]]()
    for started in (False, True):
        for enabled in (False, True):
            name = _ring_state(started, enabled)
            runs = Ring(started, enabled).runs
            below = "requests are executed" if runs else "no side effects" if started else ""
            lines = (name, below) if below else (name,)
            states[name] = State(650 if started else 270, 330 if enabled else 100, lines, runs)
            for event in RING:
                ring = Ring(started, enabled)
                ring.apply(event)
                if (after := _ring_state(ring.started, ring.enabled)) != name:
                    edges.setdefault((name, after), []).append(_EVENTS[event])
    return picture(920, 430, states, edges)


# ---- the postcopy handshake

_PLACES: Final = {
    Postcopy.IDLE: State(170, 110, ("IDLE", "no postcopy")),
    Postcopy.ADVISED: State(690, 110, ("ADVISED", "the userfaultfd is handed over,", "memory is complete")),
    Postcopy.LISTENING: State(690, 400, ("LISTENING", "memory may have holes"), True),
    Postcopy.AWAITING_ACK: State(170, 400, ("AWAITING_ACK", "bases were sent,", "nothing new is touched")),
}


def postcopy_handshake() -> str:
    """What leads from a state of the handshake to another, with what is done before the answer."""
    edges = dict[tuple[str, str], list[str]]()
    for state, row in HANDSHAKE.items():
        for message, step in row.items():
            if step.next is not state:
                name = "the front-end is lost" if message is LOST else message.name
                does = "" if step.effect is Effect.NOTHING else f": {step.effect.name.lower()}"
                edges.setdefault((state.name, step.next.name), []).append(f"{name}{does}")
    return picture(900, 500, {state.name: place for state, place in _PLACES.items()}, edges)


PICTURES: Final = {"ring-states.svg": ring_states, "postcopy-handshake.svg": postcopy_handshake}

if __name__ == "__main__":
    for name, draw in PICTURES.items():
        (HERE / name).write_text(draw())
