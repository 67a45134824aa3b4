"""On which of the broken peers the whole suite is tried, and not only the cases that must fail.

All of them take hours. ``VHOSTUSER_BROKEN=all`` asks for them; ``VHOSTUSER_BROKEN=8`` for eight, others every day, so
that all have had their turn after a while.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable

MOST = 15
"""Cases that may fail on one of them; with more it would prove little about any."""
_DAY = 86400


def whole(names: Iterable[str], asked: str | None = None, day: int | None = None) -> frozenset[str]:
    """Those of the names. asked: what the variable says; day: since 1970."""
    every = sorted(names)
    asked = os.environ.get("VHOSTUSER_BROKEN", "0") if asked is None else asked
    day = int(time.time()) // _DAY if day is None else day
    count = len(every) if asked == "all" else min(int(asked), len(every))
    return frozenset(every[(day * count + turn) % len(every)] for turn in range(count))
