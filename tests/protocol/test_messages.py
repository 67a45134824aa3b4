"""Rules that hold for every message of the catalog, in each of its forms, in both directions."""

from itertools import product

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tests.protocol.samples import CASES, PAYLOADS, Case, Pair, connect_for, read
from vhostuser.protocol import (
    HEADER_SIZE,
    NEED_REPLY,
    REPLY,
    U64,
    VERSION,
    Answer,
    BackendSession,
    FrontendSession,
    Header,
    LocalProtocolError,
    MemoryTable,
    Outgoing,
    Payload,
    RemoteProtocolError,
    Reply,
    Request,
    RequestRefused,
    Server,
)
from vhostuser.protocol import FrontendRequest as F
from vhostuser.protocol import ProtocolFeature as P
from vhostuser.protocol import VirtioFeature as V
from vhostuser.protocol.catalog import When
from vhostuser.protocol.codec import encode

every_message = pytest.mark.parametrize("case", CASES, ids=str)
every_reply = pytest.mark.parametrize("case", [case for case in CASES if case.row.reply], ids=str)


def wire(case: Case, payload: Payload | None = None, flags: int = VERSION) -> bytes:
    """The message as bytes, past all the checks of our own sender."""
    number = F.SET_MEM_TABLE if case.row.code is F.POSTCOPY_ACK else case.row.code
    return encode(number, flags, case.request() if payload is None else payload)


def resized(data: bytes, size: int) -> bytes:
    """The message cut or extended, its header telling the truth about it."""
    header = Header.unpack(data[:HEADER_SIZE])
    body = data[HEADER_SIZE:].ljust(size, b"\x01")[:size]
    return header._replace(size=size).pack() + body


def received(server: Server, data: bytes, fds: tuple[int, ...]) -> Request:
    request = read(server, Outgoing(data, fds))
    assert isinstance(request, Request)
    return request


@every_message
@given(data=st.data())
@settings(max_examples=10, deadline=None)
def test_a_request_arrives_as_it_was_sent(case: Case, data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(case.row.request))
    payload = data.draw(PAYLOADS[kind])
    # Between LISTEN and END an empty table is an acknowledgement.
    assume(case.when is not When.POSTCOPY or payload != MemoryTable(()))
    count = payload.fd_count()
    fds = tuple(range(case.row.fds[0] if count is None else count))
    need_reply = data.draw(st.booleans()) and case.row.code is not F.POSTCOPY_ACK
    request = received(connect_for(case).answering, wire(case, payload, VERSION | NEED_REPLY * need_reply), fds)
    assert (request.code, request.payload, request.fds) == (case.row.code, payload, fds)
    assert request.need_reply == need_reply
    assert request.row == case.row


@every_reply
@given(data=st.data())
@settings(max_examples=10, deadline=None)
def test_a_reply_arrives_as_it_was_sent(case: Case, data: st.DataObject) -> None:
    pair = connect_for(case)
    request = pair.deliver(pair.asking.request(case.row.code, case.request(), case.fds()))
    payload = data.draw(PAYLOADS[case.row.reply[0]])
    if type(payload) is type(request.payload) and len(payload.pack()) != len(request.payload.pack()):
        payload = request.payload
    count = payload.fd_count()
    least, most = case.row.reply_fds
    reply = Reply(payload, tuple(range(least if count is None or least == most else count)))
    if case.row.refusal and case.row.refusal.told(request.payload, payload, len(reply.fds)):
        return
    outgoing = pair.answering.finish(request, reply)
    assert outgoing is not None
    answer = read(pair.asking, outgoing)
    assert (answer.code, answer.payload, answer.fds, answer.refused) == (case.row.code, payload, reply.fds, False)


@every_message
def test_our_own_sender_and_receiver_agree(case: Case) -> None:
    pair = connect_for(case)
    request = pair.deliver(pair.asking.request(case.row.code, case.request(), case.fds()))
    assert request.refusal is None
    outgoing = pair.answering.finish(request, case.outcome())
    assert (outgoing is None) == (not case.row.reply) == (not pair.asking.outstanding)
    if outgoing:
        answer = read(pair.asking, outgoing)
        assert isinstance(answer, Answer)
        assert not answer.refused
    assert pair.front.rings == pair.back.rings
    assert pair.front.postcopy is pair.back.postcopy
    assert (pair.front.features, pair.front.protocol_features) == (pair.back.features, pair.back.protocol_features)


# Sizes

SHORTER_IS_ANOTHER = {
    F.CREATE_CRYPTO_SESSION: "any size is a session",
    F.POSTCOPY_ACK: "empty by the text, eight bytes from QEMU",
    F.GET_SHARED_OBJECT: "QEMU sends no UUID",
}


@every_message
def test_a_message_cut_short_or_drawn_out_is_rejected(case: Case) -> None:
    """Whatever the header says its size is: too small, too large, or at odds with the content."""
    data = wire(case)
    sizes = {
        *range(min(len(data) - HEADER_SIZE, 80)),
        *(len(data) - HEADER_SIZE + n for n in (1, 4, 8, 16, 32, 40, 64)),
    }
    for size in sorted(sizes - {len(data) - HEADER_SIZE}):
        pair = connect_for(case)
        if case.row.code in SHORTER_IS_ANOTHER and any(size in kind.sizes for kind in case.row.request):
            continue
        with pytest.raises(RemoteProtocolError) as caught:
            received(pair.answering, resized(data, size), case.fds())
        assert caught.value.clause


@every_message
@pytest.mark.parametrize("size", [4096, 1 << 20, 0xFFFFFFFF])
def test_an_oversized_payload_is_rejected_before_it_is_read(case: Case, size: int) -> None:
    header = Header.unpack(wire(case)[:HEADER_SIZE])._replace(size=size)
    with pytest.raises(RemoteProtocolError):
        connect_for(case).answering.receive(header.pack(), case.fds())


@every_message
def test_end_of_file_inside_a_message_is_an_error(case: Case) -> None:
    data = wire(case)
    for size in {1, HEADER_SIZE - 1, HEADER_SIZE, len(data) - 1} & set(range(1, len(data))):
        server = connect_for(case).answering
        assert server.receive(data[: min(size, HEADER_SIZE)], case.fds()) is None
        if size > HEADER_SIZE:
            assert server.receive(data[HEADER_SIZE:size]) is None
        with pytest.raises(RemoteProtocolError, match="missing"):
            server.eof()


# Descriptors


@every_message
def test_a_wrong_number_of_descriptors_is_rejected(case: Case) -> None:
    right = case.request().fd_count()
    least, most = case.row.fds if right is None else (right, right)
    for count in (n for n in range(12) if not least <= n <= most):
        with pytest.raises(RemoteProtocolError, match=r"descriptors|unknown request|bytes"):
            received(connect_for(case).answering, wire(case), tuple(range(count)))
        pair = connect_for(case)
        with pytest.raises(LocalProtocolError, match="descriptors"):
            pair.asking.request(case.row.code, case.request(), tuple(range(count)))


@every_message
def test_too_many_descriptors_are_rejected_before_the_payload_is_read(case: Case) -> None:
    header = wire(case)[:HEADER_SIZE]
    with pytest.raises(RemoteProtocolError, match=r"descriptors|unknown request"):
        connect_for(case).answering.receive(header, tuple(range(case.row.fds[1] + 1)))


@every_reply
def test_a_wrong_number_of_descriptors_with_a_reply_is_rejected(case: Case) -> None:
    """None at all may be how the message says no; that is not an error but a refusal."""
    reply = case.reply()
    least = most = len(reply.fds)
    for wrong in (n for n in range(4) if not least <= n <= most):
        pair = connect_for(case)
        request = pair.deliver(pair.asking.request(case.row.code, case.request(), case.fds()))
        fds = tuple(range(wrong))
        with pytest.raises(LocalProtocolError):
            pair.answering.finish(request, Reply(reply.payload, fds))
        data = encode(case.row.code, VERSION | REPLY, reply.payload)
        if case.row.refusal and case.row.refusal.told(request.payload, reply.payload, wrong):
            assert read(pair.asking, Outgoing(data, fds)).refused
        else:
            with pytest.raises(RemoteProtocolError, match="descriptors"):
                read(pair.asking, Outgoing(data, fds))


# Header flags


@every_message
@pytest.mark.parametrize("flags", [0x0, 0x2, 0x3, 0x5, 0xD, 0x11, 0x80000001])
def test_wrong_request_flags_are_rejected(case: Case, flags: int) -> None:
    """Version other than 1, the reply flag, reserved bits."""
    with pytest.raises(RemoteProtocolError):
        received(connect_for(case).answering, wire(case, flags=flags), case.fds())


@every_reply
@pytest.mark.parametrize("flags", [0x0, 0x1, 0x4, 0x6, 0x9, 0xD, 0x15])
def test_wrong_reply_flags_are_rejected(case: Case, flags: int) -> None:
    pair = connect_for(case)
    pair.asking.request(case.row.code, case.request(), case.fds())
    with pytest.raises(RemoteProtocolError, match="exactly 0x5"):
        read(pair.asking, Outgoing(encode(case.row.code, flags, case.reply().payload), case.reply().fds))


# Gates

GATED = [case for case in CASES if case.row.gate.features and case.when is None]
# Without protocol features there is no REPLY_ACK.
NACKABLE = [case for case in GATED if V.PROTOCOL_FEATURES not in case.row.gate.features]


@pytest.mark.parametrize(("case", "need_reply"), [*product(GATED, [False]), *product(NACKABLE, [True])], ids=str)
def test_a_message_without_its_feature_closes_the_connection(case: Case, need_reply: bool) -> None:
    """With a nack before, where one was asked for and REPLY_ACK allows it."""
    pair = _bare(case, reply_ack=need_reply)
    with pytest.raises(LocalProtocolError, match=r"was not|POSTCOPY_LISTEN"):
        pair.asking.request(case.row.code, case.request(), case.fds())
    data = wire(case, flags=VERSION | NEED_REPLY * need_reply)
    if case.row.code is F.POSTCOPY_ACK:
        data = encode(0, VERSION | NEED_REPLY * need_reply, case.request())
    with pytest.raises(RemoteProtocolError, match=r"was not|unknown request") as caught:
        received(pair.answering, data, case.fds())
    nack = encode(int(Header.unpack(data[:HEADER_SIZE]).request), VERSION | REPLY, U64(1))
    assert caught.value.answer == (nack if need_reply else b"")


def _bare(case: Case, *, reply_ack: bool) -> Pair:
    """A pair without anything that the case's gate asks for."""
    gate = case.row.gate.features
    features = 0 if V.PROTOCOL_FEATURES in gate else V.PROTOCOL_FEATURES.mask
    protocol = P.REPLY_ACK.mask if reply_ack else 0
    front, back = FrontendSession(2), BackendSession(features, protocol, 2)
    pair = Pair(front, back, front, back)
    pair.call(F.GET_FEATURES)
    if features:
        pair.call(F.GET_PROTOCOL_FEATURES)
        pair.call(F.SET_PROTOCOL_FEATURES, U64(protocol))
    pair.call(F.SET_FEATURES, U64(features))
    if case.row.from_backend:
        pair.asking, pair.answering = back.channel(), front.channel()
    return pair


# Refusals

# With need_reply an acknowledgement would be none.
(ACK,) = (case for case in CASES if case.row.code is F.POSTCOPY_ACK)
ACKABLE = [case for case in CASES if case is not ACK]


@pytest.mark.parametrize(("case", "need_reply"), [*product(ACKABLE, [False, True]), (ACK, False)], ids=str)
def test_a_refusal_is_told_or_closes_the_connection(case: Case, need_reply: bool) -> None:
    """By the message's own reply, else by a nack; in silence only where nothing depends on it."""
    row = case.row
    pair = connect_for(case)
    request = pair.deliver(pair.asking.request(row.code, case.request(), case.fds(), need_reply))
    before = repr((pair.back.rings, pair.back.postcopy, pair.back.features, pair.back.protocol_features))
    refusal = RequestRefused("no")
    if row.refusal or (need_reply and not row.reply):
        outgoing = pair.answering.finish(request, refusal)
        assert outgoing is not None
        assert read(pair.asking, outgoing).refused
    elif row.silent or row.code is F.SET_FEATURES:  # which the device status tells
        assert pair.answering.finish(request, refusal) is None
    else:
        with pytest.raises(RemoteProtocolError, match="no way to tell: no"):
            pair.answering.finish(request, refusal)
    assert before == repr((pair.back.rings, pair.back.postcopy, pair.back.features, pair.back.protocol_features))


@pytest.mark.parametrize("case", ACKABLE, ids=str)
def test_need_reply_gets_exactly_one_answer(case: Case) -> None:
    """Also on messages with a reply of their own, and flags 0x5 in any case."""
    pair = connect_for(case)
    request = pair.deliver(pair.asking.request(case.row.code, case.request(), case.fds(), need_reply=True))
    outgoing = pair.answering.finish(request, case.outcome())
    assert outgoing is not None
    header = Header.unpack(outgoing.data[:HEADER_SIZE])
    assert header == (case.row.code, VERSION | REPLY, len(outgoing.data) - HEADER_SIZE)
    assert not read(pair.asking, outgoing).refused
    assert not pair.asking.outstanding
