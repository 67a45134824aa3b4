"""The process in which sightings are understood and written down, so that no message waits for that.

What belongs here: the way from the relay to the observer, and the clock for those who wait too long. What does not:
what an event is (``observer``) and how it looks (``text``, ``jsonlines``).

A process and not a thread: with the interpreter's lock between them, each of the relay's system calls would wait for
the observer.
"""

from __future__ import annotations

import asyncio
import io
import os
import pickle
import select
import signal
import socket
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Sequence

from vhostuser.tools.trace.events import Event, Seen
from vhostuser.tools.trace.observer import Observer

_NICE = 10
"""Where processors are few, the two ends come first: an answer that is late changes what is looked at."""

_LARGEST = 1 << 17
"""Bytes of reports sent as one packet: that of the largest message that is kept (witness.LARGEST_BODY) has room."""

_TOGETHER = 0.002
"""Seconds for which reports are gathered, so that the other process does not wake while an answer is on its way."""


class Desk:
    """Owns the process; make it before there are threads. ``close`` waits until everything is written.

    began: when the trace began, in nanoseconds of the monotonic clock.
    """

    def __init__(self, observer: Observer, writers: Sequence[Callable[[Event], None]], began: int) -> None:
        self._sock, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._process = os.fork()
        if self._process == 0:
            _work(self._sock, theirs, _Clerk(observer, writers, began))
        theirs.close()
        self._sock.setblocking(False)
        self._batch = bytearray()
        self._unsent: deque[bytes] = deque()

    def report(self, seen: Seen) -> None:
        """To be written down; never waits. Belongs to the loop's thread."""
        report = pickle.dumps(seen, pickle.HIGHEST_PROTOCOL)
        if len(self._batch) + len(report) > _LARGEST:
            self._dispatch()
        if not self._batch:
            asyncio.get_running_loop().call_later(_TOGETHER, self._dispatch)
        self._batch += report

    def _dispatch(self) -> None:
        if not self._batch:
            return
        self._unsent.append(bytes(self._batch))
        self._batch.clear()
        if len(self._unsent) == 1 and not self._send():
            asyncio.get_running_loop().add_writer(self._sock, self._catch_up)

    def _catch_up(self) -> None:
        if self._send():
            asyncio.get_running_loop().remove_writer(self._sock)

    def _send(self) -> bool:
        """Sends what there is; false if some of it has to wait."""
        try:
            while self._unsent:
                self._sock.send(self._unsent[0])
                self._unsent.popleft()
        except BlockingIOError:
            return False
        except ConnectionError:  # the process was killed: the messages go on passing
            self._unsent.clear()
        return True

    def close(self) -> None:
        """After the loop has ended."""
        self._sock.setblocking(True)
        if self._batch:
            self._unsent.append(bytes(self._batch))
        self._send()
        self._sock.close()
        os.waitpid(self._process, 0)


def _work(theirs: socket.socket, ours: socket.socket, clerk: _Clerk) -> None:
    """The process: signals are for the relay, whose end ends this one."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    theirs.close()
    os.nice(_NICE)
    try:
        clerk.run(ours)
    except Exception:
        traceback.print_exc()
    finally:
        os._exit(0)


class _Clerk:
    """Reads reports until there are no more."""

    def __init__(self, observer: Observer, writers: Sequence[Callable[[Event], None]], began: int) -> None:
        self._observer = observer
        self._writers = writers
        self._began = began

    def run(self, sock: socket.socket) -> None:
        while True:
            if not select.select([sock], [], [], self._patience())[0]:
                self._write(self._observer.overdue(self._now()))
                continue
            batch = io.BytesIO(sock.recv(_LARGEST))
            if not batch.getbuffer():
                return
            while batch.tell() < len(batch.getbuffer()):
                self._write(self._observer.see(pickle.load(batch)))

    def _patience(self) -> float | None:
        due = self._observer.next_due()
        return None if due is None else max(0.0, (due - self._now()) / 1e9)

    def _now(self) -> int:
        return time.monotonic_ns() - self._began

    def _write(self, events: Iterable[Event]) -> None:
        for event in events:
            for write in self._writers:
                write(event)
