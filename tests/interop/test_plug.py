"""What comes and goes while the guest runs: disks, memory, the guest's own state, queues on several CPUs."""

from __future__ import annotations

import asyncio
import hashlib
from typing import Any

import pytest

from vhostuser.measures import REQUESTS
from vhostuser.metrics import value_in
from vhostuser.tools.lab.backend import BackendProcess
from vhostuser.tools.lab.bench import MIB, Bench
from vhostuser.tools.lab.machine import Hardware, Machine
from vhostuser.tools.lab.workload import Disk

pytestmark = [pytest.mark.interop, pytest.mark.timeout(120)]


async def plug_disk(machine: Machine, backend: BackendProcess, port: str) -> None:
    socket = {"type": "unix", "data": {"path": str(backend.socket)}}
    address = {"type": "socket", "data": {"addr": socket, "server": False}}
    await machine.execute("chardev-add", id="plugged-socket", backend=address)
    await machine.execute(
        "device_add", driver="vhost-user-blk-pci", id="plugged", bus=port, chardev="plugged-socket", num_queues=1
    )


async def unplug_disk(machine: Machine) -> None:
    start = len(machine.events.entries)
    await machine.execute("device_del", id="plugged")
    await machine.event("DEVICE_DELETED", start=start, device="plugged")
    await machine.execute("chardev-remove", id="plugged-socket")


async def test_a_disk_is_plugged_and_pulled_while_both_are_used(bench: Bench) -> None:
    """Twice, of one back-end; the second time with requests under way."""
    image, plugged = bench.disk(16), bench.disk(8, seed=2)
    backend, other = await bench.backend(image), await bench.backend(plugged)
    machine = await bench.machine(Hardware(ports=1), backend)
    await bench.guest.booted()
    disk = Disk(bench.guest, image)
    async with disk.read_throughout(), disk.write_throughout():
        for busy in (False, True):
            await plug_disk(machine, other, "port0")
            await bench.guest.run("while ! dd if=/dev/vdb of=/dev/null bs=512 count=1; do sleep 0.1; done", within=30)
            read = await bench.guest.run("dd if=/dev/vdb bs=1M iflag=direct 2>/dev/null | md5sum")
            assert read.split()[0] == hashlib.md5(plugged.read_bytes()).hexdigest()
            if busy:
                bench.guest.start("while dd if=/dev/vdb of=/dev/null bs=64k iflag=direct; do :; done")
                await asyncio.sleep(0.3)
            await unplug_disk(machine)
    assert await other.stop(within=5) == 0


def sizes(state: dict[str, Any]) -> list[int]:
    """Of what the back-end has mapped."""
    return sorted(region["size"] for connection in state["connections"] for region in connection["regions"])


PLUGGED = 128 * MIB
TOTAL = "awk '/MemTotal/ { print $2 }'"
ONLINE = f"""\
while [ $({TOTAL.replace("{", "{{").replace("}", "}}")} /proc/meminfo) -lt {{kib}} ]; do
    for each in /sys/devices/system/memory/memory*/state; do grep -q '^online' $each || echo online >$each; done
    sleep 0.1
done"""
"""Takes into use what was plugged, until so much is there."""


async def test_memory_is_plugged_while_the_disk_is_used(bench: Bench) -> None:
    """One ADD_MEM_REG for each module, and the disk's requests lie in it too."""
    image = bench.disk(64)
    backend = await bench.backend(image)
    machine = await bench.machine(Hardware(memory=192, dimms=2), backend)
    await bench.guest.booted()
    disk = Disk(bench.guest, image)
    before = sizes(await backend.state())
    total = int(await bench.guest.run(f"{TOTAL} /proc/meminfo"))
    async with disk.read_throughout(), disk.write_throughout():
        for number in range(2):
            file = f"dimm{number}-file"
            await machine.execute("object-add", qom_type="memory-backend-memfd", id=file, size=PLUGGED, share=True)
            await machine.execute("device_add", driver="pc-dimm", id=f"dimm{number}", memdev=file)
            await bench.guest.run(ONLINE.format(kib=total + (number + 1) * PLUGGED // 1024), within=30)
        assert sizes(await backend.state()) == sorted([*before, *[PLUGGED] * 2])
        # As much as there was at the start, so that the page cache lies in what was plugged.
        await bench.guest.run("mkdir /tmp/big && mount -t tmpfs -o size=90% none /tmp/big")
        await bench.guest.run(f"dd if=/dev/zero of=/tmp/big/file bs=1M count={total // 1024} 2>/dev/null", within=60)
        read = await bench.guest.run("dd if=/dev/vda bs=1M count=32 2>/dev/null | md5sum")
        assert read.split()[0] == disk.md5(0, 32)


async def test_a_reset_in_the_middle_of_requests(bench: Bench) -> None:
    """system_reset: the guest is asked nothing, and the disk has requests under way that nobody waits for any more."""
    image = bench.disk(32)
    machine = await bench.machine(Hardware(), await bench.backend(image))
    await bench.guest.booted()
    disk = Disk(bench.guest, image)
    for _ in range(2):
        bench.guest.start("while dd if=/dev/vda of=/dev/null bs=64k iflag=direct; do :; done")
        bench.guest.start("while dd if=/dev/vda of=/dev/null bs=4k skip=77 iflag=direct; do :; done")
        await asyncio.sleep(0.3)
        boots = bench.guest.boots
        await machine.execute("system_reset")
        await bench.guest.booted(boots + 1)
        assert await disk.guest_md5(0, 32) == disk.md5(0, 32)


async def test_every_queue_is_used_by_a_cpu_of_its_own(bench: Bench) -> None:
    image = bench.disk(32)
    backend = await bench.backend(image, ["--num-queues=4"])
    await bench.machine(Hardware(cpus=4, queues=4), backend)
    await bench.guest.booted()
    disk = Disk(bench.guest, image)
    part = "dd if=/dev/vda iflag=direct bs=64k count=128 skip={} 2>/dev/null | md5sum"
    sums = await asyncio.gather(
        *(bench.guest.run(f"taskset -c {cpu} sh -c '{part.format(cpu * 128)}'") for cpu in range(4))
    )
    assert [text.split()[0] for text in sums] == [disk.md5(8 * cpu, 8) for cpu in range(4)]
    metrics = (await backend.state())["metrics"]
    assert all(value_in(metrics, REQUESTS, queue=queue) >= 128 for queue in range(4))
