"""Values for every message, and both ends of a connection wired together in memory."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from hypothesis import strategies as st

from vhostuser.protocol import (
    BACKEND,
    FRONTEND,
    NEED_REPLY,
    U64,
    VERSION,
    Answer,
    BackendSession,
    Client,
    Config,
    CryptoSession,
    DeviceStateReply,
    DeviceStateTransfer,
    Empty,
    FrontendSession,
    Inflight,
    Iotlb,
    Log,
    MemoryRegion,
    MemoryTable,
    MmapMsg,
    Outgoing,
    Payload,
    PostcopyAck,
    Reply,
    Request,
    RequestRefused,
    Row,
    Server,
    ShmemConfig,
    SingleRegion,
    Uuid,
    VringAddress,
    VringArea,
    VringFd,
    VringState,
    XenMemoryRegion,
    XenMemoryTable,
    XenSingleRegion,
    encode,
)
from vhostuser.protocol import BackendRequest as B
from vhostuser.protocol import FrontendRequest as F
from vhostuser.protocol import ProtocolFeature as P
from vhostuser.protocol import VirtioFeature as V
from vhostuser.protocol.catalog import When

ALL_VIRTIO = sum(feature.mask for feature in V)
ALL_PROTOCOL = sum(feature.mask for feature in P)
CONDITIONAL = P.LOG_SHMFD.mask | P.XEN_MMAP.mask
"""Protocol features that give messages another form."""

u8, u16, u32, u64 = (st.integers(0, (1 << bits) - 1) for bits in (8, 16, 32, 64))
_region = st.builds(MemoryRegion, u64, u64, u64, u64)
_xen_region = st.builds(XenMemoryRegion, u64, u64, u64, u64, u32, u32)

_config_data = st.binary(max_size=256)


def _tuples(item: st.SearchStrategy[Any], most: int) -> st.SearchStrategy[Any]:
    return st.lists(item, max_size=most).map(tuple)


PAYLOADS: dict[type[Payload], st.SearchStrategy[Payload]] = {
    Empty: st.just(Empty()),
    U64: st.builds(U64, u64),
    VringState: st.builds(VringState, u32, u32),
    VringAddress: st.builds(VringAddress, u32, u32, u64, u64, u64, u64),
    VringFd: st.builds(VringFd, u8, st.booleans()),
    MemoryTable: st.builds(MemoryTable, _tuples(_region, 8)),
    SingleRegion: st.builds(SingleRegion, _region),
    XenMemoryTable: st.builds(XenMemoryTable, _tuples(_xen_region, 8)),
    XenSingleRegion: st.builds(XenSingleRegion, _xen_region),
    Log: st.builds(Log, u64, u64),
    Iotlb: st.builds(Iotlb, u64, u64, u64, u8, u8),
    Config: st.builds(
        lambda data, offset, flags: Config(offset, len(data), flags, data), st.binary(max_size=256), u32, u32
    ),
    CryptoSession: st.builds(CryptoSession, u64, st.binary(max_size=2032), st.integers(-(1 << 63), (1 << 63) - 1)),
    VringArea: st.builds(VringArea, u8, u64, u64, st.booleans()),
    Inflight: st.builds(Inflight, u64, u64, u16, u16),
    Uuid: st.builds(Uuid, st.binary(min_size=16, max_size=16)),
    DeviceStateTransfer: st.builds(DeviceStateTransfer, u32, u32),
    DeviceStateReply: st.one_of(st.builds(DeviceStateReply, u8), st.just(DeviceStateReply(0, True))),
    ShmemConfig: st.builds(
        ShmemConfig, u32, st.lists(u64, min_size=4, max_size=4).map(lambda sizes: (*sizes, *[0] * 252))
    ),
    MmapMsg: st.builds(MmapMsg, u8, u64, u64, u64, u64),
    PostcopyAck: st.builds(PostcopyAck, st.booleans()),
}

REGION = MemoryRegion(0, 0x1000, 0x7000_0000, 0)
REGIONS = (REGION, MemoryRegion(1 << 32, 0x2000, 0x7100_0000, 0x1000))
XEN_REGION = XenMemoryRegion(0, 0x1000, 0x7000_0000, 0, 1, 7)

SAMPLES: dict[type[Payload], Payload] = {
    Empty: Empty(),
    U64: U64(0),
    VringState: VringState(1, 1),
    VringAddress: VringAddress(1, 1, 0x1000, 0x2000, 0x3000, 0x4000),
    VringFd: VringFd(1),
    MemoryTable: MemoryTable(REGIONS),
    SingleRegion: SingleRegion(REGION),
    XenMemoryTable: XenMemoryTable((XEN_REGION,)),
    XenSingleRegion: XenSingleRegion(XEN_REGION),
    Log: Log(0x1000, 0),
    Iotlb: Iotlb(0x1000, 0x1000, 0x7000_0000, 3, 2),
    Config: Config(0, 4, 0, b"abcd"),
    CryptoSession: CryptoSession(1, b"parameters", 5),
    VringArea: VringArea(1, 0x1000, 0),
    Inflight: Inflight(0x2000, 0, 2, 64),
    Uuid: Uuid(bytes(range(16))),
    DeviceStateTransfer: DeviceStateTransfer(1),
    DeviceStateReply: DeviceStateReply(),
    ShmemConfig: ShmemConfig(1, (0x1000, *[0] * 255)),
    MmapMsg: MmapMsg(1, 0, 0x1000, 0x1000, 1),
    PostcopyAck: PostcopyAck(),
}

_SPECIAL: dict[tuple[type, int], Payload] = {
    (B, B.IOTLB_MSG): Iotlb(0x1000, 0x1000, 0, 3, 1),
    (F, F.SET_VRING_ENDIAN): VringState(1, 0),  # the other order is for drivers without VERSION_1
}


class Case(NamedTuple):
    """A row in one of its forms."""

    row: Row
    when: When | None

    def __str__(self) -> str:
        return str(self.row) + (f"-{self.when.name}" if self.when else "")

    def request(self) -> Payload:
        """A payload that no rule objects to."""
        return _SPECIAL.get((type(self.row.code), self.row.code), SAMPLES[self.row.request[0]])

    def fds(self) -> tuple[int, ...]:
        count = self.request().fd_count()
        return tuple(range(100, 100 + (self.row.fds[0] if count is None else count)))

    def reply(self) -> Reply:
        """A reply that does what was asked."""
        return Reply(SAMPLES[self.row.reply[0]], tuple(range(200, 200 + self.row.reply_fds[0])))

    def outcome(self) -> Reply | None:
        return self.reply() if self.row.reply else None


def _cases(rows: Sequence[Row]) -> Iterator[Case]:
    for row in rows:
        yield Case(row, None)
        yield from (Case(variant.row, variant.when) for variant in row.variants)


CASES = tuple(_cases([*FRONTEND.values(), *BACKEND.values()]))
"""Every message of both directions in every form."""


@dataclass
class Pair:
    """Two ends of one connection; on the back-end's own channel asking and answering change places."""

    front: FrontendSession
    back: BackendSession
    asking: Client
    answering: Server

    def deliver(self, outgoing: Outgoing) -> Request:
        """A request to the end that answers, header and payload read one after the other."""
        request = read(self.answering, outgoing)
        assert isinstance(request, Request)
        return request

    def call(
        self,
        code: F | B,
        payload: Payload | None = None,
        fds: Sequence[int] = (),
        *,
        need_reply: bool = False,
        outcome: Reply | RequestRefused | None = None,
    ) -> Answer | None:
        """One request there and its answer back."""
        request = self.deliver(self.asking.request(code, payload, fds, need_reply))
        outgoing = self.answering.finish(request, outcome)
        if outgoing is None:
            assert not self.asking.outstanding
            return None
        answer = read(self.asking, outgoing)
        assert isinstance(answer, Answer)
        return answer


def read(end: Any, outgoing: Outgoing) -> Any:
    """Feed `end` as a channel does: so many bytes as it wants, descriptors with the first of them."""
    data, fds = outgoing
    result = None
    while data:
        assert result is None, "a message was complete before its end"
        wanted = end.wanted
        result = end.receive(data[:wanted], fds)
        data, fds = data[wanted:], ()
    return result


def connect(
    features: int = ALL_VIRTIO,
    protocol_features: int = ALL_PROTOCOL & ~CONDITIONAL,
    *,
    offered: int = ALL_PROTOCOL,
    queues: int = 2,
) -> Pair:
    """Two sessions that have negotiated."""
    front, back = FrontendSession(queues), BackendSession(ALL_VIRTIO, offered, queues)
    pair = Pair(front, back, front, back)
    pair.call(F.GET_FEATURES)
    pair.call(F.GET_PROTOCOL_FEATURES)
    pair.call(F.SET_PROTOCOL_FEATURES, U64(protocol_features))
    pair.call(F.SET_FEATURES, U64(features))
    return pair


def listen(pair: Pair) -> Pair:
    """Bring `pair` into postcopy."""
    pair.call(F.POSTCOPY_ADVISE, outcome=Reply(Empty(), (9,)))
    pair.call(F.POSTCOPY_LISTEN)
    return pair


_NEEDS = {When.LOG_SHMFD: P.LOG_SHMFD.mask, When.XEN_MMAP: P.XEN_MMAP.mask}


def connect_for(case: Case) -> Pair:
    """A pair whose next request may be that of `case`."""
    negotiated = ALL_PROTOCOL & ~CONDITIONAL | (_NEEDS.get(case.when, 0) if case.when else 0)
    pair = connect(protocol_features=negotiated)
    if case.when is When.POSTCOPY or case.row.code is F.POSTCOPY_ACK:
        listen(pair)
    elif case.row.code is F.POSTCOPY_LISTEN:
        pair.call(F.POSTCOPY_ADVISE, outcome=Reply(Empty(), (9,)))
    if case.row.from_backend:
        pair.asking, pair.answering = pair.back.channel(), pair.front.channel()
    return pair


def fresh(features: int = ALL_VIRTIO, protocol_features: int = ALL_PROTOCOL) -> Pair:
    """Connected, and nothing said yet."""
    front, back = FrontendSession(2), BackendSession(features, protocol_features, 2)
    return Pair(front, back, front, back)


def send(
    pair: Pair, code: int, payload: Payload | None = None, *, fds: tuple[int, ...] = (), ask: bool = False
) -> Request:
    """A request past all the checks of our own sender."""
    request = read(pair.answering, Outgoing(encode(code, VERSION | NEED_REPLY * ask, payload), fds))
    assert isinstance(request, Request)
    return request
