"""Rings that no driver writes: none may end the process, keep it busy for ever, or be taken for done.

What the specification leaves open is whether such a ring is reported, or ends the connection; that the next front-end
is served, with a ring that works, is the least. Sections of virtio 1.3, 2.7 and of "Ring states".
"""

from __future__ import annotations

import asyncio
import random
import struct
from collections.abc import Callable
from contextlib import suppress

from vhostuser.conformance.bench import Need
from vhostuser.conformance.bytewise import AVAIL
from vhostuser.conformance.lane import DEPTH, Lane
from vhostuser.conformance.peer import MEMORY, MIB, Peer
from vhostuser.conformance.suite import Theme, check
from vhostuser.driverqueue import Descriptor
from vhostuser.protocol import FrontendRequest, ProtocolFeature, VirtioFeature, VringAddress

F = FrontendRequest
CASES: Theme[Peer] = Theme("hostile", "Split Virtqueues")
ADDRESS: Theme[Peer] = Theme("address", F.SET_VRING_ADDR.clause)
DISK, INDIRECT = Need.BLK, VirtioFeature.RING_INDIRECT_DESC
NEXT, WRITE, TABLE = Descriptor.NEXT, Descriptor.WRITE, Descriptor.INDIRECT
SIZE = 64
AWAY = 5 * MIB
"""A guest address where nothing lies."""

Write = Callable[[Lane], None]


def _case(name: str, rule: str, *features: VirtioFeature, harmless: bool = False) -> Callable[[Write], Write]:
    """Declares the function under it as what is written into a ring that runs; a plain read is described there.

    harmless: that read may be done.
    """

    def add(write: Write) -> Write:
        @CASES.must(name, rule, DISK, *features)
        async def _(peer: Peer) -> None:
            lane = await peer.lane(*features)
            await lane.works()
            buffers = lane.plain_chain()
            write(lane)
            lane.kick()
            await asyncio.sleep(peer.quiet)
            check(harmless or lane.memory.read(buffers.status, 1) != b"\0", "the request not done", "status OK")
            await _another_works(peer)

        return write

    return add


async def _another_works(peer: Peer) -> None:
    await peer.again()
    lane = await peer.lane()
    await lane.works()


# ---- heads and links


@_case("head-outside", "A head outside of the table does no harm.")
def _(lane: Lane) -> None:
    lane.push(SIZE)


@_case("head-far-outside", "A head far outside of the table does no harm.")
def _(lane: Lane) -> None:
    lane.push(0xFFFF)


@_case("next-outside", "A link out of the table does no harm.")
def _(lane: Lane) -> None:
    lane.bytes.describe(0, lane.buffers().header, 16, NEXT, 0xFFFF)
    lane.push(0)


@_case("loop-of-one", "A descriptor that is its own next does no harm.")
def _(lane: Lane) -> None:
    lane.bytes.describe(0, lane.buffers().header, 16, NEXT, 0)
    lane.push(0)


@_case("loop", "A chain that turns in a circle does no harm.")
def _(lane: Lane) -> None:
    lane.bytes.describe(2, lane.buffers().status, 1, NEXT | WRITE, 1)
    lane.push(0)


@_case("head-twice", "A head that is offered again before it came back does no harm.", harmless=True)
def _(lane: Lane) -> None:
    lane.push(0, 0)


@_case("index-ahead", "An available index more than a ring ahead does no harm.", harmless=True)
def _(lane: Lane) -> None:
    lane.raw.available_index += SIZE + 1


@_case("index-back", "An available index that goes back does no harm.", harmless=True)
def _(lane: Lane) -> None:
    lane.raw.available_index -= 1


# ---- indirect tables


def _tabled(lane: Lane, *, length: int = 48, at: int = AWAY, flags: int = TABLE, after: int = 0) -> None:
    """A plain read by way of a table."""
    buffers = lane.buffers()
    lane.bytes.describe_at(AWAY, 0, buffers.header, 16, NEXT, 1)
    lane.bytes.describe_at(AWAY, 1, buffers.data, 512, NEXT | WRITE, 2)
    lane.bytes.describe_at(AWAY, 2, buffers.status, 1, WRITE)
    lane.bytes.describe(0, at, length, flags, after)
    lane.push(0)


@_case("indirect-odd", "A table whose length is no multiple of 16 is not used.", INDIRECT)
def _(lane: Lane) -> None:
    _tabled(lane, length=40)


@_case("indirect-empty", "A table of no entries is not used.", INDIRECT)
def _(lane: Lane) -> None:
    _tabled(lane, length=0)


@_case("indirect-outside", "A table outside of memory does no harm.", INDIRECT)
def _(lane: Lane) -> None:
    _tabled(lane, at=MEMORY + 4096)


@_case("indirect-over-the-end", "A table that goes on behind memory does no harm.", INDIRECT)
def _(lane: Lane) -> None:
    _tabled(lane, at=MEMORY - 16)


@_case("indirect-huge", "A table of 4 GiB does no harm.", INDIRECT)
def _(lane: Lane) -> None:
    _tabled(lane, length=0xFFFFFFF0)


@_case("indirect-nested", "A table in a table is not followed.", INDIRECT)
def _(lane: Lane) -> None:
    _tabled(lane)
    lane.bytes.describe_at(AWAY, 0, AWAY, 48, TABLE)


@_case("indirect-and-next", "A table with a link behind it does no harm.", INDIRECT, harmless=True)
def _(lane: Lane) -> None:
    _tabled(lane, flags=TABLE | NEXT, after=1)


@_case("indirect-loop", "A table that turns in a circle does no harm.", INDIRECT)
def _(lane: Lane) -> None:
    _tabled(lane)
    lane.bytes.describe_at(AWAY, 2, lane.buffers().status, 1, NEXT | WRITE, 1)


@_case("indirect-link-outside", "A link out of a table does no harm.", INDIRECT)
def _(lane: Lane) -> None:
    _tabled(lane)
    lane.bytes.describe_at(AWAY, 0, lane.buffers().header, 16, NEXT, 3)


# ---- buffers


def _status(lane: Lane) -> bytes:
    """Of the request that ``Lane.buffers`` lays out, which it would reset."""
    return lane.memory.read(lane.at + 64 * (DEPTH - 1) + 32, 1)


def _data(lane: Lane, guest: int, length: int = 512) -> None:
    """A read into this buffer."""
    lane.bytes.describe(1, guest, length, NEXT | WRITE, 2)
    lane.push(0)


@_case("buffer-outside", "A buffer outside of memory does no harm.")
def _(lane: Lane) -> None:
    _data(lane, MEMORY + 4096)


@_case("buffer-over-the-end", "A buffer that goes on behind memory does no harm.")
def _(lane: Lane) -> None:
    _data(lane, MEMORY - 256)


@_case("buffer-wraps", "A buffer that goes on at guest address 0 does no harm.")
def _(lane: Lane) -> None:
    _data(lane, (1 << 64) - 256)


@_case("buffer-huge", "A buffer of 4 GiB does no harm.")
def _(lane: Lane) -> None:
    _data(lane, AWAY, 0xFFFFFE00)


@_case("header-outside", "A header outside of memory does no harm.")
def _(lane: Lane) -> None:
    lane.bytes.describe(0, MEMORY, 16, NEXT, 1)
    lane.push(0)


@_case("header-short", "A header of eight bytes is none.")
def _(lane: Lane) -> None:
    lane.bytes.describe(0, lane.buffers().header, 8, NEXT, 1)
    lane.push(0)


@_case("header-missing", "A request without a header does no harm.")
def _(lane: Lane) -> None:
    lane.push(1)


@_case("status-missing", "A request without room for a status does no harm.")
def _(lane: Lane) -> None:
    lane.bytes.describe(0, lane.buffers().header, 16)
    lane.push(0)


@_case("status-outside", "A status outside of memory does no harm.")
def _(lane: Lane) -> None:
    lane.bytes.describe(2, MEMORY, 1, WRITE)
    lane.push(0)


@_case("nothing", "A chain of no bytes does no harm.")
def _(lane: Lane) -> None:
    lane.bytes.describe(0, 0, 0)
    lane.push(0)


@_case("readable-after-writable", "A descriptor to read behind one to write is not a request.")
def _(lane: Lane) -> None:
    buffers = lane.buffers()
    lane.describe((buffers.data, 512, True), (buffers.header, 16, False), (buffers.status, 1, True))
    lane.push(0)


@CASES.must("changes", "Descriptors that change while they are read do no harm.", DISK)
async def _(peer: Peer) -> None:
    lane = await peer.lane()
    await lane.works()
    dice = random.Random(1)
    for _ in range(300):
        lane.plain_chain()
        lane.push(0)
        lane.kick()
        lane.bytes.rewrite(
            dice.randrange(3), dice.getrandbits(dice.choice((16, 64))), dice.getrandbits(32), dice.getrandbits(3), 1
        )
    await _another_works(peer)


@CASES.must("over-the-ring", "A read whose data land in the ring itself does no harm.", DISK)
async def _(peer: Peer) -> None:
    lane = await peer.lane()
    await lane.works()
    for part in (lane.queue.desc, lane.queue.used, lane.queue.avail):
        lane.plain_chain()
        _data(lane, part)
        lane.kick()
        await asyncio.sleep(peer.quiet)
    await _another_works(peer)


@CASES.should("indirect-unnegotiated", "An indirect table that was not negotiated is not followed.", DISK)
async def _(peer: Peer) -> None:
    lane = await peer.lane()
    await lane.works()
    _tabled(lane)
    lane.kick()
    await asyncio.sleep(peer.quiet)
    check(_status(lane) != b"\0", "the request not done", "status OK")


# ---- what becomes of the connection


@CASES.should("control-kept", "The front-end of a broken ring is still answered.", DISK, section="Ring states")
async def _(peer: Peer) -> None:
    lane = await peer.lane()
    await lane.works()
    lane.push(SIZE)
    lane.kick()
    await asyncio.sleep(peer.quiet)
    await peer.answers()


@CASES.should("recovers", "A broken ring that is stopped and set up anew works.", DISK, section="Ring states")
async def _(peer: Peer) -> None:
    lane = await peer.lane()
    await lane.works()
    lane.push(SIZE)
    lane.kick()
    await asyncio.sleep(peer.quiet)
    await lane.stop()
    fresh = peer.make_lane()
    await fresh.start()
    await fresh.works()


@CASES.should("reported", "A broken ring is reported on its err descriptor.", DISK, section=F.SET_VRING_ERR.clause)
async def _(peer: Peer) -> None:
    lane = await peer.lane()
    await lane.works()
    lane.push(SIZE)
    lane.kick()
    check(await lane.reported(), "the err eventfd signalled", "silence")


# ---- rings where no ring can be


def _placed(name: str, rule: str, desc: int, avail: int, used: int, *, absolute: bool = False) -> None:
    """desc, avail, used: bytes from the beginning of memory's user addresses, or absolute ones. A request waits there,
    whose head and descriptor are the second of their parts."""

    @ADDRESS.must(name, rule, Need.RINGS)
    async def _(peer: Peer) -> None:
        await peer.negotiate()
        memory = await peer.share()
        lane = peer.make_lane()
        await lane.start(enable=False)
        with suppress(LookupError):
            if peer.packed:
                memory.write(desc, struct.pack("<QIHH", 0, 1, 0, AVAIL | NEXT))
            else:
                memory.write(avail, struct.pack("<HH", 0, 2))
                memory.write(avail + 4, struct.pack("<HH", 1, 1))
        user = 0 if absolute else memory.map.guest_to_host(0)
        await peer.react(
            F.SET_VRING_ADDR, VringAddress(lane.index, 0, desc=user + desc, used=user + used, avail=user + avail, log=0)
        )
        await peer.react(F.SET_VRING_ENABLE, lane.index.to_bytes(4, "little") + b"\1\0\0\0")
        lane.kick()
        await asyncio.sleep(peer.quiet)
        await peer.again()
        other = await peer.lane()
        await other.works()


_placed("outside", "A ring outside of memory does no harm.", 1 << 40, 1 << 40, 1 << 40)
_placed("null", "A ring at address 0 does no harm.", 0, 0, 0, absolute=True)
_placed("desc-over-the-end", "A table that goes on behind memory does no harm.", MEMORY - 16, 8192, 16384)
_placed("avail-over-the-end", "An available ring that goes on behind memory does no harm.", 0, MEMORY - 4, 16384)
_placed("used-over-the-end", "A used ring that goes on behind memory does no harm.", 0, 8192, MEMORY - 4)
_placed("misaligned", "Parts at odd addresses do no harm.", 1, 8193, 16385)
_placed("overlapping", "Parts that lie on each other do no harm.", 0, 0, 0)


@ADDRESS.must("user", "Ring addresses are user addresses, not guest addresses.", Need.RINGS, ProtocolFeature.REPLY_ACK)
async def _(peer: Peer) -> None:
    await peer.negotiate()
    memory = await peer.share(peer.make_memory((1 << 33, MEMORY)))
    lane = peer.make_lane(at=1 << 33, requests=(1 << 33) + MIB)
    await lane.start()
    await lane.works()
    check(memory.map.guest_to_host(1 << 33) != 1 << 33, "user and guest addresses to differ", "the same")
