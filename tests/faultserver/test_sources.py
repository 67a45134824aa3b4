"""Where pages come from: streams on which what is waited for overtakes the rest, sources that are lost and return."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.faultserver.conftest import MIB, PAGE, Bed, content, good, pages, until
from vhostuser.faultserver import (
    CallableSource,
    FaultServer,
    FilePiece,
    MappedFile,
    PageLost,
    SourceLost,
    StreamSource,
    serve_pages,
)
from vhostuser.faultserver.stream import HELLO

ROOT = Path(__file__).parents[2]


class Source:
    """source.py, that can be killed and started again."""

    def __init__(self, directory: Path, **slowness: float) -> None:
        self.path = directory / "pages"
        self.start(**slowness)

    def start(self, *, latency: float = 0.0, bandwidth: float = 0.0) -> None:
        self.path.unlink(missing_ok=True)
        words = map(str, (self.path, latency, bandwidth))
        command = [sys.executable, "-m", "tests.faultserver.source", *words]
        self.process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "ready\n"

    def connect(self) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.connect(str(self.path))
        return sock

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()


class Line:
    """A stream to a thread of this process that serves pages."""

    def __init__(self, read: Callable[[int, int], bytes] = content, **settings: Any) -> None:
        self._read, self._settings = read, settings
        self.order: list[int] = []
        self.sockets: list[socket.socket] = []

    def connect(self) -> socket.socket:
        ours, theirs = socket.socketpair()
        self.sockets.append(theirs)
        threading.Thread(target=self._serve, args=(theirs,), daemon=True).start()
        return ours

    def _serve(self, sock: socket.socket) -> None:
        def read(guest: int, length: int) -> bytes:
            self.order.append(guest)
            return self._read(guest, length)

        with sock:
            serve_pages(sock, read, **self._settings)


def without_page_5(guest: int, length: int) -> bytes:
    if guest <= 5 * PAGE < guest + length:
        raise PageLost("page 5")
    return content(guest, length)


# ---- the stream


def test_a_stream_brings_what_is_waited_for_and_the_background(bed: Bed) -> None:
    memory = bed.memory((0, MIB), (16 * MIB, 3 * PAGE))
    server = bed.server(memory, StreamSource(Line().connect))
    process, _ = bed.client(server, memory)
    process.read(pages(200), [(16 * MIB + PAGE, PAGE)])
    assert good(process.answers(2))
    server.prefetch()
    assert server.wait(10)
    process.read([(0, MIB), (16 * MIB, 3 * PAGE)])
    assert good(process.answers(1))


def test_over_tcp(bed: Bed) -> None:
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        sock, _ = listener.accept()
        with sock:
            serve_pages(sock, content)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    memory = bed.memory()
    server = bed.server(memory, StreamSource(lambda: socket.create_connection(listener.getsockname())))
    server.prefetch()
    assert server.wait(10)
    assert memory.map.read(0, 64 * PAGE) == content(0, 64 * PAGE)
    server.close()
    thread.join(10)
    listener.close()


def test_what_is_waited_for_overtakes_the_background(bed: Bed) -> None:
    """The line is slow enough that all of the background would take a minute."""
    memory = bed.memory((0, 16 * MIB))
    line = Line(bandwidth=256 * 1024)
    server = bed.server(memory, StreamSource(line.connect))
    process, _ = bed.client(server, memory)
    server.prefetch()
    until(lambda: server.stats().received, "the background has begun")
    process.read(pages(4000))
    assert good(process.answers(1))
    assert server.stats().received < 2000
    assert 4000 * PAGE in line.order
    assert max(at for at in line.order if at != 4000 * PAGE) < 4 * MIB, "no more than a window ahead"


def test_zeros_are_not_sent(bed: Bed) -> None:
    memory = bed.memory()
    server = bed.server(memory, StreamSource(Line(lambda guest, length: bytes(length)).connect))
    server.prefetch()
    assert server.wait(10)
    assert server.stats().zero == 64


@pytest.mark.parametrize("streamed", [False, True])
def test_a_page_that_the_source_has_lost_is_an_error_for_who_wants_it(bed: Bed, streamed: bool) -> None:
    """In the background it is skipped, and its neighbours too until somebody asks for them by themselves."""
    memory = bed.memory()
    source = StreamSource(Line(without_page_5).connect) if streamed else CallableSource(without_page_5)
    server = bed.server(memory, source)
    process, _ = bed.client(server, memory)
    server.prefetch([(0, 16 * PAGE)])
    process.read(pages(5), pages(6), pages(5))
    assert sorted(answer.lost for answer in process.answers(3)) == [[], [5 * PAGE], [5 * PAGE]]
    assert server.stats().lost == 1
    assert not server.paused


def test_pages_can_be_given_up(bed: Bed) -> None:
    memory = bed.memory()
    server = bed.server(memory, CallableSource(content))
    server.pause()
    process, _ = bed.client(server, memory)
    process.read(pages(5))
    until(lambda: server.stats().waiting == 1, "it waits")
    assert server.poison(4 * PAGE, 4 * PAGE) == 4
    assert process.answers(1)[0].lost == [5 * PAGE]
    server.resume()
    server.prefetch()
    assert server.wait(10)
    assert (server.stats().received, server.stats().lost) == (60, 4)


@pytest.mark.parametrize(
    "said", [b"HTTP/1.1", HELLO + b"\0" * 16, HELLO + bytes([3, 0, 0, 0, 0, 0, 0, 1]) + b"\xff" * 9]
)
def test_whoever_speaks_something_else_is_a_lost_source(bed: Bed, said: bytes) -> None:
    """Also one that brings pages which nobody has."""
    memory = bed.memory()
    ours, theirs = socket.socketpair()
    theirs.sendall(said)
    server = bed.server(memory, StreamSource(lambda: ours))
    until(lambda: server.lost, "the source is lost")
    assert server.paused
    theirs.close()


# ---- sources that are lost


@pytest.mark.parametrize("background", [False, True])
def test_a_source_that_is_killed_and_returns(bed: Bed, tmp_path: Path, background: bool) -> None:
    """Sixteen threads of two processes wait: all are woken, all bytes are right, each page was placed once."""
    source = bed.closing(Source(tmp_path, latency=600))
    memory = bed.memory((0, 4 * MIB))
    server = bed.server(memory, StreamSource(source.connect))
    readers = [bed.client(server, memory)[0] for _ in range(2)]
    for reader in readers:
        reader.read(*(pages(100 * number + 7, 100 * number + 8) for number in range(8)))
    until(lambda: server.stats().waiting == 16, "sixteen threads wait")
    if background:
        server.prefetch()
    source.close()
    until(lambda: server.lost, "the source is lost")
    assert server.paused
    assert server.stats().waiting == 16
    source.start()
    server.resume()
    assert all(good(reader.answers(8)) for reader in readers)
    check_all(server, readers, background)


def test_a_source_that_is_killed_in_the_middle_of_the_background(bed: Bed, tmp_path: Path) -> None:
    source = bed.closing(Source(tmp_path, bandwidth=MIB))
    memory = bed.memory((0, 4 * MIB))
    server = bed.server(memory, StreamSource(source.connect))
    readers = [bed.client(server, memory)[0] for _ in range(2)]
    server.prefetch()
    until(lambda: server.stats().received >= 64, "some of it has come")
    for reader in readers:
        reader.read(*(pages(1023 - number) for number in range(8)))
    source.close()
    until(lambda: server.lost, "the source is lost")
    source.start()
    server.resume()
    assert all(good(reader.answers(8)) for reader in readers)
    check_all(server, readers, True)


def check_all(server: FaultServer, readers: list[Any], background: bool) -> None:
    """The rest comes, all is right, nothing was placed twice."""
    if not background:
        server.prefetch()
    assert server.wait(10)
    for reader in readers:
        reader.read([(0, 4 * MIB)])
        assert good(reader.answers(1))
    assert server.stats().placed == 1024


@pytest.mark.parametrize("failure", [SourceLost("not now"), ZeroDivisionError("not now")], ids=["lost", "mistaken"])
def test_a_source_that_fails_pauses_until_it_is_asked_again(bed: Bed, failure: Exception) -> None:
    working = threading.Event()

    def fetch(guest: int, length: int) -> bytes:
        if not working.is_set():
            raise failure
        return content(guest, length)

    memory = bed.memory()
    server = bed.server(memory, CallableSource(fetch))
    process, client = bed.client(server, memory)
    process.read(pages(1), pages(2))
    until(lambda: server.lost and server.stats().waiting == 2, "both wait")
    assert str(server.lost) == "not now"
    assert not server.wait(1), "it has paused by itself, so waiting makes no sense"
    working.set()
    server.resume()
    assert good(process.answers(2))
    assert client.stats().woken == 2


def test_a_source_that_ends_too_early_is_lost(bed: Bed) -> None:
    source = CallableSource(content)
    source.run = lambda feed, number: None  # type: ignore[method-assign]
    server = bed.server(bed.memory(), source)
    until(lambda: server.lost, "the source is lost")
    assert "ended before" in str(server.lost)


def test_another_source_takes_over(bed: Bed) -> None:
    memory = bed.memory()
    server = bed.server(memory, CallableSource(lambda guest, length: b""))
    own = bed.threads(memory)
    own.read(pages(1))
    until(lambda: server.lost, "the first brings too little")
    server.resume(StreamSource(Line().connect))
    assert good(own.answers())


def test_a_file_that_shrinks_pauses_and_loses_nothing(bed: Bed) -> None:
    """The kernel, not we, reads a mapped source: no SIGBUS, but EFAULT."""
    memory = bed.memory()
    fd = os.memfd_create("image", os.MFD_CLOEXEC)
    os.pwrite(fd, content(0, 64 * PAGE), 0)
    source = bed.closing(MappedFile(FilePiece(0, 64 * PAGE, fd)))
    server = bed.server(memory, source)
    os.truncate(fd, 32 * PAGE)
    process, _ = bed.client(server, memory)
    process.read(pages(40), pages(3))
    until(lambda: server.paused, "it pauses")
    server.prefetch()
    assert not server.wait(), "it has paused by itself, so waiting makes no sense"
    os.truncate(fd, 64 * PAGE)
    os.pwrite(fd, content(0, 64 * PAGE), 0)
    server.resume()
    assert good(process.answers(2))
    server.prefetch()
    assert server.wait(10)
    os.close(fd)


def test_a_pause_leaves_faults_waiting(bed: Bed) -> None:
    memory = bed.memory()
    server = bed.server(memory)
    process, _ = bed.client(server, memory)
    server.pause()
    server.prefetch()
    process.read(pages(3))
    until(lambda: server.stats().waiting == 1, "it waits")
    assert server.stats().received == 0
    assert process.idle()
    server.resume()
    assert server.wait(10)
    assert good(process.answers(1))


def test_closing_an_incomplete_server_makes_the_memory_inaccessible(bed: Bed) -> None:
    """Zeros in missing pages would be worse for whoever shares the file."""
    memory = bed.memory()
    server: FaultServer = bed.server(memory)
    own = bed.threads(memory)
    server.pause()
    own.read(pages(3))
    until(lambda: server.stats().waiting == 1, "it waits")
    server.close()
    assert own.answers()[0].lost == [3 * PAGE]
    assert os.fstat(memory.fds[0]).st_blocks == 0
