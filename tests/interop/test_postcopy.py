"""Live migration by postcopy: the back-end meets missing pages, waits for them, and goes on with the right bytes."""

import asyncio

import pytest

from vhostuser.tools.lab.backend import BackendProcess
from vhostuser.tools.lab.bench import Bench
from vhostuser.tools.lab.machine import Hardware
from vhostuser.tools.lab.migration import Migration
from vhostuser.tools.lab.observation import observe_postcopy
from vhostuser.tools.lab.workload import Disk, fill_md5, fill_memory

pytestmark = [pytest.mark.interop, pytest.mark.postcopy, pytest.mark.timeout(180)]

FILL = 96

# QEMU announces memory in one of two ways, as the back-end offers CONFIGURE_MEM_SLOTS or not.
WITHOUT_SLOTS = ["--mem-slots=0"]


class Scene:
    """A guest whose memory is full of bytes that are known, and a destination that waits for it."""

    def __init__(self, bench: Bench, hardware: Hardware, options: list[str]) -> None:
        self.bench = bench
        self.hardware = hardware
        self.image = bench.disk(64)
        self.disk = Disk(bench.guest, self.image)
        self._options = options

    async def set(self, *capabilities: str) -> Migration:
        """Boot, fill, prepare; the migration is not yet started."""
        source = await self.bench.machine(self.hardware, await self._backend())
        await self.bench.guest.booted()
        self.fill = await fill_memory(self.bench.guest, FILL)
        self.backend = await self._backend()
        self.destination = await self.bench.destination(self.hardware, self.backend)
        return self.bench.migration(source, self.destination, postcopy=True, capabilities=capabilities)

    async def _backend(self) -> BackendProcess:
        return await self.bench.backend(self.image, self._options)

    async def check(self) -> None:
        """Nothing in the guest's memory and nothing on the disk is wrong, and the disk works."""
        assert await fill_md5(self.bench.guest) == self.fill
        await self.bench.guest.run("sync; echo 3 >/proc/sys/vm/drop_caches")
        assert await self.disk.guest_md5(0, 64) == self.disk.md5(0, 64)


@pytest.mark.parametrize(
    ("options", "hardware"),
    [
        pytest.param([], Hardware(), id="add-mem-reg-4k"),
        pytest.param([], Hardware(hugepages=True), id="add-mem-reg-2m"),
        pytest.param([], Hardware(packed=True), id="add-mem-reg-4k-packed"),
        pytest.param(WITHOUT_SLOTS, Hardware(), id="set-mem-table-4k"),
        pytest.param(WITHOUT_SLOTS, Hardware(hugepages=True), id="set-mem-table-2m"),
    ],
)
async def test_faults_are_served(bench: Bench, options: list[str], hardware: Hardware) -> None:
    """While the state is postcopy-active: faults served, requests completed, every base right, no byte wrong."""
    faults, requests = (5, 50) if hardware.hugepages else (20, 100)
    scene = Scene(bench, hardware, options)
    migration = await scene.set()
    async with scene.disk.read_throughout():
        # The pages that hold them are missing when the back-end is told to write them to the disk.
        await scene.disk.hold_dirty(8)
        await migration.start()
        await migration.switch()
        flushed = bench.guest.run("sync", within=120)
        seen, _ = await asyncio.gather(
            observe_postcopy(migration, scene.backend, faults=faults, requests=requests), flushed
        )
    assert seen.bases
    assert not seen.wrong_bases
    assert seen.faults >= faults
    assert seen.requests >= requests
    assert await fill_md5(bench.guest, 8) == scene.disk.md5(scene.disk.writable, 8)
    await scene.check()


async def test_guest_reboots_in_postcopy(bench: Bench) -> None:
    """The guest's reset takes all rings down and brings them up again while pages are missing."""
    scene = Scene(bench, Hardware(), [])
    migration = await scene.set()
    # What it makes dirty is what will be missing: enough for the time that a boot takes.
    bench.guest.start("while dd if=/dev/urandom of=/tmp/churn bs=1M count=64 conv=notrunc; do :; done")
    bench.guest.start("while dd if=/dev/vda of=/dev/null bs=64k; do echo 3 >/proc/sys/vm/drop_caches; done")
    await migration.start()
    await migration.switch()
    await bench.guest.reboot()
    assert (await migration.progress())["status"] == "postcopy-active", "the guest has rebooted too late"
    assert await scene.disk.guest_md5(0, 64) == scene.disk.md5(0, 64)
    await migration.release()
    await migration.completed()
    await bench.guest.run("echo 3 >/proc/sys/vm/drop_caches")
    assert await scene.disk.guest_md5(0, 64) == scene.disk.md5(0, 64)


async def test_precopy_after_advise(bench: Bench) -> None:
    """Postcopy was announced to the back-end and never came: no LISTEN, no END, an ordinary memory table."""
    scene = Scene(bench, Hardware(), [])
    migration = await scene.set()
    async with scene.disk.read_throughout():
        await migration.start()
        await migration.release()
        await migration.completed()
    await scene.check()


async def test_pause_and_recovery(bench: Bench) -> None:
    """The connection between the hosts breaks in postcopy; for the back-end that is a longer wait and nothing else."""
    scene = Scene(bench, Hardware(), [])
    migration = await scene.set()
    async with scene.disk.read_throughout():
        await migration.start()
        await migration.switch()
        await migration.pause()
        assert await scene.backend.state()
        await migration.recover()
        await migration.release()
        await migration.completed()
    await scene.check()


async def test_preempt(bench: Bench) -> None:
    """Requested pages come over a channel of their own: QEMU then waits until no request of a back-end is left."""
    scene = Scene(bench, Hardware(), [])
    migration = await scene.set("postcopy-preempt")
    async with scene.disk.read_throughout():
        await migration.start()
        await migration.switch()
        seen = await observe_postcopy(migration, scene.backend, faults=20)
    assert seen.faults >= 20
    await scene.check()
