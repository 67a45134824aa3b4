"""Ends and beginnings: the guest reboots, the back-end goes and comes back under QEMU's reconnect."""

import asyncio
import signal

import pytest

from vhostuser.tools.lab.bench import Bench
from vhostuser.tools.lab.machine import Hardware
from vhostuser.tools.lab.workload import Disk

pytestmark = [pytest.mark.interop, pytest.mark.timeout(120)]


async def test_guest_reboots(bench: Bench) -> None:
    """Also in the middle of I/O: the next boot finds the disk as it is on the host."""
    image = bench.disk(32)
    await bench.machine(Hardware(), await bench.backend(image))
    await bench.guest.booted()
    disk = Disk(bench.guest, image)
    for _ in range(2):
        bench.guest.start("while dd if=/dev/vda of=/dev/null bs=64k iflag=direct; do :; done")
        await asyncio.sleep(0.5)
        await bench.guest.reboot()
        assert await disk.guest_md5(0, 32) == disk.md5(0, 32)


@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
@pytest.mark.parametrize(("end", "times"), [(signal.SIGTERM, 3), (signal.SIGKILL, 10)], ids=["SIGTERM", "SIGKILL"])
async def test_back_end_restarts_under_load(bench: Bench, end: signal.Signals, times: int, packed: bool) -> None:
    """The next one serves the requests that were under way: the guest sees no error and no wrong byte."""
    image = bench.disk(32)
    backend = await bench.backend(image)
    await bench.machine(Hardware(reconnect=True, packed=packed), backend)
    await bench.guest.booted()
    disk = Disk(bench.guest, image)
    async with disk.read_throughout(), disk.write_throughout():
        for _ in range(times):
            backend.send(end)
            await backend.ended()
            backend = await bench.backend(image, socket=backend.socket)
            # QEMU 7.2 never tries again when it loses a back-end while it still sets it up, so that has to be over.
            await bench.guest.run("dd if=/dev/vda of=/dev/null bs=64k count=16 iflag=direct", within=30)
    assert await disk.guest_md5(0, 32) == disk.md5(0, 32)


async def test_front_ends_come_and_go(bench: Bench) -> None:
    """One back-end serves one machine after another, whether they end well or are killed."""
    image = bench.disk(8)
    backend = await bench.backend(image)
    for ending in ("quit", "kill", "quit"):
        boots = bench.guest.boots
        machine = await bench.machine(Hardware(), backend)
        await bench.guest.booted(boots + 1)
        assert await Disk(bench.guest, image).guest_md5(0, 8) == Disk(bench.guest, image).md5(0, 8)
        if ending == "kill":
            machine.process.kill()
            await machine.process.ended()
        else:
            await machine.quit()
    assert await backend.stop(within=2) == 0
