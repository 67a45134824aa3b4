"""The source of a fault server at work: its threads, its loss, and another in its place.

What belongs here: what runs the source, mapped or asked, and how it ends. What does not: what it is asked for
(``feed``), sources themselves (``sources``), who waits for pages (``server``).
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable
from functools import partial
from typing import Any

from vhostuser._native import ffi, lib
from vhostuser.faultserver.feed import Background, NativeFeed
from vhostuser.faultserver.sources import MappedSource, PageSource, SourceLost
from vhostuser.threads import spawn

_CHUNK = 16 << 20
"""Bytes that the filling thread places before it looks whether something else comes first."""


class Supply:
    """Brings what a native server (``vu_faults *``) wants from a source, which stays the caller's.

    notice: an eventfd to write when the source is lost, the caller's too. page_size: of the largest pages, bytes.
    ``native`` is to be set before ``begin``. Methods may be called from any thread.
    """

    def __init__(self, source: MappedSource | PageSource, notice: int, *, page_size: int, may_poison: bool) -> None:
        self.source = source
        self.lost: Exception | None = None
        """Why the source was lost, until ``resume``."""
        self._notice = notice
        self._most = max(_CHUNK, page_size)
        self._background = Background()
        self._feed = NativeFeed(self._background, may_poison=may_poison)
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []
        self._ending = False  # on purpose, so whatever threads say of it is no loss

    @property
    def wanted(self) -> int:
        """The eventfd that the native server writes when somebody waits for a page."""
        return self._feed.demands

    @property
    def native(self) -> Any:
        return self._feed.native

    @native.setter
    def native(self, native: Any) -> None:
        self._feed.native = native

    # ---- threads

    def begin(self) -> None:
        """Starts the threads that bring pages."""
        self._feed.begin()
        if isinstance(self.source, MappedSource):
            self._threads = [spawn(self._fill, "fault filler")]
        else:
            source = self.source
            self._threads = [
                spawn(partial(self._run, source, number), f"page source {number}") for number in range(source.threads)
            ]

    def _fill(self) -> None:
        """Brings the background of a mapped source; what somebody waits for is placed by the server's own thread."""
        while (piece := self._feed.piece(self._most)) is not None:
            placed = lib.vu_faults_fill(self.native, *piece)
            if placed < 0 or self._feed.paused:
                self._background.put_back(*piece)
                self._feed.paused = True
            self._feed.done()

    def _run(self, source: PageSource, number: int) -> None:
        try:
            source.run(self._feed, number)
        # Whatever it is, also a mistake in a source of the caller's: who waits for its pages has to be told.
        except Exception as error:
            self.lose(error)
        else:
            self.lose(SourceLost(f"the source's thread {number} has ended before it was asked to"))

    def lose(self, error: Exception) -> None:
        """Nothing comes any more, because of ``error``; only the first counts."""
        with self._lock:
            if self.lost is None and not self._ending:
                self._feed.end()
                lib.vu_faults_pause(self.native, 1)
                self.lost = error
                os.eventfd_write(self._notice, 1)

    def end(self) -> None:
        """Ends the threads and waits for them."""
        self._ending = True
        self._feed.end()
        if not isinstance(self.source, MappedSource):
            self.source.interrupt()
        for thread in self._threads:
            thread.join()
        self._ending = False

    def close(self) -> None:
        """After ``end``."""
        self._feed.close()

    # ---- pause

    def pause(self) -> None:
        """Places nothing more, except what is under way."""
        self._feed.paused = True
        lib.vu_faults_pause(self.native, 1)

    def resume(self, source: PageSource | None) -> None:
        """Goes on, from ``source`` if there is another; waits for the threads of the one before it, or of one that was
        lost. Everything that is missing is asked for again."""
        again = self.lost is not None or source is not None
        if again:
            self.end()
        with self._lock:
            self.lost = None
            self.source = source or self.source
            self._background.restart()
            lib.vu_faults_pause(self.native, 0)
            if again:
                self.begin()
            else:
                self._feed.begin()

    # ---- background

    def queue(self, ranges: Iterable[tuple[int, int]], *, first: bool) -> None:
        """Ranges (guest address, bytes) to bring that nobody waits for, behind what is queued or, with ``first``,
        before it."""
        self._background.add(ranges, first=first)
        self._feed.look_again()

    def drain(self, timeout: float | None) -> bool:
        """Waits until all that was queued is there; False when ``timeout`` seconds have passed before."""
        with self._feed.placed:
            return self._feed.placed.wait_for(self._drained, timeout)

    def _drained(self) -> bool:
        run = ffi.new("struct vu_fault_range *")
        done = self._background.forget(
            lambda guest, length: not lib.vu_faults_missing(self.native, guest, length, 1, run)
        )
        return done and not self._feed.busy
