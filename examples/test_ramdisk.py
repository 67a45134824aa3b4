"""Tests of the RAM disk: no virtual machine, no socket file, no root. Run with: pytest test_ramdisk.py"""

from collections.abc import Callable

import pytest
from ramdisk import RamDisk

from vhostuser.drivers.blk import BlkDriver, BlkRequest, BlkStatus, Disk
from vhostuser.testing.pair import Pair

pytest_plugins = ["vhostuser.testing.plugin"]
pytestmark = [pytest.mark.asyncio, pytest.mark.usefixtures("no_leaks")]


async def connected(pairs: Callable[..., Pair]) -> Disk:
    """The driver's side of a disk of 1 MiB; buffers lie from 1 MiB of guest memory on."""
    pair = pairs(RamDisk(1 << 20))
    await pair.set_up()
    return Disk(pair.rings[0], BlkDriver(pair.rings[0].queue, 1 << 20))


async def test_what_was_written_is_read(pairs: Callable[..., Pair]) -> None:
    disk = await connected(pairs)
    await disk.write(3, b"x" * 1024)
    assert await disk.read(2, 4) == bytes(512) + b"x" * 1024 + bytes(512)


async def test_a_sector_behind_the_end_is_an_error(pairs: Callable[..., Pair]) -> None:
    disk = await connected(pairs)
    assert (await disk.request(BlkRequest.read(2048, 1))).status == BlkStatus.IOERR


async def test_an_unknown_request_is_refused_and_the_next_is_served(pairs: Callable[..., Pair]) -> None:
    disk = await connected(pairs)
    assert (await disk.request(BlkRequest(99))).status == BlkStatus.UNSUPP
    assert await disk.read(0, 1) == bytes(512)
