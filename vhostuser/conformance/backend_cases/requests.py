"""Split rings as drivers use them, and what a disk makes of its requests. Virtio 1.3, sections 2.7 and 5.2."""

from __future__ import annotations

import asyncio
import struct

from vhostuser.conformance.bench import Need
from vhostuser.conformance.lane import DEPTH, Lane
from vhostuser.conformance.peer import MIB, PLAIN, Peer
from vhostuser.conformance.suite import Theme, check, equal
from vhostuser.driverqueue import Descriptor
from vhostuser.drivers.blk import SECTOR, BlkRequest, BlkStatus, BlkType
from vhostuser.protocol import VirtioFeature

V = VirtioFeature
SPLIT: Theme[Peer] = Theme("split", "Split Virtqueues")
BLK: Theme[Peer] = Theme("blk", "Block Device: Device Operation")
DISCARD, WRITE_ZEROES = 13, 14
"""Feature bits of a disk."""
RINGS, DISK, WRITABLE = Need.RINGS, Need.BLK, Need.WRITABLE
INDIRECT, EVENT_IDX = V.RING_INDIRECT_DESC, V.RING_EVENT_IDX
TABLE = 5 * MIB
"""Guest address of an indirect table."""


def _works_with(name: str, rule: str, *features: VirtioFeature, size: int, count: int, rounds: int) -> None:
    @SPLIT.must(name, rule, RINGS, *features)
    async def _(peer: Peer) -> None:
        await peer.negotiate(*features)
        await peer.share()
        lane = peer.make_lane(size=size, indirect=INDIRECT in features)
        await lane.start()
        for _ in range(rounds):
            for number in range(0 if peer.packed else count):  # what is in the used ring must be of this round
                lane.raw.use(lane.raw.used_index + number, 0xFFFFFFFF, 0)
            lane.offer(count=count)
            lane.kick()
            await lane.served()


_works_with("size-4", "A ring may have four entries, and goes round.", size=4, count=1, rounds=12)
_works_with("size-256", "A ring may have 256 entries.", size=256, count=16, rounds=20)
_works_with("full", "A ring may be full.", size=16, count=5, rounds=10)
_works_with("batch", "Many requests may be offered with one kick.", size=64, count=16, rounds=20)
_works_with("indirect", "Requests may lie in indirect tables.", INDIRECT, size=16, count=16, rounds=10)
_works_with("event-idx", "Requests are served with EVENT_IDX.", EVENT_IDX, size=16, count=4, rounds=20)
_works_with("both", "Indirect tables and EVENT_IDX go together.", INDIRECT, EVENT_IDX, size=16, count=8, rounds=20)


# ---- event index


@SPLIT.must("event-idx-called", "With EVENT_IDX the driver is called when its index is passed.", RINGS, EVENT_IDX)
async def _(peer: Peer) -> None:
    lane = await peer.lane(EVENT_IDX)
    for _ in range(5):
        lane.bytes.want_call()
        await lane.calm()
        await lane.works()
        check(await lane.called(), "a call", "none")


@SPLIT.should("event-idx-far", "With EVENT_IDX the driver is not called before its index is reached.", RINGS, EVENT_IDX)
async def _(peer: Peer) -> None:
    lane = await peer.lane(EVENT_IDX)
    await lane.works()
    lane.bytes.want_call(late=True)
    await lane.calm()
    await lane.works()
    check(not await lane.called(within=peer.quiet), "no call", "a call")


@SPLIT.must(
    "event-idx-kick",
    "With EVENT_IDX the device asks for the kick of the next request when it goes idle.",
    RINGS,
    EVENT_IDX,
)
async def _(peer: Peer) -> None:
    lane = await peer.lane(EVENT_IDX)
    await lane.works()
    await asyncio.sleep(peer.quiet)
    check(lane.bytes.is_kick_wanted(), "a kick asked for with the next request", "another or none")


@SPLIT.must(
    "event-idx-stress", "With EVENT_IDX no call is lost, however requests and looks fall together.", RINGS, EVENT_IDX
)
async def _(peer: Peer) -> None:
    lane = await peer.lane(EVENT_IDX)
    for round_ in range(200):
        lane.offer(count=1 + round_ % 3)
        lane.kick()
        while not lane.returned():
            if not lane.queue.arm():
                check(await lane.called(), "a call for what is returned after the driver asked", "none")


# ---- how requests are cut into descriptors


async def _parts(peer: Peer, cut: list[tuple[str, int, int, bool]]) -> None:
    lane = await peer.lane()
    buffers = lane.buffers()
    at = buffers._asdict()
    lane.describe(*[(at[part] + offset, length, writable) for part, offset, length, writable in cut])
    lane.push(0)
    lane.kick()
    await lane.used_to(1)
    equal("the status", lane.memory.read(buffers.status, 1)[0], int(BlkStatus.OK))


HEADER, STATUS = ("header", 0, 16, False), ("status", 0, 1, True)


@SPLIT.must("cut-header", "A header may be cut into pieces: a device assumes nothing about descriptors.", DISK)
async def _(peer: Peer) -> None:
    await _parts(peer, [("header", 0, 4, False), ("header", 4, 12, False), ("data", 0, 512, True), STATUS])


@SPLIT.must("cut-data", "Data may be cut into pieces of any size.", DISK)
async def _(peer: Peer) -> None:
    await _parts(peer, [HEADER, ("data", 0, 1, True), ("data", 1, 510, True), ("data", 511, 1, True), STATUS])


@SPLIT.must("joined-status", "The status may lie in one descriptor with the data.", DISK)
async def _(peer: Peer) -> None:
    lane = await peer.lane()
    buffers = lane.buffers()
    lane.memory.write(buffers.data + 512, b"\xff")
    lane.describe((buffers.header, 16, False), (buffers.data, 513, True))
    lane.push(0)
    lane.kick()
    await lane.used_to(1)
    equal("the status", lane.memory.read(buffers.data + 512, 1)[0], int(BlkStatus.OK))


@SPLIT.must("order-of-table", "Descriptors are followed by their links, wherever they lie in the table.", DISK)
async def _(peer: Peer) -> None:
    lane = await peer.lane()
    buffers = lane.buffers()
    lane.bytes.describe(40, buffers.header, 16, Descriptor.NEXT, 3)
    lane.bytes.describe(3, buffers.data, 512, Descriptor.NEXT | Descriptor.WRITE, 63)
    lane.bytes.describe(63, buffers.status, 1, Descriptor.WRITE)
    lane.push(40)
    lane.kick()
    await lane.used_to(1)
    equal("the used entry", lane.bytes.used_entry(0)[0], 40)
    equal("the status", lane.memory.read(buffers.status, 1)[0], int(BlkStatus.OK))


@SPLIT.must("link-ignored", "The link of a last descriptor has no meaning.", DISK)
async def _(peer: Peer) -> None:
    lane = await peer.lane()
    buffers = lane.plain_chain()
    lane.bytes.describe(2, buffers.status, 1, Descriptor.WRITE, 0xFFFF)
    lane.push(0)
    lane.kick()
    await lane.used_to(1)
    equal("the status", lane.memory.read(buffers.status, 1)[0], int(BlkStatus.OK))


@SPLIT.must("used-length", "The used length is what was written: data and status of a read.", DISK)
async def _(peer: Peer) -> None:
    lane = await peer.lane()
    (answer,) = await lane.works(BlkRequest.read(0, 4))
    equal("the used length", answer.length, 4 * SECTOR + 1)


@SPLIT.must("across-regions", "A buffer may go on from one region into the next.", DISK, section="Memory access")
async def _(peer: Peer) -> None:
    await peer.negotiate()
    memory = await peer.share(peer.make_memory((0, 4 * MIB), (4 * MIB, 4 * MIB)))
    lane = peer.make_lane()
    await lane.start()
    buffers = lane.buffers()
    lane.describe((buffers.header, 16, False), (4 * MIB - 100, 512, True), (buffers.status, 1, True))
    memory.write(4 * MIB - 100, b"\xee" * 512)
    lane.push(0)
    lane.kick()
    await lane.used_to(1)
    equal("the status", memory.read(buffers.status, 1)[0], int(BlkStatus.OK))
    lane.plain_chain(first=8)
    lane.push(8)
    lane.kick()
    await lane.used_to(2)
    equal("the data on both sides", memory.read(4 * MIB - 100, 512), memory.read(buffers.data, 512))


@SPLIT.should(
    "empty-buffer", "A buffer of no bytes is passed over: it is not forbidden, and some drivers send it.", DISK
)
async def _(peer: Peer) -> None:
    await _parts(peer, [HEADER, ("data", 0, 512, True), ("data", 512, 0, True), STATUS])


# ---- indirect tables


@SPLIT.must("indirect-after-direct", "An indirect table may follow direct descriptors of its chain.", DISK, INDIRECT)
async def _(peer: Peer) -> None:
    lane = await peer.lane(INDIRECT)
    buffers = lane.buffers()
    lane.bytes.describe(0, buffers.header, 16, Descriptor.NEXT, 1)
    lane.bytes.describe(1, TABLE, 32, Descriptor.INDIRECT)
    lane.bytes.describe_at(TABLE, 0, buffers.data, 512, Descriptor.NEXT | Descriptor.WRITE, 1)
    lane.bytes.describe_at(TABLE, 1, buffers.status, 1, Descriptor.WRITE)
    lane.push(0)
    lane.kick()
    await lane.used_to(1)
    equal("the status", lane.memory.read(buffers.status, 1)[0], int(BlkStatus.OK))


@SPLIT.must("indirect-write-flag", "The WRITE flag of a descriptor with a table has no meaning.", DISK, INDIRECT)
async def _(peer: Peer) -> None:
    lane = await peer.lane(INDIRECT)
    buffers = lane.buffers()
    lane.bytes.describe(0, TABLE, 48, Descriptor.INDIRECT | Descriptor.WRITE)
    lane.bytes.describe_at(TABLE, 0, buffers.header, 16, Descriptor.NEXT, 1)
    lane.bytes.describe_at(TABLE, 1, buffers.data, 512, Descriptor.NEXT | Descriptor.WRITE, 2)
    lane.bytes.describe_at(TABLE, 2, buffers.status, 1, Descriptor.WRITE)
    lane.push(0)
    lane.kick()
    await lane.used_to(1)
    equal("the status", lane.memory.read(buffers.status, 1)[0], int(BlkStatus.OK))


# ---- a disk


@BLK.must("read-back", "What was written is read.", WRITABLE)
async def _(peer: Peer) -> None:
    lane = await peer.lane()
    data = bytes(range(256)) * 8
    await lane.works(BlkRequest.write(3, data))
    (answer,) = await lane.works(BlkRequest.read(3, 4))
    check(answer.data == data, "the bytes that were written", "others")


@BLK.must("many", "Requests that are under way together do not mix their data.", WRITABLE)
async def _(peer: Peer) -> None:
    lane = await peer.lane()
    pieces = {sector: bytes([sector]) * 2048 for sector in range(0, 64, 4)}
    await lane.works(*[BlkRequest.write(sector, data) for sector, data in pieces.items()])
    answers = await lane.works(*[BlkRequest.read(sector, 4) for sector in pieces])
    wrong = [answer.request.sector for answer in answers if answer.data != pieces[answer.request.sector]]
    check(not wrong, "the bytes that were written", f"others at sectors {wrong}")


@BLK.must("flush", "A flush is done, also behind a write.", WRITABLE)
async def _(peer: Peer) -> None:
    lane = await peer.lane()
    await lane.works(BlkRequest.flush())
    await lane.works(BlkRequest.write(0, bytes(SECTOR)))
    await lane.works(BlkRequest.flush())


@BLK.must("get-id", "GET_ID is done with twenty bytes, or with fewer that end with a zero.", DISK)
async def _(peer: Peer) -> None:
    lane = await peer.lane()
    for slot in range(DEPTH):
        lane.memory.write(lane.buffers(slot=slot).data, b"\xff" * 20)
    (answer,) = await lane.works(BlkRequest.get_id())
    check(answer.length <= 21, "up to 20 bytes and the status", f"{answer.length} bytes")
    check(b"\xff" not in answer.data.split(b"\0")[0], "a zero behind the last character", answer.data.hex())


@BLK.must(
    "write-length", "What is read from the driver does not count as written: a write has its status alone.", WRITABLE
)
async def _(peer: Peer) -> None:
    lane = await peer.lane()
    (answer,) = await lane.works(BlkRequest.write(0, bytes(SECTOR)))
    equal("the used length", answer.length, 1)


async def _changing(peer: Peer, feature: int) -> Lane:
    """A lane under a feature of the device: one that changes sectors without data."""
    await peer.frontend.negotiate(PLAIN | peer.format | 1 << feature)
    await peer.share()
    lane = peer.make_lane()
    await lane.start()
    return lane


async def _between(peer: Peer, feature: int, request: BlkRequest) -> bytes:
    """What is read of sectors 8 to 15, which were written and changed; those beside them must be as they were."""
    lane = await _changing(peer, feature)
    await lane.works(BlkRequest.write(7, b"\x5a" * 10 * SECTOR))
    await lane.works(request)
    (answer,) = await lane.works(BlkRequest.read(7, 10))
    equal("the bytes beside", {*answer.data[:SECTOR], *answer.data[-SECTOR:]}, {0x5A})
    return answer.data[SECTOR:-SECTOR]


@BLK.must("write-zeroes", "Sectors of a WRITE_ZEROES read as zeros, and no others.", Need.WRITE_ZEROES)
async def _(peer: Peer) -> None:
    data = await _between(peer, WRITE_ZEROES, BlkRequest.write_zeroes((8, 8)))
    check(not any(data), "zeros", "what was written before")


@BLK.must("discard", "Sectors of a DISCARD may be anything, the others stay.", Need.DISCARD)
async def _(peer: Peer) -> None:
    await _between(peer, DISCARD, BlkRequest.discard((8, 8)))


def _refuses(name: str, rule: str, feature: int, need: Need, request: BlkRequest, status: BlkStatus) -> None:
    @BLK.must(name, rule, need)
    async def _(peer: Peer) -> None:
        lane = await _changing(peer, feature)
        lane.offer(request)
        lane.kick()
        (answer,) = await lane.answers()
        equal("the status", answer.status, int(status))


_refuses(
    "write-zeroes-beyond", "A WRITE_ZEROES beyond the end fails.",
    WRITE_ZEROES, Need.WRITE_ZEROES, BlkRequest.write_zeroes((1 << 40, 8)), BlkStatus.IOERR,
)  # fmt: skip
_refuses(
    "discard-beyond", "A DISCARD beyond the end fails.",
    DISCARD, Need.DISCARD, BlkRequest.discard((1 << 40, 8)), BlkStatus.IOERR,
)  # fmt: skip
_refuses(
    "discard-unmap", "A DISCARD with the flag of WRITE_ZEROES is not supported.",
    DISCARD, Need.DISCARD, BlkRequest(BlkType.DISCARD, data=struct.pack("<QII", 8, 8, 1)), BlkStatus.UNSUPP,
)  # fmt: skip


async def _status(peer: Peer, request: BlkRequest) -> int:
    lane = await peer.lane()
    lane.offer(request)
    lane.kick()
    (answer,) = await lane.answers()
    await lane.works()
    return answer.status


def _fails(name: str, rule: str, request: BlkRequest, *needs: Need, status: BlkStatus = BlkStatus.IOERR) -> None:
    @BLK.must(name, rule, *(needs or (DISK,)))
    async def _(peer: Peer) -> None:
        equal("the status", await _status(peer, request), int(status))


_END = 1 << 40
_fails("read-beyond", "A read beyond the end fails.", BlkRequest.read(_END, 1))
_fails("read-wraps", "A read whose end wraps fails.", BlkRequest.read((1 << 64) - 1, 4))
_fails("write-beyond", "A write beyond the end fails.", BlkRequest.write(_END, bytes(SECTOR)), WRITABLE)
_fails("unknown", "A request of an unknown type is not supported.", BlkRequest(0x1234), status=BlkStatus.UNSUPP)
_fails("part-of-sector", "A read of part of a sector fails.", BlkRequest(BlkType.IN, 0, room=100))
