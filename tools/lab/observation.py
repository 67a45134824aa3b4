"""What can be seen of a back-end while its machine is in postcopy, from outside and from its own counters."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vhostuser.tools.lab.backend import BackendProcess
from vhostuser.tools.lab.machine import Machine
from vhostuser.tools.lab.maps import place_of
from vhostuser.tools.lab.migration import Migration, Span
from vhostuser.tools.lab.trace import Base, bases, faults

INTERVAL = 0.1


@dataclass(frozen=True)
class Sample:
    """The back-end's counters at one time, in seconds since the epoch."""

    time: float
    state: dict[str, Any]

    @property
    def completed(self) -> int:
        """Requests that were answered up to then."""
        return int(self.state["device"]["counters"].get("completed", 0))


@dataclass
class Observation:
    """What was seen between the source's postcopy-active and its completed."""

    span: Span = field(default=Span(0, 0))
    #: Of the back-end, taken up by QEMU in that time.
    faults: int = 0
    #: Of the back-end's own counters, in that time.
    samples: list[Sample] = field(default_factory=list)
    #: Every base in QEMU's trace, and those of them that are not the same byte of the same file in both processes.
    bases: set[Base] = field(default_factory=set)
    wrong_bases: set[Base] = field(default_factory=set)

    @property
    def requests(self) -> int:
        """How many the back-end completed between the first and the last look at it."""
        return self.samples[-1].completed - self.samples[0].completed if self.samples else 0

    def check_bases(self, machine: Machine, backend: BackendProcess) -> None:
        """Compare the bases that have been traced so far with what both processes have mapped now."""
        for base in set(bases(machine.trace())) - self.bases:
            self.bases.add(base)
            place = place_of(backend.pid, base.client)
            if place is None or place != place_of(machine.pid, base.hva):
                self.wrong_bases.add(base)


async def observe_postcopy(migration: Migration, backend: BackendProcess, within: float = 120) -> Observation:
    """Watch the destination's ``backend`` from now, in postcopy, until the migration has completed."""
    seen = Observation()
    over = asyncio.create_task(migration.completed(within))
    try:
        while not over.done():
            seen.samples.append(Sample(time.time(), await backend.state()))
            seen.check_bases(migration.destination, backend)
            await asyncio.wait((over,), timeout=INTERVAL)
        await over
    finally:
        over.cancel()
    seen.span = await migration.postcopy_span()
    seen.faults = faults(migration.destination.trace(), seen.span.begin, seen.span.end)
    seen.samples = [sample for sample in seen.samples if sample.time < seen.span.end]
    return seen


def waiting_threads(pid: int) -> int:
    """How many threads of the process wait in the kernel for a page of a userfaultfd."""
    return sum(_wait_channel(task) == "handle_userfault" for task in Path(f"/proc/{pid}/task").iterdir())


def _wait_channel(task: Path) -> str:
    try:
        return (task / "wchan").read_text()
    except FileNotFoundError:  # the thread has ended meanwhile
        return ""
