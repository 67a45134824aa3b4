"""SET_LOG_FD: who takes marks out of the dirty log is told that there are some."""

import asyncio
import os
from collections.abc import Callable, Iterator
from contextlib import closing

import pytest

from tests.runtime.echo import Echo, answer, ask
from vhostuser.channel import readable
from vhostuser.frontend import SharedLog
from vhostuser.protocol import RequestRefused
from vhostuser.testing.pair import Pair

pytestmark = pytest.mark.usefixtures("no_leaks")


@pytest.fixture
def event() -> Iterator[int]:
    fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    yield fd
    os.close(fd)


@pytest.mark.parametrize("before", [True, False], ids=["before the log", "behind it"])
async def test_it_is_signalled_when_a_request_has_written(pairs: Callable[..., Pair], event: int, before: bool) -> None:
    pair = pairs(Echo())
    await pair.set_up()
    assert pair.memory is not None
    with closing(SharedLog(pair.memory.end)) as log:
        if before:
            await pair.frontend.set_log_fd(event)
        await pair.frontend.start_log(log)
        if not before:
            await pair.frontend.set_log_fd(event)
        for _ in range(2):
            await ask(pair, b"x")
            assert await answer(pair) == b"X"
            await asyncio.wait_for(readable(event), 5)
            os.eventfd_read(event)
            assert log.take()


async def test_what_is_no_eventfd_is_refused(pairs: Callable[..., Pair]) -> None:
    pair = pairs(Echo())
    await pair.set_up()
    assert pair.memory is not None
    with pytest.raises(RequestRefused):
        await pair.frontend.set_log_fd(pair.memory.fds[0])
