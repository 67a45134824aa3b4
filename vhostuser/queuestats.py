"""What a queue counts.

What belongs here: the numbers of one queue, and how those of a ring's queues add up. What does not: counting (in C),
what they are called outside (``measures``).
"""

from __future__ import annotations

from dataclasses import dataclass
from operator import add


@dataclass(frozen=True, slots=True)
class QueueStats:
    """What a queue has done so far; see ``struct vu_queue_stats``. Those of one ring's queues can be added up."""

    returned: int = 0
    readable: int = 0
    written: int = 0
    batches: int = 0
    kicks: int = 0
    calls: int = 0
    served_ns: int = 0
    histogram: tuple[int, ...] = (0,) * 32
    out: int = 0
    oldest: int = 0
    """When the oldest request that is out was popped, in nanoseconds of ``time.monotonic_ns``; 0: none is."""

    def __add__(self, later: QueueStats) -> QueueStats:
        return QueueStats(
            self.returned + later.returned,
            self.readable + later.readable,
            self.written + later.written,
            self.batches + later.batches,
            self.kicks + later.kicks,
            self.calls + later.calls,
            self.served_ns + later.served_ns,
            tuple(map(add, self.histogram, later.histogram)),
            later.out,
            later.oldest,
        )
