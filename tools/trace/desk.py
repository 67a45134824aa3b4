"""The process in which sightings are understood and written down, so that no message waits for that.

What belongs here: the way from the relay to the observer, and the clock for those who wait too long. What does not:
what an event is (``observer``) and how it looks (``text``, ``jsonlines``).

A process and not a thread: with the interpreter's lock between them, each of the relay's system calls would wait for
the observer.
"""

from __future__ import annotations

import asyncio
import os
import pickle
import select
import signal
import socket
import time
import traceback
from collections.abc import Callable, Iterable, Sequence

from vhostuser.tools.trace.events import Event, Seen
from vhostuser.tools.trace.observer import Observer

_NICE = 10
"""Where processors are few, the two ends come first: an answer that is late changes what is looked at."""

_LENGTH = 8
"""Bytes in front of each batch of reports that tell its length."""

_TOGETHER = 0.002
"""Seconds for which reports are gathered: neither is anything looked at nor does the other process wake while an answer
is on its way."""


class Desk:
    """Owns the process; make it before there are threads. ``close`` waits until everything is written.

    began: when the trace began, in nanoseconds of the monotonic clock.
    """

    def __init__(self, observer: Observer, writers: Sequence[Callable[[Event], None]], began: int) -> None:
        self._sock, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        self._process = os.fork()
        if self._process == 0:
            _work(self._sock, theirs, _Clerk(observer, writers, began))
        theirs.close()
        self._sock.setblocking(False)
        self._batch: list[Callable[[], Seen]] = []
        self._unsent = bytearray()

    def report(self, look: Callable[[], Seen]) -> None:
        """What ``look`` returns is written down; it is called later. Never waits. Belongs to the loop's thread."""
        if not self._batch:
            asyncio.get_running_loop().call_later(_TOGETHER, self._dispatch)
        self._batch.append(look)

    def _dispatch(self) -> None:
        behind = bool(self._unsent)
        self._pack()
        if not behind and not self._send():
            asyncio.get_running_loop().add_writer(self._sock, self._catch_up)

    def _pack(self) -> None:
        batch = pickle.dumps([look() for look in self._batch], pickle.HIGHEST_PROTOCOL)
        self._batch.clear()
        self._unsent += len(batch).to_bytes(_LENGTH) + batch

    def _catch_up(self) -> None:
        if self._send():
            asyncio.get_running_loop().remove_writer(self._sock)

    def _send(self) -> bool:
        """Sends what there is; false if some of it has to wait."""
        try:
            while self._unsent:
                del self._unsent[: self._sock.send(self._unsent)]
        except BlockingIOError:
            return False
        except ConnectionError:  # the process was killed: the messages go on passing
            self._unsent.clear()
        return True

    def close(self) -> None:
        """After the loop has ended."""
        self._sock.setblocking(True)
        self._pack()
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
            length = sock.recv(_LENGTH, socket.MSG_WAITALL)
            if not length:
                return
            for seen in pickle.loads(sock.recv(int.from_bytes(length), socket.MSG_WAITALL)):
                self._write(self._observer.see(seen))

    def _patience(self) -> float | None:
        due = self._observer.next_due()
        return None if due is None else max(0.0, (due - self._now()) / 1e9)

    def _now(self) -> int:
        return time.monotonic_ns() - self._began

    def _write(self, events: Iterable[Event]) -> None:
        for event in events:
            for write in self._writers:
                write(event)
