"""The life of a connection and its rings, both ends in one process, on both event loops."""

import asyncio
import os
from collections.abc import Callable

import pytest

from tests.runtime.echo import DATA, Echo, answer, ask, next_used, quiet
from vhostuser.device import DeviceFailed
from vhostuser.frontend import DRIVABLE, SharedMemory
from vhostuser.protocol import (
    U64,
    Config,
    FrontendRequest,
    Inflight,
    Log,
    MemoryRegion,
    ProtocolFeature,
    RequestRefused,
    SingleRegion,
    VirtioFeature,
    VringAddress,
    VringFd,
    VringState,
)
from vhostuser.testing.leaks import open_fds
from vhostuser.testing.pair import MIB, Pair
from vhostuser.virtqueue import Request

pytestmark = pytest.mark.usefixtures("no_leaks")


async def test_a_request_makes_the_round_trip(pairs: Callable[..., Pair]) -> None:
    pair = pairs(Echo())
    await pair.set_up()
    await ask(pair, b"hello")
    assert await answer(pair) == b"HELLO"


async def test_rings_are_independent(pairs: Callable[..., Pair]) -> None:
    pair = pairs(Echo())
    await pair.set_up(rings=2)
    await ask(pair, b"one", ring=1)
    assert await answer(pair, ring=1) == b"ONE"
    await ask(pair, b"zero")
    assert await answer(pair) == b"ZERO"


async def test_a_ring_starts_at_its_first_kick_and_not_before(pairs: Callable[..., Pair]) -> None:
    """Section "Ring states"."""
    device = Echo()
    pair = pairs(device)
    await pair.set_up()
    await ask(pair, b"early", kick=False)
    await quiet(pair)
    assert device.events == []
    pair.rings[0].kick()
    assert await answer(pair) == b"EARLY"
    assert device.events == ["start"]


async def test_a_kick_before_enable_is_not_lost(pairs: Callable[..., Pair]) -> None:
    """rust-vmm#343: a kick that came while the ring was disabled was swallowed."""
    device = Echo()
    pair = pairs(device)
    await pair.set_up(enable=False)
    await ask(pair, b"waiting")
    await quiet(pair)
    assert device.events == []
    await pair.frontend.request(FrontendRequest.SET_VRING_ENABLE, VringState(0, 1))
    assert await answer(pair) == b"WAITING"


async def test_a_disabled_ring_stops_and_an_enabled_one_goes_on(pairs: Callable[..., Pair]) -> None:
    device = Echo()
    pair = pairs(device)
    await pair.set_up()
    await ask(pair, b"one")
    assert await answer(pair) == b"ONE"
    await pair.frontend.request(FrontendRequest.SET_VRING_ENABLE, VringState(0, 0))
    assert device.events == ["start", "stop"]
    await ask(pair, b"two")
    await quiet(pair)
    assert pair.rings[0].queue.take() is None
    await pair.frontend.request(FrontendRequest.SET_VRING_ENABLE, VringState(0, 1))
    assert await answer(pair) == b"TWO"


async def test_without_protocol_features_rings_are_enabled_at_once(pairs: Callable[..., Pair]) -> None:
    """Section "Ring states": SET_FEATURES without bit 30 enables all rings."""
    pair = pairs(Echo())
    await pair.frontend.negotiate(features=DRIVABLE & ~VirtioFeature.PROTOCOL_FEATURES.mask)
    pair.memory = SharedMemory((0, 4 * MIB))
    await pair.frontend.set_memory(pair.memory)
    pair.add_ring(0)
    await pair.frontend.start_ring(pair.rings[0], pair.memory, enable=False)
    await ask(pair, b"old front-end")
    assert await answer(pair) == b"OLD FRONT-END"


async def test_get_vring_base_waits_for_requests_under_way(pairs: Callable[..., Pair]) -> None:
    device = Echo()
    pair = pairs(device)
    await pair.set_up()
    await ask(pair, b"first")
    assert await answer(pair) == b"FIRST"
    device.gate.clear()
    await ask(pair, b"slow")
    await device.taken(b"slow")
    stopping = asyncio.ensure_future(pair.frontend.stop_ring(pair.rings[0]))
    done, _ = await asyncio.wait((stopping,), timeout=0.05)
    assert not done
    device.release()
    assert await asyncio.wait_for(stopping, 5) == 2
    assert pair.rings[0].queue.take() is not None, "the request was completed before the ring stopped"
    assert device.events == ["start", "stop"], "the device is stopped before the front-end learns of it"


async def test_get_vring_base_of_a_ring_that_never_ran_is_its_base(pairs: Callable[..., Pair]) -> None:
    pair = pairs(Echo())
    await pair.set_up()
    await pair.frontend.request(FrontendRequest.SET_VRING_BASE, VringState(1, 7))
    payload, _ = await pair.frontend.request(FrontendRequest.GET_VRING_BASE, VringState(1))
    assert payload == VringState(1, 7)


async def test_a_stopped_ring_goes_on_where_it_stopped(pairs: Callable[..., Pair]) -> None:
    pair = pairs(Echo())
    await pair.set_up()
    for word in (b"a", b"b", b"c"):
        await ask(pair, word)
        assert await answer(pair) == word.upper()
    base = await pair.frontend.stop_ring(pair.rings[0])
    assert base == 3
    await ask(pair, b"d")
    await quiet(pair)
    assert pair.rings[0].queue.take() is None, "a stopped ring must not be touched, whatever the kick says"
    assert pair.memory is not None
    await pair.frontend.start_ring(pair.rings[0], pair.memory, base=base)
    assert await answer(pair) == b"D"


async def test_the_memory_table_changes_while_requests_are_under_way(pairs: Callable[..., Pair]) -> None:
    """spdk#3132: SET_MEM_TABLE while workers still use the old ring addresses."""
    pair = pairs(Echo())
    await pair.set_up()
    assert pair.memory is not None
    for number in range(20):
        await ask(pair, b"word %d" % number)
        await pair.frontend.set_memory(pair.memory)
        assert await answer(pair) == b"WORD %d" % number


async def test_slots_are_added_and_removed_under_load(pairs: Callable[..., Pair]) -> None:
    pair = pairs(Echo())
    await pair.set_up()
    extra = SharedMemory((64 * MIB, MIB))
    region = extra.table().regions[0]
    try:
        for number in range(10):
            await ask(pair, b"x%d" % number)
            await pair.frontend.request(FrontendRequest.ADD_MEM_REG, SingleRegion(region), extra.fds)
            await pair.frontend.request(FrontendRequest.REM_MEM_REG, SingleRegion(region))
            assert await answer(pair) == b"X%d" % number
    finally:
        extra.close()


async def test_a_slot_that_overlaps_is_refused_and_nothing_changes(pairs: Callable[..., Pair]) -> None:
    pair = pairs(Echo())
    await pair.set_up()
    other = SharedMemory((MIB, MIB))
    with pytest.raises(RequestRefused):
        await pair.frontend.request(FrontendRequest.ADD_MEM_REG, SingleRegion(other.table().regions[0]), other.fds)
    other.close()
    await ask(pair, b"still here")
    assert await answer(pair) == b"STILL HERE"


async def test_removing_an_unknown_region_is_refused(pairs: Callable[..., Pair]) -> None:
    pair = pairs(Echo())
    await pair.set_up()
    with pytest.raises(RequestRefused):
        await pair.frontend.request(FrontendRequest.REM_MEM_REG, SingleRegion(MemoryRegion(5, 6, 7, 0)))


async def test_a_file_smaller_than_its_region_is_refused(pairs: Callable[..., Pair]) -> None:
    pair = pairs(Echo())
    await pair.frontend.negotiate()
    memory = SharedMemory((0, MIB))
    os.truncate(memory.fds[0], MIB // 2)
    with pytest.raises(RequestRefused):
        await pair.frontend.set_memory(memory)
    memory.close()


async def test_a_replaced_call_eventfd_is_the_one_that_is_called(pairs: Callable[..., Pair]) -> None:
    pair = pairs(Echo())
    await pair.set_up()
    await ask(pair, b"a")
    assert await answer(pair) == b"A"
    ring = pair.rings[0]
    old, ring.call_fd = ring.call_fd, os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    await pair.frontend.request(FrontendRequest.SET_VRING_CALL, VringFd(0), (ring.call_fd,))
    await ask(pair, b"b")
    assert await answer(pair) == b"B"
    with pytest.raises(BlockingIOError):
        os.eventfd_read(old)
    os.close(old)


async def test_a_replaced_kick_eventfd_is_dead(pairs: Callable[..., Pair]) -> None:
    pair = pairs(Echo())
    await pair.set_up()
    await ask(pair, b"a")
    assert await answer(pair) == b"A"
    ring = pair.rings[0]
    old, ring.kick_fd = ring.kick_fd, os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    await pair.frontend.request(FrontendRequest.SET_VRING_KICK, VringFd(0), (ring.kick_fd,))
    await ask(pair, b"b")
    assert await answer(pair) == b"B"
    assert sum(os.fstat(fd) == os.fstat(old) for fd in open_fds()) >= 1
    os.close(old)


async def test_a_ring_without_kicks_is_polled(pairs: Callable[..., Pair]) -> None:
    pair = pairs(Echo())
    await pair.set_up()
    await pair.frontend.request(FrontendRequest.SET_VRING_KICK, VringFd(0, has_fd=False))
    await ask(pair, b"no kick", kick=False)
    assert await answer(pair) == b"NO KICK"


async def test_a_broken_ring_stops_alone_and_says_so(pairs: Callable[..., Pair]) -> None:
    pair = pairs(Echo())
    await pair.set_up(rings=2)
    assert pair.memory is not None
    # The available index jumps further than the ring is long.
    pair.memory.map.write(pair.rings[0].queue.avail + 2, (1000).to_bytes(2, "little"))
    pair.rings[0].kick()
    await asyncio.wait_for(pair.rings[0].broken(), 5)
    await ask(pair, b"alive", ring=1)
    assert await answer(pair, ring=1) == b"ALIVE"


async def test_ring_addresses_outside_of_memory_do_not_start_it(pairs: Callable[..., Pair]) -> None:
    pair = pairs(Echo())
    await pair.set_up(rings=2)
    await pair.frontend.request(FrontendRequest.SET_VRING_ADDR, VringAddress(0, 0, 1 << 40, 1 << 40, 1 << 40, 0))
    pair.rings[0].kick()
    await asyncio.wait_for(pair.rings[0].broken(), 5)
    await ask(pair, b"alive", ring=1)
    assert await answer(pair, ring=1) == b"ALIVE"


async def test_a_handler_that_raises_fails_its_request_only(pairs: Callable[..., Pair]) -> None:
    class Picky(Echo):
        async def handle(self, request: Request) -> None:
            if request.read() == b"bad":
                raise ValueError("no")
            await super().handle(request)

        def failed(self, request: Request, error: Exception) -> None:
            request.write(b"ERR")

    pair = pairs(Picky())
    await pair.set_up()
    await ask(pair, b"bad")
    assert await answer(pair) == b"ERR"
    await ask(pair, b"good")
    assert await answer(pair) == b"GOOD"


async def test_suspended_handlers_do_not_hold_up_others(pairs: Callable[..., Pair]) -> None:
    device = Echo()
    pair = pairs(device)
    await pair.set_up()
    device.gate.clear()
    for word in (b"a", b"b", b"c"):
        await ask(pair, word)
        await device.taken(word)
    device.release()
    heads = {(await next_used(pair))[0] for _ in range(3)}
    assert len(heads) == 3


async def test_a_device_that_cannot_start_ends_the_connection(pairs: Callable[..., Pair]) -> None:
    class Broken(Echo):
        async def start(self, features: int) -> None:
            raise DeviceFailed("the image is locked by another process")

    pair = pairs(Broken())
    await pair.set_up()
    await ask(pair, b"x")
    await asyncio.wait_for(pair.serving, 5)


async def test_config_space(pairs: Callable[..., Pair]) -> None:
    device = Echo()
    pair = pairs(device)
    await pair.frontend.negotiate()

    async def read(offset: int, size: int) -> bytes:
        payload, _ = await pair.frontend.request(FrontendRequest.GET_CONFIG, Config(offset, size, 0, bytes(size)))
        assert isinstance(payload, Config)
        return payload.data

    assert await read(0, 10) == b"0123456789"
    assert await read(3, 4) == b"3456", "exactly the part that was asked for"
    assert await read(8, 4) == b"89\0\0"
    with pytest.raises(RequestRefused):
        await read(250, 20)
    await pair.frontend.request(FrontendRequest.SET_CONFIG, Config(1, 2, 0, b"ab"))
    assert await read(0, 4) == b"0ab3"
    with pytest.raises(RequestRefused):
        await pair.frontend.request(FrontendRequest.SET_CONFIG, Config(6, 1, 0, b"x"))
    await pair.frontend.request(FrontendRequest.SET_CONFIG, Config(6, 1, 1, b"x"))
    assert await read(6, 1) == b"x", "a migration may write read-only fields"
    with pytest.raises(RequestRefused):
        await pair.frontend.request(FrontendRequest.SET_CONFIG, Config(250, 20, 1, bytes(20)))
    assert len(device.space) == 10, "the device is not asked about what lies beyond any space"


async def test_inflight_region_is_made_and_taken_back(pairs: Callable[..., Pair]) -> None:
    pair = pairs(Echo())
    await pair.set_up()
    payload, fds = await pair.frontend.request(FrontendRequest.GET_INFLIGHT_FD, Inflight(0, 0, 2, 64))
    assert isinstance(payload, Inflight)
    assert payload.mmap_size > 0
    await pair.frontend.request(FrontendRequest.SET_INFLIGHT_FD, payload, tuple(fds))
    with pytest.raises(RequestRefused):
        await pair.frontend.request(FrontendRequest.SET_INFLIGHT_FD, Inflight(1 << 30, 0, 2, 64), tuple(fds))
    fds.close()
    await ask(pair, b"tracked")
    assert await answer(pair) == b"TRACKED"


async def test_a_ring_larger_than_was_asked_for_is_tracked_in_its_inflight_region(pairs: Callable[..., Pair]) -> None:
    """The order of QEMU 10.0: it asks for its device's queue size, and the guest makes larger rings."""
    device = Echo()
    pair = pairs(device)
    await pair.set_up(rings=2, size=1024)
    buffer = await pair.frontend.get_inflight_fd(2, 128)
    await pair.frontend.set_inflight_fd(buffer)
    device.gate.clear()
    queue = pair.rings[1].queue
    heads = [queue.offer(readable=[(DATA, 2)] * 4) for _ in range(200)]
    queue.publish()
    pair.rings[1].kick()
    for _ in range(device.requests_at_once):
        await asyncio.wait_for(device.entered.get(), 5)
    assert buffer.queue(1).heads == tuple(heads[: device.requests_at_once])
    assert buffer.queue(0).heads == ()
    device.release()
    for _ in heads:
        await next_used(pair, 1)
    assert buffer.queue(1).heads == ()
    buffer.close()


async def test_a_ring_larger_than_the_inflight_region_goes_without_it(
    pairs: Callable[..., Pair], caplog: pytest.LogCaptureFixture
) -> None:
    """A region of another program, for one entry: the machine has to boot all the same."""
    pair = pairs(Echo())
    await pair.set_up()
    fd = os.memfd_create("inflight", os.MFD_CLOEXEC)
    os.truncate(fd, 128)
    await pair.frontend.request(FrontendRequest.SET_INFLIGHT_FD, Inflight(128, 0, 2, 1), (fd,))
    await ask(pair, b"untracked")
    assert await answer(pair) == b"UNTRACKED"
    assert os.pread(fd, 128, 0) == bytes(128)
    os.close(fd)
    assert "the in-flight region 1" in caplog.text


async def test_written_pages_are_logged_while_log_all_is_on(pairs: Callable[..., Pair]) -> None:
    pair = pairs(Echo())
    await pair.set_up()
    log = os.memfd_create("log", os.MFD_CLOEXEC)
    os.truncate(log, 4096)
    await pair.frontend.request(FrontendRequest.SET_LOG_BASE, Log(4096, 0), (log,))
    features = pair.frontend.session.features
    await pair.frontend.request(FrontendRequest.SET_FEATURES, U64(features & ~VirtioFeature.LOG_ALL.mask))
    await ask(pair, b"unlogged")
    await answer(pair)
    assert not any(os.pread(log, 4096, 0)), "nothing is logged without LOG_ALL"
    await pair.frontend.request(FrontendRequest.SET_FEATURES, U64(features | VirtioFeature.LOG_ALL.mask))
    await ask(pair, b"logged")
    await answer(pair)
    page = (DATA + 4096) // 4096
    bits = int.from_bytes(os.pread(log, 4096, 0), "little")
    assert bits == 1 << page, "the written buffer, and neither the readable one nor the ring"
    os.close(log)


async def test_the_front_end_comes_back(pairs: Callable[..., Pair]) -> None:
    device = Echo()
    for _ in range(3):
        pair = pairs(device)
        await pair.set_up()
        await ask(pair, b"again")
        assert await answer(pair) == b"AGAIN"
        await pair.close()
    assert device.events == ["start", "stop"] * 3


async def test_several_connections_need_a_device_each_and_never_offer_pagefault(pairs: Callable[..., Pair]) -> None:
    with pytest.raises(ValueError, match="device each"):
        pairs(Echo(), connections=2)
    pair = pairs(Echo, connections=2)
    await pair.frontend.negotiate()
    assert not pair.frontend.session.has(ProtocolFeature.PAGEFAULT)
