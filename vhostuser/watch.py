"""How long the messages of one front-end take to answer.

What belongs here: timing and counting them, and telling while one takes long. What does not: why it does, which
``lifecycle`` and ``connection`` know.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator

from vhostuser import measures
from vhostuser.metrics import Distribution, Sample

log = logging.getLogger("vhostuser")

LONG = 1.0
"""A message that takes longer is told, in seconds: then again each time it has taken twice as long."""


class MessageWatch:
    """Times the answers on one connection. Control thread only.

    ``waits_for`` says in a few words what the message that is being answered waits for.
    """

    def __init__(self, name: str, waits_for: Callable[[], str]) -> None:
        self._name = name
        self._waits_for = waits_for
        self._histograms: dict[str, Counter[int]] = {}
        self._sums: Counter[str] = Counter()
        self._longest: Counter[str] = Counter()
        self._refused: Counter[str] = Counter()
        self._cut_off: Counter[str] = Counter()
        self._begun = 0

    @contextlib.contextmanager
    def answering(self, message: str, ring: int | None = None) -> Iterator[None]:
        """Around the answer to one message, which may be about a ring."""
        what = message if ring is None else f"{message} of ring {ring}"
        self._begun = time.monotonic_ns()
        loop = asyncio.get_running_loop()
        warning = [loop.call_later(LONG, lambda: warn(LONG))]

        def warn(after: float) -> None:
            warning[0] = loop.call_later(after, lambda: warn(2 * after))
            seconds = (time.monotonic_ns() - self._begun) / 1e9
            log.warning(
                "%s: %s takes long (%.0f s so far): it waits for %s", self._name, what, seconds, self._waits_for()
            )

        try:
            yield
        finally:
            warning[0].cancel()
            took = time.monotonic_ns() - self._begun
            self._begun = 0
            self._count(message, took)
            if took > LONG * 1e9:
                log.warning("%s: %s took %.1f s", self._name, what, took / 1e9)

    def refused(self, message: str) -> None:
        """Counts one that is answered by a refusal."""
        self._refused[message] += 1

    def cut_off(self, reason: str) -> None:
        """Counts the end of the connection, if it is we who end it."""
        self._cut_off[reason] += 1

    def _count(self, message: str, nanoseconds: int) -> None:
        bucket = max(0, (nanoseconds // 1000).bit_length() - 1)
        self._histograms.setdefault(message, Counter())[bucket] += 1
        self._sums[message] += nanoseconds
        self._longest[message] = max(self._longest[message], nanoseconds)

    def measure(self) -> Iterator[Sample]:
        """Samples, one a message that has come."""
        for message, histogram in self._histograms.items():
            counts = [histogram[bucket] for bucket in range(max(histogram) + 1)]
            yield measures.MESSAGES.sample(Distribution.of(counts, self._sums[message]), message=message)
            yield measures.LONGEST.sample(self._longest[message] / 1e9, message=message)
        for message, count in self._refused.items():
            yield measures.REFUSED.sample(count, message=message)
        for reason, count in self._cut_off.items():
            yield measures.CUT_OFF.sample(count, reason=reason)
        waiting = (time.monotonic_ns() - self._begun) / 1e9 if self._begun else 0
        yield measures.WAITING.sample(waiting)
