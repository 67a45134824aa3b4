"""Postcopy over the socket: the test is the destination front-end, with a fault server as QEMU's.

The fault server is a thread of this process; that works because whoever waits for a page does so in C with the GIL
released. Guest memory exists twice: the source, where the driver has prepared its ring, and the target, which has
holes.
"""

import asyncio
import contextlib
import os
import select
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest

from tests.conftest import MIB, Pair
from vhostuser.device import Device
from vhostuser.devices.blk import Blk, BlkSettings
from vhostuser.devices.image import Image
from vhostuser.frontend import FrontendRing, SharedMemory
from vhostuser.memory import Region
from vhostuser.protocol import (
    FrontendRequest,
    MemoryRegion,
    MemoryTable,
    Postcopy,
    PostcopyAck,
    ProtocolFeature,
    RequestRefused,
    SingleRegion,
    VirtioFeature,
    VringState,
)
from vhostuser.uffd import NotPermitted, Userfaultfd
from vhostuser.virtqueue import DriverQueue, Request

pytestmark = [pytest.mark.postcopy, pytest.mark.usefixtures("no_leaks")]

PAGE = 4096
SIZE = 4 * MIB
DATA = 2 * MIB
REQUESTS = 8
F = FrontendRequest


@pytest.fixture(autouse=True, scope="module")
def permitted() -> None:
    try:
        Userfaultfd.probe()
    except NotPermitted as error:
        pytest.skip(str(error))


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
        self.theirs.wake(self.base + page * PAGE, PAGE)

    def place_all(self) -> None:
        """The background stream: everything that is not there yet."""
        for page in range(SIZE // PAGE):
            try:
                self.ours.copy(self.region.base + page * PAGE, os.pread(self.source, PAGE, page * PAGE))
            except FileExistsError:
                continue
            self.theirs.wake(self.base + page * PAGE, PAGE)

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
        self.server: PageServer | None = None

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
        wanted = ~0 if self.slots else ~ProtocolFeature.CONFIGURE_MEM_SLOTS.mask
        # The driver's ring has no event index: it wants a call for everything.
        await self.frontend.negotiate(~VirtioFeature.RING_EVENT_IDX.mask, wanted)
        _, fds = await self.frontend.request(F.POSTCOPY_ADVISE)
        self.server = PageServer(fds.take(), self.source.fds[0], self.target, self.description)

    async def listen(self) -> None:
        """LISTEN, the table, our addresses in its answer, the acknowledgement."""
        assert self.server is not None
        await self.frontend.request(F.POSTCOPY_LISTEN)
        if self.slots:
            reply, _ = await self.frontend.request(F.ADD_MEM_REG, SingleRegion(self.description), (self.target,))
            assert isinstance(reply, SingleRegion)
            based = reply.region
        else:
            answer, _ = await self.frontend.request(F.SET_MEM_TABLE, MemoryTable((self.description,)), (self.target,))
            assert isinstance(answer, MemoryTable)
            (based,) = answer.regions
        assert based.guest == 0
        assert based.user == self.pair.backend.connections[0].memory.regions[0].host
        self.server.base = based.user
        await self.frontend.request(F.POSTCOPY_ACK, PostcopyAck())

    async def start(self) -> None:
        """Starts the ring; the kick is there already, as QEMU's is after a migration."""
        self.ring.kick()
        await self.frontend.start_ring(self.ring, self.source)

    def used(self) -> int:
        """The used index in the target's file; reading the file does not fill holes."""
        return int.from_bytes(os.pread(self.target, 2, self.ring.queue.used + 2), "little")

    async def completed(self) -> None:
        while self.used() < REQUESTS:
            await asyncio.wait_for(self.ring.called(), 10)

    async def end(self) -> None:
        assert self.server is not None
        self.server.place_all()
        await self.frontend.request(F.POSTCOPY_END)

    def close(self) -> None:
        if self.server is not None:
            self.server.close()
        self.ring.close()
        self.source.close()
        os.close(self.target)


@pytest.fixture(params=["table", "slots"])
async def migrations(
    request: pytest.FixtureRequest, pairs: Callable[..., Pair]
) -> AsyncIterator[Callable[..., Migration]]:
    made: list[Migration] = []

    def make(device: Device, **options: object) -> Migration:
        made.append(Migration(pairs(device, **options), slots=request.param == "slots"))
        return made[-1]

    yield make
    for migration in made:
        await migration.pair.close()
        migration.close()


@pytest.fixture
def image(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "disk"
    path.write_bytes(b"".join(bytes([page + 1]) * PAGE for page in range(64)))
    yield path


async def test_requests_complete_while_memory_arrives(migrations: Callable[..., Migration]) -> None:
    migration = migrations(Shout())
    migration.offer_texts()
    await migration.advise()
    await migration.listen()
    assert migration.server is not None
    migration.server.open.set()
    await migration.start()
    await migration.completed()
    assert migration.texts() == [b"REQUEST %d" % number for number in range(REQUESTS)]
    assert len(migration.server.faults) >= 2 * REQUESTS
    assert len(set(migration.server.faults)) == len(migration.server.faults), "no page is asked for twice"
    await migration.end()
    payload, _ = await migration.frontend.request(F.GET_VRING_BASE, VringState(0))
    assert payload == VringState(0, REQUESTS)


async def test_the_engine_serves_a_disk_while_memory_arrives(migrations: Callable[..., Migration], image: Path) -> None:
    migration = migrations(Blk(Image(image), BlkSettings()))
    for number in range(REQUESTS):
        at = DATA + number * 4 * PAGE
        header = (0).to_bytes(8, "little") + (number * 8).to_bytes(8, "little")
        migration.source.map.write(at, header)
        migration.ring.queue.offer(readable=[(at, 16)], writable=[(at + PAGE, PAGE), (at + 32, 1)])
    migration.ring.queue.publish()
    await migration.advise()
    await migration.listen()
    assert migration.server is not None
    migration.server.open.set()
    await migration.start()
    await migration.completed()
    for number in range(REQUESTS):
        at = DATA + number * 4 * PAGE
        assert os.pread(migration.target, PAGE, at + PAGE) == bytes([number + 1]) * PAGE
        assert os.pread(migration.target, 1, at + 32) == b"\0"
    await migration.end()


async def test_the_control_socket_answers_while_pages_are_missing(migrations: Callable[..., Migration]) -> None:
    """The fault rule: nothing that may wait for guest memory runs on the control thread."""
    migration = migrations(Shout())
    migration.offer_texts()
    await migration.advise()
    await migration.listen()
    await migration.start()
    assert migration.server is not None
    while not migration.server.asked.is_set():
        await migration.frontend.get(F.GET_FEATURES)
    for _ in range(10):
        await asyncio.wait_for(migration.frontend.get(F.GET_QUEUE_NUM), 1)
    stopping = asyncio.ensure_future(migration.frontend.request(F.GET_VRING_BASE, VringState(0)))
    await asyncio.sleep(0)
    migration.server.open.set()
    await asyncio.wait_for(stopping, 10)
    await migration.end()


async def test_nothing_is_touched_before_the_acknowledgement(migrations: Callable[..., Migration]) -> None:
    migration = migrations(Shout())
    migration.offer_texts()
    await migration.advise()
    frontend, slots = migration.frontend, migration.slots
    await frontend.request(F.POSTCOPY_LISTEN)
    message = SingleRegion(migration.description) if slots else MemoryTable((migration.description,))
    await frontend.request(F.ADD_MEM_REG if slots else F.SET_MEM_TABLE, message, (migration.target,))
    await migration.start()
    for _ in range(5):
        await frontend.get(F.GET_FEATURES)
    assert not migration.pair.backend.connections[0].rings[0].running
    assert os.fstat(migration.target).st_blocks == 0


async def test_losing_the_front_end_neither_hangs_nor_fills_holes(
    migrations: Callable[..., Migration], pairs: Callable[..., Pair], image: Path
) -> None:
    """Closing the userfaultfd with pages missing would give zeros to the whole guest. Fail closed instead."""
    for device in (Shout(), Blk(Image(image), BlkSettings())):
        migration = migrations(device)
        migration.offer_texts()
        await migration.advise()
        await migration.listen()
        await migration.start()
        assert migration.server is not None
        while not migration.server.asked.is_set():
            await migration.frontend.get(F.GET_FEATURES)
        before = os.fstat(migration.target).st_blocks
        await migration.pair.close()
        assert os.fstat(migration.target).st_blocks == before
        again = pairs(device)
        await again.frontend.negotiate()
        assert await again.frontend.get(F.GET_QUEUE_NUM) == 1


async def test_losing_the_front_end_while_it_waits_for_the_ring_to_stop(migrations: Callable[..., Migration]) -> None:
    migration = migrations(Shout())
    migration.offer_texts()
    await migration.advise()
    await migration.listen()
    await migration.start()
    assert migration.server is not None
    while not migration.server.asked.is_set():
        await migration.frontend.get(F.GET_FEATURES)
    stopping = asyncio.ensure_future(migration.frontend.request(F.GET_VRING_BASE, VringState(0)))
    await asyncio.sleep(0)
    stopping.cancel()
    await migration.pair.close()


async def test_a_migration_that_ends_in_precopy(migrations: Callable[..., Migration]) -> None:
    """After ADVISE neither LISTEN nor END comes, and the table is an ordinary one."""
    migration = migrations(Shout())
    migration.offer_texts()
    await migration.advise()
    await migration.frontend.set_memory(migration.source)
    await migration.start()
    queue = migration.ring.queue
    for _ in range(REQUESTS):
        while queue.take() is None:
            await asyncio.wait_for(migration.ring.called(), 10)


async def test_every_message_may_come_once_per_queue_pair(migrations: Callable[..., Migration]) -> None:
    migration = migrations(Shout())
    migration.offer_texts()
    await migration.advise()
    _, fds = await migration.frontend.request(F.POSTCOPY_ADVISE)
    assert len(fds) == 1
    fds.close()
    await migration.frontend.request(F.POSTCOPY_LISTEN)
    await migration.listen()
    await migration.frontend.request(F.POSTCOPY_ACK, PostcopyAck())
    assert migration.server is not None
    migration.server.open.set()
    await migration.start()
    await migration.completed()
    await migration.end()
    await migration.frontend.request(F.POSTCOPY_END)


@pytest.mark.parametrize("code", [0, 5, 37, 38])
@pytest.mark.parametrize("size", [0, 8])
async def test_every_form_of_the_acknowledgement(migrations: Callable[..., Migration], code: int, size: int) -> None:
    """QEMU sends a u64 of 0 under the id of its last memory message, or under 0 when a guest reboots."""
    migration = migrations(Shout())
    await migration.advise()
    await migration.listen()
    header = b"".join(number.to_bytes(4, "little") for number in (code, 1, size))
    await migration.frontend.send_raw(header + bytes(size))
    await migration.frontend.get(F.GET_FEATURES)
    assert migration.pair.backend.connections[0].postcopy is Postcopy.LISTENING


async def test_listen_after_the_memory_table_is_refused(migrations: Callable[..., Migration]) -> None:
    migration = migrations(Shout())
    await migration.advise()
    await migration.frontend.set_memory(migration.source)
    with pytest.raises(RequestRefused):
        await migration.frontend.request(F.POSTCOPY_LISTEN)


async def test_memory_left_with_holes_is_not_touched_until_it_is_whole(
    migrations: Callable[..., Migration], pairs: Callable[..., Pair], tmp_path: Path
) -> None:
    """QEMU with reconnect sends the new back-end a plain table and no word of postcopy."""
    record = tmp_path / "record"
    migration = migrations(Shout(), record=record)
    migration.offer_texts()
    await migration.advise()
    await migration.listen()
    await migration.pair.close()
    assert record.exists()
    again = pairs(Shout(), record=record)
    await again.frontend.negotiate(~VirtioFeature.RING_EVENT_IDX.mask)
    await again.frontend.request(F.SET_MEM_TABLE, MemoryTable((migration.description,)), (migration.target,))
    ring = FrontendRing(0, migration.ring.queue)
    again.rings.append(ring)
    ring.kick()
    await again.frontend.start_ring(ring, migration.source)
    for _ in range(5):
        await again.frontend.get(F.GET_FEATURES)
    assert os.fstat(migration.target).st_blocks == 0
    assert migration.server is not None
    migration.server.place_all()
    while migration.used() < REQUESTS:
        await asyncio.wait_for(ring.called(), 10)
    assert migration.texts() == [b"REQUEST %d" % number for number in range(REQUESTS)]
    assert not record.exists()
