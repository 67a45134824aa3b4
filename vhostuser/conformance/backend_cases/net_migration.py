"""Frames while a guest migrates: what is marked in the dirty log, and pages that are missing. Section "Migration"."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from vhostuser.conformance.bench import Need
from vhostuser.conformance.frames import NetFeature, frame, same
from vhostuser.conformance.migration import PATTERN, Migration, migrate
from vhostuser.conformance.nic import AREA, EACH, USUAL, Nic, plug
from vhostuser.conformance.peer import RINGS, Peer
from vhostuser.conformance.suite import Theme, Violation, check, equal
from vhostuser.frontend import SharedLog
from vhostuser.protocol import ProtocolFeature, VirtioFeature

N, P, V = NetFeature, ProtocolFeature, VirtioFeature
CASES: Theme[Peer] = Theme("net", "Migration")
LOOP = Need.LOOP
PAGE = 4096

# ---- the dirty log

LOG = (LOOP, P.LOG_SHMFD, V.LOG_ALL)


async def _logged(peer: Peer, *features: NetFeature, used: bool = False) -> tuple[Nic, SharedLog]:
    nic = await plug(peer, *features, log_used=used)
    log = peer.make_log()
    await peer.frontend.start_log(log)
    return nic, log


def _pages(marked: Sequence[tuple[int, int]]) -> set[int]:
    return {page for guest, length in marked for page in range(guest // PAGE, (guest + length) // PAGE)}


def _buffer(nic: Nic, size: int) -> int:
    """Offers a buffer at the beginning of a page, and kicks; its page."""
    guest = nic.room(size, PAGE)
    nic.receive.offer((guest, size, True))
    nic.receive.kick()
    return guest // PAGE


@CASES.must("log.receive", "The pages of a frame that came are marked.", *LOG)
async def _(peer: Peer) -> None:
    nic, log = await _logged(peer)
    page = _buffer(nic, 4 * PAGE)
    await nic.echo(frame(9000))
    missing = {page, page + 1, page + 2} - _pages(log.take())
    check(not missing, "a mark for all three pages of the frame", f"{len(missing)} without one")


@CASES.must("log.merged", "The pages of all buffers of a frame are marked.", *LOG, N.MRG_RXBUF)
async def _(peer: Peer) -> None:
    nic, log = await _logged(peer, N.MRG_RXBUF)
    pages = {_buffer(nic, 1024) for _ in range(4)}
    await nic.echo(frame(4000))
    missing = pages - _pages(log.take())
    check(not missing, "a mark for all four buffers of the frame", f"{len(missing)} without one")


@CASES.must("log.used", "With VHOST_VRING_F_LOG the used ring of received frames is marked.", *LOG)
async def _(peer: Peer) -> None:
    nic, log = await _logged(peer, used=True)
    _buffer(nic, PAGE)
    await nic.echo(frame())
    check(nic.receive.queue.used // PAGE in _pages(log.take()), "a mark for the used ring", "none")


@CASES.should("log.transmit", "The pages of a frame that is transmitted are not marked.", *LOG)
async def _(peer: Peer) -> None:
    nic, log = await _logged(peer)
    _buffer(nic, PAGE)
    data = nic.headed(frame())
    guest = nic.room(len(data), PAGE)
    nic.room(1, PAGE)
    nic.peer.memory.write(guest, data)
    nic.send.offer((guest, len(data), False))
    nic.send.kick()
    await nic.received()
    check(guest // PAGE not in _pages(log.take()), "no mark for what was only read", "one")


@CASES.should("log.unused", "The pages of buffers that no frame has filled are not marked.", *LOG)
async def _(peer: Peer) -> None:
    nic, log = await _logged(peer)
    first, second = _buffer(nic, 2 * PAGE), _buffer(nic, PAGE)
    await nic.echo(frame())
    extra = {first + 1, second} & _pages(log.take())
    check(not extra, "no mark for what was not written", f"{len(extra)}")


@CASES.must("log.before-return", "Pages are marked before the frame is there.", *LOG)
async def _(peer: Peer) -> None:
    nic, log = await _logged(peer)
    for number in range(20):
        page = _buffer(nic, PAGE)
        nic.transmit(frame(100, number))
        await nic.received()
        check(page in _pages(log.take()), "a mark when the frame is there", "none")


# ---- postcopy

POSTCOPY = (LOOP, P.PAGEFAULT, Need.USERFAULTFD)


async def _arriving(peer: Peer, *features: NetFeature) -> tuple[Migration, Nic]:
    """A pair that runs in memory full of holes. What the suite writes itself is there: the second half of the pair's
    memory is not."""
    migration = await migrate(peer, features=features)
    migration.serve()
    await migration.client.acknowledge()
    await migration.bring(0, 2 * RINGS)
    await migration.bring(AREA, EACH // 2)
    nic = Nic(peer)
    await nic.start()
    await nic.works()
    return migration, nic


def _hole(migration: Migration) -> int:
    """A page that is missing, and will be for as long as it is held; its guest address."""
    migration.held.page = AREA + EACH // 2
    return migration.held.page


async def _faulted(migration: Migration, before: int) -> None:
    deadline = asyncio.get_running_loop().time() + migration.peer.patience
    while migration.stats().faults == before:
        if asyncio.get_running_loop().time() > deadline:
            raise Violation("a fault reported by the userfaultfd", "none, while a page that is needed is missing")
        await asyncio.sleep(0.002)


@CASES.must("postcopy.receive", "A frame for a buffer whose page is missing waits, and comes whole.", *POSTCOPY)
async def _(peer: Peer) -> None:
    migration, nic = await _arriving(peer)
    before = migration.stats().faults
    nic.receive.offer((_hole(migration), USUAL, True))
    nic.receive.kick()
    nic.transmit(frame(1000))
    await _faulted(migration, before)
    await nic.silence()
    migration.held.give()
    same((await nic.received())[0].frame, frame(1000))


@CASES.must("postcopy.transmit", "A frame whose page is missing waits, and is sent as it then is.", *POSTCOPY)
async def _(peer: Peer) -> None:
    migration, nic = await _arriving(peer)
    nic.post(count=2)
    before, hole = migration.stats().faults, _hole(migration)
    migration.held.pattern = hole
    nic.send.offer((nic.place(bytes(nic.header)), nic.header, False), (hole, 1000, False))
    nic.send.kick()
    await _faulted(migration, before)
    await nic.silence()
    migration.held.give()
    same((await nic.received())[0].frame, PATTERN[:1000])
    await nic.sent()


async def _stuck(peer: Peer) -> tuple[Migration, Nic]:
    """A frame is on its way into a buffer whose page is missing."""
    migration, nic = await _arriving(peer)
    before = migration.stats().faults
    nic.receive.offer((_hole(migration), USUAL, True))
    nic.receive.kick()
    nic.transmit(frame())
    await _faulted(migration, before)
    return migration, nic


@CASES.must("postcopy.control", "While a buffer's page is missing the front-end is answered.", *POSTCOPY)
async def _(peer: Peer) -> None:
    migration, nic = await _stuck(peer)
    await peer.answers()
    migration.held.give()
    await nic.received()


@CASES.should("postcopy.other-ring", "While a buffer's page is missing the guest can transmit.", *POSTCOPY)
async def _(peer: Peer) -> None:
    migration, nic = await _stuck(peer)
    for number in range(10):
        nic.transmit(frame(100, number))
        await nic.sent()
    migration.held.give()
    await nic.received()


@CASES.must("postcopy.merged", "A frame over buffers whose pages are missing comes whole.", *POSTCOPY, N.MRG_RXBUF)
async def _(peer: Peer) -> None:
    migration, nic = await _arriving(peer, N.MRG_RXBUF)
    hole = AREA + EACH // 2
    for number in range(4):
        nic.receive.offer((hole + 4 * PAGE * number, 300, True))
    nic.receive.kick()
    nic.transmit(frame(1000))
    same((await nic.received())[0].frame, frame(1000))
    migration.server.prefetch()
    await asyncio.to_thread(migration.server.wait, peer.patience)
    equal("pages that were there before they were placed", migration.server.stats().present, 0)
