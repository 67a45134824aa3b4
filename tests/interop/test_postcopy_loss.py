"""Postcopy in the middle of which somebody is lost: the front-end, the back-end, or the patience of who stops it."""

import asyncio
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from vhostuser.tools.lab.backend import BackendProcess, CommandLine, vhostuser_blk
from vhostuser.tools.lab.bench import Bench
from vhostuser.tools.lab.machine import Hardware, Machine
from vhostuser.tools.lab.memory import GuestMemory
from vhostuser.tools.lab.observation import waiting_threads
from vhostuser.tools.lab.workload import Disk, fill_md5, fill_memory

pytestmark = [pytest.mark.interop, pytest.mark.postcopy, pytest.mark.timeout(180)]

FILL = 96
DISK = 64

EXAMPLES = Path(__file__).parents[2] / "examples"


def ramdisk(socket: Path, image: Path, options: Sequence[str] = ()) -> list[str]:
    """The command line of the example of a device in Python."""
    return [sys.executable, str(EXAMPLES / "ramdisk.py"), f"--socket-path={socket}", *options]


devices = pytest.mark.parametrize("command", [vhostuser_blk, ramdisk], ids=["native", "python"])
READ = "while true; do echo 3 >/proc/sys/vm/drop_caches; dd if=/dev/vda of=/dev/null bs=64k; done"


async def test_back_end_killed(bench: Bench) -> None:
    """The next one is told of memory as if all of it were there: it waits until that is true, then the disk is back."""
    hardware = Hardware(reconnect=True)
    image = bench.disk(DISK)
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
        assert await _becomes(lambda: waiting_threads(backend.pid) > 0), "the back-end never waits for a page"
        backend.kill()
        await backend.ended()
        backend = await bench.backend(image, socket=backend.socket)
        await asyncio.sleep(1)
        await migration.release()
        await migration.completed()
        await bench.guest.run("dd if=/dev/vda of=/dev/null bs=64k count=16 iflag=direct", within=30)
    assert await fill_md5(bench.guest) == fill
    await bench.guest.run("echo 3 >/proc/sys/vm/drop_caches")
    assert await disk.guest_md5(0, DISK) == disk.md5(0, DISK)


@devices
async def test_front_end_killed(bench: Bench, command: CommandLine) -> None:
    """Its memory is not touched any more, no page is made up; the next front-end is served, and SIGTERM obeyed."""
    image = _image(bench, command)
    backend, destination = await _blocked_in_postcopy(bench, image, command)
    with GuestMemory(destination.pid) as memory:
        pages = memory.pages()
        destination.process.kill()
        await destination.process.ended()
        assert await _becomes(lambda: waiting_threads(backend.pid) == 0, within=2)
        assert await backend.state()
        assert memory.pages() <= pages
        content = memory.md5()
        boots = bench.guest.boots
        await bench.machine(Hardware(), backend)
        await bench.guest.booted(boots + 1)
        assert await Disk(bench.guest, image).guest_md5(0, DISK) == Disk(bench.guest, image).md5(0, DISK)
        assert memory.pages() <= pages
        assert memory.md5() == content
    assert await backend.stop(within=2) == 0


@devices
async def test_stopped_while_a_thread_waits(bench: Bench, command: CommandLine) -> None:
    backend, _ = await _blocked_in_postcopy(bench, _image(bench, command), command)
    assert await backend.stop(within=2) == 0


def _image(bench: Bench, command: CommandLine) -> Path:
    """What the disk holds: the example's is empty whenever it starts."""
    if command is vhostuser_blk:
        return bench.disk(DISK)
    image = bench.directory / "empty.img"
    with image.open("wb") as file:
        file.truncate(DISK << 20)
    return image


async def _blocked_in_postcopy(bench: Bench, image: Path, command: CommandLine) -> tuple[BackendProcess, Machine]:
    """A destination in postcopy to which no page comes any more, and its back-end, a thread of which waits for one."""
    source = await bench.machine(Hardware(), await bench.backend(image, command=command))
    await bench.guest.booted()
    await fill_memory(bench.guest, FILL)
    # Memory that holds what is read from an empty disk would cost nothing to send, and nobody would wait for it.
    await bench.guest.run(f"dd if=/tmp/fill of=/dev/vda bs=1M count={DISK} conv=fsync")
    backend = await bench.backend(image, command=command)
    destination = await bench.destination(Hardware(), backend)
    migration = bench.migration(source, destination, postcopy=True)
    bench.guest.start(READ)
    await migration.start()
    await migration.switch()
    await _stop_on_a_fault(source, backend)
    return backend, destination


async def _stop_on_a_fault(source: Machine, backend: BackendProcess) -> None:
    """Stop the source while a thread of the back-end waits for a page that has not been sent yet."""
    for _ in range(50):
        assert await _becomes(lambda: waiting_threads(backend.pid) > 0), "the back-end never waits for a page"
        source.process.send(signal.SIGSTOP)
        # What was on its way arrives.
        await asyncio.sleep(0.2)
        if waiting_threads(backend.pid):
            return
        source.process.send(signal.SIGCONT)
    pytest.fail("each page that the back-end waited for was on its way already")


async def _becomes(condition: Callable[[], bool], within: float = 30) -> bool:
    """Whether the condition holds within so many seconds."""
    deadline = time.monotonic() + within
    while not condition():
        if time.monotonic() > deadline:
            return False
        await asyncio.sleep(0.005)
    return True
