"""GET_VRING_BASE_INFLIGHT: a ring stops at once, what it was busy with stays in the in-flight region, and whoever
serves it next does that exactly once."""

from __future__ import annotations

import asyncio
import fcntl
import os
import select
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest

from tests.runtime.echo import DATA, Echo, ask, next_used, quiet
from vhostuser._native import ffi, lib
from vhostuser.device import Device
from vhostuser.devices.blk import Blk
from vhostuser.devices.image import Image
from vhostuser.drivers.blk import SECTOR, BlkDriver, BlkRequest, BlkStatus
from vhostuser.frontend import DRIVABLE, Frontend, InflightBuffer, SharedMemory
from vhostuser.frontend.frontend import DRIVABLE_PROTOCOL
from vhostuser.protocol import LocalProtocolError, ProtocolFeature, VirtioFeature
from vhostuser.testing.pair import MIB, Pair
from vhostuser.virtqueue import DeviceQueue

pytestmark = pytest.mark.usefixtures("no_leaks")

BIT = ProtocolFeature.GET_VRING_BASE_INFLIGHT.mask
SIZE = 64


class Busy(Echo):
    protocol_features = BIT


class Bench:
    """A guest's memory, its ring 0 and the in-flight buffer, which outlive the back-ends that serve them in turn."""

    def __init__(self, pairs: Callable[..., Pair], *, packed: bool = False, bit: int = BIT) -> None:
        self.pairs = pairs
        self.features = DRIVABLE | (VirtioFeature.RING_PACKED.mask if packed else 0)
        self.protocol_features = DRIVABLE_PROTOCOL | bit
        self.packed = packed
        self.memory = SharedMemory((0, 4 * MIB))
        self.buffer: InflightBuffer | None = None
        self.pair: Pair

    async def serve(self, device: Device, base: int | None = None, *, tracked: bool = True) -> Frontend:
        """Has ``device`` serve the ring from ``base`` on; whatever is in it is to be looked at."""
        before = None if base is None else self.pair
        pair = self.pair = self.pairs(device)
        await pair.frontend.negotiate(self.features, self.protocol_features)
        await pair.frontend.set_memory(self.memory)
        pair.memory = self.memory
        if before is None:
            pair.add_ring(0, size=SIZE)
        else:
            pair.rings.append(before.rings.pop())
        if tracked:
            self.buffer = self.buffer or await pair.frontend.get_inflight_fd(1, SIZE)
            await pair.frontend.set_inflight_fd(self.buffer)
        await pair.frontend.start_ring(pair.rings[0], self.memory, base=base)
        pair.rings[0].kick()
        return pair.frontend

    def left(self) -> tuple[int, ...]:
        """What the buffer names, in order, as the driver does; the buffer is right."""
        assert self.buffer is not None
        region = self.buffer.packed_queue(0) if self.packed else self.buffer.queue(0)
        assert not list(region.violations(SIZE))
        return tuple(region.id_of(head) for head in region.heads) if self.packed else region.heads

    async def stop(self) -> int:
        """The base. Does not wait for what the device is busy with."""
        return await asyncio.wait_for(self.pair.frontend.stop_ring(self.pair.rings[0]), 5)

    def close(self) -> None:
        if self.buffer is not None:
            self.buffer.close()


@pytest.fixture
async def benches(pairs: Callable[..., Pair]) -> AsyncIterator[Callable[..., Bench]]:
    made: list[Bench] = []

    def make(**options: object) -> Bench:
        made.append(Bench(pairs, **options))  # type: ignore[arg-type]
        return made[-1]

    yield make
    for bench in made:
        bench.close()


async def busy_with(bench: Bench, device: Echo, count: int) -> list[int]:
    """So many requests wait in the device; their heads."""
    device.gate.clear()
    texts = [b"request %d" % number for number in range(count)]
    heads = []
    for text in texts:
        heads.append(await ask(bench.pair, text))
        await device.taken(text)
    return heads


# ---- a device in Python


@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
async def test_a_busy_device_stops_and_its_successor_does_it(benches: Callable[..., Bench], packed: bool) -> None:
    bench, device, successor = benches(packed=packed), Busy(), Busy()
    await bench.serve(device)
    heads = await busy_with(bench, device, 3)
    base = await bench.stop()
    assert list(bench.left()) == heads and bench.pair.rings[0].queue.take() is None
    await bench.serve(successor, base)
    assert [(await next_used(bench.pair))[0] for _ in heads] == heads, "each once, in the order in which it was taken"
    await quiet(bench.pair)
    assert bench.pair.rings[0].queue.take() is None and bench.left() == ()
    device.release()


async def test_the_same_back_end_may_go_on_with_it(benches: Callable[..., Bench]) -> None:
    bench, device = benches(), Busy()
    frontend = await bench.serve(device)
    heads = await busy_with(bench, device, 2)
    base = await bench.stop()
    assert device.events == ["start", "stop"]
    device.gate.set()
    await frontend.start_ring(bench.pair.rings[0], bench.memory, base=base)
    bench.pair.rings[0].kick()
    assert [(await next_used(bench.pair))[0] for _ in heads] == heads
    device.release()


async def test_requests_that_end_when_they_are_cut_off_are_returned(benches: Callable[..., Bench]) -> None:
    """What the device does to one that is cut off is its own affair; the region says what has come of it."""

    class Hasty(Busy):
        async def handle(self, request: object) -> None:
            try:
                await super().handle(request)  # type: ignore[arg-type]
            except asyncio.CancelledError:
                request.complete(0)  # type: ignore[attr-defined]
                raise

    bench, device = benches(), Hasty()
    await bench.serve(device)
    heads = await busy_with(bench, device, 2)
    await bench.stop()
    assert bench.left() == ()
    assert sorted([(await next_used(bench.pair))[0] for _ in heads]) == heads
    device.release()


async def test_a_ring_that_is_disabled_is_not_waited_for_either(benches: Callable[..., Bench]) -> None:
    """QEMU disables every ring before it asks for bases."""
    bench, device = benches(), Busy()
    frontend = await bench.serve(device)
    heads = await busy_with(bench, device, 2)
    await asyncio.wait_for(frontend.set_vring_enable(0, False), 5)
    assert list(bench.left()) == heads
    device.gate.set()
    await frontend.set_vring_enable(0, True)
    assert [(await next_used(bench.pair))[0] for _ in heads] == heads
    device.release()


@pytest.mark.parametrize("lacks", ["bit", "buffer", "device"])
async def test_without_it_requests_are_waited_for(benches: Callable[..., Bench], lacks: str) -> None:
    """It must be negotiated, there must be a buffer, and the device must take part."""
    bench = benches(bit=0 if lacks == "bit" else BIT)
    device = Echo() if lacks == "device" else Busy()
    frontend = await bench.serve(device, tracked=lacks != "buffer")
    assert bool(frontend.session.protocol_features & BIT) == (lacks == "buffer")
    await busy_with(bench, device, 1)
    stopping = asyncio.ensure_future(bench.stop())
    await asyncio.sleep(0)
    device.release()
    await stopping
    assert bench.pair.rings[0].queue.take() is not None


async def test_it_needs_the_buffer(benches: Callable[..., Bench]) -> None:
    """Section "GET_VRING_BASE": negotiated only together with INFLIGHT_SHMFD."""
    bench = benches()
    bench.protocol_features = BIT
    with pytest.raises(LocalProtocolError, match="GET_VRING_BASE_INFLIGHT without INFLIGHT_SHMFD"):
        await bench.serve(Busy())
    bench.memory.close()


# ---- a disk in C


class Clogged(Device):
    """The block engine on a pipe without a reader: a medium that is as slow as one can be."""

    virtio_id = 2
    protocol_features = BIT

    def __init__(self, pipe: int) -> None:
        config = {"fd": pipe, "sectors": 1024, "block_size": 512, "max_segments": 1, "serial": bytes(20)}
        error = ffi.new("int *")
        self._blk = ffi.gc(lib.vu_blk_new(ffi.new("struct vu_blk_config *", config), error), lib.vu_blk_free)
        assert self._blk != ffi.NULL

    def engine(self) -> Clogged:
        return self

    def run(self, queue: DeviceQueue, kick: int, stop: int) -> int:
        return int(lib.vu_blk_run(self._blk, queue.native, kick, stop))


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    """A pipe that has room for three sectors."""
    read, write = os.pipe()
    fcntl.fcntl(write, fcntl.F_SETPIPE_SZ, 4096)
    os.write(write, bytes(4096 - 3 * SECTOR))
    yield read, write
    os.close(read)
    os.close(write)


@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
async def test_a_slow_disk_stops_and_its_successor_writes_each_sector_once(
    benches: Callable[..., Bench], pipe: tuple[int, int], tmp_path: Path, packed: bool
) -> None:
    bench = benches(packed=packed)
    await bench.serve(Clogged(pipe[1]))
    (ring,) = bench.pair.rings
    driver = BlkDriver(ring.queue, DATA, depth=16, largest=4096)
    for sector in range(12):
        assert driver.submit(BlkRequest.write(sector, bytes([sector + 1]) * SECTOR)) is not None
    driver.publish()
    ring.kick()
    answered = []
    while len(answered) < 3:
        await ring.called()
        answered += driver.collect()
    base = await bench.stop()
    assert not driver.collect() and len(bench.left()) == 9
    reader, _ = pipe
    assert os.read(reader, 8192)[4096 - 3 * SECTOR :] == b"".join(bytes([sector]) * SECTOR for sector in (1, 2, 3))
    assert not select.select([reader], [], [], 0)[0], "there is room now, and nothing writes any more"

    (tmp_path / "disk").write_bytes(bytes(64 * SECTOR))
    await bench.serve(Blk(Image(tmp_path / "disk")), base)
    while len(answered) < 12:
        await asyncio.wait_for(ring.called(), 5)
        answered += driver.collect()
    assert {answer.status for _, answer in answered} == {BlkStatus.OK}
    assert sorted(answer.request.sector for _, answer in answered) == list(range(12)), "each once"
    assert bench.left() == ()
    written = (tmp_path / "disk").read_bytes()
    assert [written[at * SECTOR] for at in range(12)] == [0, 0, 0, *range(4, 13)]


async def test_a_slow_disk_without_it_is_waited_for(benches: Callable[..., Bench], pipe: tuple[int, int]) -> None:
    bench = benches(bit=0)
    await bench.serve(Clogged(pipe[1]))
    (ring,) = bench.pair.rings
    driver = BlkDriver(ring.queue, DATA, depth=16, largest=4096)
    for sector in range(8):
        driver.submit(BlkRequest.write(sector, bytes(SECTOR)))
    driver.publish()
    ring.kick()
    await ring.called()
    stopping = asyncio.ensure_future(bench.pair.frontend.stop_ring(ring))
    done, _ = await asyncio.wait((stopping,), timeout=0.05)
    assert not done
    os.read(pipe[0], 8192)
    await asyncio.wait_for(stopping, 5)
    assert bench.left() == ()
