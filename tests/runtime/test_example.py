"""The documented disk works, byte by byte."""

import importlib.util
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from tests.runtime.echo import DATA, next_used
from vhostuser.testing.pair import Pair

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def ramdisk() -> ModuleType:
    spec = importlib.util.spec_from_file_location("ramdisk", ROOT / "examples" / "ramdisk.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["ramdisk"] = module
    spec.loader.exec_module(module)
    return module


async def blk(pair: Pair, kind: int, sector: int, data: bytes = b"", room: int = 0) -> tuple[int, bytes]:
    """One virtio-blk request: its status and what was read."""
    assert pair.memory is not None
    memory, queue = pair.memory.map, pair.rings[0].queue
    memory.write(DATA, struct.pack("<IIQ", kind, 0, sector) + data)
    memory.write(DATA + (1 << 16) + room, b"\xff")
    queue.offer(readable=[(DATA, 16 + len(data))], writable=[(DATA + (1 << 16), room + 1)])
    queue.publish()
    pair.rings[0].kick()
    await next_used(pair)
    answer = memory.read(DATA + (1 << 16), room + 1)
    return answer[-1], answer[:-1]


async def test_the_ram_disk_reads_and_writes(ramdisk: ModuleType, pairs: Callable[..., Pair]) -> None:
    pair = pairs(ramdisk.RamDisk(1 << 20))
    await pair.set_up()
    assert await blk(pair, 1, 3, b"x" * 1024) == (0, b"")
    assert await blk(pair, 0, 2, room=2048) == (0, bytes(512) + b"x" * 1024 + bytes(512))
    assert await blk(pair, 4, 0) == (0, b"")


async def test_the_ram_disk_refuses_what_it_cannot_do(ramdisk: ModuleType, pairs: Callable[..., Pair]) -> None:
    pair = pairs(ramdisk.RamDisk(1 << 20))
    await pair.set_up()
    assert (await blk(pair, 99, 0))[0] == 2
    assert (await blk(pair, 0, 2048, room=512))[0] == 1
    assert (await blk(pair, 1, 1 << 60, b"x" * 512))[0] == 1


async def test_a_request_without_a_header_is_an_error_and_no_more(
    ramdisk: ModuleType, pairs: Callable[..., Pair]
) -> None:
    pair = pairs(ramdisk.RamDisk(1 << 20))
    await pair.set_up()
    assert pair.memory is not None
    queue = pair.rings[0].queue
    queue.offer(readable=[(DATA, 7)], writable=[(DATA + 4096, 1)])
    queue.offer(readable=[(DATA, 16)])
    queue.publish()
    pair.rings[0].kick()
    await next_used(pair)
    await next_used(pair)
    assert pair.memory.map.read(DATA + 4096, 1) == b"\1"
    assert (await blk(pair, 4, 0))[0] == 0


def test_the_example_is_about_thirty_lines() -> None:
    source = (ROOT / "examples" / "ramdisk.py").read_text()
    body = source[source.index("class RamDisk") : source.index("if __name__")]
    assert len([line for line in body.splitlines() if line.strip()]) <= 35
