"""Shared memory regions of a device, and the windows in which our front-end maps them: both ends against each other."""

import asyncio
import os
from collections.abc import Callable

import pytest

from tests.runtime.echo import Echo, answer, ask, quiet
from tests.runtime.gadget import PAGE, Gadget, Gadgets, channel_of, memfd
from vhostuser import announcements, shared_memory
from vhostuser.frontend import BackendServices
from vhostuser.memory import MemoryLost
from vhostuser.protocol import (
    U64,
    BackendRequest,
    LocalProtocolError,
    MmapMsg,
    RequestRefused,
    ShmemConfig,
)
from vhostuser.testing.pair import Pair
from vhostuser.testing.peer import Answer, Expect, ScriptedPeer, Send, asking

B = BackendRequest
ACK, NACK = U64(0), U64(1)


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
