"""Rings without descriptors: the back-end looks for requests, the driver for answers (bit 8 of their messages)."""

import asyncio
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.runtime.echo import DATA, Echo, quiet
from vhostuser.devices.blk import Blk
from vhostuser.devices.image import Image
from vhostuser.frontend import DRIVABLE, SharedMemory
from vhostuser.protocol import VirtioFeature
from vhostuser.testing.pair import MIB, Pair

pytestmark = pytest.mark.usefixtures("no_leaks")

NO_EVENT_IDX = DRIVABLE & ~VirtioFeature.RING_EVENT_IDX.mask


@pytest.fixture(params=["python", "engine"])
async def pair(request: pytest.FixtureRequest, pairs: Callable[..., Pair], tmp_path: Path) -> Pair:
    """A ring that is polled from both sides."""
    (tmp_path / "image").write_bytes(bytes(MIB))
    pair = pairs(Echo() if request.param == "python" else Blk(Image(tmp_path / "image")))
    pair.memory = SharedMemory((0, 4 * MIB))
    await pair.frontend.negotiate(NO_EVENT_IDX)
    await pair.frontend.set_memory(pair.memory)
    pair.add_ring(0)
    await start(pair)
    return pair


async def start(pair: Pair, base: int = 0) -> None:
    assert pair.memory is not None
    await pair.frontend.start_ring(pair.rings[0], pair.memory, base=base, polled=True)
    await pair.frontend.set_vring_call(0, None)


def offer(pair: Pair) -> None:
    """A request that both devices return: to one it is text, to the other a read of sector 0."""
    assert pair.memory is not None
    pair.memory.write(DATA, bytes(16))
    pair.rings[0].queue.offer([(DATA, 16)], [(DATA + 4096, 512), (DATA + 8192, 1)])
    pair.rings[0].queue.publish()


async def returned(pair: Pair) -> None:
    while pair.rings[0].queue.take() is None:
        await quiet(pair)


async def test_requests_are_served_without_any_descriptor(pair: Pair) -> None:
    for _ in range(20):
        offer(pair)
        await asyncio.wait_for(returned(pair), 5)
    with pytest.raises(BlockingIOError):
        os.eventfd_read(pair.rings[0].call_fd)


async def test_also_after_a_stop(pair: Pair) -> None:
    offer(pair)
    await asyncio.wait_for(returned(pair), 5)
    base = await pair.frontend.stop_ring(pair.rings[0])
    offer(pair)
    await quiet(pair)
    assert pair.rings[0].queue.take() is None
    await start(pair, base)
    await asyncio.wait_for(returned(pair), 5)


async def test_a_descriptor_may_come_later(pair: Pair) -> None:
    await pair.frontend.set_vring_kick(0, pair.rings[0].kick_fd)
    await pair.frontend.set_vring_call(0, pair.rings[0].call_fd)
    offer(pair)
    pair.rings[0].kick()
    await asyncio.wait_for(pair.rings[0].called(), 5)
    await asyncio.wait_for(returned(pair), 5)


async def test_a_ring_that_nobody_uses_costs_little(pair: Pair) -> None:
    """A thousand looks a second at most, when it has been idle for a while."""
    offer(pair)
    await asyncio.wait_for(returned(pair), 5)
    await asyncio.sleep(0.02)
    looked = sum(sleeps().values())
    await asyncio.sleep(0.1)
    assert sum(sleeps().values()) - looked < 300


def sleeps() -> dict[int, int]:
    """How often each thread of this process but ours has gone to sleep."""
    found = {}
    for task in Path("/proc/self/task").iterdir():
        if int(task.name) != threading.get_native_id():
            status = (task / "status").read_text()
            found[int(task.name)] = int(status.split("\nvoluntary_ctxt_switches:")[1].split()[0])
    return found
