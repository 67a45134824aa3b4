"""The disk as the guest's Linux sees and uses it; every byte is compared with the image on the host."""

import asyncio
import base64
import hashlib
import subprocess
from pathlib import Path

import pytest

from vhostuser.devices.blk import REQUESTS
from vhostuser.metrics import value_in
from vhostuser.tools.lab.bench import MIB, Bench
from vhostuser.tools.lab.guest import CommandFailed
from vhostuser.tools.lab.machine import Hardware
from vhostuser.tools.lab.workload import Disk

pytestmark = [pytest.mark.interop, pytest.mark.timeout(120)]

# The 512-byte blocks by which st_blocks may grow when an extent is split: ext4 counts its tree as the file's.
EXTENT_TREE = 128


async def test_reads_and_writes(bench: Bench) -> None:
    """Buffered and direct, whole and in part, all bytes are where the other side put them."""
    image = bench.disk(64)
    await bench.machine(Hardware(), await bench.backend(image))
    await bench.guest.booted()
    disk = Disk(bench.guest, image)
    assert await disk.guest_md5(0, 64) == disk.md5(0, 64)
    direct = "dd if=/dev/vda iflag=direct bs=512 skip=12345 count=77 2>/dev/null | md5sum"
    expected = hashlib.md5(image.read_bytes()[12345 * 512 : (12345 + 77) * 512]).hexdigest()
    assert (await bench.guest.run(direct)).split()[0] == expected
    async with disk.read_throughout(), disk.write_throughout():
        await asyncio.sleep(2)


async def test_a_legacy_driver(bench: Bench) -> None:
    """Without VERSION_1: what its driver reads and writes is the same."""
    image = bench.disk(16)
    backend = await bench.backend(image)
    await bench.machine(Hardware(legacy=True), backend)
    await bench.guest.booted()
    disk = Disk(bench.guest, image)
    assert await disk.guest_md5(0, 16) == disk.md5(0, 16)
    async with disk.write_throughout():
        await asyncio.sleep(1)
    (connection,) = (await backend.state())["connections"]
    assert "VERSION_1" not in connection["features"].split()


@pytest.mark.parametrize("options", [["--cache=writethrough"], ["--cache=direct"]], ids=lambda options: options[0])
async def test_cache_modes(bench: Bench, options: list[str]) -> None:
    image = bench.disk(32)
    await bench.machine(Hardware(), await bench.backend(image, options))
    await bench.guest.booted()
    disk = Disk(bench.guest, image)
    async with disk.read_throughout(), disk.write_throughout():
        await asyncio.sleep(1)
    expected = "write through" if "writethrough" in options[0] else "write back"
    assert await bench.guest.run("cat /sys/block/vda/queue/write_cache") == expected


async def test_flush_and_cache_toggle(bench: Bench) -> None:
    """fsync in the guest is a flush of the back-end's, until the guest switches the cache to write-through."""
    image = bench.disk(8)
    backend = await bench.backend(image)
    await bench.machine(Hardware(), backend)
    await bench.guest.booted()

    async def flushes() -> int:
        return int(value_in((await backend.state())["metrics"], REQUESTS, kind="flushes"))

    async def flushes_after_write() -> int:
        before = await flushes()
        await bench.guest.run("dd if=/dev/urandom of=/dev/vda bs=64k count=1 conv=notrunc,fsync")
        return await flushes() - before

    assert await flushes_after_write() >= 1
    await bench.guest.run("echo 'write through' >/sys/class/block/vda/cache_type")
    assert (await backend.state())["device"]["writeback"] is False
    assert await flushes_after_write() == 0


async def test_discard(bench: Bench) -> None:
    """What the guest discards reads as zeros and is a hole in the image; its neighbours are untouched."""
    image = bench.disk(32)
    before = image.read_bytes()
    await bench.machine(Hardware(), await bench.backend(image))
    await bench.guest.booted()
    allocated = image.stat().st_blocks
    await bench.guest.run(f"blkdiscard -o {4 * MIB} -l {8 * MIB} /dev/vda")
    expected = before[: 4 * MIB] + bytes(8 * MIB) + before[12 * MIB :]
    assert image.read_bytes() == expected
    assert allocated - image.stat().st_blocks >= 8 * MIB // 512 - EXTENT_TREE
    assert await Disk(bench.guest, image).guest_md5(0, 32) == hashlib.md5(expected).hexdigest()


FALLOC_FL_PUNCH_HOLE_KEEP_SIZE = 3
FALLOC_FL_ZERO_RANGE_KEEP_SIZE = 17

# busybox has nothing that writes zeroes by a request of their own. Without a C library it is small enough for the
# guest's serial port.
FALLOCATE = """
static long call(long number, long a, long b, long c, long d)
{
    register long fourth __asm__("r10") = d;
    long result;
    __asm__ volatile("syscall" : "=a"(result) : "a"(number), "D"(a), "S"(b), "d"(c), "r"(fourth)
                     : "rcx", "r11", "memory");
    return result;
}

void _start(void)
{
    long disk = call(2 /* open */, (long)"/dev/vda", 2, 0, 0);
    call(60 /* exit */, call(285 /* fallocate */, disk, MODE, OFFSET, LENGTH) != 0, 0, 0, 0);
}
"""


def fallocate(directory: Path, mode: int, offset: int, length: int) -> str:
    """The command that calls fallocate(2) on the disk: a write-zeroes request, with UNMAP if it is to punch a hole."""
    program = directory / "fallocate"
    numbers = [f"-DMODE={mode}", f"-DOFFSET={offset}", f"-DLENGTH={length}"]
    command = ["gcc", "-O1", "-static", "-nostdlib", "-s", "-Wl,--build-id=none", "-x", "c", "-", "-o", str(program)]
    subprocess.run([*command, *numbers], input=FALLOCATE, text=True, check=True)
    text = base64.b64encode(program.read_bytes()).decode()
    return f"echo {text} | base64 -d >/tmp/fallocate && chmod +x /tmp/fallocate && /tmp/fallocate"


async def test_write_zeroes(bench: Bench) -> None:
    """Zeroes that are to stay allocated and zeroes that are not, and nothing beside them."""
    image = bench.disk(32)
    content = bytearray(image.read_bytes())
    backend = await bench.backend(image)
    await bench.machine(Hardware(), backend)
    await bench.guest.booted()

    async def zeroed(mode: int, offset: int) -> int:
        """Zeroes 4 MiB; the 512-byte blocks by which the image became smaller."""
        before = image.stat().st_blocks
        await bench.guest.run(fallocate(bench.directory, mode, offset, 4 * MIB))
        content[offset : offset + 4 * MIB] = bytes(4 * MIB)
        assert image.read_bytes() == content
        return before - image.stat().st_blocks

    assert abs(await zeroed(FALLOC_FL_ZERO_RANGE_KEEP_SIZE, 4 * MIB)) <= EXTENT_TREE
    assert await zeroed(FALLOC_FL_PUNCH_HOLE_KEEP_SIZE, 16 * MIB) >= 4 * MIB // 512 - EXTENT_TREE
    assert value_in((await backend.state())["metrics"], REQUESTS, kind="write_zeroes") >= 2
    assert await Disk(bench.guest, image).guest_md5(0, 32) == hashlib.md5(content).hexdigest()


async def test_what_the_options_promise(bench: Bench) -> None:
    """Serial number, block size, several queues on several CPUs, and the new size of an image that grew."""
    image = bench.disk(32)
    options = ["--serial=vhu-disk-7", "--block-size=4096", "--num-queues=2"]
    await bench.machine(Hardware(cpus=2, queues=2), await bench.backend(image, options))
    await bench.guest.booted()
    attributes = "cd /sys/block/vda; echo $(cat serial) $(cat queue/logical_block_size size; ls mq | wc -l)"
    seen = await bench.guest.run(attributes)
    assert seen.split() == ["vhu-disk-7", "4096", str(32 * MIB // 512), "2"]
    disk = Disk(bench.guest, image)
    half = "dd if=/dev/vda iflag=direct bs=1M count=16 skip={} 2>/dev/null | taskset -c {} md5sum"
    sums = await asyncio.gather(*(bench.guest.run(half.format(cpu * 16, cpu)) for cpu in (0, 1)))
    assert [text.split()[0] for text in sums] == [disk.md5(0, 16), disk.md5(16, 16)]
    with image.open("r+b") as file:
        file.truncate(48 * MIB)
    await bench.guest.run(f"while [ $(cat /sys/block/vda/size) != {48 * MIB // 512} ]; do sleep 0.1; done", within=20)


async def test_read_only(bench: Bench) -> None:
    """A disk served read-only cannot be written, and the image stays what it was."""
    image = bench.disk(8)
    before = image.read_bytes()
    await bench.machine(Hardware(), await bench.backend(image, ["--read-only"]))
    await bench.guest.booted()
    assert await bench.guest.run("cat /sys/block/vda/ro") == "1"
    with pytest.raises(CommandFailed):
        await bench.guest.run("dd if=/dev/zero of=/dev/vda bs=4k count=1 conv=fsync")
    assert await Disk(bench.guest, image).guest_md5(0, 8) == hashlib.md5(before).hexdigest()
    assert image.read_bytes() == before
