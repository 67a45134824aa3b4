"""Packed rings from end to end: negotiated, served in C and in Python, stopped and started again, tracked in flight."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.runtime.echo import DATA, next_used
from vhostuser.device import Device
from vhostuser.devices.blk import Blk
from vhostuser.devices.image import Image
from vhostuser.drivers.blk import SECTOR, BlkDriver, Disk
from vhostuser.frontend import DRIVABLE
from vhostuser.protocol import LocalProtocolError, VirtioFeature
from vhostuser.testing.pair import MIB, Pair
from vhostuser.virtqueue import Request

pytestmark = pytest.mark.usefixtures("no_leaks")

PACKED = DRIVABLE | VirtioFeature.RING_PACKED.mask


class Echo(Device):
    async def handle(self, request: Request) -> None:
        request.write(request.read())


@pytest.mark.parametrize("size", [7, 64])
@pytest.mark.parametrize("indirect", [False, True])
async def test_a_disk_is_served_and_goes_on_where_it_stopped(
    pairs: Callable[..., Pair], tmp_path: Path, size: int, indirect: bool
) -> None:
    path = tmp_path / "disk"
    path.write_bytes(bytes(MIB))
    pair = pairs(Blk(Image(path)))
    await pair.set_up(features=PACKED, size=size, indirect=indirect)
    assert pair.memory is not None
    (ring,) = pair.rings
    disk = Disk(ring, BlkDriver(ring.queue, MIB, depth=2))
    for turn in range(3):
        for sector in range(20):
            await disk.write(sector, bytes([turn, sector]) * (SECTOR // 2))
        assert await disk.read(0, 20) == b"".join(bytes([turn, sector]) * (SECTOR // 2) for sector in range(20))
        base = await pair.frontend.stop_ring(ring)
        assert base >> 16 == base & 0xFFFF, "all was returned"
        await pair.frontend.start_ring(ring, pair.memory, base=base)


async def test_a_device_in_python(pairs: Callable[..., Pair]) -> None:
    pair = pairs(Echo())
    await pair.set_up(features=PACKED, size=5)
    assert pair.memory is not None
    for turn in range(20):
        pair.memory.map.write(DATA, bytes([turn]) * 9)
        pair.rings[0].queue.offer([(DATA, 9)], [(DATA + 4096, 16)])
        if pair.rings[0].queue.publish():
            pair.rings[0].kick()
        assert (await next_used(pair))[1] == 9
        assert pair.memory.map.read(DATA + 4096, 9) == bytes([turn]) * 9


async def test_what_was_in_flight_comes_to_the_next_back_end(pairs: Callable[..., Pair]) -> None:
    """Its layout follows from the features that were negotiated before it was asked for."""
    pair = pairs(Echo())
    await pair.set_up(features=PACKED, enable=False)
    with await pair.frontend.get_inflight_fd(1, 64) as buffer:
        await pair.frontend.set_inflight_fd(buffer)
        await pair.frontend.set_vring_enable(0, True)
        queue = pair.rings[0].queue
        queue.offer([(DATA, 9)], [(DATA + 4096, 16)])
        queue.publish()
        pair.rings[0].kick()
        assert (await next_used(pair))[1] == 9
    assert pair.backend is not None


async def test_a_ring_of_the_other_format_is_not_set_up(pairs: Callable[..., Pair]) -> None:
    pair = pairs(Echo())
    await pair.set_up()
    with pytest.raises(LocalProtocolError, match="ring 0 is split, which was not negotiated"):
        await pair.frontend.set_features(PACKED & await pair.frontend.get_features())
        await pair.frontend.start_ring(pair.rings[0], pair.memory)  # type: ignore[arg-type]
