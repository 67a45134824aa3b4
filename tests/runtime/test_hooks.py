"""Devices with hooks, and our front-end that serves what they ask for: both ends of each message against each other."""

import logging
import os
import socket
from collections.abc import Callable
from dataclasses import replace

import pytest

from tests.runtime.echo import Echo, answer, ask, quiet
from tests.runtime.gadget import PAGE, Gadget, Gadgets, channel_of, memfd
from vhostuser import hook_requests
from vhostuser.frontend import DRIVABLE_PROTOCOL, BackendServices, SharedMemory
from vhostuser.hooks import offered_by
from vhostuser.memory import MemoryLost
from vhostuser.protocol import (
    U64,
    BackendRequest,
    FrontendRequest,
    MemoryTable,
    ProtocolFeature,
    RequestRefused,
    SingleRegion,
    VringArea,
)
from vhostuser.testing.pair import Pair
from vhostuser.testing.peer import Answer, Expect, ScriptedPeer, Send, asking

B, F, P = BackendRequest, FrontendRequest, ProtocolFeature
ACK, NACK = U64(0), U64(1)


def test_a_device_offers_what_it_has_hooks_for_and_no_other() -> None:
    class Plain(Echo):
        pass

    assert offered_by(Plain.__new__(Plain)) == 0
    names = ("SHMEM", "BACKEND_SEND_FD", "SHARED_OBJECT", "HOST_NOTIFIER", "CRYPTO_SESSION")
    assert offered_by(Gadget.__new__(Gadget)) == sum(P[name].mask for name in names)


# ---- HOST_NOTIFIER


async def test_the_notify_page_of_a_running_ring_is_mapped(gadget: Gadgets) -> None:
    await quiet(gadget.pair)
    assert gadget.services.notify_pages == {0}
    gadget.services.notify(0)
    os.pwrite(gadget.device.pages, b"xx", 0)
    gadget.services.notify(0)
    assert os.pread(gadget.device.pages, 2, 0) == b"\0\0"


async def test_it_is_taken_away_when_the_ring_stops(gadget: Gadgets) -> None:
    await quiet(gadget.pair)
    await gadget.pair.frontend.stop_ring(gadget.pair.rings[0])
    assert not gadget.services.notify_pages


async def test_it_is_taken_away_when_the_ring_is_disabled_and_comes_back(gadget: Gadgets) -> None:
    for enabled in (False, True):
        await gadget.pair.frontend.set_vring_enable(0, enabled)
        await quiet(gadget.pair)
        assert gadget.services.notify_pages == ({0} if enabled else set())


async def test_a_front_end_that_maps_no_page_goes_on_with_kicks(
    no_leaks: None, pairs: Callable[..., Pair], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    device = Gadget()
    pair = pairs(device)
    await pair.set_up()
    async with await channel_of(pair) as peer:
        await ask(pair, b"abc")
        await peer.follow(Expect(B.VRING_HOST_NOTIFIER_MSG, VringArea(0, PAGE, 0), True, fds=1), Answer(NACK))
        assert await answer(pair) == b"ABC"
        await quiet(pair)
        assert "ring 0 goes on with kicks alone" in caplog.text
    device.close()


@pytest.mark.parametrize("without", [P.HOST_NOTIFIER, P.BACKEND_REQ])
async def test_no_page_is_offered_where_that_was_not_negotiated(pairs: Callable[..., Pair], without: P) -> None:
    device = Gadget()
    pair = pairs(device)
    await pair.frontend.negotiate(protocol_features=DRIVABLE_PROTOCOL & ~without.mask)
    await pair.frontend.set_vring_enable(0, True)
    await pair.frontend.set_vring_kick(0, None)
    await quiet(pair)
    device.close()


BAD_AREAS = {
    "half a page": (VringArea(0, 2048, 0), 2 * PAGE),
    "two pages": (VringArea(0, 2 * PAGE, 0), 2 * PAGE),
    "an odd offset": (VringArea(0, PAGE, 512), 2 * PAGE),
    "behind the file": (VringArea(0, PAGE, 2 * PAGE), 2 * PAGE),
    "far away": (VringArea(0, PAGE, (1 << 64) - PAGE), 2 * PAGE),
}


@pytest.mark.parametrize("area, size", BAD_AREAS.values(), ids=BAD_AREAS)
async def test_a_bad_area_is_refused_and_the_old_one_is_gone(
    hearing: tuple[ScriptedPeer, BackendServices], area: VringArea, size: int
) -> None:
    peer, services = hearing
    fd = memfd(size)
    good = asking(Send(B.VRING_HOST_NOTIFIER_MSG, VringArea(0, PAGE, 0), (fd,)))
    await peer.follow(good, Expect(B.VRING_HOST_NOTIFIER_MSG, ACK, reply=True))
    assert services.notify_pages == {0}
    bad = asking(Send(B.VRING_HOST_NOTIFIER_MSG, area, (fd,)))
    await peer.follow(bad, Expect(B.VRING_HOST_NOTIFIER_MSG, NACK, reply=True))
    assert not services.notify_pages
    os.close(fd)


async def test_a_page_whose_file_is_truncated_harms_nobody(hearing: tuple[ScriptedPeer, BackendServices]) -> None:
    peer, services = hearing
    fd = memfd(PAGE)
    good = asking(Send(B.VRING_HOST_NOTIFIER_MSG, VringArea(0, PAGE, 0), (fd,)))
    await peer.follow(good, Expect(B.VRING_HOST_NOTIFIER_MSG, ACK, reply=True))
    os.truncate(fd, 0)
    with pytest.raises(MemoryLost):
        services.notify(0)
    os.close(fd)


# ---- crypto sessions, the display


async def test_crypto_sessions_are_opened_and_closed(gadget: Gadgets) -> None:
    frontend, device = gadget.pair.frontend, gadget.device
    first = await frontend.create_crypto_session(1, b"key")
    second = await frontend.create_crypto_session(2, b"other key")
    assert device.sessions == {first: (1, b"key"), second: (2, b"other key")}
    await frontend.close_crypto_session(first)
    assert list(device.sessions) == [second]
    with pytest.raises(RequestRefused):
        await frontend.close_crypto_session(first)
    with pytest.raises(RequestRefused):
        await frontend.create_crypto_session(99, b"")
    await gadget.pair.close()
    assert not device.sessions, "a session outlives its front-end"


async def test_crypto_sessions_are_limited(gadget: Gadgets, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hook_requests, "MOST_SESSIONS", 1)
    await gadget.pair.frontend.create_crypto_session(1, b"")
    with pytest.raises(RequestRefused):
        await gadget.pair.frontend.create_crypto_session(1, b"")


async def test_the_display_is_the_devices(gadget: Gadgets) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with ours, theirs:
        await gadget.pair.frontend.gpu_set_socket(theirs.fileno())
        assert gadget.device.display is not None
        gadget.device.display.send(b"picture")
        assert ours.recv(10) == b"picture"


async def test_what_is_no_socket_is_no_display(gadget: Gadgets) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with ours, theirs:
        for fd in (theirs.fileno(), gadget.device.file):
            with pytest.raises(RequestRefused):
                await gadget.pair.frontend.gpu_set_socket(fd)
    assert gadget.device.display is None


async def test_a_device_without_a_display_refuses_one(no_leaks: None, pairs: Callable[..., Pair]) -> None:
    pair = pairs(Echo())
    await pair.frontend.negotiate()
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with ours, theirs, pytest.raises(RequestRefused):
        await pair.frontend.gpu_set_socket(theirs.fileno())


# ---- addresses


GPA = DRIVABLE_PROTOCOL | P.GPA_ADDRESSES.mask


async def test_ring_addresses_are_guest_addresses_where_that_was_negotiated(
    no_leaks: None, pairs: Callable[..., Pair]
) -> None:
    device = Gadget()
    pair = pairs(device)
    await pair.frontend.negotiate(protocol_features=GPA)
    pair.memory = SharedMemory((0, 4 << 20))
    await pair.frontend.set_memory(pair.memory)
    ring = pair.add_ring(0)
    await pair.frontend.start_ring(ring, pair.memory)
    address = pair.backend.connections[0].rings[0].address
    assert address is not None
    assert address.desc == ring.queue.desc
    await ask(pair, b"abc")
    assert await answer(pair) == b"ABC"
    device.close()


@pytest.mark.parametrize("by_slots", [False, True])
async def test_user_addresses_mean_nothing_then(no_leaks: None, pairs: Callable[..., Pair], by_slots: bool) -> None:
    """Two regions at user address 0, one of which is removed again."""
    device = Gadget()
    pair = pairs(device)
    await pair.frontend.negotiate(protocol_features=GPA)
    with SharedMemory((0, 1 << 20), (1 << 32, 1 << 20)) as memory:
        told = [replace(region.describe(), user=0) for region in memory.regions]
        if by_slots:
            for region, fd in zip(told, memory.fds, strict=True):
                await pair.frontend.request(F.ADD_MEM_REG, SingleRegion(region), (fd,))
            await pair.frontend.request(F.REM_MEM_REG, SingleRegion(told[1]))
        else:
            await pair.frontend.request(F.SET_MEM_TABLE, MemoryTable(tuple(told)), memory.fds)
        assert len(pair.backend.connections[0].memory.regions) == 2 - by_slots
    device.close()
