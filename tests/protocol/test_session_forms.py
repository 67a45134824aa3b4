"""The two sessions: messages whose form depends on what was negotiated, and answers that say no."""

import pytest

from tests.protocol.samples import (
    REGION,
    XEN_REGION,
    connect,
    read,
    send,
)
from vhostuser.protocol import (
    U64,
    Config,
    CryptoSession,
    DeviceStateReply,
    DeviceStateTransfer,
    Empty,
    Header,
    Inflight,
    Iotlb,
    LocalProtocolError,
    Log,
    Outgoing,
    Payload,
    RemoteProtocolError,
    Reply,
    RequestRefused,
    SingleRegion,
    Uuid,
    VringState,
    XenMemoryTable,
    encode,
)
from vhostuser.protocol import FrontendRequest as F
from vhostuser.protocol import ProtocolFeature as P
from vhostuser.protocol import VirtioFeature as V

BIT_30 = V.PROTOCOL_FEATURES.mask


@pytest.mark.parametrize("size", [0, 1, 57, 60, 256])
def test_configuration_of_any_size_is_answered_in_that_size(size: int) -> None:
    """69 and 72 bytes (57 and 60 of data) both occur for blk."""
    pair = connect()
    asked = Config(0, size, 0, bytes(size))
    answer = pair.call(F.GET_CONFIG, asked, outcome=Reply(Config(0, size, 0, b"x" * size)))
    assert answer is not None
    assert not answer.refused
    assert answer.payload == Config(0, size, 0, b"x" * size)


def test_configuration_of_another_size_than_asked_is_nobodys_answer() -> None:
    pair = connect()
    request = pair.deliver(pair.asking.request(F.GET_CONFIG, Config(0, 8, 0, bytes(8))))
    with pytest.raises(LocalProtocolError, match="expected 20 as asked"):
        pair.back.finish(request, Reply(Config(0, 4, 0, bytes(4))))
    with pytest.raises(RemoteProtocolError, match="expected 20 as asked"):
        read(pair.front, Outgoing(encode(F.GET_CONFIG, 5, Config(0, 4, 0, bytes(4)))))


@pytest.mark.parametrize("refusal", [Empty(), Config(0, 0, 0, b"")], ids=["text", "rust-vmm"])
def test_configuration_refused(refusal: Payload) -> None:
    """By a payload of size 0; rust-vmm sends the twelve bytes in front of the data."""
    pair = connect()
    pair.asking.request(F.GET_CONFIG, Config(0, 8, 0, bytes(8)))
    assert read(pair.front, Outgoing(encode(F.GET_CONFIG, 5, refusal))).refused


def test_a_layout_that_another_feature_would_bring_is_named() -> None:
    """A front-end for Xen that takes it for granted is told so, and the log says it in one line."""
    for regions in (1, 4):  # four of Xen's are as long as five of the others
        body = XenMemoryTable((XEN_REGION,) * regions).pack()
        with pytest.raises(RemoteProtocolError, match="it would be right if XEN_MMAP was negotiated"):
            read(connect().back, Outgoing(Header(F.SET_MEM_TABLE, 1, len(body)).pack() + body, tuple(range(regions))))


@pytest.mark.parametrize("bit", [P.GPA_ADDRESSES, P.GET_VRING_BASE_INFLIGHT], ids=lambda bit: bit.name)
def test_a_peer_that_counts_bits_as_drafts_did_is_recognised(bit: P) -> None:
    pair = connect(protocol_features=bit.mask | P.INFLIGHT_SHMFD.mask)
    asked = Outgoing(Header(F.GET_SHMEM_CONFIG, 1, 0).pack())
    with pytest.raises(RemoteProtocolError, match=rf"\(bit {bit:d} was, which was SHMEM in drafts; it is 22\)"):
        read(pair.back, asked)
    with pytest.raises(RemoteProtocolError, match="SHMEM was not negotiated \\(see"):
        read(connect(protocol_features=0).back, asked)


REFUSALS = [
    (F.GET_CONFIG, Config(0, 4, 0, b"abcd"), (), Empty()),
    (F.GET_INFLIGHT_FD, Inflight(0, 0, 2, 64), (), Inflight(0, 0, 2, 64)),
    (F.SET_DEVICE_STATE_FD, DeviceStateTransfer(0), (3,), DeviceStateReply(1)),
    (F.CREATE_CRYPTO_SESSION, CryptoSession(1, b"key", 0), (), CryptoSession(1, b"key", -1)),
    (F.GET_SHARED_OBJECT, Uuid(bytes(16)), (), Empty()),
    (F.CHECK_DEVICE_STATE, Empty(), (), U64(1)),
    (F.POSTCOPY_END, Empty(), (), U64(1)),
    (F.IOTLB_MSG, Iotlb(0, 0, 0, 0, 2), (), U64(1)),
]


@pytest.mark.parametrize(("code", "payload", "fds", "told"), REFUSALS, ids=lambda value: getattr(value, "name", None))
def test_replies_that_say_no(code: F, payload: Payload, fds: tuple[int, ...], told: Payload) -> None:
    answer = connect().call(code, payload, fds, outcome=RequestRefused("no"))
    assert answer is not None
    assert (answer.refused, answer.payload, answer.fds) == (True, told, ())


@pytest.mark.parametrize(
    ("code", "payload"),
    [
        (F.GET_FEATURES, None),
        (F.GET_PROTOCOL_FEATURES, None),
        (F.GET_QUEUE_NUM, None),
        (F.GET_MAX_MEM_SLOTS, None),
        (F.GET_STATUS, None),
        (F.GET_VRING_BASE, VringState(0)),
        (F.GET_SHMEM_CONFIG, None),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_replies_that_cannot_say_no(code: F, payload: Payload | None) -> None:
    """Any number would be taken for the answer, so the connection closes."""
    pair = connect()
    with pytest.raises(RemoteProtocolError, match="no way to tell: no"):
        pair.back.finish(send(pair, code, payload, ask=True), RequestRefused("no"))


@pytest.mark.parametrize("reply", [b"", bytes(8), b"\xff" * 8, bytes(16)], ids=len)
def test_any_reply_to_set_log_base_will_do(reply: bytes) -> None:
    """The text gives none; peers send 0, 8 or 16 bytes, some of them stale."""
    pair = connect(protocol_features=P.LOG_SHMFD.mask)
    pair.asking.request(F.SET_LOG_BASE, Log(4096, 0), (3,))
    answer = read(pair.front, Outgoing(Header(F.SET_LOG_BASE, 5, len(reply)).pack() + reply))
    assert not answer.refused


def test_our_reply_to_set_log_base_is_a_success() -> None:
    pair = connect(protocol_features=P.LOG_SHMFD.mask)
    outgoing = pair.back.finish(send(pair, F.SET_LOG_BASE, Log(4096, 0), fds=(3,)))
    assert outgoing == Outgoing(encode(F.SET_LOG_BASE, 5, U64(0)))


def test_without_shared_log_set_log_base_has_no_reply() -> None:
    pair = connect(protocol_features=0)
    assert pair.call(F.SET_LOG_BASE, U64(0x1000)) is None


def test_a_log_refused_closes_the_connection() -> None:
    """QEMU ignores what the reply says and would lose dirty pages."""
    pair = connect(protocol_features=P.LOG_SHMFD.mask | P.REPLY_ACK.mask)
    with pytest.raises(RemoteProtocolError, match="no way to tell"):
        pair.back.finish(send(pair, F.SET_LOG_BASE, Log(4096, 0), fds=(3,), ask=True), RequestRefused("too small"))


@pytest.mark.parametrize("fds", [(), (3,)])
def test_removing_a_region_may_bring_a_descriptor(fds: tuple[int, ...]) -> None:
    pair = connect()
    assert send(pair, F.REM_MEM_REG, SingleRegion(REGION), fds=fds).fds == fds


def test_a_shared_object_asked_for_without_uuid() -> None:
    """QEMU forgets to set the size of this message."""
    assert send(connect(), F.GET_SHARED_OBJECT).payload == Empty()


@pytest.mark.parametrize("own_channel", [False, True])
def test_a_transfer_channel_of_the_back_ends_own(own_channel: bool) -> None:
    pair = connect()
    reply = Reply(DeviceStateReply(has_fd=True), (9,)) if own_channel else None
    answer = pair.call(F.SET_DEVICE_STATE_FD, DeviceStateTransfer(0), (3,), outcome=reply)
    assert answer is not None
    assert answer.payload.pack() == U64(0 if own_channel else 0x100).pack()
    assert len(answer.fds) == own_channel
