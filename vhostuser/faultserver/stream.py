"""Pages from another process or host: both ends of a stream on which what is waited for overtakes the rest.

What belongs here: the frames, the end that has the pages (``serve_pages``) and the source that asks for them
(``StreamSource``). What does not: where the pages lie and where they go.

The stream is TCP or a Unix stream socket. Each end begins with 8 bytes, ``HELLO``. Then frames, numbers in network
order::

    kind: u8   0, 0, 0   length: u32   guest: u64

=====  ========================  ===========================================================================
kind   from                      means
=====  ========================  ===========================================================================
1      who places                bring these bytes now: somebody waits
2      who places                bring them when there is nothing more urgent
3      who has the pages         here they are; ``length`` bytes follow
4      who has the pages         they are zeros; nothing follows
5      who has the pages         nobody has them; nothing follows, and whoever waits gets an error
6      who has the pages         some of them nobody has; nothing follows, they are brought when somebody waits
=====  ========================  ===========================================================================

The order of answers is nobody's business but theirs; pages may come in pieces and twice. ``serve_pages`` answers urgent
requests first and splits background into pieces of ``PIECE`` bytes so that they need not wait long; whoever asks
keeps no more than a window of background asked for, so that neither end's socket is full of it when something urgent
comes.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Final

from vhostuser.faultserver.sources import Feed, PageLost, SourceLost
from vhostuser.threads import spawn

HELLO: Final = b"vupages1"
PIECE: Final = 1 << 16
"""Bytes of background in one frame, at most; a huge page is one frame all the same."""

_FRAME = struct.Struct(">BxxxIQ")
_URGENT, _BACKGROUND, _DATA, _ZEROS, _LOST, _SKIPPED = range(1, 7)
_MOST = 1 << 30
_PENDING = 1 << 14
"""Requests that wait to be answered; whoever asks for more has to wait."""


def _receive(sock: socket.socket, view: memoryview) -> bool:
    """Fills ``view``; False at the end of the stream. Raises SourceLost when it ends in the middle."""
    done = 0
    while done < len(view):
        count = sock.recv_into(view[done:])
        if not count:
            if done:
                raise SourceLost(f"the stream ended after {done} of {len(view)} bytes")
            return False
        done += count
    return True


def _greet(sock: socket.socket) -> None:
    """Raises SourceLost when the other end does not speak this."""
    sock.sendall(HELLO)
    heard = bytearray(len(HELLO))
    if not _receive(sock, memoryview(heard)) or heard != HELLO:
        raise SourceLost(f"the other end says {bytes(heard)!r}, expected {HELLO!r}: does it serve pages?")


def _receive_frame(sock: socket.socket) -> tuple[int, int, int] | None:
    """Kind, guest address and length; None at the end of the stream."""
    head = bytearray(_FRAME.size)
    if not _receive(sock, memoryview(head)):
        return None
    kind, length, guest = _FRAME.unpack(head)
    if not _URGENT <= kind <= _SKIPPED or not 0 < length <= _MOST:
        raise SourceLost(f"a frame of kind {kind} and {length} bytes, expected kinds 1 to 6 and at most {_MOST}")
    return kind, guest, length


# ---- the end that has the pages


class PageServer:
    """Serves one connected socket; ``serve_pages`` runs it."""

    def __init__(
        self, sock: socket.socket, read: Callable[[int, int], bytes], bandwidth: float | None, latency: float
    ) -> None:
        self._sock = sock
        self._read = read
        self._bandwidth = bandwidth
        self._latency = latency
        self._changed = threading.Condition()
        self._urgent: deque[tuple[float, int, int]] = deque()
        self._background: deque[tuple[float, int, int]] = deque()
        self._free = 0.0  # when the line has carried what was sent
        self._ended = False

    def run(self) -> None:
        """Until the other end closes. Raises OSError, SourceLost."""
        _greet(self._sock)
        asking = spawn(self._hear, "page requests")
        try:
            while (request := self._next()) is not None:
                self._answer(*request)
        finally:
            with contextlib.suppress(OSError):
                self._sock.shutdown(socket.SHUT_RDWR)
            with self._changed:
                self._ended = True
                self._changed.notify_all()
            asking.join()

    def _hear(self) -> None:
        with contextlib.suppress(OSError, SourceLost):
            while (frame := _receive_frame(self._sock)) is not None:
                kind, guest, length = frame
                with self._changed:
                    self._changed.wait_for(lambda: len(self._urgent) + len(self._background) < _PENDING or self._ended)
                    queue = self._urgent if kind == _URGENT else self._background
                    queue.append((time.monotonic() + self._latency, guest, length))
                    self._changed.notify()
        with self._changed:
            self._ended = True
            self._changed.notify()

    def _next(self) -> tuple[int, int, bool] | None:
        """What to send next, when the line is free and the request has travelled its time."""
        with self._changed:
            while not self._ended:
                now = time.monotonic()
                queue = self._urgent if self._due(self._urgent, now) else self._background
                if self._free <= now and self._due(queue, now):
                    self._changed.notify_all()
                    return *self._take(queue), queue is self._urgent
                self._changed.wait(self._pause(now))
        return None

    @staticmethod
    def _due(queue: deque[tuple[float, int, int]], now: float) -> bool:
        return bool(queue) and queue[0][0] <= now

    def _take(self, queue: deque[tuple[float, int, int]]) -> tuple[int, int]:
        due, guest, length = queue.popleft()
        if queue is self._background and length > PIECE and length < _WHOLE:
            queue.appendleft((due, guest + PIECE, length - PIECE))
            return guest, PIECE
        return guest, length

    def _pause(self, now: float) -> float | None:
        dues = [queue[0][0] for queue in (self._urgent, self._background) if queue]
        return max(min(dues), self._free, now) - now if dues else None

    def _answer(self, guest: int, length: int, urgent: bool) -> None:
        try:
            data = self._read(guest, length)
        except PageLost:
            self._sock.sendall(_FRAME.pack(_LOST if urgent else _SKIPPED, length, guest))
            return
        zeros = not data.strip(b"\0")
        kind = _ZEROS if zeros else _DATA
        self._sock.sendall(_FRAME.pack(kind, length, guest) + (b"" if zeros else data))
        if self._bandwidth:
            sent = _FRAME.size + (0 if zeros else length)
            self._free = max(self._free, time.monotonic()) + sent / self._bandwidth


_WHOLE = 2 << 20
"""A background request of so many bytes may be one huge page, which is not split."""


def serve_pages(
    sock: socket.socket,
    read: Callable[[int, int], bytes],
    *,
    bandwidth: float | None = None,
    latency: float = 0.0,
) -> None:
    """Serves pages on a connected stream socket, which stays the caller's, until the other end closes it.

    read(guest, length): exactly ``length`` bytes of whatever the other end names, or raises PageLost; called on this
    thread. bandwidth: bytes a second that the line is to carry, None: all it can. latency: seconds that a request takes
    on its way. Both slow an honest line down, for trying things out. Blocks. Raises OSError when the line breaks,
    SourceLost when the other end speaks something else.
    """
    if sock.family != socket.AF_UNIX:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    PageServer(sock, read, bandwidth, latency).run()


# ---- the end that places them


class StreamSource:
    """Asks a process that runs ``serve_pages``.

    connect() returns a connected stream socket, or raises OSError; it is called once each time the server begins or
    resumes. window: bytes asked for and not yet received beyond which no background is asked for.
    """

    threads = 1

    def __init__(self, connect: Callable[[], socket.socket], *, window: int = 1 << 20) -> None:
        self._connect = connect
        self._window = window
        self._lock = threading.Lock()
        self._line: _Line | None = None

    def run(self, feed: Feed, number: int) -> None:
        """Receives, while two more threads ask: one for what is waited for, one for the background."""
        line = _Line(self._connect(), feed, self._window)
        with self._lock:
            self._line = line
        try:
            line.run()
            wanted = not feed.ended
        finally:
            with self._lock:
                self._line = None
            line.close()
        if wanted:
            raise SourceLost("the other end has closed the stream")

    def interrupt(self) -> None:
        """Ends ``run`` soon."""
        with self._lock:
            if self._line is not None:
                self._line.hang_up()

    def close(self) -> None:
        """There is nothing left when ``run`` has ended."""
        self.interrupt()


class _Line:
    """One connection, from its beginning to its end. Owns the socket."""

    def __init__(self, sock: socket.socket, feed: Feed, window: int) -> None:
        self._sock = sock
        self._feed = feed
        self._window = window
        self._changed = threading.Condition()
        self._sending = threading.Lock()
        self._asked = 0  # bytes that have not come yet
        self._over = False
        self._askers: list[threading.Thread] = []

    def run(self) -> None:
        """Until the stream ends. Raises OSError, SourceLost, and as ``Feed.place``."""
        _greet(self._sock)
        self._askers = [spawn(self._ask_urgent, "urgent pages"), spawn(self._ask_background, "background pages")]
        buffer = bytearray(1 << 18)
        while (frame := _receive_frame(self._sock)) is not None:
            kind, guest, length = frame
            if kind == _DATA:
                buffer = buffer if length <= len(buffer) else bytearray(length)
                if not _receive(self._sock, memoryview(buffer)[:length]):
                    return
                self._feed.place(guest, memoryview(buffer)[:length])
            elif kind == _ZEROS:
                self._feed.place(guest, length)
            elif kind == _LOST:
                self._feed.lose(guest, length)
            with self._changed:
                self._asked -= length
                self._changed.notify_all()

    def _ask_urgent(self) -> None:
        with contextlib.suppress(OSError):
            while not self._over and (ask := self._feed.next(background=False)) is not None:
                self._ask(_URGENT, ask.guest, ask.length)

    def _ask_background(self) -> None:
        with contextlib.suppress(OSError):
            while self._wait_for_room() and (ask := self._feed.next()) is not None:
                self._ask(_URGENT if ask.demanded else _BACKGROUND, ask.guest, ask.length)

    def _wait_for_room(self) -> bool:
        with self._changed:
            self._changed.wait_for(lambda: self._asked < self._window or self._over)
            return not self._over

    def _ask(self, kind: int, guest: int, length: int) -> None:
        """The other end may be slow to read: what comes is counted all the while, by another lock."""
        with self._changed:
            self._asked += length
        with self._sending:
            self._sock.sendall(_FRAME.pack(kind, length, guest))

    def hang_up(self) -> None:
        """From any thread."""
        self._over = True
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """The threads that ask may wait for the feed: they end with it."""
        self.hang_up()
        with self._changed:
            self._changed.notify_all()
        self._feed.end()
        for thread in self._askers:
            thread.join()
        self._sock.close()
