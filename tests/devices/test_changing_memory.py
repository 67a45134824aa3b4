"""Memory that changes a thousand times under full load: tables are cut and joined, regions go and come again, those
that rings are in too. Nothing is lost, no byte is wrong, nothing is written beside its place.
"""

from __future__ import annotations

import asyncio
import os
import random
import threading
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest

from tests.devices.interface import Interface, frame
from tests.devices.test_sockets import Peer, Server, quick
from vhostuser.devices.blk import Blk, BlkSettings
from vhostuser.devices.image import Image
from vhostuser.devices.sockets import Stream
from vhostuser.drivers.blk import SECTOR, BlkAnswer, BlkDriver, BlkRequest, BlkStatus, Disk
from vhostuser.frontend import DRIVABLE, Frontend, FrontendRing, SharedMemory, SharedRegion
from vhostuser.protocol import FrontendRequest, MemoryRegion, MemoryTable, VirtioFeature
from vhostuser.testing.pair import MIB, Pair

CHANGES = int(os.environ.get("VHOSTUSER_CHANGES", "1000"))
"""Of split rings; a quarter as many of packed ones."""
pytestmark = pytest.mark.timeout(60 + CHANGES // 10)

SECTORS = 2048
DEPTH = 32
BUSY, SPARE, DIMM = 2 * MIB, 3 * MIB, 1 << 32
"""Guest addresses: of the buffers of who is under load, of memory that nobody has a buffer in, and of a region whose
file is another one after each change."""


def halves(region: SharedRegion) -> tuple[MemoryRegion, ...]:
    """The region as two, which lie side by side as before."""
    whole = region.describe()
    half = whole.size // 2
    after = MemoryRegion(whole.guest + half, half, whole.user + half, whole.offset + half)
    return MemoryRegion(whole.guest, half, whole.user, whole.offset), after


async def by_table(frontend: Frontend, memory: SharedMemory, number: int) -> None:
    """Every other time the region that all is in is told as two. Both lay in the middle of what was one mapping."""
    first, dimm = memory.regions
    memory.remove(dimm)
    dimm = memory.add(DIMM, MIB)
    parts = halves(first) if number % 2 else (first.describe(),)
    table = MemoryTable((*parts, dimm.describe()))
    await frontend.request(FrontendRequest.SET_MEM_TABLE, table, (*[first.fd] * len(parts), dimm.fd))


async def by_slots(frontend: Frontend, memory: SharedMemory, number: int) -> None:
    """The region that all is in goes, rings and buffers, and comes again; so does the other, as another file."""
    first, dimm = memory.regions
    await frontend.rem_mem_reg(dimm)
    memory.remove(dimm)
    await frontend.rem_mem_reg(first)
    await frontend.add_mem_reg(first)
    await frontend.add_mem_reg(memory.add(DIMM, MIB))


Change = Callable[[Frontend, SharedMemory, int], Awaitable[None]]


@pytest.fixture(params=[by_table, by_slots])
def change(request: pytest.FixtureRequest) -> Change:
    made: Change = request.param
    return made


formats = pytest.mark.parametrize(
    ("features", "changes"),
    [(DRIVABLE, CHANGES), (DRIVABLE | VirtioFeature.RING_PACKED.mask, CHANGES // 4)],
    ids=["split", "packed"],
)


@pytest.fixture
def memory() -> Iterator[SharedMemory]:
    with SharedMemory((0, 4 * MIB), (DIMM, MIB)) as made:
        yield made


# ---- a disk


class Load:
    """A thread that writes and reads at full depth, and compares every byte, until it is told to stop."""

    def __init__(self, driver: BlkDriver, ring: FrontendRing) -> None:
        self.driver, self.ring = driver, ring
        self.done = 0
        self.failure: BaseException | None = None
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            chance = random.Random(20261201)
            while not self._over.is_set():
                self._turn({sector: chance.randbytes(SECTOR) for sector in chance.sample(range(SECTORS // 2), 64)})
        except BaseException as failure:
            self.failure = failure

    def _turn(self, content: dict[int, bytes]) -> None:
        self._do([BlkRequest.write(sector, data) for sector, data in content.items()])
        answers = self._do([BlkRequest.read(sector, 1) for sector in content])
        assert [answer.data for answer in answers] == list(content.values()), "a wrong byte"

    def _do(self, requests: list[BlkRequest]) -> list[BlkAnswer]:
        answers = self.driver.run(requests, self.ring)
        assert {answer.status for answer in answers} == {BlkStatus.OK}
        self.done += len(answers)
        return answers

    async def end(self) -> int:
        """Requests done. Raises what went wrong."""
        self._over.set()
        await asyncio.to_thread(self._thread.join)
        if self.failure is not None:
            raise self.failure
        return self.done


@formats
@pytest.mark.usefixtures("no_leaks", "no_mappings")
async def test_a_disk_goes_on_and_takes_the_memory_that_there_is(
    pairs: Callable[..., Pair], tmp_path: Path, memory: SharedMemory, change: Change, features: int, changes: int
) -> None:
    path = tmp_path / "disk"
    path.write_bytes(bytes(SECTORS * SECTOR))
    pair = pairs(Blk(Image(path), BlkSettings(queues=2)))
    await pair.set_up(rings=2, features=features, memory=memory)
    load = Load(BlkDriver(pair.rings[0].queue, BUSY, depth=DEPTH, largest=4096), pair.rings[0])
    for number in range(changes):
        await change(pair.frontend, memory, number)
        if number % 10 == 0:  # what is in the new file, and nothing else, is written and read
            other = pair.rings[1]
            other.queue.memory = memory.map
            disk = Disk(other, BlkDriver(other.queue, DIMM, depth=2))
            await disk.write(SECTORS - 1, number.to_bytes(8, "little") * (SECTOR // 8))
            assert await disk.read(SECTORS - 1, 1) == number.to_bytes(8, "little") * (SECTOR // 8)
    done = await load.end()
    assert done > changes, "it was not under load"
    assert memory.read(SPARE, MIB) == bytes(MIB), "something was written where nobody has a buffer"


# ---- a network


class Echo:
    """The other side of a stream: sends back what comes."""

    def __init__(self, peer: Peer) -> None:
        self._peer = peer
        self._task = asyncio.ensure_future(self._run())

    async def _run(self) -> None:
        while data := await self._peer.reader.read(1 << 16):
            self._peer.writer.write(data)
            await self._peer.writer.drain()

    async def close(self) -> None:
        self._task.cancel()
        await asyncio.wait((self._task,))
        await self._peer.close()


async def converse(guest: Interface, over: asyncio.Event) -> int:
    """Has up to 16 frames under way, until it is over and all are back; how many there were."""
    chance, out, sent, got = random.Random(20261201), [], 0, 0
    while out or not over.is_set():
        if not over.is_set() and len(out) < 16:
            some = [frame(chance.randrange(60, 1500), sent + number) for number in range(4)]
            guest.send(*some)
            await guest.sent(len(some))
            out += some
            sent += len(some)
        for _, data in await guest.receive(1):
            assert data == out.pop(0), "lost, twice, out of order or wrong"
            got += 1
    assert got == sent
    return sent


@formats
async def test_an_interface_loses_no_frame(
    tmp_path: Path, memory: SharedMemory, change: Change, features: int, changes: int
) -> None:
    async with Server(tmp_path / "socket") as server:
        guest = Interface(quick(Stream(str(server.path))), features=features)
        attending = asyncio.ensure_future(guest.device.attend())
        await guest.start(memory=memory)
        echo, over = Echo(await server.peer()), asyncio.Event()
        talk = asyncio.ensure_future(converse(guest, over))
        for number in range(changes):
            await change(guest.pair.frontend, memory, number)
            if talk.done():
                break
        over.set()
        frames = await asyncio.wait_for(talk, 30)
        assert frames > changes // 4, "it was not under load"
        assert memory.read(SPARE, MIB) == bytes(MIB)
        assert not guest.dropped(0) and not guest.dropped(1)
        await guest.close()
        attending.cancel()
        await asyncio.wait((attending,))
        await echo.close()
