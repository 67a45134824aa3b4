"""One run: a migration from its first message to the last comparison, and what was seen of it.

What belongs here: the order of things. What does not: what they are done with (``bench``), what is said
(``handshake``), when patience ends (``watch``), what it all means (``rules``).
"""

from __future__ import annotations

import asyncio
import time

from vhostuser.tools.postcopy.bench import Bench
from vhostuser.tools.postcopy.guest import GuestError
from vhostuser.tools.postcopy.handshake import Conversation, StepFailed
from vhostuser.tools.postcopy.options import MIB, Flow, Options, Order, Wake
from vhostuser.tools.postcopy.pages import PagesError
from vhostuser.tools.postcopy.plan import Area, PlanError
from vhostuser.tools.postcopy.progress import Progress
from vhostuser.tools.postcopy.record import Outcome, Probe, Record, Sighting
from vhostuser.tools.postcopy.report import Result
from vhostuser.tools.postcopy.rules import BEFORE_ACK, BEFORE_RINGS, RINGS, judge
from vhostuser.tools.postcopy.subject import SubjectError
from vhostuser.tools.postcopy.truth import disk_differences, memory_differences
from vhostuser.tools.postcopy.watch import Watch

_SETTLE = 0.03
"""Seconds in which a back-end that touches what it must not has done so."""
_READ_BACK = 64
"""Requests that are read back when postcopy is over, of each back-end."""
_PIECE = 8 * MIB


class RunError(Exception):
    """The run cannot begin: one line."""


async def perform(options: Options, flow: Flow, wake: Wake, progress: Progress) -> Result:
    """One run. Raises RunError."""
    record = Record(label=f"{flow}, {wake}", by_channel=wake is Wake.CHANNEL)
    progress.phase(f"{record.label}: guest memory and disks are filled")
    try:
        async with Bench(options, wake, record) as bench:
            await Run(bench, flow, progress).go()
    except (PlanError, GuestError, SubjectError, PagesError) as error:
        raise RunError(str(error)) from None
    return Result(_settings(options, flow, wake), record, judge(record))


def _settings(options: Options, flow: Flow, wake: Wake) -> dict[str, object]:
    page = "2 MiB" if options.page_size > 4096 else "4 KiB"
    files = "one file" if options.one_file else "a file each"
    kind = "indirect" if options.indirect else "direct"
    speed = f"{options.bandwidth // MIB} MiB/s" if options.bandwidth else "no limit"
    lines = f"{options.streams} x " if options.streams > 1 else ""
    return {
        "back-end": f"{options.clients} x {options.command or ', '.join(map(str, options.sockets))}",
        "memory": f"{options.memory // MIB} MiB in {options.regions} regions of {page} pages, {files}",
        "flow": {Flow.TABLE: "SET_MEM_TABLE", Flow.REGIONS: "ADD_MEM_REG"}[flow],
        "source": f"{lines}{speed}, {options.latency * 1e6:g} us, {options.zeros} % zeros",
        "order": f"{options.order}, {options.withhold} % only on demand",
        "placement": f"{options.placement}, wake {wake}",
        "load": f"{options.depth} requests in flight, {kind} descriptors, seed {options.seed}",
    }


class Run:
    """The steps of one run; what it leaves is in the bench's record."""

    def __init__(self, bench: Bench, flow: Flow, progress: Progress) -> None:
        self._bench = bench
        self._record = bench.record
        self._by_slots = flow is Flow.REGIONS
        self._progress = progress
        self._watch = Watch(bench, progress)

    async def go(self) -> None:
        """All of it, as far as the back-end lets it."""
        try:
            await self._handshake()
            await self._start_rings()
            await self._migrate()
            await self._end()
        except StepFailed:
            self._finish()
            return
        await self._read_back()
        self._finish()
        await asyncio.to_thread(self._compare)

    # ---- the handshake

    async def _handshake(self) -> None:
        self._progress.phase("handshake")
        conversations = self._bench.conversations
        for each in conversations:
            await each.negotiate(by_slots=self._by_slots, indirect=self._bench.options.indirect)
            await each.advise()
        for each in conversations:
            await each.listen()
        for each in conversations:
            await self._share(each)
        await self._look(BEFORE_ACK)
        for each in conversations:
            await each.acknowledge()
        await self._look(BEFORE_RINGS)

    async def _share(self, each: Conversation) -> None:
        try:
            await each.share(self._bench.guest.memory, by_slots=self._by_slots)
        except StepFailed:
            # It may be silent because it has touched the memory, and waits.
            waiting = tuple((each.index, fault.address) for fault in each.faults())
            self._record.sightings.append(Sighting(BEFORE_ACK, waiting, self._bench.guest.present))
            raise
        if any(base.client == each.index and base.right is False for base in self._record.bases):
            raise StepFailed
        self._bench.pages.add_client(each.subject.name, each.client, each.subject.place.wake)

    async def _look(self, moment: str) -> None:
        """Nobody has a reason to touch anything yet."""
        pages = self._bench.pages
        for each in self._bench.conversations:
            await each.probe(waiting=pages.waiting(each.index))
        await asyncio.sleep(_SETTLE)
        faults = tuple((event.client, event.guest) for event in pages.faults() if event.client is not None)
        seen = Sighting(moment, faults, self._bench.guest.present)
        self._record.sightings.append(seen)
        if moment == BEFORE_ACK and (seen.faults or seen.present):
            raise StepFailed

    # ---- the migration

    async def _start_rings(self) -> None:
        self._progress.phase("no page comes until every back-end has asked for one")
        bench = self._bench
        for each, load in zip(bench.conversations, bench.loads, strict=True):
            load.hand_over()
            try:
                await each.start_ring(load.ring, bench.guest.memory)
            except StepFailed:
                self._note_blocked(each)
                raise
        self._record.began = time.monotonic_ns()
        until = self._record.began + int(bench.options.duration * 1e9)
        for load in bench.loads:
            load.start(repeat_until=until)
        await self._watch.first_faults()

    def _note_blocked(self, each: Conversation) -> None:
        """Where a fault waits, silence about the rings is the fault's doing."""
        step = self._record.step(each.index, RINGS)
        if step and step.outcome is Outcome.SILENT and self._bench.pages.waiting(each.index):
            self._record.probes.append(Probe(each.index, time.monotonic_ns(), True, None))

    async def _migrate(self) -> None:
        self._progress.phase("pages come")
        bench, record = self._bench, self._record
        record.released = time.monotonic_ns()
        bench.pages.release()
        await self._watch.until(lambda: all(load.ended for load in bench.loads))
        record.ended = time.monotonic_ns()
        if bench.options.order is not Order.NONE:
            by_themselves = list(bench.plan.all_pages_but(bench.plan.on_demand))
            await self._watch.until(lambda: not bench.pages.missing(by_themselves))
        record.rest = time.monotonic_ns()

    async def _end(self) -> None:
        """Brings everything but the canaries; then whoever has filled one is found out, and they come too."""
        self._progress.phase("the rest comes")
        canaries, pages = self._bench.plan.canaries, self._bench.pages
        pages.bring(self._bench.plan.all_pages_but(canaries))
        await self._watch.until(lambda: pages.received >= pages.total - len(canaries))
        self._record.canaries_present = max(0, self._bench.guest.present - pages.received)
        pages.bring(canaries)
        await self._watch.until(lambda: pages.received == pages.total)
        for each in self._bench.conversations:
            await each.end()

    async def _read_back(self) -> None:
        """Memory is whole: what was written to the disks is read again, into buffers that were spoilt."""
        self._progress.phase("postcopy is over; what was written is read back")
        for load in self._bench.loads:
            # Buffers that others write from too are left alone.
            writes = [one for one in self._bench.plan.requests[load.client] if one.write and not one.shared]
            load.read_back(writes[:: max(1, len(writes) // _READ_BACK)])
        try:
            await self._watch.until(lambda: all(load.ended for load in self._bench.loads))
        except StepFailed:
            return  # it is on the record, and what can be compared is compared all the same

    # ---- after it

    def _finish(self) -> None:
        """Ends what runs, and takes the figures."""
        record, now = self._record, time.monotonic_ns()
        record.released, record.ended = record.released or now, record.ended or now
        self._bench.pages.release()
        for load in self._bench.loads:
            load.stop()
            record.requests += (one for one in load.done if one.offered <= record.ended)
            record.failed += load.failed
            record.differences += load.differences
        self._bench.pages.report(record)

    def _compare(self) -> None:
        """Every byte."""
        self._progress.phase("memory and disks are compared")
        bench, record = self._bench, self._record
        for number, region in enumerate(bench.plan.regions):
            for offset in range(0, region.size, _PIECE):
                found = bench.guest.read(Area(region.guest + offset, min(_PIECE, region.size - offset)))
                record.differences += memory_differences(bench.truth, number, found, offset)
                record.compared += len(found)
        for client, place in enumerate(bench.places):
            with place.disk.open("rb") as file:
                found = file.read(len(bench.truth.disks[client]))
            record.differences += disk_differences(bench.truth, client, found)
            record.compared += len(bench.truth.disks[client])
