"""Kicks, calls and errors as messages (section "In-band notifications"), both ends in one process."""

import asyncio
import select
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.runtime.echo import DATA, Echo, answer, ask, quiet
from tests.runtime.test_hostile_channel import arrived
from vhostuser.channel import readable
from vhostuser.devices.blk import Blk
from vhostuser.devices.image import Image
from vhostuser.drivers.blk import BlkDriver, BlkRequest
from vhostuser.frontend import DRIVABLE, DRIVABLE_PROTOCOL, SharedMemory, notifying
from vhostuser.protocol import BackendRequest, ProtocolFeature, VringState, encode
from vhostuser.testing.pair import MIB, Pair

pytestmark = pytest.mark.usefixtures("no_leaks")

IN_BAND = DRIVABLE_PROTOCOL | ProtocolFeature.INBAND_NOTIFICATIONS.mask
CALL = encode(BackendRequest.VRING_CALL, 0x9, VringState(0))
"""As it is on the wire, with need_reply."""
ERR = encode(BackendRequest.VRING_ERR, 0x9, VringState(0))
NO_EVENT_IDX = DRIVABLE & ~(1 << 29)


async def prepared(pair: Pair, **options: bool) -> None:
    """A ring without descriptors, unless ``options`` say otherwise; its driver wants every call."""
    pair.memory = SharedMemory((0, 4 * MIB))
    await pair.frontend.negotiate(NO_EVENT_IDX, IN_BAND)
    await pair.frontend.set_memory(pair.memory)
    pair.add_ring(0)
    await pair.frontend.start_ring(pair.rings[0], pair.memory, **{"in_band": True, **options})


async def raw_channel(pair: Pair) -> socket.socket:
    """The back-end's channel, with nobody who answers."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with theirs:
        await pair.frontend.set_backend_req_fd(theirs.fileno())
    ours.setblocking(False)
    return ours


async def kick(pair: Pair, text: bytes) -> None:
    await ask(pair, text, kick=False)
    await pair.frontend.vring_kick(0)


async def returned(pair: Pair) -> None:
    """Waits for one used request without being called."""
    while pair.rings[0].queue.take() is None:
        await quiet(pair)


async def test_kicks_and_calls_are_messages(pairs: Callable[..., Pair]) -> None:
    device = Echo()
    pair = pairs(device)
    await prepared(pair)
    await pair.frontend.serve_backend(notifying(pair.rings))
    await quiet(pair)
    assert device.events == [], "the ring starts at the first kick"
    for text in (b"one", b"two", b"three"):
        await kick(pair, text)
        assert await answer(pair) == text.upper()


async def test_of_an_engine_too(pairs: Callable[..., Pair], tmp_path: Path) -> None:
    (tmp_path / "image").write_bytes(bytes(range(256)) * 16)
    pair = pairs(Blk(Image(tmp_path / "image")))
    await prepared(pair)
    await pair.frontend.serve_backend(notifying(pair.rings))
    disk = BlkDriver(pair.rings[0].queue, DATA, depth=16, largest=4096)
    for _ in range(3):
        for sector in range(8):
            disk.submit(BlkRequest.read(sector, 1))
        pair.rings[0].queue.publish()
        await pair.frontend.vring_kick(0)
        got = 0
        while (got := got + len(disk.collect())) < 8:
            if not pair.rings[0].queue.arm():
                await asyncio.wait_for(pair.rings[0].called(), 5)


async def test_one_call_is_under_way_at_a_time(pairs: Callable[..., Pair]) -> None:
    """It asks for an ack, and stands for all that were wanted before that: the front-end is not flooded."""
    device = Echo()
    pair = pairs(device)
    await prepared(pair)
    ours = await raw_channel(pair)
    for number in range(10):
        await kick(pair, b"%d" % number)
        await device.taken(b"%d" % number)
        await returned(pair)
    await quiet(pair)
    await readable(ours.fileno())
    assert arrived(ours) == CALL
    ours.send(encode(BackendRequest.VRING_CALL, 0x5, None)[:8] + bytes([8, 0, 0, 0]) + bytes(8))
    await asyncio.wait_for(readable(ours.fileno()), 5)
    assert arrived(ours) == CALL, "one more for the nine"
    ours.close()


async def test_a_call_waits_for_the_channel(pairs: Callable[..., Pair]) -> None:
    device = Echo()
    pair = pairs(device)
    await prepared(pair)
    await kick(pair, b"x")
    await device.taken(b"x")
    await returned(pair)
    ours = await raw_channel(pair)
    await asyncio.wait_for(readable(ours.fileno()), 5)
    assert arrived(ours) == CALL
    ours.close()


@pytest.mark.parametrize("described", [True, False])
async def test_what_the_front_end_says_of_calls_counts_more(pairs: Callable[..., Pair], described: bool) -> None:
    """A descriptor is preferred; without one, said so, the front-end polls and wants no call of any kind."""
    pair = pairs(Echo())
    await prepared(pair)
    ours = await raw_channel(pair)
    await pair.frontend.set_vring_call(0, pair.rings[0].call_fd if described else None)
    await kick(pair, b"x")
    if described:
        assert await answer(pair) == b"X"
    else:
        await returned(pair)
    await quiet(pair)
    assert arrived(ours) == b"nothing"
    ours.close()


async def test_a_message_kicks_through_a_descriptor_too(pairs: Callable[..., Pair]) -> None:
    pair = pairs(Echo())
    await prepared(pair, in_band=False)
    await kick(pair, b"x")
    assert await answer(pair) == b"X"


async def test_a_stopped_ring_starts_with_the_next_kick(pairs: Callable[..., Pair]) -> None:
    device = Echo()
    pair = pairs(device)
    await prepared(pair)
    await pair.frontend.serve_backend(notifying(pair.rings))
    await kick(pair, b"one")
    assert await answer(pair) == b"ONE"
    assert await pair.frontend.stop_ring(pair.rings[0]) == 1
    await ask(pair, b"two", kick=False)
    await quiet(pair)
    assert device.events == ["start", "stop"]
    await pair.frontend.vring_kick(0)
    assert await answer(pair) == b"TWO"


async def test_a_suspended_device_calls_nobody_and_makes_up_for_it(pairs: Callable[..., Pair]) -> None:
    """Section "Suspended device state". The driver that was not told is told when the ring starts again."""
    device = Echo()
    pair = pairs(device)
    await prepared(pair)
    ours = await raw_channel(pair)
    device.gate.clear()
    await kick(pair, b"slow")
    await device.taken(b"slow")
    stopping = asyncio.ensure_future(pair.frontend.stop_ring(pair.rings[0]))
    device.release()
    await stopping
    early = arrived(ours)
    await quiet(pair)
    assert arrived(ours) == b"nothing"
    await pair.frontend.vring_kick(0)
    if early == b"nothing":
        await asyncio.wait_for(readable(ours.fileno()), 5)
        assert arrived(ours) == CALL
    ours.close()


@pytest.mark.parametrize("described", [True, False])
async def test_a_broken_ring_is_told_by_message_where_it_has_no_descriptor(
    pairs: Callable[..., Pair], described: bool
) -> None:
    pair = pairs(Echo())
    await prepared(pair)
    if described:
        await pair.frontend.set_vring_err(0, pair.rings[0].err_fd)
    ours = await raw_channel(pair)
    pair.rings[0].queue.raw.available_index += 1000
    await pair.frontend.vring_kick(0)
    came = b""
    while ERR not in came and not (described and select.select([pair.rings[0].err_fd], [], [], 0)[0]):
        await quiet(pair)
        came += arrived(ours)
    await quiet(pair)
    assert (ERR in came + arrived(ours)) != described
    ours.close()


async def test_without_the_feature_nothing_is_said_in_band(pairs: Callable[..., Pair]) -> None:
    pair = pairs(Echo())
    pair.memory = SharedMemory((0, 4 * MIB))
    await pair.frontend.negotiate(NO_EVENT_IDX)
    await pair.frontend.set_memory(pair.memory)
    pair.add_ring(0)
    await pair.frontend.start_ring(pair.rings[0], pair.memory, in_band=True)
    await pair.frontend.set_vring_kick(0, pair.rings[0].kick_fd)
    ours = await raw_channel(pair)
    await ask(pair, b"x")
    await returned(pair)
    await quiet(pair)
    assert arrived(ours) == b"nothing"
    ours.close()
