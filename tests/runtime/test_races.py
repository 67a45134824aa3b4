"""What may come at any moment: a slow device, a loss, a broken ring, another request."""

import asyncio
import logging
import threading
from collections.abc import Callable

import pytest

from tests.runtime.echo import Echo, answer, ask, quiet
from vhostuser.dataplane import ServedQueue
from vhostuser.frontend import SharedMemory
from vhostuser.protocol import (
    U64,
    Config,
    FrontendRequest,
    MemoryRegion,
    RequestRefused,
    SingleRegion,
    VirtioFeature,
    VringAddress,
    VringFd,
    VringState,
)
from vhostuser.testing.pair import MIB, Pair
from vhostuser.virtqueue import Request

pytestmark = pytest.mark.usefixtures("no_leaks")

F = FrontendRequest


class Slow(Echo):
    """Blocks its data thread in start and in stop until it is let go."""

    def __init__(self) -> None:
        super().__init__()
        self.may_start, self.may_stop = threading.Event(), threading.Event()
        self.may_stop.set()
        self.starting = asyncio.Event()

    async def start(self, features: int) -> None:
        self.control.call_soon_threadsafe(self.starting.set)
        self.may_start.wait()
        await super().start(features)

    async def stop(self) -> None:
        self.may_stop.wait()
        await super().stop()


async def starting(device: Slow, pairs: Callable[..., Pair]) -> Pair:
    """A pair whose device is in the middle of its start."""
    pair = pairs(device)
    await pair.set_up()
    await ask(pair, b"hello")
    await asyncio.wait_for(device.starting.wait(), 5)
    return pair


async def test_the_control_socket_answers_while_the_device_starts(pairs: Callable[..., Pair]) -> None:
    device = Slow()
    pair = await starting(device, pairs)
    ring, frontend = pair.rings[0], pair.frontend
    try:
        async with asyncio.timeout(2):
            await frontend.get(F.GET_FEATURES)
            await frontend.request(F.GET_CONFIG, Config(0, 4, 0, bytes(4)))
            await frontend.request(F.SET_VRING_CALL, VringFd(0), (ring.call_fd,))
            # Another ring is no concern of the start either.
            await frontend.request(F.SET_VRING_NUM, VringState(1, 64))
            await frontend.request(F.SET_VRING_ADDR, VringAddress(1, 0, 0, 0, 0, 0))
            await frontend.request(F.SET_VRING_KICK, VringFd(1), (ring.kick_fd,))
            await frontend.request(F.SET_VRING_ENABLE, VringState(1, 0))
            await frontend.request(F.GET_VRING_BASE, VringState(1))
    finally:
        device.may_start.set()
    assert await answer(pair) == b"HELLO"


async def test_get_vring_base_waits_for_a_start_under_way_and_then_stops_the_device(pairs: Callable[..., Pair]) -> None:
    """A front-end that learns the base takes the disk to be unlocked."""
    device = Slow()
    pair = await starting(device, pairs)
    stopping = asyncio.ensure_future(pair.frontend.stop_ring(pair.rings[0]))
    await asyncio.sleep(0.02)
    assert not stopping.done()
    device.may_start.set()
    assert await asyncio.wait_for(stopping, 5) == 0
    assert device.events == ["start", "stop"]


@pytest.mark.parametrize("cancelled", [False, True])
async def test_a_device_that_was_starting_when_the_front_end_left_is_stopped(
    pairs: Callable[..., Pair], cancelled: bool
) -> None:
    """Else a disk would stay locked, and the next front-end find it taken."""
    device = Slow()
    pair = await starting(device, pairs)
    if cancelled:
        pair.serving.cancel()
    else:
        pair.frontend.close()
    await asyncio.sleep(0.02)
    device.may_start.set()
    await asyncio.wait((pair.serving,), timeout=5)
    assert device.events == ["start", "stop"]


async def test_a_stop_is_waited_for_when_the_service_ends(pairs: Callable[..., Pair]) -> None:
    device = Slow()
    device.may_start.set()
    pair = await starting(device, pairs)
    assert await answer(pair) == b"HELLO"
    device.may_stop.clear()
    stopping = asyncio.ensure_future(pair.frontend.stop_ring(pair.rings[0]))
    await asyncio.sleep(0.02)
    pair.serving.cancel()
    await asyncio.sleep(0.02)
    assert not pair.serving.done()
    device.may_stop.set()
    await asyncio.wait((pair.serving, stopping), timeout=5)
    assert device.events == ["start", "stop"]
    stopping.exception()


async def test_features_that_change_during_the_start_reach_the_device(pairs: Callable[..., Pair]) -> None:
    class Featured(Slow):
        features = 1 << 5
        seen: list[int]

        async def start(self, features: int) -> None:
            self.seen = [*getattr(self, "seen", []), features >> 5 & 1]
            await super().start(features)

    device = Featured()
    pair = await starting(device, pairs)
    changing = asyncio.ensure_future(
        pair.frontend.request(F.SET_FEATURES, U64(pair.frontend.session.features & ~(1 << 5)))
    )
    await asyncio.sleep(0.02)
    device.may_start.set()
    await asyncio.wait_for(changing, 5)
    assert await answer(pair) == b"HELLO"
    await ask(pair, b"again")
    assert await answer(pair) == b"AGAIN"
    assert device.seen == [1, 0]


async def test_toggling_the_log_does_not_restart_the_device(pairs: Callable[..., Pair]) -> None:
    device = Echo()
    pair = pairs(device)
    await pair.set_up()
    for number in range(4):
        mask = VirtioFeature.LOG_ALL.mask if number % 2 else 0
        features = pair.frontend.session.features & ~VirtioFeature.LOG_ALL.mask | mask
        await pair.frontend.request(F.SET_FEATURES, U64(features))
        await ask(pair, b"x")
        assert await answer(pair) == b"X"
    assert device.events == ["start"]


async def test_a_device_that_fails_in_stop_ends_its_connection_and_no_more(
    pairs: Callable[..., Pair], caplog: pytest.LogCaptureFixture
) -> None:
    class Stuck(Echo):
        async def stop(self) -> None:
            raise RuntimeError("no way back")

    pair = pairs(Stuck())
    await pair.set_up()
    await ask(pair, b"x")
    assert await answer(pair) == b"X"
    await pair.close()
    assert "test: the device does not stop: no way back" in caplog.text
    assert pair.serving.exception() is None


@pytest.mark.parametrize("stopping", [False, True])
async def test_a_handler_that_never_returns_does_not_keep_the_next_front_end_out(
    pairs: Callable[..., Pair], monkeypatch: pytest.MonkeyPatch, stopping: bool
) -> None:
    """Its request is not completed, so it comes again; also when the front-end left while it waited for the stop."""
    monkeypatch.setattr("vhostuser.connection._GRACE", 0.05)
    device = Echo()
    pair = pairs(device)
    await pair.set_up(rings=2)
    device.gate.clear()
    for ring in (0, 1):
        await ask(pair, b"for ever", ring=ring)
        await device.taken(b"for ever")
    if stopping:
        asked = asyncio.ensure_future(pair.frontend.stop_ring(pair.rings[0]))
        await asyncio.sleep(0.01)
        asked.cancel()
    pair.frontend.close()
    await asyncio.wait_for(pair.serving, 5)
    assert device.events == ["start", "stop"]
    assert [ring.queue.take() for ring in pair.rings] == [None, None]


async def test_requests_that_end_soon_are_completed_for_a_front_end_that_has_gone(pairs: Callable[..., Pair]) -> None:
    device = Echo()
    pair = pairs(device)
    await pair.set_up()
    device.gate.clear()
    await ask(pair, b"soon")
    await device.taken(b"soon")
    pair.frontend.close()
    await asyncio.sleep(0.02)
    device.release()
    await asyncio.wait_for(pair.serving, 5)
    assert pair.rings[0].queue.take() == (0, 4)


# ---- rings that end by themselves


@pytest.mark.parametrize("fault", ["raises", "returns", "cancels"])
async def test_a_device_that_gives_up_a_ring_leaves_the_others_alone(pairs: Callable[..., Pair], fault: str) -> None:
    class Fickle(Echo):
        async def serve(self, queue: ServedQueue) -> None:
            if queue.index:
                return await super().serve(queue)
            (request,) = await queue.requests()
            request.complete()
            if fault == "raises":
                raise ValueError("out of ideas")
            if fault == "cancels":
                raise asyncio.CancelledError
            return None

    pair = pairs(Fickle())
    await pair.set_up(rings=2)
    await ask(pair, b"zero")
    await asyncio.wait_for(pair.rings[0].broken(), 5)
    await ask(pair, b"one", ring=1)
    assert await answer(pair, ring=1) == b"ONE"
    assert pair.backend.connections[0].rings[0].broken is not None
    assert not pair.backend.connections[0].rings[0].running


async def test_a_ring_that_breaks_while_it_is_being_stopped(pairs: Callable[..., Pair]) -> None:
    device = Echo()
    pair = pairs(device)
    await pair.set_up(rings=2)
    device.gate.clear()
    await ask(pair, b"slow")
    await device.taken(b"slow")
    assert pair.memory is not None
    pair.memory.map.write(pair.rings[0].queue.avail + 2, (1000).to_bytes(2, "little"))
    stopping = asyncio.ensure_future(pair.frontend.stop_ring(pair.rings[0]))
    await asyncio.sleep(0.01)
    device.release()
    await asyncio.wait_for(stopping, 5)
    await ask(pair, b"one", ring=1)
    assert await answer(pair, ring=1) == b"ONE"


async def test_a_ring_that_the_data_thread_cannot_begin_breaks_and_can_be_stopped(
    pairs: Callable[..., Pair], monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_room(*_: object) -> None:
        raise OSError(28, "No space left on device")

    pair = pairs(Echo())
    await pair.set_up()
    monkeypatch.setattr("vhostuser.dataplane.ServedQueue.__init__", no_room)
    await ask(pair, b"x")
    await asyncio.wait_for(pair.rings[0].broken(), 5)
    assert await asyncio.wait_for(pair.frontend.stop_ring(pair.rings[0]), 5) == 0


async def test_kicks_that_come_while_the_ring_is_halted_are_served(pairs: Callable[..., Pair]) -> None:
    device = Echo()
    pair = pairs(device)
    await pair.set_up()
    assert pair.memory is not None
    device.gate.clear()
    await ask(pair, b"slow")
    await device.taken(b"slow")
    changing = asyncio.ensure_future(pair.frontend.set_memory(pair.memory))
    await asyncio.sleep(0.01)
    pair.memory.map.write(2 * MIB + 8192, b"late!")
    pair.rings[0].queue.offer(readable=[(2 * MIB + 8192, 5)], writable=[(2 * MIB + 12288, 5)])
    pair.rings[0].queue.publish()
    pair.rings[0].kick()
    device.release()
    await asyncio.wait_for(changing, 5)
    assert await answer(pair) == b"SLOW"
    await asyncio.wait_for(device.taken(b"late!"), 5)


# ---- requests in odd order, or twice


async def test_the_ring_comes_back_with_its_memory(pairs: Callable[..., Pair]) -> None:
    device = Echo()
    pair = pairs(device)
    await pair.set_up()
    await ask(pair, b"one")
    assert await answer(pair) == b"ONE"
    assert pair.memory is not None
    region = SingleRegion(pair.memory.table().regions[0])
    for _ in range(2):
        await pair.frontend.request(F.REM_MEM_REG, region)
        await ask(pair, b"two", kick=False)
        await quiet(pair)
        await pair.frontend.request(F.ADD_MEM_REG, region, pair.memory.fds)
        assert await answer(pair) == b"TWO"


async def test_an_empty_table_and_back(pairs: Callable[..., Pair]) -> None:
    pair = pairs(Echo())
    await pair.set_up()
    await ask(pair, b"one")
    assert await answer(pair) == b"ONE"
    assert pair.memory is not None
    await pair.frontend.send_raw(bytes.fromhex("05000000 01000000 08000000 00000000 00000000"))
    await pair.frontend.get(F.GET_FEATURES)
    assert not pair.backend.connections[0].memory.regions
    await pair.frontend.set_memory(pair.memory)
    await ask(pair, b"two")
    assert await answer(pair) == b"TWO"


async def test_a_ring_may_be_described_in_any_order(pairs: Callable[..., Pair]) -> None:
    pair = pairs(Echo())
    pair.memory = SharedMemory((0, 4 * MIB))
    frontend = pair.frontend
    await frontend.negotiate()
    ring = pair.add_ring(0)
    user = pair.memory.map.guest_to_host
    for _ in range(2):
        await frontend.request(F.SET_VRING_ENABLE, VringState(0, 1))
        await frontend.request(F.SET_VRING_KICK, VringFd(0), (ring.kick_fd,))
        await frontend.request(F.GET_VRING_BASE, VringState(0))
        await frontend.request(F.GET_VRING_BASE, VringState(0))
        await frontend.request(F.SET_VRING_CALL, VringFd(0), (ring.call_fd,))
    await frontend.request(F.SET_VRING_KICK, VringFd(0), (ring.kick_fd,))
    await frontend.request(F.SET_VRING_KICK, VringFd(0), (ring.kick_fd,))
    await ask(pair, b"any order")
    await quiet(pair)
    queue = ring.queue
    address = VringAddress(0, 0, user(queue.desc), user(queue.used), user(queue.avail), 0)
    await frontend.request(F.SET_VRING_ADDR, address)
    await frontend.request(F.SET_VRING_NUM, VringState(0, queue.size))
    await quiet(pair)
    await frontend.set_memory(pair.memory)
    assert await answer(pair) == b"ANY ORDER"


async def test_reset_owner_stops_all_rings_and_nothing_else(pairs: Callable[..., Pair]) -> None:
    device = Echo()
    pair = pairs(device)
    await pair.set_up()
    await ask(pair, b"one")
    assert await answer(pair) == b"ONE"
    await pair.frontend.request(F.RESET_OWNER)
    assert device.events == ["start", "stop"]
    await pair.frontend.request(F.SET_VRING_ENABLE, VringState(0, 1))
    await ask(pair, b"two")
    assert await answer(pair) == b"TWO"


async def test_every_slot_can_be_taken_and_not_one_more(pairs: Callable[..., Pair]) -> None:
    pair = pairs(Echo())
    await pair.set_up()
    slots = await pair.frontend.get(F.GET_MAX_MEM_SLOTS)
    extra = SharedMemory((0, 4096))
    regions = [MemoryRegion((64 + n) * MIB, 4096, (1 << 40) + n * MIB, 0) for n in range(slots)]
    for region in regions[:-1]:
        await pair.frontend.request(F.ADD_MEM_REG, SingleRegion(region), extra.fds)
    with pytest.raises(RequestRefused):
        await pair.frontend.request(F.ADD_MEM_REG, SingleRegion(regions[-1]), extra.fds)
    await ask(pair, b"full")
    assert await answer(pair) == b"FULL"
    for region in regions[:-1]:
        await pair.frontend.request(F.REM_MEM_REG, SingleRegion(region))
    extra.close()
    assert len(pair.backend.connections[0].memory.regions) == 1


async def test_a_connection_that_never_starts_its_device_has_no_thread(pairs: Callable[..., Pair]) -> None:
    """Management software connects only to ask."""
    before = threading.active_count()
    pair = pairs(Echo())
    await pair.frontend.negotiate()
    assert threading.active_count() == before


async def test_every_line_names_the_socket(pairs: Callable[..., Pair], caplog: pytest.LogCaptureFixture) -> None:
    class Bad(Echo):
        async def handle(self, request: Request) -> None:
            raise ValueError("no")

    caplog.set_level(logging.DEBUG, "vhostuser")
    pair = pairs(Bad())
    await pair.set_up()
    await ask(pair, b"x")
    await pair.close()
    assert all(record.getMessage().startswith("test: ") for record in caplog.records if record.name == "vhostuser")
    assert "VERSION_1" in caplog.text
    assert "REPLY_ACK" in caplog.text


@pytest.mark.parametrize("suspended", [False, True])
@pytest.mark.parametrize("stuck", ["start", "stop"])
@pytest.mark.parametrize("lost", [False, True], ids=["cancelled", "lost"])
async def test_a_start_or_stop_that_does_not_return_holds_up_nobody(
    pairs: Callable[..., Pair],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    lost: bool,
    stuck: str,
    suspended: bool,
) -> None:
    """The end of the service and the next front-end; one line tells of it."""
    monkeypatch.setattr("vhostuser.connection._PATIENCE", 0.2)
    monkeypatch.setattr("vhostuser.connection._GRACE", 0.1)
    may_return, cancelled = threading.Event(), threading.Event()

    class Stuck(Echo):
        begun = asyncio.Event()

        async def start(self, features: int) -> None:
            await super().start(features)
            self.control.call_soon_threadsafe(self.begun.set)
            await self.step("start")

        async def stop(self) -> None:
            await super().stop()
            await self.step("stop")

        async def step(self, name: str) -> None:
            if name == stuck and suspended and not may_return.is_set():
                try:
                    await asyncio.Event().wait()
                finally:
                    cancelled.set()
            elif name == stuck:
                may_return.wait()

    device = Stuck()
    pair = pairs(device)
    await pair.set_up()
    await ask(pair, b"hello")
    await asyncio.wait_for(device.begun.wait(), 10)
    if stuck == "stop":
        assert await answer(pair) == b"HELLO"
    if lost:
        pair.frontend.close()
    else:
        pair.serving.cancel()
    await asyncio.wait((pair.serving,), timeout=10)
    assert pair.serving.done()
    assert caplog.text.count("left behind") == 1 and "Traceback" not in caplog.text
    again = pairs(device)
    await again.set_up()
    if not suspended:
        await ask(again, b"too soon")
        await asyncio.wait((again.serving,), timeout=10)
        assert again.serving.done()
        assert "the device does not start: what an earlier front-end left behind has not returned yet" in caplog.text
    may_return.set()
    assert not suspended or cancelled.wait(10)
    await until_alone(device)
    third = pairs(device)
    await third.set_up()
    await ask(third, b"at last")
    assert await answer(third) == b"AT LAST"


async def until_alone(device: Echo) -> None:
    """Nothing is left behind."""
    assert device.left_behind is not None
    await asyncio.wait((device.left_behind,), timeout=10)
    assert device.left_behind.done()
