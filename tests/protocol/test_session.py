"""The two sessions: negotiation, acknowledgements, values that are refused, answers paired with requests."""

import pytest

from tests.protocol.samples import (
    ALL_PROTOCOL,
    ALL_VIRTIO,
    CONDITIONAL,
    SAMPLES,
    Pair,
    connect,
    fresh,
    listen,
    read,
    send,
)
from vhostuser.protocol import (
    BACKEND,
    REPLY,
    U64,
    VERSION,
    BackendSession,
    DeviceStateTransfer,
    FrontendSession,
    Header,
    Iotlb,
    LocalProtocolError,
    Outgoing,
    Payload,
    ProtocolError,
    RemoteProtocolError,
    Reply,
    RequestRefused,
    Uuid,
    VringAddress,
    VringArea,
    VringFd,
    VringState,
    encode,
)
from vhostuser.protocol import BackendRequest as B
from vhostuser.protocol import FrontendRequest as F
from vhostuser.protocol import ProtocolFeature as P
from vhostuser.protocol import VirtioFeature as V

BIT_30 = V.PROTOCOL_FEATURES.mask


# Negotiation


def test_the_session_answers_what_it_was_made_with() -> None:
    front, back = FrontendSession(), BackendSession(ALL_VIRTIO, ALL_PROTOCOL & ~CONDITIONAL, 7, max_slots=32)
    pair = Pair(front, back, front, back)
    answers = [pair.call(F.GET_FEATURES), pair.call(F.GET_PROTOCOL_FEATURES)]
    pair.call(F.SET_PROTOCOL_FEATURES, U64(ALL_PROTOCOL & ~CONDITIONAL))
    answers += [pair.call(F.GET_QUEUE_NUM), pair.call(F.GET_MAX_MEM_SLOTS)]
    assert [answer and answer.payload for answer in answers] == [
        U64(ALL_VIRTIO),
        U64(ALL_PROTOCOL & ~CONDITIONAL),
        U64(7),
        U64(32),
    ]


def test_protocol_features_come_before_features() -> None:
    """By the text both messages must work before SET_FEATURES."""
    pair = fresh()
    assert pair.back.finish(send(pair, F.GET_PROTOCOL_FEATURES)) is not None
    pair.back.finish(send(pair, F.SET_PROTOCOL_FEATURES, U64(P.CONFIG.mask)))
    assert pair.back.has(P.CONFIG)


def test_negotiated_features_are_what_was_set() -> None:
    pair = fresh()
    pair.call(F.GET_FEATURES)
    assert pair.front.features_offered == ALL_VIRTIO
    assert (pair.back.features, pair.back.protocol_features) == (0, 0)
    pair.call(F.GET_PROTOCOL_FEATURES)
    assert pair.front.protocol_features_offered == ALL_PROTOCOL
    pair.call(F.SET_PROTOCOL_FEATURES, U64(P.MQ.mask))
    pair.call(F.SET_FEATURES, U64(BIT_30 | V.VERSION_1.mask))
    for session in (pair.front, pair.back):
        assert session.has(P.MQ)
        assert not session.has(P.CONFIG)
        assert session.has(V.VERSION_1)
        assert not session.has(V.RING_PACKED)


def test_a_front_end_may_skip_get_protocol_features() -> None:
    """After a migration some do, and wait for acks from then on."""
    pair = fresh()
    pair.back.finish(send(pair, F.SET_PROTOCOL_FEATURES, U64(P.REPLY_ACK.mask)))
    assert pair.back.finish(send(pair, F.SET_OWNER, ask=True)) is not None


@pytest.mark.parametrize("code", [F.GET_PROTOCOL_FEATURES, F.SET_PROTOCOL_FEATURES], ids=lambda code: code.name)
def test_protocol_features_need_bit_30_to_be_offered(code: F) -> None:
    pair = fresh(features=V.VERSION_1.mask)
    with pytest.raises(RemoteProtocolError, match="PROTOCOL_FEATURES was not offered"):
        send(pair, code, SAMPLES[U64] if code is F.SET_PROTOCOL_FEATURES else None)


@pytest.mark.parametrize(
    ("code", "bits", "name"),
    [(F.SET_FEATURES, 1 << 50, "bit50"), (F.SET_PROTOCOL_FEATURES, P.PAGEFAULT.mask, "PAGEFAULT")],
)
def test_features_that_were_never_offered_are_refused(code: F, bits: int, name: str) -> None:
    """By a nack where one was asked for. Otherwise the connection closes: the peer would rely on them."""
    pair = connect(offered=ALL_PROTOCOL & ~P.PAGEFAULT.mask, protocol_features=P.REPLY_ACK.mask)
    before = pair.back.features, pair.back.protocol_features
    outgoing = pair.back.finish(send(pair, code, U64(bits | P.REPLY_ACK.mask * (code == 16)), ask=True))
    assert outgoing == Outgoing(encode(code, VERSION | REPLY, U64(1)))
    request = send(pair, code, U64(bits))
    assert request.refusal is not None
    assert name in request.refusal.reason
    with pytest.raises(RemoteProtocolError, match=f"never offered: {name}"):
        pair.back.finish(request)
    assert (pair.back.features, pair.back.protocol_features) == before
    with pytest.raises(LocalProtocolError, match=name):
        pair.front.request(code, U64(bits))


@pytest.mark.parametrize("missing", [P.BACKEND_REQ, P.REPLY_ACK], ids=lambda feature: feature.name)
def test_in_band_notifications_alone_close_the_connection(missing: P) -> None:
    pair = fresh()
    value = P.INBAND_NOTIFICATIONS.mask | (P.BACKEND_REQ.mask | P.REPLY_ACK.mask) & ~missing.mask
    with pytest.raises(RemoteProtocolError, match="INBAND_NOTIFICATIONS without"):
        pair.back.finish(send(pair, F.SET_PROTOCOL_FEATURES, U64(value), ask=True))


def test_what_qemu_sends_once_per_queue_pair_may_be_repeated() -> None:
    pair = connect()
    for _ in range(3):
        pair.call(F.GET_FEATURES)
        pair.call(F.SET_OWNER)
        pair.call(F.SET_PROTOCOL_FEATURES, U64(P.REPLY_ACK.mask | P.MQ.mask))
        pair.call(F.SET_FEATURES, U64(BIT_30))
    assert (pair.back.features, pair.back.protocol_features) == (BIT_30, P.REPLY_ACK.mask | P.MQ.mask)


def test_enabling_a_ring_needs_bit_30_offered_but_not_negotiated() -> None:
    """crosvm, and QEMU before 7.2, sent SET_VRING_ENABLE without having set it."""
    pair = connect(features=V.VERSION_1.mask)
    pair.back.finish(send(pair, F.SET_VRING_ENABLE, VringState(0, 0)))
    assert [ring.enabled for ring in pair.back.rings] == [False, True]


# Acknowledgements


def test_need_reply_is_ignored_without_reply_ack() -> None:
    pair = connect(protocol_features=0)
    assert pair.back.finish(send(pair, F.SET_OWNER, ask=True)) is None
    with pytest.raises(LocalProtocolError, match="for ever"):
        pair.front.request(F.SET_OWNER, need_reply=True)


def test_the_message_that_brings_reply_ack_may_ask_for_its_ack_already() -> None:
    pair = fresh()
    outgoing = pair.back.finish(send(pair, F.SET_PROTOCOL_FEATURES, U64(P.REPLY_ACK.mask), ask=True))
    assert outgoing == Outgoing(encode(F.SET_PROTOCOL_FEATURES, VERSION | REPLY, U64(0)))
    last = pair.back.finish(send(pair, F.SET_PROTOCOL_FEATURES, U64(0), ask=True))
    assert last is not None, "so may the one that takes it away"
    assert pair.back.finish(send(pair, F.SET_PROTOCOL_FEATURES, U64(0), ask=True)) is None


@pytest.mark.parametrize("ask", [False, True])
@pytest.mark.parametrize("reply_ack", [False, True])
def test_an_unknown_request_is_nacked_if_it_asks_and_then_closes(ask: bool, reply_ack: bool) -> None:
    pair = connect(protocol_features=P.REPLY_ACK.mask * reply_ack)
    for number in (0, 45, 1000, 0xFFFFFFFF):
        with pytest.raises(RemoteProtocolError, match=f"request {number}: unknown request") as caught:
            pair = connect(protocol_features=P.REPLY_ACK.mask * reply_ack)
            send(pair, number, ask=ask)
        nack = encode(number, VERSION | REPLY, U64(1))
        assert caught.value.answer == (nack if ask and reply_ack else b"")


def test_one_request_at_a_time() -> None:
    """Answers go out in the order of the requests; a ring that takes its time to stop holds up the next message."""
    pair = connect()
    first = send(pair, F.GET_FEATURES)
    assert pair.back.wanted == 0
    with pytest.raises(LocalProtocolError, match="finish"):
        pair.back.receive(encode(F.SET_OWNER, VERSION))
    pair.back.finish(first)
    assert pair.back.wanted == 12
    with pytest.raises(LocalProtocolError, match="not the request"):
        pair.back.finish(first)


def test_the_protocols_objection_overrides_a_handler() -> None:
    pair = connect()
    request = send(pair, F.SET_VRING_NUM, VringState(9, 256), ask=True)
    outgoing = pair.back.finish(request, None)
    assert outgoing is not None
    assert outgoing.data[12:] == U64(1).pack()


# Values

OBJECTIONABLE = [
    (F.SET_VRING_NUM, VringState(2, 256), "queue 2, there are 2"),
    (F.SET_VRING_ADDR, VringAddress(2, 0, 0, 0, 0, 0), "queue 2, there are 2"),
    (F.SET_VRING_BASE, VringState(0xFFFFFFFF, 0), "queue 4294967295"),
    (F.GET_VRING_BASE, VringState(2, 0), "queue 2"),
    (F.SET_VRING_KICK, VringFd(255, has_fd=False), "queue 255"),
    (F.SET_VRING_CALL, VringFd(2, has_fd=False), "queue 2"),
    (F.SET_VRING_ERR, VringFd(2, has_fd=False), "queue 2"),
    (F.SET_VRING_ENABLE, VringState(2, 1), "queue 2"),
    (F.SET_VRING_ENDIAN, VringState(2, 1), "queue 2"),
    (F.VRING_KICK, VringState(2, 0), "queue 2"),
    (F.SET_VRING_NUM, VringState(0, 0), "queue size 0"),
    (F.SET_VRING_NUM, VringState(0, 32769), "queue size 32769"),
    (F.SET_VRING_NUM, VringState(0, 1 << 31), "queue size"),
    (F.SET_VRING_NUM, VringState(0, 3), "power of two"),
    (F.SET_VRING_BASE, VringState(0, 0x10000), "reserved bits"),
    (F.SET_VRING_ENABLE, VringState(0, 2), "num 2, expected 0 or 1"),
    (F.SET_VRING_ENDIAN, VringState(0, 2), "num 2, expected 0 or 1"),
    (F.IOTLB_MSG, Iotlb(0, 0, 0, 0, 1), "IOTLB type 1, expected 2 or 3"),
    (F.SET_STATUS, U64(256), "no byte"),
    (F.SET_DEVICE_STATE_FD, DeviceStateTransfer(2, 0), "direction 2"),
    (F.SET_DEVICE_STATE_FD, DeviceStateTransfer(0, 1), "phase 1"),
]


@pytest.mark.parametrize(("code", "payload", "reason"), OBJECTIONABLE, ids=lambda value: getattr(value, "name", None))
@pytest.mark.parametrize("ask", [False, True])
def test_an_objectionable_value_is_refused_not_fatal(code: F, payload: Payload, reason: str, ask: bool) -> None:
    """Well-formed, so the two ends still understand each other: told if possible, else closed or dropped."""
    pair = connect(features=ALL_VIRTIO & ~V.RING_PACKED.mask)
    fds = (3,) if code is F.SET_DEVICE_STATE_FD else ()
    request = send(pair, code, payload, fds=fds, ask=ask)
    assert request.refusal is not None
    assert reason in request.refusal.reason
    if request.row.refusal or (ask and not request.row.reply):
        outgoing = pair.back.finish(request)
        assert outgoing is not None
        assert Header.unpack(outgoing.data[:12]) == (code, 0x5, 8)
        assert outgoing.data[12:] != bytes(8)
    elif request.row.silent:
        assert pair.back.finish(request) is None
    else:
        with pytest.raises(RemoteProtocolError, match=reason):
            pair.back.finish(request)
    with pytest.raises(LocalProtocolError, match=reason):
        pair.front.request(code, payload, fds)


def test_limits_of_a_queue_are_not_refused() -> None:
    pair = connect(features=ALL_VIRTIO & ~V.RING_PACKED.mask)
    for size in (1, 2, 32768):
        pair.call(F.SET_VRING_NUM, VringState(1, size))
    pair.call(F.SET_VRING_BASE, VringState(1, 0xFFFF))
    packed = connect()
    packed.call(F.SET_VRING_NUM, VringState(1, 3))
    packed.call(F.SET_VRING_BASE, VringState(1, 0xFFFFFFFF))


def test_the_reserved_num_of_get_vring_base_is_not_looked_at() -> None:
    request = send(connect(), F.GET_VRING_BASE, VringState(0, 1))
    assert request.refusal is None


def test_state_is_moved_only_while_the_device_is_suspended() -> None:
    pair = connect()
    assert send(pair, F.SET_DEVICE_STATE_FD, DeviceStateTransfer(0), fds=(3,)).refusal is None
    pair = connect()
    pair.back.kicked(0)
    assert send(pair, F.SET_DEVICE_STATE_FD, DeviceStateTransfer(0), fds=(3,)).refusal is not None


# Answers


def test_answers_are_paired_with_the_oldest_request() -> None:
    pair = connect()
    requests = [pair.front.request(code) for code in (F.GET_FEATURES, F.GET_QUEUE_NUM, F.GET_MAX_MEM_SLOTS)]
    assert pair.front.outstanding == 3
    answers = []
    for outgoing in requests:
        reply = pair.back.finish(pair.deliver(outgoing))
        assert reply is not None
        answers.append(read(pair.front, reply).code)
    assert answers == [F.GET_FEATURES, F.GET_QUEUE_NUM, F.GET_MAX_MEM_SLOTS]


def test_an_answer_to_another_request_is_rejected() -> None:
    pair = connect()
    pair.front.request(F.GET_FEATURES)
    pair.front.request(F.GET_QUEUE_NUM)
    with pytest.raises(RemoteProtocolError, match="reply to request 17"):
        read(pair.front, Outgoing(encode(F.GET_QUEUE_NUM, 5, U64(1))))


def test_an_answer_that_nobody_asked_for_is_rejected() -> None:
    with pytest.raises(RemoteProtocolError, match="nobody asked"):
        read(connect().front, Outgoing(encode(F.SET_OWNER, 5, U64(0))))


@pytest.mark.parametrize("size", [1, 4, 7, 9, 16, 4096])
def test_an_answer_of_the_wrong_size_is_rejected(size: int) -> None:
    pair = connect()
    pair.front.request(F.GET_FEATURES)
    with pytest.raises(RemoteProtocolError, match=f"{size} bytes, expected 8"):
        pair.front.receive(Header(F.GET_FEATURES, 5, size).pack())


@pytest.mark.parametrize(("body", "refused"), [(bytes(8), False), (b"\1" + bytes(7), True), (b"", False)])
def test_an_ack_is_a_u64_and_an_empty_one_can_only_mean_done(body: bytes, refused: bool) -> None:
    pair = connect()
    pair.front.request(F.SET_VRING_ENABLE, VringState(0, 1), need_reply=True)
    assert not pair.front.rings[0].enabled, "not before the answer"
    answer = read(pair.front, Outgoing(Header(F.SET_VRING_ENABLE, 5, len(body)).pack() + body))
    assert answer.refused is refused
    assert pair.front.rings[0].enabled is not refused


def test_end_of_file_with_an_answer_outstanding_is_an_error() -> None:
    pair = connect()
    pair.front.eof()
    pair.front.request(F.GET_FEATURES)
    with pytest.raises(RemoteProtocolError, match="without an answer"):
        pair.front.eof()


def test_nothing_is_known_before_it_was_asked() -> None:
    with pytest.raises(LocalProtocolError, match="PROTOCOL_FEATURES was not offered"):
        FrontendSession().request(F.GET_PROTOCOL_FEATURES)


@pytest.mark.parametrize(
    ("code", "payload"),
    [(F.SET_FEATURES, None), (F.GET_FEATURES, U64(1)), (F.SET_VRING_NUM, U64(1)), (B.CONFIG_CHANGE_MSG, None)],
)
def test_a_payload_or_request_of_another_kind_is_our_own_fault(code: F | B, payload: Payload | None) -> None:
    with pytest.raises(LocalProtocolError):
        connect().front.request(code, payload)


# The back-end's own channel


def channel() -> Pair:
    pair = connect()
    return Pair(pair.front, pair.back, pair.back.channel(), pair.front.channel())


def test_requests_of_the_back_end_do_not_touch_the_state_of_equal_numbers() -> None:
    """IOTLB_MSG is 1 there and GET_FEATURES is 1 here; VRING_ERR is 5 and so is SET_MEM_TABLE."""
    pair = channel()
    main = Pair(pair.front, pair.back, pair.front, pair.back)
    listen(main)
    for ring in (0, 1):
        main.call(F.SET_VRING_ENABLE, VringState(ring, 1))
        main.call(F.VRING_KICK, VringState(ring))
    before = seen(pair)
    payloads = {B.IOTLB_MSG: Iotlb(0, 0, 0, 0, 1), B.VRING_CALL: VringState(0), B.VRING_ERR: VringState(0)}
    for code in B:
        payload = payloads.get(code) or SAMPLES[BACKEND[code].request[0]]
        fds = (3,) * (code in (B.SHMEM_MAP, B.VRING_HOST_NOTIFIER_MSG))
        outcome = Reply(U64(0), (4,)) if code is B.SHARED_OBJECT_LOOKUP else None
        answer = pair.call(code, payload, fds, need_reply=True, outcome=outcome)
        assert answer is not None
        assert not answer.refused
    assert seen(pair) == before
    main.call(F.SET_FEATURES, U64(ALL_VIRTIO))
    main.call(F.SET_PROTOCOL_FEATURES, U64(ALL_PROTOCOL & ~CONDITIONAL))


def seen(pair: Pair) -> str:
    front, back = pair.front, pair.back
    sessions = [(end.features, end.protocol_features, end.rings, end.postcopy) for end in (front, back)]
    return repr((sessions, front.features_offered, front.protocol_features_offered))


def test_a_refused_lookup_has_no_descriptor() -> None:
    answer = channel().call(B.SHARED_OBJECT_LOOKUP, Uuid(bytes(16)), outcome=RequestRefused("unknown"))
    assert answer is not None
    assert (answer.refused, answer.payload, answer.fds) == (True, U64(1), ())


def test_an_area_with_a_descriptor_needs_backend_send_fd() -> None:
    pair = connect(protocol_features=ALL_PROTOCOL & ~CONDITIONAL & ~P.BACKEND_SEND_FD.mask)
    with pytest.raises(LocalProtocolError, match="BACKEND_SEND_FD"):
        pair.back.channel().request(B.VRING_HOST_NOTIFIER_MSG, VringArea(0, 4096, 0), (3,))
    pair.back.channel().request(B.VRING_HOST_NOTIFIER_MSG, VringArea(0, 0, 0, has_fd=False))


def test_a_refusal_by_the_front_end_never_closes_the_channel() -> None:
    assert channel().call(B.CONFIG_CHANGE_MSG, outcome=RequestRefused("busy")) is None


# Exceptions


def test_errors_say_what_was_wrong_where_to_read_and_whose_fault_it_is() -> None:
    error = RemoteProtocolError(F.SET_MEM_TABLE, "3 descriptors, expected 2", clause="VHOST_USER_SET_MEM_TABLE")
    assert str(error) == "SET_MEM_TABLE: 3 descriptors, expected 2 (see VHOST_USER_SET_MEM_TABLE)"
    assert (error.request, error.answer) == (F.SET_MEM_TABLE, b"")
    with pytest.raises(TypeError):
        ProtocolError(None, "nobody's fault")
