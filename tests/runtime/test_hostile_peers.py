"""Peers that flood, fall silent, leave half-way, or have taken all descriptors: nobody else notices."""

import asyncio
import contextlib
import errno
import logging
import os
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest

from tests.runtime.echo import Echo, answer, ask, quiet
from vhostuser.backend import Backend
from vhostuser.devices.blk import Blk, BlkSettings
from vhostuser.devices.image import Image
from vhostuser.frontend import Frontend, FrontendRing
from vhostuser.protocol import Config, FrontendRequest, Inflight, RequestRefused, VringFd
from vhostuser.testing.pair import Pair, connect

pytestmark = pytest.mark.usefixtures("no_leaks")

F = FrontendRequest
GET_FEATURES = bytes.fromhex("01000000 01000000 00000000")


@pytest.fixture
async def listening(tmp_path: Path) -> AsyncIterator[Callable[..., tuple[Backend, str]]]:
    """Starts back-ends on socket files."""
    tasks: list[asyncio.Task[None]] = []
    listeners: list[socket.socket] = []

    def listen(device: object, **options: object) -> tuple[Backend, str]:
        path = str(tmp_path / f"sock{len(tasks)}")
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(path)
        listener.listen(8)
        backend = Backend(device, **options)  # type: ignore[arg-type]
        listeners.append(listener)
        tasks.append(asyncio.ensure_future(backend.listen(listener)))
        return backend, path

    yield listen
    for task in tasks:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
    for listener in listeners:
        listener.close()


def dialled(path: str) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(path)
    return sock


async def test_a_flood_does_not_starve_other_connections(listening: Callable[..., tuple[Backend, str]]) -> None:
    _, path = listening(Echo, connections=2)
    flood = dialled(path)
    end = threading.Event()

    def pour() -> None:
        with contextlib.suppress(OSError):
            while not end.is_set():
                flood.sendall(GET_FEATURES * 50)
                flood.recv(1 << 20, socket.MSG_DONTWAIT)

    pouring = threading.Thread(target=pour)
    pouring.start()
    try:
        async with asyncio.timeout(5), await Frontend.connect(path) as other:
            for _ in range(20):
                await other.get(F.GET_FEATURES)
    finally:
        end.set()
        flood.shutdown(socket.SHUT_RDWR)
        pouring.join()
        flood.close()


async def test_a_conversation_gives_way_after_every_request() -> None:
    """However fast requests come: signals and other connections have their turn between two of them."""
    pair = connect(Echo())
    turns = 0

    def count() -> None:
        nonlocal turns
        turns += 1
        asyncio.get_running_loop().call_soon(count)

    await pair.frontend.send_raw(GET_FEATURES * 50)
    count()
    left = 50 * 20
    while left:
        data, _ = await pair.frontend.receive_raw(left)
        left -= len(data)
    assert turns >= 45
    await pair.close()


async def test_a_peer_that_never_reads_holds_up_nobody(listening: Callable[..., tuple[Backend, str]]) -> None:
    backend, path = listening(Echo, connections=2)
    deaf = dialled(path)
    deaf.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while True:
            deaf.send(GET_FEATURES * 100)
            await asyncio.sleep(0.001)
    async with asyncio.timeout(5), await Frontend.connect(path) as other:
        await other.get(F.GET_FEATURES)
    deaf.close()
    await until(lambda: not backend.connections)


async def test_a_violation_by_a_peer_that_never_reads_still_closes(pairs: Callable[..., Pair]) -> None:
    """The nack is sent if there is room, and never waited for."""
    pair = pairs(Echo())
    await pair.frontend.negotiate()
    raw = pair.frontend._channel._sock
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
    theirs = pair.backend.connections[0]._channel._sock
    with contextlib.suppress(BlockingIOError):
        while True:
            theirs.send(b"x" * 64)
    with contextlib.suppress(BlockingIOError):
        while True:
            theirs.send(b"x")
    await pair.frontend.send_raw(bytes.fromhex("e7030000 09000000 00000000"))
    await asyncio.wait_for(asyncio.shield(pair.serving), 5)


async def until(holds: Callable[[], object]) -> None:
    async with asyncio.timeout(5):
        while not holds():  # noqa: ASYNC110 - what is waited for is inside the back-end
            await asyncio.sleep(0.005)


async def test_a_half_closed_peer_is_answered_and_then_closed(pairs: Callable[..., Pair]) -> None:
    pair = pairs(Echo())
    await pair.frontend.send_raw(GET_FEATURES * 3)
    pair.frontend._channel._sock.shutdown(socket.SHUT_WR)
    await asyncio.wait_for(asyncio.shield(pair.serving), 5)
    data, _ = await pair.frontend.receive_raw(1000)
    assert len(data) == 60


# ---- errors that are nobody's refusal


class Failing(Echo):
    def config(self) -> bytes:
        raise RuntimeError("no configuration today")


async def closes(pair: Pair, caplog: pytest.LogCaptureFixture, words: str) -> None:
    """The connection ends by itself, without an exception and without a traceback."""
    await asyncio.wait_for(asyncio.shield(pair.serving), 5)
    assert words in caplog.text
    assert pair.serving.exception() is None


async def test_a_device_that_raises_in_config_ends_its_connection(
    pairs: Callable[..., Pair], caplog: pytest.LogCaptureFixture
) -> None:
    pair = pairs(Failing())
    await pair.frontend.negotiate()
    with pytest.raises(Exception, match="closed"):
        await pair.frontend.request(F.GET_CONFIG, Config(0, 4, 0, bytes(4)))
    await closes(pair, caplog, "test: GET_CONFIG failed, the connection is closed: no configuration today")


async def test_a_full_table_of_descriptors_ends_the_connection_with_one_line(
    pairs: Callable[..., Pair], caplog: pytest.LogCaptureFixture, full: Callable[[str], None]
) -> None:
    pair = pairs(Echo())
    await pair.frontend.negotiate()
    full("os.memfd_create")
    with pytest.raises(Exception, match="closed"):
        await pair.frontend.request(F.GET_INFLIGHT_FD, Inflight(0, 0, 1, 64))
    await closes(pair, caplog, "test: GET_INFLIGHT_FD failed, the connection is closed: [Errno 24] Too many open files")
    assert len([record for record in caplog.records if record.levelno >= logging.ERROR]) == 1
    assert "Traceback" not in caplog.text


@pytest.mark.parametrize("name", ["select.epoll", "vhostuser.dataplane.new_event_loop"])
async def test_a_process_without_descriptors_refuses_front_ends_and_lives(
    listening: Callable[..., tuple[Backend, str]],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    backend, path = listening(Echo())

    def raise_(*_: object) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    with monkeypatch.context() as patched:
        sock = dialled(path)
        patched.setattr(name, raise_)
        pair = None
        if name == "select.epoll":
            await until(lambda: "Too many open files" in caplog.text)
            assert sock.recv(1) == b""
        else:
            patched.undo()
            sock.setblocking(False)
            pair = Pair(backend, Frontend(sock), asyncio.ensure_future(asyncio.sleep(0)))
            await pair.set_up()
            patched.setattr(name, raise_)
            await ask(pair, b"x")
            await until(lambda: "Too many open files" in caplog.text)
            await pair.close()
    sock.close()
    async with asyncio.timeout(5), await Frontend.connect(path) as other:
        await other.get(F.GET_FEATURES)


async def test_a_thread_that_cannot_be_made_ends_the_connection(
    pairs: Callable[..., Pair], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def none_left(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    pair = pairs(Echo())
    await pair.set_up()
    monkeypatch.setattr("threading.Thread.start", none_left)
    await ask(pair, b"x")
    await closes(pair, caplog, "can't start new thread")


async def test_a_path_descriptor_as_kick_is_refused(pairs: Callable[..., Pair], tmp_path: Path) -> None:
    """O_PATH to a FIFO has a FIFO's mode, and no other use."""
    pair = pairs(Echo())
    await pair.set_up()
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    fd = os.open(fifo, os.O_PATH)
    with pytest.raises(RequestRefused):
        await pair.frontend.request(F.SET_VRING_KICK, VringFd(0), (fd,))
    os.close(fd)


async def test_other_anonymous_files_are_no_kicks(pairs: Callable[..., Pair]) -> None:
    """A pidfd or an epoll is readable for ever and cannot be read: whoever waits for it would spin."""
    pair = pairs(Echo())
    await pair.set_up()
    fd = os.pidfd_open(os.getpid())
    with pytest.raises(RequestRefused):
        await pair.frontend.request(F.SET_VRING_KICK, VringFd(0), (fd,))
    os.close(fd)


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    yield ends
    for fd in ends:
        with contextlib.suppress(OSError):
            os.close(fd)


async def test_a_kick_whose_other_end_is_gone_does_not_spin(pairs: Callable[..., Pair], pipe: tuple[int, int]) -> None:
    pair = pairs(Echo())
    await pair.set_up()
    await pair.frontend.request(F.SET_VRING_KICK, VringFd(0), (pipe[0],))
    await ask(pair, b"x", kick=False)
    os.write(pipe[1], bytes(8))
    assert await answer(pair) == b"X"
    os.close(pipe[1])
    await quiet(pair)
    before = time.process_time()
    await asyncio.sleep(0.2)
    assert time.process_time() - before < 0.1


@pytest.mark.parametrize("stopped", [0, 1])
async def test_a_call_that_blocks_does_not_hold_up_a_stop(pairs: Callable[..., Pair], stopped: int) -> None:
    """The front-end shares the eventfd's flags and counter. Rings of a device in Python share a thread."""
    pair = pairs(Echo())
    await pair.set_up(rings=2)
    for ring in (0, 1):
        await ask(pair, b"x", ring=ring)
        assert await answer(pair, ring=ring) == b"X"
    block(pair.rings[0])
    await ask(pair, b"y")
    await until(lambda: pair.rings[0].queue.take() is not None)
    assert await asyncio.wait_for(pair.frontend.stop_ring(pair.rings[stopped]), 5) == 2 - stopped


async def test_a_call_that_blocks_does_not_keep_an_engine(pairs: Callable[..., Pair], tmp_path: Path) -> None:
    (tmp_path / "disk").write_bytes(bytes(4096))
    pair = pairs(Blk(Image(tmp_path / "disk"), BlkSettings()))
    await pair.set_up()
    await ask(pair, bytes(16))
    assert len(await answer(pair)) == 1
    block(pair.rings[0])
    await ask(pair, bytes(16))
    await until(lambda: pair.rings[0].queue.take() is not None)
    pair.frontend.close()
    await asyncio.wait_for(pair.serving, 5)


def block(ring: FrontendRing) -> None:
    """Whoever calls for the next request waits."""
    ring.queue.arm()
    with contextlib.suppress(BlockingIOError):
        os.eventfd_read(ring.call_fd)
    os.eventfd_write(ring.call_fd, (1 << 64) - 2)
    os.set_blocking(ring.call_fd, True)


@pytest.mark.parametrize("name", ["err", "call"])
async def test_an_eventfd_that_is_made_to_block_again_at_once_does_not_hold_up_the_control_thread(
    pairs: Callable[..., Pair], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Between our look and our write: whoever signals it waits for as long as the front-end likes."""
    pair = pairs(Echo())
    await pair.set_up()
    await ask(pair, b"x")
    assert await answer(pair) == b"X"
    set_blocking = os.set_blocking
    monkeypatch.setattr("os.set_blocking", lambda fd, _: set_blocking(fd, True))
    fds = [os.eventfd(0, os.EFD_CLOEXEC) for _ in range(20)]
    for fd in fds:
        os.eventfd_write(fd, (1 << 64) - 2)
    ring = pair.backend.connections[0].rings[0]
    for fd in fds:
        if name == "call":
            await pair.frontend.request(F.SET_VRING_CALL, VringFd(0), (fd,))
        else:
            await pair.frontend.request(F.SET_VRING_ERR, VringFd(0), (fd,))
            ring.signal_err()
    await asyncio.wait_for(pair.frontend.get(F.GET_FEATURES), 5)
    await pair.close()
    for fd in fds:
        os.close(fd)


async def test_a_pipe_as_call_is_refused(pairs: Callable[..., Pair], pipe: tuple[int, int]) -> None:
    """Who waits for room in a pipe is at its reader's mercy."""
    pair = pairs(Echo())
    await pair.set_up()
    with pytest.raises(RequestRefused):
        await pair.frontend.request(F.SET_VRING_CALL, VringFd(0), (pipe[1],))
