"""Frames that a guest transmits: how they may lie in descriptors, what their header says, those that no driver makes.

Virtio 1.2, section 5.1.6.2. What becomes of a frame is seen where frames come back; that its buffers do, everywhere.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from vhostuser.conformance.bench import Need
from vhostuser.conformance.frames import (
    SEGMENT_HEADERS,
    TCP_AT,
    TCP_SUM_AT,
    NetFeature,
    complete,
    frame,
    number_of,
    same,
    segment,
)
from vhostuser.conformance.nic import Nic, plug
from vhostuser.conformance.peer import MEMORY, Peer
from vhostuser.conformance.suite import Theme, check, equal
from vhostuser.driverqueue import Descriptor
from vhostuser.drivers.net import NetHeader
from vhostuser.protocol import VirtioFeature

N, V = NetFeature, VirtioFeature
CASES: Theme[Peer] = Theme("net", "Network Device: Packet Transmission")
LOOP, NET = Need.LOOP, Need.NET
RECEIVED = "Network Device: Processing of Incoming Packets"
FRAMING = "Message Framing"
OPERATION = "Network Device: Device Operation"
CSUM, TSO = (N.CSUM, N.GUEST_CSUM), (N.CSUM, N.GUEST_CSUM, N.HOST_TSO4, N.GUEST_TSO4)
PARTIAL = NetHeader(flags=1, csum_start=TCP_AT, csum_offset=TCP_SUM_AT)
LARGEST = 14 + 65535
"""Bytes of the largest segment over IPv4, in its frame."""

# ---- how a frame may lie in descriptors


def _cut(name: str, rule: str, *lengths: int, add: Callable[..., Callable[..., object]] = CASES.must) -> None:
    """lengths: of all descriptors but the last; a header has 12 bytes."""

    @add(f"transmit.{name}", rule, LOOP, section=FRAMING)
    async def _(peer: Peer) -> None:
        nic = await plug(peer)
        nic.post(count=2)
        for number in range(2):
            await nic.echo(frame(300, number), *lengths)


_cut("joined", "Header and frame may lie in one descriptor.")
_cut("apart", "The header may have a descriptor of its own.", 12)
_cut("header-and-more", "The first descriptor may hold the header and the beginning of the frame.", 12 + 14)
_cut("header-cut", "A header may be cut into descriptors.", 5, 7)
_cut("header-across", "A descriptor may hold the end of the header and the beginning of the frame.", 5, 20)
_cut("bytewise", "A header may lie in descriptors of one byte each.", *(1,) * 12)
_cut("many", "A frame may lie in as many pieces as a socket buffer has.", 12, *(15,) * 18)
_cut("odd", "Pieces of a frame may have any length.", 12, 1, 3, 17, 128)
_cut("empty-parts", "Descriptors of no bytes between others are passed over.", 12, 0, 40, 0, 0, add=CASES.should)


def _tabled(name: str, rule: str, *lengths: int) -> None:
    @CASES.must(f"transmit.{name}", rule, LOOP, V.RING_INDIRECT_DESC, section="Indirect Descriptors")
    async def _(peer: Peer) -> None:
        nic = await plug(peer, V.RING_INDIRECT_DESC, indirect=True)
        nic.post(count=2)
        for number in range(2):
            await nic.echo(frame(600, number), *lengths)


_tabled("indirect", "Header and frame may lie in one descriptor of an indirect table.")
_tabled("indirect-apart", "The header may have an entry of its own in an indirect table.", 12)
_tabled("indirect-many", "A frame may lie in many entries of an indirect table.", 5, 7, *(15,) * 30)


@CASES.must(
    "transmit.indirect-behind", "An indirect table may follow descriptors that are linked.", LOOP, V.RING_INDIRECT_DESC,
    section="Indirect Descriptors",
)  # fmt: skip
async def _(peer: Peer) -> None:
    nic = await plug(peer, V.RING_INDIRECT_DESC)
    nic.post()
    data, ring = frame(600), nic.send.bytes
    header, first, rest = nic.cut(nic.headed(data), (nic.header, 100))
    table = nic.room(32, 16)
    ring.describe_at(table, 0, *first[:2], Descriptor.NEXT, 1)
    ring.describe_at(table, 1, *rest[:2])
    ring.describe(0, *header[:2], Descriptor.NEXT, 1)
    ring.describe(1, table, 32, Descriptor.INDIRECT)
    nic.send.push(0)
    nic.send.kick()
    arrival = await nic.one()
    same(arrival.frame, data)


# ---- sizes


def _sized(size: int, rule: str, *, add: Callable[..., Callable[..., object]] = CASES.must) -> None:
    @add(f"frame.{size}", rule, LOOP)
    async def _(peer: Peer) -> None:
        nic = await plug(peer)
        nic.post(nic.header + size, nic.header + size)
        for number in range(2):
            await nic.echo(frame(size, number), nic.header)


_sized(14, "A frame of nothing but an Ethernet header passes.", add=CASES.should)
_sized(60, "The shortest frame of Ethernet passes, without padding.")
_sized(64, "A frame of 64 bytes passes.")
_sized(1514, "The longest frame without offloads passes.")
_sized(9000, "A frame of 9000 bytes passes where no MTU was negotiated.", add=CASES.should)


async def _segment(peer: Peer, size: int, *features: NetFeature, buffers: tuple[int, ...], hdr_len: int) -> NetHeader:
    """Transmits a TCP segment to be cut, and sees it come back whole; its header then."""
    nic = await plug(peer, *features)
    nic.post(*buffers)
    data = segment(size)
    header = NetHeader(1, 1, hdr_len, 1448, TCP_AT, TCP_SUM_AT)
    nic.transmit(data, nic.header, SEGMENT_HEADERS, *(4096,) * ((size - SEGMENT_HEADERS) // 4096), header=header)
    await nic.sent()
    arrival = await nic.one()
    same(arrival.frame, data)
    return arrival.header


@CASES.should("frame.tso", "A TCP segment of 64 KiB comes back as one where both sides take such.", LOOP, *TSO)
async def _(peer: Peer) -> None:
    header = await _segment(peer, LARGEST, *TSO, buffers=(12 + LARGEST,), hdr_len=SEGMENT_HEADERS)
    equal("gso_type, gso_size", (header.gso_type, header.gso_size), (1, 1448))


@CASES.should(
    "frame.tso-merged", "A TCP segment of 64 KiB comes back in small buffers.", LOOP, *TSO, N.MRG_RXBUF
)  # fmt: skip
async def _(peer: Peer) -> None:
    header = await _segment(peer, LARGEST, *TSO, N.MRG_RXBUF, buffers=(2048,) * 40, hdr_len=SEGMENT_HEADERS)
    equal("gso_type, num_buffers", (header.gso_type, header.num_buffers), (1, -(-(12 + LARGEST) // 2048)))


@CASES.must("transmit.hdr-len", "A wrong hdr_len does no harm to a segment: it is a hint.", LOOP, *TSO)
async def _(peer: Peer) -> None:
    for hdr_len in (0xFFFF, 1):
        header = await _segment(peer, 4000, *TSO, buffers=(8192,), hdr_len=hdr_len)
        equal("gso_type", header.gso_type, 1)
        await peer.again()


# ---- what the header says


@CASES.must("transmit.used-length", "A device writes nothing into what is transmitted: the used length is 0.", NET)
async def _(peer: Peer) -> None:
    nic = await plug(peer)
    for number in range(20):
        nic.transmit(frame(100 + number, number))
    for used in await nic.sent():
        equal("the used length", used.length, 0)


@CASES.must("transmit.unknown-flags", "Bits of flags that a device does not know are ignored.", LOOP)
async def _(peer: Peer) -> None:
    nic = await plug(peer)
    nic.post()
    arrival = await nic.echo(frame(), header=NetHeader(flags=0xF0))
    equal("flags", arrival.header.flags, 0)


@CASES.must("transmit.checksum-unused", "Without NEEDS_CSUM csum_start and csum_offset are not used.", LOOP, N.CSUM)
async def _(peer: Peer) -> None:
    nic = await plug(peer, N.CSUM)
    nic.post(count=2)
    await nic.echo(frame(100), header=NetHeader(csum_start=0xFFFF, csum_offset=0xFFFF))
    await nic.echo(frame(100), header=NetHeader(csum_start=20, csum_offset=4))


@CASES.should("transmit.num-buffers", "What a driver writes into num_buffers is not used.", LOOP)
async def _(peer: Peer) -> None:
    nic = await plug(peer)
    nic.post()
    await nic.echo(frame(), header=NetHeader(num_buffers=0xFFFF))


@CASES.must(
    "transmit.checksum-completed", "For a driver without GUEST_CSUM a checksum that was left out is filled in.", LOOP,
    N.CSUM, section=RECEIVED,
)  # fmt: skip
async def _(peer: Peer) -> None:
    nic = await plug(peer, N.CSUM)
    nic.post()
    data = segment(777)
    nic.transmit(data, header=PARTIAL)
    await nic.sent()
    arrival = await nic.one()
    equal("flags", arrival.header.flags, 0)
    same(arrival.frame, complete(data))


@CASES.must(
    "transmit.checksum-partial", "With GUEST_CSUM it comes back filled in, or with where it goes.", LOOP, *CSUM,
    section=RECEIVED,
)  # fmt: skip
async def _(peer: Peer) -> None:
    nic = await plug(peer, *CSUM)
    nic.post()
    data = segment(777)
    nic.transmit(data, header=PARTIAL)
    await nic.sent()
    arrival = await nic.one()
    header = arrival.header
    if header.flags & 1:
        equal("csum_start, csum_offset", (header.csum_start, header.csum_offset), (TCP_AT, TCP_SUM_AT))
        same(arrival.frame, data)
    else:
        same(arrival.frame, complete(data))


async def _not_forwarded(peer: Peer, *features: NetFeature, header: NetHeader, size: int = 200) -> Nic:
    """Transmits a frame that must go nowhere, and sees that the ring lives."""
    nic = await plug(peer, *features)
    nic.post(count=2)
    nic.transmit(segment(size), header=header)
    await nic.sent()
    await asyncio.sleep(peer.quiet)
    arrived = nic.arrived()
    check(not arrived, "the frame dropped", f"it came back with {arrived[0].header if arrived else ''}")
    await nic.echo(frame())
    return nic


@CASES.should("transmit.checksum-outside", "A frame whose checksum lies outside of it is dropped.", LOOP, *CSUM)
async def _(peer: Peer) -> None:
    for start, offset in ((0xFFFF, 0xFFFF), (199, 0), (TCP_AT, 200 - TCP_AT - 1)):
        await _not_forwarded(peer, *CSUM, header=NetHeader(1, csum_start=start, csum_offset=offset))
        await peer.again()


@CASES.should("transmit.segment-without-size", "A segment to be cut into pieces of no bytes is dropped.", LOOP, *TSO)
async def _(peer: Peer) -> None:
    await _not_forwarded(peer, *TSO, header=NetHeader(1, 1, SEGMENT_HEADERS, 0, TCP_AT, TCP_SUM_AT))


@CASES.should("transmit.unknown-segment", "A segment of a kind that was not negotiated is dropped.", LOOP, *TSO)
async def _(peer: Peer) -> None:
    for kind in (4, 5, 0x7F):
        await _not_forwarded(peer, *TSO, header=NetHeader(1, kind, SEGMENT_HEADERS, 100, TCP_AT, TCP_SUM_AT))
        await peer.again()


# ---- sizes of headers


async def _headers(peer: Peer, *features: NetFeature, legacy: bool, size: int) -> None:
    """After a driver whose header has another size: it is not the device's, but what was negotiated.

    A device that is wrong in both directions sends frames back as they were, and what stood in num_buffers with them.
    """
    await (await plug(peer, legacy=size == 12)).works()
    await peer.again()
    nic = await plug(peer, *features, legacy=legacy)
    assert nic.header == size
    nic.post(count=4)
    for number in range(4):
        front = NetHeader(num_buffers=0xABCD)
        arrival = await nic.echo(frame(200, number), *(() if number % 2 else (size,)), header=front)
        equal("the used length", arrival.chains[0].length, size + 200)
        check(arrival.header.num_buffers != 0xABCD, "a header of the device's own", "two bytes of the driver's in it")


@CASES.must("header.modern", "With VERSION_1 a header has 12 bytes, merged or not.", LOOP, section=OPERATION)
async def _(peer: Peer) -> None:
    await _headers(peer, legacy=False, size=12)


@CASES.must("header.mergeable", "With MRG_RXBUF a header has 12 bytes.", LOOP, N.MRG_RXBUF, section=OPERATION)
async def _(peer: Peer) -> None:
    await _headers(peer, N.MRG_RXBUF, legacy=False, size=12)


LEGACY = "Network Device: Legacy Interface: Device Operation"


@CASES.must("header.legacy", "Without VERSION_1 and MRG_RXBUF a header has 10 bytes.", LOOP, section=LEGACY)
async def _(peer: Peer) -> None:
    await _headers(peer, legacy=True, size=10)


@CASES.must(
    "header.legacy-mergeable", "Without VERSION_1, but with MRG_RXBUF, a header has 12 bytes.", LOOP, N.MRG_RXBUF,
    section=LEGACY,
)  # fmt: skip
async def _(peer: Peer) -> None:
    await _headers(peer, N.MRG_RXBUF, legacy=True, size=12)


# ---- many frames


@CASES.must("frame.order", "Frames of one ring keep their order, none of them twice.", LOOP, section=OPERATION)
async def _(peer: Peer) -> None:
    nic = await plug(peer, size=16)
    came: list[int] = []
    for round_ in range(20):
        nic.post(count=10)
        for number in range(10 * round_, 10 * round_ + 10):
            nic.transmit(frame(100 + number, number))
        await nic.sent()
        came += [number_of(arrival.frame) for arrival in await nic.received(10)]
    equal("the frames that came", came, list(range(200)))


@CASES.must("transmit.one-kick", "All frames that are there are sent, also where one kick was for many.", LOOP)
async def _(peer: Peer) -> None:
    nic = await plug(peer, size=64)
    nic.post(*(256,) * 60)
    for number in range(60):
        nic.send.offer(*nic.cut(nic.headed(frame(100, number)), ()))
    nic.send.kick()
    await nic.sent()
    equal("the frames", [number_of(arrival.frame) for arrival in await nic.received(60)], list(range(60)))


# ---- what no driver transmits: dropped, and the ring goes on


def _dropped(
    name: str, rule: str, add: Callable[..., Callable[..., object]] = CASES.should
) -> Callable[[Callable[[Nic], None]], Callable[[Nic], None]]:
    """Declares the function under it as what offers a chain; its buffers come back and the next frame passes."""

    def declare(offer: Callable[[Nic], None]) -> Callable[[Nic], None]:
        @add(f"transmit.{name}", rule, NET)
        async def _(peer: Peer) -> None:
            nic = await plug(peer)
            nic.transmit(frame())
            await nic.sent()
            offer(nic)
            nic.send.kick()
            await nic.sent()
            nic.transmit(frame())
            await nic.sent()

        return offer

    return declare


@_dropped("short-header", "A chain shorter than a header is returned, and the ring lives.")
def _(nic: Nic) -> None:
    nic.send.offer((nic.place(bytes(5)), 5, False))


@_dropped("only-header", "A header without a frame is returned, and the ring lives.")
def _(nic: Nic) -> None:
    nic.send.offer((nic.place(bytes(nic.header)), nic.header, False))


@_dropped("runt", "A frame shorter than an Ethernet header is returned, and the ring lives.")
def _(nic: Nic) -> None:
    nic.transmit(b"\x02" * 5)


@_dropped("nothing", "A chain of no bytes is returned, and the ring lives.")
def _(nic: Nic) -> None:
    nic.send.offer((nic.room(16), 0, False))


@_dropped("oversize", "A frame of a mebibyte is returned, and the ring lives.")
def _(nic: Nic) -> None:
    at = nic.place(nic.headed(frame()))
    nic.send.offer(*[(at, 32768, False)] * 32)


@CASES.should("transmit.oversize-dropped", "A frame of a mebibyte is not sent on, and no part of it.", LOOP)
async def _(peer: Peer) -> None:
    nic = await plug(peer)
    nic.post(count=8)
    at = nic.place(nic.headed(frame()))
    nic.send.offer(*[(at, 32768, False)] * 32)
    nic.send.kick()
    await nic.sent()
    await nic.silence()


BUFFERS = "The Virtqueue Descriptor Table"


@CASES.must(
    "transmit.writable-behind", "Nothing is written into a chain to transmit, also where there is room.", NET,
    section=BUFFERS,
)  # fmt: skip
async def _(peer: Peer) -> None:
    nic = await plug(peer)
    data = nic.headed(frame())
    room = nic.guarded(256)
    nic.send.offer((nic.place(data), len(data), False), (room, 256, True))
    nic.send.kick()
    await nic.sent()
    nic.untouched("what may be written", room, 256)
    nic.transmit(frame())
    await nic.sent()


@CASES.should("transmit.writable", "A chain that is all to be written is no frame.", LOOP, section=BUFFERS)
async def _(peer: Peer) -> None:
    nic = await plug(peer)
    nic.post(count=2)
    data = nic.headed(frame(100, 1))
    at = nic.place(data)
    nic.send.offer((at, len(data), True))
    nic.send.kick()
    await nic.sent()
    await nic.silence()
    equal("its bytes", nic.peer.memory.read(at, len(data)), data)
    await nic.echo(frame(100, 2))


# ---- what may break the ring, and must not break the back-end


def _hostile(name: str, rule: str) -> Callable[[Callable[[Nic], None]], Callable[[Nic], None]]:
    """Declares the function under it as what writes a chain at head 0 that no driver writes."""

    def declare(write: Callable[[Nic], None]) -> Callable[[Nic], None]:
        @CASES.must(f"transmit.{name}", rule, NET, section="Split Virtqueues")
        async def _(peer: Peer) -> None:
            await _harmless(peer, write)

        return write

    return declare


async def _harmless(peer: Peer, write: Callable[[Nic], None]) -> None:
    nic = await plug(peer)
    nic.transmit(frame())
    await nic.sent()
    write(nic)
    nic.send.push(0)
    nic.send.kick()
    await peer.answers()
    await asyncio.sleep(peer.quiet)
    await peer.again()
    nic = await plug(peer)
    nic.transmit(frame())
    await nic.sent()


@_hostile("loop", "A frame whose descriptors turn in a circle does no harm.")
def _(nic: Nic) -> None:
    at = nic.place(nic.headed(frame(1000)))
    nic.send.bytes.describe(0, at, 512, Descriptor.NEXT, 1)
    nic.send.bytes.describe(1, at, 512, Descriptor.NEXT, 0)


@_hostile("outside", "A frame outside of memory does no harm.")
def _(nic: Nic) -> None:
    nic.send.bytes.describe(0, nic.place(bytes(nic.header)), nic.header, Descriptor.NEXT, 1)
    nic.send.bytes.describe(1, MEMORY + 4096, 1000)


@_hostile("over-the-end", "A frame that goes on behind memory does no harm.")
def _(nic: Nic) -> None:
    nic.send.bytes.describe(0, MEMORY - 100, 1000)


@_hostile("huge", "A frame of 4 GiB does no harm.")
def _(nic: Nic) -> None:
    nic.send.bytes.describe(0, nic.place(nic.headed(frame())), 0xFFFFFFFF)
