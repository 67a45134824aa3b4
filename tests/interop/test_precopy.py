"""Live migration by precopy: all that a back-end writes to guest memory must be in the dirty log."""

import asyncio

import pytest

from vhostuser.devices.blk import REQUESTS
from vhostuser.metrics import value_in
from vhostuser.tools.lab.backend import BackendProcess
from vhostuser.tools.lab.bench import Bench
from vhostuser.tools.lab.machine import Hardware, Machine
from vhostuser.tools.lab.workload import Disk, fill_md5, fill_memory

pytestmark = [pytest.mark.interop, pytest.mark.timeout(180)]

HARDWARE = Hardware()


@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
async def test_disk_used_throughout(bench: Bench, packed: bool) -> None:
    """Reads, writes and flushes go on, and afterwards guest memory and image hold what they should."""
    image, hardware = bench.disk(64), Hardware(packed=packed)
    source = await bench.machine(hardware, await bench.backend(image))
    await bench.guest.booted()
    fill = await fill_memory(bench.guest, 64)
    disk = Disk(bench.guest, image)
    destination = await bench.destination(hardware, await bench.backend(image))
    migration = bench.migration(source, destination, bandwidth=60_000_000)
    async with disk.read_throughout(), disk.write_throughout():
        await migration.start()
        await migration.hold(remaining=16 << 20)
        await asyncio.sleep(1)
        await migration.release()
        await migration.completed()
        await source.quit()
    assert await fill_md5(bench.guest) == fill
    await bench.guest.run("sync; echo 3 >/proc/sys/vm/drop_caches")
    assert await disk.guest_md5(0, 64) == disk.md5(0, 64)


async def test_dirty_log_is_complete(bench: Bench) -> None:
    """What the back-end puts into the guest's page cache when all memory has been sent once is sent again.

    After the migration it comes from guest memory: the destination's back-end has nothing to read.
    """
    image = bench.disk(64)
    source = await bench.machine(HARDWARE, await bench.backend(image))
    await bench.guest.booted()
    disk = Disk(bench.guest, image)
    other = await bench.backend(image)
    destination = await bench.destination(HARDWARE, other)
    migration = bench.migration(source, destination, bandwidth=20_000_000)
    # The kernel forgets what it has read of a disk when the last one closes it.
    bench.guest.start("sleep 600 </dev/vda")
    # Faster than it can be sent, so that there is no end before there is to be one.
    bench.guest.start("while [ ! -e /tmp/stop ]; do dd if=/dev/urandom of=/tmp/churn bs=1M count=16 conv=notrunc; done")
    await migration.start()
    await source.event("MIGRATION_PASS", **{"pass": 2})
    await bench.guest.run("dd if=/dev/vda of=/dev/null bs=1M; touch /tmp/stop")
    assert (await migration.progress())["status"] == "active"
    await migration.release()
    await migration.completed()
    reads = value_in((await other.state())["metrics"], REQUESTS, kind="reads")
    assert await disk.guest_md5(0, 64) == disk.md5(0, 64)
    assert value_in((await other.state())["metrics"], REQUESTS, kind="reads") == reads


async def test_there_and_back_ten_times(bench: Bench) -> None:
    """Ten migrations in a row, a new back-end for each, with reads and writes going on all the while."""
    image = bench.disk(32)
    machine = await bench.machine(HARDWARE, await bench.backend(image))
    await bench.guest.booted()
    fill = await fill_memory(bench.guest, 32)
    disk = Disk(bench.guest, image)
    async with disk.read_throughout(), disk.write_throughout():
        for _ in range(10):
            machine = await _migrate(bench, machine, await bench.backend(image))
    assert await fill_md5(bench.guest) == fill
    await bench.guest.run("sync; echo 3 >/proc/sys/vm/drop_caches")
    assert await disk.guest_md5(0, 32) == disk.md5(0, 32)


async def _migrate(bench: Bench, source: Machine, backend: BackendProcess) -> Machine:
    destination = await bench.destination(HARDWARE, backend)
    migration = bench.migration(source, destination)
    await migration.start()
    await migration.completed()
    await source.quit()
    return destination
