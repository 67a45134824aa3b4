"""Drivers from before virtio 1: rings in their own byte order, calls when one runs empty; both ends in one process."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable

import pytest

from tests.runtime.echo import DATA, Echo, ask, quiet
from vhostuser.driverqueue import Descriptor, RawRing
from vhostuser.frontend import DRIVABLE, SharedMemory
from vhostuser.protocol import ProtocolFeature, RequestRefused, VirtioFeature, VringEndian
from vhostuser.testing.pair import MIB, Pair
from vhostuser.virtqueue import Request

pytestmark = pytest.mark.usefixtures("no_leaks")

V = VirtioFeature
LEGACY = DRIVABLE & ~(V.VERSION_1.mask | V.RING_EVENT_IDX.mask)
BIG, LITTLE = VringEndian.BIG, VringEndian.LITTLE


class Either(Echo):
    """Answers with the order of its numbers and the number that it was sent."""

    protocol_features = ProtocolFeature.CROSS_ENDIAN.mask

    async def handle(self, request: Request) -> None:
        number = int.from_bytes(request.read(4), request.byteorder)
        request.write(f"{request.byteorder} {number}".encode())


async def prepared(pair: Pair, features: int = LEGACY) -> None:
    pair.memory = SharedMemory((0, 4 * MIB))
    await pair.frontend.negotiate(features)
    await pair.frontend.set_memory(pair.memory)
    pair.add_ring(0)


async def start(pair: Pair, base: int = 0) -> None:
    assert pair.memory is not None
    await pair.frontend.start_ring(pair.rings[0], pair.memory, base=base)


def driver(pair: Pair) -> RawRing:
    """The ring as a big-endian driver sees it."""
    queue = pair.rings[0].queue
    return RawRing(queue.memory, queue.size, queue.desc, queue.avail, queue.used, "big")


async def asked(pair: Pair, ring: RawRing, number: int) -> bytes:
    """What the device answers to a request of the big-endian driver's."""
    ring.memory.write(DATA, number.to_bytes(4, "big"))
    ring.describe(0, DATA, 4, Descriptor.NEXT, 1)
    ring.describe(1, DATA + 64, 64, Descriptor.WRITE)
    index = ring.available_index
    ring.make_available(index, [0])
    ring.available_index = index + 1
    pair.rings[0].kick()
    while ring.used_index == index:
        await asyncio.wait_for(pair.rings[0].called(), 5)
    head, length = ring.used_entry(index)
    assert head == 0
    return ring.memory.read(DATA + 64, length)


async def test_a_big_endian_ring_is_served(pairs: Callable[..., Pair]) -> None:
    pair = pairs(Either())
    await prepared(pair)
    await pair.frontend.set_vring_endian(0, BIG)
    await start(pair)
    ring = driver(pair)
    for number in (1, 2, 0x01020304):
        assert await asked(pair, ring, number) == b"big %d" % number
    assert await pair.frontend.stop_ring(pair.rings[0]) == 3, "a base is a number of the messages"
    await start(pair, 3)
    assert await asked(pair, ring, 7) == b"big 7"


async def test_the_order_is_one_ring_s(pairs: Callable[..., Pair]) -> None:
    pair = pairs(Either())
    await prepared(pair)
    await pair.frontend.set_vring_endian(1, BIG)
    await start(pair)
    await ask(pair, (5).to_bytes(4, "little") + bytes(28))
    while pair.rings[0].queue.take() is None:
        await asyncio.wait_for(pair.rings[0].called(), 5)
    assert pair.memory is not None
    assert pair.memory.read(DATA + 4096, 8) == b"little 5"


async def test_it_may_change_while_the_ring_is_stopped(pairs: Callable[..., Pair]) -> None:
    """QEMU sets it back when a device stops, since the next driver may be another."""
    pair = pairs(Either())
    await prepared(pair)
    await pair.frontend.set_vring_endian(0, LITTLE)
    await start(pair)
    await ask(pair, bytes(4))
    while pair.rings[0].queue.take() is None:
        await asyncio.wait_for(pair.rings[0].called(), 5)
    with pytest.raises(RequestRefused):
        await pair.frontend.set_vring_endian(0, BIG)
    await pair.frontend.stop_ring(pair.rings[0])
    await pair.frontend.set_vring_endian(0, BIG)
    pair.memory.write(0, bytes(64 * 1024))  # type: ignore[union-attr]
    await start(pair)
    assert await asked(pair, driver(pair), 9) == b"big 9"


async def test_a_modern_driver_is_little_endian_whatever_was_said_before(pairs: Callable[..., Pair]) -> None:
    pair = pairs(Either())
    await prepared(pair)
    await pair.frontend.set_vring_endian(0, BIG)
    await pair.frontend.set_features(pair.frontend.session.features | V.VERSION_1.mask)
    await start(pair)
    await ask(pair, (6).to_bytes(4, "little") + bytes(28))
    while pair.rings[0].queue.take() is None:
        await asyncio.wait_for(pair.rings[0].called(), 5)


async def test_a_device_that_does_not_say_so_does_not_offer_it(pairs: Callable[..., Pair]) -> None:
    pair = pairs(Echo())
    await pair.frontend.negotiate()
    assert not pair.frontend.session.protocol_features_offered & ProtocolFeature.CROSS_ENDIAN.mask


@pytest.mark.parametrize("event_idx", [False, True])
@pytest.mark.parametrize("on_empty", [False, True])
async def test_a_driver_that_wants_no_calls_hears_that_the_ring_is_empty(
    pairs: Callable[..., Pair], on_empty: bool, event_idx: bool
) -> None:
    """NOTIFY_ON_EMPTY (virtio 1.3, 6.4): when the last of what was available is done, and not for each."""
    device = Echo()
    pair = pairs(device)
    wanted = LEGACY | event_idx * V.RING_EVENT_IDX.mask | on_empty * V.NOTIFY_ON_EMPTY.mask
    await prepared(pair, wanted)
    ring = pair.rings[0]
    await start(pair)
    await ask(pair, b"first")
    while ring.queue.take() is None:
        await quiet(pair)
    ring.queue.raw.available_flags = 1
    ring.queue.raw.used_event = 1000
    await calm(pair)
    device.gate.clear()
    for text in (b"one", b"two"):
        await ask(pair, text)
    await device.taken(b"two")
    assert calls(pair) == 0
    device.release()
    for _ in range(2):
        while ring.queue.take() is None:
            await quiet(pair)
    await pair.frontend.stop_ring(ring)
    assert calls(pair) == (1 if on_empty else 0)


async def calm(pair: Pair) -> None:
    await quiet(pair)
    calls(pair)


def calls(pair: Pair) -> int:
    try:
        return os.eventfd_read(pair.rings[0].call_fd)
    except BlockingIOError:
        return 0
