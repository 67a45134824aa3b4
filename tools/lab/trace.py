"""QEMU's own account, by its trace events, of the faults that it served for a back-end during postcopy.

The lines are those of QEMU's ``log`` trace back-end under ``-msg timestamp=on``: ``PID@SECONDS:EVENT ARGUMENTS``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

FAULT = "vhost_user_postcopy_fault_handler"
BASE = "vhost_user_set_mem_table_postcopy"
# Not the waker's event: QEMU wakes once for each page that it places, 80,000 times in a small migration.
EVENTS = (FAULT, BASE)

_LINE = re.compile(r"(?:\d+@)?(\d+\.\d+):(\w+) (.*)")
_BASE = re.compile(r"client:(0x[0-9a-f]+) for hva: (0x[0-9a-f]+)")


@dataclass(frozen=True)
class TraceLine:
    """One event; ``time`` is in seconds since the epoch."""

    time: float
    event: str
    arguments: str


@dataclass(frozen=True)
class Base:
    """Where the back-end said that it has what QEMU has at ``hva``."""

    client: int
    hva: int


def read_trace(path: Path) -> list[TraceLine]:
    """The events in QEMU's log, in order; other lines are left out."""
    found = (_LINE.match(line) for line in path.read_text(errors="replace").splitlines())
    return [TraceLine(float(match[1]), match[2], match[3]) for match in found if match]


def bases(trace: list[TraceLine]) -> list[Base]:
    """The bases that the back-end answered its memory table with."""
    found = (_BASE.match(line.arguments) for line in trace if line.event == BASE)
    return [Base(int(match[1], 16), int(match[2], 16)) for match in found if match]


def count_faults(trace: list[TraceLine], begin: float = 0, end: float = float("inf")) -> int:
    """How many faults of the back-end QEMU took up from ``begin`` to ``end``, in seconds since the epoch."""
    return sum(line.event == FAULT and begin <= line.time <= end for line in trace)
