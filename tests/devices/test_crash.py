"""``vhostuser-blk`` is killed with 64 requests under way, and another goes on: no write that was acknowledged is lost,
none is missing after all, none is completed twice.

``VHOSTUSER_KILLS=2000`` kills so often; 50 times for each format of the ring otherwise.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import random
from collections.abc import AsyncIterator, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from vhostuser.driverqueue import DriverQueue
from vhostuser.drivers.blk import BlkDriver, BlkRequest, BlkStatus
from vhostuser.frontend import DRIVABLE, Frontend, FrontendRing, InflightBuffer, SharedMemory
from vhostuser.protocol import VirtioFeature
from vhostuser.tools.blk import main

KILLS = int(os.environ.get("VHOSTUSER_KILLS", "50"))
pytestmark = pytest.mark.timeout(60 + KILLS)

MIB = 1 << 20
DEPTH = 64
BLOCK = 4096
BLOCKS = 512
SLOTS = MIB

processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["vhostuser.tools.disk", "vhostuser.tools.service"])


def block(number: int) -> bytes:
    """4 KiB with its number in front and a checksum of it all behind."""
    start = number.to_bytes(8, "little") * ((BLOCK - 16) // 8)
    return start + hashlib.md5(start).digest()


def number_in(content: bytes) -> int:
    """The number of a whole block, or 0 of one that was never written."""
    assert hashlib.md5(content[:-16]).digest() == content[-16:] or not any(content), "a torn block"
    return int.from_bytes(content[:8], "little")


class Writer:
    """A driver that writes numbered blocks, each to a place that none of those under way goes to."""

    def __init__(self, image: Path, *, packed: bool) -> None:
        self.image = image
        self.packed = packed
        self.memory = SharedMemory((0, SLOTS + BlkDriver.bytes_needed(DEPTH, BLOCK)))
        queue = DriverQueue(self.memory.map, 0, 256, packed=packed)
        self.driver = BlkDriver(queue, SLOTS, depth=DEPTH, largest=BLOCK)
        self.region: InflightBuffer | None = None
        self.submitted = 0
        self.acknowledged = [0] * BLOCKS

    def submit(self) -> None:
        """As many as there is room for."""
        while self.driver.out < DEPTH:
            number = self.submitted + 1
            place = number % BLOCKS
            assert self.driver.submit(BlkRequest.write(place * BLOCK // 512, block(number))) is not None
            self.submitted = number
        self.driver.publish()

    def collect(self) -> int:
        """How many were answered; a second answer to one would be a KeyError of the driver."""
        answers = self.driver.collect()
        for _, answer in answers:
            assert (answer.status, answer.length) == (BlkStatus.OK, 1)
            number = number_in(answer.request.data)
            self.acknowledged[number % BLOCKS] = number
        return len(answers)

    def check(self) -> None:
        """Each place of the image holds what was acknowledged last, or what is under way to it."""
        content = self.image.read_bytes()
        for place, last in enumerate(self.acknowledged):
            found = number_in(content[place * BLOCK : (place + 1) * BLOCK])
            assert found == last or last < found <= self.submitted, f"block {place}: {found} after {last}"

    def base(self) -> int | None:
        """A dead back-end cannot be asked: QEMU goes on from the used index, of a packed ring from its start."""
        queue = self.driver.queue
        return None if self.packed else int.from_bytes(self.memory.map.read(queue.used + 2, 2), "little")

    async def connect(self, frontend: Frontend, ring: FrontendRing) -> None:
        ring_format = VirtioFeature.RING_PACKED.mask if self.packed else 0
        await frontend.negotiate(DRIVABLE & ~VirtioFeature.RING_EVENT_IDX.mask | ring_format)
        await frontend.set_memory(self.memory)
        if self.region is None:
            self.region = await frontend.get_inflight_fd(1, ring.queue.size)
        await frontend.set_inflight_fd(self.region)
        await frontend.start_ring(ring, self.memory, base=self.base())

    async def write(self, ring: FrontendRing, answers: int) -> None:
        """Has 64 under way all the time, until that many more were answered."""
        while answers > 0:
            self.submit()
            ring.kick()
            assert self.driver.queue.wait(ring.call_fd, timeout=10), f"{self.driver.out} writes were not answered"
            answers -= self.collect()

    async def drain(self, ring: FrontendRing) -> None:
        """Until nothing is under way."""
        ring.kick()
        while self.driver.out:
            assert self.driver.queue.wait(ring.call_fd, timeout=10), f"{self.driver.out} writes were not answered"
            self.collect()

    def close(self) -> None:
        self.memory.close()
        if self.region is not None:
            self.region.close()


class Lives:
    """One back-end after another, each of which connects to the front-end's socket."""

    def __init__(self, directory: Path, image: Path) -> None:
        self.path = directory / "sock"
        self.listener = Frontend.listen(self.path)
        self.options = [f"--socket-path={self.path}", "--connect", f"--blk-file={image}", "--log-level=warn"]

    async def one(self, writer: Writer, answers: int | None) -> None:
        """A back-end from its start until it is killed: after so many answers, or when nothing is under way."""
        process = processes.Process(target=main, args=(self.options,), daemon=True)
        process.start()
        with closing(FrontendRing(0, writer.driver.queue)) as ring:
            try:
                async with await self.listener.accept() as frontend:
                    await writer.connect(frontend, ring)
                    await (writer.drain(ring) if answers is None else writer.write(ring, answers))
                    process.kill()
            finally:
                process.kill()
                process.join()

    def close(self) -> None:
        self.listener.close()


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk"
    path.write_bytes(bytes(BLOCKS * BLOCK))
    return path


@pytest.fixture
async def lives(tmp_path: Path, image: Path) -> AsyncIterator[Lives]:
    with closing(Lives(tmp_path, image)) as made:
        yield made


@pytest.fixture(params=["split", "packed"])
def writer(request: pytest.FixtureRequest, image: Path) -> Iterator[Writer]:
    with closing(Writer(image, packed=request.param == "packed")) as made:
        yield made


async def test_no_acknowledged_write_is_lost_and_none_is_completed_twice(lives: Lives, writer: Writer) -> None:
    chance = random.Random(20261130)
    for _ in range(KILLS):
        await lives.one(writer, chance.randrange(1, 4 * DEPTH))
        writer.check()
    await lives.one(writer, None)
    content = writer.image.read_bytes()
    assert [number_in(content[at : at + BLOCK]) for at in range(0, len(content), BLOCK)] == writer.acknowledged
    assert sum(number > 0 for number in writer.acknowledged) == BLOCKS
