"""A back-end that is killed at any moment and restarted with the in-flight region loses no request and repeats none."""

import asyncio
import contextlib
import os
import random
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from vhostuser.driverqueue import DriverQueue
from vhostuser.frontend import DRIVABLE, Frontend, FrontendRing, SharedMemory
from vhostuser.protocol import FrontendRequest, Inflight, Payload, VirtioFeature
from vhostuser.testing.pair import MIB

pytestmark = pytest.mark.usefixtures("no_leaks")

ROOT = Path(__file__).parents[2]
F = FrontendRequest
DATA = 2 * MIB
SLOT = 128
SIZE = 32
REQUESTS = 400

# Completes in any order, often several requests at once, never at once with their arrival.
BACKEND = """
import asyncio, random, socket, sys
from vhostuser.backend import Backend
from vhostuser.device import Device

class Shuffle(Device):
    virtio_id = 63

    async def handle(self, request):
        text = request.read()
        await asyncio.sleep(random.choice((0, 0, 0.001, 0.002)))
        request.write(text[::-1])

asyncio.run(Backend(Shuffle()).listen(socket.socket(fileno=int(sys.argv[1]))))
"""


def start(listener: int) -> subprocess.Popen[bytes]:
    """The back-end, in a process of its own."""
    return subprocess.Popen([sys.executable, "-c", BACKEND, str(listener)], pass_fds=(listener,), cwd=ROOT)


class Crashing:
    """A driver with more requests than the ring has room for, whose back-end is killed again and again."""

    def __init__(self, listener: socket.socket) -> None:
        self.listener = listener
        self.memory = SharedMemory((0, 4 * MIB))
        self.queue = DriverQueue(self.memory.map, 0, SIZE)
        self.under_way: dict[int, int] = {}
        self.completed: list[int] = []
        self.offered = 0
        self.region: tuple[Payload, int] | None = None

    def used(self) -> int:
        return int.from_bytes(self.memory.map.read(self.queue.used + 2, 2), "little")

    def offer(self) -> None:
        while self.offered < REQUESTS:
            at = DATA + self.offered * SLOT
            self.memory.map.write(at, b"%016d" % self.offered)
            head = self.queue.offer([(at, 16)], [(at + 64, 16)])
            if head is None:
                break
            assert head not in self.under_way
            self.under_way[head] = self.offered
            self.offered += 1
        self.queue.publish()

    def take(self) -> None:
        while (used := self.queue.take()) is not None:
            head, length = used
            number = self.under_way.pop(head)  # KeyError: completed twice
            at = DATA + number * SLOT
            assert (length, self.memory.map.read(at + 64, 16)) == (16, (b"%016d" % number)[::-1])
            self.completed.append(number)

    async def life(self, completions: int) -> None:
        """One process, until that many requests more have been completed, then SIGKILL."""
        process = start(self.listener.fileno())
        ring = FrontendRing(0, self.queue)
        try:
            async with await Frontend.connect(self.listener.getsockname()) as frontend:
                await self.connect(frontend, ring)
                goal = min(len(self.completed) + completions, REQUESTS)
                while len(self.completed) < goal:
                    self.offer()
                    ring.kick()
                    await asyncio.wait_for(ring.called(), 10)
                    self.take()
                process.kill()
        finally:
            process.kill()
            process.wait()
            ring.close()

    async def connect(self, frontend: Frontend, ring: FrontendRing) -> None:
        await frontend.negotiate(DRIVABLE & ~VirtioFeature.RING_EVENT_IDX.mask)
        await frontend.set_memory(self.memory)
        if self.region is None:
            payload, fds = await frontend.request(F.GET_INFLIGHT_FD, Inflight(0, 0, 1, SIZE))
            assert payload is not None
            self.region = payload, fds.take()
        await frontend.request(F.SET_INFLIGHT_FD, self.region[0], (self.region[1],))
        # A dead back-end cannot be asked: QEMU goes on from the used index.
        await frontend.start_ring(ring, self.memory, base=self.used())

    def close(self) -> None:
        self.memory.close()
        if self.region is not None:
            os.close(self.region[1])


@pytest.fixture
async def crashing(tmp_path: Path) -> AsyncIterator[Crashing]:
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as listener:
        listener.bind(str(tmp_path / "sock"))
        listener.listen(8)
        os.set_inheritable(listener.fileno(), True)
        made = Crashing(listener)
        yield made
        made.close()


@pytest.mark.parametrize("seed", [1, 2])
async def test_every_request_is_completed_exactly_once(crashing: Crashing, seed: int) -> None:
    chance = random.Random(seed)
    for _ in range(6):
        await crashing.life(chance.randrange(1, 40))
    await crashing.life(REQUESTS)
    assert sorted(crashing.completed) == list(range(REQUESTS))
    assert not crashing.under_way
