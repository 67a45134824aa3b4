"""A device whose rings are all stopped touches no guest memory, sends nothing, and still answers. Section "Suspended
device state".

While it is suspended the back-end's mapping has no page in its page table, and a userfaultfd tells of each that is
wanted there: whoever touches guest memory is found, and waits.
"""

from __future__ import annotations

import asyncio
import select
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from tests.runtime.echo import Echo, quiet
from tests.runtime.test_hostile_channel import arrived, channel
from vhostuser.channel import readable
from vhostuser.device import Device
from vhostuser.devices.blk import Blk
from vhostuser.devices.ends import Source
from vhostuser.devices.image import Image
from vhostuser.devices.net import Net
from vhostuser.frontend import DRIVABLE, DRIVABLE_PROTOCOL, SharedLog, SharedMemory
from vhostuser.protocol import DeviceStatus, ProtocolFeature, VirtioFeature
from vhostuser.testing.pair import MIB, Pair
from vhostuser.uffd import Feature, Mode, Userfaultfd

pytestmark = pytest.mark.usefixtures("no_leaks", "permitted")

REQUEST = 2 * MIB
"""Guest address of a chain that every one of the devices takes: a disk reads a sector, a network card receives."""


@contextmanager
def watched(pair: Pair) -> Iterator[Userfaultfd]:
    """The back-end's memory: the userfaultfd is readable as soon as it is touched."""
    regions = pair.backend.connections[0].memory.regions
    with Userfaultfd.open(features=Feature.MISSING_SHMEM | Feature.MINOR_SHMEM) as uffd:
        for region in regions:
            uffd.register(region.base, region.length, Mode.MISSING | Mode.MINOR)
            region.no_huge()
        try:
            yield uffd
        finally:
            for region in regions:
                uffd.unregister(region.base, region.length)


def offer(pair: Pair) -> None:
    """A request for ring 0, and its kick."""
    assert pair.memory is not None
    queue = pair.rings[0].queue
    pair.memory.write(REQUEST, bytes(16))
    network = pair.backend.connections[0].device.virtio_id == 1
    queue.offer([] if network else [(REQUEST, 16)], [(REQUEST + 4096, 2048), (REQUEST + 8192, 1)])
    queue.publish()
    pair.rings[0].kick()


async def returned(pair: Pair) -> None:
    while pair.rings[0].queue.take() is None:
        if not pair.rings[0].queue.arm():
            await asyncio.wait_for(pair.rings[0].called(), 5)


async def everything(pair: Pair, log: SharedLog, base: int) -> None:
    """What may be asked of a suspended device without starting anything."""
    frontend, ring = pair.frontend, pair.rings[0]
    assert await frontend.get_features()
    assert await frontend.get_protocol_features()
    await frontend.get_queue_num()
    await frontend.get_max_mem_slots()
    await frontend.get_config(0, 8)
    await frontend.set_log_base(log)
    await frontend.set_features(frontend.session.features | VirtioFeature.LOG_ALL.mask)
    await frontend.set_vring_num(0, ring.queue.size)
    await frontend.set_vring_base(0, base)
    user = pair.memory.map.guest_to_host  # type: ignore[union-attr]
    queue = ring.queue
    await frontend.set_vring_addr(0, desc=user(queue.desc), avail=user(queue.avail), used=user(queue.used))
    await frontend.set_vring_call(0, ring.call_fd)
    await frontend.set_vring_err(0, ring.err_fd)
    await frontend.set_vring_enable(0, False)
    await frontend.set_vring_enable(0, True)
    assert await frontend.get_vring_base(0) == base
    await frontend.set_status(0)
    await frontend.set_status(DeviceStatus.ACKNOWLEDGE)
    assert await frontend.get_status() == DeviceStatus.ACKNOWLEDGE
    await frontend.reset_device()


@pytest.fixture(params=["python", "blk", "net"])
async def device(request: pytest.FixtureRequest, tmp_path: Path) -> Device:
    match request.param:
        case "blk":
            (tmp_path / "image").write_bytes(bytes(MIB))
            return Blk(Image(tmp_path / "image"))
        case "net":
            return Net(Source())
    return Echo()


async def start(pair: Pair, base: int = 0) -> None:
    assert pair.memory is not None
    await pair.frontend.start_ring(pair.rings[0], pair.memory, base=base)
    await pair.frontend.driver_ok()


def readable_now(*fds: int) -> list[int]:
    return select.select(fds, [], [], 0)[0]


async def test_it_touches_nothing_sends_nothing_and_answers(pairs: Callable[..., Pair], device: Device) -> None:
    pair = pairs(device)
    pair.memory = SharedMemory((0, 4 * MIB))
    await pair.frontend.negotiate(DRIVABLE, DRIVABLE_PROTOCOL | ProtocolFeature.STATUS.mask)
    await pair.frontend.set_memory(pair.memory)
    ring = pair.add_ring(0)
    await start(pair)
    offer(pair)
    await returned(pair)
    ours = await channel(pair)
    base = await pair.frontend.stop_ring(ring)
    pair.rings[0].queue.arm()
    if readable_now(ring.call_fd):
        await ring.called()
    with watched(pair) as uffd, closing(SharedLog(pair.memory.end)) as log:
        offer(pair)
        device.config_changed()
        await everything(pair, log, base)
        await quiet(pair)
        assert uffd.read() == []
        assert readable_now(ring.call_fd, ring.err_fd) == []
        assert arrived(ours) == b"nothing"
        assert log.take() == []
        await start(pair, base)
        ring.kick()
        await asyncio.wait_for(readable(uffd.fileno()), 5)  # else nothing would have been seen before either
    await returned(pair)
    ours.close()
