"""The broken back-ends (``broken/``) are disks like any other until memory has holes: only postcopy shows the fault."""

from __future__ import annotations

import ast
import asyncio
import re
import struct
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.devices.test_program import PATIENCE, Program
from vhostuser.driverqueue import DriverQueue
from vhostuser.frontend import DRIVABLE, Frontend, FrontendRing, SharedMemory

BROKEN = sorted((Path(__file__).parent / "broken").glob("*.py"))
CONTENT = b"\5" * 8192
EVENT_IDX = 1 << 29
HEADERS, STATUSES, DATA = 0x8000, 0x9000, 0x10000

every_one = pytest.mark.parametrize("script", BROKEN, ids=lambda script: script.stem)


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    image = tmp_path / "disk.img"
    image.write_bytes(CONTENT + bytes(len(CONTENT)))
    return image


@pytest.fixture
def socket_of(request: pytest.FixtureRequest, tmp_path: Path, disk: Path) -> Iterator[Path]:
    """Of the back-end, which runs."""
    path = tmp_path / "s"
    program = Program(
        [f"--socket-path={path}", f"--blk-file={disk}"],
        tmp_path / "notify",
        command=[sys.executable, str(request.getfixturevalue("script"))],
    )
    yield path
    program.process.kill()
    program.process.communicate()


@every_one
def test_it_says_which_verdict_it_must_get(script: Path) -> None:
    text = ast.get_docstring(ast.parse(script.read_text()))
    assert text is not None
    assert text.startswith("A broken back-end: ")
    assert re.search(r"^Verdict: [a-z]+(-[a-z]+)*\.\Z", text, re.MULTILINE)


@every_one
async def test_it_is_a_disk_like_any_other(script: Path, socket_of: Path, disk: Path) -> None:
    """Twice what it holds in its first half is read, and written to its second."""
    memory = SharedMemory((0, 1 << 20))
    ring = FrontendRing(0, DriverQueue(memory.map, 0, 16))
    async with await Frontend.connect(str(socket_of)) as frontend:
        await frontend.negotiate(features=DRIVABLE & ~EVENT_IDX)
        await frontend.set_memory(memory)
        await frontend.start_ring(ring, memory)
        await ask(ring, memory, 0, write=False)
        await ask(ring, memory, 1, write=True)
        await frontend.get_features()
        await frontend.stop_ring(ring)
    assert memory.map.read(DATA, len(CONTENT)) == CONTENT
    assert await asyncio.to_thread(disk.read_bytes) == CONTENT * 2
    ring.close()
    memory.close()


async def ask(ring: FrontendRing, memory: SharedMemory, number: int, *, write: bool) -> None:
    """One request over all of the content, at its first place for a read, at its second for a write."""
    header, status = HEADERS + 16 * number, STATUSES + number
    memory.map.write(header, struct.pack("<IIQ", write, 0, write * len(CONTENT) // 512))
    memory.map.write(status, b"\xff")
    data = [(DATA, len(CONTENT))]
    readable, writable = [(header, 16)], [(status, 1)]
    ring.queue.offer(readable + data * write, data * (not write) + writable)
    ring.queue.publish()
    ring.kick()
    async with asyncio.timeout(PATIENCE):
        while ring.queue.take() is None:
            await ring.called()
    assert memory.map.read(status, 1) == b"\0"
