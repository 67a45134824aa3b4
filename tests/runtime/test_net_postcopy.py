"""Postcopy of a network interface: a ring waits for the pages of its own buffers, in order, and nothing else waits."""

import asyncio
import os
from collections.abc import AsyncIterator, Callable

import pytest

from tests.devices.interface import Interface, Watched, frame
from tests.runtime.migration import DATA, PAGE, Migration
from vhostuser.devices.ends import Hub
from vhostuser.driverqueue import DriverQueue
from vhostuser.frontend import FrontendRing
from vhostuser.testing.pair import MIB, RING_BYTES

pytestmark = [pytest.mark.postcopy, pytest.mark.usefixtures("permitted")]

TO_NEIGHBOUR = [frame(60 + number, number) for number in range(4)]
TO_GUEST = [frame(160 + number, number) for number in range(4)]
COUNT = 4
HEADER = 12
HERE, MISSING = MIB, DATA


class Guest:
    """A guest that has migrated, each of its buffers in a page of its own; and a neighbour that has not."""

    def __init__(self, migrations: Callable[..., Migration]) -> None:
        ports = Hub(2, 1).ports
        self.device = Watched(ports[0])
        self.migration = migrations(self.device)
        self.neighbour = Interface(ports[1])
        self.receives = self.migration.ring
        self.transmits = FrontendRing(1, DriverQueue(self.migration.source.map, RING_BYTES, 64))

    async def arrive(self, *, received: int, sent: int) -> None:
        """Receives into buffers from guest address ``received`` on; has frames to transmit from ``sent`` on."""
        self._received = received
        for number, data in enumerate(TO_NEIGHBOUR):
            assert self.receives.queue.offer(writable=[(received + number * PAGE, PAGE)]) == number
            self.migration.source.map.write(sent + number * PAGE, bytes(HEADER) + data)
            assert self.transmits.queue.offer(readable=[(sent + number * PAGE, HEADER + len(data))]) == number
        for ring in (self.receives, self.transmits):
            ring.queue.publish()
        await self.neighbour.start()
        await self.migration.advise()
        await self.migration.listen()
        for page in range(MISSING // PAGE):
            self.migration.server.place(page)
        await self.migration.start()
        await asyncio.wait_for(self.device.started.wait(), 10)

    async def transmit(self) -> None:
        """Starts the ring whose frames are there already; kicked sooner it would throw them away, being disabled."""
        await self.migration.frontend.start_ring(self.transmits, self.migration.source)
        self.transmits.kick()

    def bring(self, *numbers: int) -> None:
        """The pages of these buffers."""
        for number in numbers:
            self.migration.server.place(MISSING // PAGE + number)

    def used(self, ring: FrontendRing) -> list[tuple[int, int]]:
        """Heads and lengths of what the device has returned (the file is read, which touches no hole)."""
        at = ring.queue.used
        count = int.from_bytes(os.pread(self.migration.target, 2, at + 2), "little")
        words = memoryview(os.pread(self.migration.target, 8 * count, at + 4)).cast("I")
        return list(zip(words[::2], words[1::2], strict=True))

    async def returned(self, ring: FrontendRing) -> None:
        """Waits until all buffers of the ring have come back; they do so in the order in which they were offered."""
        while len(self.used(ring)) < COUNT:
            await asyncio.wait_for(ring.called(), 10)
        assert [head for head, _ in self.used(ring)] == list(range(COUNT))

    def got(self) -> list[bytes]:
        """What is in the receive buffers."""
        return [
            os.pread(self.migration.target, length - HEADER, self._received + head * PAGE + HEADER)
            for head, length in self.used(self.receives)
        ]

    async def close(self) -> None:
        await self.neighbour.close()
        self.transmits.close()


@pytest.fixture
async def guest(migrations: Callable[..., Migration]) -> AsyncIterator[Guest]:
    guest = Guest(migrations)
    yield guest
    await guest.close()


async def test_a_receive_buffer_that_is_missing_holds_up_its_ring_alone(guest: Guest) -> None:
    """It is asked for before there is a frame for it. Buffers behind it wait for it: frames are received in order."""
    await guest.arrive(received=MISSING, sent=HERE)
    await guest.migration.blocked()
    guest.neighbour.send(*TO_GUEST)
    guest.bring(1, 2, 3)
    await guest.transmit()
    assert [data for _, data in await guest.neighbour.receive(COUNT)] == TO_NEIGHBOUR
    await guest.returned(guest.transmits)
    assert not guest.used(guest.receives)
    guest.bring(0)
    await guest.returned(guest.receives)
    assert guest.got() == TO_GUEST


async def test_a_frame_that_is_missing_holds_up_its_ring_alone(guest: Guest) -> None:
    """Frames behind it that are there wait for it: they are transmitted in order."""
    await guest.arrive(received=HERE, sent=MISSING)
    await guest.transmit()
    await guest.migration.blocked()
    guest.bring(1, 2, 3)
    guest.neighbour.send(*TO_GUEST)
    await guest.returned(guest.receives)
    assert guest.got() == TO_GUEST
    assert not guest.used(guest.transmits)
    guest.bring(0)
    assert [data for _, data in await guest.neighbour.receive(COUNT)] == TO_NEIGHBOUR
    await guest.returned(guest.transmits)
