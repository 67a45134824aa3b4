"""What is marked in the dirty log, and what is not. Section "Migration"."""

from __future__ import annotations

import asyncio
import os

from vhostuser.channel import readable
from vhostuser.conformance.bench import Need
from vhostuser.conformance.lane import Lane
from vhostuser.conformance.peer import Kind, Peer
from vhostuser.conformance.suite import Skipped, Theme, check, equal
from vhostuser.drivers.blk import SECTOR, BlkRequest
from vhostuser.frontend import SharedLog
from vhostuser.protocol import FrontendRequest, Log, ProtocolFeature, VirtioFeature

F, P, V = FrontendRequest, ProtocolFeature, VirtioFeature
CASES: Theme[Peer] = Theme("log", "Migration")
SHMFD, ALL, ACK, BLK = P.LOG_SHMFD, V.LOG_ALL, P.REPLY_ACK, Need.BLK
SET = F.SET_LOG_BASE.clause
PAGE = 4096
READ = BlkRequest.read(0, 4 * PAGE // SECTOR)
"""Four pages of data, which one lane's slots keep apart from everything else."""


async def _logged(peer: Peer, *, used: bool = False) -> tuple[Lane, SharedLog]:
    """A ring that runs and is logged, with everything unmarked."""
    lane = await peer.lane(log_used=used)
    log = peer.make_log()
    await peer.frontend.start_log(log)
    return lane, log


def _pages(marked: list[tuple[int, int]]) -> set[int]:
    return {page for guest, length in marked for page in range(guest // PAGE, (guest + length) // PAGE)}


def _data_of(lane: Lane) -> set[int]:
    """The pages of the data of the first request."""
    first = lane.buffers(slot=0).data // PAGE
    return set(range(first, first + 4))


def _shown(pages: set[int]) -> str:
    return " ".join(f"{page * PAGE:#x}" for page in sorted(pages)) or "nothing"


# ---- SET_LOG_BASE


async def _set(peer: Peer, *, flags: int = 1) -> bytes:
    await peer.negotiate()
    await peer.share()
    log = peer.make_log()
    reaction = await peer.react(F.SET_LOG_BASE, log.describe(), (log.fd,), flags=flags)
    equal("how it is taken", reaction.kind.value, Kind.DONE.value)
    return reaction.body


@CASES.must("reply", "With LOG_SHMFD SET_LOG_BASE is answered, asked for or not.", SHMFD, section="Communication")
async def _(peer: Peer) -> None:
    await _set(peer)


@CASES.must("reply-once", "SET_LOG_BASE is answered once, also if it asks.", SHMFD, ACK, section="Communication")
async def _(peer: Peer) -> None:
    await _set(peer, flags=9)
    await peer.answers()


@CASES.should("reply-bytes", "The reply to SET_LOG_BASE is empty, a u64 of 0, or what was sent.", SHMFD, section=SET)
async def _(peer: Peer) -> None:
    body = await _set(peer)
    sent = peer.make_log().describe().pack()
    check(body in (b"", bytes(8), sent), "0, 8 or 16 such bytes", f"{len(body)} bytes: {body.hex()}")


@CASES.must("replaced", "A new log takes the place of the old one, while rings run.", SHMFD, ALL, BLK, section=SET)
async def _(peer: Peer) -> None:
    lane, old = await _logged(peer)
    new = peer.make_log()
    await peer.frontend.set_log_base(new)
    old.take()
    await lane.works(READ)
    check(not old.take(), "nothing in the old log", "marks")
    check(bool(new.take()), "marks in the new log", "nothing")


@CASES.must(
    "offset", "The log begins at its offset in the file; what lies before is not written.", SHMFD, ALL, BLK, section=SET
)
async def _(peer: Peer) -> None:
    lane = await peer.lane()
    log = peer.make_log()
    os.truncate(log.fd, 2 * PAGE + log.size)
    await peer.accepts(F.SET_LOG_BASE, Log(log.size, 2 * PAGE), (log.fd,))
    await peer.frontend.set_features(peer.frontend.session.features | ALL.mask)
    await lane.works(READ)
    before, behind = os.pread(log.fd, 2 * PAGE, 0), os.pread(log.fd, log.size, 2 * PAGE)
    check(not any(before), "nothing before the offset", "marks")
    check(any(behind), "marks from the offset on", "nothing")


@CASES.should("log-fd", "SET_LOG_FD is taken, or refused with an answer.", ACK, section=F.SET_LOG_FD.clause)
async def _(peer: Peer) -> None:
    await peer.negotiate()
    reaction = await peer.react(F.SET_LOG_FD, fds=(peer.eventfd(),))
    check(reaction.kind in (Kind.DONE, Kind.REFUSED), "an answer", str(reaction))


@CASES.should(
    "log-fd-signalled", "The descriptor of SET_LOG_FD is signalled when the log has changed.", SHMFD, ALL, ACK,
    Need.RINGS, section=F.SET_LOG_FD.clause,
)  # fmt: skip
async def _(peer: Peer) -> None:
    lane = await peer.lane(log_used=True)
    event = peer.eventfd()
    reaction = await peer.react(F.SET_LOG_FD, fds=(event,))
    if reaction.kind is not Kind.DONE:
        raise Skipped("SET_LOG_FD is refused")
    await peer.frontend.start_log(peer.make_log())
    await lane.works()
    await asyncio.wait_for(readable(event), peer.patience)


# ---- what is marked


@CASES.must("data", "Every page that a request writes is marked.", SHMFD, ALL, BLK)
async def _(peer: Peer) -> None:
    lane, log = await _logged(peer)
    await lane.works(READ)
    missing = _data_of(lane) - _pages(log.take())
    check(not missing, "a mark for every page of the data", f"none for {_shown(missing)}")


@CASES.must("status", "The status that a device writes is marked like any data.", SHMFD, ALL, BLK)
async def _(peer: Peer) -> None:
    lane, log = await _logged(peer)
    await lane.works(BlkRequest.flush())
    check(lane.at // PAGE in _pages(log.take()), "a mark for the page of the status", "none")


@CASES.should("written-only", "Buffers that a device only reads are not marked.", SHMFD, ALL, BLK, Need.WRITABLE)
async def _(peer: Peer) -> None:
    lane, log = await _logged(peer)
    await lane.works(BlkRequest.write(0, bytes(4 * PAGE)))
    marked = _data_of(lane) & _pages(log.take())
    check(not marked, "no mark for data that was read", _shown(marked))


@CASES.should("nothing-else", "Pages that nobody wrote are not marked.", SHMFD, ALL, BLK)
async def _(peer: Peer) -> None:
    lane, log = await _logged(peer)
    await lane.works(READ)
    written = _data_of(lane) | {lane.at // PAGE} | {lane.bytes.written_at // PAGE}
    extra = _pages(log.take()) - written
    check(not extra, "marks for what was written alone", _shown(extra))


@CASES.must("used", "With VHOST_VRING_F_LOG writes to the used ring are marked.", SHMFD, ALL, BLK)
async def _(peer: Peer) -> None:
    lane, log = await _logged(peer, used=True)
    await lane.works()
    check(lane.bytes.written_at // PAGE in _pages(log.take()), "a mark for the used ring", "none")


@CASES.must("used-elsewhere", "The used ring is marked at its log address, wherever that is.", SHMFD, ALL, BLK)
async def _(peer: Peer) -> None:
    await peer.negotiate()
    memory = await peer.share()
    lane, log = peer.make_lane(), peer.make_log()
    await lane.start(enable=False)
    user, queue, elsewhere = memory.map.guest_to_host, lane.queue, 6 << 20
    await peer.frontend.set_vring_addr(
        lane.index, desc=user(queue.desc), avail=user(queue.avail), used=user(queue.used), log=elsewhere
    )
    await lane.enable()
    await peer.frontend.start_log(log)
    await lane.works()
    check(elsewhere // PAGE in _pages(log.take()), f"a mark at {elsewhere:#x}", "none")


@CASES.should("used-unasked", "Without VHOST_VRING_F_LOG the used ring is not marked.", SHMFD, ALL, BLK)
async def _(peer: Peer) -> None:
    lane, log = await _logged(peer)
    await lane.works()
    check(lane.bytes.written_at // PAGE not in _pages(log.take()), "no mark for the used ring", "one")


# ---- from when until when


@CASES.must("before", "Nothing is marked before LOG_ALL is set.", SHMFD, ALL, BLK)
async def _(peer: Peer) -> None:
    lane = await peer.lane()
    log = peer.make_log()
    await peer.frontend.set_log_base(log)
    await lane.works(READ)
    check(not log.take(), "an empty log", "marks")


@CASES.must("stops", "Nothing is marked any more when LOG_ALL was taken back.", SHMFD, ALL, BLK)
async def _(peer: Peer) -> None:
    lane, log = await _logged(peer)
    await lane.works(READ)
    await peer.frontend.stop_log()
    log.take()
    await lane.works(READ)
    check(not log.take(), "an empty log", "marks")


@CASES.must("again", "Marking begins again when LOG_ALL is set again, as in a second migration.", SHMFD, ALL, BLK)
async def _(peer: Peer) -> None:
    lane, log = await _logged(peer)
    await lane.works(READ)
    await peer.frontend.stop_log()
    await lane.works(READ)
    log.take()
    await peer.frontend.start_log(log)
    await lane.works(READ)
    missing = _data_of(lane) - _pages(log.take())
    check(not missing, "a mark for every page of the data", f"none for {_shown(missing)}")


@CASES.must("before-return", "A page is marked before its request is returned.", SHMFD, ALL, BLK)
async def _(peer: Peer) -> None:
    lane, log = await _logged(peer)
    for _ in range(50):
        await lane.works(READ)
        missing = _data_of(lane) - _pages(log.take())
        check(not missing, "marks when the request comes back", f"none for {_shown(missing)}")


@CASES.must("after-stop", "After GET_VRING_BASE nothing is marked any more.", SHMFD, ALL, BLK)
async def _(peer: Peer) -> None:
    lane, log = await _logged(peer, used=True)
    await lane.works(READ)
    lane.offer(READ)
    lane.kick()
    await lane.stop()
    lane.returned()  # it may have been before the stop
    log.take()
    await lane.idle()
    check(not log.take(), "no mark after the stop", "some")


# ---- logs that do not fit


@CASES.must("too-small", "A log that does not reach to the end of memory does not end the process.", SHMFD, ALL, BLK)
async def _(peer: Peer) -> None:
    lane = await peer.lane()
    log = SharedLog(64 * PAGE)
    try:
        await peer.react(F.SET_LOG_BASE, log.describe(), (log.fd,))
        await peer.react(F.SET_FEATURES, (peer.frontend.session.features | ALL.mask).to_bytes(8, "little"))
        lane.offer(READ)
        lane.kick()
        await asyncio.sleep(peer.quiet)
        await peer.serves_another()
    finally:
        log.close()


@CASES.must("shrinks", "A log that is cut off under a back-end does not end the process (SIGBUS).", SHMFD, ALL, BLK)
async def _(peer: Peer) -> None:
    lane, log = await _logged(peer)
    os.truncate(log.fd, 0)
    lane.offer(READ)
    lane.kick()
    await asyncio.sleep(peer.quiet)
    await peer.serves_another()


@CASES.should("beyond-file", "A log that goes on behind its file is refused.", SHMFD, section=SET)
async def _(peer: Peer) -> None:
    await peer.negotiate()
    log = SharedLog(PAGE)
    try:
        await peer.refuses(F.SET_LOG_BASE, Log(1 << 30, 0), (log.fd,))
    finally:
        log.close()


@CASES.should("unmappable", "A log that cannot be mapped is refused.", SHMFD, section=SET)
async def _(peer: Peer) -> None:
    await peer.negotiate()
    await peer.refuses(F.SET_LOG_BASE, Log(PAGE, 0), (peer.eventfd(),))
