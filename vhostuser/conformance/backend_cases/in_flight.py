"""What the buffer of requests in flight says, and what a back-end makes of it, for rings of both formats. Sections
"Inflight I/O tracking", "VHOST_USER_GET_VRING_BASE".

What belongs here: batches, lists, order, versions; requests that a stop leaves in flight. What does not: the messages,
and recovery as split rings alone have it (``recovery``). A crash is described: the ring and the buffer are written as a
back-end leaves them that is killed at that point.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace

from vhostuser.conformance.bench import Need
from vhostuser.conformance.bytewise import AVAIL, USED, PackedBytes
from vhostuser.conformance.lane import DEPTH, Lane
from vhostuser.conformance.peer import Peer
from vhostuser.conformance.suite import Theme, check, equal
from vhostuser.driverqueue import Descriptor
from vhostuser.drivers.blk import BlkRequest
from vhostuser.frontend import DRIVABLE_PROTOCOL, InflightBuffer
from vhostuser.protocol import (
    U64,
    DescStatePacked,
    DescStateSplit,
    FrontendRequest,
    ProtocolFeature,
    QueueRegionPacked,
    QueueRegionSplit,
    RequestRefused,
)

F, P = FrontendRequest, ProtocolFeature
BOTH: Theme[Peer] = Theme("inflight", "Inflight I/O tracking")
"""Cases that have a twin on packed rings."""
LEFT: Theme[Peer] = Theme("left", F.GET_VRING_BASE.clause)
"""As those."""
OFFER: Theme[Peer] = Theme("left", F.GET_VRING_BASE.clause)
SHMFD, DISK, BIT = P.INFLIGHT_SHMFD, Need.BLK, P.GET_VRING_BASE_INFLIGHT
SIZE = 64
EACH = 3
"""Descriptors of a chain: header, data, status. Chains are numbered; their heads are four apart."""
FIRST = 0x8000_8000
ID_BYTES = 20
Region = QueueRegionSplit | QueueRegionPacked


class Crash:
    """A ring and its buffer, which the back-end that is tried finds as another has left them."""

    def __init__(self, peer: Peer, lane: Lane, buffer: InflightBuffer) -> None:
        self.peer, self.lane, self.buffer = peer, lane, buffer
        self.rows: list[tuple[int, int, bool]] = []
        self.shown = 0

    @classmethod
    async def prepare(cls, peer: Peer, offered: int) -> Crash:
        """A ring with so many requests available that the back-end does not know yet."""
        await peer.negotiate()
        await peer.share()
        crash = cls(peer, peer.make_lane(size=SIZE), await _buffer(peer))
        for number in range(offered):
            crash.lay_out(number)
        crash.lane.push(*(4 * number for number in range(offered)))
        return crash

    def lay_out(self, number: int) -> None:
        """A chain in its place, which is not available yet."""
        at = self.lane.buffers(BlkRequest.get_id(), number)
        chain = ((at.header, 16, False), (at.data, ID_BYTES, True), (at.status, 1, True))
        self.rows += chain
        self.lane.describe(*chain, first=4 * number)

    # ---- what the one that was killed has left

    def leave(self, taken: Sequence[int], batch: Sequence[int] = (), *, shown: bool = True, cleared: int = 0) -> None:
        """Chains were taken in this order. Those of ``batch`` were linked, ``shown``: and returned; of these so many
        were unmarked, and then it was killed."""
        self.write(self.packed(taken, batch, cleared) if self.peer.packed else self.split(taken, batch, cleared))
        if shown:
            self.show(batch)

    def split(self, taken: Sequence[int], batch: Sequence[int] = (), cleared: int = 0) -> QueueRegionSplit:
        states = [DescStateSplit()] * SIZE
        for counter, number in enumerate(taken, 1):
            states[4 * number] = DescStateSplit(int(number not in batch[:cleared]), 0, counter)
        last = 0
        for number in batch:
            states[4 * number] = states[4 * number]._replace(next=last)
            last = 4 * number
        return QueueRegionSplit(0, 1, SIZE, last, 0, tuple(states))

    def packed(self, taken: Sequence[int], batch: Sequence[int] = (), cleared: int = 0) -> QueueRegionPacked:
        states = [DescStatePacked(next=entry + 1) for entry in range(SIZE)]
        for counter, number in enumerate(taken, 1):
            for entry in range(EACH * number, EACH * (number + 1)):
                states[entry] = self._copy(entry)
            first, marked = states[EACH * number], int(number not in batch[:cleared])
            states[EACH * number] = first._replace(
                inflight=marked, num=EACH, last=EACH * (number + 1) - 1, counter=counter
            )
        free = old_free = EACH * len(taken)
        for number in batch:
            last = EACH * (number + 1) - 1
            states[last] = states[last]._replace(next=free)
            free = EACH * number
        used = EACH * len(batch)
        return QueueRegionPacked(0, 1, SIZE, free, old_free, used, 0, 1, 1, tuple(states))

    def _copy(self, entry: int) -> DescStatePacked:
        guest, length, writable = self.rows[entry]
        flags = AVAIL | Descriptor.WRITE * writable | Descriptor.NEXT * (entry % EACH < EACH - 1)
        return DescStatePacked(next=entry + 1, id=4 * (entry // EACH), flags=flags, len=length, addr=guest)

    def write(self, region: Region) -> None:
        os.pwrite(self.buffer.fd, region.pack(), self.buffer.description.mmap_offset)

    def show(self, batch: Sequence[int]) -> None:
        """Returns these in the ring."""
        self.shown = len(batch)
        lane = self.lane
        for place, number in enumerate(batch):
            if isinstance(lane.bytes, PackedBytes):
                at = lane.queue.desc + 16 * EACH * place
                guest = self.rows[EACH * place][0]
                lane.bytes.write_row(at, (guest, ID_BYTES + 1, 4 * number, AVAIL | USED | Descriptor.WRITE))
            else:
                lane.raw.use(place, 4 * number, ID_BYTES + 1)
                lane.raw.used_index = place + 1

    # ---- what the one that is tried makes of it

    async def go_on(self) -> None:
        """From a base as a front-end says it that could ask nobody."""
        self.lane.base = FIRST if self.peer.packed else self.shown
        await self.peer.frontend.set_inflight_fd(self.buffer)
        await self.lane.start()
        self.lane.kick()

    async def does(self, *numbers: int) -> None:
        """These are done, in this order, and nothing else."""
        await self.go_on()
        await self.lane.used_to(self.shown + len(numbers))
        await self.lane.stays_at(self.shown + len(numbers))
        done = [self.lane.bytes.used_entry(self.shown + turn)[0] for turn in range(len(numbers))]
        equal("the heads returned", done, [4 * number for number in numbers])

    async def does_no_harm(self) -> None:
        """Whatever becomes of this ring, the back-end serves its next front-end."""
        with suppress(RequestRefused, ConnectionError):
            await self.go_on()
            await asyncio.sleep(self.peer.quiet)
        await self.peer.serves_another()


async def _buffer(peer: Peer) -> InflightBuffer:
    buffer = await peer.frontend.get_inflight_fd(1, SIZE)
    peer.own(buffer.close)
    return buffer


def _region(peer: Peer, buffer: InflightBuffer) -> Region:
    return buffer.packed_queue(0) if peer.packed else buffer.queue(0)


def _right(peer: Peer, buffer: InflightBuffer) -> None:
    """The buffer breaks no rule, and names nothing."""
    region = _region(peer, buffer)
    equal("what is wrong with the buffer", list(region.violations(SIZE)), [])
    equal("version and chains in flight", (region.version, region.heads), (1, ()))


async def _tracked(peer: Peer, *also: ProtocolFeature) -> tuple[Lane, InflightBuffer]:
    """A ring that is served, with a buffer."""
    await peer.negotiate(also=also)
    await peer.share()
    lane, buffer = peer.make_lane(size=SIZE), await _buffer(peer)
    await peer.frontend.set_inflight_fd(buffer)
    await lane.start()
    return lane, buffer


# ---- while the ring runs


@BOTH.must("right", "What stands in the buffer of a ring that is used is right.", SHMFD, DISK)
async def _(peer: Peer) -> None:
    lane, buffer = await _tracked(peer)
    for _ in range(20):
        lane.offer(count=12)
        lane.kick()
        await lane.served()
    await lane.stop()
    _right(peer, buffer)


@BOTH.must("set-again", "A buffer that is set later takes the place of the one before.", SHMFD, DISK)
async def _(peer: Peer) -> None:
    lane, first = await _tracked(peer)
    await lane.works()
    await lane.stop()
    second = await _buffer(peer)
    await peer.frontend.set_inflight_fd(second)
    before = _region(peer, first)
    await lane.start()
    await lane.works()
    await lane.stop()
    _right(peer, second)
    check(_region(peer, first) == before, "the first buffer left alone", "other content")


@BOTH.must("get-keeps", "Another GET_INFLIGHT_FD leaves the buffer that is in use.", SHMFD, DISK)
async def _(peer: Peer) -> None:
    lane, buffer = await _tracked(peer)
    other = await _buffer(peer)
    for _ in range(2):
        await lane.works()
        await lane.stop()
        await lane.start()
    await lane.works()
    await lane.stop()
    _right(peer, buffer)
    equal("the version of the buffer that nobody has set", _region(peer, other).version, 0)


# ---- after a crash


@BOTH.should("many-in-order", "Of many in flight each is done again, in the order in which it was taken.", SHMFD, DISK)
async def _(peer: Peer) -> None:
    crash = await Crash.prepare(peer, 6)
    crash.leave([3, 0, 5, 1, 4, 2])
    await crash.does(3, 0, 5, 1, 4, 2)


@BOTH.must("batch", "Of a batch that shows in the ring nothing is done again, what is beside it is.", SHMFD, DISK)
async def _(peer: Peer) -> None:
    crash = await Crash.prepare(peer, 5)
    crash.leave([0, 1, 2, 3, 4], batch=[1, 3, 0])
    await crash.does(2, 4)


@BOTH.must("batch-half-cleared", "The same where a part of the batch is unmarked already.", SHMFD, DISK)
async def _(peer: Peer) -> None:
    crash = await Crash.prepare(peer, 4)
    crash.leave([0, 1, 2, 3], batch=[1, 3, 0], cleared=1)
    await crash.does(2)


@BOTH.must("batch-linked", "A batch that does not show in the ring is done again.", SHMFD, DISK)
async def _(peer: Peer) -> None:
    crash = await Crash.prepare(peer, 3)
    crash.leave([0, 1, 2], batch=[1, 2], shown=False)
    await crash.does(0, 1, 2)


@BOTH.must("right-again", "The buffer of a ring that went on after a crash is right.", SHMFD, DISK)
async def _(peer: Peer) -> None:
    crash = await Crash.prepare(peer, 6)
    crash.leave([0, 1, 2, 3], batch=[1, 3])
    await crash.go_on()
    await crash.lane.used_to(6)
    await crash.lane.stop()
    _right(peer, crash.buffer)


@BOTH.must("fresh-with-marks", "Of a buffer of version 0 nothing is followed, whatever is in it.", SHMFD, DISK)
async def _(peer: Peer) -> None:
    crash = await Crash.prepare(peer, 1)
    crash.lay_out(1)
    crash.write(replace(crash.packed([0, 1]) if peer.packed else crash.split([0, 1]), version=0))
    await crash.does(0)


@BOTH.must("idle-of-another-size", "A buffer without anything in flight goes with a ring of another size.", SHMFD, DISK)
async def _(peer: Peer) -> None:
    crash = await Crash.prepare(peer, 2)
    crash.write(replace(crash.packed([]) if peer.packed else crash.split([]), desc_num=SIZE // 2))
    await crash.does(0, 1)


@BOTH.must("later-version", "A buffer of a version to come does no harm.", SHMFD, DISK)
async def _(peer: Peer) -> None:
    crash = await Crash.prepare(peer, 2)
    crash.write(replace(crash.packed([0, 1]) if peer.packed else crash.split([0, 1]), version=2))
    await crash.does_no_harm()


@BOTH.must("circle", "A list in the buffer that leads in a circle does no harm.", SHMFD, DISK)
async def _(peer: Peer) -> None:
    crash = await Crash.prepare(peer, 4)
    region: Region = crash.packed([0, 1, 2, 3]) if peer.packed else crash.split([0, 1, 2, 3], [1, 2, 3])
    at = SIZE - 1 if peer.packed else 4
    states = [*region.states]
    states[at] = states[at]._replace(next=SIZE - 2 if peer.packed else 12)
    crash.write(replace(region, states=tuple(states)))  # type: ignore[arg-type]
    if not peer.packed:
        crash.lane.raw.used_index = crash.shown = 8
    await crash.does_no_harm()


@BOTH.must("outside", "A list or a place that is not in the ring does no harm.", SHMFD, DISK)
async def _(peer: Peer) -> None:
    crash = await Crash.prepare(peer, 3)
    if peer.packed:
        crash.write(replace(crash.packed([0, 1, 2]), used_idx=SIZE, old_used_idx=0xFFFF))
    else:
        crash.write(replace(crash.split([0, 1, 2]), last_batch_head=SIZE))
        crash.show([0])
    await crash.does_no_harm()


@BOTH.must("index-far-off", "A buffer that is further from the ring than the ring is long does no harm.", SHMFD, DISK)
async def _(peer: Peer) -> None:
    crash = await Crash.prepare(peer, 2)
    if peer.packed:
        crash.write(replace(crash.packed([0, 1]), used_idx=SIZE - 1, used_wrap_counter=0))
    else:
        crash.write(replace(crash.split([0, 1]), used_idx=1000))
    await crash.does_no_harm()


# ---- what a stop leaves in flight


async def _stopped(peer: Peer) -> tuple[Lane, InflightBuffer]:
    """A ring that was stopped while it was busy with as many requests as there is room for."""
    lane, buffer = await _tracked(peer, BIT)
    lane.offer(count=DEPTH)
    lane.kick()
    await lane.answers(left=DEPTH - 1)
    await lane.stop()
    return lane, buffer


@LEFT.must("named", "What was taken and not returned when the ring has stopped stands in the buffer.", SHMFD, BIT, DISK)
async def _(peer: Peer) -> None:
    lane, buffer = await _stopped(peer)
    region = _region(peer, buffer)
    equal("what is wrong with the buffer", list(region.violations(SIZE if region.version else None)), [])
    if isinstance(region, QueueRegionPacked):
        held = sum(region.states[head].num for head in region.heads)
        equal("places taken and not returned", _held(lane), held)
    else:
        equal("chains taken and not returned", (lane.base - lane.raw.used_index) % 65536, len(region.heads))


def _held(lane: Lane) -> int:
    """Places of a packed ring between both halves of its base."""
    assert isinstance(lane.bytes, PackedBytes)
    taken, used = lane.bytes.place(lane.base & 0xFFFF), lane.bytes.place(lane.base >> 16)
    return (taken - used) % (2 * SIZE)


@LEFT.must("once", "What a stop leaves in flight is done once when the ring goes on.", SHMFD, BIT, DISK)
async def _(peer: Peer) -> None:
    lane, buffer = await _stopped(peer)
    await lane.start()
    lane.kick()
    await lane.served()
    await lane.works()
    await lane.stop()
    _right(peer, buffer)


@LEFT.must("quiet", "When GET_VRING_BASE is answered nothing of what is left is returned any more.", SHMFD, BIT, DISK)
async def _(peer: Peer) -> None:
    lane, _ = await _stopped(peer)
    lane.returned()  # before the stop
    await lane.idle()


@LEFT.must("untracked", "Without a buffer to leave it in, everything that was taken is returned.", SHMFD, BIT, DISK)
async def _(peer: Peer) -> None:
    await peer.negotiate(also=(BIT,))
    await peer.share()
    lane = peer.make_lane(size=SIZE)
    await lane.start()
    lane.offer(count=DEPTH)
    lane.kick()
    base = await lane.stop()
    equal("the base", base, lane.bytes.drained(base))
    await lane.start()
    lane.kick()
    await lane.served()


@OFFER.must("offered", "GET_VRING_BASE_INFLIGHT is offered together with INFLIGHT_SHMFD alone.", BIT)
async def _(peer: Peer) -> None:
    await peer.negotiate()
    offered = await peer.frontend.get_protocol_features()
    check(bool(offered & SHMFD.mask), "INFLIGHT_SHMFD offered too", f"protocol features {offered:#x}")


@OFFER.should("alone", "GET_VRING_BASE_INFLIGHT without INFLIGHT_SHMFD is refused.", BIT, SHMFD, P.REPLY_ACK)
async def _(peer: Peer) -> None:
    await peer.negotiate()
    wanted = await peer.frontend.get_protocol_features() & (DRIVABLE_PROTOCOL | BIT.mask)
    await peer.refuses(F.SET_PROTOCOL_FEATURES, U64(wanted & ~SHMFD.mask))
