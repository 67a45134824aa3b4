"""Whole procedures on rings, with our back-end: stop, start, re-base, disable, poll, log, what is in flight."""

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.runtime.echo import DATA, Echo, answer, ask
from vhostuser.backend import Backend
from vhostuser.driverqueue import DriverQueue
from vhostuser.frontend import Frontend, FrontendRing, SharedLog, SharedMemory
from vhostuser.protocol import LocalProtocolError
from vhostuser.testing.pair import Pair

pytestmark = pytest.mark.usefixtures("no_leaks")

PAGE, MIB = 4096, 1 << 20


async def test_a_ring_stops_and_goes_on_where_it_was(pairs: Callable[..., Pair]) -> None:
    pair = pairs(Echo())
    await pair.set_up()
    assert pair.memory is not None
    for turn in range(3):
        await ask(pair, b"turn %d" % turn)
        assert await answer(pair) == b"TURN %d" % turn
        base = await pair.frontend.stop_ring(pair.rings[0])
        assert base == turn + 1
        await pair.frontend.start_ring(pair.rings[0], pair.memory, base=base)


async def test_a_driver_that_starts_anew_begins_at_base_0(pairs: Callable[..., Pair]) -> None:
    """As when a guest reboots: another ring, in other memory."""
    pair = pairs(Echo())
    await pair.set_up()
    await ask(pair, b"before")
    await answer(pair)
    assert await pair.frontend.stop_ring(pair.rings[0]) == 1
    with SharedMemory((0, 4 * MIB)) as other, FrontendRing(0, DriverQueue(other.map, 8 * PAGE, 16)) as ring:
        await pair.frontend.set_memory(other)
        await pair.frontend.start_ring(ring, other)
        other.write(MIB, b"after")
        ring.queue.offer([(MIB, 5)], [(2 * MIB, 5)])
        ring.queue.publish()
        ring.kick()
        assert await asyncio.to_thread(ring.queue.wait, ring.call_fd, timeout=5)
        assert other.read(2 * MIB, 5) == b"AFTER"
        await pair.frontend.stop_ring(ring)


async def test_a_disabled_ring_is_left_alone(pairs: Callable[..., Pair]) -> None:
    pair = pairs(Echo())
    await pair.set_up(enable=False)
    await ask(pair, b"later")
    await pair.frontend.get_features()
    assert pair.rings[0].queue.raw.used_index == 0
    await pair.frontend.set_vring_enable(0, True)
    assert await answer(pair) == b"LATER"


async def test_a_ring_may_be_polled(pairs: Callable[..., Pair]) -> None:
    """No kick descriptor: the back-end looks by itself."""
    pair = pairs(Echo())
    await pair.set_up()
    assert pair.memory is not None
    base = await pair.frontend.stop_ring(pair.rings[0])
    await pair.frontend.start_ring(pair.rings[0], pair.memory, base=base, polled=True)
    await ask(pair, b"polled", kick=False)
    assert await answer(pair) == b"POLLED"


async def test_the_log_holds_what_was_written_while_it_was_on(pairs: Callable[..., Pair]) -> None:
    pair = pairs(Echo())
    await pair.set_up()
    assert pair.memory is not None
    log = SharedLog(pair.memory.end)
    await pair.frontend.start_log(log)
    await ask(pair, b"logged")
    await answer(pair)
    assert (DATA + PAGE, PAGE) in log.take()
    await pair.frontend.stop_log()
    await ask(pair, b"silent")
    await answer(pair)
    assert log.take() == []
    log.close()


async def test_the_in_flight_buffer_names_what_the_device_has(pairs: Callable[..., Pair]) -> None:
    device = Echo()
    pair = pairs(device)
    await pair.frontend.negotiate()
    pair.memory = SharedMemory((0, 4 * MIB))
    await pair.frontend.set_memory(pair.memory)
    ring = pair.add_ring(0)
    with await pair.frontend.get_inflight_fd(1, ring.queue.size) as buffer:
        assert buffer.queue(0).version == 0
        await pair.frontend.set_inflight_fd(buffer)
        await pair.frontend.start_ring(ring, pair.memory)
        device.gate.clear()
        for text in (b"first", b"second", b"third"):
            await ask(pair, text)
            await device.taken(text)
        taken = buffer.queue(0)
        assert (taken.version, taken.desc_num, taken.heads) == (1, 64, (0, 2, 4))
        device.release()
        for _ in range(3):
            await answer(pair)
        await pair.frontend.stop_ring(ring)
        assert buffer.queue(0).heads == ()


async def test_a_log_needs_its_feature(pairs: Callable[..., Pair]) -> None:
    pair = pairs(Echo())
    await pair.frontend.negotiate(protocol_features=0)
    log = SharedLog(0)
    with pytest.raises(LocalProtocolError):
        await pair.frontend.start_log(log)
    log.close()


@pytest.fixture(autouse=True)
def mapped(no_mappings: None) -> Iterator[None]:
    yield


async def test_a_back_end_may_connect_to_a_front_end_that_listens(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    async with Frontend.listen(path) as listener:
        serving = asyncio.ensure_future(Backend(Echo()).connect(str(path), once=True))
        async with await listener.accept() as frontend:
            await frontend.negotiate()
            assert await frontend.get_queue_num() == Echo.queues
        await asyncio.wait_for(serving, 5)
