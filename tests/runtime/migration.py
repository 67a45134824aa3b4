"""The destination front-end of a postcopy migration, with a fault server as QEMU's.

The fault server is a thread of this process; that works because whoever waits for a page does so in C with the GIL
released. Guest memory exists twice: the source, where the driver has prepared its ring, and the target, which has
holes.
"""

import asyncio
import contextlib
import os
import select
import threading

from vhostuser.device import Device
from vhostuser.driverqueue import DriverQueue
from vhostuser.frontend import DRIVABLE, DRIVABLE_PROTOCOL, FrontendRing, SharedMemory
from vhostuser.memory import Region
from vhostuser.protocol import (
    FrontendRequest,
    MemoryRegion,
    MemoryTable,
    PostcopyAck,
    ProtocolFeature,
    SingleRegion,
    VirtioFeature,
)
from vhostuser.testing.pair import MIB, Pair
from vhostuser.uffd import Userfaultfd
from vhostuser.virtqueue import Request

PAGE = 4096
SIZE = 4 * MIB
DATA = 2 * MIB
REQUESTS = 8
F = FrontendRequest


class PageServer:
    """QEMU's fault thread and its page stream: copies pages of the source into the target, then wakes the back-end."""

    def __init__(self, theirs: int, source: int, target: int, description: MemoryRegion) -> None:
        self.theirs = Userfaultfd(theirs)
        self.ours = Userfaultfd.open()
        self.source = source
        self.region = Region.map(target, description)
        self.ours.register(self.region.base, self.region.length)
        self.base = 0
        self.faults: list[int] = []
        self.asked = threading.Event()
        self.open = threading.Event()
        self._end = os.eventfd(0, os.EFD_CLOEXEC)
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        poll = select.poll()
        poll.register(self.theirs.fileno(), select.POLLIN)
        poll.register(self._end, select.POLLIN)
        while self._end not in dict(poll.poll()):
            for fault in self.theirs.read():
                self.faults.append((fault.address - self.base) // PAGE)
                self.asked.set()
                self.open.wait()
                if self._end >= 0:
                    self.place(self.faults[-1])

    def place(self, page: int) -> None:
        """Brings one page, for whatever reason, and wakes whoever waits for it."""
        data = os.pread(self.source, PAGE, page * PAGE)
        with contextlib.suppress(FileExistsError):
            self.ours.copy(self.region.base + page * PAGE, data)
        self.wake(page)

    def wake(self, page: int) -> None:
        """As QEMU does it; a test may put another way in its place."""
        self.theirs.wake(self.base + page * PAGE, PAGE)

    def place_all(self, *, wake: bool = True, but: int = -1) -> None:
        """The background stream: everything that is not there yet, ``but`` one page."""
        for page in range(SIZE // PAGE):
            if page == but:
                continue
            try:
                self.ours.copy(self.region.base + page * PAGE, os.pread(self.source, PAGE, page * PAGE))
            except FileExistsError:
                continue
            if wake:
                self.wake(page)

    def close(self) -> None:
        os.eventfd_write(self._end, 1)
        self.open.set()
        self._thread.join()
        os.close(self._end)
        self.ours.unregister(self.region.base, self.region.length)
        self.ours.close()
        self.theirs.close()


class Shout(Device):
    """Answers in upper case."""

    virtio_id = 63

    async def handle(self, request: Request) -> None:
        request.write(request.read().upper())


class Migration:
    """The destination side of a migration of one ring with requests on it."""

    def __init__(self, pair: Pair, *, slots: bool) -> None:
        self.pair = pair
        self.frontend = pair.frontend
        self.slots = slots
        self.source = SharedMemory((0, SIZE))
        self.target = os.memfd_create("target", os.MFD_CLOEXEC)
        os.truncate(self.target, SIZE)
        self.ring = FrontendRing(0, DriverQueue(self.source.map, 0, 64))
        user = self.source.map.regions[0].host
        self.description = MemoryRegion(0, SIZE, user, 0)
        self._server: PageServer | None = None

    @property
    def server(self) -> PageServer:
        """From ``advise`` on."""
        assert self._server is not None
        return self._server

    async def reach(self, state: str) -> None:
        """Offers the requests and brings the handshake to a state: a name of its table in lower case, or what follows.

        usable: the acknowledgement was sent. blocked: the ring has started, and its thread waits for a page.
        """
        self.offer_texts()
        if state == "idle":
            await self.frontend.negotiate()
            return
        await self.advise()
        if state == "listening":
            await self.frontend.request(F.POSTCOPY_LISTEN)
        elif state == "awaiting_ack":
            await self._share()
        elif state in ("usable", "blocked"):
            await self.listen()
        if state == "blocked":
            await self.start()
            await self.blocked()

    def offer_texts(self) -> None:
        """One request to a page and a half, so that chains miss several pages each."""
        for number in range(REQUESTS):
            at = DATA + number * 4 * PAGE
            text = b"request %d" % number
            self.source.map.write(at, text)
            self.ring.queue.offer(readable=[(at, len(text))], writable=[(at + PAGE, len(text))])
        self.ring.queue.publish()

    def texts(self) -> list[bytes]:
        """What the device has answered, read from the target's file."""
        return [os.pread(self.target, 9, DATA + number * 4 * PAGE + PAGE) for number in range(REQUESTS)]

    async def advise(self) -> None:
        wanted = DRIVABLE_PROTOCOL & ~(0 if self.slots else ProtocolFeature.CONFIGURE_MEM_SLOTS.mask)
        # The driver's ring has no event index: it wants a call for everything.
        await self.frontend.negotiate(DRIVABLE & ~VirtioFeature.RING_EVENT_IDX.mask, wanted)
        _, fds = await self.frontend.request(F.POSTCOPY_ADVISE)
        self._server = PageServer(fds.take(), self.source.fds[0], self.target, self.description)

    async def listen(self) -> None:
        """LISTEN, the table, our addresses in its answer, the acknowledgement."""
        based = await self._share()
        assert based.guest == 0
        assert based.user == self.pair.backend.connections[0].memory.regions[0].host
        self.server.base = based.user
        await self.frontend.request(F.POSTCOPY_ACK, PostcopyAck())

    async def _share(self) -> MemoryRegion:
        """LISTEN and the table; the region with the back-end's address."""
        await self.frontend.request(F.POSTCOPY_LISTEN)
        if self.slots:
            reply, _ = await self.frontend.request(F.ADD_MEM_REG, SingleRegion(self.description), (self.target,))
            assert isinstance(reply, SingleRegion)
            return reply.region
        answer, _ = await self.frontend.request(F.SET_MEM_TABLE, MemoryTable((self.description,)), (self.target,))
        assert isinstance(answer, MemoryTable)
        (based,) = answer.regions
        return based

    async def start(self) -> None:
        """Starts the ring; the kick is there already, as QEMU's is after a migration."""
        self.ring.kick()
        await self.frontend.start_ring(self.ring, self.source)

    async def blocked(self) -> None:
        """Waits until a thread of the back-end waits for a page."""
        async with asyncio.timeout(5):
            while not self.server.asked.is_set():
                await self.frontend.get(F.GET_FEATURES)

    async def again(self, pair: Pair, *others: SharedMemory, kicked: bool = True) -> FrontendRing:
        """A front-end that has lost its back-end: it tells the next, ``pair``'s, the same without a word of postcopy.

        The memory that is being migrated into comes first, then the ``others``, by slots or in one table. kicked: the
        kick has not got lost. The ring is the caller's to wait for.
        """
        await pair.frontend.negotiate(DRIVABLE & ~VirtioFeature.RING_EVENT_IDX.mask)
        regions = (self.description, *(region for other in others for region in other.table().regions))
        fds = (self.target, *(fd for other in others for fd in other.fds))
        if self.slots:
            for region, fd in zip(regions, fds, strict=True):
                await pair.frontend.request(F.ADD_MEM_REG, SingleRegion(region), (fd,))
        else:
            await pair.frontend.request(F.SET_MEM_TABLE, MemoryTable(regions), fds)
        ring = FrontendRing(0, self.ring.queue)
        pair.rings.append(ring)
        if kicked:
            ring.kick()
        await pair.frontend.start_ring(ring, self.source)
        for _ in range(5):
            await pair.frontend.get(F.GET_FEATURES)
        return ring

    def holes(self) -> int:
        """Bytes of the target that nobody has touched or brought."""
        return SIZE - os.fstat(self.target).st_blocks * 512

    def used(self) -> int:
        """The used index in the target's file; reading the file does not fill holes."""
        return int.from_bytes(os.pread(self.target, 2, self.ring.queue.used + 2), "little")

    async def completed(self, ring: FrontendRing | None = None) -> None:
        """Waits until every request was completed; ``ring`` in place of the migration's own."""
        while self.used() < REQUESTS:
            await asyncio.wait_for((ring or self.ring).called(), 10)

    def shouted(self) -> bool:
        """Whether ``Shout`` has answered every request, and rightly."""
        return self.texts() == [b"REQUEST %d" % number for number in range(REQUESTS)]

    async def end(self) -> None:
        self.server.place_all()
        await self.frontend.request(F.POSTCOPY_END)

    def close(self) -> None:
        if self._server is not None:
            self._server.close()
        self.ring.close()
        self.source.close()
        os.close(self.target)
