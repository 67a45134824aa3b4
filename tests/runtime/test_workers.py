"""A Python device's requests: how many tasks they cost, and when the driver hears of them."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable

from tests.runtime.echo import DATA, Echo, answer, ask, next_used
from vhostuser.testing.pair import Pair
from vhostuser.virtqueue import GROUP, Request


def offer(pair: Pair, count: int) -> None:
    """So many requests at once, with one kick."""
    queue = pair.rings[0].queue
    for number in range(count):
        assert queue.offer(readable=[(DATA, 8)], writable=[(DATA + 4096 + number * 8, 8)]) is not None
    queue.publish()
    pair.rings[0].kick()


class Counting(Echo):
    """Never suspends; notes how many tasks there are on the data thread's loop."""

    def __init__(self) -> None:
        super().__init__()
        self.tasks = 0

    async def handle(self, request: Request) -> None:
        self.tasks = max(self.tasks, len(asyncio.all_tasks()))
        request.write(request.read())


async def test_requests_of_a_device_that_never_suspends_share_one_task(pairs: Callable[..., Pair]) -> None:
    device = Counting()
    pair = pairs(device)
    await pair.set_up()
    for _ in range(20):
        offer(pair, 30)
        for _ in range(30):
            await next_used(pair)
    # One that serves the ring, one that waits for its stop, one that works.
    assert device.tasks <= 3


async def test_the_driver_hears_of_a_group_while_the_next_request_is_under_way(pairs: Callable[..., Pair]) -> None:
    class Held(Echo):
        begun = 0
        go_on = threading.Event()

        async def handle(self, request: Request) -> None:
            self.begun += 1
            if self.begun > GROUP:
                assert self.go_on.wait(30)
            request.write(request.read())

    device = Held()
    pair = pairs(device)
    await pair.set_up()
    offer(pair, GROUP + 1)
    for _ in range(GROUP):
        await next_used(pair)
    assert pair.rings[0].queue.take() is None
    device.go_on.set()
    await next_used(pair)


async def test_a_handler_whose_own_task_was_cancelled_fails_its_request_only(pairs: Callable[..., Pair]) -> None:
    class Cancels(Echo):
        async def handle(self, request: Request) -> None:
            if request.read() == b"bad":
                inner = asyncio.ensure_future(asyncio.sleep(3600))
                asyncio.get_running_loop().call_soon(inner.cancel)
                await inner
            await super().handle(request)

        def failed(self, request: Request, error: Exception) -> None:
            request.write(b"ERR")

    pair = pairs(Cancels())
    await pair.set_up()
    for _ in range(3):
        await ask(pair, b"bad")
        assert await answer(pair) == b"ERR"
    await ask(pair, b"good")
    assert await answer(pair) == b"GOOD"


async def test_many_suspended_handlers_end_in_any_order(pairs: Callable[..., Pair]) -> None:
    class Mixed(Echo):
        count = 0

        async def handle(self, request: Request) -> None:
            self.count += 1
            for _ in range(self.count % 4):
                await asyncio.sleep(0)
            request.write(request.read())

    pair = pairs(Mixed())
    await pair.set_up()
    for _ in range(5):
        offer(pair, 30)
        assert len({(await next_used(pair))[0] for _ in range(30)}) == 30


async def test_what_was_taken_before_the_ring_broke_is_returned_before_it_stops(pairs: Callable[..., Pair]) -> None:
    """Two good requests, one of them still under way, and in the same batch one that cannot be a request."""
    device = Echo()
    pair = pairs(device)
    await pair.set_up()
    assert pair.memory is not None
    device.gate.clear()
    queue = pair.rings[0].queue
    offered = [queue.offer(readable=[(DATA, 2)], writable=[(DATA + 64 * n, 2)]) for n in range(2)]
    queue.offer(readable=[(1 << 40, 2)])
    queue.publish()
    pair.rings[0].kick()
    for _ in offered:
        await asyncio.wait_for(device.entered.get(), 5)
    assert queue.take() is None
    device.release()
    assert {(await next_used(pair))[0] for _ in offered} == set(offered)
    await asyncio.wait_for(pair.rings[0].broken(), 5)
    assert queue.take() is None
