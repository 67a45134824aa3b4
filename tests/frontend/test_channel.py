"""The back-end's own requests at the front-end's end: answered at once, refused by default, kept for who asks."""

import asyncio
import logging
import socket
from collections.abc import AsyncIterator, Callable

import pytest

from tests.frontend.test_calls import negotiated
from vhostuser.device import Device
from vhostuser.frontend import BackendRequests, Frontend
from vhostuser.frontend import channel as requests_channel
from vhostuser.protocol import (
    U64,
    Empty,
    LocalProtocolError,
    MmapMsg,
    RemoteProtocolError,
    Reply,
    Request,
    RequestRefused,
    Uuid,
    VringArea,
    VringState,
)
from vhostuser.protocol import BackendRequest as B
from vhostuser.protocol import FrontendRequest as F
from vhostuser.testing.pair import Pair
from vhostuser.testing.peer import Answer, Expect, ScriptedPeer, Send, asking

ACK, NACK = U64(0), U64(1)
CONFIG_CHANGE = Send(B.CONFIG_CHANGE_MSG)


async def served(
    frontend: Frontend, peer: ScriptedPeer, answer: requests_channel.Answerer = requests_channel.config_changes_only
) -> ScriptedPeer:
    """The back-end's end of the channel."""
    await negotiated(frontend, peer)
    script = peer.follow(Expect(F.SET_BACKEND_REQ_FD, fds=1), Answer(ACK))
    await asyncio.gather(frontend.serve_backend(answer), script)
    assert peer.last is not None
    return ScriptedPeer(socket.socket(fileno=peer.last.fds.take()))


@pytest.fixture
async def channel(frontend: Frontend, peer: ScriptedPeer) -> AsyncIterator[ScriptedPeer]:
    async with await served(frontend, peer) as channel:
        yield channel


def kept(frontend: Frontend) -> BackendRequests:
    assert frontend.backend is not None
    return frontend.backend


async def test_a_change_of_the_configuration_is_taken(frontend: Frontend, channel: ScriptedPeer) -> None:
    await channel.follow(CONFIG_CHANGE, asking(CONFIG_CHANGE), Expect(B.CONFIG_CHANGE_MSG, ACK, reply=True))
    for _ in range(2):
        assert (await kept(frontend).next())[:2] == (B.CONFIG_CHANGE_MSG, Empty())


REFUSED = {
    B.VRING_HOST_NOTIFIER_MSG: (Send(B.VRING_HOST_NOTIFIER_MSG, VringArea(0, 4096, 0), fds=(0,)), NACK),
    B.SHARED_OBJECT_LOOKUP: (Send(B.SHARED_OBJECT_LOOKUP, Uuid(bytes(16))), U64(1)),
    B.SHMEM_MAP: (Send(B.SHMEM_MAP, MmapMsg(0, 0, 0, 4096, 0), fds=(0,)), NACK),
    B.VRING_CALL: (Send(B.VRING_CALL, VringState(0)), NACK),
}


@pytest.mark.parametrize("code", REFUSED, ids=lambda code: code.name)
async def test_everything_else_is_refused_by_default(frontend: Frontend, channel: ScriptedPeer, code: B) -> None:
    """no_leaks looks whether what came with it is closed."""
    message, answer = REFUSED[code]
    await channel.follow(asking(message), Expect(code, answer, fds=0, reply=True))
    await channel.follow(asking(CONFIG_CHANGE), Expect(B.CONFIG_CHANGE_MSG, ACK, reply=True))
    assert (await kept(frontend).next()).code is B.CONFIG_CHANGE_MSG


async def test_what_the_caller_accepts_comes_with_its_descriptors(frontend: Frontend, peer: ScriptedPeer) -> None:
    async with await served(frontend, peer, lambda _: None) as channel:
        message = Send(B.SHMEM_MAP, MmapMsg(1, 0, 4096, 8192, 1), fds=(0,))
        await channel.follow(asking(message), Expect(B.SHMEM_MAP, ACK, reply=True))
        code, payload, fds = await kept(frontend).next()
        assert (code, payload, len(fds)) == (B.SHMEM_MAP, message.payload, 1)
        fds.close()


async def test_a_reply_of_its_own_carries_a_descriptor(frontend: Frontend, peer: ScriptedPeer) -> None:
    def look_up(request: Request) -> Reply:
        if request.payload != Uuid(bytes(16)):
            raise RequestRefused("no such object")
        return Reply(U64(0), (0,))

    async with await served(frontend, peer, look_up) as channel:
        await channel.follow(
            Send(B.SHARED_OBJECT_LOOKUP, Uuid(bytes(16))), Expect(B.SHARED_OBJECT_LOOKUP, U64(0), fds=1, reply=True)
        )
        await channel.follow(
            Send(B.SHARED_OBJECT_LOOKUP, Uuid(b"x" * 16)), Expect(B.SHARED_OBJECT_LOOKUP, NACK, fds=0, reply=True)
        )


async def test_a_decision_that_fails_is_a_refusal(
    frontend: Frontend, peer: ScriptedPeer, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(_: Request) -> None:
        raise ZeroDivisionError("oh")

    async with await served(frontend, peer, fail) as channel:
        await channel.follow(asking(CONFIG_CHANGE), Expect(B.CONFIG_CHANGE_MSG, NACK, reply=True))
    assert "CONFIG_CHANGE_MSG failed" in caplog.text


async def test_a_back_end_that_waits_for_the_ack_before_it_answers_is_no_deadlock(
    frontend: Frontend, peer: ScriptedPeer, channel: ScriptedPeer
) -> None:
    """The front-end waits for GET_CONFIG; the back-end asks something of its own first, and waits for that."""
    reading = asyncio.ensure_future(frontend.get_features())
    await peer.follow(Expect(F.GET_FEATURES))
    await channel.follow(asking(CONFIG_CHANGE), Expect(B.CONFIG_CHANGE_MSG, ACK, reply=True))
    await peer.follow(Answer(U64(5)))
    assert await reading == 5


async def test_requests_that_nobody_collects_are_refused(
    frontend: Frontend, channel: ScriptedPeer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(requests_channel, "MOST_EVENTS", 2)
    script = (asking(CONFIG_CHANGE), Expect(B.CONFIG_CHANGE_MSG, ACK, reply=True))
    await channel.follow(*script, *script)
    await channel.follow(asking(CONFIG_CHANGE), Expect(B.CONFIG_CHANGE_MSG, NACK, reply=True))
    await kept(frontend).next()
    await channel.follow(*script)


@pytest.mark.parametrize(
    "wrong",
    [
        Send(99),
        Send(B.CONFIG_CHANGE_MSG, U64(1)),
        Send(B.CONFIG_CHANGE_MSG, fds=(0,)),
        Send(B.CONFIG_CHANGE_MSG, flags=4),
    ],
    ids=["unknown", "payload", "descriptor", "an answer"],
)
async def test_a_violation_closes_the_channel_and_not_the_connection(
    frontend: Frontend, peer: ScriptedPeer, channel: ScriptedPeer, wrong: Send
) -> None:
    await channel.follow(CONFIG_CHANGE, wrong)
    await channel.closed()
    await kept(frontend).next()
    with pytest.raises(RemoteProtocolError):
        await kept(frontend).next()
    await asyncio.gather(frontend.get_features(), peer.follow(Expect(F.GET_FEATURES), Answer(U64(0))))


async def test_the_end_of_the_channel_is_told_to_who_waits(frontend: Frontend, channel: ScriptedPeer) -> None:
    waiting = asyncio.ensure_future(kept(frontend).next())
    await asyncio.sleep(0)
    channel.close()
    with pytest.raises(EOFError):
        await waiting


async def test_closing_ends_who_waits_and_closes_what_was_not_collected(frontend: Frontend, peer: ScriptedPeer) -> None:
    async with await served(frontend, peer, lambda _: None) as channel:
        message = Send(B.SHMEM_MAP, MmapMsg(1, 0, 4096, 8192, 1), fds=(0,))
        await channel.follow(asking(message), Expect(B.SHMEM_MAP, ACK, reply=True))
        frontend.close()
        with pytest.raises(EOFError):
            await kept(frontend).next()


async def test_a_second_channel_takes_the_place_of_the_first(
    frontend: Frontend, peer: ScriptedPeer, channel: ScriptedPeer
) -> None:
    script = peer.follow(Expect(F.SET_BACKEND_REQ_FD, fds=1), Answer(ACK))
    await asyncio.gather(frontend.serve_backend(), script)
    await channel.closed()


async def test_without_the_feature_there_is_no_channel(frontend: Frontend, no_leaks: None) -> None:
    with pytest.raises(LocalProtocolError, match="BACKEND_REQ"):
        await frontend.serve_backend()


class Changing(Device):
    virtio_id = 63

    def config(self) -> bytes:
        return b"1234"


async def test_our_back_end_announces_a_change(
    no_leaks: None, pairs: Callable[..., Pair], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    device = Changing()
    pair = pairs(device)
    await pair.set_up()
    backend = await pair.frontend.serve_backend()
    pair.rings[0].kick()
    device.config_changed()
    event = await asyncio.wait_for(backend.next(), 5)
    assert event.code is B.CONFIG_CHANGE_MSG
    assert not caplog.records
