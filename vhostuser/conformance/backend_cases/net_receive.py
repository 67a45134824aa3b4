"""Frames that a guest receives: their buffers, what stands in front of them, and buffers that no driver offers.

Virtio 1.2, sections 5.1.6.3 and 5.1.6.4. All of it needs a back-end whose frames come back.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from vhostuser.conformance.bench import Need
from vhostuser.conformance.frames import TCP_AT, TCP_SUM_AT, NetFeature, frame, number_of, same, segment
from vhostuser.conformance.nic import USUAL, Arrival, Nic, plug
from vhostuser.conformance.peer import MEMORY, Peer
from vhostuser.conformance.suite import Theme, check, equal
from vhostuser.driverqueue import Descriptor
from vhostuser.drivers.net import NetHeader
from vhostuser.protocol import VirtioFeature

N, V = NetFeature, VirtioFeature
CASES: Theme[Peer] = Theme("net", "Network Device: Processing of Incoming Packets")
LOOP, MERGE = Need.LOOP, N.MRG_RXBUF
BUFFERS = "Network Device: Setting Up Receive Buffers"
CSUM, TSO = (N.CSUM, N.GUEST_CSUM), (N.CSUM, N.GUEST_CSUM, N.HOST_TSO4, N.GUEST_TSO4)
SIZE = 1000
"""Bytes of a frame where any will do."""

# ---- the header


@CASES.must("receive.header", "In front of a plain frame all fields but num_buffers are 0.", LOOP)
async def _(peer: Peer) -> None:
    nic = await plug(peer)
    nic.post()
    header = (await nic.echo(frame())).header
    equal("the header", (header.flags, header.gso_type, header.gso_size), (0, 0, 0))


@CASES.must("receive.num-buffers", "Without MRG_RXBUF num_buffers is 1.", LOOP)
async def _(peer: Peer) -> None:
    nic = await plug(peer)
    nic.post()
    equal("num_buffers", (await nic.echo(frame())).header.num_buffers, 1)


@CASES.must("receive.used-length", "The used length is that of header and frame.", LOOP, section=BUFFERS)
async def _(peer: Peer) -> None:
    nic = await plug(peer)
    for size in (60, 61, 1514):
        nic.post()
        equal("the used length", (await nic.echo(frame(size))).chains[0].length, nic.header + size)


@CASES.must("receive.no-flags", "A driver without GUEST_CSUM gets flags 0, whatever was sent.", LOOP, N.CSUM)
async def _(peer: Peer) -> None:
    nic = await plug(peer, N.CSUM)
    nic.post(count=2)
    nic.transmit(segment(200), header=NetHeader(1, csum_start=TCP_AT, csum_offset=TCP_SUM_AT))
    nic.transmit(frame(200), header=NetHeader(2))
    await nic.sent()
    for arrival in await nic.received(2):
        equal("flags", arrival.header.flags, 0)


@CASES.must(
    "receive.no-segments", "A driver that takes no segments gets none, whatever was sent.", LOOP, *CSUM, N.HOST_TSO4
)
async def _(peer: Peer) -> None:
    nic = await plug(peer, *CSUM, N.HOST_TSO4)
    nic.post(8192, USUAL, USUAL, USUAL)
    nic.transmit(segment(4000), header=NetHeader(1, 1, 54, 1448, TCP_AT, TCP_SUM_AT))
    await nic.sent()
    await asyncio.sleep(peer.quiet)
    for arrival in nic.arrived():
        equal("gso_type", arrival.header.gso_type, 0)
        check(len(arrival.frame) <= 54 + 1448, "segments of gso_size", f"{len(arrival.frame)} bytes")
    await nic.works()


@CASES.should("receive.hdr-len", "In front of a segment hdr_len covers its headers.", LOOP, *TSO)
async def _(peer: Peer) -> None:
    nic = await plug(peer, *TSO)
    nic.post(8192)
    header = (await nic.echo(segment(4000), header=NetHeader(1, 1, 54, 1448, TCP_AT, TCP_SUM_AT))).header
    check(header.gso_type != 0 and header.hdr_len >= 54, "a segment with hdr_len of 54 or more", str(header))


@CASES.must("receive.segment-flags", "A segment has NEEDS_CSUM, its gso_size and the checksum's place.", LOOP, *TSO)
async def _(peer: Peer) -> None:
    nic = await plug(peer, *TSO)
    nic.post(8192)
    header = (await nic.echo(segment(4000), header=NetHeader(1, 1, 54, 1448, TCP_AT, TCP_SUM_AT))).header
    if header.gso_type:
        told = header.flags & 1, header.gso_size, header.csum_start, header.csum_offset
        equal("NEEDS_CSUM, gso_size, csum_start, csum_offset", told, (1, 1448, TCP_AT, TCP_SUM_AT))


# ---- how a buffer may lie in descriptors


def _cut(name: str, rule: str, *lengths: int, add: Callable[..., Callable[..., object]] = CASES.must) -> None:
    """lengths: of the descriptors of one buffer."""

    @add(f"receive.{name}", rule, LOOP, section="Message Framing")
    async def _(peer: Peer) -> None:
        nic = await plug(peer)
        await _fills(nic, lengths)


async def _fills(nic: Nic, lengths: Sequence[int]) -> None:
    for _ in range(2):
        nic.receive.offer(*[(nic.room(length), length, True) for length in lengths])
    nic.receive.kick()
    for number in range(2):
        await nic.echo(frame(SIZE, number))


_cut("apart", "The header may have a descriptor of its own.", 12, USUAL)
_cut("header-cut", "The header's room may be cut into descriptors.", 5, 7, USUAL)
_cut("header-across", "A descriptor may hold the end of the header and the beginning of the frame.", 5, 20, USUAL)
_cut("many", "A buffer may lie in many pieces.", 12, *(64,) * 17)
_cut("odd", "Pieces of a buffer may have any length.", 1, 12, 3, 17, 1, USUAL)
_cut("exact", "A buffer may have just the size of header and frame.", 12 + SIZE)
_cut("empty-parts", "Descriptors of no bytes between others are passed over.", 12, 0, 40, 0, USUAL, add=CASES.should)


@CASES.must(
    "receive.indirect", "Buffers may lie in indirect tables.", LOOP, V.RING_INDIRECT_DESC,
    section="Indirect Descriptors",
)  # fmt: skip
async def _(peer: Peer) -> None:
    nic = await plug(peer, V.RING_INDIRECT_DESC, indirect=True)
    await _fills(nic, (12, *(64,) * 17))


@CASES.must("receive.split-end", "A frame ends where it ends, also within a descriptor.", LOOP, section=BUFFERS)
async def _(peer: Peer) -> None:
    nic = await plug(peer)
    places = [nic.guarded(600) for _ in range(3)]
    nic.receive.offer(*[(place, 600, True) for place in places])
    nic.receive.kick()
    await nic.echo(frame(SIZE))
    nic.untouched("the descriptor behind the frame", places[2], 600)


# ---- merged buffers


async def _merged(nic: Nic, size: int, *sizes: int) -> Arrival:
    """A frame into buffers of these sizes, each of which it may need."""
    nic.post(*sizes)
    return await nic.echo(frame(size))


@CASES.must("merge.one", "With MRG_RXBUF a frame that fits takes one buffer, num_buffers is 1.", LOOP, MERGE)
async def _(peer: Peer) -> None:
    arrival = await _merged(await plug(peer, MERGE), SIZE, USUAL, USUAL)
    equal("num_buffers, buffers", (arrival.header.num_buffers, len(arrival.chains)), (1, 1))


@CASES.must(
    "merge.several", "A frame that does not fit goes on in the next buffers; num_buffers counts them.", LOOP, MERGE
)
async def _(peer: Peer) -> None:
    arrival = await _merged(await plug(peer, MERGE), SIZE, *(256,) * 6)
    equal("num_buffers", arrival.header.num_buffers, -(-(12 + SIZE) // 256))


@CASES.must("merge.full", "All buffers of a frame but its last are full to their end.", LOOP, MERGE)
async def _(peer: Peer) -> None:
    arrival = await _merged(await plug(peer, MERGE), SIZE, 100, 300, 64, 700, 500)
    for used in arrival.chains[:-1]:
        equal("the used length", used.length, used.room)


@CASES.must("merge.exact", "A frame that just fills its buffers takes no more of them.", LOOP, MERGE)
async def _(peer: Peer) -> None:
    arrival = await _merged(await plug(peer, MERGE), SIZE, 500, 512, 64)
    equal("num_buffers", arrival.header.num_buffers, 2)


@CASES.must("merge.header-alone", "A buffer may have room for the header alone.", LOOP, MERGE, section=BUFFERS)
async def _(peer: Peer) -> None:
    arrival = await _merged(await plug(peer, MERGE), SIZE, 12, USUAL)
    equal("num_buffers", arrival.header.num_buffers, 2)


@CASES.must(
    "merge.together", "The buffers of a frame are used together: no look at the ring finds a part.", LOOP, MERGE
)
async def _(peer: Peer) -> None:
    nic = await plug(peer, MERGE, size=256)
    for number in range(20):
        nic.post(*(128,) * 12)
        nic.transmit(frame(1400, number))
        for arrival in await nic.received():  # which sees that a frame's buffers came together
            same(arrival.frame, frame(1400, number))
        await nic.sent()


@CASES.must("merge.too-few", "A frame for which there are too few buffers is not begun.", LOOP, MERGE)
async def _(peer: Peer) -> None:
    nic = await plug(peer, MERGE)
    nic.post(256, 256)
    nic.transmit(frame(SIZE, 1))
    await nic.sent()
    await nic.silence()
    nic.post(*(256,) * 10)
    nic.transmit(frame(SIZE, 2))
    await nic.sent()
    arrivals = await nic.received()
    while number_of(arrivals[-1].frame) != 2:
        arrivals += await nic.received()
    for arrival in arrivals:
        same(arrival.frame, frame(SIZE, number_of(arrival.frame)))


@CASES.must("merge.mixed", "Buffers of one frame may lie in several descriptors each.", LOOP, MERGE)
async def _(peer: Peer) -> None:
    nic = await plug(peer, MERGE)
    for lengths in ((5, 7, 100), (200,), (1, 300, 2), (500, 500)):
        nic.receive.offer(*[(nic.room(length), length, True) for length in lengths])
    nic.receive.kick()
    equal("num_buffers", (await nic.echo(frame(SIZE))).header.num_buffers, 4)


# ---- too little room


@CASES.must(
    "receive.one-buffer", "Without MRG_RXBUF a frame takes one buffer only, or is dropped.", LOOP, section=BUFFERS
)
async def _(peer: Peer) -> None:
    nic = await plug(peer)
    nic.post(256, 256, 256, 256, 256, 256)
    nic.transmit(frame(SIZE))
    await nic.sent()
    await asyncio.sleep(peer.quiet)
    for arrival in nic.arrived():
        same(arrival.frame, frame(SIZE))


def _scarce(name: str, rule: str, size: int) -> None:
    """size: of a buffer that is too small, behind which others come."""

    @CASES.should(f"receive.{name}", rule, LOOP, section=BUFFERS)
    async def _(peer: Peer) -> None:
        nic = await plug(peer)
        nic.post(size)
        nic.transmit(frame(SIZE))
        await nic.sent()
        await nic.silence()
        nic.post(count=3)
        await _comes_through(nic)


async def _comes_through(nic: Nic) -> None:
    """A frame comes whole: a short one, or the long one if it has waited. Others may be lost before it."""
    for number in range(1, 20):
        nic.transmit(frame(100, number))
        await nic.sent()
        await asyncio.sleep(nic.peer.quiet / 4)
        if arrived := nic.arrived():
            number = number_of(arrived[0].frame)
            same(arrived[0].frame, frame(100 if number else SIZE, number))
            return
    check(False, "frames received again", "none of 19")


_scarce("too-small", "A frame too large for its buffer is dropped whole, and the ring lives.", 200)
_scarce("header-alone", "A buffer for the header alone is none, and the ring lives.", 12)
_scarce("no-room", "A buffer too small for a header is none, and the ring lives.", 5)
_scarce("one-byte", "A buffer of one byte is none, and the ring lives.", 1)


@CASES.must("receive.bounds", "Nothing is written behind the end of a buffer.", LOOP, section=BUFFERS)
async def _(peer: Peer) -> None:
    nic = await plug(peer)
    places = []
    for size in (1, 5, 12, 100, 12 + SIZE - 1):
        places.append((nic.guarded(size + USUAL), size))
        nic.receive.offer((*places[-1], True))
    nic.receive.kick()
    for number in range(6):
        nic.transmit(frame(SIZE, number))
    await nic.sent()
    await asyncio.sleep(peer.quiet)
    for at, size in places:
        nic.untouched(f"what lies behind a buffer of {size} bytes", at + size, USUAL)


@CASES.must("receive.unused", "Buffers that no frame has filled are not returned.", LOOP, section=BUFFERS)
async def _(peer: Peer) -> None:
    nic = await plug(peer)
    nic.post(count=8)
    await nic.echo(frame())
    await asyncio.sleep(peer.quiet)
    equal("buffers returned without a frame", len(nic.receive.take()), 0)
    equal("buffers that are left", nic.receive.out, 7)


@CASES.must("receive.starved", "A device that had no buffers goes on when there are some again.", LOOP, section=BUFFERS)
async def _(peer: Peer) -> None:
    nic = await plug(peer)
    nic.post()
    await nic.echo(frame(100, 1))
    for number in (2, 3):
        nic.transmit(frame(100, number))  # for which there is no buffer: it is lost, or waits
    await nic.sent()
    await asyncio.sleep(peer.quiet)
    nic.post(count=4)
    nic.transmit(frame(100, 4))
    await nic.sent()
    numbers = [number_of(arrival.frame) for arrival in await nic.received()]
    while numbers[-1] != 4:
        numbers += [number_of(arrival.frame) for arrival in await nic.received()]
    equal("the frames, in order and once", numbers, sorted(set(numbers)))


@CASES.must(
    "receive.asks-for-kick", "A device in which frames wait for buffers asks for a kick.", LOOP,
    section="Available Buffer Notification Suppression",
)  # fmt: skip
async def _(peer: Peer) -> None:
    await kicked_when_wanted(await plug(peer))


async def kicked_when_wanted(nic: Nic) -> None:
    """Offers buffers late, with a kick only if the device wants one. A frame may have been lost meanwhile; one that
    waited must come by that kick, and not only with the next frame."""
    for number in range(0, 6, 2):
        nic.transmit(frame(100, number))
        await nic.sent()
        await asyncio.sleep(nic.peer.quiet)
        for _ in range(2):
            nic.receive.offer((nic.room(USUAL), USUAL, True))
            if nic.receive.wants_kick:
                nic.receive.kick()
        await asyncio.sleep(nic.peer.quiet)
        nic.arrived()
        nic.transmit(frame(100, number + 1))
        await nic.sent()
        came = [number_of(arrival.frame) for arrival in await nic.received()]
        check(number not in came, "a frame that waited when there is a buffer for it", "it only with the next frame")


# ---- buffers that no driver offers


@CASES.must(
    "receive.readable-before", "Nothing is written into what is to be read, in front of a buffer's room.", LOOP,
    section="The Virtqueue Descriptor Table",
)  # fmt: skip
async def _(peer: Peer) -> None:
    nic = await plug(peer)
    at = nic.guarded(100)
    nic.receive.offer((at, 100, False), (nic.room(USUAL), USUAL, True))
    nic.post()
    nic.transmit(frame())
    await nic.sent()
    await asyncio.sleep(peer.quiet)
    nic.untouched("the descriptor", at, 100)


@CASES.must(
    "receive.readable", "Nothing is written into a buffer that is to be read.", LOOP,
    section="The Virtqueue Descriptor Table",
)  # fmt: skip
async def _(peer: Peer) -> None:
    nic = await plug(peer)
    at = nic.guarded(USUAL)
    nic.receive.offer((at, USUAL, False))
    nic.receive.kick()
    nic.transmit(frame())
    await nic.sent()
    await asyncio.sleep(peer.quiet)
    nic.untouched("the buffer", at, USUAL)


def _hostile(name: str, rule: str) -> Callable[[Callable[[Nic], None]], Callable[[Nic], None]]:
    """Declares the function under it as what writes a buffer at head 0 that no driver writes."""

    def declare(write: Callable[[Nic], None]) -> Callable[[Nic], None]:
        @CASES.must(f"receive.{name}", rule, LOOP, section="Split Virtqueues")
        async def _(peer: Peer) -> None:
            nic = await plug(peer)
            nic.post()
            await nic.echo(frame())
            write(nic)
            nic.receive.push(0)
            nic.receive.kick()
            nic.transmit(frame(SIZE))
            await peer.answers()
            await asyncio.sleep(peer.quiet)
            await peer.again()
            await (await plug(peer)).works()

        return write

    return declare


@_hostile("loop", "A buffer whose descriptors turn in a circle does no harm.")
def _(nic: Nic) -> None:
    at = nic.room(USUAL)
    nic.receive.bytes.describe(0, at, 512, Descriptor.NEXT | Descriptor.WRITE, 1)
    nic.receive.bytes.describe(1, at, 512, Descriptor.NEXT | Descriptor.WRITE, 0)


@_hostile("outside", "A buffer outside of memory does no harm.")
def _(nic: Nic) -> None:
    nic.receive.bytes.describe(0, MEMORY + 4096, USUAL, Descriptor.WRITE)


@_hostile("over-the-end", "A buffer that goes on behind memory does no harm.")
def _(nic: Nic) -> None:
    nic.receive.bytes.describe(0, MEMORY - 100, USUAL, Descriptor.WRITE)


@_hostile("over-the-ring", "A frame that lands in its own ring does no harm.")
def _(nic: Nic) -> None:
    nic.receive.bytes.describe(0, nic.receive.queue.desc, USUAL, Descriptor.WRITE)
