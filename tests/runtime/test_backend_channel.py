"""The back-end's own requests: whatever the catalog has, answers in order, no harm from a front-end that gives none.

Sections "Back-end communication", "Suspended device state" and "VHOST_USER_PROTOCOL_F_REPLY_ACK".
"""

import asyncio
import logging
import os
import socket
from collections.abc import AsyncIterator, Callable
from contextvars import Context
from typing import Any, NamedTuple

import pytest

from tests.protocol import samples
from tests.runtime.echo import Echo, answer, ask, quiet
from vhostuser import announcements, backend_channel
from vhostuser.announcements import WITHHELD, Announcements
from vhostuser.backend_channel import ANSWER_WITHIN, BackendChannel
from vhostuser.channel import Fds
from vhostuser.protocol import (
    BACKEND,
    NEED_REPLY,
    U64,
    BackendRequest,
    BackendSession,
    Empty,
    FrontendRequest,
    MmapMsg,
    ProtocolFeature,
    RequestRefused,
    Uuid,
    VringState,
)
from vhostuser.testing.pair import Pair
from vhostuser.testing.peer import Answer, Expect, ScriptedPeer, Send
from vhostuser.virtqueue import Request

B, F, P = BackendRequest, FrontendRequest, ProtocolFeature
ACK, NACK = U64(0), U64(1)
UUID = Uuid(bytes(range(16)))
MAPPING = MmapMsg(0, 0, 0, 4096, 1)


class Line(NamedTuple):
    """What is told and asked, and the front-end that hears it."""

    asking: Announcements
    peer: ScriptedPeer
    session: BackendSession

    @property
    def channel(self) -> BackendChannel:
        assert self.asking.channel is not None
        return self.asking.channel


def line_for(protocol_features: int, *, running: bool = True) -> Line:
    session = samples.connect(protocol_features=protocol_features).back
    if running:
        session.kicked(0)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    asking = Announcements("test", session)
    asking.take_channel(Fds([theirs.detach()]))
    return Line(asking, ScriptedPeer(ours), session)


@pytest.fixture
async def lines(no_leaks: None) -> AsyncIterator[Callable[..., Line]]:
    made: list[Line] = []

    def make(*without: P, **options: bool) -> Line:
        features = samples.ALL_PROTOCOL & ~samples.CONDITIONAL & ~sum(feature.mask for feature in without)
        made.append(line_for(features, **options))
        return made[-1]

    yield make
    for line in made:
        line.asking.close()
        line.peer.close()
    await asyncio.sleep(0)


@pytest.fixture
async def line(lines: Callable[..., Line]) -> Line:
    return lines()


class Timers:
    """What the loop was to call later, which happens when a test says that so many seconds have passed."""

    def __init__(self) -> None:
        self._set: list[tuple[float, asyncio.Handle]] = []

    def call_later(
        self, delay: float, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> asyncio.Handle:
        handle = asyncio.Handle(callback, args, asyncio.get_running_loop(), context)
        self._set.append((delay, handle))
        return handle

    def running(self, delay: float) -> list[asyncio.Handle]:
        return [handle for each, handle in self._set if each == delay and not handle.cancelled()]

    def passes(self, delay: float) -> None:
        """Those that were set for so long ring."""
        due = self.running(delay)
        self._set = [(each, handle) for each, handle in self._set if handle not in due]
        assert due, f"nobody waits for {delay:g} s"
        for handle in due:
            handle._run()


@pytest.fixture
async def timers(monkeypatch: pytest.MonkeyPatch) -> Timers:
    made = Timers()
    monkeypatch.setattr(asyncio.get_running_loop(), "call_later", made.call_later)
    return made


# ---- whatever the catalog has


@pytest.mark.parametrize("case", [case for case in samples.CASES if case.row.from_backend], ids=str)
async def test_every_request_of_the_catalog_is_asked_by_name(line: Line, case: samples.Case) -> None:
    code, payload = case.row.code, case.request()
    assert isinstance(code, B)
    fds = [0] * len(case.fds())
    asked = asyncio.ensure_future(line.asking.ask(code, payload, fds))
    await line.peer.follow(
        Expect(code, payload, need_reply=not case.row.reply, fds=len(fds)),
        Answer(ACK, fds=(0,) * case.row.reply_fds[0]),
    )
    got, came = await asked
    assert (got, len(came)) == (ACK, case.row.reply_fds[0])
    came.close()


def test_no_request_of_the_catalog_is_left_out() -> None:
    assert {case.row.code for case in samples.CASES if case.row.from_backend} == {row.code for row in BACKEND.values()}


async def test_descriptors_stay_their_senders(line: Line) -> None:
    """The sender may close its own at once: what arrives is still the same file."""
    read, write = os.pipe()
    asked = asyncio.ensure_future(line.asking.ask(B.SHMEM_MAP, MAPPING, (write,)))
    await asyncio.sleep(0)
    os.close(write)
    await line.peer.follow(Expect(B.SHMEM_MAP, MAPPING, fds=1))
    assert line.peer.last is not None
    os.write(line.peer.last.fds[0], b"same")
    assert os.read(read, 4) == b"same"
    os.close(read)
    await line.peer.follow(Answer(ACK))
    await asked


async def test_an_answer_is_asked_for_only_where_that_was_negotiated(lines: Callable[..., Line]) -> None:
    line = lines(P.REPLY_ACK, P.INBAND_NOTIFICATIONS)
    asked = asyncio.ensure_future(line.asking.ask(B.SHARED_OBJECT_ADD, UUID))
    await line.peer.follow(Expect(B.SHARED_OBJECT_ADD, UUID, need_reply=False))
    assert (await asked)[0] == Empty()
    looked = asyncio.ensure_future(line.asking.ask(B.SHARED_OBJECT_LOOKUP, UUID))
    await line.peer.follow(Expect(B.SHARED_OBJECT_LOOKUP, UUID, need_reply=False), Answer(ACK, fds=(0,)))
    (await looked)[1].close()


async def test_what_is_told_asks_for_nothing(line: Line) -> None:
    assert line.asking.tell(B.VRING_CALL, VringState(1))
    await line.peer.follow(Expect(B.VRING_CALL, VringState(1), need_reply=False))


async def test_what_is_told_and_waits_already_is_told_once(line: Line) -> None:
    for index in (1, 0, 1, 0):
        assert line.asking.tell(B.VRING_CALL, VringState(index))
    assert line.asking.tell(B.CONFIG_CHANGE_MSG)
    assert line.channel.waiting == 3
    await line.peer.follow(
        Expect(B.VRING_CALL, VringState(1)), Expect(B.VRING_CALL, VringState(0)), Expect(B.CONFIG_CHANGE_MSG)
    )


async def test_answers_are_paired_in_order(line: Line) -> None:
    asked = [asyncio.ensure_future(line.asking.ask(B.SHARED_OBJECT_ADD, UUID)) for _ in range(3)]
    steps = [Expect(B.SHARED_OBJECT_ADD, UUID, need_reply=True) for _ in asked]
    await line.peer.follow(*steps)
    for reply in (ACK, NACK, ACK):
        await line.peer.send(Send(B.SHARED_OBJECT_ADD, reply, flags=4))
    outcomes = await asyncio.gather(*asked, return_exceptions=True)
    assert [isinstance(outcome, RequestRefused) for outcome in outcomes] == [False, True, False]


async def test_a_feature_that_was_not_negotiated_is_the_askers_mistake_alone(
    lines: Callable[..., Line], caplog: pytest.LogCaptureFixture
) -> None:
    line = lines(P.SHMEM)
    with pytest.raises(RequestRefused, match="SHMEM was not negotiated"):
        await line.asking.ask(B.SHMEM_MAP, MAPPING, (0,))
    line.asking.tell(B.SHMEM_UNMAP, MAPPING)
    line.asking.tell(B.CONFIG_CHANGE_MSG)
    await line.peer.follow(Expect(B.CONFIG_CHANGE_MSG))
    (logged,) = (record.getMessage() for record in caplog.records)
    assert logged.startswith("test: not sent on the back-end channel: SHMEM_UNMAP: SHMEM was not negotiated")


async def test_without_a_channel_nothing_is_asked() -> None:
    asking = Announcements("test", samples.connect().back)
    assert not asking.tell(B.CONFIG_CHANGE_MSG)
    with pytest.raises(RequestRefused, match="no back-end channel"):
        await asking.ask(B.SHARED_OBJECT_ADD, UUID)


# ---- a front-end that answers wrongly, or not


WRONG = {
    "another request": Send(B.SHMEM_MAP, ACK, flags=4),
    "no reply": Send(B.SHARED_OBJECT_ADD, ACK),
    "a reply that asks": Send(B.SHARED_OBJECT_ADD, ACK, flags=4 | NEED_REPLY),
    "too long": Send(B.SHARED_OBJECT_ADD, bytes(16), flags=4),
    "a descriptor": Send(B.SHARED_OBJECT_ADD, ACK, fds=(0,), flags=4),
    "nonsense": Send(0xFFFF_FFFF, b"x" * 40),
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
async def test_a_wrong_answer_ends_the_channel_with_one_line(
    line: Line, wrong: Send, caplog: pytest.LogCaptureFixture
) -> None:
    """no_leaks looks whether what came with it is closed."""
    asked = [asyncio.ensure_future(line.asking.ask(B.SHARED_OBJECT_ADD, UUID)) for _ in range(2)]
    await line.peer.follow(Expect(B.SHARED_OBJECT_ADD, UUID), Expect(B.SHARED_OBJECT_ADD, UUID), wrong)
    await line.peer.closed()
    for outcome in await asyncio.gather(*asked, return_exceptions=True):
        assert isinstance(outcome, RequestRefused)
    assert not line.asking.tell(B.CONFIG_CHANGE_MSG)
    with pytest.raises(RequestRefused, match="the back-end channel is closed"):
        await line.asking.ask(B.SHARED_OBJECT_ADD, UUID)
    assert [record.levelno for record in caplog.records] == [logging.WARNING]


async def test_an_answer_that_nobody_asked_for_ends_the_channel(line: Line) -> None:
    await line.peer.follow(Send(B.CONFIG_CHANGE_MSG, ACK, flags=4))
    await line.peer.closed()


async def test_a_front_end_that_never_answers_loses_the_channel_with_one_line(
    line: Line, timers: Timers, caplog: pytest.LogCaptureFixture
) -> None:
    asked = asyncio.ensure_future(line.asking.ask(B.SHARED_OBJECT_ADD, UUID))
    await line.peer.follow(Expect(B.SHARED_OBJECT_ADD))
    timers.passes(ANSWER_WITHIN)
    with pytest.raises(RequestRefused, match=r"has not answered SHARED_OBJECT_ADD for 10 s"):
        await asked
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    await line.peer.closed()


async def test_a_front_end_that_has_answered_is_not_timed_any_more(line: Line, timers: Timers) -> None:
    asked = asyncio.ensure_future(line.asking.ask(B.SHARED_OBJECT_ADD, UUID))
    await line.peer.follow(Expect(B.SHARED_OBJECT_ADD))
    assert timers.running(ANSWER_WITHIN)
    await line.peer.follow(Answer(ACK))
    await asked
    assert not timers.running(ANSWER_WITHIN)


async def test_a_front_end_that_closes_its_end_is_no_warning(line: Line, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    line.peer.close()
    async with asyncio.timeout(5):
        while not caplog.records:  # noqa: ASYNC110 - no event tells
            await asyncio.sleep(0)
    with pytest.raises(RequestRefused, match="closed: by the front-end"):
        await line.asking.ask(B.SHARED_OBJECT_ADD, UUID)
    assert [record.levelno for record in caplog.records] == [logging.INFO]


async def test_one_that_closes_it_with_an_answer_owed_is(line: Line, caplog: pytest.LogCaptureFixture) -> None:
    asked = asyncio.ensure_future(line.asking.ask(B.SHARED_OBJECT_ADD, UUID))
    await line.peer.follow(Expect(B.SHARED_OBJECT_ADD))
    line.peer.close()
    with pytest.raises(RequestRefused, match="closed without an answer"):
        await asked
    assert len(caplog.records) == 1


async def test_the_queue_is_bounded(line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend_channel, "MOST_WAITING", 4)
    asked = [asyncio.ensure_future(line.asking.ask(B.SHARED_OBJECT_ADD, UUID)) for _ in range(4)]
    await line.peer.follow(Expect(B.SHARED_OBJECT_ADD))  # those that are sent and not answered count, too
    assert not line.asking.tell(B.CONFIG_CHANGE_MSG)
    with pytest.raises(RequestRefused, match="4 requests wait"):
        await line.asking.ask(B.SHARED_OBJECT_ADD, UUID)
    await line.peer.follow(Answer(ACK))
    await asked[0]
    assert line.asking.tell(B.CONFIG_CHANGE_MSG)
    line.asking.close()
    await asyncio.gather(*asked, return_exceptions=True)


# ---- nobody waits for who waits for him


async def test_who_waits_no_longer_leaves_the_pairing_intact(line: Line) -> None:
    """The descriptor of an answer that comes too late is closed."""
    first = asyncio.ensure_future(line.asking.ask(B.SHARED_OBJECT_LOOKUP, UUID))
    second = asyncio.ensure_future(line.asking.ask(B.SHARED_OBJECT_ADD, UUID))
    await line.peer.follow(Expect(B.SHARED_OBJECT_LOOKUP), Expect(B.SHARED_OBJECT_ADD))
    first.cancel()
    await asyncio.sleep(0)
    await line.peer.send(Send(B.SHARED_OBJECT_LOOKUP, ACK, fds=(0,), flags=4))
    await line.peer.send(Send(B.SHARED_OBJECT_ADD, ACK, flags=4))
    assert (await second)[0] == ACK


async def test_a_front_end_that_waits_for_us_is_not_waited_for(
    line: Line, timers: Timers, caplog: pytest.LogCaptureFixture
) -> None:
    with line.asking.answering():
        asked = asyncio.ensure_future(line.asking.ask(B.SHARED_OBJECT_LOOKUP, UUID))
        await line.peer.follow(Expect(B.SHARED_OBJECT_LOOKUP))
        timers.passes(WITHHELD)
        with pytest.raises(RequestRefused, match="the front-end waits for an answer of ours"):
            await asked
        with pytest.raises(RequestRefused, match="the front-end waits for an answer of ours"):
            await line.asking.ask(B.SHARED_OBJECT_ADD, UUID)
        timers.passes(ANSWER_WITHIN)
        timers.passes(ANSWER_WITHIN)
    assert not caplog.records
    await line.peer.send(Send(B.SHARED_OBJECT_LOOKUP, ACK, fds=(0,), flags=4))
    await line.peer.follow(Expect(B.SHARED_OBJECT_ADD), Answer(ACK))
    third = asyncio.ensure_future(line.asking.ask(B.SHARED_OBJECT_ADD, UUID))
    await line.peer.follow(Expect(B.SHARED_OBJECT_ADD), Answer(ACK))
    await third


async def test_a_front_end_that_waits_for_us_and_answers_all_the_same_is_heard(line: Line) -> None:
    asked = asyncio.ensure_future(line.asking.ask(B.SHARED_OBJECT_ADD, UUID))
    with line.asking.answering():
        await line.peer.follow(Expect(B.SHARED_OBJECT_ADD), Answer(ACK))
        await asked


class Asker(Echo):
    """Asks the front-end something in every request, and answers it with what came of that."""

    protocol_features = P.SHARED_OBJECT.mask

    def __init__(self) -> None:
        super().__init__()
        self.asking: Announcements | None = None

    async def handle(self, request: Request) -> None:
        assert self.asking is not None
        self.control.call_soon_threadsafe(self.entered.put_nowait, request.read())
        asked = asyncio.run_coroutine_threadsafe(self.asking.ask(B.SHARED_OBJECT_LOOKUP, UUID), self.control)
        try:
            (await asyncio.wrap_future(asked))[1].close()
        except RequestRefused:
            request.write(b"no ")
        else:
            request.write(b"yes")


async def asker(pairs: Callable[..., Pair]) -> tuple[Pair, Asker, ScriptedPeer]:
    """A running device that asks, and the front-end's end of its channel."""
    device = Asker()
    pair = pairs(device)
    await pair.set_up()
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    await pair.frontend.request(F.SET_BACKEND_REQ_FD, fds=(theirs.fileno(),))
    theirs.close()
    device.asking = pair.backend.connections[0]._announcements
    return pair, device, ScriptedPeer(ours)


async def test_a_device_that_waits_for_an_answer_is_served(pairs: Callable[..., Pair]) -> None:
    pair, _, peer = await asker(pairs)
    await ask(pair, b"abc")
    await peer.follow(Expect(B.SHARED_OBJECT_LOOKUP), Answer(ACK, fds=(0,)))
    assert await answer(pair) == b"yes"
    peer.close()


@pytest.mark.parametrize("stop", ["GET_VRING_BASE", "memory table", "disable"])
async def test_no_deadlock_where_both_ends_wait(
    no_leaks: None, pairs: Callable[..., Pair], monkeypatch: pytest.MonkeyPatch, stop: str
) -> None:
    """The device's request waits for the front-end, which waits for the ring to stop and answers nothing meanwhile."""
    monkeypatch.setattr(announcements, "WITHHELD", 0.02)
    pair, device, peer = await asker(pairs)
    await ask(pair, b"abc")
    await device.taken(b"abc")
    await peer.follow(Expect(B.SHARED_OBJECT_LOOKUP))
    assert pair.memory is not None
    async with asyncio.timeout(5):
        match stop:
            case "GET_VRING_BASE":
                assert await pair.frontend.stop_ring(pair.rings[0]) == 1
            case "memory table":
                await pair.frontend.set_memory(pair.memory)
            case "disable":
                await pair.frontend.set_vring_enable(0, False)
    assert await answer(pair) == b"no "
    await peer.follow(Answer(ACK, fds=(0,)))  # it is late, and breaks nothing
    await quiet(pair)
    peer.close()


async def test_a_bad_answer_costs_the_channel_and_not_the_connection(
    no_leaks: None, pairs: Callable[..., Pair]
) -> None:
    pair, _, peer = await asker(pairs)
    await ask(pair, b"abc")
    await peer.follow(Expect(B.SHARED_OBJECT_LOOKUP), Answer(b"x" * 100))
    assert await answer(pair) == b"no "
    await peer.closed()
    peer.close()
    assert await pair.frontend.get(F.GET_QUEUE_NUM) == 2
    await ask(pair, b"abc")
    assert await answer(pair) == b"no "


# ---- a suspended device says nothing


async def test_a_suspended_device_asks_nothing(lines: Callable[..., Line]) -> None:
    line = lines(running=False)
    assert not line.asking.tell(B.VRING_CALL, VringState(0))
    with pytest.raises(RequestRefused, match="a suspended device sends nothing"):
        await line.asking.ask(B.SHARED_OBJECT_ADD, UUID)


async def test_what_waits_when_the_device_is_suspended_is_not_sent(line: Line) -> None:
    asked = line.asking.request(B.SHMEM_MAP, MAPPING, (0,))
    assert line.asking.tell(B.VRING_CALL, VringState(0))
    for ring in line.session.rings:
        ring.started = False
    line.asking.send_due()
    with pytest.raises(RequestRefused, match="a suspended device sends nothing"):
        await asked
    line.asking.close()
    await line.peer.closed()


async def test_a_channel_that_is_replaced_answers_nothing_more(line: Line) -> None:
    asked = asyncio.ensure_future(line.asking.ask(B.SHARED_OBJECT_ADD, UUID))
    await line.peer.follow(Expect(B.SHARED_OBJECT_ADD))
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    line.asking.take_channel(Fds([theirs.detach()]))
    with pytest.raises(RequestRefused):
        await asked
    await line.peer.closed()
    async with ScriptedPeer(ours) as peer:
        again = asyncio.ensure_future(line.asking.ask(B.SHARED_OBJECT_ADD, UUID))
        await peer.follow(Expect(B.SHARED_OBJECT_ADD), Answer(ACK))
        await again
