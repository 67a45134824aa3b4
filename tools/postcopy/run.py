"""One run: a migration from its first message to the last comparison, and what was seen of it.

What belongs here: the order of things. What does not: what is said (``handshake``), how pages come (``pages``), the I/O
(``load``), what it all means (``rules``).

Guest memory is filled and rings are laid out in it while it is whole, as at the source. Its content is then moved away
and its files become holes, as at the destination; from there on pages come back one by one.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

from vhostuser.driverqueue import DriverQueue
from vhostuser.frontend import Frontend, FrontendRing
from vhostuser.tools.postcopy.guest import Guest, GuestError
from vhostuser.tools.postcopy.handshake import Conversation, StepFailed
from vhostuser.tools.postcopy.load import Load
from vhostuser.tools.postcopy.options import MIB, Flow, Options, Wake
from vhostuser.tools.postcopy.pages import Pages, PagesError
from vhostuser.tools.postcopy.plan import Area, Plan, PlanError, Request, Shape, make_plan
from vhostuser.tools.postcopy.progress import Progress
from vhostuser.tools.postcopy.record import Client, Outcome, Probe, Record, Sighting, Stuck
from vhostuser.tools.postcopy.report import Result
from vhostuser.tools.postcopy.rules import BEFORE_ACK, BEFORE_RINGS, RINGS, judge
from vhostuser.tools.postcopy.subject import Place, Subject, SubjectError, command_line
from vhostuser.tools.postcopy.truth import Truth, disk_differences, memory_differences

RING = 128
"""Entries: room for the deepest queue of the longest chains (``Options.depth``, ``plan.MOST_SEGMENTS``)."""
_SETTLE = 0.03
"""Seconds in which a back-end that touches what it must not has done so."""
_TICK = 0.02
_PROBE_EVERY = 0.1
_READ_AGAIN = 64
"""Requests that are made once more when postcopy is over."""
_PIECE = 8 * MIB


class RunError(Exception):
    """The run cannot begin: one line."""


async def perform(options: Options, flow: Flow, wake: Wake, progress: Progress) -> Result:
    """One run. Raises RunError."""
    try:
        plan = make_plan(_shape(options))
        with TemporaryDirectory(prefix="vhostuser-postcopy-") as directory:
            run = Run(options, flow, wake, progress, plan)
            await run.go(Path(directory))
    except (PlanError, GuestError, SubjectError, PagesError) as error:
        raise RunError(str(error)) from None
    return Result(_settings(options, flow, wake), run.record, judge(run.record))


def _shape(options: Options) -> Shape:
    return Shape(
        size=options.memory,
        regions=options.regions,
        page_size=options.page_size,
        clients=options.clients,
        ring_bytes=DriverQueue.bytes_needed(RING, indirect=options.indirect),
        requests=options.requests,
        withhold=options.withhold,
        seed=options.seed,
    )


def _settings(options: Options, flow: Flow, wake: Wake) -> dict[str, object]:
    page = "2 MiB" if options.page_size > 4096 else "4 KiB"
    kind = "indirect" if options.indirect else "direct"
    speed = f"{options.bandwidth // MIB} MiB/s" if options.bandwidth else "no limit"
    return {
        "back-end": f"{options.clients} x {options.command or ', '.join(map(str, options.sockets))}",
        "memory": f"{options.memory // MIB} MiB in {options.regions} regions of {page} pages",
        "flow": {Flow.TABLE: "SET_MEM_TABLE", Flow.REGIONS: "ADD_MEM_REG"}[flow],
        "source": f"{speed}, {options.latency * 1e6:g} us, order {options.order}, {options.withhold} % only on demand",
        "placement": f"{options.placement}, wake {wake}",
        "load": f"{options.depth} requests in flight, {kind} descriptors, seed {options.seed}",
    }


class Run:
    """The state of one run; ``record`` is what it leaves."""

    def __init__(self, options: Options, flow: Flow, wake: Wake, progress: Progress, plan: Plan) -> None:
        self.record = Record(
            label=f"{flow}, {wake}",
            by_channel=wake is Wake.CHANNEL,
            planned=sum(map(len, plan.requests)),
            canaries=frozenset(plan.canaries),
            on_demand=plan.on_demand,
            page_size=plan.page_size,
            regions=tuple((region.guest, region.size) for region in plan.regions),
        )
        self._options = options
        self._by_slots = flow is Flow.REGIONS
        self._wake = wake
        self._progress = progress
        self._plan = plan
        self._truth = Truth(plan, options.seed)
        self._whole_since: dict[tuple[int, int, int], float] = {}
        self._given: set[int] = set()
        self._probed = 0.0

    async def go(self, directory: Path) -> None:
        """All of it. Raises what ``perform`` makes a RunError of."""
        self._progress.phase(f"{self.record.label}: {self._plan.size // MIB} MiB of guest memory and a disk are filled")
        async with AsyncExitStack() as stack:
            self._guest = stack.enter_context(Guest(self._plan))
            self._loads = [stack.enter_context(self._new_load(index)) for index in range(self._options.clients)]
            self._move_to_source()
            self._pages = stack.enter_context(
                Pages(self._guest.memory, self._truth, self._plan, self._options, self._wake)
            )
            places = self._write_disks(directory)
            self._conversations = [await self._connect(stack, index, place) for index, place in enumerate(places)]
            try:
                await self._migrate()
                await self._read_again()
            except StepFailed:
                pass
            finally:
                self._finish()
            if self._over:
                await asyncio.to_thread(self._compare, [place.disk for place in places])

    # ---- before the migration

    def _new_load(self, index: int) -> Load:
        queue = DriverQueue(
            self._guest.memory.map, self._plan.rings[index].guest, RING, indirect=self._options.indirect
        )
        load = Load(index, FrontendRing(0, queue), self._truth, self._guest, self._options.depth, self._offered)
        load.prepare(self._plan.requests[index])
        return load

    def _move_to_source(self) -> None:
        for ring in self._plan.rings:
            self._truth.store(ring, self._guest.read(ring))
        self._guest.empty()

    def _write_disks(self, directory: Path) -> list[Place]:
        options = self._options
        places = []
        for index, content in enumerate(self._truth.disks):
            disk = options.disks[index] if options.disks else directory / f"disk.{index}"
            socket = options.sockets[index] if options.sockets else directory / f"blk.{index}"
            _write_disk(disk, content, ours=not options.disks)
            places.append(Place(socket, disk, directory / f"wake.{index}"))
        return places

    async def _connect(self, stack: AsyncExitStack, index: int, place: Place) -> Conversation:
        name = f"blk {index}"
        command = command_line(self._options.command, index, place) if self._options.command else None
        subject = await stack.enter_async_context(Subject(name, place, command, self._options.patience))
        frontend = Frontend(await subject.connect())
        frontend.timeout = self._options.patience
        self.record.clients.append(Client(name, subject.pid))
        conversation = Conversation(index, subject, frontend, self.record)
        stack.callback(conversation.close)
        return conversation

    def _offered(self, client: int, request: Request, now: int) -> None:
        """A load's thread: the device has a reason to touch these pages from now on."""
        for page in self._plan.pages(request.areas):
            self.record.offered.setdefault((client, page), now)

    # ---- the migration

    _over = False
    """Whether all of it was gone through."""

    async def _migrate(self) -> None:
        self._progress.phase("handshake")
        await self._handshake()
        self._progress.phase("no page comes until every back-end has asked for one")
        await self._start_rings()
        await self._hold()
        self._progress.phase("pages come")
        self.record.released = time.monotonic_ns()
        self._pages.release()
        await self._until(lambda: all(load.ended for load in self._loads))
        self.record.ended = time.monotonic_ns()
        await self._bring_the_rest()
        for each in self._conversations:
            await each.end()
        self._over = True

    async def _handshake(self) -> None:
        for each in self._conversations:
            await each.negotiate(by_slots=self._by_slots, indirect=self._options.indirect)
            await each.advise()
        for each in self._conversations:
            await each.listen()
        for each in self._conversations:
            await self._share(each)
        await self._look(BEFORE_ACK)
        for each in self._conversations:
            await each.acknowledge()
        await self._look(BEFORE_RINGS)

    async def _share(self, each: Conversation) -> None:
        try:
            await each.share(self._guest.memory, by_slots=self._by_slots)
        except StepFailed:
            # It may be silent because it has touched the memory, and waits.
            waiting = ((each.index, fault.address) for fault in each.faults())
            self.record.sightings.append(Sighting(BEFORE_ACK, tuple(waiting), self._guest.present))
            raise
        if any(base.client == each.index and base.right is False for base in self.record.bases):
            raise StepFailed
        self._pages.add_client(each.subject.name, each.client, each.subject.place.wake)

    async def _look(self, moment: str) -> None:
        """Nobody has a reason to touch anything yet."""
        for each in self._conversations:
            await each.probe(waiting=self._pages.waiting(each.index))
        await asyncio.sleep(_SETTLE)
        faults = tuple((event.client, event.guest) for event in self._pages.faults() if event.client is not None)
        seen = Sighting(moment, faults, self._guest.present)
        self.record.sightings.append(seen)
        if moment == BEFORE_ACK and (seen.faults or seen.present):
            raise StepFailed

    async def _start_rings(self) -> None:
        for each, load in zip(self._conversations, self._loads, strict=True):
            load.hand_over()
            try:
                await each.start_ring(load.ring, self._guest.memory)
            except StepFailed:
                step = self.record.step(each.index, RINGS)
                if step and step.outcome is Outcome.SILENT and self._pages.waiting(each.index):
                    self.record.probes.append(Probe(each.index, time.monotonic_ns(), True, None))
                raise
        self.record.began = time.monotonic_ns()
        until = self.record.began + int(self._options.duration * 1e9)
        for load in self._loads:
            load.start(repeat_until=until)

    async def _hold(self) -> None:
        """Nothing is placed until each back-end waits, or has shown that it will not; then it is asked something."""
        end = time.monotonic() + self._options.patience
        for each, load in zip(self._conversations, self._loads, strict=True):
            while not (self._pages.waiting(each.index) or load.done or self._guest.present or time.monotonic() > end):
                await each.look_for_loss()
                await asyncio.sleep(_TICK)
            if not await each.probe(waiting=self._pages.waiting(each.index)):
                raise StepFailed

    async def _until(self, done: Callable[[], bool]) -> None:
        """Watches over the run."""
        while not done():
            await asyncio.sleep(_TICK)
            for each in self._conversations:
                await each.look_for_loss()
            await self._probe_now_and_then()
            self._tell_progress()
            if self._find_stuck():
                raise StepFailed

    async def _probe_now_and_then(self) -> None:
        if time.monotonic() - self._probed < _PROBE_EVERY:
            return
        for each in self._conversations:
            if not await each.probe(waiting=self._pages.waiting(each.index)):
                raise StepFailed
        self._probed = time.monotonic()

    def _tell_progress(self) -> None:
        done = sum(len(load.done) for load in self._loads)
        faults = sum(self._pages.count(index) for index in range(len(self._loads)))
        self._progress.figures(
            self._pages.received / self._pages.total,
            min(1.0, done / self.record.planned),
            f"{faults} faults, {sum(len(load.open) for load in self._loads)} requests open",
        )

    def _find_stuck(self) -> bool:
        """Requests that are open for too long after the last of their pages was there."""
        now = time.monotonic()
        for load in self._loads:
            for head, one in list(load.open.items()):
                pages = self._plan.pages([*one.request.areas, self._plan.rings[load.client]])
                missing = self._pages.missing(pages)
                if not missing:
                    since = self._whole_since.setdefault((load.client, head, one.offered), now)
                    if now - since > self._options.patience:
                        self._note_stuck(load.client, one.request, now - since)
                elif now - max(one.offered, self.record.released) / 1e9 > self._options.patience:
                    self._give_up_waiting(missing)
        return bool(self.record.stuck)

    def _give_up_waiting(self, missing: set[int]) -> None:
        """A request is open for long, and nobody may have asked for these pages: they come now. If that does not help,
        it is stuck."""
        self._pages.bring(missing - self._given)
        self._given |= missing

    def _note_stuck(self, client: int, request: Request, seconds: float) -> None:
        asleep = self._conversations[client].subject.asleep()
        # All requests together ask for the ring: it tells of this one only while a thread sleeps.
        wanted = self._plan.pages([*request.areas, *([self._plan.rings[client]] if asleep else [])])
        asked = sum(event.client == client and event.guest in wanted for event in self._pages.faults())
        self.record.stuck.append(Stuck(client, request.number, seconds, asked, asleep))

    async def _bring_the_rest(self) -> None:
        """Everything but the canaries; then whoever has filled a canary is found out, and they come too."""
        self._progress.phase("the rest comes")
        self._pages.bring(self._plan.all_pages_but(self._plan.canaries))
        await self._until(lambda: self._pages.received >= self._pages.total - len(self._plan.canaries))
        self.record.canaries_present = max(0, self._guest.present - self._pages.received)
        self._pages.bring(self._plan.canaries)
        await self._until(lambda: self._pages.received == self._pages.total)

    async def _read_again(self) -> None:
        """Memory is whole: what was written to the disks is read back into buffers that were spoilt."""
        self._progress.phase("postcopy is over; what was written is read back")
        for load in self._loads:
            # Buffers of others are left alone: they are spoilt first.
            writes = [request for request in self._plan.requests[load.client] if request.write and not request.shared]
            load.read_back(writes[:: max(1, len(writes) // _READ_AGAIN)])
        await self._until(lambda: all(load.ended for load in self._loads))

    # ---- after it

    def _finish(self) -> None:
        """Ends what runs, and takes the figures."""
        record = self.record
        now = time.monotonic_ns()
        record.released, record.ended = record.released or now, record.ended or now
        self._pages.release()
        for load in self._loads:
            load.stop()
            record.requests += (one for one in load.done if one.offered <= record.ended)
            record.failed += load.failed
            record.differences += load.differences
        self._pages.report(record)
        record.canaries_present = min(record.canaries_present, len(self._plan.canaries))

    def _compare(self, disks: list[Path]) -> None:
        """Every byte."""
        self._progress.phase("memory and disks are compared")
        record = self.record
        for number, region in enumerate(self._plan.regions):
            for offset in range(0, region.size, _PIECE):
                found = self._guest.read(Area(region.guest + offset, min(_PIECE, region.size - offset)))
                record.differences += memory_differences(self._truth, number, found, offset)
                record.compared += len(found)
        for client, path in enumerate(disks):
            with path.open("rb") as file:
                found = file.read(len(self._truth.disks[client]))
            record.differences += disk_differences(self._truth, client, found)
            record.compared += len(self._truth.disks[client])


def _write_disk(path: Path, content: bytearray, *, ours: bool) -> None:
    try:
        with path.open("wb" if ours else "r+b") as file:
            if file.seek(0, 2) < len(content) and not ours:
                raise SubjectError(
                    f"--disk: {path}: {len(content)} bytes are needed, give a larger image or less --memory"
                )
            file.seek(0)
            file.write(content)
            # A whole number of 4096 bytes, which some back-ends ask for.
            if ours:
                file.truncate(-(-len(content) // 4096) * 4096)
    except OSError as error:
        raise SubjectError(f"--disk: {path}: {error.strerror}") from None
