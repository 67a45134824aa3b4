"""What can be seen of a back-end while its machine is in postcopy, from outside and from its own counters."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vhostuser.measures import REQUESTS
from vhostuser.metrics import value_in
from vhostuser.tools.lab.backend import BackendProcess
from vhostuser.tools.lab.machine import Machine
from vhostuser.tools.lab.maps import place_of
from vhostuser.tools.lab.migration import Migration, Span
from vhostuser.tools.lab.trace import Base, bases, count_faults

INTERVAL = 0.1


@dataclass(frozen=True)
class Sample:
    """The back-end's counters at one time, in seconds since the epoch."""

    time: float
    state: dict[str, Any]

    @property
    def completed(self) -> int:
        """Requests that were answered up to then."""
        return int(value_in(self.state["metrics"], REQUESTS, queue=0))


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


async def observe_postcopy(
    migration: Migration, backend: BackendProcess, *, faults: int = 0, requests: int = 0, patience: float = 20
) -> Observation:
    """Watch the destination's ``backend`` from now, in postcopy, until the migration has completed.

    Pages come slowly until QEMU has served so many ``faults`` of the back-end and it has completed so many
    ``requests``, or ``patience`` seconds have gone by.
    """
    seen = Observation()
    completed = asyncio.create_task(migration.completed())
    deadline = time.time() + patience
    held = True
    try:
        while not completed.done():
            await _look(seen, migration, backend)
            if held and (time.time() > deadline or (seen.faults >= faults and seen.requests >= requests)):
                await migration.release()
                held = False
            await asyncio.wait((completed,), timeout=INTERVAL)
        await completed
    finally:
        completed.cancel()
    seen.span = await migration.postcopy_span()
    seen.faults = count_faults(migration.destination.trace(), seen.span.begin, seen.span.end)
    seen.samples = [sample for sample in seen.samples if sample.time < seen.span.end]
    return seen


async def _look(seen: Observation, migration: Migration, backend: BackendProcess) -> None:
    seen.samples.append(Sample(time.time(), await backend.state()))
    seen.check_bases(migration.destination, backend)
    seen.faults = count_faults(migration.destination.trace())


def waiting_threads(pid: int) -> int:
    """How many threads of the process wait in the kernel for a page of a userfaultfd."""
    return sum(_wait_channel(task) == "handle_userfault" for task in Path(f"/proc/{pid}/task").iterdir())


def _wait_channel(task: Path) -> str:
    try:
        return (task / "wchan").read_text()
    except (FileNotFoundError, ProcessLookupError):  # the thread has ended meanwhile
        return ""
