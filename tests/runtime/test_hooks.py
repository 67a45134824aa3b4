"""Devices with hooks, and our front-end that serves what they ask for: both ends of each message against each other."""

import asyncio
import logging
import os
import socket
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import NamedTuple
from uuid import UUID

import pytest

from tests.protocol import samples
from tests.runtime.echo import Echo, answer, ask, quiet
from tests.runtime.gadget import PAGE, Gadget, memfd
from vhostuser import announcements, hook_requests, shared_memory, shared_objects
from vhostuser.frontend import DRIVABLE_PROTOCOL, BackendRequests, BackendServices, ObjectRegistry, SharedMemory
from vhostuser.hooks import offered_by
from vhostuser.memory import MemoryLost
from vhostuser.protocol import (
    U64,
    BackendRequest,
    FrontendRequest,
    LocalProtocolError,
    MemoryTable,
    MmapMsg,
    ProtocolFeature,
    RequestRefused,
    ShmemConfig,
    SingleRegion,
    Uuid,
    VringArea,
)
from vhostuser.testing.pair import Pair
from vhostuser.testing.peer import Answer, Expect, ScriptedPeer, Send, asking

B, F, P = BackendRequest, FrontendRequest, ProtocolFeature
ACK, NACK = U64(0), U64(1)
ONE, TWO = UUID(int=1), UUID(int=2)


class Gadgets(NamedTuple):
    """Both ends, and what the front-end does for the device."""

    pair: Pair
    device: Gadget
    services: BackendServices


@pytest.fixture
async def registry() -> AsyncIterator[ObjectRegistry]:
    made = ObjectRegistry()
    yield made
    made.close()


@pytest.fixture
async def gadgets(
    no_leaks: None, no_mappings: None, pairs: Callable[..., Pair], registry: ObjectRegistry
) -> AsyncIterator[Callable[..., object]]:
    """Makes gadgets whose ring 0 is started and running."""
    made: list[Gadgets] = []

    async def make() -> Gadgets:
        device = Gadget()
        pair = pairs(device)
        await pair.set_up()
        services = await pair.frontend.serve_requests(registry)
        made.append(Gadgets(pair, device, services))
        await ask(pair, b"abc")
        assert await answer(pair) == b"ABC"
        return made[-1]

    yield make
    for each in made:
        await each.pair.close()
        each.device.close()


@pytest.fixture
async def gadget(gadgets: Callable[..., object]) -> Gadgets:
    return await gadgets()  # type: ignore[misc,no-any-return]


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


async def channel_of(pair: Pair) -> ScriptedPeer:
    """Gives the back-end a channel; our end of it."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with theirs:
        await pair.frontend.set_backend_req_fd(theirs.fileno())
    return ScriptedPeer(ours)


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


@pytest.fixture
async def hearing(no_leaks: None, no_mappings: None) -> AsyncIterator[tuple[ScriptedPeer, BackendServices]]:
    """A scripted back-end's end of the channel, and our front-end's services."""
    session = samples.connect().front
    services = BackendServices((4 * PAGE, 0, 2 * PAGE), ObjectRegistry(), "us")
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    requests = BackendRequests(ours, session.channel(), services, keep=False)
    async with ScriptedPeer(theirs) as peer:
        yield peer, services
    services.close()
    requests.close()
    await asyncio.sleep(0)


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


# ---- shared memory


async def test_the_windows_are_as_large_as_the_device_says(gadget: Gadgets) -> None:
    assert {shmid: window.size for shmid, window in gadget.services.windows.items()} == gadget.device.shmem_sizes


async def test_what_is_mapped_is_the_file_itself(gadget: Gadgets) -> None:
    device, window = gadget.device, gadget.services.windows[0]
    await device.shmem.map(0, PAGE, 2 * PAGE, device.file, writable=True)
    assert window.pieces == ((PAGE, 2 * PAGE),)
    assert window.read(PAGE, 4) == b"file"
    window.write(2 * PAGE, b"guest")
    assert os.pread(device.file, 5, PAGE) == b"guest"
    with pytest.raises(LookupError):
        window.read(0, 4)
    await device.shmem.unmap(0, PAGE)
    assert window.pieces == () == device.shmem.mapped


async def test_a_part_of_a_file_read_only(gadget: Gadgets) -> None:
    os.pwrite(gadget.device.file, b"third page", 2 * PAGE)
    await gadget.device.shmem.map(3, 0, PAGE, gadget.device.file, fd_offset=2 * PAGE)
    window = gadget.services.windows[3]
    assert window.read(0, 10) == b"third page"
    with pytest.raises(MemoryLost):
        window.write(0, b"no")


async def test_a_file_that_is_truncated_harms_nobody(gadget: Gadgets) -> None:
    await gadget.device.shmem.map(0, 0, PAGE, gadget.device.file)
    os.truncate(gadget.device.file, 0)
    with pytest.raises(MemoryLost):
        gadget.services.windows[0].read(0, 4)


async def test_pieces_do_not_overlap_and_others_stay(gadget: Gadgets) -> None:
    shmem, fd = gadget.device.shmem, gadget.device.file
    await shmem.map(0, 4 * PAGE, 2 * PAGE, fd)
    for offset, length in ((4, 2), (3, 2), (5, 1), (2, 8), (4, 1)):
        with pytest.raises(RequestRefused, match="something is mapped there"):
            await shmem.map(0, offset * PAGE, length * PAGE, fd)
    await shmem.map(0, 6 * PAGE, PAGE, fd)
    await shmem.map(0, 3 * PAGE, PAGE, fd)
    await shmem.map(3, 0, 2 * PAGE, fd)
    assert gadget.services.windows[0].pieces == ((3 * PAGE, PAGE), (4 * PAGE, 2 * PAGE), (6 * PAGE, PAGE))


WRONG_MAPS = {
    "no such region": ((1, 0, PAGE), {}, "no shared memory region 1"),
    "beyond the end": ((3, 3 * PAGE, 2 * PAGE), {}, "the region has"),
    "odd offset": ((0, 100, PAGE), {}, "whole pages"),
    "odd length": ((0, 0, 100), {}, "whole pages"),
    "nothing": ((0, 0, 0), {}, "whole pages"),
    "odd file offset": ((0, 0, PAGE), {"fd_offset": 1}, "whole pages"),
    "behind the file": ((0, 0, PAGE), {"fd_offset": 8 * PAGE}, "the front-end refused SHMEM_MAP"),
}


@pytest.mark.parametrize("where, options, words", WRONG_MAPS.values(), ids=WRONG_MAPS)
async def test_a_mapping_that_is_wrong_is_refused(
    gadget: Gadgets, where: tuple[int, int, int], options: dict[str, int], words: str
) -> None:
    with pytest.raises(RequestRefused, match=words):
        await gadget.device.shmem.map(*where, gadget.device.file, **options)
    assert gadget.device.shmem.mapped == ()


async def test_mappings_are_limited(gadget: Gadgets, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_memory, "MOST_MAPPINGS", 1)
    await gadget.device.shmem.map(0, 0, PAGE, gadget.device.file)
    with pytest.raises(RequestRefused, match="1 pieces are mapped"):
        await gadget.device.shmem.map(0, PAGE, PAGE, gadget.device.file)


async def test_what_is_not_mapped_cannot_be_unmapped(gadget: Gadgets) -> None:
    await gadget.device.shmem.map(0, 0, 2 * PAGE, gadget.device.file)
    with pytest.raises(RequestRefused, match="nothing is mapped"):
        await gadget.device.shmem.unmap(0, PAGE)


WRONG_MESSAGES = {
    "no such region": MmapMsg(1, 0, 0, PAGE, 0),
    "beyond the end": MmapMsg(0, 0, 4 * PAGE, PAGE, 0),
    "over the end": MmapMsg(0, 0, 3 * PAGE, 2 * PAGE, 0),
    "around the end": MmapMsg(0, 0, PAGE, (1 << 64) - PAGE, 0),
    "nothing": MmapMsg(0, 0, 0, 0, 0),
    "odd offset": MmapMsg(0, 0, 17, PAGE, 0),
    "odd length": MmapMsg(0, 0, 0, 17, 0),
    "odd file offset": MmapMsg(0, 17, 0, PAGE, 0),
    "over another": MmapMsg(2, 0, 0, 2 * PAGE, 0),
    "behind the file": MmapMsg(0, 8 * PAGE, 0, PAGE, 0),
}


@pytest.mark.parametrize("wrong", WRONG_MESSAGES.values(), ids=WRONG_MESSAGES)
async def test_a_front_end_maps_nothing_that_is_wrong(
    hearing: tuple[ScriptedPeer, BackendServices], wrong: MmapMsg
) -> None:
    peer, services = hearing
    fd = memfd(8 * PAGE)
    right = asking(Send(B.SHMEM_MAP, MmapMsg(2, 0, PAGE, PAGE, 0), (fd,)))
    await peer.follow(right, Expect(B.SHMEM_MAP, ACK, reply=True))
    await peer.follow(asking(Send(B.SHMEM_MAP, wrong, (fd,))), Expect(B.SHMEM_MAP, NACK, reply=True))
    assert [window.pieces for window in services.windows.values()] == [(), ((PAGE, PAGE),)]
    os.close(fd)


@pytest.mark.parametrize("wrong", [(0, PAGE), (PAGE, 2 * PAGE), (0, 2 * PAGE), (2 * PAGE, 0)], ids=str)
async def test_a_front_end_unmaps_whole_pieces_only(
    hearing: tuple[ScriptedPeer, BackendServices], wrong: tuple[int, int]
) -> None:
    peer, services = hearing
    fd = memfd(8 * PAGE)
    right = asking(Send(B.SHMEM_MAP, MmapMsg(2, 0, PAGE, PAGE, 0), (fd,)))
    await peer.follow(right, Expect(B.SHMEM_MAP, ACK, reply=True))
    os.close(fd)
    unmap = asking(Send(B.SHMEM_UNMAP, MmapMsg(2, 0, *wrong, 0)))
    await peer.follow(unmap, Expect(B.SHMEM_UNMAP, NACK, reply=True))
    assert services.windows[2].pieces == ((PAGE, PAGE),)


async def test_what_is_no_file_is_not_mapped(hearing: tuple[ScriptedPeer, BackendServices]) -> None:
    peer, _ = hearing
    read, write = os.pipe()
    message = asking(Send(B.SHMEM_MAP, MmapMsg(0, 0, 0, PAGE, 0), (read,)))
    await peer.follow(message, Expect(B.SHMEM_MAP, NACK, reply=True))
    os.close(read)
    os.close(write)


async def test_a_reset_unmaps_everything_at_both_ends(gadget: Gadgets) -> None:
    """ "Mappings are automatically unmapped by the front-end across device reset operation"."""
    await gadget.device.shmem.map(0, 0, PAGE, gadget.device.file)
    await gadget.pair.frontend.reset_device()
    assert gadget.services.windows[0].pieces == () == gadget.device.shmem.mapped
    assert not gadget.services.notify_pages


async def test_a_front_end_that_was_reset_by_itself_is_told_to_unmap_and_may_have_nothing(gadget: Gadgets) -> None:
    await gadget.device.shmem.map(0, 0, PAGE, gadget.device.file)
    gadget.services.reset()
    with pytest.raises(RequestRefused, match="refused SHMEM_UNMAP"):
        await gadget.device.shmem.unmap(0, 0)
    await gadget.device.shmem.map(0, 0, PAGE, gadget.device.file)


async def test_a_request_maps_on_the_data_thread(gadget: Gadgets) -> None:
    await ask(gadget.pair, b"map")
    assert await answer(gadget.pair) == b"yes"
    assert gadget.services.windows[0].read(0, 4) == b"file"


async def test_what_was_mapped_when_nobody_waited_any_more_is_unmapped_again(
    no_leaks: None, pairs: Callable[..., Pair], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The front-end answers only after its GET_VRING_BASE: two rings, so that the device is not suspended by then."""
    monkeypatch.setattr(announcements, "WITHHELD", 0.02)
    device = Gadget()
    pair = pairs(device)
    await pair.set_up(rings=2)
    async with await channel_of(pair) as peer:
        await ask(pair, b"abc", ring=1)
        assert await answer(pair, ring=1) == b"ABC"
        await ask(pair, b"map")
        area = MmapMsg(0, 0, 0, PAGE, 0)
        await expect_among(peer, B.SHMEM_MAP)
        assert await asyncio.wait_for(pair.frontend.stop_ring(pair.rings[0]), 5) == 1
        assert await answer(pair) == b"no "
        assert device.shmem.mapped == (area,)
        await peer.follow(Answer(ACK))
        await expect_among(peer, B.SHMEM_UNMAP)
        await peer.follow(Answer(ACK))
        await quiet(pair)
        assert device.shmem.mapped == ()
    device.close()


async def expect_among(peer: ScriptedPeer, code: B) -> None:
    """The request of this code; those for notify pages before it are answered."""
    while (message := await peer.receive()).header.request != code:
        assert message.header.request == B.VRING_HOST_NOTIFIER_MSG
        await peer.follow(Answer(ACK))


async def test_a_device_without_regions_has_no_configuration(pairs: Callable[..., Pair]) -> None:
    pair = pairs(Echo())
    await pair.frontend.negotiate()
    with pytest.raises(LocalProtocolError, match="SHMEM was not negotiated"):
        await pair.frontend.get_shmem_config()


@pytest.mark.parametrize("sizes", [{256: PAGE}, {-1: PAGE}, {0: 100}, {0: 0}, {0: -PAGE}], ids=str)
def test_regions_that_cannot_be_are_refused(sizes: dict[int, int]) -> None:
    with pytest.raises(ValueError, match="ids are 0 to 255"):
        shared_memory.shmem_config(sizes)


def test_the_configuration_names_every_region() -> None:
    assert shared_memory.shmem_config({1: PAGE, 255: 2 * PAGE}) == ShmemConfig(2, (0, PAGE, *[0] * 253, 2 * PAGE))


# ---- shared objects


async def test_one_device_is_given_what_another_exports(gadgets: Callable[..., object]) -> None:
    exporter: Gadgets = await gadgets()  # type: ignore[misc]
    importer: Gadgets = await gadgets()  # type: ignore[misc]
    await exporter.device.objects.add(ONE, exporter.device.file)
    with pytest.raises(RequestRefused):
        await importer.device.objects.look_up(ONE)  # the front-end has not fetched it yet
    assert exporter.services._objects is not None
    await exporter.services._objects.fetch(ONE)
    fd = await importer.device.objects.look_up(ONE)
    assert os.pread(fd, 4, 0) == b"file"
    os.close(fd)
    await exporter.device.objects.remove(ONE)
    with pytest.raises(RequestRefused):
        await importer.device.objects.look_up(ONE)


async def test_only_the_owner_removes_an_object(gadgets: Callable[..., object]) -> None:
    exporter: Gadgets = await gadgets()  # type: ignore[misc]
    other: Gadgets = await gadgets()  # type: ignore[misc]
    await exporter.device.objects.add(ONE, exporter.device.file)
    with pytest.raises(RequestRefused, match="refused SHARED_OBJECT_ADD"):
        await other.device.objects.add(ONE, other.device.file)
    with pytest.raises(RequestRefused, match="is not exported"):
        await other.device.objects.remove(ONE)
    asking_ = other.pair.backend.connections[0]._announcements
    with pytest.raises(RequestRefused, match="refused SHARED_OBJECT_REMOVE"):
        await asking_.ask(B.SHARED_OBJECT_REMOVE, Uuid(ONE.bytes))
    fd = await exporter.pair.frontend.get_shared_object(ONE)
    os.close(fd)


async def test_an_object_belongs_to_the_table_while_it_is_exported(gadget: Gadgets) -> None:
    """The device may close its own descriptor; no_leaks looks for the table's at the end."""
    fd = memfd(PAGE, b"data")
    await gadget.device.objects.add(ONE, fd)
    os.close(fd)
    fetched = await gadget.pair.frontend.get_shared_object(ONE)
    assert os.pread(fetched, 4, 0) == b"data"
    os.close(fetched)
    with pytest.raises(RequestRefused, match="is exported already"):
        await gadget.device.objects.add(ONE, gadget.device.file)


async def test_an_object_that_is_not_there_is_answered_without_a_descriptor(gadget: Gadgets) -> None:
    with pytest.raises(RequestRefused):
        await gadget.pair.frontend.get_shared_object(TWO)
    await gadget.pair.frontend.send_raw(bytes.fromhex("29000000 01000000 00000000"))  # as QEMU asks: without a UUID
    message = await gadget.pair.frontend.receive_message()
    assert message is not None
    assert (message.header.request, message.body, len(message.fds)) == (F.GET_SHARED_OBJECT, b"", 0)


async def test_objects_are_limited(gadget: Gadgets, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_objects, "MOST_OBJECTS", 1)
    await gadget.device.objects.add(ONE, gadget.device.file)
    with pytest.raises(RequestRefused, match="1 objects are exported"):
        await gadget.device.objects.add(TWO, gadget.device.file)


async def test_what_a_front_end_refuses_is_not_exported(gadget: Gadgets) -> None:
    assert gadget.services._objects is not None
    gadget.services._objects.add(ONE, "somebody else")
    with pytest.raises(RequestRefused):
        await gadget.device.objects.add(ONE, gadget.device.file)
    with pytest.raises(RequestRefused):
        await gadget.pair.frontend.get_shared_object(ONE)


async def test_without_a_front_end_nothing_is_shared() -> None:
    device = Gadget()
    with pytest.raises(RequestRefused, match="no front-end is served"):
        _ = device.objects
    with pytest.raises(RequestRefused, match="no front-end is served"):
        _ = device.shmem
    device.close()


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
