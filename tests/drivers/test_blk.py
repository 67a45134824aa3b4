"""The block driver against our own back-end: every type of request, many at once, from a loop and from a thread."""

import asyncio
import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from vhostuser.devices.blk import Blk
from vhostuser.devices.image import Image
from vhostuser.driverqueue import DriverQueue
from vhostuser.drivers.blk import SECTOR, BlkDriver, BlkFailed, BlkRequest, BlkStatus, BlkType, Disk
from vhostuser.frontend import FrontendRing, SharedMemory
from vhostuser.protocol import QueueBroken
from vhostuser.testing.pair import MIB, Pair

pytestmark = pytest.mark.usefixtures("no_leaks")

BYTES = MIB


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "disk"
    path.write_bytes(random.Random(1).randbytes(BYTES))
    return path


async def connected(pairs: Callable[..., Pair], path: Path, **options: int) -> tuple[Pair, BlkDriver]:
    pair = pairs(Blk(Image(path)))
    await pair.set_up()
    return pair, BlkDriver(pair.rings[0].queue, MIB, **options)


def content(path: Path) -> bytes:
    return path.read_bytes()


async def test_every_type_of_request(pairs: Callable[..., Pair], path: Path) -> None:
    pair, driver = await connected(pairs, path, cut=1000)
    disk = Disk(pair.rings[0], driver)
    assert await disk.read(3, 5) == content(path)[3 * SECTOR : 8 * SECTOR]
    await disk.write(4, b"w" * 1024)
    await disk.flush()
    assert content(path)[4 * SECTOR : 6 * SECTOR] == b"w" * 1024
    await disk.done(BlkRequest.write_zeroes((8, 8), (32, 1), unmap=True))
    await disk.done(BlkRequest.discard((64, 8)))
    assert await disk.read(8, 8) == bytes(8 * SECTOR)
    assert isinstance(await disk.get_id(), str)
    with pytest.raises(BlkFailed, match="IN at sector 2048: IOERR"):
        await disk.read(BYTES // SECTOR, 1)
    with pytest.raises(BlkFailed, match="99 at sector 0: UNSUPP") as failed:
        await disk.done(BlkRequest(99))
    assert failed.value.answer.length == 1


@pytest.mark.parametrize("depth", [1, 3, 16])
async def test_more_tasks_than_slots(pairs: Callable[..., Pair], path: Path, depth: int) -> None:
    """Each gets its own answer and none waits for ever, also those for whom there was no slot at first."""
    pair, driver = await connected(pairs, path, depth=depth)
    disk, expected = Disk(pair.rings[0], driver), content(path)

    async def read(sector: int) -> bool:
        return await disk.read(sector, 8) == expected[sector * SECTOR : (sector + 8) * SECTOR]

    async with asyncio.timeout(10):
        assert all(await asyncio.gather(*(read(sector) for sector in range(200))))
    assert driver.out == 0


async def test_a_request_that_is_cancelled_keeps_its_slot_until_it_is_answered(
    pairs: Callable[..., Pair], path: Path
) -> None:
    pair, driver = await connected(pairs, path, depth=1)
    disk = Disk(pair.rings[0], driver)
    reading = asyncio.ensure_future(disk.read(0, 1))
    await asyncio.sleep(0)
    reading.cancel()
    await asyncio.wait([reading])
    assert await asyncio.wait_for(disk.read(1, 1), 5) == content(path)[SECTOR : 2 * SECTOR]


@pytest.mark.parametrize("cut", [0, 512, 4096])
async def test_a_thread_does_a_batch(pairs: Callable[..., Pair], path: Path, cut: int) -> None:
    pair, driver = await connected(pairs, path, depth=4, largest=8192, cut=cut)
    data = random.Random(2).randbytes(8192)
    requests = [BlkRequest.write(number * 16, data) for number in range(10)]
    requests += [BlkRequest.flush(), *(BlkRequest.read(number * 16, 16) for number in range(10))]
    for part in (requests[:11], requests[11:]):  # what is under way at once is done in any order
        answers = await asyncio.to_thread(driver.run, part, pair.rings[0])
        assert [answer.request for answer in answers] == part
        assert {answer.status for answer in answers} == {BlkStatus.OK}
    assert {answer.data for answer in answers} == {data}


async def test_a_device_that_is_silent_is_a_timeout() -> None:
    with SharedMemory((0, 4 * MIB)) as memory, FrontendRing(0, DriverQueue(memory.map, 0, 16)) as ring:
        driver = BlkDriver(ring.queue, MIB)
        with pytest.raises(TimeoutError, match=r"2 block requests were not answered for 0\.01 s"):
            driver.run([BlkRequest.read(0, 1)] * 2, ring, timeout=0.01)
        assert os.eventfd_read(ring.kick_fd) == 1, "one kick for both"
        raw = ring.queue.raw
        raw.use(0, 7, 1)
        raw.used_index = 1
        with pytest.raises(QueueBroken):
            driver.collect()


async def test_what_cannot_fit_is_said_at_once() -> None:
    with SharedMemory((0, 4 * MIB)) as memory:
        driver = BlkDriver(DriverQueue(memory.map, 0, 8), MIB, largest=8192, cut=512)
        with pytest.raises(ValueError, match="slots have 8192"):
            driver.submit(BlkRequest.read(0, 17))
        with pytest.raises(ValueError, match="18 buffers, the ring has room for fewer"):
            driver.submit(BlkRequest.read(0, 16))
        assert driver.submit(BlkRequest(BlkType.FLUSH)) == 0
        assert driver.data_at(1) - driver.data_at(0) == 8192
        assert BlkDriver.bytes_needed(16, 8192) == 4096 + 16 * 8192
