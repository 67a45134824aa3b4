"""The picture of a transcript: waits, rings and phases from its entries, and SVG that is well formed."""

import json
from itertools import pairwise
from xml.etree import ElementTree

import pytest

from vhostuser.protocol import (
    NEED_REPLY,
    REPLY,
    U64,
    VERSION,
    Empty,
    MemoryRegion,
    PostcopyAck,
    SingleRegion,
    VringFd,
    VringState,
    encode,
)
from vhostuser.protocol import FrontendRequest as F
from vhostuser.protocol import ProtocolFeature as P
from vhostuser.protocol.witness import Side, Wire
from vhostuser.tools.trace import jsonlines
from vhostuser.tools.trace.events import Descriptor, Sighting
from vhostuser.tools.trace.observer import Observer
from vhostuser.tools.trace.timeline import Axis, Entry, Span, chart, svg

MS = 1_000_000
REGION = SingleRegion(MemoryRegion(0, 4096, 1 << 40, 0))
WANTED = U64(P.PAGEFAULT.mask | P.CONFIGURE_MEM_SLOTS.mask | P.REPLY_ACK.mask)
FEATURES = U64(1 << 30 | 1 << 32)


def transcript() -> list[Entry]:
    """A destination of a migration, a message a millisecond."""
    eventfd, memory = Descriptor("eventfd"), Descriptor("memfd", 4096)
    said: list[
        tuple[F, Empty | U64 | SingleRegion | VringFd | VringState | PostcopyAck | None, bool, tuple[Descriptor, ...]]
    ]
    said = [
        (F.GET_FEATURES, None, False, ()),
        (F.GET_FEATURES, FEATURES, True, ()),
        (F.GET_PROTOCOL_FEATURES, None, False, ()),
        (F.GET_PROTOCOL_FEATURES, WANTED, True, ()),
        (F.SET_PROTOCOL_FEATURES, WANTED, False, ()),
        (F.SET_FEATURES, FEATURES, False, ()),
        (F.POSTCOPY_ADVISE, None, False, ()),
        (F.POSTCOPY_ADVISE, Empty(), True, (Descriptor("userfaultfd"),)),
        (F.POSTCOPY_LISTEN, None, False, ()),
        (F.POSTCOPY_LISTEN, U64(0), True, ()),
        (F.ADD_MEM_REG, REGION, False, (memory,)),
        (F.ADD_MEM_REG, REGION, True, ()),
        (F.POSTCOPY_ACK, PostcopyAck(), False, ()),
        (F.SET_VRING_KICK, VringFd(0), False, (eventfd,)),
        (F.SET_VRING_ENABLE, VringState(0, 1), False, ()),
        (F.POSTCOPY_END, None, False, ()),
        (F.POSTCOPY_END, U64(0), True, ()),
        (F.GET_VRING_BASE, VringState(0), False, ()),
    ]
    observer = Observer()
    entries = []
    for number, (code, payload, reply, fds) in enumerate(said):
        asks = NEED_REPLY if code is F.POSTCOPY_LISTEN and not reply else 0
        data = encode(code or F.ADD_MEM_REG, VERSION | (REPLY if reply else asks), payload or Empty())
        side = Side.BACKEND if reply else Side.FRONTEND
        (event,) = observer.see(Sighting(number * MS, 1, Wire.MAIN, side, data, fds))
        entries.append(json.loads(jsonlines.line(event)))
    return entries


def test_who_waits_and_what_was_never_answered() -> None:
    waits = chart(transcript()).waits
    assert waits[0] == (Side.FRONTEND, Span("GET_FEATURES", 0, MS))
    assert waits[-1] == (Side.FRONTEND, Span("GET_VRING_BASE", 17 * MS))


def test_states_of_rings() -> None:
    spans = chart(transcript()).rings[0]
    assert [(span.what, span.start // MS) for span in spans] == [("disabled", 13), ("starts when kicked", 14)]


def test_phases_of_postcopy() -> None:
    spans = chart(transcript()).phases
    assert [(span.what, span.start // MS) for span in spans] == [
        ("advised", 6),
        ("listening", 9),
        ("awaiting ack", 10),
        ("pages missing", 12),
        ("", 16),
    ]


def test_other_connections_are_left_out() -> None:
    entries = transcript()
    assert len(chart([*entries, *({**entry, "connection": 2} for entry in entries)]).messages) == len(entries)
    with pytest.raises(ValueError, match="connection 3"):
        svg(entries, connection=3)


def test_the_axis_keeps_the_order_and_draws_longer_what_was_longer() -> None:
    axis = Axis([5, 5 + 10 * MS, 6 + 10 * MS, 6 + 20_000 * MS])
    places = [axis.at(time) for time in (5, 5 + 10 * MS, 6 + 10 * MS, 6 + 20_000 * MS)]
    gaps = [after - before for before, after in pairwise(places)]
    assert gaps[1] < gaps[0] < gaps[2]
    assert [length for _, length in axis.pauses()] == [10 * MS, 19_990 * MS]
    assert axis.at(None) > places[-1]


def test_the_picture() -> None:
    root = ElementTree.fromstring(svg(transcript()))
    texts = [text.text for text in root.iter("{http://www.w3.org/2000/svg}text")]
    for wanted in ("front-end", "POSTCOPY_LISTEN", "ring 0", "postcopy", "awaiting ack", "starts when kicked"):
        assert wanted in texts
    assert texts.count("GET_VRING_BASE") == 1


def test_what_breaks_a_rule_is_red() -> None:
    entries = transcript()
    assert svg(entries).count("#cc0000") == 1  # the request that has no answer
    entries[5]["violations"] = [{"section": "x", "reason": "y"}]
    assert svg(entries).count("#cc0000") > 1
