"""A migration with postcopy, as its destination: memory with pages that are missing, and who brings them.

What belongs here: what cases about postcopy have at hand. What does not: rules (``backend_cases.postcopy``).
"""

from __future__ import annotations

import asyncio
import errno
import mmap
import os
import threading
from collections.abc import Sequence

from vhostuser.conformance.frames import NetFeature
from vhostuser.conformance.lane import Lane
from vhostuser.conformance.peer import MIB, RINGS, Peer
from vhostuser.conformance.suite import Unreachable, Violation
from vhostuser.drivers.blk import BlkRequest
from vhostuser.faultserver import CallableSource, Client, ClientStats, FaultServer
from vhostuser.frontend import PostcopyClient, SharedMemory
from vhostuser.protocol import (
    FrontendRequest,
    PostcopyAck,
)

PAGE = mmap.PAGESIZE
PATTERN = bytes(range(1, 129)) * (PAGE // 128)


class Held:
    """Pages of zeros, of which one can be held back from whoever waits for it, and one have something in it."""

    def __init__(self) -> None:
        self.page = -1
        self.pattern = -1
        self._given = threading.Event()
        self.source = CallableSource(self._fetch, threads=4)

    def _fetch(self, guest: int, length: int) -> bytes:
        if guest <= self.page < guest + length:
            self._given.wait()
        before = self.pattern - guest
        return bytes(before) + PATTERN + bytes(length - before - PAGE) if 0 <= before < length else bytes(length)

    def give(self) -> None:
        """Holds nothing back any more."""
        self._given.set()


class Migration:
    """A destination: memory full of holes, its fault server, and the back-end's part in it."""

    def __init__(self, peer: Peer, client: PostcopyClient, memory: SharedMemory) -> None:
        self.peer = peer
        self.client = client
        self.memory = memory
        self.held = Held()
        self.server = FaultServer(memory, self.held.source)
        self._served: Client | None = None
        peer.own(self.server.close)
        peer.own(self.held.give)

    def serve(self) -> None:
        """From here on the back-end's faults are served."""
        self._served = self.server.add_client("the back-end", self.client.uffd, self.client.regions)

    def stats(self) -> ClientStats:
        """Of the back-end's faults."""
        assert self._served is not None
        return self._served.stats()

    async def lane(
        self, requests: int | None = None, *, acknowledge: tuple[FrontendRequest, PostcopyAck] | None = None
    ) -> Lane:
        """A ring that runs in this memory; the front-end knows the bases.

        requests: their guest address. acknowledge: how it says so, where that is tried.
        """
        self.serve()
        if acknowledge is None:
            await self.client.acknowledge()
        else:
            await self.peer.send(*acknowledge)
        # What we write ourselves comes first: a fault of ours would hold the whole suite up.
        await self.bring(0, RINGS)
        await self.bring(MIB if requests is None else requests, PAGE)
        lane = self.peer.make_lane(requests=requests)
        await lane.start()
        await lane.works(BlkRequest.flush())
        return lane

    async def bring(self, guest: int, length: int) -> None:
        """Has these pages placed, whole ones of the region."""
        size = self.memory.regions[0].region.page_size
        first = guest - guest % size
        pages = range(first, max(guest + length, first + size), size)
        self.server.place(first, len(pages) * size)
        deadline = asyncio.get_running_loop().time() + self.peer.patience
        while not all(map(self.present, pages)):
            if asyncio.get_running_loop().time() > deadline:
                raise Unreachable("the fault server brings no pages")
            await asyncio.sleep(0.002)

    async def blocked(self, lane: Lane) -> int:
        """Has the back-end wait for the page of a request's data; its guest address."""
        self.held.page = lane.buffers(slot=0).data
        before = self.stats().faults
        lane.offer(BlkRequest.read(0, 8))
        lane.kick()
        deadline = asyncio.get_running_loop().time() + self.peer.patience
        while self.stats().faults == before:
            if asyncio.get_running_loop().time() > deadline:
                raise Violation("a fault reported by the userfaultfd", "none, while a page that is needed is missing")
            await asyncio.sleep(0.002)
        return self.held.page

    def present(self, guest: int) -> bool:
        """Is this page of the memory's files there? Asking touches nothing."""
        for shared in self.memory.regions:
            offset = guest - shared.region.guest
            if 0 <= offset < shared.region.size:
                return _has_data(shared.fd, offset + shared.region.offset)
        raise LookupError(f"guest address {guest:#x}")


def _has_data(fd: int, offset: int) -> bool:
    try:
        return os.lseek(fd, offset, os.SEEK_DATA) == offset
    except OSError as error:
        if error.errno == errno.ENXIO:
            return False
        raise


async def advised(peer: Peer, *features: NetFeature) -> PostcopyClient:
    """Negotiates, and says that postcopy will come."""
    await peer.negotiate(*features)
    return await advise(peer)


async def advise(peer: Peer) -> PostcopyClient:
    """POSTCOPY_ADVISE; the userfaultfd that comes is closed with the case."""
    client = await PostcopyClient.advise(peer.frontend)
    peer.own(client.close)
    return client


async def migrate(
    peer: Peer,
    *regions: tuple[int, int],
    by_slots: bool | None = None,
    memory: SharedMemory | None = None,
    features: Sequence[NetFeature] = (),
) -> Migration:
    """Up to the bases, which the front-end has not acknowledged; by default of one region of 8 MiB."""
    client = await advised(peer, *features)
    await client.listen()
    memory = memory or peer.make_memory(*regions)
    peer.adopt(memory)
    migration = Migration(peer, client, memory)
    await client.share(memory, by_slots=by_slots)
    return migration
