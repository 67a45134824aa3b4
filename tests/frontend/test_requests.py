"""Answers belong to their requests whatever becomes of who asked, and nothing is waited for longer than was said."""

import asyncio
import itertools
import os
import random
import socket
from pathlib import Path
from typing import Any

import pytest

from vhostuser.frontend import Frontend, ReplyTimeout
from vhostuser.protocol import (
    U64,
    Empty,
    Header,
    LocalProtocolError,
    Outgoing,
    ProtocolFeature,
    RemoteProtocolError,
    VirtioFeature,
)
from vhostuser.protocol import FrontendRequest as F
from vhostuser.testing.peer import Answer, Expect, ScriptedPeer, Send

PAGEFAULT = ProtocolFeature.PAGEFAULT.mask
PROTOCOL_FEATURES = VirtioFeature.PROTOCOL_FEATURES.mask
FEATURES = Expect(F.GET_FEATURES)


async def offered(frontend: Frontend, peer: ScriptedPeer, protocol_features: int) -> None:
    """The back-end offers these, and the front-end knows."""
    script = peer.follow(
        *(FEATURES, Answer(U64(PROTOCOL_FEATURES))), *(Expect(F.GET_PROTOCOL_FEATURES), Answer(U64(protocol_features)))
    )
    await asyncio.gather(script, frontend.get_features(), frontend.get_protocol_features())


async def test_a_late_answer_goes_to_nobody_else(frontend: Frontend, peer: ScriptedPeer) -> None:
    """The answer to a request that was given up comes after the next request was sent: neither gets the other's."""
    asking = asyncio.ensure_future(frontend.get_features())
    await peer.follow(FEATURES)
    asking.cancel()
    await asyncio.wait([asking])
    again = asyncio.ensure_future(frontend.get_features())
    await peer.follow(FEATURES, Answer(U64(1)), Answer(U64(2)))
    assert await again == 2


async def test_a_late_answer_s_descriptors_are_closed(frontend: Frontend, peer: ScriptedPeer) -> None:
    """no_leaks looks whether they are."""
    await offered(frontend, peer, PAGEFAULT)
    for _ in range(2):
        asking = asyncio.ensure_future(frontend.postcopy_advise())
        await peer.follow(Expect(F.POSTCOPY_ADVISE))
        asking.cancel()
        await asyncio.wait([asking])
        await peer.follow(Answer(fds=(0,)))
    await asyncio.gather(frontend.get_features(), peer.follow(FEATURES, Answer(U64(PROTOCOL_FEATURES))))


async def test_an_answer_that_came_in_the_moment_of_the_cancellation_is_closed(
    frontend: Frontend, peer: ScriptedPeer, monkeypatch: pytest.MonkeyPatch
) -> None:
    await offered(frontend, peer, PAGEFAULT)
    read = frontend._next_answer

    async def read_and_cancel(code: F) -> object:
        answer = await read(code)
        asyncio.get_running_loop().call_soon(asking.cancel)  # runs before who waits is woken
        return answer

    monkeypatch.setattr(frontend, "_next_answer", read_and_cancel)
    asking = asyncio.ensure_future(frontend.postcopy_advise())
    await peer.follow(Expect(F.POSTCOPY_ADVISE), Answer(fds=(0,)))
    await asyncio.wait([asking], timeout=5)
    assert asking.cancelled()


async def test_a_request_that_is_cancelled_half_sent_is_sent_whole(frontend: Frontend, peer: ScriptedPeer) -> None:
    """The socket is full: part of the message is out, and what follows must not begin in the middle of it."""
    raw = frontend._channel._sock
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
    filler = Header(F.GET_FEATURES, 1, 0).pack()
    sending = asyncio.ensure_future(frontend.send_raw(filler * 10_000))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert not sending.done()
    asking = asyncio.ensure_future(frontend.get_features())
    await asyncio.sleep(0)
    for task in (sending, asking):
        task.cancel()
    await asyncio.wait([sending, asking])
    for _ in range(10_001):
        await peer.follow(FEATURES)


async def test_descriptors_of_a_cancelled_request_may_be_closed_at_once(frontend: Frontend, peer: ScriptedPeer) -> None:
    """What is sent later is what was given, whatever has the number by then."""
    await offered(frontend, peer, ProtocolFeature.BACKEND_REQ.mask)
    frontend._channel._sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
    filling = asyncio.ensure_future(frontend.send_raw(bytes(200_000)))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    fd = os.memfd_create("ours")
    asking = asyncio.ensure_future(frontend.set_backend_req_fd(fd))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    asking.cancel()
    await asyncio.wait([asking])
    os.close(fd)
    left = 200_000
    while left:
        data, _ = await peer._channel.receive(left)
        left -= len(data)
    await peer.follow(Expect(F.SET_BACKEND_REQ_FD, fds=1))
    assert peer.last is not None
    assert "ours" in os.readlink(f"/proc/self/fd/{peer.last.fds[0]}")  # noqa: PTH115 - nothing here blocks
    await filling


async def test_the_time_limit_names_what_was_waited_for(frontend: Frontend, peer: ScriptedPeer) -> None:
    frontend.timeout = 0.01
    with pytest.raises(ReplyTimeout, match=r"no answer to GET_FEATURES from the back-end after 0\.01 s") as caught:
        await frontend.get_features()
    assert (caught.value.code, caught.value.seconds) == (F.GET_FEATURES, 0.01)
    frontend.timeout = 5
    asking = asyncio.ensure_future(frontend.get_features())
    await peer.follow(FEATURES, FEATURES, Answer(U64(1)), Answer(U64(2)))
    assert await asking == 2


async def test_a_back_end_that_does_not_read_is_a_timeout_too(frontend: Frontend, peer: ScriptedPeer) -> None:
    filling = asyncio.ensure_future(frontend.send_raw(bytes(1 << 22)))
    await asyncio.sleep(0)
    frontend.timeout = 0.01
    with pytest.raises(ReplyTimeout, match=r"the back-end has not read, so nothing could be sent for 0\.01 s"):
        await frontend.get_features()
    filling.cancel()


async def test_requests_of_several_tasks_get_their_own_answers(frontend: Frontend, peer: ScriptedPeer) -> None:
    asking = [asyncio.ensure_future(frontend.get_features()) for _ in range(10)]
    for number in range(10):
        await peer.follow(FEATURES, Answer(U64(number)))
    assert await asyncio.gather(*asking) == list(range(10))


@pytest.mark.parametrize("seed", range(10))
async def test_no_order_of_cancellations_pairs_an_answer_wrongly(
    frontend: Frontend, peer: ScriptedPeer, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """The answer to the n-th message on the wire is n; whoever is answered must have sent that very message."""
    dice, sent = random.Random(seed), dict[asyncio.Task[int], int]()
    make = frontend.session.request

    def numbered(code: F, *rest: Any) -> Outgoing:
        task = asyncio.current_task()
        assert task is not None
        sent[task] = len(sent)
        return make(code, *rest)

    async def turns(most: int) -> None:
        for _ in range(dice.randint(0, most)):
            await asyncio.sleep(0)

    async def answers() -> None:
        for number in itertools.count():
            await peer.follow(FEATURES)
            await turns(4)
            await peer.follow(Answer(U64(number)))

    monkeypatch.setattr(frontend.session, "request", numbered)
    answering = asyncio.ensure_future(answers())
    asking = [asyncio.ensure_future(frontend.get_features()) for _ in range(60)]
    for task in dice.sample(asking, 30):
        await turns(6)
        task.cancel()
    await asyncio.wait(asking)
    assert {task.result() - sent[task] for task in asking if not task.cancelled()} == {0}
    answering.cancel()


WRONG = {
    "another request's": Send(F.GET_QUEUE_NUM, U64(1), flags=4),
    "not marked as an answer": Send(F.GET_FEATURES, U64(1)),
    "with need_reply": Send(F.GET_FEATURES, U64(1), flags=12),
    "too short": Send(F.GET_FEATURES, bytes(4), flags=4),
    "with a descriptor": Send(F.GET_FEATURES, U64(1), fds=(0,), flags=4),
    "longer than what it announces": Send(F.GET_FEATURES, U64(1), flags=4, size=0),
}


@pytest.mark.parametrize("wrong", WRONG)
async def test_after_a_wrong_answer_nothing_more_is_asked(frontend: Frontend, peer: ScriptedPeer, wrong: str) -> None:
    """Both ends no longer agree where a message begins."""
    asking = asyncio.ensure_future(frontend.get_features())
    await peer.follow(FEATURES, WRONG[wrong])
    with pytest.raises(RemoteProtocolError):
        await asking
    with pytest.raises(RemoteProtocolError):
        await frontend.get_features()


async def test_the_end_of_the_stream_is_told_to_all_who_wait(frontend: Frontend, peer: ScriptedPeer) -> None:
    asking = [asyncio.ensure_future(frontend.get_features()) for _ in range(3)]
    await peer.follow(FEATURES)
    peer.close()
    for task in asking:
        with pytest.raises((RemoteProtocolError, ConnectionError)):
            await task
    assert frontend.lost.is_set()


async def test_closing_here_ends_every_request(frontend: Frontend, peer: ScriptedPeer) -> None:
    asking = [asyncio.ensure_future(frontend.get_features()) for _ in range(3)]
    await peer.follow(FEATURES)
    frontend.close()
    for task in asking:
        with pytest.raises(RemoteProtocolError, match="closed on this side"):
            await task
    await peer.closed()


async def test_a_request_that_is_not_allowed_is_not_sent(frontend: Frontend, peer: ScriptedPeer) -> None:
    with pytest.raises(LocalProtocolError):
        await frontend.get_queue_num()
    await asyncio.gather(frontend.get_features(), peer.follow(FEATURES, Answer(U64(0))))


# ---- the raw hatch


async def test_anything_can_be_sent_and_read_raw(frontend: Frontend, peer: ScriptedPeer) -> None:
    fd = os.memfd_create("anything")
    odd = Header(999, 0xF0, 3).pack()
    await frontend.send_raw([odd[:5], odd[5:], b"a", b"bc"], (fd,) * 3)
    await peer.follow()
    message = await peer.receive()
    assert (message.header, message.body, len(message.fds)) == (Header(999, 0xF0, 3), b"abc", 3)
    await peer.send(Send(999, b"xyz", fds=(fd,), flags=0x50))
    came = await frontend.receive_message()
    assert came is not None
    assert (came.header.flags, came.body, len(came.fds)) == (0x51, b"xyz", 1)
    came.fds.close()
    os.close(fd)
    await peer.send(Send(1, b"abc", size=8))
    peer.close()
    short = await frontend.receive_message()
    assert short is not None
    assert (short.header.size, short.body) == (8, b"abc")
    assert await frontend.receive_message() is None


async def test_raw_reading_does_not_steal_answers(frontend: Frontend, peer: ScriptedPeer) -> None:
    asking = asyncio.ensure_future(frontend.get_features())
    await peer.follow(FEATURES)
    with pytest.raises(RuntimeError, match="GET_FEATURES is to come"):
        await frontend.receive_raw(12)
    await peer.follow(Answer(U64(3)))
    assert await asking == 3
    frontend.timeout = 0.01
    with pytest.raises(ReplyTimeout, match="no message"):
        await frontend.receive_message()


# ---- who connects to whom


async def test_either_end_may_listen(tmp_path: Path, no_leaks: None) -> None:
    path = tmp_path / "socket"
    async with Frontend.listen(path) as listener:
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(str(path))
        async with await listener.accept() as frontend, ScriptedPeer(sock) as peer:
            await asyncio.gather(frontend.get_features(), peer.follow(FEATURES, Answer(U64(0))))
            assert frontend.name == str(path)
    assert not path.exists()
    with pytest.raises(OSError, match="No such file"):
        await Frontend.connect(path)


async def test_an_error_names_the_socket(tmp_path: Path, no_leaks: None) -> None:
    path = tmp_path / "socket"
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))
        listening.listen()
        async with await Frontend.connect(path) as frontend:
            listening.accept()[0].close()
            with pytest.raises((RemoteProtocolError, ConnectionError), match=r"socket|Broken pipe"):
                await frontend.get_features()


def test_empty_is_the_payload_of_a_message_without_one() -> None:
    assert Send(F.SET_OWNER).pack() == Send(F.SET_OWNER, Empty()).pack()
