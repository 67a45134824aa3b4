"""The source of a run's pages: a copy of what guest memory held, behind links of some bandwidth and latency.

What belongs here: the delay of every page. What does not: who asks for which page (``vhostuser.faultserver``).
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator, Sequence
from itertools import groupby

from vhostuser.faultserver import Channels, Feed, FilePiece, MappedFile
from vhostuser.tools.postcopy.options import Options

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

    def __init__(self, files: Sequence[FilePiece], bandwidth: int, latency: float, page_size: int) -> None:
        self._files = files
        self._link = Link(bandwidth)
        self._latency = latency
        self._page_size = page_size

    def run(self, feed: Feed, number: int) -> None:
        """The last thread brings what nobody waits for."""
        while (ask := feed.next(background=number == _THREADS - 1, most=_MOST)) is not None:
            if ask.demanded:
                time.sleep(self._latency)
            ready = self._link.through(ask.length, time.monotonic())
            time.sleep(max(0.0, ready - time.monotonic()))
            for offset, piece in pieces(self._read(ask.guest, ask.length), self._page_size):
                feed.place(ask.guest + offset, piece)

    def _read(self, guest: int, length: int) -> bytes:
        (file,) = (file for file in self._files if file.guest <= guest < file.guest + file.size)
        return os.pread(file.fd, length, file.offset + guest - file.guest)

    def interrupt(self) -> None:
        """It waits for no longer than the delays that were asked for."""

    def close(self) -> None:
        """Nothing to let go of."""


def pieces(data: bytes, page_size: int) -> Iterator[tuple[int, bytes | int]]:
    """Whole pages cut into runs, with their offsets: bytes, and for pages that are all zeros their number of bytes."""
    zero = bytes(page_size)
    pages = ((at, data[at : at + page_size] == zero) for at in range(0, len(data), page_size))
    for is_zero, run in groupby(pages, lambda page: page[1]):
        offsets = [at for at, _ in run]
        end = offsets[-1] + page_size
        yield offsets[0], end - offsets[0] if is_zero else data[offsets[0] : end]


def make_source(fd: int, regions: Sequence[tuple[int, int]], options: Options, page_size: int) -> Channels | MappedFile:
    """The source for a file in which regions (guest address, bytes) lie one after the other. ``fd`` stays the caller's
    and open. Where nothing is asked of it, it is placed from straight away."""
    files, offset = [], 0
    for guest, size in regions:
        files.append(FilePiece(guest, size, fd, offset))
        offset += size
    if options.bandwidth or options.latency or options.zeros:
        lines = (DelayedSource(files, options.bandwidth, options.latency, page_size) for _ in range(options.streams))
        return Channels(*lines)
    return MappedFile(*files)
