"""How the pages of a run come: the fault server, as the run needs it, and what it tells, as the record wants it.

What belongs here: choosing source, placement, wake policy and order by the options. What does not: placing and waking
(``vhostuser.faultserver``).
"""

from __future__ import annotations

import mmap
import os
import random
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Self

from vhostuser.faultserver import Client as Served
from vhostuser.faultserver import ClientStats, EventKind, FaultServer, Placement, Unsupported, WakePolicy
from vhostuser.faultserver import Event as Line
from vhostuser.frontend import PostcopyClient, SharedMemory
from vhostuser.protocol import RemoteProtocolError
from vhostuser.tools.postcopy import options as asked
from vhostuser.tools.postcopy.options import Options, Order, Wake
from vhostuser.tools.postcopy.plan import Plan
from vhostuser.tools.postcopy.record import Client, Event, Happening, Record
from vhostuser.tools.postcopy.source import make_source
from vhostuser.tools.postcopy.truth import Truth
from vhostuser.uffd import Mode, NotPermitted
from vhostuser.wake import BlockingWakeChannel

_MOST_EVENTS = 1 << 20
_POLICY = {
    Wake.BROADCAST: WakePolicy.BROADCAST,
    Wake.DEMAND: WakePolicy.DEMAND,
    Wake.BATCH: WakePolicy.BATCH,
    Wake.CHANNEL: WakePolicy.BATCH,
}
_PLACEMENT = {asked.Placement.COPY: Placement.COPY, asked.Placement.CONTINUE: Placement.CONTINUE}
_KINDS = {EventKind.FAULT: Happening.FAULT, EventKind.PLACED: Happening.PLACED, EventKind.WOKEN: Happening.WOKEN}


class PagesError(Exception):
    """This machine or this back-end cannot do what was asked for: one line."""


class Pages:
    """The fault server of one run. It places nothing before ``release``; a context manager. Raises PagesError."""

    def __init__(self, memory: SharedMemory, truth: Truth, plan: Plan, options: Options, wake: Wake) -> None:
        self._plan = plan
        self._options = options
        self._by_channel = wake is Wake.CHANNEL
        self._clients: list[Served] = []
        self._held = True
        self._events: list[Line] = []
        self._stack = ExitStack()
        with ExitStack() as stack:
            fd = os.memfd_create("source", os.MFD_CLOEXEC)
            stack.callback(os.close, fd)
            with open(fd, "wb", closefd=False) as file:
                file.writelines(truth.memory)
            regions = [(region.guest, region.size) for region in plan.regions]
            source = make_source(fd, regions, options, plan.page_size)
            stack.callback(source.close)
            try:
                self._server = FaultServer(
                    memory, source, placement=_PLACEMENT[options.placement], wake=_POLICY[wake], events=self._room()
                )
            except (NotPermitted, Unsupported) as error:
                raise PagesError(str(error)) from None
            stack.callback(self._server.close)
            self._server.pause()
            self._at = self._server.present_at
            self._received = stack.enter_context(mmap.mmap(self._server.present_fd, 0, prot=mmap.PROT_READ))
            self._stack = stack.pop_all()

    def _room(self) -> int:
        """Events to keep: a fault and a wake of every page for every client, and its placement; a power of two."""
        wanted = self._plan.size // self._plan.page_size * (1 + 3 * (self._options.clients + 1))
        return min(_MOST_EVENTS, 1 << wanted.bit_length())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    # ---- clients

    def add_client(self, name: str, client: PostcopyClient, wake_socket: Path) -> None:
        """Serves a back-end from now on. The numbers of clients count from 0, in the order in which they were added."""
        continues = self._options.placement is asked.Placement.CONTINUE
        mode = Mode.MISSING | Mode.MINOR if continues else Mode.MISSING
        channel = self._stack.enter_context(_connect(wake_socket)).fileno() if self._by_channel else -1
        self._clients.append(
            self._server.add_client(name, client.uffd, client.regions, mode=mode, register=continues, channel=channel)
        )

    def waiting(self, client: int) -> bool:
        """Whether a fault of a client waits, as far as it was read; False for a client that was not added."""
        if client >= len(self._clients):
            return False
        stats = self._clients[client].stats()
        return stats.faults - stats.merged_faults - stats.late - stats.stray > stats.woken

    def count(self, client: int) -> int:
        """The faults of a client so far."""
        return self._clients[client].stats().faults

    # ---- bringing pages

    def release(self) -> None:
        """From now on pages come: those that are waited for, and by the order that was asked for the others. Again:
        nothing."""
        if not self._held:
            return
        self._held = False
        size = self._plan.page_size
        for run in self._plan.runs(self._plan.on_demand):
            self._server.withhold(run.guest, run.size)
        if self._options.order is Order.SEQUENTIAL:
            self._server.prefetch()
        elif self._options.order is Order.RANDOM:
            pages = list(self._plan.all_pages())
            random.Random(self._options.seed).shuffle(pages)
            self._server.prefetch([(page, size) for page in pages])
        self._server.resume()

    def bring(self, pages: Iterable[int]) -> None:
        """Brings these, whether they were withheld or not."""
        for run in self._plan.runs(pages):
            self._server.release(run.guest, run.size)

    def missing(self, pages: Iterable[int]) -> set[int]:
        """Those of them that are not there yet."""
        return {page for page in pages if not self._is_here(page)}

    def _is_here(self, guest: int) -> bool:
        region, offset = self._plan.locate(guest)
        number = offset // self._plan.page_size
        return bool(self._received[self._at[region] + number // 8] >> number % 8 & 1)

    def check(self) -> None:
        """Raises PagesError if pages that should come cannot come any more: no back-end is at fault then."""
        stats = self._server.stats()
        if stats.paused and not self._held:
            reason = self._server.lost or os.strerror(stats.error)
            raise PagesError(f"pages cannot be placed any more: {reason} (is there memory, are there huge pages left?)")

    @property
    def received(self) -> int:
        """Pages that are there."""
        return self._server.stats().received

    @property
    def total(self) -> int:
        """All pages."""
        return self._server.stats().total

    # ---- what happened

    def faults(self) -> list[Event]:
        """Those that were read so far."""
        return [event for line in self._lines() if (event := self._event(line)) and event.kind is Happening.FAULT]

    def _lines(self) -> list[Line]:
        self._events += self._server.events(self._events[-1].sequence if self._events else 0)
        return self._events

    def _event(self, line: Line) -> Event | None:
        kind = _KINDS.get(line.kind)
        if kind is None:
            return None
        numbers = {client.number: index for index, client in enumerate(self._clients)}
        whose = None if kind is Happening.PLACED else numbers.get(line.client)
        return Event(line.ns, kind, whose, line.guest, line.length)

    def report(self, record: Record) -> None:
        """Writes the figures into the record."""
        lines = self._lines()
        record.events = [event for line in lines if (event := self._event(line)) is not None]
        record.lost_events = lines[-1].sequence - len(lines) if lines else 0
        found = {line.guest for line in lines if line.kind is EventKind.PRESENT} & record.canaries
        stats = self._server.stats()
        record.pages, record.zeros = stats.placed, stats.zero
        record.canaries_present = max(record.canaries_present, len(found))
        record.filled = max(0, stats.present - len(found))
        for client, served in zip(record.clients, self._clients, strict=False):
            _describe(served.stats(), client)


def _describe(stats: ClientStats, client: Client) -> None:
    """A client's statistics, under the record's names."""
    client.faults, client.stray = stats.faults, stats.stray
    client.wakes, client.merged, client.spurious = stats.wakes, stats.merged_wakes, stats.spurious
    client.blocked_ns = stats.blocked_ns


def _connect(path: Path) -> BlockingWakeChannel:
    try:
        return BlockingWakeChannel.connect(str(path))
    except (OSError, RemoteProtocolError) as error:
        raise PagesError(f"{path}: the back-end's wake channel cannot be used: {error}") from None
