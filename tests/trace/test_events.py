"""From sightings to lines: the observer, the text, the JSON, the options of faults. No sockets."""

import json

import pytest

from vhostuser.protocol import NEED_REPLY, REPLY, U64, VERSION, Header, VringState, encode
from vhostuser.protocol import FrontendRequest as F
from vhostuser.protocol.witness import Side, Wire
from vhostuser.tools.trace import jsonlines, text
from vhostuser.tools.trace.events import Descriptor, Event, Inquiry, Notice, Over, Passed, Sighting, Waits
from vhostuser.tools.trace.faults import FaultError, Faults, Kind, parse
from vhostuser.tools.trace.observer import Observer

MS = 1_000_000
ASK = encode(F.GET_FEATURES, VERSION)
OFFER = encode(F.GET_FEATURES, VERSION | REPLY, U64(1 << 30 | 1 << 32))


def front(at: int, data: bytes, *fds: Descriptor) -> Sighting:
    return Sighting(at, 1, Wire.MAIN, Side.FRONTEND, data, fds)


def back(at: int, data: bytes, *fds: Descriptor) -> Sighting:
    return Sighting(at, 1, Wire.MAIN, Side.BACKEND, data, fds)


def events(*seen: Sighting | Over | Inquiry | Notice, observer: Observer | None = None) -> list[Event]:
    observer = observer or Observer()
    return [event for one in seen for event in observer.see(one)]


def test_an_answer_has_its_latency() -> None:
    asked, answered = events(front(5 * MS, ASK), back(8 * MS, OFFER))
    assert isinstance(asked, Passed)
    assert isinstance(answered, Passed)
    assert asked.latency is None
    assert answered.latency == 3 * MS


def test_who_waits_too_long_is_told_and_again_at_twice_the_time() -> None:
    observer = Observer(patience=10 * MS)
    list(observer.see(front(5 * MS, ASK)))
    assert observer.next_due() == 15 * MS
    assert not list(observer.overdue(14 * MS))
    (waits,) = observer.overdue(15 * MS)
    assert text.lines(waits) == (
        "    0.015000 1 the front-end has waited for 10 ms for the back-end's answer to GET_FEATURES"
    )
    assert observer.next_due() == 25 * MS
    list(observer.see(back(20 * MS, OFFER)))
    assert observer.next_due() is None


def test_what_was_never_answered_is_told_at_the_end() -> None:
    *_, over = events(front(0, ASK), Over(1, 1))
    assert isinstance(over, Notice)
    assert over.text == "over, without an answer to GET_FEATURES"


def test_an_inquiry_tells_rings_and_waits() -> None:
    enable = encode(F.SET_VRING_ENABLE, VERSION, VringState(0, 1))
    found = events(front(0, ASK), back(1, OFFER), front(2, enable), front(3, ASK), Inquiry(9))
    notice, waits = found[-2:]
    assert isinstance(notice, Notice)
    assert [str(ring) for ring in notice.rings] == ["ring 0: stopped, enabled"]
    assert isinstance(waits, Waits)


def test_text_of_an_exchange() -> None:
    memory = Descriptor("memfd", 1 << 30, "sealed shrink")
    table = Header(F.SET_MEM_TABLE, VERSION | NEED_REPLY, 40).pack() + b"\1" + bytes(7) + bytes(32)
    lines = [text.lines(event) for event in events(front(0, ASK), back(300_000, OFFER), front(2 * MS, table, memory))]
    assert lines == [
        "    0.000000 1 front-end -> GET_FEATURES",
        "    0.000300 1  back-end <- GET_FEATURES reply (300 us): 0x140000000 PROTOCOL_FEATURES VERSION_1",
        "    0.002000 1 front-end -> SET_MEM_TABLE: need_reply [0] guest 0x0, size 0 B, user 0x0, offset 0\n"
        "             fd: memfd 1 GiB sealed shrink",
    ]


def test_a_violation_is_marked_with_its_section_and_in_colour() -> None:
    (event,) = events(front(0, encode(F.SET_FEATURES, VERSION, U64(1))))
    wrong = "             wrong: features that were never offered: bit0 (see VHOST_USER_SET_FEATURES)"
    assert text.lines(event).endswith("\n" + wrong)
    assert text.lines(event, colour=True).endswith(f"\x1b[31m{wrong}\x1b[0m")


def test_json_has_everything() -> None:
    found = events(front(0, ASK), back(5, OFFER, Descriptor("pipe")), Over(9, 1))
    lines = [json.loads(jsonlines.line(event)) for event in found]
    assert [line["event"] for line in lines] == ["message", "message", "notice"]
    answer = lines[1]
    assert answer["bytes"] == OFFER.hex()
    assert answer["payload"] == {"value": 1 << 30 | 1 << 32}
    assert answer["fds"] == [{"kind": "pipe", "size": -1, "detail": ""}]
    assert answer["latency"] == 5
    assert answer["violations"][0]["section"] == "VHOST_USER_GET_FEATURES"


@pytest.mark.parametrize(
    ("kind", "value"),
    [(Kind.DELAY, "soon"), (Kind.DELAY, "5@NO_SUCH"), (Kind.DROP_FD, "7"), (Kind.CORRUPT, "SET_OWNER.answer")],
)
def test_options_that_say_nothing_are_refused(kind: Kind, value: str) -> None:
    with pytest.raises(FaultError):
        parse(kind, value)


def test_a_fault_hits_what_it_names_and_nothing_else() -> None:
    faults = Faults([parse(Kind.DELAY, "5@GET_FEATURES.reply"), parse(Kind.KILL_AFTER, "3")])
    ask, header = Header(F.GET_FEATURES, VERSION, 0), Header(F.GET_FEATURES, VERSION | REPLY, 8)
    plans = [faults.plan(Wire.MAIN, ask, request=True), faults.plan(Wire.MAIN, header, request=False)]
    assert [plan.delay for plan in plans] == [0, 0.005]
    assert not any(plan.kill for plan in plans)
    assert faults.plan(Wire.BACKEND, ask, request=True).kill
