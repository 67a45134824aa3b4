"""The front-end is lost in postcopy, or leaves a thread asleep: whatever the state, the next one is served."""

import asyncio
import contextlib
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.runtime.migration import PAGE, F, Migration, Shout
from vhostuser.backend import Backend
from vhostuser.device import Device
from vhostuser.devices.blk import Blk, BlkSettings
from vhostuser.devices.image import Image
from vhostuser.frontend import Frontend, SharedMemory
from vhostuser.protocol import (
    RequestRefused,
    SingleRegion,
    VringState,
)
from vhostuser.testing.pair import Pair

pytestmark = [pytest.mark.postcopy, pytest.mark.usefixtures("no_leaks", "permitted")]


def disk(image: Path) -> Blk:
    return Blk(Image(image), BlkSettings())


STATES = ["idle", "advised", "listening", "awaiting_ack", "blocked", "blocked, stopping", "blocked, leaving"]


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
    await migration.reach(state.partition(",")[0])
    before = migration.holes()
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
    assert migration.holes() == before
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
    await migration.reach("blocked")
    migration.server.place_all(wake=False)
    await asyncio.wait_for(migration.frontend.request(F.POSTCOPY_END), 5)
    await migration.completed()
    assert migration.shouted()


async def test_the_end_before_the_acknowledgement_makes_memory_usable(migrations: Callable[..., Migration]) -> None:
    migration = migrations(Shout())
    await migration.reach("awaiting_ack")
    migration.server.place_all(wake=False)
    await migration.frontend.request(F.POSTCOPY_END)
    await migration.start()
    await migration.completed()
    assert migration.shouted()


async def test_holes_in_one_slot_hold_back_all_rings(
    migrations: Callable[..., Migration], pairs: Callable[..., Pair], tmp_path: Path
) -> None:
    """With memory slots each region comes by itself; a later one that is whole says nothing of an earlier one."""
    record = tmp_path / "record"
    migration = migrations(Shout(), record=record)
    await migration.reach("blocked")
    before = migration.holes()
    await migration.pair.close()
    again = pairs(Shout(), record=record)
    whole = SharedMemory((1 << 30, PAGE))
    await migration.again(again, whole)
    assert not again.backend.connections[0].rings[0].running
    assert migration.holes() == before
    # Slots that go away hold back nobody.
    await again.frontend.request(F.REM_MEM_REG, SingleRegion(migration.description))
    assert again.backend.connections[0].state()["memory_usable"]
    whole.close()
