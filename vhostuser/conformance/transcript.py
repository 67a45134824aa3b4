"""What a front-end said on one connection, and what stood between both ends at each of its words.

What belongs here: messages as they were heard, the state that they add up to. What does not: rules
(``frontend_cases``), sockets (``standin``). No I/O.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from vhostuser.protocol import (
    U64,
    FrontendRequest,
    Inflight,
    Log,
    MemoryRegion,
    MemoryTable,
    Payload,
    ProtocolFeature,
    SingleRegion,
    VirtioFeature,
    VringAddress,
    VringFd,
    VringState,
)
from vhostuser.protocol.witness import Message

F = FrontendRequest


class Given(NamedTuple):
    """A descriptor that came with a message. kind: memfd, file, eventfd, socket, pipe, or the kernel's own word.

    size: bytes, of a memfd or file, else -1. identity: device and inode, or an eventfd's number, to know it again.
    """

    kind: str
    size: int = -1
    identity: tuple[int, int] = (0, 0)

    @property
    def is_file(self) -> bool:
        """Can it be mapped?"""
        return self.kind in ("memfd", "file")


@dataclass(frozen=True)
class Heard:
    """A request of the front-end. given: its descriptors. answer: what our own reply to it held, None: none yet."""

    message: Message
    given: tuple[Given, ...] = ()
    answer: Payload | None = None
    answered: tuple[Given, ...] = ()

    @property
    def code(self) -> int:
        return self.message.header.request

    @property
    def payload(self) -> Payload | None:
        return self.message.payload

    def __str__(self) -> str:
        return self.message.name


@dataclass
class RingSeen:
    """A ring as messages have described it on this connection. armed: it has a kick, by descriptor or by polling."""

    size: int = 0
    base: int | None = None
    address: VringAddress | None = None
    armed: bool = False
    called: bool = False
    enabled: bool = False


class RegionSeen(NamedTuple):
    """A region of guest memory and the descriptor that came for it."""

    region: MemoryRegion
    given: Given | None

    def holds_user(self, address: int, length: int) -> bool:
        """Are these user addresses all in it?"""
        return self.region.user <= address and address + length <= self.region.user + self.region.size


def same(one: MemoryRegion, other: MemoryRegion) -> bool:
    """Would REM_MEM_REG of one take the other away?"""
    return (one.guest, one.user, one.size) == (other.guest, other.user, other.size)


def overlap(one: tuple[int, int], other: tuple[int, int]) -> bool:
    """Do two (start, length) have a byte in common?"""
    return one[0] < other[0] + other[1] and other[0] < one[0] + one[1]


@dataclass
class Scene:
    """What the messages up to here add up to. features, protocol: as set, None before."""

    offered: int
    offered_protocol: int
    queues: int
    seen: Counter[int] = field(default_factory=Counter)
    features: int | None = None
    protocol: int | None = None
    regions: list[RegionSeen] = field(default_factory=list)
    rings: dict[int, RingSeen] = field(default_factory=dict)
    slots: int | None = None
    log: Log | None = None
    inflight: Inflight | None = None
    buffer: Given | None = None
    status: int = 0
    kicks: dict[int, Given] = field(default_factory=dict)

    def has(self, feature: ProtocolFeature | VirtioFeature) -> bool:
        """Was it negotiated?"""
        bits = self.protocol if isinstance(feature, ProtocolFeature) else self.features
        return bool((bits or 0) & feature.mask)

    def ring(self, index: int) -> RingSeen:
        """The ring of that index, as new if it was not named yet."""
        return self.rings.setdefault(index, RingSeen())

    @property
    def running(self) -> list[int]:
        """Rings that may run: they have a kick and were not stopped."""
        return [index for index, ring in self.rings.items() if ring.armed]

    @property
    def end(self) -> int:
        """The guest address behind the last byte of memory."""
        return max((seen.region.guest + seen.region.size for seen in self.regions), default=0)

    def apply(self, heard: Heard) -> None:
        """The message has been taken."""
        self.seen[heard.code] += 1
        self._features(heard)
        self._memory(heard)
        self._rings(heard)

    def _features(self, heard: Heard) -> None:
        match heard.code, heard.payload:
            case F.SET_FEATURES, U64(value):
                self.features = value
            case F.SET_PROTOCOL_FEATURES, U64(value):
                self.protocol = value
            case F.SET_STATUS, U64(value):
                self.status = value
        if heard.code == F.GET_MAX_MEM_SLOTS and isinstance(heard.answer, U64):
            self.slots = heard.answer.value

    def _memory(self, heard: Heard) -> None:
        match heard.code, heard.payload:
            case F.SET_MEM_TABLE, MemoryTable(regions):
                given = [*heard.given, *[None] * len(regions)]
                self.regions = [RegionSeen(*both) for both in zip(regions, given, strict=False)]
            case F.ADD_MEM_REG, SingleRegion(region):
                self.regions.append(RegionSeen(region, heard.given[0] if heard.given else None))
            case F.REM_MEM_REG, SingleRegion(region):
                self.regions = [seen for seen in self.regions if not same(seen.region, region)]
            case F.SET_LOG_BASE, Log() as log:
                self.log = log
        if heard.code == F.GET_INFLIGHT_FD and isinstance(heard.answer, Inflight):
            self.inflight, self.buffer = heard.answer, heard.answered[0] if heard.answered else None

    def _rings(self, heard: Heard) -> None:
        match heard.code, heard.payload:
            case F.SET_VRING_NUM, VringState(index, num):
                self.ring(index).size = num
            case F.SET_VRING_BASE, VringState(index, num):
                self.ring(index).base = num
            case F.SET_VRING_ADDR, VringAddress() as address:
                self.ring(address.index).address = address
            case F.SET_VRING_KICK, VringFd(index):
                self.ring(index).armed = True
                self.kicks.update((index, given) for given in heard.given[:1])
            case F.SET_VRING_CALL, VringFd(index):
                self.ring(index).called = True
            case F.SET_VRING_ENABLE, VringState(index, num):
                self.ring(index).enabled = bool(num)
            case F.GET_VRING_BASE, VringState(index):
                self.ring(index).armed = False
            case F.RESET_DEVICE, _:
                self.rings.clear()


@dataclass
class Transcript:
    """One connection. name: when it was, as in "without memory slots". offered, protocol, queues: what we say we have.

    ended: the front-end has closed it. cut: we have.
    """

    name: str
    offered: int
    protocol: int
    queues: int
    heard: list[Heard] = field(default_factory=list)
    ended: bool = False
    cut: bool = False

    def __post_init__(self) -> None:
        self.now = self._opening()
        """What it all adds up to."""
        self.ready = set[int]()
        """Rings that were made ready to run at some time: how far a front-end goes by itself."""

    def add(self, heard: Heard) -> None:
        """One more message."""
        self.heard.append(heard)
        self.now.apply(heard)
        by_message = self.now.has(VirtioFeature.PROTOCOL_FEATURES)
        self.ready |= {index for index in self.now.running if self.now.rings[index].enabled or not by_message}

    def walk(self) -> Iterator[tuple[Scene, Heard]]:
        """Every message with what stood before it. The scene is one object, which changes."""
        scene = self._opening()
        for heard in self.heard:
            yield scene, heard
            scene.apply(heard)

    def _opening(self) -> Scene:
        return Scene(self.offered, self.protocol, self.queues)

    def codes(self) -> Counter[int]:
        """How often each request was sent."""
        return Counter(heard.code for heard in self.heard)


def total(transcripts: Sequence[Transcript]) -> Counter[int]:
    """How often each request was sent in all of them."""
    return sum((transcript.codes() for transcript in transcripts), Counter())
