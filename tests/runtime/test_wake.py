"""The wake channel between a real back-end and front-ends, honest and other."""

from __future__ import annotations

import array
import asyncio
import os
import socket
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.runtime.migration import DATA, PAGE, REQUESTS, SIZE, F, Migration, Shout
from vhostuser import measures
from vhostuser.backend import Backend
from vhostuser.metrics import as_json, value_in
from vhostuser.protocol import (
    WAKE_MAX_RANGES,
    WAKE_MAX_SIZE,
    LocalProtocolError,
    RemoteProtocolError,
    Wake,
    WakeAck,
    WakeError,
    WakeHello,
    WakeRange,
    WakeReason,
    WakeStatus,
    unpack_wake,
)
from vhostuser.testing.pair import Pair
from vhostuser.wake import BlockingWakeChannel, WakeChannel

pytestmark = [pytest.mark.postcopy, pytest.mark.usefixtures("no_leaks", "permitted")]

ONE_PAGE = WakeRange(0, PAGE)


@asynccontextmanager
async def served(backend: Backend) -> AsyncIterator[socket.socket]:
    """A connected socket on which the back-end serves the channel; at the end it must notice that we left."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    serving = asyncio.ensure_future(backend.wakes.serve(theirs))
    try:
        yield ours
    finally:
        ours.close()
        await asyncio.wait_for(serving, 10)


@asynccontextmanager
async def listening(backend: Backend, path: Path) -> AsyncIterator[str]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(path))
        listener.listen()
        task = asyncio.ensure_future(backend.wakes.listen(listener))
        try:
            yield str(path)
        finally:
            task.cancel()
            await asyncio.wait((task,))


class Raw:
    """A front-end that says what it likes."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self.sock = sock

    def say(self, data: bytes) -> None:
        self.sock.send(data)

    async def heard(self) -> Any:
        """The next message, or None at the end."""
        loop = asyncio.get_running_loop()
        datagram = await asyncio.wait_for(loop.sock_recv(self.sock, WAKE_MAX_SIZE), 10)
        return unpack_wake(datagram) if datagram else None

    async def ask(self, message: WakeHello | Wake) -> Any:
        self.say(message.pack())
        return await self.heard()


async def in_postcopy(migrations: Callable[..., Migration]) -> Migration:
    """Memory has holes, requests are offered, no ring runs yet."""
    migration = migrations(Shout())
    migration.offer_texts()
    await migration.advise()
    await migration.listen()
    return migration


def wake_only_by(migration: Migration, wake: Callable[[int], None]) -> None:
    """From now on the front-end places pages and never touches the back-end's userfaultfd but to read faults."""
    assert migration.server is not None

    def never(host: int, length: int) -> None:
        raise AssertionError("woken by the back-end's userfaultfd")

    migration.server.theirs.wake = never  # type: ignore[method-assign]
    migration.server.wake = wake  # type: ignore[method-assign]


# ---- what it is for


def messages(pair: Pair) -> float:
    return value_in(as_json(pair.backend.wakes.measure()), measures.WAKES)


async def test_faults_are_released_by_wake_messages_only(migrations: Callable[..., Migration]) -> None:
    migration = await in_postcopy(migrations)
    assert migration.server is not None
    async with served(migration.pair.backend) as sock:
        channel = BlockingWakeChannel(sock)
        await asyncio.to_thread(channel.hello)
        acknowledged: list[int] = []
        wake_only_by(migration, lambda page: acknowledged.append(channel.wake([(page * PAGE, PAGE)])))
        migration.server.open.set()
        await migration.start()
        await migration.completed()
        assert migration.texts() == [b"REQUEST %d" % number for number in range(REQUESTS)]
        assert len(acknowledged) >= 2 * REQUESTS
        assert set(acknowledged) == {PAGE}
        await asyncio.to_thread(migration.server.place_all)
        await migration.end()
        assert await asyncio.to_thread(channel.wake, [(0, PAGE)]) == 0


async def test_placing_alone_wakes_nobody(migrations: Callable[..., Migration]) -> None:
    """Otherwise the test above would show nothing."""
    migration = await in_postcopy(migrations)
    assert migration.server is not None
    placed = threading.Event()
    wake_only_by(migration, lambda page: placed.set())
    migration.server.open.set()
    await migration.start()
    await asyncio.to_thread(placed.wait, 10)
    for _ in range(10):
        await migration.frontend.get(F.GET_FEATURES)
    assert migration.used() == 0
    async with served(migration.pair.backend) as sock:
        channel = WakeChannel(sock)
        await channel.hello()
        while migration.used() < REQUESTS:
            assert await channel.wake([(0, SIZE)]) == SIZE


async def test_tasks_and_threads_share_a_channel(migrations: Callable[..., Migration], tmp_path: Path) -> None:
    migration = await in_postcopy(migrations)
    many = [(DATA, 1)] * (2 * WAKE_MAX_RANGES + 1)
    async with listening(migration.pair.backend, tmp_path / "wake") as path:
        async with await WakeChannel.connect(path) as channel:
            assert await asyncio.gather(*(channel.wake(many) for _ in range(8))) == [len(many)] * 8
            assert await channel.wake([]) == 0
        with await asyncio.to_thread(BlockingWakeChannel.connect, path) as blocking:
            calls = [asyncio.to_thread(blocking.wake, many) for _ in range(8)]
            assert await asyncio.gather(*calls) == [len(many)] * 8
            with pytest.raises(LocalProtocolError):
                blocking.wake([(1 << 64, 1)])
            assert await asyncio.to_thread(blocking.wake, [(0, 1)]) == 1


async def test_outside_of_postcopy_nobody_waits(migrations: Callable[..., Migration]) -> None:
    migration = migrations(Shout())
    async with served(migration.pair.backend) as sock:
        raw = Raw(sock)
        await raw.ask(WakeHello())
        nobody = WakeAck(7, 0, WakeStatus.NO_POSTCOPY)
        assert await raw.ask(Wake(7, (ONE_PAGE,))) == nobody
        migration.offer_texts()
        await migration.advise()
        assert await raw.ask(Wake(7, (ONE_PAGE,))) == nobody
        await migration.listen()
        assert await raw.ask(Wake(7, (ONE_PAGE,))) == WakeAck(7, PAGE)
        await migration.end()
        assert await raw.ask(Wake(7, (ONE_PAGE,))) == nobody
        await migration.pair.close()
        assert await raw.ask(Wake(7, (ONE_PAGE,))) == nobody
    shown = as_json(migration.pair.backend.wakes.measure())
    assert [value_in(shown, metric) for metric in (measures.WAKES, measures.WOKEN)] == [5, PAGE]


async def test_parts_that_are_not_mapped_are_left_out(migrations: Callable[..., Migration]) -> None:
    migration = await in_postcopy(migrations)
    async with served(migration.pair.backend) as sock:
        channel = WakeChannel(sock)
        await channel.hello()
        assert await channel.wake([(SIZE - PAGE, 2 * PAGE), (SIZE, PAGE), (0, (1 << 64) - 1)]) == PAGE + SIZE


# ---- other front-ends


@pytest.mark.parametrize(
    ("datagram", "reason"),
    [
        (b"\2\0\0", WakeReason.MALFORMED),
        (Wake(1, (ONE_PAGE,)).pack() + b"\0", WakeReason.MALFORMED),
        (Wake(1, (ONE_PAGE,) * WAKE_MAX_RANGES).pack() + b"\0", WakeReason.MALFORMED),
        (Wake(1, (ONE_PAGE,) * (WAKE_MAX_RANGES + 1)).pack(), WakeReason.COUNT),
        (Wake(1, (ONE_PAGE, WakeRange(1, (1 << 64) - 1), WakeRange(2, (1 << 64) - 1))).pack(), WakeReason.RANGE),
        (WakeHello().pack(), WakeReason.ORDER),
        (WakeAck(1, 1).pack(), WakeReason.ORDER),
        (b"", None),
    ],
    ids=["short", "long", "too-long", "too-many", "wraps", "hello-again", "ack", "empty"],
)
async def test_a_datagram_that_breaks_the_protocol_ends_the_channel_and_nothing_else(
    pairs: Callable[..., Pair], tmp_path: Path, datagram: bytes, reason: WakeReason | None
) -> None:
    pair = pairs(Shout())
    async with listening(pair.backend, tmp_path / "wake") as path:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
            sock.connect(path)
            raw = Raw(sock)
            await raw.ask(WakeHello())
            raw.say(datagram)
            if reason is not None:
                assert await raw.heard() == WakeError(reason)
            assert await raw.heard() is None
            async with await WakeChannel.connect(path) as channel:
                assert await channel.wake([ONE_PAGE]) == 0
    await pair.frontend.negotiate()


async def test_descriptors_that_come_along_are_closed(pairs: Callable[..., Pair]) -> None:
    """``no_leaks`` looks."""
    async with served(pairs(Shout()).backend) as sock:
        fds = array.array("i", [0] * 200)
        sock.sendmsg([WakeHello().pack()], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds.tobytes())])
        assert await Raw(sock).heard() == WakeHello(1, WAKE_MAX_RANGES)


async def test_a_flood_from_who_reads_no_answers_stops_only_himself(pairs: Callable[..., Pair]) -> None:
    pair = pairs(Shout())
    await pair.frontend.negotiate()
    async with served(pair.backend) as sock:
        raw = Raw(sock)
        await raw.ask(WakeHello())
        sent = 0
        while True:
            try:
                sock.send(Wake(sent, (ONE_PAGE,) * WAKE_MAX_RANGES).pack())
                sent += 1
            except BlockingIOError:
                before = messages(pair)
                for _ in range(20):
                    await pair.frontend.get(F.GET_FEATURES)
                if messages(pair) == before:
                    break
        for number in range(sent):
            assert await raw.heard() == WakeAck(number, 0, WakeStatus.NO_POSTCOPY)
        assert await raw.ask(Wake(sent, ())) == WakeAck(sent, 0, WakeStatus.NO_POSTCOPY)


async def test_a_front_end_that_goes_without_reading_its_answers(pairs: Callable[..., Pair]) -> None:
    pair = pairs(Shout())
    await pair.frontend.negotiate()
    async with served(pair.backend) as sock:
        sock.send(WakeHello().pack())
        for number in range(100):
            sock.send(Wake(number, (ONE_PAGE,)).pack())
        while not messages(pair):
            await pair.frontend.get(F.GET_FEATURES)
    await pair.frontend.get(F.GET_FEATURES)


async def test_a_second_front_end_waits_for_its_turn(pairs: Callable[..., Pair], tmp_path: Path) -> None:
    pair = pairs(Shout())
    async with listening(pair.backend, tmp_path / "wake") as path:
        first = await WakeChannel.connect(path)
        with pytest.raises(TimeoutError, match="another front-end"):
            await WakeChannel.connect(path, patience=0.01)
        second = asyncio.ensure_future(WakeChannel.connect(path))
        assert await first.wake([ONE_PAGE]) == 0
        assert not second.done()
        first.close()
        async with await second as channel:
            assert await channel.wake([ONE_PAGE]) == 0


async def test_a_process_without_descriptors_accepts_when_it_has_some_again(
    pairs: Callable[..., Pair], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vhostuser.wake_service._RETRY", 0)
    loop = asyncio.get_running_loop()
    real, left = loop.sock_accept, [OSError(24, os.strerror(24))]

    async def accept(listener: socket.socket) -> Any:
        if left:
            raise left.pop()
        return await real(listener)

    pair = pairs(Shout())
    monkeypatch.setattr(loop, "sock_accept", accept)
    async with listening(pair.backend, tmp_path / "wake") as path, await WakeChannel.connect(path) as channel:
        assert await channel.wake([ONE_PAGE]) == 0
    assert not left


# ---- other back-ends


async def test_a_cancelled_call_does_not_spoil_the_next(pairs: Callable[..., Pair]) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    channel, raw = WakeChannel(ours), Raw(theirs)
    hello = asyncio.ensure_future(channel.hello())
    assert await raw.heard() == WakeHello()
    raw.say(WakeHello(1, 1).pack())
    await hello
    first = asyncio.ensure_future(channel.wake([(0, 10)]))
    assert await raw.heard() == Wake(1, (WakeRange(0, 10),))
    first.cancel()
    await asyncio.wait((first,))
    second = asyncio.ensure_future(channel.wake([(0, 20)]))
    assert await raw.heard() == Wake(2, (WakeRange(0, 20),))
    raw.say(WakeAck(1, 10).pack())
    raw.say(WakeAck(2, 20).pack())
    assert await second == 20
    channel.close()
    theirs.close()


@pytest.mark.parametrize(
    "last",
    [b"", WakeError(WakeReason.RANGE).pack(), b"nonsense", WakeAck(1, 2).pack()],
    ids=["nothing", "reason", "nonsense", "too-much"],
)
@pytest.mark.parametrize("blocking", [True, False])
async def test_the_loss_of_the_back_end_is_told(last: bytes, blocking: bool) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    theirs.send(WakeHello(1, 1).pack())
    channel: Any = BlockingWakeChannel(ours) if blocking else WakeChannel(ours)
    await asyncio.to_thread(channel.hello) if blocking else await channel.hello()
    if last:
        theirs.send(last)
    theirs.close()  # with our HELLO unread
    with pytest.raises(RemoteProtocolError, match="wake channel"):
        await asyncio.to_thread(channel.wake, [(0, 1)]) if blocking else await channel.wake([(0, 1)])
    channel.close()


async def test_the_last_words_are_heard_of_a_back_end_that_left_messages_unread() -> None:
    """Its end of the socket then resets ours, before what it said."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    theirs.send(WakeHello(1, 1).pack())
    channel = WakeChannel(ours)
    await channel.hello()
    call = asyncio.ensure_future(channel.wake([(0, 1)]))
    await asyncio.sleep(0)
    theirs.send(WakeError(WakeReason.RANGE).pack())
    theirs.close()
    with pytest.raises(RemoteProtocolError, match="RANGE"):
        await call
    channel.close()


async def test_a_back_end_that_does_not_answer_is_named() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    theirs.send(WakeHello(1, 1).pack())
    channel = BlockingWakeChannel(ours, patience=0.01)
    channel.hello()
    with pytest.raises(TimeoutError, match="does not answer WAKE"):
        channel.wake([(0, 1)])
    channel.close()
    theirs.close()


async def test_no_back_end(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        await WakeChannel.connect(str(tmp_path / "none"))
    with pytest.raises(FileNotFoundError):
        BlockingWakeChannel.connect(str(tmp_path / "none"))
