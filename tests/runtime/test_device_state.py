"""The device's own state through the front-end's pipe (section "Migrating back-end state"): saved, loaded, checked."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import struct
from collections.abc import AsyncIterator, Callable

import pytest

from tests.runtime.echo import Echo, answer, ask
from vhostuser.channel import readable
from vhostuser.protocol import ProtocolFeature, RequestRefused, TransferDirection
from vhostuser.testing.pair import Pair
from vhostuser.virtqueue import Request

pytestmark = pytest.mark.usefixtures("no_leaks")

SAVE, LOAD = TransferDirection.SAVE, TransferDirection.LOAD
COUNT = struct.Struct("<Q")


class Counter(Echo):
    """Answers each request with its number; the number is its state, and behind it some more bytes."""

    protocol_features = ProtocolFeature.DEVICE_STATE.mask
    state_limit = 4 << 20

    def __init__(self, count: int = 0, ballast: int = 0) -> None:
        super().__init__()
        self.count = count
        self.ballast = bytes(ballast)

    async def handle(self, request: Request) -> None:
        self.count += 1
        request.write(COUNT.pack(self.count))

    def save_state(self) -> bytes:
        return COUNT.pack(self.count) + self.ballast

    def load_state(self, state: bytes) -> None:
        (self.count,) = COUNT.unpack_from(state)  # struct.error, where it is shorter
        self.ballast = state[COUNT.size :]


@contextlib.asynccontextmanager
async def channel(pair: Pair, direction: TransferDirection) -> AsyncIterator[int]:
    """The front-end's end of a pipe whose other end the back-end has; closed at the end."""
    read, write = os.pipe2(os.O_CLOEXEC)
    ours, theirs = (read, write) if direction is SAVE else (write, read)
    with os.fdopen(ours, "rb" if direction is SAVE else "wb", 0) as mine:
        try:
            assert await pair.frontend.set_device_state_fd(direction, theirs) is None
        finally:
            os.close(theirs)
        yield mine.fileno()


async def everything_from(fd: int) -> bytes:
    os.set_blocking(fd, False)
    state = b""
    while True:
        await readable(fd)
        if not (piece := os.read(fd, 1 << 20)):
            return state
        state += piece


async def load(pair: Pair, state: bytes) -> None:
    async with channel(pair, LOAD) as fd:
        os.write(fd, state)
    await pair.frontend.check_device_state()


async def test_a_device_goes_on_with_what_was_saved_on_another(pairs: Callable[..., Pair]) -> None:
    source, destination = pairs(Counter()), pairs(Counter())
    await source.set_up()
    for number in (1, 2, 3):
        await ask(source, b"12345678")
        assert COUNT.unpack(await answer(source)) == (number,)
    await source.frontend.stop_ring(source.rings[0])
    async with channel(source, SAVE) as fd:
        state = await everything_from(fd)
    await source.frontend.check_device_state()

    await destination.frontend.negotiate()
    await load(destination, state)
    await destination.set_up()
    await ask(destination, b"12345678")
    assert COUNT.unpack(await answer(destination)) == (4,)


async def test_a_reader_that_takes_its_time_holds_nothing_up(pairs: Callable[..., Pair]) -> None:
    pair = pairs(Counter(7, ballast=3 << 20))
    await pair.frontend.negotiate()
    async with channel(pair, SAVE) as fd:
        assert await pair.frontend.get_features(), "answered while the pipe is full"
        assert await everything_from(fd) == COUNT.pack(7) + bytes(3 << 20)
    await pair.frontend.check_device_state()


async def test_a_reader_that_goes_is_a_state_that_was_not_saved(pairs: Callable[..., Pair]) -> None:
    pair = pairs(Counter(7, ballast=3 << 20))
    await pair.frontend.negotiate()
    async with channel(pair, SAVE):
        pass
    with pytest.raises(RequestRefused):
        await pair.frontend.check_device_state()


async def test_what_the_device_does_not_understand_is_told_by_the_check(pairs: Callable[..., Pair]) -> None:
    device = Counter(7)
    pair = pairs(device)
    await pair.frontend.negotiate()
    with pytest.raises(RequestRefused):
        await load(pair, b"short")
    assert device.count == 7
    await load(pair, COUNT.pack(9))
    assert device.count == 9


async def test_more_than_the_limit_is_not_kept(pairs: Callable[..., Pair]) -> None:
    pair = pairs(Counter())
    await pair.frontend.negotiate()
    async with channel(pair, LOAD) as fd:
        os.set_blocking(fd, False)
        with pytest.raises(BrokenPipeError):
            while True:
                with contextlib.suppress(BlockingIOError):
                    os.write(fd, bytes(1 << 16))
                await asyncio.sleep(0)
    with pytest.raises(RequestRefused):
        await pair.frontend.check_device_state()


async def test_a_state_that_arrives_after_a_ring_was_started_is_not_loaded(pairs: Callable[..., Pair]) -> None:
    device = Counter()
    pair = pairs(device)
    await pair.frontend.negotiate()
    async with channel(pair, LOAD) as fd:
        await pair.set_up()
        await ask(pair, b"12345678")
        assert COUNT.unpack(await answer(pair)) == (1,)
        os.write(fd, COUNT.pack(100))
    with pytest.raises(RequestRefused):
        await pair.frontend.check_device_state()
    assert device.count == 1


async def test_a_second_transfer_ends_the_first(pairs: Callable[..., Pair]) -> None:
    pair = pairs(Counter())
    await pair.frontend.negotiate()
    async with channel(pair, LOAD) as forgotten:
        await load(pair, COUNT.pack(5))
        with pytest.raises(BrokenPipeError):
            os.write(forgotten, b"x")


async def test_a_front_end_that_leaves_during_the_check_is_not_waited_for(pairs: Callable[..., Pair]) -> None:
    pair = pairs(Counter())
    await pair.frontend.negotiate()
    async with channel(pair, LOAD):
        checking = asyncio.ensure_future(pair.frontend.check_device_state())
        await asyncio.sleep(0)
        await pair.close()
    (outcome,) = await asyncio.gather(checking, return_exceptions=True)
    assert isinstance(outcome, BaseException)


async def test_a_channel_that_is_no_pipe_is_refused(pairs: Callable[..., Pair]) -> None:
    """A file could keep the control thread as long as its file system likes."""
    pair = pairs(Counter())
    await pair.frontend.negotiate()
    ours, theirs = socket.socketpair()
    with ours, theirs, pytest.raises(RequestRefused):
        await pair.frontend.set_device_state_fd(SAVE, theirs.fileno())
    with pytest.raises(RequestRefused):
        await pair.frontend.check_device_state()


async def test_a_device_without_state_says_so(pairs: Callable[..., Pair]) -> None:
    class Stateless(Echo):
        protocol_features = ProtocolFeature.DEVICE_STATE.mask

    pair = pairs(Stateless())
    await pair.frontend.negotiate()
    with pytest.raises(RequestRefused):
        async with channel(pair, SAVE):
            pass
    with pytest.raises(RequestRefused):
        await load(pair, b"anything")
