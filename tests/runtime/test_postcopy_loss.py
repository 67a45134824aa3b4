"""The front-end is lost in postcopy, or leaves a thread asleep: whatever the state, the next one is served."""

import asyncio
import contextlib
import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import Pair
from tests.runtime.migration import PAGE, REQUESTS, SIZE, F, Migration, Shout
from vhostuser.backend import Backend
from vhostuser.device import Device
from vhostuser.devices.blk import Blk, BlkSettings
from vhostuser.devices.image import Image
from vhostuser.frontend import Frontend, FrontendRing, SharedMemory
from vhostuser.protocol import (
    MemoryTable,
    RequestRefused,
    SingleRegion,
    VirtioFeature,
    VringState,
)

pytestmark = [pytest.mark.postcopy, pytest.mark.usefixtures("no_leaks", "permitted")]


def disk(image: Path) -> Blk:
    return Blk(Image(image), BlkSettings())


async def blocked(migration: Migration) -> None:
    """A thread of the back-end waits for a page."""
    assert migration.server is not None
    async with asyncio.timeout(5):
        while not migration.server.asked.is_set():
            await migration.frontend.get(F.GET_FEATURES)


async def reach(migration: Migration, state: str) -> None:
    """Brings the handshake to a state: the rows of its table, and a ring that waits for a page."""
    migration.offer_texts()
    if state == "idle":
        await migration.frontend.negotiate()
        return
    await migration.advise()
    if state == "advised":
        return
    if state in ("listening", "awaiting"):
        await migration.frontend.request(F.POSTCOPY_LISTEN)
        if state == "awaiting":
            kind = (SingleRegion, MemoryTable)[not migration.slots]
            payload = kind(migration.description if migration.slots else (migration.description,))
            code = F.ADD_MEM_REG if migration.slots else F.SET_MEM_TABLE
            await migration.frontend.request(code, payload, (migration.target,))
        return
    await migration.listen()
    await migration.start()
    await blocked(migration)


STATES = ["idle", "advised", "listening", "awaiting", "blocked", "blocked, stopping", "blocked, leaving"]


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("native", [False, True], ids=["python", "engine"])
@pytest.mark.parametrize("ended", ["lost", "half", "cancelled"])
async def test_a_loss_in_any_state_lets_the_next_front_end_in(
    tmp_path: Path, image: Path, state: str, native: bool, ended: str
) -> None:
    device: Device = disk(image) if native else Shout()
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "sock"))
    listener.listen(8)
    backend = Backend(device)
    serving = asyncio.ensure_future(backend.listen(listener))
    first = await Frontend.connect(str(tmp_path / "sock"))
    migration = Migration(Pair(backend, first, serving), slots=False)
    await reach(migration, state)
    before = os.fstat(migration.target).st_blocks
    second = await Frontend.connect(str(tmp_path / "sock"))
    waiting = asyncio.ensure_future(second.get(F.GET_FEATURES))
    pending = None
    if state == "blocked, stopping":
        pending = asyncio.ensure_future(first.request(F.GET_VRING_BASE, VringState(0)))
    elif state == "blocked, leaving":
        pending = asyncio.ensure_future(first.request(F.SET_VRING_ENABLE, VringState(0, 0)))
    await asyncio.sleep(0.005)
    assert not waiting.done()
    if ended == "cancelled":
        serving.cancel()
        await asyncio.wait((serving,), timeout=5)
        assert serving.done()
        waiting.cancel()
    elif ended == "half":
        first._channel._sock.shutdown(socket.SHUT_WR)
    else:
        if pending is not None:
            pending.cancel()
        first.close()
    if ended != "cancelled":
        await asyncio.wait_for(waiting, 5)
    if pending is not None:
        await asyncio.wait((pending,), timeout=5)
        pending.cancelled() or pending.exception()
    assert os.fstat(migration.target).st_blocks == before
    first.close()
    second.close()
    serving.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await asyncio.wait_for(serving, 5)
    migration.close()
    listener.close()


async def test_listen_after_the_loss_is_refused(migrations: Callable[..., Migration]) -> None:
    migration = migrations(Shout())
    await migration.advise()
    migration.pair.backend.connections[0]._channel.lost.set()
    with pytest.raises(RequestRefused):
        await migration.frontend.request(F.POSTCOPY_LISTEN)


async def test_the_end_wakes_a_thread_that_nobody_woke(migrations: Callable[..., Migration]) -> None:
    """One of the last pages came between a thread's look at it and its falling asleep: END must not wait for that."""
    migration = migrations(Shout())
    await reach(migration, "blocked")
    server = migration.server
    assert server is not None
    for page in range(SIZE // PAGE):
        with contextlib.suppress(FileExistsError):
            server.ours.copy(server.region.base + page * PAGE, os.pread(server.source, PAGE, page * PAGE))
    await asyncio.wait_for(migration.frontend.request(F.POSTCOPY_END), 5)
    await migration.completed()
    assert migration.texts() == [b"REQUEST %d" % number for number in range(REQUESTS)]


async def test_the_end_before_the_acknowledgement_makes_memory_usable(migrations: Callable[..., Migration]) -> None:
    migration = migrations(Shout())
    await reach(migration, "awaiting")
    assert migration.server is not None
    for page in range(SIZE // PAGE):
        server = migration.server
        server.ours.copy(server.region.base + page * PAGE, os.pread(server.source, PAGE, page * PAGE))
    await migration.frontend.request(F.POSTCOPY_END)
    await migration.start()
    await migration.completed()
    assert migration.texts() == [b"REQUEST %d" % number for number in range(REQUESTS)]


async def test_holes_in_one_slot_hold_back_all_rings(
    migrations: Callable[..., Migration], pairs: Callable[..., Pair], tmp_path: Path
) -> None:
    """With memory slots each region comes by itself; a later one that is whole says nothing of an earlier one."""
    record = tmp_path / "record"
    migration = migrations(Shout(), record=record)
    await reach(migration, "blocked")
    before = os.fstat(migration.target).st_blocks
    await migration.pair.close()
    again = pairs(Shout(), record=record)
    await again.frontend.negotiate(~VirtioFeature.RING_EVENT_IDX.mask)
    whole = SharedMemory((1 << 30, PAGE))
    description = whole.table().regions[0]
    for region, fd in ((migration.description, migration.target), (description, whole.fds[0])):
        await again.frontend.request(F.ADD_MEM_REG, SingleRegion(region), (fd,))
    ring = FrontendRing(0, migration.ring.queue)
    again.rings.append(ring)
    ring.kick()
    await again.frontend.start_ring(ring, migration.source)
    for _ in range(5):
        await again.frontend.get(F.GET_FEATURES)
    assert not again.backend.connections[0].rings[0].running
    assert os.fstat(migration.target).st_blocks == before
    # Slots that go away hold back nobody.
    await again.frontend.request(F.REM_MEM_REG, SingleRegion(migration.description))
    assert again.backend.connections[0].state()["memory_usable"]
    whole.close()
