"""The message catalog: one row per message, the only place that knows what the message is.

Its readers: exchange.py (sizes, descriptors, gates, answers), state.py (gates and variants), table.py (the
documentation), tests and tools (names, generic cases for every row). What a message *does* to the connection is in
state.py and postcopy.py.

In `request` and `reply` the first payload is the one we send; the others are what peers are known to send instead.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Final, NamedTuple, Self, cast

from vhostuser.protocol import rules
from vhostuser.protocol.codes import BackendRequest as B
from vhostuser.protocol.codes import FrontendRequest as F
from vhostuser.protocol.codes import ProtocolFeature as P
from vhostuser.protocol.codes import VirtioFeature as V
from vhostuser.protocol.payloads import (
    U64,
    Config,
    CryptoSession,
    DeviceStateReply,
    DeviceStateTransfer,
    Empty,
    Inflight,
    Iotlb,
    Log,
    MemoryTable,
    MmapMsg,
    Payload,
    PostcopyAck,
    ShmemConfig,
    SingleRegion,
    Uuid,
    VringAddress,
    VringArea,
    VringFd,
    VringState,
    XenMemoryTable,
    XenSingleRegion,
)
from vhostuser.protocol.rules import Rule


class When(Enum):
    """Conditions under which a message has another form."""

    LOG_SHMFD = "LOG_SHMFD was negotiated"
    XEN_MMAP = "XEN_MMAP was negotiated"
    POSTCOPY = "between POSTCOPY_LISTEN and POSTCOPY_END"


class Gate(NamedTuple):
    """Features without which the message is not allowed. offered: that the back-end offers them is enough."""

    features: tuple[P | V, ...] = ()
    offered: bool = False


OPEN: Final = Gate()


class Refusal(NamedTuple):
    """How a message's own reply says no. Never with a descriptor."""

    words: str
    make: Callable[[Payload], Payload]
    """From the request, the reply that refuses it."""
    told: Callable[[Payload, Payload, int], bool]
    """Of a request, its reply and the number of descriptors with that: was it refused?"""


class Variant(NamedTuple):
    """The row in force under a condition."""

    when: When
    row: "Row"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One message.

    - request, reply: payloads it may have. Without a reply a u64 acknowledges it, where need_reply is set and REPLY_ACK
      was negotiated.
    - fds, reply_fds: least and most descriptors.
    - rules: values it may not have. variants: what it becomes under a condition.
    - done: the reply that stands for plain success, if there is one.
    - refusal: how the reply says no; None if it cannot, and the connection must be closed.
    - silent: nothing depends on this message, so where no ack was asked for it may be refused without a word.
    - asks: whether our end sets need_reply, where that is not the caller's choice.
    - unserved: why our runtime does not serve it; empty if it does. hook: the class that a device mixes in to serve it.
    """

    code: F | B
    request: tuple[type[Payload], ...] = (Empty,)
    reply: tuple[type[Payload], ...] = ()
    fds: tuple[int, int] = (0, 0)
    reply_fds: tuple[int, int] = (0, 0)
    gate: Gate = OPEN
    rules: tuple[Rule, ...] = ()
    done: Payload | None = None
    refusal: Refusal | None = None
    silent: bool = False
    asks: bool | None = None
    variants: tuple[Variant, ...] = field(default=(), repr=False)
    unserved: str = ""
    hook: str = ""
    note: str = ""

    @property
    def clause(self) -> str:
        """Its heading in the specification."""
        return self.code.clause

    @property
    def from_backend(self) -> bool:
        """Is it sent on the back-end's own channel?"""
        return isinstance(self.code, B)

    def __str__(self) -> str:
        return f"{'BACKEND_' if self.from_backend else ''}{self.code.name}"

    def when(self, when: When, **changes: object) -> Self:
        """This row, with a variant that differs in `changes`."""
        variant = replace(self, **changes)  # type: ignore[arg-type]
        return replace(self, variants=(*self.variants, Variant(when, variant)))


_STATUS: Final = Refusal("non-zero u64", lambda _: U64(1), lambda _, reply, fds: reply != U64(0))
# By the text zero length. rust-vmm says no with the twelve bytes in front of the data alone.
_EMPTY: Final = Refusal(
    "empty reply",
    lambda _: Empty(),
    lambda request, reply, _: isinstance(reply, Empty) or cast(Config, reply).size == 0 != cast(Config, request).size,
)
# QEMU takes the reply to ADVISE for a failure when no descriptor came, and the migration fails in good order.
_NO_FD: Final = Refusal("reply without descriptor", lambda _: Empty(), lambda _, reply, fds: not fds)
_NO_BUFFER: Final = Refusal(
    "mmap size 0, no descriptor",
    lambda request: replace(cast(Inflight, request), mmap_size=0, mmap_offset=0),
    lambda _, reply, fds: cast(Inflight, reply).mmap_size == 0,
)
_NO_SESSION: Final = Refusal(
    "session id -1",
    lambda request: replace(cast(CryptoSession, request), session_id=-1),
    lambda _, reply, fds: cast(CryptoSession, reply).session_id < 0,
)
_NO_TRANSFER: Final = Refusal(
    "error 1, no descriptor",
    lambda _: DeviceStateReply(1),
    lambda _, reply, fds: cast(DeviceStateReply, reply).error != 0,
)

_OK: Final = U64(0)
_STATE: Final = (VringState,)
_QUEUE: Final = (rules.queue_exists,)
_NET: Final = "for network devices"
_NOT_OFFERED: Final = "its feature is not offered"
_XEN: Final = "such memory is mapped through the hypervisor, not from a descriptor"
_NOT_SENT: Final = "our back-end has no use for it"


def _offered(*features: P | V) -> Gate:
    return Gate(features, offered=True)


def _negotiated(*features: P | V) -> Gate:
    return Gate(features)


def _frontend_rows() -> Iterator[Row]:
    """Ids 1 to 18: the set of the first vhost-user, which later features only gave variants."""
    yield Row(code=F.GET_FEATURES, reply=(U64,))
    yield Row(
        code=F.SET_FEATURES,
        request=(U64,),
        rules=(rules.only_offered_features,),
        note="with STATUS a refusal can be told by FEATURES_OK, and does not close",
    )
    yield Row(code=F.SET_OWNER)
    yield Row(code=F.RESET_OWNER, silent=True, note="disables all rings and changes nothing else")
    yield (
        Row(code=F.SET_MEM_TABLE, request=(MemoryTable,), fds=(0, 8), note="one descriptor per region")
        .when(
            When.POSTCOPY,
            reply=(MemoryTable,),
            rules=(rules.some_region,),
            note="the reply holds the back-end's addresses",
        )
        .when(When.XEN_MMAP, request=(XenMemoryTable,), unserved=_XEN)
    )
    # The text gives the LOG_SHMFD reply no payload and peers differ (0, 8, 16 bytes; stale content). A front-end that
    # reads the u64 finds success in ours. It cannot say no: QEMU ignores it, and would lose dirty pages; so we close
    # instead.
    yield Row(
        code=F.SET_LOG_BASE, request=(U64,), unserved="a log without a descriptor is somebody else's memory"
    ).when(When.LOG_SHMFD, request=(Log,), fds=(1, 1), reply=(U64, Empty, Log), done=_OK, unserved="")
    yield Row(code=F.SET_LOG_FD, fds=(1, 1), silent=True)
    yield Row(code=F.SET_VRING_NUM, request=_STATE, rules=(*_QUEUE, rules.queue_size))
    yield Row(code=F.SET_VRING_ADDR, request=(VringAddress,), rules=_QUEUE)
    yield Row(code=F.SET_VRING_BASE, request=_STATE, rules=(*_QUEUE, rules.base_fits_ring))
    # num is reserved; drafts of GET_VRING_BASE_INFLIGHT gave it a meaning. Peers send what they like and it is not
    # looked at.
    yield Row(
        code=F.GET_VRING_BASE,
        request=_STATE,
        reply=_STATE,
        rules=_QUEUE,
        note="stops the ring; with GET_VRING_BASE_INFLIGHT what is under way may stay in the in-flight region",
    )
    yield Row(
        code=F.SET_VRING_KICK, request=(VringFd,), fds=(0, 1), rules=_QUEUE, note="without descriptor: starts, polled"
    )
    yield Row(code=F.SET_VRING_CALL, request=(VringFd,), fds=(0, 1), rules=_QUEUE)
    yield Row(code=F.SET_VRING_ERR, request=(VringFd,), fds=(0, 1), rules=_QUEUE, silent=True)
    yield Row(code=F.GET_PROTOCOL_FEATURES, reply=(U64,), gate=_offered(V.PROTOCOL_FEATURES))
    yield Row(
        code=F.SET_PROTOCOL_FEATURES,
        request=(U64,),
        gate=_offered(V.PROTOCOL_FEATURES),
        rules=(
            rules.only_offered_protocol_features,
            rules.inband_notifications_complete,
            rules.left_in_flight_is_tracked,
        ),
    )
    yield Row(code=F.GET_QUEUE_NUM, reply=(U64,), gate=_offered(P.MQ))
    # By the text bit 30 must be negotiated. crosvm and QEMU before 7.2 sent this message without: offering must do.
    yield Row(
        code=F.SET_VRING_ENABLE,
        request=_STATE,
        gate=_offered(V.PROTOCOL_FEATURES),
        rules=(*_QUEUE, rules.zero_or_one),
    )


def _frontend_extension_rows() -> Iterator[Row]:
    """Ids 19 to 44: extensions behind features. Where the text says "present in GET_..." offering is enough."""
    yield Row(code=F.SEND_RARP, request=(U64,), gate=_offered(P.RARP), silent=True)
    # QEMU sends it before SET_FEATURES, so that VIRTIO_NET_F_MTU is at most offered by then.
    yield Row(code=F.NET_SET_MTU, request=(U64,), gate=_offered(P.MTU, V.NET_F_MTU), silent=True)
    yield Row(code=F.SET_BACKEND_REQ_FD, fds=(1, 1), gate=_offered(P.BACKEND_REQ))
    yield Row(
        code=F.IOTLB_MSG,
        request=(Iotlb,),
        reply=(U64,),
        gate=_negotiated(V.ACCESS_PLATFORM),
        rules=(rules.frontend_iotlb,),
        done=_OK,
        refusal=_STATUS,
        asks=True,
    )
    yield Row(
        code=F.SET_VRING_ENDIAN,
        request=_STATE,
        gate=_negotiated(P.CROSS_ENDIAN),
        rules=(*_QUEUE, rules.zero_or_one, rules.order_of_a_legacy_ring),
        note="for devices that read requests in either order (protocol_features)",
    )
    yield Row(code=F.GET_CONFIG, request=(Config,), reply=(Config, Empty), gate=_negotiated(P.CONFIG), refusal=_EMPTY)
    yield Row(code=F.SET_CONFIG, request=(Config,), gate=_negotiated(P.CONFIG), silent=True)
    yield Row(
        code=F.CREATE_CRYPTO_SESSION,
        request=(CryptoSession,),
        reply=(CryptoSession,),
        gate=_negotiated(P.CRYPTO_SESSION),
        refusal=_NO_SESSION,
        hook="CryptoSessions",
        note="layout not in the specification, see CryptoSession",
    )
    yield Row(
        code=F.CLOSE_CRYPTO_SESSION,
        request=(U64,),
        gate=_negotiated(P.CRYPTO_SESSION),
        silent=True,
        hook="CryptoSessions",
    )
    yield Row(code=F.POSTCOPY_ADVISE, reply=(Empty,), reply_fds=(1, 1), gate=_offered(P.PAGEFAULT), refusal=_NO_FD)
    # By the text an ordinary message. QEMU sets need_reply and reads a u64 even where REPLY_ACK was not negotiated.
    yield Row(
        code=F.POSTCOPY_LISTEN,
        reply=(U64,),
        gate=_offered(P.PAGEFAULT),
        rules=(rules.advised,),
        done=_OK,
        refusal=_STATUS,
        asks=True,
        note="always acknowledged",
    )
    # No gate: QEMU says it to a back-end that was restarted in postcopy as well, perhaps without the right to a
    # userfaultfd, and gives the whole migration up if it is not answered (seen on 7.2).
    yield Row(code=F.POSTCOPY_END, reply=(U64,), done=_OK, refusal=_STATUS)
    yield Row(
        code=F.GET_INFLIGHT_FD,
        request=(Inflight,),
        reply=(Inflight,),
        reply_fds=(1, 1),
        gate=_negotiated(P.INFLIGHT_SHMFD),
        refusal=_NO_BUFFER,
    )
    yield Row(code=F.SET_INFLIGHT_FD, request=(Inflight,), fds=(1, 1), gate=_negotiated(P.INFLIGHT_SHMFD))
    yield Row(code=F.GPU_SET_SOCKET, fds=(1, 1), hook="GpuSocket")
    yield Row(
        code=F.RESET_DEVICE,
        gate=_offered(P.RESET_DEVICE),
        note="stops and disables all rings; memory, features and the connection stay",
    )
    yield Row(
        code=F.VRING_KICK,
        request=_STATE,
        gate=_negotiated(P.INBAND_NOTIFICATIONS),
        rules=_QUEUE,
        note="starts a ring that has no kick descriptor too",
    )
    yield Row(code=F.GET_MAX_MEM_SLOTS, reply=(U64,), gate=_negotiated(P.CONFIGURE_MEM_SLOTS))
    yield (
        Row(code=F.ADD_MEM_REG, request=(SingleRegion,), fds=(1, 1), gate=_negotiated(P.CONFIGURE_MEM_SLOTS))
        .when(When.POSTCOPY, reply=(SingleRegion,), note="the reply holds the back-end's address")
        .when(When.XEN_MMAP, request=(XenSingleRegion,), unserved=_XEN)
    )
    yield Row(
        code=F.REM_MEM_REG,
        request=(SingleRegion,),
        fds=(0, 1),
        gate=_negotiated(P.CONFIGURE_MEM_SLOTS),
        note="guest, user and size name the region; a descriptor is closed unused; in postcopy too QEMU reads no reply",
    ).when(When.XEN_MMAP, request=(XenSingleRegion,), unserved=_XEN)
    yield Row(
        code=F.SET_STATUS,
        request=(U64,),
        gate=_negotiated(P.STATUS),
        rules=(rules.status_byte,),
        silent=True,
        note="rings are served from DRIVER_OK on; 0 stops them all",
    )
    yield Row(code=F.GET_STATUS, reply=(U64,), gate=_negotiated(P.STATUS))
    # QEMU sends no UUID at all (it never sets the size), and nobody agrees on the reply's payload: the descriptor is
    # it.
    yield Row(
        code=F.GET_SHARED_OBJECT,
        request=(Uuid, Empty),
        reply=(Empty, U64, Uuid),
        reply_fds=(1, 1),
        gate=_negotiated(P.SHARED_OBJECT),
        refusal=_NO_FD,
        hook="SharedObjects",
    )
    yield Row(
        code=F.SET_DEVICE_STATE_FD,
        request=(DeviceStateTransfer,),
        reply=(DeviceStateReply,),
        fds=(1, 1),
        reply_fds=(0, 1),
        gate=_negotiated(P.DEVICE_STATE),
        rules=(rules.transfer_while_suspended,),
        done=DeviceStateReply(),
        refusal=_NO_TRANSFER,
    )
    yield Row(
        code=F.CHECK_DEVICE_STATE,
        reply=(U64,),
        gate=_negotiated(P.DEVICE_STATE),
        done=_OK,
        refusal=_STATUS,
    )
    yield Row(code=F.GET_SHMEM_CONFIG, reply=(ShmemConfig,), gate=_negotiated(P.SHMEM), hook="SharedMemoryRegions")
    yield Row(
        code=F.POSTCOPY_ACK,
        request=(PostcopyAck,),
        gate=_offered(P.PAGEFAULT),
        rules=(rules.bases_exchanged,),
        asks=False,
        note="no request of its own: under the id of the last memory message, or 0, while postcopy waits for it",
    )


def _backend_rows() -> Iterator[Row]:
    iotlb = _negotiated(V.ACCESS_PLATFORM)
    shared = _negotiated(P.SHARED_OBJECT)
    inband = _negotiated(P.INBAND_NOTIFICATIONS)
    yield Row(code=B.IOTLB_MSG, request=(Iotlb,), gate=iotlb, rules=(rules.backend_iotlb,), silent=True)
    yield Row(code=B.CONFIG_CHANGE_MSG, gate=_negotiated(P.CONFIG), silent=True)
    yield Row(
        code=B.VRING_HOST_NOTIFIER_MSG,
        request=(VringArea,),
        fds=(0, 1),
        gate=_negotiated(P.HOST_NOTIFIER),
        rules=(*_QUEUE, rules.may_send_fd),
        silent=True,
        hook="HostNotifiers",
    )
    yield Row(code=B.VRING_CALL, request=_STATE, gate=inband, rules=_QUEUE, silent=True)
    yield Row(code=B.VRING_ERR, request=_STATE, gate=inband, rules=_QUEUE, silent=True)
    yield Row(code=B.SHARED_OBJECT_ADD, request=(Uuid,), gate=shared, silent=True, hook="SharedObjects")
    yield Row(code=B.SHARED_OBJECT_REMOVE, request=(Uuid,), gate=shared, silent=True, hook="SharedObjects")
    yield Row(
        code=B.SHARED_OBJECT_LOOKUP,
        request=(Uuid,),
        reply=(U64,),
        reply_fds=(1, 1),
        gate=shared,
        refusal=_STATUS,
        hook="SharedObjects",
    )
    shmem = _negotiated(P.SHMEM)
    hook = "SharedMemoryRegions"
    yield Row(code=B.SHMEM_MAP, request=(MmapMsg,), fds=(1, 1), gate=shmem, silent=True, hook=hook)
    yield Row(code=B.SHMEM_UNMAP, request=(MmapMsg,), gate=shmem, silent=True, hook=hook)


def _index(*rows: Iterable[Row]) -> dict[int, Row]:
    return {int(row.code): row for group in rows for row in group}


FRONTEND: Final[Mapping[int, Row]] = _index(_frontend_rows(), _frontend_extension_rows())
"""Requests of the front-end by wire id; 0 is the postcopy acknowledgement."""

BACKEND: Final[Mapping[int, Row]] = _index(_backend_rows())
"""Requests of the back-end by wire id, on the channel that SET_BACKEND_REQ_FD gave it."""


def size_words(sizes: range) -> str:
    """A payload's sizes in words: "8", "12 to 268", "8 to 264 in steps of 32"."""
    if len(sizes) == 1:
        return str(sizes[0])
    return f"{sizes[0]} to {sizes[-1]}" + (f" in steps of {sizes.step}" if sizes.step > 1 else "")
