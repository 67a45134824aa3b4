"""A device's state from one back-end to another: through pipes, or a channel that the back-end prefers."""

import asyncio
import os
from collections.abc import Callable

import pytest

from tests.frontend.test_requests import offered
from tests.runtime.test_device_state import COUNT, Counter
from vhostuser.frontend import Frontend, load_state, save_state
from vhostuser.protocol import U64, DeviceStateReply, ProtocolFeature, RequestRefused
from vhostuser.protocol import FrontendRequest as F
from vhostuser.testing.pair import Pair
from vhostuser.testing.peer import Answer, Expect, ScriptedPeer


@pytest.mark.usefixtures("no_leaks")
@pytest.mark.parametrize("ballast", [0, 3 << 20])
async def test_a_state_moves_whole(pairs: Callable[..., Pair], ballast: int) -> None:
    device = Counter()
    source, destination = pairs(Counter(7, ballast=ballast)), pairs(device)
    for pair in (source, destination):
        await pair.frontend.negotiate()
    state = await save_state(source.frontend)
    assert state == COUNT.pack(7) + bytes(ballast)
    await load_state(destination.frontend, state)
    assert (device.count, len(device.ballast)) == (7, ballast)


@pytest.mark.usefixtures("no_leaks")
@pytest.mark.parametrize("state", [b"short", bytes(5 << 20)], ids=["short", "too much"])
async def test_a_state_that_is_refused_is_told(pairs: Callable[..., Pair], state: bytes) -> None:
    device = Counter(7)
    pair = pairs(device)
    await pair.frontend.negotiate()
    with pytest.raises(RequestRefused):
        await load_state(pair.frontend, state)
    assert device.count == 7


async def ready(frontend: Frontend, peer: ScriptedPeer) -> None:
    """DEVICE_STATE is negotiated."""
    mask = ProtocolFeature.DEVICE_STATE.mask
    await offered(frontend, peer, mask)
    await asyncio.gather(frontend.set_protocol_features(mask), peer.follow(Expect(F.SET_PROTOCOL_FEATURES)))


async def test_a_channel_that_the_back_end_prefers_is_used(frontend: Frontend, peer: ScriptedPeer) -> None:
    await ready(frontend, peer)
    read, write = os.pipe()
    os.write(write, b"the state")
    os.close(write)
    script = peer.follow(
        *(Expect(F.SET_DEVICE_STATE_FD, fds=1), Answer(DeviceStateReply(0, True), fds=(read,))),
        *(Expect(F.CHECK_DEVICE_STATE), Answer(U64(0))),
    )
    state, _ = await asyncio.gather(save_state(frontend), script)
    os.close(read)
    assert state == b"the state"


async def test_a_back_end_that_goes_in_the_middle_has_saved_nothing(frontend: Frontend, peer: ScriptedPeer) -> None:
    await ready(frontend, peer)
    script = peer.follow(Expect(F.SET_DEVICE_STATE_FD, fds=1), Answer(DeviceStateReply(0)))
    saving = asyncio.ensure_future(save_state(frontend))
    await script
    peer.close()
    (outcome,) = await asyncio.gather(saving, return_exceptions=True)
    assert isinstance(outcome, Exception)
