"""A front-end's part as data: what it says, in which order, and how it is said to a back-end.

What belongs here: the words of such parts, what each message is filled with, requests through the rings. What does not:
the parts of known front-ends (``backend_cases.personas``).
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, NamedTuple

from vhostuser.conformance.lane import Lane
from vhostuser.conformance.peer import Peer
from vhostuser.conformance.suite import equal
from vhostuser.drivers.blk import BlkRequest
from vhostuser.frontend import InflightBuffer
from vhostuser.protocol import (
    U64,
    Config,
    FrontendRequest,
    Inflight,
    Payload,
    ProtocolFeature,
    SingleRegion,
    VirtioFeature,
    VringAddress,
    VringFd,
    VringState,
)

F = FrontendRequest
Feature = ProtocolFeature | VirtioFeature
_RING_ROOM = 32 * 1024
"""Guest memory for each ring in each place: 1024 entries fit."""
_PLACES = 2
_OF_A_DEVICE = (1 << 24) - 1
"""Feature bits whose meaning depends on the device."""


@dataclass(frozen=True)
class Say:
    """A request. value: what it says, where that is not plain from what went before. asks: it has need_reply, where
    REPLY_ACK was negotiated. only, unless: a feature that must, or must not, have been negotiated."""

    code: F
    value: Any = None
    asks: bool = False
    only: Feature | None = None
    unless: Feature | None = None

    def due(self, has: Callable[[Feature], bool]) -> bool:
        """Is it said under these features?"""
        return (self.only is None or has(self.only)) and not (self.unless is not None and has(self.unless))


@dataclass(frozen=True)
class Each:
    """All of this for the first ring, then all of it for the next."""

    steps: tuple[Say, ...]


@dataclass(frozen=True)
class Lay:
    """The guest's driver makes new rings, of ``size`` entries, in another place of memory if ``place`` is another."""

    size: int
    place: int = 0


@dataclass(frozen=True)
class Serve:
    """Requests go through every ring, and come back done."""


@dataclass(frozen=True)
class Offer:
    """Requests are put into every ring and kicked; they need not come back yet."""


Step = Say | Each | Lay | Serve | Offer


def asking(*steps: Step) -> tuple[Step, ...]:
    """The same, each message with need_reply: front-ends that set it once for all set it on every request."""

    def one(step: Step) -> Step:
        if isinstance(step, Each):
            return Each(tuple(replace(say, asks=True) for say in step.steps))
        return replace(step, asks=True) if isinstance(step, Say) else step

    return tuple(one(step) for step in steps)


def each(*steps: Say) -> Each:
    """For each ring, one ring after the other."""
    return Each(steps)


@dataclass(frozen=True)
class Persona:
    """A front-end's part.

    features, protocol_features: what it takes of what is offered. regions: its memory, by guest address and bytes.
    rings_at, requests_at: guest addresses. queues: rings, on a device that has no say in it.
    """

    features: int
    protocol_features: int
    steps: tuple[Step, ...]
    regions: tuple[tuple[int, int], ...] = ((0, 8 << 20),)
    rings_at: int = 0
    requests_at: int = 1 << 20
    queues: int = 1

    def script(self, has: Callable[[Feature], bool], rings: Sequence[int]) -> Iterator[tuple[Step, int]]:
        """Every step in order, and the ring that it is about. has: is asked when its time has come."""
        for step in self.steps:
            if isinstance(step, Each):
                yield from ((say, ring) for ring in rings for say in step.steps if say.due(has))
            elif not isinstance(step, Say) or step.due(has):
                yield step, rings[0]


class _Filled(NamedTuple):
    payload: Payload | None = None
    fds: tuple[int, ...] = ()


class Player:
    """Says a persona's part to a back-end. Everything that it makes is closed with the case."""

    def __init__(self, peer: Peer, persona: Persona) -> None:
        self.peer = peer
        self.persona = persona
        self.memory = peer.make_memory(*persona.regions)
        peer.adopt(self.memory)
        self.rings = range(2 if peer.index else persona.queues)
        self.lanes: dict[int, Lane] = {}
        self.offered: dict[F, int] = {}
        self.inflight: InflightBuffer | None = None

    async def play(self) -> None:
        """Raises what a refusal or a missing answer raises, and Violation where requests do not come back."""
        for step, ring in self.persona.script(self.peer.frontend.session.has, self.rings):
            match step:
                case Say(code=F.GET_CONFIG) if self.peer.index:
                    pass  # the space that personas ask for is a disk's
                case Say():
                    await self._say(step, ring)
                case Lay():
                    self._lay(step)
                case Serve():
                    await self._serve()
                case Offer():
                    self._offer()

    async def _say(self, say: Say, ring: int) -> None:
        fill = _FILL.get(say.code)
        payload, fds = fill(self, say, ring) if fill else _Filled()
        asks = say.asks and self.peer.frontend.session.has(ProtocolFeature.REPLY_ACK)
        answer, came = await self.peer.frontend.request(say.code, payload, fds, need_reply=asks)
        match say.code:
            case F.GET_FEATURES | F.GET_PROTOCOL_FEATURES:
                assert isinstance(answer, U64)
                self.offered[say.code] = answer.value
            case F.GET_VRING_BASE if ring in self.lanes:
                assert isinstance(answer, VringState)
                self.lanes[ring].base = answer.num
            case F.GET_CONFIG:
                assert isinstance(answer, Config)
                equal("bytes of the configuration space", len(answer.data), say.value[1])
            case F.GET_INFLIGHT_FD:
                assert isinstance(answer, Inflight)
                self._keep(InflightBuffer(came.take(), replace(answer, queue_size=say.value)))
        came.close()

    def _keep(self, buffer: InflightBuffer) -> None:
        self.inflight = buffer
        self.peer.own(buffer.close)

    def _lay(self, lay: Lay) -> None:
        for ring in self.rings:
            at = self.persona.rings_at + (ring * _PLACES + lay.place) * _RING_ROOM
            lane = self.peer.make_lane(ring, size=lay.size, at=at, requests=self.persona.requests_at + (ring << 20))
            self.lanes[ring] = lane

    def _busy(self) -> list[Lane]:
        """Rings whose requests this suite knows: of a network device the one that sends."""
        return [lane for ring, lane in self.lanes.items() if not self.peer.index or ring == self.peer.index]

    async def _serve(self) -> None:
        for lane in self._busy():
            await lane.works(*[BlkRequest.read(sector, 1) for sector in range(4)])

    def _offer(self) -> None:
        for lane in self._busy():
            lane.offer()
            lane.kick()

    # ---- what messages are filled with

    def features(self, say: Say) -> _Filled:
        """What it takes of what was offered; of a network device nothing that only a disk has."""
        wanted = self.persona.features if say.value is None else say.value
        return _Filled(U64(self.offered[F.GET_FEATURES] & wanted & (~_OF_A_DEVICE if self.peer.index else -1)))

    def protocol_features(self) -> _Filled:
        """What it takes of what was offered."""
        return _Filled(U64(self.offered[F.GET_PROTOCOL_FEATURES] & self.persona.protocol_features))

    def call(self, say: Say, ring: int) -> _Filled:
        """A front-end has an eventfd for calls before its guest has rings."""
        lane = self.lanes.get(ring)
        return _Filled(VringFd(ring), (lane.ring.call_fd if lane else self.peer.eventfd(),))

    def channel(self) -> _Filled:
        """The other end is kept, and nobody reads from it."""
        ours, theirs = socket.socketpair()
        self.peer.own(ours.close)
        self.peer.own(theirs.close)
        return _Filled(None, (theirs.fileno(),))

    def address(self, ring: int) -> _Filled:
        """With the used ring's guest address for a log, as QEMU gives it whether anything is logged or not."""
        queue = self.lanes[ring].queue
        user = self.memory.map.guest_to_host
        return _Filled(VringAddress(ring, 0, user(queue.desc), user(queue.used), user(queue.avail), queue.used))

    def region(self, number: int) -> _Filled:
        """One region by its place in the persona's memory."""
        region = self.memory.regions[number]
        return _Filled(SingleRegion(region.describe()), (region.fd,))

    def buffer(self) -> _Filled:
        """What GET_INFLIGHT_FD has brought."""
        assert self.inflight is not None
        return _Filled(self.inflight.description, (self.inflight.fd,))


def _config(say: Say) -> _Filled:
    offset, size, flags = say.value
    return _Filled(Config(offset, size, flags, bytes(size)))


_FILL: Final[Mapping[F, Callable[[Player, Say, int], _Filled]]] = {
    F.SET_FEATURES: lambda player, say, ring: player.features(say),
    F.SET_PROTOCOL_FEATURES: lambda player, say, ring: player.protocol_features(),
    F.SET_BACKEND_REQ_FD: lambda player, say, ring: player.channel(),
    F.SET_MEM_TABLE: lambda player, say, ring: _Filled(player.memory.table(), player.memory.fds),
    F.ADD_MEM_REG: lambda player, say, ring: player.region(say.value),
    F.REM_MEM_REG: lambda player, say, ring: player.region(say.value),
    F.GET_CONFIG: lambda player, say, ring: _config(say),
    F.GET_INFLIGHT_FD: lambda player, say, ring: _Filled(Inflight(0, 0, len(player.rings), say.value)),
    F.SET_INFLIGHT_FD: lambda player, say, ring: player.buffer(),
    F.SET_VRING_NUM: lambda player, say, ring: _Filled(VringState(ring, player.lanes[ring].queue.size)),
    F.SET_VRING_BASE: lambda player, say, ring: _Filled(VringState(ring, player.lanes[ring].base)),
    F.GET_VRING_BASE: lambda player, say, ring: _Filled(VringState(ring)),
    F.SET_VRING_ADDR: lambda player, say, ring: player.address(ring),
    F.SET_VRING_CALL: lambda player, say, ring: player.call(say, ring),
    F.SET_VRING_ERR: lambda player, say, ring: _Filled(VringFd(ring), (player.peer.eventfd(),)),
    F.SET_VRING_KICK: lambda player, say, ring: _Filled(VringFd(ring), (player.lanes[ring].ring.kick_fd,)),
    F.SET_VRING_ENABLE: lambda player, say, ring: _Filled(VringState(ring, say.value)),
    F.SET_STATUS: lambda player, say, ring: _Filled(U64(say.value)),
}
