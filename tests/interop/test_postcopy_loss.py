"""Postcopy in the middle of which somebody is lost: the front-end, the back-end, or the patience of who stops it."""

import asyncio
import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from vhostuser.tools.lab.backend import BackendProcess
from vhostuser.tools.lab.bench import Bench
from vhostuser.tools.lab.machine import Hardware, Machine
from vhostuser.tools.lab.observation import waiting_threads
from vhostuser.tools.lab.workload import Disk, fill_md5, fill_memory

pytestmark = [pytest.mark.interop, pytest.mark.postcopy, pytest.mark.timeout(180)]

FILL = 96
READ = "while true; do echo 3 >/proc/sys/vm/drop_caches; dd if=/dev/vda of=/dev/null bs=1M; done"


async def test_back_end_killed(bench: Bench) -> None:
    """The next one is told of memory as if all of it were there: it waits until that is true, then the disk is back."""
    hardware = Hardware(reconnect=True)
    image = bench.disk(64)
    disk = Disk(bench.guest, image)
    source = await bench.machine(hardware, await bench.backend(image))
    await bench.guest.booted()
    fill = await fill_memory(bench.guest, FILL)
    backend = await bench.backend(image)
    destination = await bench.destination(hardware, backend)
    migration = bench.migration(source, destination, postcopy=True)
    async with disk.read_throughout():
        await migration.start()
        await migration.switch()
        await asyncio.sleep(0.5)
        backend.kill()
        await backend.ended()
        backend = await bench.backend(image, socket=backend.socket)
        await migration.completed()
        await bench.guest.run("dd if=/dev/vda of=/dev/null bs=64k count=16 iflag=direct", within=30)
    assert await fill_md5(bench.guest) == fill
    await bench.guest.run("echo 3 >/proc/sys/vm/drop_caches")
    assert await disk.guest_md5(0, 64) == disk.md5(0, 64)


async def test_front_end_killed(bench: Bench) -> None:
    """Its memory is not touched any more, no page is made up; the next front-end is served, and SIGTERM obeyed."""
    backend, destination = await _blocked_in_postcopy(bench)
    with GuestMemory(destination) as memory:
        allocated = memory.allocated()
        destination.process.kill()
        await destination.process.ended()
        assert await _none_waits(backend)
        assert await backend.state()
        assert memory.allocated() == allocated
        content = memory.md5()
        boots = bench.guest.boots
        await bench.machine(Hardware(), backend)
        await bench.guest.booted(boots + 1)
        image = bench.directory / "disk0.img"
        assert await Disk(bench.guest, image).guest_md5(0, 64) == Disk(bench.guest, image).md5(0, 64)
        assert (memory.allocated(), memory.md5()) == (allocated, content)
    assert await backend.stop(within=2) == 0


async def test_stopped_while_a_thread_waits(bench: Bench) -> None:
    backend, _ = await _blocked_in_postcopy(bench)
    assert await backend.stop(within=2) == 0


class GuestMemory:
    """The file behind a machine's memory, which outlives the machine as long as this is open."""

    def __init__(self, machine: Machine) -> None:
        links = Path(f"/proc/{machine.pid}/fd").iterdir()
        (path,) = [link for link in links if link.readlink().name.startswith("memfd:memory-backend-memfd")]
        self._file = path.open("rb", buffering=0)

    def __enter__(self) -> "GuestMemory":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def allocated(self) -> int:
        """Blocks of 512 bytes that it has."""
        return os.fstat(self._file.fileno()).st_blocks

    def md5(self) -> str:
        """The checksum of its content; a read makes no pages where there are none."""
        self._file.seek(0)
        return hashlib.file_digest(self._file, "md5").hexdigest()


async def _blocked_in_postcopy(bench: Bench) -> tuple[BackendProcess, Machine]:
    """A destination in postcopy to which no page comes any more, and its back-end, a thread of which waits for one."""
    hardware = Hardware(cpus=2)
    image = bench.disk(64)
    source = await bench.machine(hardware, await bench.backend(image))
    await bench.guest.booted()
    await fill_memory(bench.guest, FILL)
    backend = await bench.backend(image)
    destination = await bench.destination(hardware, backend)
    migration = bench.migration(source, destination, postcopy=True)
    bench.guest.start(READ)
    await migration.start()
    await migration.switch()
    async with asyncio.timeout(60):
        await migration.pause()
        while not await _waits(backend):
            await migration.recover()
            await migration.pause()
    return backend, destination


async def _waits(backend: BackendProcess) -> bool:
    """Whether a thread of it waits for a page within a second: the guest may be the one that waits, and ask no more."""
    return await _within_a_second(lambda: waiting_threads(backend.pid) > 0)


async def _none_waits(backend: BackendProcess) -> bool:
    """Whether within a second no thread of it waits for a page any more."""
    return await _within_a_second(lambda: waiting_threads(backend.pid) == 0)


async def _within_a_second(condition: Callable[[], bool]) -> bool:
    for _ in range(100):
        if condition():
            return True
        await asyncio.sleep(0.01)
    return False
