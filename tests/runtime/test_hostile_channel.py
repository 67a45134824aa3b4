"""A front-end that does not read the back-end's channel, closes it, or talks on it: nobody else notices."""

import asyncio
import socket
from collections.abc import Callable

import pytest

from tests.runtime.echo import Echo, answer, ask, quiet
from tests.runtime.test_hostile_peers import until
from vhostuser import measures
from vhostuser.frontend import DRIVABLE_PROTOCOL
from vhostuser.metrics import value_in
from vhostuser.protocol import FrontendRequest, ProtocolFeature, RequestRefused, VringFd, VringState
from vhostuser.testing.pair import Pair, connect

pytestmark = pytest.mark.usefixtures("no_leaks")

F = FrontendRequest


async def channel(pair: Pair) -> socket.socket:
    """Gives the back-end its channel; our end."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    await pair.frontend.request(F.SET_BACKEND_REQ_FD, fds=(theirs.fileno(),))
    theirs.close()
    ours.setblocking(False)
    return ours


def arrived(sock: socket.socket) -> bytes:
    try:
        return sock.recv(1 << 20)
    except BlockingIOError:
        return b"nothing"


CONFIG_CHANGE = bytes.fromhex("02000000 01000000 00000000")


async def test_a_suspended_device_says_nothing_until_its_first_ring_starts(pairs: Callable[..., Pair]) -> None:
    """Section "Suspended device state"; and several changes are one by then."""
    device = Echo()
    pair = pairs(device)
    await pair.set_up()
    ours = await channel(pair)
    for _ in range(3):
        device.config_changed()
    await quiet(pair)
    assert arrived(ours) == b"nothing"
    await ask(pair, b"x")
    assert await answer(pair) == b"X"
    assert arrived(ours) == CONFIG_CHANGE
    device.config_changed()
    await quiet(pair)
    assert arrived(ours) == CONFIG_CHANGE
    ours.close()


async def test_a_change_waits_for_the_channel(pairs: Callable[..., Pair]) -> None:
    device = Echo()
    pair = pairs(device)
    await pair.set_up()
    await ask(pair, b"x")
    assert await answer(pair) == b"X"
    device.config_changed()
    ours = await channel(pair)
    await quiet(pair)
    assert arrived(ours) == CONFIG_CHANGE
    ours.close()


async def test_without_config_nothing_is_announced_and_the_channel_stays(
    pairs: Callable[..., Pair], caplog: pytest.LogCaptureFixture
) -> None:
    device = Echo()
    pair = pairs(device)
    await pair.frontend.negotiate(protocol_features=DRIVABLE_PROTOCOL & ~ProtocolFeature.CONFIG.mask)
    ours = await channel(pair)
    await pair.frontend.request(F.SET_VRING_KICK, VringFd(0, has_fd=False))
    device.config_changed()
    await quiet(pair)
    assert arrived(ours) == b"nothing"
    assert "closed" not in caplog.text
    ours.close()


async def test_a_channel_whose_reader_sleeps_holds_up_nothing_and_does_not_grow(pairs: Callable[..., Pair]) -> None:
    device = Echo()
    pair = pairs(device)
    await pair.set_up()
    ours = await channel(pair)
    await ask(pair, b"x")
    assert await answer(pair) == b"X"
    for _ in range(2000):
        device.config_changed()
        await asyncio.sleep(0)
    await quiet(pair)
    sending = pair.backend.connections[0]._announcements.channel
    assert sending is not None
    assert sending.waiting <= 1
    assert await pair.frontend.stop_ring(pair.rings[0]) == 1
    ours.close()


async def test_channels_that_follow_each_other_at_once_are_all_closed() -> None:
    """A task that is cancelled before its first step runs no finally."""
    pair = connect(Echo())
    await pair.frontend.negotiate(protocol_features=DRIVABLE_PROTOCOL & ~ProtocolFeature.REPLY_ACK.mask)
    pairs_of_sockets = [socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM) for _ in range(5)]
    for _, theirs in pairs_of_sockets:
        await pair.frontend.send_raw(bytes.fromhex("15000000 01000000 00000000"), (theirs.fileno(),))
    await pair.close()
    for ours, theirs in pairs_of_sockets:
        ours.close()
        theirs.close()


async def test_a_channel_that_cannot_be_watched_is_not_closed_twice(
    pairs: Callable[..., Pair], full: Callable[[str], None], caplog: pytest.LogCaptureFixture
) -> None:
    pair = pairs(Echo())
    await pair.frontend.negotiate()
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    full("select.epoll")
    with pytest.raises(RequestRefused):
        await pair.frontend.request(F.SET_BACKEND_REQ_FD, fds=(theirs.fileno(),))
    assert "Too many open files" in caplog.text
    ours.close()
    theirs.close()


async def test_what_the_front_end_says_on_the_channel_ends_it_with_its_descriptors(pairs: Callable[..., Pair]) -> None:
    pair = pairs(Echo())
    await pair.frontend.negotiate()
    ours = await channel(pair)
    socket.send_fds(ours, [b"x" * 12], [ours.fileno()] * 5)
    await until(lambda: arrived(ours) == b"")
    ours.close()
    assert await pair.frontend.get(F.GET_QUEUE_NUM) == 2


async def test_the_state_can_be_read(pairs: Callable[..., Pair]) -> None:
    import json

    pair = pairs(Echo())
    await pair.set_up()
    for word in (b"a", b"b"):
        await ask(pair, word)
        assert await answer(pair) == word.upper()
    await pair.frontend.request(F.SET_VRING_ENABLE, VringState(1, 1))
    assert pair.memory is not None
    await pair.frontend.set_memory(pair.memory)  # the ring is opened anew, and goes on counting
    state = json.loads(json.dumps(pair.backend.state()))
    (connection,) = state["connections"]
    assert connection["socket"] == "test"
    assert "VERSION_1" in connection["features"].split()
    assert "REPLY_ACK" in connection["protocol_features"].split()
    first, second = connection["rings"]
    assert (first["started"], first["enabled"], first["running"], first["base"]) == (True, True, True, 2)
    assert value_in(state["metrics"], measures.REQUESTS, queue=0) == 2
    assert value_in(state["metrics"], measures.IN_FLIGHT, queue=0) == 0
    assert (second["started"], second["enabled"], second["running"]) == (False, True, False)
    assert connection["postcopy"] == "IDLE"
