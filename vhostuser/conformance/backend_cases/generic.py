"""Cases made from the rows of the catalog: each message too short, too long, with too few and too many descriptors,
without its feature, and with the question whether it was done.

What belongs here: one legal message for every row, and what is done to it. A row whose feature is not offered is
skipped. Sections of the messages.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from vhostuser.conformance.lane import Lane
from vhostuser.conformance.peer import Peer
from vhostuser.conformance.suite import Theme, check, equal
from vhostuser.protocol import (
    FRONTEND,
    REPLY,
    U64,
    VERSION,
    Config,
    ConfigFlags,
    CryptoSession,
    DeviceStateTransfer,
    Empty,
    FrontendRequest,
    Inflight,
    Iotlb,
    IotlbType,
    Payload,
    ProtocolFeature,
    Row,
    SingleRegion,
    Uuid,
    VirtioFeature,
    VringAddress,
    VringFd,
    VringState,
)

F, P = FrontendRequest, ProtocolFeature
CASES: Theme[Peer] = Theme("message", "Front-end message types")
ACK = P.REPLY_ACK


NOTHING = Empty()


@dataclass(frozen=True)
class Message:
    """A legal message in the state in which ``_ready`` leaves the connection."""

    payload: Payload = NOTHING
    fds: Sequence[int] = ()


Legal = Callable[[Peer, Lane], Message | Awaitable[Message]]


async def _ready(peer: Peer, row: Row, without: ProtocolFeature | None = None) -> Lane:
    """Negotiates everything that ``row`` needs and more, or all but one feature, shares memory, and makes a ring that
    does not run."""
    virtio = [feature for feature in row.gate.features if isinstance(feature, VirtioFeature)]
    protocol = [feature for feature in row.gate.features if isinstance(feature, ProtocolFeature)]
    await peer.negotiate(*virtio, also=protocol, without=() if without is None else {without})
    await peer.share()
    return peer.make_lane()


def _eventfd(peer: Peer, lane: Lane) -> Message:
    return Message(VringFd(lane.index), (peer.eventfd(),))


def _addresses(peer: Peer, lane: Lane) -> Message:
    user, queue = peer.memory.map.guest_to_host, lane.queue
    return Message(VringAddress(lane.index, 0, user(queue.desc), user(queue.used), user(queue.avail), 0))


def _log(peer: Peer, _: Lane) -> Message:
    log = peer.make_log()
    return Message(log.describe(), (log.fd,))


def _socket(peer: Peer, _: Lane) -> Message:
    ours, theirs = socket.socketpair()
    peer.own(ours.close)
    peer.own(theirs.close)
    return Message(fds=(theirs.fileno(),))


def _buffer(peer: Peer, _: Lane) -> Message:
    fd = os.memfd_create("inflight", os.MFD_CLOEXEC)
    peer.own(lambda: os.close(fd))
    os.truncate(fd, 65536)
    return Message(Inflight(65536, 0, 1, 64), (fd,))


def _added(peer: Peer, _: Lane) -> Message:
    region = peer.memory.add(64 << 20, 1 << 20)
    return Message(SingleRegion(region.describe()), (region.fd,))


async def _config(peer: Peer, _: Lane) -> Message:
    return Message(Config(0, 8, ConfigFlags.LIVE_MIGRATION, await peer.frontend.get_config(0, 8)))


def _pipe(peer: Peer, _: Lane) -> Message:
    return Message(DeviceStateTransfer(0), (peer.pipe()[1],))


def _state(num: int) -> Legal:
    return lambda _, lane: Message(VringState(lane.index, num))


def _just(payload: Payload) -> Legal:
    return lambda peer, lane: Message(payload)


LEGAL: dict[FrontendRequest, Legal] = {
    F.SET_FEATURES: lambda peer, _: Message(U64(peer.frontend.session.features)),
    F.SET_MEM_TABLE: lambda peer, _: Message(peer.memory.table(), peer.memory.fds),
    F.SET_LOG_BASE: _log,
    F.SET_LOG_FD: lambda peer, _: Message(fds=(peer.eventfd(),)),
    F.SET_VRING_NUM: _state(64),
    F.SET_VRING_ADDR: _addresses,
    F.SET_VRING_BASE: _state(0),
    F.GET_VRING_BASE: _state(0),
    F.SET_VRING_KICK: _eventfd,
    F.SET_VRING_CALL: _eventfd,
    F.SET_VRING_ERR: _eventfd,
    F.SET_PROTOCOL_FEATURES: lambda peer, _: Message(U64(peer.frontend.session.protocol_features)),
    F.SET_VRING_ENABLE: _state(0),
    F.SEND_RARP: _just(U64(0x010203040506)),
    F.NET_SET_MTU: _just(U64(1500)),
    F.SET_BACKEND_REQ_FD: _socket,
    F.IOTLB_MSG: _just(Iotlb(0, 4096, 0, 0, IotlbType.INVALIDATE)),
    F.SET_VRING_ENDIAN: _state(0),
    F.GET_CONFIG: _just(Config(0, 8, 0, bytes(8))),
    F.SET_CONFIG: _config,
    F.CREATE_CRYPTO_SESSION: _just(CryptoSession(0, bytes(1024))),
    F.CLOSE_CRYPTO_SESSION: _just(U64(0)),
    F.GET_INFLIGHT_FD: _just(Inflight(0, 0, 1, 64)),
    F.SET_INFLIGHT_FD: _buffer,
    F.GPU_SET_SOCKET: _socket,
    F.VRING_KICK: _state(0),
    F.ADD_MEM_REG: _added,
    F.REM_MEM_REG: lambda peer, _: Message(SingleRegion(peer.memory.regions[0].describe())),
    F.SET_STATUS: _just(U64(0)),
    F.GET_SHARED_OBJECT: _just(Uuid(bytes(16))),
    F.SET_DEVICE_STATE_FD: _pipe,
}
"""By request, where it is more than a header."""

OTHER_DEVICES = frozenset(
    {F.SEND_RARP, F.NET_SET_MTU, F.IOTLB_MSG, F.SET_VRING_ENDIAN, F.CREATE_CRYPTO_SESSION, F.CLOSE_CRYPTO_SESSION}
    | {F.GPU_SET_SOCKET, F.GET_SHARED_OBJECT, F.GET_SHMEM_CONFIG, F.VRING_KICK}
)
"""Messages that few devices know: of these only what is too short, unasked for, or to be acknowledged is tried."""


async def _legal(row: Row, peer: Peer, lane: Lane) -> Message:
    made = LEGAL.get(FrontendRequest(row.code), _just(NOTHING))(peer, lane)
    return made if isinstance(made, Message) else await made


def _needs(row: Row) -> tuple[ProtocolFeature | VirtioFeature, ...]:
    logged = (P.LOG_SHMFD,) if row.code is F.SET_LOG_BASE else ()
    return (*row.gate.features, *logged)


def _add_short(row: Row) -> None:
    @CASES.should(
        f"short.{_word(row)}", f"{row} with too little payload is not done.", ACK, *_needs(row), section=row.clause
    )
    async def _(peer: Peer) -> None:
        message = await _legal(row, peer, await _ready(peer, row))
        await peer.refuses(row.code, message.payload.pack()[:-4], message.fds)


def _add_long(row: Row) -> None:
    @CASES.should(
        f"long.{_word(row)}", f"{row} with too much payload is not done.", ACK, *_needs(row), section=row.clause
    )
    async def _(peer: Peer) -> None:
        message = await _legal(row, peer, await _ready(peer, row))
        await peer.refuses(row.code, message.payload.pack() + bytes(4), message.fds)


def _add_bare(row: Row) -> None:
    @CASES.must(
        f"no-descriptor.{_word(row)}", f"{row} without its descriptor is not done.", ACK, *_needs(row),
        section=row.clause,
    )  # fmt: skip
    async def _(peer: Peer) -> None:
        message = await _legal(row, peer, await _ready(peer, row))
        await peer.refuses(row.code, message.payload)


def _add_extra(row: Row) -> None:
    @CASES.should(
        f"extra-descriptor.{_word(row)}", f"A descriptor that comes with {row}, which has none, is closed.",
        *_needs(row), section=row.clause,
    )  # fmt: skip
    async def _(peer: Peer) -> None:
        message = await _legal(row, peer, await _ready(peer, row))
        read, write = peer.pipe()
        await peer.react(row.code, message.payload, (*message.fds, write))
        check(await peer.let_go(read, write), "the descriptor closed", "it is still open in the back-end")


def _add_ungated(row: Row, feature: ProtocolFeature) -> None:
    @CASES.should(
        f"ungated.{_word(row)}", f"{row} is not done where {feature.name} was not negotiated.", ACK, feature,
        section=row.clause,
    )  # fmt: skip
    async def _(peer: Peer) -> None:
        lane = await _ready(peer, row, without=feature)
        message = Message(VringState(lane.index)) if row.code is F.VRING_KICK else await _unconfigured(row, peer, lane)
        await peer.refuses(row.code, message.payload, message.fds)


async def _unconfigured(row: Row, peer: Peer, lane: Lane) -> Message:
    """Without CONFIG the space cannot be read to be written back."""
    return Message(Config(0, 8, 1, bytes(8))) if row.code is F.SET_CONFIG else await _legal(row, peer, lane)


def _add_acknowledged(row: Row) -> None:
    @CASES.must(
        f"acknowledged.{_word(row)}", f"{row} is acknowledged where it asks to be.", ACK, *_needs(row),
        section=ACK_SECTION,
    )  # fmt: skip
    async def _(peer: Peer) -> None:
        message = await _legal(row, peer, await _ready(peer, row))
        reaction = await peer.react(row.code, message.payload, message.fds)
        # Those that a back-end need not serve, or that are about what is not there: their ack may be no.
        optional = row.code in (F.SET_LOG_FD, F.SET_CONFIG, F.GPU_SET_SOCKET, F.CLOSE_CRYPTO_SESSION)
        body = reaction.body if optional else U64(0).pack()
        equal("flags and payload of the answer", (reaction.flags, reaction.body), (VERSION | REPLY, body))
        check(len(reaction.body) == 8, "a u64", str(reaction))


ACK_SECTION = "VHOST_USER_PROTOCOL_F_REPLY_ACK"


def _word(row: Row) -> str:
    return row.code.name.lower().replace("_", "-")


def _variants(row: Row) -> Row:
    """The row in force where everything offered was negotiated; SET_LOG_BASE is another message then."""
    return row.variants[0].row if row.code is F.SET_LOG_BASE else row


def _add_all(row: Row) -> None:
    rare = row.code in OTHER_DEVICES
    if Empty not in row.request:
        if row.code is not F.CREATE_CRYPTO_SESSION:  # whose size is not in the specification
            _add_short(row)
        if not rare:
            _add_long(row)
    if row.fds[1] and not rare and row.code is not F.REM_MEM_REG:
        _add_bare(row)
    if not row.fds[1] and not row.gate.features:
        _add_extra(row)
    for feature in row.gate.features:
        if isinstance(feature, ProtocolFeature) and not row.gate.offered:
            _add_ungated(row, feature)
    if not row.reply:
        _add_acknowledged(row)


for _row in FRONTEND.values():
    if _row.code is not F.POSTCOPY_ACK:
        _add_all(_variants(_row))
