"""A queue pair of a network device, as a case drives it: frames out, buffers for frames in, and what comes.

What belongs here: chains of any shape in both rings, and waiting for what they come to. What does not: what is in a
frame (``frames``), rules (``backend_cases.net_*``), what is sent to the back-end beyond start and stop (``peer``).
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
from collections.abc import Sequence
from typing import NamedTuple

from vhostuser.conformance.bytewise import bytewise
from vhostuser.conformance.frames import NetFeature, frame, same
from vhostuser.conformance.peer import MIB, RINGS, Peer
from vhostuser.conformance.suite import Violation, check, equal
from vhostuser.driverqueue import DriverQueue
from vhostuser.drivers.net import NetHeader
from vhostuser.frontend import FrontendRing
from vhostuser.protocol import VirtioFeature

AREA, EACH = 2 * MIB, 2 * MIB
"""Guest address from which on frames and buffers lie, and bytes for each pair of the three that there is room for."""
USUAL = 2048
"""Bytes of a buffer for any frame without offloads."""
_APART = 64
_PATTERN = b"\xa5"
_LOOK = 0.001

Buffer = tuple[int, int, bool]
"""Guest address, bytes, may the device write?"""


class Used(NamedTuple):
    """A chain that was returned: what it was made of, and how many bytes the device says that it wrote."""

    buffers: Sequence[Buffer]
    length: int

    @property
    def room(self) -> int:
        """Bytes that the device may write."""
        return sum(length for _, length, writable in self.buffers if writable)


class Arrival(NamedTuple):
    """A frame that came, and the chains in which it came."""

    header: NetHeader
    frame: bytes
    chains: Sequence[Used]


class Half:
    """One ring of a pair. Owns its eventfds."""

    def __init__(self, peer: Peer, index: int, queue: DriverQueue) -> None:
        self.index = index
        self.queue = queue
        self.ring = FrontendRing(index, queue)
        self.bytes = bytewise(queue)
        """The ring byte by byte; what is offered so is not seen by the others."""
        self.base = queue.first_base
        """Where to start, or go on after a stop."""
        self.wants_kick = False
        """Did the device want a kick for what was offered last?"""
        self._peer = peer
        self._frontend = peer.frontend
        self._memory = peer.memory
        self._out: dict[int, Sequence[Buffer]] = {}
        peer.own(self.ring.close)

    async def start(self, *, enable: bool = True, log_used: bool = False) -> None:
        """Sets the ring up from ``base`` on; see ``Frontend.start_ring``."""
        await self._frontend.start_ring(self.ring, self._memory, base=self.base, enable=enable, log_used=log_used)

    async def stop(self) -> int:
        """GET_VRING_BASE; the base, which is kept."""
        self.base = await self._frontend.stop_ring(self.ring)
        return self.base

    async def enable(self, on: bool = True) -> None:
        """SET_VRING_ENABLE."""
        await self._frontend.set_vring_enable(self.index, on)

    def offer(self, *buffers: Buffer) -> None:
        """Makes a chain available, without a kick."""
        head = self.queue.offer_in_order(buffers)
        if head is None:
            raise AssertionError("the case offers more than the ring has room for")
        self._out[head] = buffers
        self.wants_kick = self.queue.publish()

    def push(self, *heads: int) -> None:
        """Makes chains available that were described by hand, without a kick."""
        self.bytes.push(*heads)

    def kick(self) -> None:
        """Notifies the back-end."""
        self.ring.kick()

    def take(self) -> list[Used]:
        """Chains that came back since, in the order of the used ring."""
        return [Used(self._out.pop(head), length) for head, length in self.queue.take_many()]

    @property
    def out(self) -> int:
        """How many chains the device has, as far as ``take`` has seen."""
        return len(self._out)

    async def called(self, within: float | None = None) -> bool:
        """Is the call eventfd signalled ``within`` so many seconds (default: the patience)? Its counter is taken."""
        try:
            async with asyncio.timeout(self._peer.patience if within is None else within):
                await self.ring.called()
        except TimeoutError:
            return False
        return True

    async def calm(self) -> None:
        """Waits for calls that are still on their way, and takes the counter."""
        await self._frontend.get_features()
        await asyncio.sleep(self._peer.quiet)
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self.ring.call_fd)


class Nic:
    """Both rings of pair ``pair``, in the memory that was shared. size: of both. indirect: chains lie in tables."""

    def __init__(self, peer: Peer, pair: int = 0, *, size: int = 64, indirect: bool = False) -> None:
        self.peer = peer
        self.features = peer.frontend.session.features
        self.header = NetHeader.size(self.features)
        """Bytes in front of every frame."""
        self.receive = self._half(2 * pair, size, indirect)
        self.send = self._half(2 * pair + 1, size, indirect)
        self._places = _Places(AREA + pair * EACH, AREA + (pair + 1) * EACH)

    def _half(self, index: int, size: int, indirect: bool) -> Half:
        event_idx = bool(self.features & VirtioFeature.RING_EVENT_IDX.mask)
        queue = DriverQueue(
            self.peer.memory.map, index * RINGS, size, event_idx=event_idx, indirect=indirect, packed=self.peer.packed
        )
        return Half(self.peer, index, queue)

    @property
    def merges(self) -> bool:
        """May a frame take several buffers?"""
        return bool(self.features & NetFeature.MRG_RXBUF.mask)

    async def start(self, *, enable: bool = True, log_used: bool = False) -> None:
        """Starts both rings, kicked so that they run."""
        for half in (self.receive, self.send):
            await half.start(enable=enable, log_used=log_used)
            half.kick()

    # ---- guest memory

    def place(self, data: bytes) -> int:
        """Puts bytes where nothing else lies; their guest address."""
        guest = self.room(len(data))
        self.peer.memory.write(guest, data)
        return guest

    def room(self, length: int, align: int = 64) -> int:
        """Memory of this many bytes where nothing else lies and that nobody has touched; its guest address."""
        return self._places.take(length, align)

    def guarded(self, length: int) -> int:
        """``room``, filled with a pattern for ``untouched``."""
        return self.place(_PATTERN * length)

    def untouched(self, what: str, guest: int, length: int) -> None:
        """Sees that the pattern is still there. what: the bytes, as in "the bytes behind the buffer"."""
        found = self.peer.memory.read(guest, length)
        written = length - found.count(_PATTERN)
        check(not written, f"{what} left alone", f"{written} of {length} written")

    def cut(self, data: bytes, lengths: Sequence[int]) -> list[Buffer]:
        """Puts pieces of these lengths, and what is left, in places apart from each other."""
        pieces, at = [], 0
        for length in (*lengths, len(data) - sum(lengths)):
            pieces.append((self.place(data[at : at + length]), length, False))
            at += length
        return pieces if pieces[-1][1] else pieces[:-1]

    # ---- frames out

    def headed(self, data: bytes, header: NetHeader | None = None) -> bytes:
        """A frame with its header in front; by default one of zeros."""
        front = bytes(self.header) if header is None else header.pack()
        return (front + bytes(2))[: self.header] + data

    def transmit(self, data: bytes, *lengths: int, header: NetHeader | None = None) -> None:
        """Offers a frame and its header, cut after pieces of these lengths, and kicks."""
        self.send.offer(*self.cut(self.headed(data, header), lengths))
        self.send.kick()

    async def sent(self) -> list[Used]:
        """Waits until everything that was transmitted has been returned; in which order and with which lengths."""
        found: list[Used] = []
        deadline = _now() + self.peer.patience
        while True:
            found += self.send.take()
            if not self.send.out:
                return found
            if _now() > deadline:
                raise Violation("every frame's buffers returned", f"{self.send.out} still out")
            await asyncio.sleep(_LOOK)

    # ---- frames in

    def post(self, *sizes: int, count: int = 1) -> list[int]:
        """Offers buffers, each a chain of one descriptor, and kicks; their guest addresses. None given: ``count`` of
        the usual size."""
        wanted = sizes or (USUAL,) * count
        places = [self.room(size) for size in wanted]
        for guest, size in zip(places, wanted, strict=True):
            self.receive.offer((guest, size, True))
        self.receive.kick()
        return places

    def arrived(self) -> list[Arrival]:
        """Frames that came since; chains without a byte written are passed over."""
        arrivals = []
        chains = iter([used for used in self.receive.take() if used.length])
        for used in chains:
            header = self._header(used)
            more = (header.num_buffers or 1) - 1 if self.merges else 0
            whole = [used, *itertools.islice(chains, more)]
            check(len(whole) == more + 1, f"all {more + 1} buffers of a frame used together", f"{len(whole)} of them")
            written = b"".join(map(self._written, whole))
            arrivals.append(Arrival(header, written[self.header :], whole))
        return arrivals

    def _header(self, used: Used) -> NetHeader:
        front = self._written(used)[: self.header]
        check(len(front) == self.header, f"a header of {self.header} bytes", f"{len(front)} bytes written")
        return NetHeader.unpack(front)

    def _written(self, used: Used) -> bytes:
        """What the device wrote into a chain."""
        check(used.length <= used.room, f"a used length of at most {used.room}", str(used.length))
        left, found = used.length, []
        for guest, length, writable in used.buffers:
            if writable and left:
                found.append(self.peer.memory.read(guest, min(length, left)))
                left -= len(found[-1])
        return b"".join(found)

    async def received(self, count: int = 1) -> list[Arrival]:
        """Waits for frames, ``count`` of them or more."""
        found: list[Arrival] = []
        deadline = _now() + self.peer.patience
        while True:
            found += self.arrived()
            if len(found) >= count:
                return found
            if _now() > deadline:
                raise Violation(f"{count} frame(s) to come back", f"{len(found)} after {self.peer.patience:g} s")
            await asyncio.sleep(_LOOK)

    async def one(self) -> Arrival:
        """Waits for a frame, and sees that it is one."""
        came = await self.received()
        equal("frames that came", len(came), 1)
        return came[0]

    async def silence(self) -> None:
        """Sees that no frame comes for a while."""
        await asyncio.sleep(self.peer.quiet)
        equal("frames that came", len(self.arrived()), 0)

    # ---- both

    async def echo(self, data: bytes, *lengths: int, header: NetHeader | None = None) -> Arrival:
        """Transmits a frame, and sees it come back as it was sent. A buffer for it must have been posted."""
        self.transmit(data, *lengths, header=header)
        await self.sent()
        arrival = await self.one()
        same(arrival.frame, data)
        return arrival

    async def works(self, number: int = 0xC0FFEE) -> None:
        """Sees the pair carry a frame, by a buffer of its own; for one that others may come before."""
        self.post()
        self.transmit(frame(number=number))
        await self.sent()
        deadline = _now() + self.peer.patience
        while frame(number=number) not in [arrival.frame for arrival in await self.received()]:
            check(_now() < deadline, f"frame {number} to come back", "others without end")


async def plug(
    peer: Peer,
    *features: VirtioFeature | NetFeature,
    legacy: bool = False,
    size: int = 64,
    indirect: bool = False,
    enable: bool = True,
    log_used: bool = False,
) -> Nic:
    """The usual opening: negotiates, shares memory, starts both rings of the first pair; see ``Peer.negotiate``."""
    await peer.negotiate(*features, legacy=legacy)
    await peer.share()
    nic = Nic(peer, size=size, indirect=indirect)
    await nic.start(enable=enable, log_used=log_used)
    return nic


async def loops(peer: Peer) -> bool:
    """Do frames that are transmitted come back as they were?"""
    nic = await plug(peer)
    nic.post()
    try:
        await nic.echo(frame(64))
    except Violation:
        return False
    return True


def _now() -> float:
    return asyncio.get_running_loop().time()


class _Places:
    """Guest memory that is handed out once, piece after piece."""

    def __init__(self, at: int, end: int) -> None:
        self._at = at
        self._end = end

    def take(self, length: int, align: int) -> int:
        guest = -(-self._at // align) * align
        self._at = guest + length + _APART
        if self._at > self._end:
            raise AssertionError("the case needs more guest memory than it has")
        return guest
