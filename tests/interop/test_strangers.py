"""Our front-end drives back-ends that are none of ours: QEMU's vhost-user-blk and DPDK's net_vhost. No guest."""

import asyncio
import os
import random
from collections.abc import AsyncIterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from vhostuser.driverqueue import DriverQueue
from vhostuser.drivers.blk import SECTOR, BlkDriver, BlkRequest, BlkStatus, BlkType, Disk
from vhostuser.drivers.net import MRG_RXBUF, FrameReceiver, FrameSender
from vhostuser.frontend import DRIVABLE, DRIVABLE_PROTOCOL, Frontend, FrontendRing, SharedLog, SharedMemory
from vhostuser.protocol import ProtocolFeature, VirtioFeature
from vhostuser.tools.lab.backend import BackendProcess, storage_daemon

pytestmark = [pytest.mark.interop, pytest.mark.timeout(60)]

KIB, MIB, PAGE = 1 << 10, 1 << 20, 4096
IMAGE = 8 * MIB
SLOTS = ProtocolFeature.CONFIGURE_MEM_SLOTS.mask


# ---- QEMU's storage daemon


@pytest.fixture
async def daemon(tmp_path: Path) -> AsyncIterator[tuple[Frontend, Path]]:
    """A connection to it, and the image that it serves."""
    image, socket = tmp_path / "disk", tmp_path / "socket"
    image.write_bytes(random.Random(1).randbytes(IMAGE))
    command = storage_daemon(socket, image, ["num-queues=2"])
    async with BackendProcess("storage daemon", command, socket), await Frontend.connect(socket) as frontend:
        yield frontend, image


class Blk:
    """Memory in three pieces, and a ring with its driver: the ring in one, heads in another, data in the third."""

    def __init__(self, frontend: Frontend, *, index: int = 0, indirect: bool = False, cut: int = 0) -> None:
        self.frontend = frontend
        self.memory = SharedMemory((0, 256 * KIB), (1 * MIB, 64 * KIB))
        self.memory.add(1 << 32, MIB, offset=64 * KIB)
        event_idx = frontend.session.has(VirtioFeature.RING_EVENT_IDX)
        queue = DriverQueue(self.memory.map, 0, 64, event_idx=event_idx, indirect=indirect)
        self.ring = FrontendRing(index, queue)
        self.disk = Disk(self.ring, BlkDriver(queue, 1 << 32, depth=4, cut=cut))

    async def start(self, base: int = 0, **options: bool) -> None:
        await self.frontend.start_ring(self.ring, self.memory, base=base, **options)
        self.ring.kick()

    def close(self) -> None:
        self.ring.close()
        self.memory.close()


@pytest.mark.parametrize("by_slots", [False, True], ids=["table", "slots"])
@pytest.mark.parametrize(("event_idx", "indirect", "cut"), [(False, False, 0), (True, False, 2048), (True, True, 4096)])
async def test_the_storage_daemon_serves_our_driver(
    daemon: tuple[Frontend, Path], by_slots: bool, event_idx: bool, indirect: bool, cut: int
) -> None:
    frontend, image = daemon
    without = 0 if event_idx else VirtioFeature.RING_EVENT_IDX.mask
    await frontend.negotiate(DRIVABLE & ~without, DRIVABLE_PROTOCOL & ~(0 if by_slots else SLOTS))
    assert int.from_bytes(await frontend.get_config(0, 8), "little") * SECTOR == IMAGE
    assert await frontend.get_queue_num() == 2
    blk = Blk(frontend, indirect=indirect, cut=cut)
    with ExitStack() as stack:
        stack.callback(blk.close)
        await frontend.set_memory(blk.memory, by_slots=by_slots)
        await blk.start()
        await reads_and_writes(blk.disk, image)
        await other_requests(blk.disk, image)
        assert blk.ring.queue.raw.used_index == await frontend.stop_ring(blk.ring)


def content(image: Path) -> bytes:
    return image.read_bytes()


async def reads_and_writes(disk: Disk, image: Path) -> None:
    """Many at once, each of its own size, and every byte compared with the image."""
    expected, dice = bytearray(content(image)), random.Random(2)

    async def one(number: int) -> None:
        sector, sectors = number * 256, dice.randint(1, 128)
        span = slice(sector * SECTOR, (sector + sectors) * SECTOR)
        assert await disk.read(sector, sectors) == expected[span]
        expected[span] = dice.randbytes(sectors * SECTOR)
        await disk.write(sector, bytes(expected[span]))
        assert await disk.read(sector, sectors) == expected[span]

    await asyncio.gather(*map(one, range(32)))
    await disk.flush()
    assert content(image) == expected


async def other_requests(disk: Disk, image: Path) -> None:
    assert await disk.get_id() == "vhost_user_blk"
    await disk.done(BlkRequest.write_zeroes((8, 16)))
    await disk.done(BlkRequest.discard((64, 8)))
    assert await disk.read(8, 16) == bytes(16 * SECTOR)
    assert (await disk.request(BlkRequest.read(IMAGE // SECTOR, 1))).status == BlkStatus.IOERR
    assert (await disk.request(BlkRequest(99))).status == BlkStatus.UNSUPP
    assert (await disk.request(BlkRequest(BlkType.OUT, 0, b"not a sector"))).status == BlkStatus.IOERR


async def test_rings_of_the_storage_daemon_stop_and_start(daemon: tuple[Frontend, Path]) -> None:
    frontend, image = daemon
    await frontend.negotiate()
    blk = Blk(frontend, index=1)
    with ExitStack() as stack:
        stack.callback(blk.close)
        await frontend.set_memory(blk.memory)
        base = 0
        for _ in range(3):
            await blk.start(base)
            assert await blk.disk.read(5, 1) == content(image)[5 * SECTOR : 6 * SECTOR]
            base = await frontend.stop_ring(blk.ring)
        assert base == 3
        # Stopped, it must not look at the ring. Asked anything else it answers, and has had the time to.
        reading = asyncio.ensure_future(blk.disk.read(6, 1))
        await frontend.get_features()
        assert not reading.done()
        await blk.start(base)
        assert await reading == content(image)[6 * SECTOR : 7 * SECTOR]


async def test_the_storage_daemon_marks_what_it_writes(daemon: tuple[Frontend, Path]) -> None:
    frontend, _ = daemon
    await frontend.negotiate()
    blk = Blk(frontend)
    with ExitStack() as stack:
        stack.callback(blk.close)
        log = SharedLog(blk.memory.end)
        stack.callback(log.close)
        await frontend.set_memory(blk.memory)
        await frontend.start_log(log)
        await blk.start(log_used=True)
        await blk.disk.read(0, 16)
        used, heads = blk.ring.queue.used // PAGE * PAGE, 1 << 32
        assert log.take() == [(used, PAGE), (heads, 3 * PAGE)], "the data of the first slot follow the heads"
        await blk.disk.write(0, bytes(SECTOR))
        assert log.take() == [(used, PAGE), (heads, PAGE)]
        await frontend.stop_log()
        await blk.disk.read(0, 16)
        assert log.take() == []


async def test_the_storage_daemon_takes_and_loses_regions(daemon: tuple[Frontend, Path]) -> None:
    frontend, image = daemon
    await frontend.negotiate()
    assert await frontend.get_max_mem_slots() > 8
    blk = Blk(frontend)
    with ExitStack() as stack:
        stack.callback(blk.close)
        await frontend.set_memory(blk.memory, by_slots=True)
        region = blk.memory.add(1 << 40, 64 * KIB)
        await frontend.add_mem_reg(region)
        await blk.start()
        blk.ring.queue.move(blk.memory.map)
        far = Disk(blk.ring, BlkDriver(blk.ring.queue, 1 << 40, depth=1, largest=32 * KIB))
        assert await far.read(1, 8) == content(image)[SECTOR : 9 * SECTOR]
        await frontend.rem_mem_reg(region)
        blk.memory.remove(region)
        assert await blk.disk.read(1, 8) == content(image)[SECTOR : 9 * SECTOR]


# ---- DPDK's testpmd: what it gets on net_vhost it sends back with the addresses swapped


@pytest.fixture
async def testpmd(tmp_path: Path) -> AsyncIterator[Frontend]:
    socket = tmp_path / "socket"
    cpus = sorted(os.sched_getaffinity(0))
    command = [
        *(
            "dpdk-testpmd",
            f"--lcores=0@{cpus[0]},1@{cpus[-1]}",
            "--no-pci",
            "--no-huge",
            "-m",
            "256",
            "--no-shconf",
            "--no-telemetry",
        ),
        *(f"--vdev=net_vhost0,iface={socket},queues=1", "--", "--forward-mode=macswap", "--auto-start", "--nb-cores=1"),
        *("--total-num-mbufs=2048", "--stats-period=1000"),
    ]
    async with BackendProcess("testpmd", command, socket), await Frontend.connect(socket) as frontend:
        yield frontend


class Net:
    """A pair of rings, frames in on the first and out on the second, in two regions."""

    def __init__(self, frontend: Frontend, *, slot_bytes: int = 2048) -> None:
        self.frontend = frontend
        self.memory = SharedMemory((0, MIB), (1 << 32, MIB))
        features, has = frontend.session.features, frontend.session.has
        event_idx = has(VirtioFeature.RING_EVENT_IDX)
        self.rings = [
            FrontendRing(index, DriverQueue(self.memory.map, index * 64 * KIB, 128, event_idx=event_idx))
            for index in (0, 1)
        ]
        self.receiver = FrameReceiver(
            self.rings[0].queue, MIB // 2, features=features, slots=128, slot_bytes=slot_bytes
        )
        self.sender = FrameSender(self.rings[1].queue, 1 << 32, features=features, slots=64)

    async def start(self, bases: tuple[int, int] = (0, 0)) -> None:
        for ring, base in zip(self.rings, bases, strict=True):
            await self.frontend.start_ring(ring, self.memory, base=base)
        await self.frontend.driver_ok()

    async def stop(self) -> tuple[int, int]:
        return await self.frontend.stop_ring(self.rings[0]), await self.frontend.stop_ring(self.rings[1])

    async def exchange(self, frames: list[bytes]) -> list[bytes]:
        """Sends these, and waits until as many have come back."""
        self.receiver.post()
        got: list[bytes] = []
        if self.rings[0].queue.publish():
            self.rings[0].kick()
        assert self.sender.send(frames) == len(frames)
        if self.rings[1].queue.publish():
            self.rings[1].kick()
        while len(got) < len(frames):
            wait = self.rings[0].queue.wait
            assert await asyncio.to_thread(wait, self.rings[0].call_fd, timeout=5), f"{len(got)} of {len(frames)} came"
            got += [frame for _, frame in self.receiver.receive()]
        while self.sender.collect():
            pass
        return got

    def close(self) -> None:
        for ring in self.rings:
            ring.close()
        self.memory.close()


def swapped(frame: bytes) -> bytes:
    return frame[6:12] + frame[:6] + frame[12:]


def some_frames(count: int, dice: random.Random) -> list[bytes]:
    addresses = bytes.fromhex("020000000001 020000000002 88b5")
    return [addresses + dice.randbytes(dice.randint(46, 1486)) for _ in range(count)]


@pytest.mark.parametrize("mergeable", [False, True], ids=["plain", "mergeable"])
async def test_testpmd_sends_every_frame_back(testpmd: Frontend, mergeable: bool) -> None:
    """Mergeable, with buffers of 600 bytes: the larger frames come in up to three of them."""
    without = 0 if mergeable else 1 << MRG_RXBUF
    await testpmd.negotiate(DRIVABLE & ~without, DRIVABLE_PROTOCOL | ProtocolFeature.STATUS.mask)
    net = Net(testpmd, slot_bytes=600 if mergeable else 2048)
    dice = random.Random(3)
    with ExitStack() as stack:
        stack.callback(net.close)
        await testpmd.set_memory(net.memory)
        await net.start()
        for _ in range(8):
            frames = some_frames(32, dice)
            assert await net.exchange(frames) == [swapped(frame) for frame in frames]
        bases = await net.stop()
        assert bases == tuple(ring.queue.raw.used_index for ring in net.rings)
        await net.start(bases)
        frames = some_frames(32, dice)
        assert await net.exchange(frames) == [swapped(frame) for frame in frames]


async def test_testpmd_marks_what_it_writes(testpmd: Frontend) -> None:
    await testpmd.negotiate()
    net = Net(testpmd)
    with ExitStack() as stack:
        stack.callback(net.close)
        log = SharedLog(net.memory.end)
        stack.callback(log.close)
        await testpmd.set_memory(net.memory)
        await net.start()
        await testpmd.start_log(log)
        await net.exchange(some_frames(4, random.Random(4)))
        marked = {page for guest, length in log.take() for page in range(guest // PAGE, (guest + length) // PAGE)}
        buffers = range(MIB // 2 // PAGE, MIB // 2 // PAGE + 2)
        assert marked >= set(buffers), "two frames fit into each page"
        assert marked <= {*buffers, *(ring.queue.used // PAGE for ring in net.rings)}
        await testpmd.stop_log()
        await net.exchange(some_frames(4, random.Random(4)))
        assert log.take() == []
