"""What outlives a back-end: the buffer of requests in flight. Section "Inflight I/O tracking".

A crash is not waited for but described: the buffer is written as a back-end leaves it that was killed at that point.
"""

from __future__ import annotations

import asyncio
import os
import struct
from contextlib import suppress
from typing import NamedTuple

from vhostuser.conformance.bench import Need
from vhostuser.conformance.lane import Lane
from vhostuser.conformance.peer import Peer
from vhostuser.conformance.suite import Theme, check, equal
from vhostuser.drivers.blk import BlkRequest
from vhostuser.frontend import InflightBuffer
from vhostuser.protocol import (
    FrontendRequest,
    Inflight,
    ProtocolFeature,
    RequestRefused,
)

F, P = FrontendRequest, ProtocolFeature
CASES: Theme[Peer] = Theme("inflight", "Inflight I/O tracking")
SHMFD, ACK, DISK = P.INFLIGHT_SHMFD, P.REPLY_ACK, Need.BLK
SIZE = 64
GET, SET = F.GET_INFLIGHT_FD.clause, F.SET_INFLIGHT_FD.clause


async def _buffer(peer: Peer, queues: int = 1, size: int = SIZE) -> InflightBuffer:
    buffer = await peer.frontend.get_inflight_fd(queues, size)
    peer.own(buffer.close)
    return buffer


class Entry(NamedTuple):
    """A request in the buffer. after: the head of the batch before it."""

    head: int
    counter: int
    inflight: bool = True
    after: int = 0


def _crashed(buffer: InflightBuffer, *entries: Entry, used: int = 0, last_batch_head: int = 0) -> None:
    """Writes the first ring's part as a back-end leaves it."""
    at = buffer.description.mmap_offset
    os.pwrite(buffer.fd, struct.pack("=QHHHH", 0, 1, SIZE, last_batch_head, used), at)
    for entry in entries:
        os.pwrite(
            buffer.fd, struct.pack("=B5xHQ", entry.inflight, entry.after, entry.counter), at + 16 + 16 * entry.head
        )


async def _set_up(peer: Peer) -> tuple[Lane, InflightBuffer]:
    """A ring that the back-end does not know yet, and a buffer."""
    await peer.negotiate()
    await peer.share()
    return peer.make_lane(size=SIZE), await _buffer(peer)


# ---- the buffer


@CASES.must("get", "GET_INFLIGHT_FD is answered with a descriptor and where in it the buffer lies.", SHMFD, section=GET)
async def _(peer: Peer) -> None:
    await peer.negotiate()
    reaction = await peer.accepts(F.GET_INFLIGHT_FD, Inflight(0, 0, 1, SIZE))
    equal("bytes and descriptors of the reply", (len(reaction.body), reaction.fds), (24, 1))


@CASES.must("numbers", "The reply says the number and the size of the queues that were asked for.", SHMFD, section=GET)
async def _(peer: Peer) -> None:
    await peer.negotiate()
    buffer = await _buffer(peer)
    equal("queues and size", (buffer.description.num_queues, buffer.description.queue_size), (1, SIZE))


@CASES.must("size", "The buffer has 16 bytes for a queue and 16 for each of its entries, at least.", SHMFD, section=GET)
async def _(peer: Peer) -> None:
    await peer.negotiate()
    described = (await _buffer(peer)).description
    check(described.mmap_size >= 16 + 16 * SIZE, f"{16 + 16 * SIZE} bytes or more", str(described.mmap_size))


@CASES.must("in-file", "The buffer lies within its file.", SHMFD, section=GET)
async def _(peer: Peer) -> None:
    await peer.negotiate()
    buffer = await _buffer(peer)
    end, size = buffer.description.mmap_offset + buffer.description.mmap_size, os.fstat(buffer.fd).st_size
    check(end <= size, f"a file of {end} bytes or more", str(size))


@CASES.must("fresh", "A fresh buffer is all zeros.", SHMFD, section=GET)
async def _(peer: Peer) -> None:
    await peer.negotiate()
    buffer = await _buffer(peer)
    content = os.pread(buffer.fd, buffer.description.mmap_size, buffer.description.mmap_offset)
    check(not any(content), "zeros", f"{sum(map(bool, content))} other bytes")


@CASES.must("again", "Each GET_INFLIGHT_FD gives a buffer of its own.", SHMFD, section=GET)
async def _(peer: Peer) -> None:
    await peer.negotiate()
    first, second = await _buffer(peer), await _buffer(peer)
    check(os.fstat(first.fd).st_ino != os.fstat(second.fd).st_ino, "two files", "the same file twice")


@CASES.must("two-queues", "A buffer for two queues has room for both.", SHMFD, Need.TWO_RINGS, section=GET)
async def _(peer: Peer) -> None:
    await peer.negotiate()
    described = (await _buffer(peer, queues=2)).description
    check(described.mmap_size >= 2 * (16 + 16 * SIZE), "room for two", f"{described.mmap_size} bytes")


@CASES.must("set", "A buffer that was given is taken back.", SHMFD, ACK, section=SET)
async def _(peer: Peer) -> None:
    await peer.negotiate()
    await peer.frontend.set_inflight_fd(await _buffer(peer))


def _refused(name: str, rule: str, described: Inflight) -> None:
    @CASES.should(name, rule, SHMFD, ACK, section=SET)
    async def _(peer: Peer) -> None:
        await peer.negotiate()
        await peer.share()
        await peer.refuses(F.SET_INFLIGHT_FD, described, ((await _buffer(peer)).fd,))


_refused("set-too-small", "A buffer too small for its queues is refused.", Inflight(64, 0, 1, SIZE))
_refused("set-beyond-file", "A buffer that goes on behind its file is refused.", Inflight(1 << 30, 0, 1, SIZE))
_refused("set-wraps", "A buffer whose offset and size wrap is refused.", Inflight(4096, (1 << 64) - 4096, 1, SIZE))
_refused("set-many-queues", "A buffer for more queues than it has room for is refused.", Inflight(4096, 0, 65535, 1024))


@CASES.must("get-many-queues", "A buffer for 65535 queues of 65535 entries is no reason to die.", SHMFD, section=GET)
async def _(peer: Peer) -> None:
    await peer.negotiate()
    await peer.react(F.GET_INFLIGHT_FD, Inflight(0, 0, 65535, 65535))
    await peer.serves_another()


# ---- keeping it


@CASES.must("kept", "While a ring runs the buffer says its size, its version and what was returned.", SHMFD, DISK)
async def _(peer: Peer) -> None:
    lane, buffer = await _set_up(peer)
    await peer.frontend.set_inflight_fd(buffer)
    await lane.start()
    for _ in range(3):
        await lane.works()
    kept = buffer.queue(0)
    equal(
        "version, size, used index and heads",
        (kept.version, kept.desc_num, kept.used_idx, kept.heads),
        (1, SIZE, 3, ()),
    )


@CASES.must("kept-under-load", "When everything was returned nothing is in flight.", SHMFD, DISK)
async def _(peer: Peer) -> None:
    lane, buffer = await _set_up(peer)
    await peer.frontend.set_inflight_fd(buffer)
    await lane.start()
    for _ in range(20):
        lane.offer(count=12)
        lane.kick()
        await lane.served()
    await lane.stop()
    kept = buffer.queue(0)
    equal("used index and heads in flight", (kept.used_idx, kept.heads), (240, ()))


@CASES.must("fresh-buffer-old-ring", "A fresh buffer goes with a ring whose used index is not 0.", SHMFD, DISK)
async def _(peer: Peer) -> None:
    lane, _ = await _set_up(peer)
    await lane.start()
    await lane.works()
    await lane.works()
    await lane.stop()
    await peer.frontend.set_inflight_fd(await _buffer(peer))
    await lane.start()
    for _ in range(3):
        await lane.works()
    equal("the used index", lane.raw.used_index, 5)


# ---- after a crash


async def _recovers(peer: Peer, lane: Lane, buffer: InflightBuffer) -> None:
    await peer.frontend.set_inflight_fd(buffer)
    await lane.start()
    lane.kick()


@CASES.must("resubmitted", "A request in flight is done again, once.", SHMFD, DISK)
async def _(peer: Peer) -> None:
    lane, buffer = await _set_up(peer)
    lane.plain_chain()
    lane.push(0)
    _crashed(buffer, Entry(0, 1))
    await _recovers(peer, lane, buffer)
    await lane.used_to(1)
    await lane.stays_at(1)
    equal("the head returned", lane.raw.used_entry(0)[0], 0)


@CASES.must("resubmitted-and-on", "After those in flight the ring goes on with what was not taken.", SHMFD, DISK)
async def _(peer: Peer) -> None:
    lane, buffer = await _set_up(peer)
    lane.plain_chain(first=0)
    lane.plain_chain(first=8)
    lane.push(0, 8)
    _crashed(buffer, Entry(0, 1))
    await _recovers(peer, lane, buffer)
    await lane.used_to(2)
    equal("the heads returned", {lane.raw.used_entry(n)[0] for n in range(2)}, {0, 8})


@CASES.must(
    "out-of-order", "What was in flight behind one that was returned is done again, and that one is not.", SHMFD, DISK
)
async def _(peer: Peer) -> None:
    lane, buffer = await _set_up(peer)
    lane.plain_chain(first=0)
    lane.plain_chain(first=8)
    lane.push(0, 8)
    lane.raw.use(0, 8, 513)
    lane.raw.used_index = 1
    _crashed(buffer, Entry(0, 1), used=1)
    lane.base = 1  # what a front-end says that knows nothing but the used index
    await _recovers(peer, lane, buffer)
    await lane.used_to(2)
    await lane.stays_at(2)
    equal("the head returned", lane.raw.used_entry(1)[0], 0)


@CASES.should("order", "What was in flight is done again in the order in which it was taken.", SHMFD, DISK)
async def _(peer: Peer) -> None:
    lane, buffer = await _set_up(peer)
    for slot, first in enumerate((0, 8)):
        at = lane.buffers(BlkRequest.get_id(), slot)
        lane.describe((at.header, 16, False), (at.data, 20, True), (at.status, 1, True), first=first)
    lane.push(8, 0)
    _crashed(buffer, Entry(0, 2), Entry(8, 1))
    await _recovers(peer, lane, buffer)
    await lane.used_to(2)
    equal("the heads returned", [lane.raw.used_entry(n)[0] for n in range(2)], [8, 0])


@CASES.must(
    "returned", "A request that was returned before the crash came to the buffer is not done again.", SHMFD, DISK
)
async def _(peer: Peer) -> None:
    lane, buffer = await _set_up(peer)
    lane.plain_chain()
    lane.push(0)
    lane.raw.use(0, 0, 513)
    lane.raw.used_index = 1
    _crashed(buffer, Entry(0, 1), used=0, last_batch_head=0)
    lane.base = 1
    await _recovers(peer, lane, buffer)
    await lane.stays_at(1)


@CASES.must("killed", "A back-end that was killed goes on, with its buffer, where it was.", SHMFD, DISK, Need.PROCESS)
async def _(peer: Peer) -> None:
    lane, buffer = await _set_up(peer)
    await peer.frontend.set_inflight_fd(buffer)
    await lane.start()
    for _ in range(3):
        await lane.works()
    lane.offer(count=8)
    lane.kick()
    await peer.subject.kill()
    await peer.again()
    await peer.negotiate()
    await peer.share(peer.memory)
    lane.frontend, lane.base = peer.frontend, lane.raw.used_index
    await _recovers(peer, lane, buffer)
    await lane.served()
    equal("the used index", lane.raw.used_index, 11)


@CASES.must("wrap", "Indexes in the buffer go on from 65535 to 0.", SHMFD, DISK)
async def _(peer: Peer) -> None:
    lane, buffer = await _set_up(peer)
    lane.plain_chain()
    lane.base = lane.raw.used_index = lane.raw.available_index = 65535
    lane.push(0)
    lane.raw.use(65535, 0, 513)
    lane.raw.used_index = 0
    _crashed(buffer, Entry(0, 1), used=65535, last_batch_head=0)
    lane.base = 0
    await _recovers(peer, lane, buffer)
    await lane.stays_at(0)
    lane.push(0)
    lane.kick()
    await lane.used_to(1)
    equal("the used index in the buffer", buffer.queue(0).used_idx, 1)


@CASES.must("reboot", "A guest that boots again with the buffer of before goes on.", SHMFD, DISK)
async def _(peer: Peer) -> None:
    lane, buffer = await _set_up(peer)
    await peer.frontend.set_inflight_fd(buffer)
    await lane.start()
    for _ in range(3):
        await lane.works()
    await lane.stop()
    fresh = peer.make_lane(size=SIZE)  # which clears the ring
    await _recovers(peer, fresh, buffer)
    for _ in range(3):
        await fresh.works()


@CASES.must("nonsense", "A buffer that says what cannot be does no harm.", SHMFD, DISK)
async def _(peer: Peer) -> None:
    lane, buffer = await _set_up(peer)
    lane.plain_chain()
    lane.push(0)
    _crashed(buffer, Entry(0, 1 << 63, after=0xFFFF), Entry(63, 0, after=63), used=0x8000, last_batch_head=0xFFFF)
    with suppress(RequestRefused, ConnectionError):
        await _recovers(peer, lane, buffer)
        await asyncio.sleep(peer.quiet)
    await peer.serves_another()


@CASES.must("other-size", "A buffer made for another size of ring does no harm.", SHMFD, DISK)
async def _(peer: Peer) -> None:
    await peer.negotiate()
    await peer.share()
    lane, buffer = peer.make_lane(size=256), await _buffer(peer, size=16)
    with suppress(RequestRefused, ConnectionError):
        await _recovers(peer, lane, buffer)
        lane.offer(count=8)
        lane.kick()
        await asyncio.sleep(peer.quiet)
    await peer.serves_another()
