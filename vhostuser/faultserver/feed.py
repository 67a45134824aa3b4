"""What a page source is asked for: first what somebody waits for, then the background.

What belongs here: the order in which pages are asked for, and what is asked again after a source was lost. What does
not: the pages' state (native/faultpages.c), who runs a source (``supply``).
"""

from __future__ import annotations

import contextlib
import os
import select
import threading
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

from vhostuser._native import ffi, lib
from vhostuser.faultserver.sources import Ask
from vhostuser.memory import explain


class Background:
    """Ranges of guest memory to bring without being asked, in order. Any thread may call any method."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._ranges: deque[tuple[int, int]] = deque()
        self._ever: list[tuple[int, int]] = []

    def add(self, ranges: Iterable[tuple[int, int]], *, first: bool = False) -> None:
        """More ranges (guest address, bytes), behind the others or, with ``first``, before them."""
        new = list(ranges)
        with self._lock:
            self._ever += new
            if first:
                self._ranges.extendleft(reversed(new))
            else:
                self._ranges.extend(new)

    def cut(self, most: int) -> tuple[int, int] | None:
        """Takes at most ``most`` bytes off the front; None if nothing is left."""
        with self._lock:
            if not self._ranges:
                return None
            guest, length = self._ranges.popleft()
            if length > most:
                self._ranges.appendleft((guest + most, length - most))
            return guest, min(length, most)

    def put_back(self, guest: int, length: int) -> None:
        """What was cut and is still to be done."""
        if length:
            with self._lock:
                self._ranges.appendleft((guest, length))

    def restart(self) -> None:
        """Everything from the beginning: what has come meanwhile is skipped by whoever brings it."""
        with self._lock:
            self._ranges = deque(self._ever)

    def __bool__(self) -> bool:
        return bool(self._ranges)

    def forget(self, done: Callable[[int, int], bool]) -> bool:
        """Forgets the ranges that are ``done``; whether that is all that were ever added."""
        with self._lock:
            self._ever = [each for each in self._ever if not done(*each)]
            return not self._ever


class NativeFeed:
    """The Feed of a native server (``vu_faults *``); see ``sources.Feed``. Owns two eventfds.

    Each tells "there may be something to do": ``demands``, written by the server, that somebody waits for a page; the
    other that there is background to bring. Whoever consumes one looks, and pokes again if it found something, since
    there may be more and another thread to do it. Only threads that would bring background consume the second.
    """

    def __init__(self, background: Background, *, may_poison: bool) -> None:
        self.native: Any = None
        self.demands = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._work = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.placed = threading.Condition()
        """Notified after pages were placed."""
        self.paused = False
        self.may_poison = may_poison
        """Whether the kernel has UFFDIO_POISON."""
        self.busy = False
        """A piece of the background is being placed."""
        self._background = background
        self._ended = False

    @property
    def ended(self) -> bool:
        return self._ended

    def begin(self) -> None:
        """A source starts, perhaps another than before, or goes on."""
        self._ended = self.paused = False
        self.look_again()

    def end(self) -> None:
        """Every thread of the source gets None from ``next``."""
        self._ended = True
        self.look_again()

    def look_again(self) -> None:
        """Lets threads that wait in ``next`` look."""
        os.eventfd_write(self.demands, 1)
        os.eventfd_write(self._work, 1)

    def next(self, *, background: bool = True, most: int = 1 << 18, until: int = -1) -> Ask | None:
        fds = [self.demands, self._work] if background else [self.demands]
        waiting = select.poll()
        for fd in fds if until < 0 else [*fds, until]:
            waiting.register(fd, select.POLLIN)
        while not self._ended:
            if (ask := self._look(background, most)) is not None:
                return ask
            ready = [fd for fd, _ in waiting.poll()]
            if until in ready:
                break
            for fd in ready:
                _consume(fd)
        self.look_again()  # this thread may have consumed what should tell the others of the end, or of something to do
        return None

    def ask_again(self) -> None:
        if not self.paused:  # else it is done when that ends
            self._background.restart()
            lib.vu_faults_ask_again(self.native)
            self.look_again()

    def _look(self, background: bool, most: int) -> Ask | None:
        if self.paused:
            return None
        if (ask := self._demanded()) is not None:
            os.eventfd_write(self.demands, 1)
        elif background and (ask := self._next_background(most)) is not None:
            os.eventfd_write(self._work, 1)
        return ask

    def _demanded(self) -> Ask | None:
        found = ffi.new("struct vu_fault_range *")
        if lib.vu_faults_wanted(self.native, found, 1) == 0:
            return None
        return Ask(found.guest, found.length, True)

    def _next_background(self, most: int) -> Ask | None:
        run = ffi.new("struct vu_fault_range *")
        while (piece := self._background.cut(1 << 62)) is not None:
            guest, length = piece
            if lib.vu_faults_missing(self.native, guest, length, most, run) != 1:
                continue
            end = run.guest + run.length
            self._background.put_back(end, guest + length - end)
            return Ask(run.guest, run.length, False)
        return None

    # ---- for the thread that fills from a mapped source

    def piece(self, most: int) -> tuple[int, int] | None:
        """The next piece of the background, waiting for it; None when there is an end. Say ``done`` after it."""
        waiting = select.poll()
        waiting.register(self._work, select.POLLIN)
        while not self._ended:
            self.busy = True
            if not self.paused and (piece := self._background.cut(most)) is not None:
                return piece
            self.done()
            waiting.poll()
            _consume(self._work)
        return None

    def done(self) -> None:
        """The piece has been placed."""
        self.busy = False
        self._tell_placed()

    def _tell_placed(self) -> None:
        with self.placed:
            self.placed.notify_all()

    # ---- what has come

    def place(self, guest: int, data: bytes | bytearray | memoryview | int) -> int:
        source, length = (ffi.NULL, data) if isinstance(data, int) else (ffi.from_buffer(data), len(data))
        placed = int(lib.vu_faults_place(self.native, guest, length, source))
        if placed < 0:
            if placed == lib.VU_E_SYS:
                raise OSError(ffi.errno, f"{length} bytes at guest address {guest:#x}: {os.strerror(ffi.errno)}")
            raise LookupError(f"{length} bytes at guest address {guest:#x}: {explain(placed)}, or not whole pages")
        self._tell_placed()
        return placed

    def lose(self, guest: int, length: int) -> None:
        if self.may_poison:
            lib.vu_faults_lose(self.native, guest, length)
            self._tell_placed()

    def close(self) -> None:
        """No thread may be inside."""
        os.close(self.demands)
        os.close(self._work)


def _consume(fd: int) -> None:
    with contextlib.suppress(BlockingIOError):  # another thread was quicker
        os.eventfd_read(fd)
