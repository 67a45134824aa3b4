"""A transcript is said again to another back-end: what comes out otherwise is told."""

import asyncio
import json
import socket
from collections.abc import Callable

import pytest

from vhostuser.protocol import REPLY, U64, VERSION, VringFd, encode
from vhostuser.protocol import FrontendRequest as F
from vhostuser.protocol.witness import Side, Wire
from vhostuser.testing.peer import Answer, Expect, ScriptedPeer
from vhostuser.tools.trace import jsonlines
from vhostuser.tools.trace.events import Descriptor, Sighting
from vhostuser.tools.trace.observer import Observer
from vhostuser.tools.trace.replay import Difference, TranscriptError, replay, steps

OFFER = 1 << 30 | 1 << 32
MEMORY = Descriptor("memfd", 1 << 20)


def transcript(*said: tuple[Side, bytes, tuple[Descriptor, ...]], connection: int = 1) -> list[str]:
    observer = Observer()
    seen = [Sighting(n, connection, Wire.MAIN, side, data, fds) for n, (side, data, fds) in enumerate(said)]
    return [jsonlines.line(event) for one in seen for event in observer.see(one)]


@pytest.fixture
def lines() -> list[str]:
    return transcript(
        (Side.FRONTEND, encode(F.GET_FEATURES, VERSION), ()),
        (Side.BACKEND, encode(F.GET_FEATURES, VERSION | REPLY, U64(OFFER)), ()),
        (Side.FRONTEND, encode(F.SET_VRING_CALL, VERSION, VringFd(0)), (Descriptor("eventfd"),)),
        (Side.FRONTEND, encode(F.SET_LOG_FD, VERSION), (MEMORY,)),
        (Side.FRONTEND, encode(F.GET_FEATURES, VERSION), ()),
        (Side.BACKEND, encode(F.GET_FEATURES, VERSION | REPLY, U64(OFFER)), ()),
    )


async def run(lines: list[str], script: Callable[[ScriptedPeer], object]) -> list[Difference]:
    ours, theirs = socket.socketpair()
    async with ScriptedPeer(theirs) as peer:
        answering = asyncio.ensure_future(script(peer))  # type: ignore[arg-type]
        found = [difference async for difference in replay(ours, steps(lines), patience=0.2)]
        await answering
    return found


async def test_the_same_answers_make_no_difference(no_leaks: None, lines: list[str]) -> None:
    async def script(peer: ScriptedPeer) -> None:
        await peer.follow(Expect(F.GET_FEATURES), Answer(U64(OFFER)), Expect(F.SET_VRING_CALL, VringFd(0), fds=1))
        await peer.follow(Expect(F.SET_LOG_FD, fds=1), Expect(F.GET_FEATURES), Answer(U64(OFFER)))

    assert await run(lines, script) == []


async def test_another_answer_is_told_in_words(no_leaks: None, lines: list[str]) -> None:
    async def script(peer: ScriptedPeer) -> None:
        await peer.follow(Expect(F.GET_FEATURES), Answer(U64(1 << 32)), Expect(F.SET_VRING_CALL), Expect(F.SET_LOG_FD))
        await peer.follow(Expect(F.GET_FEATURES), Answer(U64(OFFER)))

    then, now = f"{OFFER:#x} PROTOCOL_FEATURES VERSION_1", f"{1 << 32:#x} VERSION_1"
    assert await run(lines, script) == [Difference(1, "GET_FEATURES", then, now)]


async def test_an_answer_that_does_not_come_ends_it(no_leaks: None, lines: list[str]) -> None:
    async def script(peer: ScriptedPeer) -> None:
        await peer.follow(Expect(F.GET_FEATURES))

    (difference,) = await run(lines, script)
    assert (difference.number, difference.now) == (1, "no answer")


def test_only_one_connection_is_said(lines: list[str]) -> None:
    other = transcript((Side.FRONTEND, encode(F.SET_OWNER, VERSION), ()), connection=2)
    assert [step.name for step in steps([*lines, *other], connection=2)] == ["SET_OWNER"]


@pytest.mark.parametrize("line", ["", "{}", "[1]", json.dumps({"event": "message", "connection": 1})])
def test_what_is_no_transcript_is_told_with_its_line(lines: list[str], line: str) -> None:
    with pytest.raises(TranscriptError, match="line 7"):
        steps([*lines, line])
