"""The source of a run's pages: a copy of what guest memory held, behind a link of some bandwidth and latency.

What belongs here: the delay of every page. What does not: who asks for which page (``vhostuser.faultserver``).
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Sequence

from vhostuser.pagesource import Feed, FilePiece, MappedFile

_THREADS = 8
"""Pages that are on their way at a time, as far as they were asked for; one thread brings the rest."""
_MOST = 64 << 10
"""Bytes of the rest that a page that is asked for may have to wait for."""


class Link:
    """What goes over it takes its turn. ``bandwidth``: bytes a second, 0: no limit. Any thread may use it."""

    def __init__(self, bandwidth: int) -> None:
        self._bandwidth = bandwidth
        self._lock = threading.Lock()
        self._free = 0.0

    def through(self, length: int, now: float) -> float:
        """Takes the next free time for ``length`` bytes; when they are through, on the clock of ``now``."""
        if not self._bandwidth:
            return now
        with self._lock:
            self._free = max(self._free, now) + length / self._bandwidth
            return self._free


class DelayedSource:
    """A ``PageSource``. latency: seconds that a page takes that somebody waits for, before it enters the link."""

    threads = _THREADS

    def __init__(self, files: Sequence[FilePiece], bandwidth: int, latency: float) -> None:
        self._files = files
        self._link = Link(bandwidth)
        self._latency = latency

    def run(self, feed: Feed, number: int) -> None:
        """The last thread brings what nobody waits for."""
        while (ask := feed.next(background=number == _THREADS - 1, most=_MOST)) is not None:
            if ask.demanded:
                time.sleep(self._latency)
            ready = self._link.through(ask.length, time.monotonic())
            time.sleep(max(0.0, ready - time.monotonic()))
            feed.place(ask.guest, self._read(ask.guest, ask.length))

    def _read(self, guest: int, length: int) -> bytes:
        (file,) = (file for file in self._files if file.guest <= guest < file.guest + file.size)
        return os.pread(file.fd, length, file.offset + guest - file.guest)

    def interrupt(self) -> None:
        """It waits for no longer than the delays that were asked for."""

    def close(self) -> None:
        """Nothing to let go of."""


def make_source(
    fd: int, regions: Sequence[tuple[int, int]], bandwidth: int, latency: float
) -> DelayedSource | MappedFile:
    """The source for a file in which regions (guest address, bytes) lie one after the other. ``fd`` stays the caller's
    and open."""
    files, offset = [], 0
    for guest, size in regions:
        files.append(FilePiece(guest, size, fd, offset))
        offset += size
    if bandwidth or latency:
        return DelayedSource(files, bandwidth, latency)
    return MappedFile(*files)
