"""Several sources at once, each on threads of its own: placing then goes on at the speed of all of them together.

What belongs here: who brings what, the loss of one source among several, its return, what each has brought. What does
not: the sources themselves (``sources``, ``stream``), placing: any number of threads may do that at a time, since each
page is claimed by one of them (native/faultpages.c).

Nothing is shared out beforehand. Each source asks the feed for more when it has room, so a slow one brings less; what
somebody waits for goes to whichever asks first. When one is lost, what is missing is named once more to the others.
What they have under way already may come twice then; it is dropped.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from dataclasses import dataclass

from vhostuser.faultserver.sources import Ask, Feed, PageSource, SourceLost


@dataclass(frozen=True)
class ChannelStats:
    """Of one source among several, since they were put together."""

    asked: int
    """What it was asked for: pages that somebody waits for, and runs of the background."""
    demanded: int
    """Of these, pages that somebody waited for."""
    brought: int
    """Bytes that came from it, zeros included."""
    placed: int
    """Pages of these that were placed; the others had come before."""
    losses: int
    """How many times it was lost."""
    lost: Exception | None
    """Why it is lost now; None: it brings pages."""


class Channels:
    """A source that consists of several, which must differ in nothing but in how they bring the same bytes.

    It is lost when all of them are; until then the loss of one is told by ``on_loss(number, reason)``, on a thread of
    that source's, and the others go on. What ``on_loss`` raises is the loss of all. The sources stay the caller's, who
    closes them after the server.
    """

    def __init__(self, *sources: PageSource, on_loss: Callable[[int, Exception], None] | None = None) -> None:
        if not sources:
            raise ValueError("there must be one source at least")
        self._changed = threading.Condition()
        self._channels = [_Channel(number, source, self._changed) for number, source in enumerate(sources)]
        self._threads = [(channel, own) for channel in self._channels for own in range(channel.source.threads)]
        self._on_loss = on_loss
        self.threads = len(self._threads)

    def run(self, feed: Feed, number: int) -> None:
        """Runs one thread of one source, again after each ``restore``. Raises SourceLost when no source is left."""
        channel, own = self._threads[number]
        part: _Part | None = channel.enter(feed)
        try:
            while part is not None:
                self._lose(channel, part, channel.outcome(part, own))
                part = channel.parked(part)
        finally:
            channel.leave()

    def _lose(self, channel: _Channel, part: _Part, reason: Exception) -> None:
        """One thread of the channel has ended. The first of them decides why; each may have been asked for something
        that it has not brought."""
        if part.whole.ended:
            return
        first = channel.lose(part, reason)
        if first and all(each.lost for each in self._channels):
            raise SourceLost(f"all {len(self._channels)} channels are lost, the last of them because: {reason}")
        part.whole.ask_again()
        if first and self._on_loss is not None:
            self._on_loss(channel.number, reason)

    def restore(self, number: int, source: PageSource | None = None) -> None:
        """Has a lost channel bring pages again, from another source if there is one, with as many threads.

        Waits for the threads of the one that was lost, so ``on_loss`` must not call it. Raises ValueError for a channel
        that is not lost, and where the server has lost all of them: there ``FaultServer.resume`` begins with all again.
        """
        self._channels[number].restore(source)

    def stats(self) -> list[ChannelStats]:
        """Live, in the order of the sources. From any thread."""
        return [channel.stats() for channel in self._channels]

    def interrupt(self) -> None:
        """Ends what sources wait for, and the waiting for a restored one."""
        for channel in self._channels:
            channel.source.interrupt()
        with self._changed:
            self._changed.notify_all()

    def close(self) -> None:
        """The sources are the caller's."""


class _Channel:
    """One source. Its threads share a part of the feed, a new one each time that it begins."""

    def __init__(self, number: int, source: PageSource, changed: threading.Condition) -> None:
        self.number = number
        self.source = source
        self.lost: Exception | None = None
        self._losses = 0
        self._changed = changed  # of all channels; its lock is that of what follows
        self._part: _Part | None = None
        self._inside = self._parked = 0
        self._counted = (0, 0, 0, 0)  # by the parts of earlier beginnings

    def enter(self, feed: Feed) -> _Part:
        """For each thread when the server begins, or begins again. The first finds nothing lost."""
        with self._changed:
            self._inside += 1
            if self._inside == 1:
                self._begin(feed)
            assert self._part is not None
            return self._part

    def _begin(self, feed: Feed) -> None:
        self._retire()
        self.lost = None
        self._part = _Part(feed)

    def _retire(self) -> None:
        if self._part is not None:
            self._counted = self._counts()
            self._part.close()
            self._part = None

    def leave(self) -> None:
        """The last thread puts the light out."""
        with self._changed:
            self._inside -= 1
            if not self._inside:
                self._retire()
            self._changed.notify_all()

    def outcome(self, part: _Part, own: int) -> Exception:
        """Runs the source on a thread of its until it ends; why it did."""
        try:
            if not part.ended:
                self.source.run(part, own)
        except Exception as error:  # also a mistake in a source of the caller's: the other channels go on
            return error
        return SourceLost(f"the source's thread {own} has ended before it was asked to")

    def lose(self, part: _Part, reason: Exception) -> bool:
        """Ends the other threads of the source; whether nobody has done so before."""
        with self._changed:
            if self.lost is not None:
                return False
            self.lost = reason
            self._losses += 1
        part.end()
        self.source.interrupt()
        return True

    def parked(self, part: _Part) -> _Part | None:
        """Waits until the channel is restored, and returns its new part of the feed; None at the end of the server."""
        with self._changed:
            self._parked += 1
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._part is not part or part.whole.ended)
            self._parked -= 1
            return None if part.whole.ended else self._part

    def restore(self, source: PageSource | None) -> None:
        """See ``Channels.restore``."""
        if source is not None and source.threads != self.source.threads:
            threads = f"{source.threads} threads cannot take the place of one of {self.source.threads}"
            raise ValueError(f"channel {self.number}: a source of {threads}")
        with self._changed:
            part = self._part
            self._changed.wait_for(lambda: self.lost is None or self._parked == self._inside)
            if self.lost is None or not self._inside or part is None or part.whole.ended:
                raise ValueError(f"channel {self.number} is not lost, or the server has lost all or was closed")
            self.source = source or self.source
            self._begin(part.whole)
            self._changed.notify_all()

    def _counts(self) -> tuple[int, int, int, int]:
        now = self._part.counts() if self._part is not None else (0, 0, 0, 0)
        asked, demanded, brought, placed = (before + since for before, since in zip(self._counted, now, strict=True))
        return asked, demanded, brought, placed

    def stats(self) -> ChannelStats:
        with self._changed:
            return ChannelStats(*self._counts(), self._losses, self.lost)


class _Part:
    """The feed as one source sees it, which may end before the others'. Owns an eventfd, readable from then on."""

    def __init__(self, whole: Feed) -> None:
        self.whole = whole
        self._lock = threading.Lock()
        self._asked = self._demanded = self._brought = self._placed = 0
        self._over = False
        self._end = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def next(self, *, background: bool = True, most: int = 1 << 18, until: int = -1) -> Ask | None:
        """As of the whole; ``until`` is this one's own."""
        if self._over or (ask := self.whole.next(background=background, most=most, until=self._end)) is None:
            return None
        with self._lock:
            self._asked += 1
            self._demanded += ask.demanded
        return ask

    @property
    def ended(self) -> bool:
        """Whether this source has to end."""
        return self._over or self.whole.ended

    def end(self) -> None:
        """Ends ``next`` for this source's threads and no others."""
        self._over = True
        os.eventfd_write(self._end, 1)

    def ask_again(self) -> None:
        """As of the whole."""
        self.whole.ask_again()

    def place(self, guest: int, data: bytes | bytearray | memoryview | int) -> int:
        """As of the whole, and counted."""
        placed = self.whole.place(guest, data)
        with self._lock:
            self._brought += data if isinstance(data, int) else len(data)
            self._placed += placed
        return placed

    def lose(self, guest: int, length: int) -> None:
        """As of the whole: who has the pages is the same for all channels."""
        self.whole.lose(guest, length)

    def counts(self) -> tuple[int, int, int, int]:
        """The first four of ``ChannelStats``."""
        with self._lock:
            return self._asked, self._demanded, self._brought, self._placed

    def close(self) -> None:
        """No thread may be inside."""
        os.close(self._end)
