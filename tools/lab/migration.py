"""Live migration between two machines of one bench: precopy, the switch to postcopy, pause and recovery."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vhostuser.tools.lab.errors import LabError
from vhostuser.tools.lab.guest import Guest
from vhostuser.tools.lab.machine import Event, Machine, event_time
from vhostuser.tools.lab.memory import GuestMemory

#: A first pass that postcopy is to interrupt has moved this many bytes by then.
FIRST_PASS = 4 << 20

UNLIMITED = 1 << 40

#: Bytes per second at which next to nothing is sent. QEMU limits each tenth of a second, and takes 0 for no limit.
CRAWL = 4096


@dataclass(frozen=True)
class Pace:
    """Bytes per second before and after the switch to postcopy, for a guest under TCG.

    Without limits the background transfer would outrun it, and no back-end would ever wait for a page. QEMU spends a
    tenth of a second's worth at the beginning of it; a request that comes later waits for the next. So the guest, which
    asks for page after page, comes slowly too: seconds go by before it uses the disk. What is missing in small pages
    (12 to 28 MB) has to last longer than that, on a busy machine as well.
    """

    precopy: int
    postcopy: int


SMALL_PAGES = Pace(100_000_000, 2_000_000)
HUGE_PAGES = Pace(20_000_000, CRAWL)


@dataclass(frozen=True)
class Span:
    """From one moment to another, in seconds since the epoch."""

    begin: float
    end: float

    @property
    def seconds(self) -> float:
        """How long it lasted."""
        return self.end - self.begin


class Migration:
    """One migration from ``source`` to ``destination``, which waits for it.

    With ``postcopy`` it is ``switch`` that ends precopy, and all is slow until ``release``; without, ``bandwidth`` is
    the limit, in bytes per second. ``capabilities`` are QEMU's.
    """

    _numbers = itertools.count(1)

    def __init__(
        self,
        source: Machine,
        destination: Machine,
        guest: Guest,
        directory: Path,
        *,
        postcopy: bool = False,
        capabilities: Sequence[str] = (),
        bandwidth: int = UNLIMITED,
    ) -> None:
        self.source = source
        self.destination = destination
        self._guest = guest
        self._directory = directory
        self._capabilities = ("events", *(["postcopy-ram"] if postcopy else []), *capabilities)
        pace = HUGE_PAGES if source.hardware.hugepages else SMALL_PAGES
        self._bandwidth = pace.precopy if postcopy else bandwidth
        self._parameters: dict[str, Any] = {"max_postcopy_bandwidth": pace.postcopy}
        if postcopy:
            # ms: a guest that works never comes down to that by itself. With 0 QEMU would not look for what it has
            # dirtied, and end after the first pass.
            self._parameters["downtime_limit"] = 1

    async def start(self) -> None:
        """Set both sides up and start; returns when the source has begun to send."""
        switched_on = [{"capability": name, "state": True} for name in self._capabilities]
        for machine in (self.source, self.destination):
            await machine.execute("migrate-set-capabilities", capabilities=switched_on)
        careful = self.source.hardware.loses_writes
        await self.source.execute(
            "migrate-set-parameters",
            max_bandwidth=CRAWL if careful else self._bandwidth,
            **self._parameters,
        )
        uri = self._uri()
        await self.destination.execute("migrate-incoming", uri=uri)
        await self.source.execute("migrate", uri=uri)
        await self.source_status("active")
        if careful:
            # The first look at the dirty bits was the set-up's. While next to nothing is sent, the TLBs are made new.
            await self._guest.flush_tlbs(self.source.hardware.cpus)
            await self._limit(self._bandwidth)

    async def hold(self, remaining: int) -> None:
        """Let the first pass all but stand still as soon as no more than ``remaining`` bytes of it are left."""
        while (await self.progress())["ram"]["remaining"] > remaining:  # noqa: ASYNC110 - no event tells
            await asyncio.sleep(0.05)
        await self._limit(CRAWL)

    async def release(self) -> None:
        """Go on after ``hold`` or ``switch``, as fast as can be."""
        await self.source.execute(
            "migrate-set-parameters", max_bandwidth=UNLIMITED, max_postcopy_bandwidth=0, downtime_limit=300
        )

    async def switch(self) -> None:
        """Start postcopy; returns when the guest runs at the destination.

        All memory has been sent once by then, so that what is missing is what the guest and the back-end have just
        used. Where QEMU loses writes this would lose them for good, so there most memory is still to be sent.
        """
        await self._in_first_pass()
        if self.source.hardware.loses_writes:
            await self._require_first_pass()
        else:
            await self._hold_received()
            await self.source.event("MIGRATION_PASS", **{"pass": 2})
        await self.source.execute("migrate-start-postcopy")
        await self.source_status("postcopy-active")
        await self.destination.event("RESUME")

    async def _hold_received(self) -> None:
        """Have the kernel keep what the destination receives: QEMU takes it for there, and never asks for it again.

        A page of zeros is received by a look at it, which leaves it clean. Were it reclaimed, the guest would stand
        still as soon as it touches it, until the migration ends. QEMU empties all memory before the first page comes,
        and again at the switch what has to come once more. Nothing but the pages in between is to be held.
        """
        with GuestMemory(self.destination.pid) as memory:
            await asyncio.to_thread(memory.hold)

    async def _in_first_pass(self) -> None:
        while (await self.progress())["ram"]["transferred"] < FIRST_PASS:  # noqa: ASYNC110 - no event tells
            await asyncio.sleep(0.05)

    async def _require_first_pass(self) -> None:
        if (passes := (await self.progress())["ram"]["dirty-sync-count"]) > 1:
            raise LabError(f"postcopy would start in pass {passes}, when QEMU has lost writes: use a lower bandwidth")

    async def pause(self) -> None:
        """Break the migration's connection in postcopy; returns when both sides say postcopy-paused."""
        seen = [len(machine.events.entries) for machine in (self.source, self.destination)]
        await self.source.execute("migrate-pause", oob=True)
        for machine, start in zip((self.source, self.destination), seen, strict=True):
            await machine.event("MIGRATION", start=start, status="postcopy-paused")

    async def recover(self) -> None:
        """Connect again after ``pause``; returns when postcopy goes on."""
        seen = len(self.source.events.entries)
        uri = self._uri()
        await self.destination.execute("migrate-recover", oob=True, uri=uri)
        await self.source.execute("migrate", uri=uri, resume=True)
        await self.source.event("MIGRATION", start=seen, status="postcopy-active")

    async def completed(self, within: float = 120) -> None:
        """Wait until both sides say completed; ``LabError`` if either fails or takes longer."""
        await self.source_status("completed", within)
        await self.destination_status("completed", within)

    async def progress(self) -> dict[str, Any]:
        """The source's answer to query-migrate."""
        answer: dict[str, Any] = await self.source.execute("query-migrate")
        return answer

    async def source_status(self, status: str, within: float = 60) -> Event:
        """The source's first event that says ``status``."""
        return await self._status(self.source, status, within)

    async def destination_status(self, status: str, within: float = 60) -> Event:
        """The destination's first event that says ``status``."""
        return await self._status(self.destination, status, within)

    async def postcopy_span(self) -> Span:
        """From the source's postcopy-active to its completed, in its own words: call it when that is over."""
        begin = await self.source_status("postcopy-active", 1)
        end = await self.source_status("completed", 1)
        return Span(event_time(begin), event_time(end))

    async def _limit(self, bandwidth: int) -> None:
        await self.source.execute("migrate-set-parameters", max_bandwidth=bandwidth)

    @staticmethod
    async def _status(machine: Machine, status: str, within: float) -> Event:
        final = {status, "failed", "cancelled"}
        event = await machine.events.find(
            lambda event: event["event"] == "MIGRATION" and event["data"]["status"] in final,
            f"migration status {status}",
            within=within,
        )
        if event["data"]["status"] != status:
            raise LabError(f"{machine.name}: migration {event['data']['status']} while we waited for {status}")
        return event

    def _uri(self) -> str:
        return f"unix:{self._directory}/migration.{next(self._numbers)}"
