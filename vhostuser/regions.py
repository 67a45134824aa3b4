"""The guest memory of one connection: what is mapped, what may be touched, and what postcopy makes of it.

What belongs here: mapping and releasing regions in the order that postcopy asks for, and memory that a lost front-end
left with holes. What does not: halting rings around a change (``lifecycle``), the userfaultfd (``postcopy``), which
message is allowed when (``protocol``).

Control thread only; nothing here touches guest memory.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Iterable, Iterator

from vhostuser import measures
from vhostuser.channel import Fds
from vhostuser.memory import GuestMemory, MemoryLost, Region
from vhostuser.metrics import Sample
from vhostuser.postcopy import Postcopy
from vhostuser.protocol import MemoryRegion, RequestRefused, Wake, WakeAck, WakeStatus
from vhostuser.record import MemoryRecord
from vhostuser.uffd import TouchPool

log = logging.getLogger("vhostuser")

# How often memory that a lost front-end left with holes is looked at again, in seconds.
_HOLES_AGAIN = 0.25


class Regions:
    """Owns the mappings. ``postcopy``: None where PAGEFAULT is not offered. ``record``: of memory with holes, or None.

    ``whole`` is called when the last hole has been filled and rings may start.
    """

    def __init__(
        self, name: str, postcopy: Postcopy | None, record: MemoryRecord | None, whole: Callable[[], None]
    ) -> None:
        self._name = name
        self._postcopy = postcopy
        self._record = record
        self._whole = whole
        self.memory = GuestMemory()
        """What rings are opened on; changed by ``adopt`` only."""
        self._unregistered: list[Region] = []
        self._holes: dict[Region, int] = {}
        self._look_again: asyncio.TimerHandle | None = None

    @property
    def usable(self) -> bool:
        """Whether rings may touch the memory: not while recorded memory has holes."""
        return not self._holes

    # ---- the table

    def map(self, descriptions: Iterable[MemoryRegion], fds: Fds, *, listening: bool) -> tuple[Region, ...]:
        """Maps what is not mapped already; in postcopy (``listening``) out of reach until it is acknowledged.

        Nothing is changed yet: a region that is not adopted goes with its last reference. Raises RequestRefused.
        """
        return tuple(
            self.memory.same(description, fd) or Region.map(fd, description, at_user=listening, hidden=listening)
            for description, fd in zip(descriptions, fds, strict=True)
        )

    def release(self, memory: GuestMemory) -> None:
        """In postcopy, before rings are halted for ``memory``: nobody must go on waiting in a region that goes."""
        if self._postcopy is None or not self._postcopy.active:
            return
        for region in self.memory.regions:
            if region not in memory.regions and region not in self._unregistered:
                self._postcopy.release(region)

    def adopt(self, memory: GuestMemory, arrived: Iterable[tuple[Region, int]], *, listening: bool) -> None:
        """Makes ``memory`` what there is. ``arrived``: regions that came with this message, and their descriptors."""
        new = [region for region in memory.regions if region not in self.memory.regions]
        self.memory = memory
        self._unregistered = [region for region in self._unregistered if region in memory.regions]
        if listening:
            self._unregistered += new
        for region in new:
            if listening and region.host != region.user:
                log.warning("%s: %s: the front-end's own address is taken", self._name, region)
        self._remember(arrived, listening=listening)

    def based(self, description: MemoryRegion) -> MemoryRegion:
        """The description with our address in place of the front-end's."""
        host = self.memory.find(description.guest, description.size, description.user).host
        return MemoryRegion(description.guest, description.size, host, description.offset)

    def measure(self) -> Iterator[Sample]:
        """Samples of what is mapped."""
        yield measures.REGIONS.sample(len(self.memory.regions))
        yield measures.MEMORY.sample(sum(region.size for region in self.memory.regions))
        yield measures.UNUSABLE.sample(int(not self.usable))
        yield measures.ACTIVE.sample(int(self._postcopy is not None and self._postcopy.active))

    def close(self) -> None:
        """Drops everything; the rings must have been closed."""
        self._forget_holes(list(self._holes))
        self._unregistered = []
        self.memory = GuestMemory()

    # ---- postcopy

    @property
    def touch(self) -> TouchPool | None:
        """What brings missing pages to a ring that is opened now; None when none are missing."""
        return self._postcopy.touch_pool() if self._postcopy is not None and self._postcopy.active else None

    def advise(self) -> int:
        """A duplicate of our userfaultfd, the caller's. Raises RequestRefused."""
        return os.dup(self._half().advise())

    def listen(self) -> None:
        """From here memory has holes. Raises RequestRefused."""
        self._half().listen()

    def acknowledged(self) -> None:
        """The front-end knows where new regions are. QEMU says so again when a guest reboots, with nothing new."""
        self._half().register(self._unregistered)
        self._unregistered = []

    def wake(self, wake: Wake) -> WakeAck:
        """What the wake channel asks for: whoever waits looks again; outside of postcopy nobody does."""
        if self._postcopy is None or not self._postcopy.active:
            return WakeAck(wake.id, 0, WakeStatus.NO_POSTCOPY)
        return WakeAck(wake.id, self._postcopy.wake(self.memory, wake.ranges))

    def end(self) -> None:
        """No page is missing any more. Wakes whoever still waits, so it comes before anything waits for them.

        QEMU tells a back-end that was restarted in postcopy too, which therefore knows of no postcopy of its own.
        """
        if self._postcopy is not None:
            self._postcopy.end(self.memory)
        for region in self._unregistered:
            region.reveal()
        self._unregistered = []
        if self._record is not None:
            self._record.forget()
            if self._holes:
                self._look(self._record)

    def revoke(self) -> None:
        """The front-end is lost: nobody will bring missing pages, so nobody touches the memory again.

        The record stays: the next front-end may bring the same memory.
        """
        if self._postcopy is None:
            return
        if self._postcopy.active:
            log.error("%s: the front-end was lost in postcopy: guest memory is given up", self._name)
        try:
            self._postcopy.revoke(self.memory)
        except (OSError, MemoryLost) as error:
            log.error("%s: guest memory cannot be given up, its threads go on waiting: %s", self._name, error)

    def _half(self) -> Postcopy:
        if self._postcopy is None:
            raise RequestRefused("PAGEFAULT was not offered")
        return self._postcopy

    # ---- memory that was left with holes

    def _remember(self, arrived: Iterable[tuple[Region, int]], *, listening: bool) -> None:
        """In postcopy: records the memory. Outside: memory so recorded is left alone until it has no holes."""
        record = self._record
        if record is None:
            return
        self._forget_holes([region for region in self._holes if region not in self.memory.regions])
        if listening:
            record.add(fd for _, fd in arrived)
            return
        for region, fd in arrived:
            if region not in self._holes and record.holds(fd):
                self._holes[region] = os.dup(fd)
        if self._holes and self._look_again is None:
            log.warning(
                "%s: rings wait: a postcopy migration into this memory is under way and pages are missing "
                "(if it is over, remove %s)",
                self._name,
                record.path,
            )
            self._look_later(record)

    def _look_later(self, record: MemoryRecord) -> None:
        self._look_again = asyncio.get_running_loop().call_later(_HOLES_AGAIN, self._look, record)

    def _look(self, record: MemoryRecord) -> None:
        self._forget_holes([region for region, fd in self._holes.items() if not record.holds(fd)])
        if self._holes:
            self._look_later(record)
        else:
            log.warning("%s: the memory is whole, rings may start", self._name)
            self._whole()

    def _forget_holes(self, regions: list[Region]) -> None:
        for region in regions:
            os.close(self._holes.pop(region))
        if not self._holes and self._look_again is not None:
            self._look_again.cancel()
            self._look_again = None
