"""The wake channel's messages and the order in which both ends send them."""

import ctypes
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vhostuser.protocol import (
    WAKE_MAX_RANGES,
    WAKE_MAX_SIZE,
    WAKE_VERSION,
    LocalProtocolError,
    RemoteProtocolError,
    Wake,
    WakeAck,
    WakeClient,
    WakeError,
    WakeHello,
    WakeKind,
    WakeMessage,
    WakeRange,
    WakeReason,
    WakeServer,
    WakeStatus,
    unpack_wake,
)

END = 1 << 64

u32 = st.integers(0, (1 << 32) - 1)
u64 = st.integers(0, END - 1)
ranges = st.builds(lambda guest, length: WakeRange(guest, min(length, END - guest, END - 1)), u64, u64)
messages: st.SearchStrategy[WakeMessage] = st.one_of(
    st.builds(WakeHello, u32.filter(bool), u32),
    st.builds(Wake, u64, st.lists(ranges, max_size=WAKE_MAX_RANGES).map(tuple)),
    st.builds(WakeAck, u64, u64, st.sampled_from(WakeStatus)),
    st.builds(WakeError, st.sampled_from(WakeReason)),
)


def greeted() -> tuple[WakeServer, WakeClient]:
    server, client = WakeServer(), WakeClient()
    client.receive(server.receive(WakeHello().pack()).pack())
    return server, client


# ---- bytes


@given(messages)
def test_a_message_arrives_as_it_was_sent(message: WakeMessage) -> None:
    assert len(message.pack()) <= WAKE_MAX_SIZE
    assert unpack_wake(message.pack()) == message


def test_the_layout_is_that_of_c() -> None:
    """Without padding, with every field aligned as C aligns it."""

    class Range(ctypes.Structure):
        _fields_ = (("guest", ctypes.c_uint64), ("length", ctypes.c_uint64))

    class WakeOfTwo(ctypes.Structure):
        _fields_ = (("kind", ctypes.c_uint32), ("count", ctypes.c_uint32), ("id", ctypes.c_uint64), ("r", Range * 2))

    class Ack(ctypes.Structure):
        _fields_ = (
            ("kind", ctypes.c_uint32),
            ("status", ctypes.c_uint32),
            ("id", ctypes.c_uint64),
            ("issued", ctypes.c_uint64),
        )

    wake = Wake(7, (WakeRange(1, 2), WakeRange(3, 4)))
    assert wake.pack() == bytes(WakeOfTwo(2, 2, 7, (Range * 2)(Range(1, 2), Range(3, 4))))
    assert WakeAck(7, 6, WakeStatus.NO_POSTCOPY).pack() == bytes(Ack(3, 1, 7, 6))
    assert WakeHello(1, 9).pack() == bytes((ctypes.c_uint32 * 3)(1, 1, 9))
    assert WakeError(WakeReason.ORDER).pack() == bytes((ctypes.c_uint32 * 2)(4, 4))


@given(st.binary(max_size=64) | st.builds(lambda kind, rest: struct.pack("=I", kind) + rest, u32, st.binary()))
def test_any_bytes_are_a_message_or_break_the_protocol(datagram: bytes) -> None:
    try:
        message = unpack_wake(datagram)
    except RemoteProtocolError as error:
        assert isinstance(unpack_wake(error.answer), WakeError)
    else:
        assert message.pack() == datagram


@given(messages, st.integers(-40, 40).filter(bool))
def test_a_message_of_another_size_breaks_the_protocol(message: WakeMessage, more: int) -> None:
    data = message.pack()
    with pytest.raises(RemoteProtocolError):
        unpack_wake(data.ljust(len(data) + more, b"\0")[: max(0, len(data) + more)])


@pytest.mark.parametrize(
    ("reason", "datagram"),
    [
        (WakeReason.MALFORMED, b""),
        (WakeReason.MALFORMED, struct.pack("=III", WakeKind.HELLO, 0, 0)),
        (WakeReason.MALFORMED, struct.pack("=IIQ", WakeKind.WAKE, 1, 0)),
        (WakeReason.COUNT, struct.pack("=IIQ", WakeKind.WAKE, 256, 0) + bytes(16 * 256)),
        (WakeReason.COUNT, struct.pack("=IIQ", WakeKind.WAKE, (1 << 28) + 1, 0) + bytes(16)),  # right in 32 bits
        (WakeReason.RANGE, struct.pack("=IIQQQ", WakeKind.WAKE, 1, 0, END - 4096, 4097)),
        (WakeReason.MALFORMED, struct.pack("=IIQQ", WakeKind.ACK, 2, 0, 0)),
        (WakeReason.MALFORMED, struct.pack("=II", WakeKind.ERROR, 0)),
        (WakeReason.MALFORMED, struct.pack("=II", 5, 0)),
    ],
    ids=["empty", "version", "size", "too-many", "32-bit", "wraps", "status", "reason", "kind"],
)
def test_what_no_peer_may_send(reason: WakeReason, datagram: bytes) -> None:
    with pytest.raises(RemoteProtocolError) as caught:
        unpack_wake(datagram)
    assert unpack_wake(caught.value.answer) == WakeError(reason)


def test_a_range_may_reach_the_end_of_the_address_space() -> None:
    wake = Wake(0, (WakeRange(END - 4096, 4096), WakeRange(END - 1, 0)))
    assert unpack_wake(wake.pack()) == wake


# ---- the back-end's end


@given(st.integers(1, (1 << 32) - 1))
def test_the_version_is_one_that_both_speak(version: int) -> None:
    assert WakeServer().receive(WakeHello(version).pack()) == WakeHello(min(version, WAKE_VERSION), WAKE_MAX_RANGES)


def test_nothing_comes_before_hello() -> None:
    with pytest.raises(RemoteProtocolError, match="HELLO was expected"):
        WakeServer().receive(Wake(1, ()).pack())


@pytest.mark.parametrize("message", [WakeHello(), WakeAck(1, 0), WakeError(WakeReason.RANGE)], ids=str)
def test_after_hello_only_wake_comes(message: WakeMessage) -> None:
    server, _ = greeted()
    assert server.receive(Wake(1, ()).pack()) == Wake(1, ())
    with pytest.raises(RemoteProtocolError, match="WAKE was expected"):
        server.receive(message.pack())


# ---- the front-end's end


@given(st.lists(ranges, max_size=1000), st.integers(1, 2 * WAKE_MAX_RANGES))
def test_any_number_of_ranges_is_sent_in_messages_that_the_back_end_takes(asked: list[WakeRange], most: int) -> None:
    client = WakeClient()
    assert client.receive(WakeHello(1, most).pack()) is None
    sent = list(client.request(asked))
    assert [one for wake in sent for one in wake.ranges] == asked
    assert all(0 < len(wake.ranges) <= min(most, WAKE_MAX_RANGES) for wake in sent)
    assert len({wake.id for wake in sent}) == len(sent)


def test_acknowledgements_come_in_order() -> None:
    _, client = greeted()
    first, second = (next(client.request([(0, 4096)])) for _ in range(2))
    with pytest.raises(RemoteProtocolError):
        client.receive(WakeAck(second.id, 4096).pack())
    assert client.receive(WakeAck(first.id, 4096).pack()) == WakeAck(first.id, 4096)
    assert client.receive(WakeAck(second.id, 0, WakeStatus.NO_POSTCOPY).pack())
    with pytest.raises(RemoteProtocolError):
        client.receive(WakeAck(second.id, 0).pack())


@pytest.mark.parametrize("status", WakeStatus)
def test_no_more_is_acknowledged_than_was_asked_for(status: WakeStatus) -> None:
    _, client = greeted()
    (wake,) = client.request([(0, 4096), (0, 4096)])
    with pytest.raises(RemoteProtocolError):
        client.receive(WakeAck(wake.id, 8193 if status is WakeStatus.ISSUED else 1, status).pack())


@pytest.mark.parametrize("hello", [WakeHello(WAKE_VERSION + 1, 1), WakeHello(WAKE_VERSION, 0)], ids=str)
def test_a_hello_that_cannot_be_used(hello: WakeHello) -> None:
    with pytest.raises(RemoteProtocolError):
        WakeClient().receive(hello.pack())


def test_the_reason_for_the_end_is_told() -> None:
    with pytest.raises(RemoteProtocolError, match="RANGE"):
        WakeClient().receive(WakeError(WakeReason.RANGE).pack())


@pytest.mark.parametrize(("guest", "length"), [(-1, 1), (0, -1), (END, 1), (END - 1, 2)])
def test_ranges_that_do_not_exist_are_not_sent(guest: int, length: int) -> None:
    _, client = greeted()
    with pytest.raises(LocalProtocolError):
        list(client.request([(guest, length)]))


def test_nothing_is_sent_before_the_back_end_has_answered() -> None:
    with pytest.raises(LocalProtocolError, match="HELLO"):
        list(WakeClient().request([(0, 1)]))
