"""A guest whose disk sits behind an IOMMU: QEMU's intel-iommu, Linux's driver with strict invalidation.

Every request's buffers are mapped for it and unmapped after it, so that misses, updates and invalidations come by the
thousand while requests run.
"""

import asyncio

import pytest

from vhostuser.tools.lab.bench import Bench
from vhostuser.tools.lab.machine import Hardware
from vhostuser.tools.lab.workload import Disk

pytestmark = [pytest.mark.interop, pytest.mark.timeout(120)]


async def test_a_disk_behind_an_iommu(bench: Bench) -> None:
    """The specification, "IOMMU support": what the guest maps is found, what it has unmapped is used no more."""
    image = bench.disk(16)
    backend = await bench.backend(image)
    await bench.machine(Hardware(iommu=True), backend)
    await bench.guest.booted()
    (connection,) = (await backend.state())["connections"]
    assert "ACCESS_PLATFORM" in connection["features"]
    disk = Disk(bench.guest, image)
    assert await disk.guest_md5(0, 16) == disk.md5(0, 16)
    async with disk.read_throughout(), disk.write_throughout():
        await asyncio.sleep(2)
    metrics = (await backend.state())["metrics"]
    told = next(each for each in metrics["vhostuser_message_seconds"] if each["labels"] == {"message": "IOTLB_MSG"})
    assert told["count"] > 100, "updates and invalidations came while it ran"
