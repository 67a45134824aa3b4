"""All that a run needs: guest memory, disks, drivers, the source of pages, back-ends; made and released together.

What belongs here: making and releasing, in an order in which nothing waits for ever. What does not: what is done with
it (``run``).

Guest memory is filled and rings are laid out in it while it is whole, as at the source. Its content is then moved away
and its files become holes, as at the destination.
"""

from __future__ import annotations

from contextlib import AsyncExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Self

from vhostuser.driverqueue import DriverQueue
from vhostuser.frontend import Frontend, FrontendRing
from vhostuser.tools.postcopy.guest import Guest
from vhostuser.tools.postcopy.handshake import Conversation
from vhostuser.tools.postcopy.load import Load
from vhostuser.tools.postcopy.options import Options, Wake
from vhostuser.tools.postcopy.pages import Pages
from vhostuser.tools.postcopy.plan import Request, Shape, make_plan
from vhostuser.tools.postcopy.record import Client, Record
from vhostuser.tools.postcopy.subject import Place, Subject, SubjectError, command_line
from vhostuser.tools.postcopy.truth import Truth

RING = 128
"""Entries: room for the deepest queue of the longest chains (``Options.depth``, ``plan.MOST_SEGMENTS``)."""


class Bench:
    """What a run stands on, one of each for every back-end where there are several; an async context manager.

    Entering raises PlanError, GuestError, SubjectError or PagesError. What happens is noted in ``record``.
    """

    def __init__(self, options: Options, wake: Wake, record: Record) -> None:
        self.options = options
        self.record = record
        self._wake = wake
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as stack:
            directory = Path(stack.enter_context(TemporaryDirectory(prefix="vhostuser-postcopy-")))
            self.plan = make_plan(_shape(self.options))
            self._describe()
            self.truth = Truth(self.plan, self.options.seed)
            self.guest = stack.enter_context(Guest(self.plan, one_file=self.options.one_file))
            self.loads = [stack.enter_context(self._new_load(index)) for index in range(self.options.clients)]
            self._move_to_source()
            pages = Pages(self.guest.memory, self.truth, self.plan, self.options, self._wake)
            self.pages = stack.enter_context(pages)
            self.places = self._write_disks(directory)
            self.conversations = [await self._connect(stack, index) for index in range(self.options.clients)]
            self._stack = stack.pop_all()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    def _describe(self) -> None:
        plan, record = self.plan, self.record
        record.planned = sum(map(len, plan.requests))
        record.canaries, record.on_demand = frozenset(plan.canaries), plan.on_demand
        record.page_size = plan.page_size
        record.regions = tuple((region.guest, region.size) for region in plan.regions)

    def _new_load(self, index: int) -> Load:
        at = self.plan.rings[index].guest
        queue = DriverQueue(self.guest.memory.map, at, RING, indirect=self.options.indirect)
        load = Load(index, FrontendRing(0, queue), self.truth, self.guest, self.options.depth, self._offered)
        load.prepare(self.plan.requests[index])
        return load

    def _offered(self, client: int, request: Request, now: int) -> None:
        """A load's thread: the device has a reason to touch these pages from now on."""
        for page in self.plan.pages(request.areas):
            self.record.offered.setdefault((client, page), now)

    def _move_to_source(self) -> None:
        for ring in self.plan.rings:
            self.truth.store(ring, self.guest.read(ring))
        self.guest.empty()

    def _write_disks(self, directory: Path) -> list[Place]:
        options = self.options
        places = []
        for index, content in enumerate(self.truth.disks):
            disk = options.disks[index] if options.disks else directory / f"disk.{index}"
            socket = options.sockets[index] if options.sockets else directory / f"blk.{index}"
            _write_disk(disk, content, ours=not options.disks)
            places.append(Place(socket, disk, directory / f"wake.{index}"))
        return places

    async def _connect(self, stack: AsyncExitStack, index: int) -> Conversation:
        name, place, options = f"blk {index}", self.places[index], self.options
        command = command_line(options.command, index, place) if options.command else None
        subject = await stack.enter_async_context(Subject(name, place, command, options.patience))
        frontend = Frontend(await subject.connect())
        frontend.timeout = options.patience
        self.record.clients.append(Client(name, subject.pid))
        conversation = Conversation(index, subject, frontend, self.record)
        stack.callback(conversation.close)
        return conversation


def _shape(options: Options) -> Shape:
    return Shape(
        size=options.memory,
        regions=options.regions,
        page_size=options.page_size,
        clients=options.clients,
        ring_bytes=DriverQueue.bytes_needed(RING, indirect=options.indirect),
        requests=options.requests,
        withhold=options.withhold,
        zeros=options.zeros,
        seed=options.seed,
    )


def _write_disk(path: Path, content: bytearray, *, ours: bool) -> None:
    """Ours is made, of a whole number of 4096 bytes, which some back-ends ask for; another's must be large enough."""
    try:
        with path.open("wb" if ours else "r+b") as file:
            if not ours and file.seek(0, 2) < len(content):
                raise SubjectError(
                    f"--disk: {path}: {len(content)} bytes are needed, give a larger image or less --memory"
                )
            file.seek(0)
            file.write(content)
            if ours:
                file.truncate(-(-len(content) // 4096) * 4096)
    except OSError as error:
        raise SubjectError(f"--disk: {path}: {error.strerror}") from None
