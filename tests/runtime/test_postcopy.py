"""Postcopy over the socket: the test is the destination front-end (``migration``)."""

import asyncio
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.runtime.migration import DATA, PAGE, REQUESTS, SIZE, F, Migration, Shout
from vhostuser import measures, watch
from vhostuser.dataplane import ServedQueue
from vhostuser.devices.blk import Blk, BlkSettings
from vhostuser.devices.image import Image
from vhostuser.metrics import as_json, value_in
from vhostuser.protocol import (
    Postcopy,
    PostcopyAck,
    RequestRefused,
    VringState,
)
from vhostuser.testing.pair import Pair

pytestmark = [pytest.mark.postcopy, pytest.mark.usefixtures("no_leaks", "permitted")]


async def test_requests_complete_while_memory_arrives(migrations: Callable[..., Migration]) -> None:
    migration = migrations(Shout())
    await migration.reach("usable")
    migration.server.open.set()
    await migration.start()
    await migration.completed()
    assert migration.shouted()
    assert len(migration.server.faults) >= 2 * REQUESTS
    assert len(set(migration.server.faults)) == len(migration.server.faults), "no page is asked for twice"
    await migration.end()
    payload, _ = await migration.frontend.request(F.GET_VRING_BASE, VringState(0))
    assert payload == VringState(0, REQUESTS)


async def test_the_engine_serves_a_disk_while_memory_arrives(migrations: Callable[..., Migration], image: Path) -> None:
    migration = migrations(Blk(Image(image), BlkSettings()))
    for number in range(REQUESTS):
        at = DATA + number * 4 * PAGE
        header = (0).to_bytes(8, "little") + (number * 8).to_bytes(8, "little")
        migration.source.map.write(at, header)
        migration.ring.queue.offer(readable=[(at, 16)], writable=[(at + PAGE, PAGE), (at + 32, 1)])
    migration.ring.queue.publish()
    await migration.advise()
    await migration.listen()
    migration.server.open.set()
    await migration.start()
    await migration.completed()
    for number in range(REQUESTS):
        at = DATA + number * 4 * PAGE
        assert os.pread(migration.target, PAGE, at + PAGE) == bytes([number + 1]) * PAGE
        assert os.pread(migration.target, 1, at + 32) == b"\0"
    await migration.end()


async def test_a_batch_is_no_larger_than_asked_for(migrations: Callable[..., Migration]) -> None:
    """Also when the pages of many requests come at the same moment."""

    class InPairs(Shout):
        def __init__(self) -> None:
            self.batches: list[int] = []

        async def serve(self, queue: ServedQueue) -> None:
            while True:
                batch = await queue.requests(2)
                self.batches.append(len(batch))
                for request in batch:
                    await self.handle(request)
                    request.complete()

    device = InPairs()
    migration = migrations(device)
    await migration.reach("blocked")
    for page in range(DATA // PAGE):  # the ring, and nothing of the requests
        migration.server.place(page)
    async with asyncio.timeout(5):
        while migration.pair.backend.connections[0].rings[0].stats().out != REQUESTS:
            await migration.frontend.get(F.GET_FEATURES)
    migration.server.place_all(wake=False)
    migration.server.theirs.wake(migration.server.base, SIZE)
    migration.server.open.set()
    await migration.completed()
    assert migration.shouted()
    assert sum(device.batches) == REQUESTS
    assert max(device.batches) <= 2


async def test_the_control_socket_answers_while_pages_are_missing(migrations: Callable[..., Migration]) -> None:
    """The fault rule: nothing that may wait for guest memory runs on the control thread."""
    migration = migrations(Shout())
    await migration.reach("blocked")
    for _ in range(10):
        await asyncio.wait_for(migration.frontend.get(F.GET_QUEUE_NUM), 1)
    stopping = asyncio.ensure_future(migration.frontend.request(F.GET_VRING_BASE, VringState(0)))
    await asyncio.sleep(0)
    migration.server.open.set()
    await asyncio.wait_for(stopping, 10)
    await migration.end()


async def test_a_message_that_waits_for_pages_is_told_so_and_the_waits_are_counted(
    migrations: Callable[..., Migration], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "LONG", 0.01)
    migration = migrations(Shout())
    await migration.reach("blocked")
    backend = migration.pair.backend
    assert value_in(as_json(backend.measure()), measures.ACTIVE) == 1
    stopping = asyncio.ensure_future(migration.frontend.request(F.GET_VRING_BASE, VringState(0)))
    async with asyncio.timeout(20):
        while "under way" not in caplog.text:  # noqa: ASYNC110 - what is waited for is a line of the log
            await asyncio.sleep(0.001)
    told = next(line for line in caplog.messages if "under way" in line)
    assert told.startswith("test: GET_VRING_BASE of ring 0 takes long (")
    assert told.endswith(", while pages of guest memory may be missing")
    migration.server.open.set()
    await asyncio.wait_for(stopping, 10)
    await migration.end()
    shown = as_json(backend.measure())
    assert value_in(shown, measures.BLOCKED) > 0
    assert value_in(shown, measures.ACTIVE) == 0


async def test_nothing_is_touched_before_the_acknowledgement(migrations: Callable[..., Migration]) -> None:
    migration = migrations(Shout())
    await migration.reach("awaiting_ack")
    await migration.start()
    for _ in range(5):
        await migration.frontend.get(F.GET_FEATURES)
    assert not migration.pair.backend.connections[0].rings[0].running
    assert migration.holes() == SIZE


async def test_losing_the_front_end_neither_hangs_nor_fills_holes(
    migrations: Callable[..., Migration], pairs: Callable[..., Pair], image: Path
) -> None:
    """Closing the userfaultfd with pages missing would give zeros to the whole guest. Fail closed instead."""
    for device in (Shout(), Blk(Image(image), BlkSettings())):
        migration = migrations(device)
        await migration.reach("blocked")
        before = migration.holes()
        await migration.pair.close()
        assert migration.holes() == before
        again = pairs(device)
        await again.frontend.negotiate()
        assert await again.frontend.get(F.GET_QUEUE_NUM) == 1


async def test_losing_the_front_end_while_it_waits_for_the_ring_to_stop(migrations: Callable[..., Migration]) -> None:
    migration = migrations(Shout())
    await migration.reach("blocked")
    stopping = asyncio.ensure_future(migration.frontend.request(F.GET_VRING_BASE, VringState(0)))
    await asyncio.sleep(0)
    stopping.cancel()
    await migration.pair.close()


async def test_a_migration_that_ends_in_precopy(migrations: Callable[..., Migration]) -> None:
    """After ADVISE neither LISTEN nor END comes, and the table is an ordinary one."""
    migration = migrations(Shout())
    await migration.reach("advised")
    await migration.frontend.set_memory(migration.source)
    await migration.start()
    queue = migration.ring.queue
    for _ in range(REQUESTS):
        while queue.take() is None:
            await asyncio.wait_for(migration.ring.called(), 10)


async def test_every_message_may_come_once_per_queue_pair(migrations: Callable[..., Migration]) -> None:
    migration = migrations(Shout())
    await migration.reach("advised")
    _, fds = await migration.frontend.request(F.POSTCOPY_ADVISE)
    assert len(fds) == 1
    fds.close()
    await migration.frontend.request(F.POSTCOPY_LISTEN)
    await migration.listen()
    await migration.frontend.request(F.POSTCOPY_ACK, PostcopyAck())
    migration.server.open.set()
    await migration.start()
    await migration.completed()
    await migration.end()
    await migration.frontend.request(F.POSTCOPY_END)


@pytest.mark.parametrize("code", [0, 5, 37, 38])
@pytest.mark.parametrize("size", [0, 8])
async def test_every_form_of_the_acknowledgement(migrations: Callable[..., Migration], code: int, size: int) -> None:
    """QEMU sends a u64 of 0 under the id of its last memory message, or under 0 when a guest reboots."""
    migration = migrations(Shout())
    await migration.advise()
    await migration.listen()
    header = b"".join(number.to_bytes(4, "little") for number in (code, 1, size))
    await migration.frontend.send_raw(header + bytes(size))
    await migration.frontend.get(F.GET_FEATURES)
    assert migration.pair.backend.connections[0].postcopy is Postcopy.LISTENING


async def test_listen_after_the_memory_table_is_refused(migrations: Callable[..., Migration]) -> None:
    migration = migrations(Shout())
    await migration.advise()
    await migration.frontend.set_memory(migration.source)
    with pytest.raises(RequestRefused):
        await migration.frontend.request(F.POSTCOPY_LISTEN)


# ---- memory that was left with holes


@pytest.mark.parametrize("kicked", [True, False], ids=["kicked", "kick-taken"])
async def test_memory_left_with_holes_is_not_touched_until_it_is_whole(
    migrations: Callable[..., Migration], pairs: Callable[..., Pair], tmp_path: Path, kicked: bool
) -> None:
    """QEMU with reconnect sends the new back-end a plain table and no word of postcopy.

    And its fault thread may take the first kick, so the ring starts without one, but not before the memory is whole.
    """
    record = tmp_path / "record"
    migration = migrations(Shout(), record=record)
    await migration.reach("usable")
    await migration.pair.close()
    assert record.exists()
    ring = await migration.again(pairs(Shout(), record=record), kicked=kicked)
    assert migration.holes() == SIZE
    migration.server.place_all()
    await migration.completed(ring)
    assert migration.shouted()
    assert not record.exists()


@pytest.mark.parametrize("postcopy", [True, False], ids=["permitted", "not-permitted"])
@pytest.mark.parametrize("said_by", ["front-end", "operator"])
async def test_a_hole_that_nobody_will_fill_holds_nobody_up_once_postcopy_is_over(
    migrations: Callable[..., Migration], pairs: Callable[..., Pair], tmp_path: Path, said_by: str, postcopy: bool
) -> None:
    """The kernel takes back pages of zeros that nobody has written; a balloon makes holes.

    QEMU says END to the new back-end as well, whether that may have a userfaultfd or not. A front-end that had said it
    to the dead one says nothing more: then whoever removes the record says so.
    """
    record = tmp_path / "record"
    migration = migrations(Shout(), record=record)
    await migration.reach("usable")
    await migration.pair.close()
    again = pairs(Shout(), record=record, postcopy=postcopy)
    ring = await migration.again(again)
    migration.server.place_all(but=SIZE // PAGE - 1)
    for _ in range(5):
        await again.frontend.get(F.GET_FEATURES)
    assert not again.backend.connections[0].rings[0].running
    if said_by == "operator":
        record.unlink()
    else:
        await again.frontend.request(F.POSTCOPY_END)
        assert again.backend.connections[0].state()["memory_usable"], "at once"
    await migration.completed(ring)
    assert migration.shouted()
    assert not record.exists()
