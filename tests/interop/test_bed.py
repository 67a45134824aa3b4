"""The bench itself, with a back-end that is not ours: what fails here is not the fault of anything under test."""

import mmap
import os

import pytest

from vhostuser.tools.lab.backend import storage_daemon
from vhostuser.tools.lab.bench import Bench
from vhostuser.tools.lab.guest import CommandFailed
from vhostuser.tools.lab.machine import Hardware
from vhostuser.tools.lab.memory import GuestMemory
from vhostuser.tools.lab.workload import Disk, fill_md5, fill_memory

pytestmark = [pytest.mark.interop, pytest.mark.timeout(120)]


MADV_PAGEOUT = 21  # Linux 5.4; the mmap module of Python 3.11 does not have it


def test_memory_that_is_held_stays() -> None:
    """Reclaim drops what was only read, the reason for holding it; afterwards it drops nothing, and no byte is new."""
    size = 256 * mmap.PAGESIZE
    descriptor = os.memfd_create("memory-backend-memfd")
    with os.fdopen(descriptor, "r+b", buffering=0) as file, GuestMemory(os.getpid()) as memory:
        file.truncate(size)
        with mmap.mmap(file.fileno(), size) as mapping:
            content = mapping[: size // 2]
            mapping[:8] = b"received"
            mapping.madvise(MADV_PAGEOUT)
            if len(memory.pages()) >= 128:
                pytest.skip("this kernel takes no clean page back: nothing is shown by what follows")
            memory.hold()
            mapping.madvise(MADV_PAGEOUT)
            assert len(memory.pages()) == 256
            assert mapping[:] == b"received" + content[8:] + bytes(size // 2)


async def test_commands_in_the_guest(bench: Bench) -> None:
    await bench.machine(Hardware())
    await bench.guest.booted()
    assert (
        await bench.guest.run("echo one\necho 'two  \\ $((1 + 2))'; echo three >&2") == "one\ntwo  \\ $((1 + 2))\nthree"
    )
    assert len(await bench.guest.run("seq 1 20000")) == 108893
    with pytest.raises(CommandFailed, match="status 3 from: exit 3"):
        await bench.guest.run("exit 3")


async def test_precopy_with_another_back_end(bench: Bench) -> None:
    image = bench.disk(32)
    source = await bench.machine(Hardware(), await bench.backend(image, command=storage_daemon))
    await bench.guest.booted()
    fill = await fill_memory(bench.guest, 64)
    disk = Disk(bench.guest, image)
    destination = await bench.destination(Hardware(), await bench.backend(image, command=storage_daemon))
    migration = bench.migration(source, destination)
    async with disk.read_throughout(), disk.write_throughout():
        await migration.start()
        await migration.completed()
    await source.quit()
    assert await fill_md5(bench.guest) == fill
    await bench.guest.reboot()
    assert await disk.guest_md5(0, 32) == disk.md5(0, 32)
