"""A front-end is lost with 64 writes under way and comes back, to a back-end that listens or one that connects: no
write that was acknowledged is lost, none is missing after all, none is completed twice. How long who connects waits
between two attempts.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, closing, suppress
from pathlib import Path

import pytest

from tests.devices.test_crash import BLOCK, BLOCKS, DEPTH, Writer, number_in
from vhostuser import backend as module
from vhostuser.backend import Backend
from vhostuser.device import Device
from vhostuser.devices.blk import Blk
from vhostuser.devices.image import Image
from vhostuser.frontend import Frontend, FrontendRing

TIMES = int(os.environ.get("VHOSTUSER_RETURNS", "20"))
pytestmark = pytest.mark.timeout(60 + TIMES)


@asynccontextmanager
async def ended(task: asyncio.Task[None]) -> AsyncIterator[None]:
    """Ends it with the context."""
    try:
        yield
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


@asynccontextmanager
async def listening(backend: Backend, path: Path) -> AsyncIterator[Callable[[], object]]:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.setblocking(False)
        listener.bind(str(path))
        listener.listen()
        async with ended(asyncio.ensure_future(backend.listen(listener))):
            yield lambda: Frontend.connect(path)


@asynccontextmanager
async def connecting(backend: Backend, path: Path) -> AsyncIterator[Callable[[], object]]:
    with closing(Frontend.listen(path)) as listener:
        async with ended(asyncio.ensure_future(backend.connect(str(path)))):
            yield listener.accept


@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
@pytest.mark.parametrize("mode", [listening, connecting])
async def test_a_front_end_that_returns_finds_every_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: Callable[..., object], packed: bool
) -> None:
    monkeypatch.setattr(module, "_FIRST_RETRY", 0.001)
    image = tmp_path / "disk"
    image.write_bytes(bytes(BLOCKS * BLOCK))
    chance = random.Random(20261201)
    with closing(Writer(image, packed=packed)) as writer:
        async with mode(Backend(Blk(Image(image))), tmp_path / "sock") as arrives:  # type: ignore[attr-defined]
            for turn in range(TIMES + 1):
                with closing(FrontendRing(0, writer.driver.queue)) as ring:
                    async with await arrives() as frontend:
                        await writer.connect(frontend, ring)
                        if turn == TIMES:
                            await asyncio.to_thread(drain, writer, ring)
                            await frontend.stop_ring(ring)
                        else:
                            await asyncio.to_thread(write, writer, ring, chance.randrange(1, 4 * DEPTH))
        writer.check()
        content = image.read_bytes()
        assert [number_in(content[at : at + BLOCK]) for at in range(0, len(content), BLOCK)] == writer.acknowledged


def write(writer: Writer, ring: FrontendRing, answers: int) -> None:
    """On a thread, since the back-end is in this process."""
    asyncio.run(writer.write(ring, answers))


def drain(writer: Writer, ring: FrontendRing) -> None:
    asyncio.run(writer.drain(ring))


# ---- pauses


class Clock:
    """Stands in for the module's ``asyncio.sleep``: nobody waits, and the pauses are kept."""

    def __init__(self, most: int, listens: Callable[[int], None] = lambda _: None) -> None:
        self.pauses: list[float] = []
        self.most = most
        self.listens = listens

    async def sleep(self, pause: float) -> None:
        self.pauses.append(pause)
        self.listens(len(self.pauses))
        if len(self.pauses) == self.most:
            raise asyncio.CancelledError
        await real_sleep(0)


real_sleep = asyncio.sleep


async def test_pauses_grow_and_stay_within_bounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody listens: it goes on for ever, each pause twice as long as the one before, up to the longest."""
    clock = Clock(12)
    monkeypatch.setattr(module.asyncio, "sleep", clock.sleep)
    with pytest.raises(asyncio.CancelledError):
        await Backend(Device()).connect(str(tmp_path / "sock"))
    first, *rest = clock.pauses
    assert 0 < first <= 0.5
    assert all(later == min(2 * before, rest[-1]) for before, later in itertools.pairwise(clock.pauses))
    assert first < rest[-1] <= 10


async def test_after_a_front_end_pauses_are_short_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fifth attempt finds one, which hangs up at once."""
    listener = socket.socket(socket.AF_UNIX)

    def listens(number: int) -> None:
        if number == 4:
            listener.bind(str(tmp_path / "sock"))
            listener.listen()
        elif number == 5:
            listener.accept()[0].close()
            listener.close()

    clock = Clock(8, listens)
    monkeypatch.setattr(module.asyncio, "sleep", clock.sleep)

    async def served(self: Backend, sock: socket.socket, name: str = "") -> None:
        sock.close()

    monkeypatch.setattr(Backend, "serve", served)
    with pytest.raises(asyncio.CancelledError):
        await Backend(Device()).connect(str(tmp_path / "sock"))
    first = clock.pauses[0]
    assert clock.pauses == [first * factor for factor in (1, 2, 4, 8, 1, 1, 2, 4)], "one behind who has gone, then anew"
