"""The postcopy handshake: every cell of the table, the forms of the acknowledgement, QEMU's order of messages."""

from itertools import product

import pytest

from tests.protocol.samples import REGION, REGIONS, Pair, connect, listen, read
from vhostuser.protocol import (
    NEED_REPLY,
    U64,
    VERSION,
    Effect,
    Empty,
    Header,
    LocalProtocolError,
    MemoryRegion,
    MemoryTable,
    Outgoing,
    Postcopy,
    PostcopyAck,
    RemoteProtocolError,
    Reply,
    Request,
    RequestRefused,
    SingleRegion,
)
from vhostuser.protocol import FrontendRequest as F
from vhostuser.protocol.postcopy import HANDSHAKE, INPUTS, LOST

S, X = Postcopy, Effect
UFFD = Reply(Empty(), (9,))

# Written out from the design's table, not from the one under test. None: not allowed in this state.
TABLE = {
    (S.IDLE, F.POSTCOPY_ADVISE): (S.ADVISED, X.OPEN),
    (S.IDLE, F.SET_MEM_TABLE): (S.IDLE, X.NOTHING),
    (S.IDLE, F.ADD_MEM_REG): (S.IDLE, X.NOTHING),
    (S.IDLE, F.REM_MEM_REG): (S.IDLE, X.NOTHING),
    (S.IDLE, F.POSTCOPY_LISTEN): None,
    (S.IDLE, F.POSTCOPY_ACK): None,
    (S.IDLE, F.POSTCOPY_END): (S.IDLE, X.END),
    (S.IDLE, LOST): (S.IDLE, X.NOTHING),
    (S.ADVISED, F.POSTCOPY_ADVISE): (S.ADVISED, X.OPEN),
    (S.ADVISED, F.SET_MEM_TABLE): (S.ADVISED, X.NOTHING),
    (S.ADVISED, F.ADD_MEM_REG): (S.ADVISED, X.NOTHING),
    (S.ADVISED, F.REM_MEM_REG): (S.ADVISED, X.NOTHING),
    (S.ADVISED, F.POSTCOPY_LISTEN): (S.LISTENING, X.LISTEN),
    (S.ADVISED, F.POSTCOPY_ACK): None,
    (S.ADVISED, F.POSTCOPY_END): (S.IDLE, X.END),
    (S.ADVISED, LOST): (S.IDLE, X.REVOKE),
    (S.LISTENING, F.POSTCOPY_ADVISE): (S.LISTENING, X.OPEN),
    (S.LISTENING, F.SET_MEM_TABLE): (S.AWAITING_ACK, X.MAP),
    (S.LISTENING, F.ADD_MEM_REG): (S.AWAITING_ACK, X.MAP),
    (S.LISTENING, F.REM_MEM_REG): (S.AWAITING_ACK, X.RELEASE),
    (S.LISTENING, F.POSTCOPY_LISTEN): (S.LISTENING, X.NOTHING),
    (S.LISTENING, F.POSTCOPY_ACK): (S.LISTENING, X.NOTHING),
    (S.LISTENING, F.POSTCOPY_END): (S.IDLE, X.END),
    (S.LISTENING, LOST): (S.IDLE, X.REVOKE),
    (S.AWAITING_ACK, F.POSTCOPY_ADVISE): (S.AWAITING_ACK, X.OPEN),
    (S.AWAITING_ACK, F.SET_MEM_TABLE): (S.AWAITING_ACK, X.MAP),
    (S.AWAITING_ACK, F.ADD_MEM_REG): (S.AWAITING_ACK, X.MAP),
    (S.AWAITING_ACK, F.REM_MEM_REG): (S.AWAITING_ACK, X.RELEASE),
    (S.AWAITING_ACK, F.POSTCOPY_LISTEN): (S.AWAITING_ACK, X.NOTHING),
    (S.AWAITING_ACK, F.POSTCOPY_ACK): (S.LISTENING, X.REGISTER),
    (S.AWAITING_ACK, F.POSTCOPY_END): (S.IDLE, X.END),
    (S.AWAITING_ACK, LOST): (S.IDLE, X.REVOKE),
}


def test_the_table_has_every_cell_of_the_design_and_no_other() -> None:
    assert set(TABLE) == set(product(S, INPUTS))
    assert {state: dict(cells) for state, cells in HANDSHAKE.items()} == {
        state: {event: TABLE[state, event] for event in INPUTS if TABLE[state, event]} for state in S
    }


def bring(state: Postcopy) -> Pair:
    """A pair in `state`, by way of messages."""
    pair = connect()
    if state is S.ADVISED:
        pair.call(F.POSTCOPY_ADVISE, outcome=UFFD)
    elif state is not S.IDLE:
        listen(pair)
        if state is S.AWAITING_ACK:
            pair.call(F.ADD_MEM_REG, SingleRegion(REGION), (3,), outcome=Reply(SingleRegion(REGION)))
    assert pair.back.postcopy is state is pair.front.postcopy
    return pair


MESSAGES = {
    F.POSTCOPY_ADVISE: (Empty(), (), UFFD),
    F.SET_MEM_TABLE: (MemoryTable(REGIONS), (3, 4), Reply(MemoryTable(REGIONS))),
    F.ADD_MEM_REG: (SingleRegion(REGION), (3,), Reply(SingleRegion(REGION))),
    F.REM_MEM_REG: (SingleRegion(REGION), (), None),
    F.POSTCOPY_LISTEN: (Empty(), (), None),
    F.POSTCOPY_ACK: (PostcopyAck(), (), None),
    F.POSTCOPY_END: (Empty(), (), None),
}


@pytest.mark.parametrize(("state", "code"), [*product(S, MESSAGES)], ids=lambda value: value.name)
def test_every_message_in_every_state(state: Postcopy, code: F) -> None:
    pair = bring(state)
    payload, fds, outcome = MESSAGES[code]
    cell = TABLE[state, code]
    if cell is None:
        with pytest.raises(LocalProtocolError, match="must come first"):
            pair.asking.request(code, payload, fds)
        assert pair.back.postcopy is state
        return
    request = pair.deliver(pair.asking.request(code, payload, fds))
    assert (request.code, request.effect) == (code, cell[1])
    assert pair.back.postcopy is state, "nothing changes before the request is fulfilled"
    if not request.row.reply:
        outcome = None
    outgoing = pair.answering.finish(request, outcome)
    if outgoing:
        read(pair.asking, outgoing)
    assert pair.back.postcopy is pair.front.postcopy is cell[0]


@pytest.mark.parametrize("state", S, ids=lambda state: state.name)
def test_the_loss_of_the_front_end_in_every_state(state: Postcopy) -> None:
    pair = bring(state)
    pair.back.kicked(0)
    cell = TABLE[state, LOST]
    assert cell is not None
    assert pair.back.lost() is cell[1]
    assert pair.back.postcopy is S.IDLE
    assert pair.back.suspended
    assert pair.back.lost() is X.NOTHING, "once"


def test_other_messages_have_no_effect_in_postcopy() -> None:
    pair = bring(S.AWAITING_ACK)
    assert pair.deliver(pair.asking.request(F.GET_FEATURES)).effect is X.NOTHING


# The acknowledgement

ACKS = [(number, payload) for number in (0, 5, 37, 38) for payload in (b"", bytes(8))]


def message(number: int, body: bytes, flags: int = VERSION) -> Outgoing:
    return Outgoing(Header(number, flags, len(body)).pack() + body)


@pytest.mark.parametrize("state", [S.AWAITING_ACK, S.LISTENING], ids=lambda state: state.name)
@pytest.mark.parametrize(("number", "body"), ACKS)
def test_the_acknowledgement_in_all_its_forms(state: Postcopy, number: int, body: bytes) -> None:
    """Empty by the text; a u64 of 0 from QEMU, under the id of the last memory message, or 0 after a reboot."""
    pair = bring(state)
    request = pair.deliver(message(number, body))
    assert request.code is F.POSTCOPY_ACK
    assert request.effect is (X.REGISTER if state is S.AWAITING_ACK else X.NOTHING)
    assert pair.back.finish(request) is None, "an acknowledgement is not acknowledged"
    assert pair.back.postcopy is S.LISTENING


@pytest.mark.parametrize("state", [S.IDLE, S.ADVISED], ids=lambda state: state.name)
@pytest.mark.parametrize(("number", "body"), [ack for ack in ACKS if ack != (5, bytes(8))])
def test_outside_postcopy_it_is_no_message_at_all(state: Postcopy, number: int, body: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        bring(state).deliver(message(number, body))


def test_outside_postcopy_an_empty_table_is_an_empty_table() -> None:
    assert bring(S.ADVISED).deliver(message(5, bytes(8))).payload == MemoryTable(())


@pytest.mark.parametrize("number", [0, 5, 37, 38])
@pytest.mark.parametrize("state", [S.AWAITING_ACK, S.LISTENING], ids=lambda state: state.name)
def test_an_acknowledgement_of_anything_but_0_is_rejected(state: Postcopy, number: int) -> None:
    with pytest.raises(RemoteProtocolError):
        bring(state).deliver(message(number, b"\1" + bytes(7)))


@pytest.mark.parametrize("number", [0, 37, 38])
def test_with_a_descriptor_or_need_reply_it_is_none(number: int) -> None:
    for fds, flags in (((3,), VERSION), ((), VERSION | NEED_REPLY)):
        with pytest.raises(RemoteProtocolError):
            bring(S.AWAITING_ACK).deliver(message(number, bytes(8), flags)._replace(fds=fds))


def test_our_front_end_acknowledges_as_qemu_does() -> None:
    """Under the id of the last memory message, a second time under 0; never with need_reply."""
    pair = bring(S.AWAITING_ACK)
    for number in (F.ADD_MEM_REG, 0):
        outgoing = pair.asking.request(F.POSTCOPY_ACK, PostcopyAck(), need_reply=number == 0)
        assert outgoing.data == Header(number, VERSION, 8).pack() + bytes(8)
        pair.back.finish(pair.deliver(outgoing))


# Replies


@pytest.mark.parametrize("state", [S.LISTENING, S.AWAITING_ACK], ids=lambda state: state.name)
def test_bases_come_back_in_the_layout_of_the_request(state: Postcopy) -> None:
    pair = bring(state)
    bases = MemoryTable(tuple(MemoryRegion(r.guest, r.size, r.user + 1, r.offset) for r in REGIONS))
    answer = pair.call(F.SET_MEM_TABLE, MemoryTable(REGIONS), (3, 4), outcome=Reply(bases))
    assert answer is not None
    assert answer.payload == bases


@pytest.mark.parametrize(
    ("code", "outcome"),
    [
        (F.SET_MEM_TABLE, None),
        (F.SET_MEM_TABLE, Reply(MemoryTable(REGIONS[:1]))),
        (F.SET_MEM_TABLE, Reply(MemoryTable(REGIONS), (3, 4))),
        (F.SET_MEM_TABLE, Reply(U64(0))),
        (F.ADD_MEM_REG, None),
        (F.REM_MEM_REG, Reply(SingleRegion(REGION))),
        (F.POSTCOPY_ADVISE, None),
        (F.POSTCOPY_ADVISE, Reply(Empty())),
        (F.POSTCOPY_ADVISE, Reply(Empty(), (1, 2))),
        (F.POSTCOPY_END, Reply(U64(1))),
    ],
)
def test_a_handler_that_answers_wrongly_is_told_and_may_answer_again(code: F, outcome: Reply | None) -> None:
    pair = bring(S.LISTENING)
    payload, fds, right = MESSAGES[code]
    request = pair.deliver(pair.asking.request(code, payload, fds))
    with pytest.raises(LocalProtocolError):
        pair.back.finish(request, outcome)
    assert pair.back.postcopy is S.LISTENING
    pair.back.finish(request, right)


def test_removing_a_region_is_answered_only_where_asked() -> None:
    """QEMU sends no need_reply here, and would take a reply for that of its next ADD_MEM_REG."""
    pair = bring(S.LISTENING)
    assert pair.call(F.REM_MEM_REG, SingleRegion(REGION)) is None
    answer = pair.call(F.REM_MEM_REG, SingleRegion(REGION), need_reply=True)
    assert answer is not None
    assert answer.payload == U64(0)


def test_listen_is_acknowledged_without_reply_ack() -> None:
    """QEMU sets need_reply and reads a u64 whether REPLY_ACK was negotiated or not."""
    pair = connect(protocol_features=0)
    pair.call(F.POSTCOPY_ADVISE, outcome=UFFD)
    outgoing = pair.asking.request(F.POSTCOPY_LISTEN)
    assert Header.unpack(outgoing.data).need_reply
    reply = pair.back.finish(pair.deliver(outgoing))
    assert reply is not None
    assert read(pair.asking, reply).payload == U64(0)
    assert pair.back.postcopy is S.LISTENING


def test_listen_without_need_reply_is_acknowledged_too() -> None:
    pair = bring(S.ADVISED)
    request = pair.deliver(message(F.POSTCOPY_LISTEN, b""))
    assert pair.back.finish(request) is not None


def test_listen_before_advise_is_refused_by_a_nack() -> None:
    pair = connect()
    request = read(pair.back, message(F.POSTCOPY_LISTEN, b"", VERSION | NEED_REPLY))
    assert isinstance(request, Request)
    assert request.refusal is not None
    outgoing = pair.back.finish(request)
    assert outgoing is not None
    assert outgoing.data[12:] == U64(1).pack()
    assert pair.back.postcopy is S.IDLE


def test_listen_refused_by_the_runtime_leaves_the_state() -> None:
    pair = bring(S.ADVISED)
    answer = pair.call(F.POSTCOPY_LISTEN, outcome=RequestRefused("regions are mapped"))
    assert answer is not None
    assert answer.refused
    assert pair.back.postcopy is S.ADVISED is pair.front.postcopy


def test_advise_is_refused_by_a_reply_without_descriptor() -> None:
    """QEMU then reports that it got no userfaultfd, and the migration fails cleanly."""
    pair = connect()
    answer = pair.call(F.POSTCOPY_ADVISE, outcome=RequestRefused("no permission"))
    assert answer is not None
    assert (answer.refused, answer.payload, answer.fds) == (True, Empty(), ())
    assert pair.back.postcopy is S.IDLE is pair.front.postcopy


@pytest.mark.parametrize("code", [F.SET_MEM_TABLE, F.ADD_MEM_REG], ids=lambda code: code.name)
@pytest.mark.parametrize("need_reply", [False, True])
def test_memory_refused_in_postcopy_closes_the_connection(code: F, need_reply: bool) -> None:
    """The reply has no way to say no, and without bases the front-end cannot serve a fault."""
    pair = bring(S.LISTENING)
    payload, fds, _ = MESSAGES[code]
    request = pair.deliver(pair.asking.request(code, payload, fds, need_reply))
    with pytest.raises(RemoteProtocolError, match="no way to tell: file too small"):
        pair.back.finish(request, RequestRefused("file too small"))


# QEMU's order


@pytest.mark.parametrize("pairs", [1, 3])
def test_one_connection_with_several_queue_pairs(pairs: int) -> None:
    """ADVISE, LISTEN and END come once per pair, memory once."""
    pair = connect()
    for _ in range(pairs):
        answer = pair.call(F.POSTCOPY_ADVISE, outcome=UFFD)
        assert answer is not None
        assert answer.fds == (9,)
    for _ in range(pairs):
        assert pair.call(F.POSTCOPY_LISTEN)
    for region in REGIONS:
        pair.call(F.ADD_MEM_REG, SingleRegion(region), (3,), outcome=Reply(SingleRegion(region)))
    pair.call(F.POSTCOPY_ACK, PostcopyAck())
    assert pair.back.postcopy is S.LISTENING
    for _ in range(pairs):
        answer = pair.call(F.POSTCOPY_END)
        assert answer is not None
        assert answer.payload == U64(0)
    assert pair.back.postcopy is S.IDLE is pair.front.postcopy
    assert pair.call(F.SET_MEM_TABLE, MemoryTable(REGIONS), (3, 4)) is None, "ordinary tables again"


def test_a_migration_that_ends_in_precopy_goes_on_as_if_nothing_was() -> None:
    pair = bring(S.ADVISED)
    assert pair.call(F.SET_MEM_TABLE, MemoryTable(REGIONS), (3, 4)) is None
    assert pair.back.postcopy is S.ADVISED
