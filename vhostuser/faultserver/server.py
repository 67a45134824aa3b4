"""The front-end's half of postcopy: one guest memory, its missing pages, and all who wait for them.

What belongs here: what a user says and learns: memory, source, clients, policies, statistics; threads and descriptors.
What does not: the state and the loop (native/faultpages.c says why no wake-up is lost, native/faultserver.c is the
loop), sources (``sources``) and what runs them (``supply``), the messages of postcopy (``frontend``).

A userfaultfd belongs to one address space, so every process that shares the memory has one of its own and this server
polls them all, its own process's too. A page is placed once, through ours; then whoever waits is woken, each
through its own descriptor. ::

    server = FaultServer(memory, MappedFile(FilePiece(0, size, image)))
    client = server.add_client("disk", uffd, regions)       # after the back-end has answered with its addresses
    server.prefetch()                                       # the rest, in the background
    server.wait()
    server.close()

No thread of Python runs for a fault while the source is mapped. Threads of this process may touch the memory, from C
with the GIL released, as everywhere.
"""

from __future__ import annotations

import os
import select
import threading
import time
from collections.abc import Iterable, Sequence
from typing import Any, Self

from vhostuser._native import ffi, lib
from vhostuser.faultserver.placement import (
    ClientRegion,
    Memory,
    MissingRegion,
    Placement,
    Unsupported,
    WakePolicy,
    check_client,
    check_support,
)
from vhostuser.faultserver.sources import MappedSource, PageSource
from vhostuser.faultserver.stats import Client, ClientStats, Event, EventKind, ServerStats
from vhostuser.faultserver.supply import Supply
from vhostuser.memory import explain
from vhostuser.threads import spawn
from vhostuser.uffd import Feature, Mode, Userfaultfd


class FaultServer:
    """Brings the missing pages of one memory and wakes who waits for them.

    memory: every page is taken to be missing, and our own mapping is emptied of its page table entries; the files
    should be holes. It must stay as it is until ``close``. source: stays the caller's, to be closed after the server.
    placement, wake: see there. deadline: seconds after which a page that is waited for counts as lost: who touches
    it gets SIGBUS from then on (UFFDIO_POISON). batch: pages of a placement, 1 to 64, with WakePolicy.BATCH. events:
    how many the record keeps, 0 or a power of two. device_fd: as for ``Userfaultfd.open``.

    Raises NotPermitted where no userfaultfd can be had, Unsupported, ValueError. Methods may be called from any thread;
    none touches guest memory, and those that wait say so; none but ``stats`` may be called during or after ``close``.
    """

    def __init__(
        self,
        memory: Memory,
        source: MappedSource | PageSource,
        *,
        placement: Placement = Placement.COPY,
        wake: WakePolicy = WakePolicy.BATCH,
        deadline: float | None = None,
        batch: int = 64,
        events: int = 0,
        device_fd: int = -1,
    ) -> None:
        self.placement = placement
        self.wake = wake
        self.clients: list[Client] = []
        """Those there are; the first is this process's own threads."""
        self._regions = tuple(memory.map.regions)
        self._fds = tuple(memory.fds)
        self._lock = threading.RLock()
        self._native: Any = None
        self._closed = False
        self._final: ServerStats | None = None
        features = Userfaultfd.probe(device_fd)
        check_support(features, self._regions, self._fds, placement, deadline)
        self._uffd = Userfaultfd.open(device_fd)
        self._control = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._notice = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._may_poison = Feature.POISON in features
        largest = max((region.page_size for region in self._regions), default=0)
        self._supply = Supply(source, self._notice, page_size=largest, may_poison=self._may_poison)
        try:
            self._make(int((deadline or 0) * 1e9), batch, events)
        except BaseException:
            self._discard()
            raise
        self._thread = spawn(self._serve, "fault server")
        self._supply.begin()

    # ---- making

    def _make(self, deadline_ns: int, batch: int, events: int) -> None:
        config = {
            "uffd": self._uffd.fileno(),
            "control": self._control,
            "wanted": self._supply.wanted,
            "notice": self._notice,
            "put": self.placement,
            "wake": self.wake,
            "batch": batch,
            "events": events,
            "deadline_ns": deadline_ns,
        }
        regions = [self._describe(number) for number in range(len(self._regions))]
        error = ffi.new("int *")
        native = lib.vu_faults_new(
            ffi.new("struct vu_fault_config *", config),
            ffi.new("struct vu_fault_region[]", regions),
            len(regions),
            error,
        )
        if native == ffi.NULL:
            raise ValueError(
                f"no fault server for these regions, a batch of {batch} and {events} events: {explain(error[0])}; "
                "guest addresses and sizes must be whole pages, a batch 1 to 64 pages, events a power of two"
            )
        self._native = self._supply.native = native
        self._watch_own()

    def _describe(self, number: int) -> dict[str, int]:
        region = self._regions[number]
        source = 0
        if isinstance(self.source, MappedSource):
            source = _mapped_at(self.source, region)
        return {
            "guest": region.guest,
            "size": region.size,
            "host": region.host,
            "page_size": region.page_size,
            "offset": region.offset,
            "source": source,
            "fd": self._fds[number] if number < len(self._fds) else -1,
        }

    def _watch_own(self) -> None:
        """Client 0: threads of this process."""
        mode = Mode.MISSING | Mode.MINOR if self.placement is Placement.CONTINUE else Mode.MISSING
        for region in self._regions:
            region.no_huge()
            self._uffd.register(region.base, region.length, mode)
        self._admit("own threads", self._uffd.fileno(), self._regions, -1, 0)

    def _serve(self) -> None:
        if lib.vu_faults_serve(self._native) < 0:
            self._supply.lose(OSError(ffi.errno, os.strerror(ffi.errno)))

    # ---- clients

    def add_client(
        self,
        name: str,
        uffd_fd: int,
        regions: Iterable[ClientRegion],
        *,
        mode: Mode = Mode.MISSING,
        register: bool = False,
        channel: int = -1,
        channel_ranges: int = 255,
    ) -> Client:
        """Serves one more process.

        uffd_fd: its userfaultfd, with its memory registered or about to be; duplicated, so it stays the caller's.
        regions: where it has which guest addresses; what it does not have may be left out. mode: for which faults it is
        registered. register: do that here, through its descriptor, for those of ``mode``; its memory must be mapped,
        and it may register it for fewer faults itself, before or after. A back-end asks for MISSING alone, as the
        protocol has it, so CONTINUE needs this, before the first page is placed. channel: a connected socket of the
        wake channel on which HELLO has been exchanged, or -1: the client is then woken by messages and not by us,
        except when the socket is full; duplicated too. channel_ranges: how many ranges the client's HELLO allows in a
        message.

        Raises Unsupported, ValueError for regions that are none of ours or not whole pages, OSError.
        """
        check_client(name, self.placement, mode)
        has = tuple(regions)
        if register:
            for region in has:
                Userfaultfd(uffd_fd).register(region.host, region.size, mode)
        return self._admit(name, uffd_fd, has, channel, channel_ranges)

    def _admit(self, name: str, uffd_fd: int, regions: Iterable[ClientRegion], channel: int, ranges: int) -> Client:
        spans = [{"guest": r.guest, "size": r.size, "host": r.host} for r in regions]
        native = ffi.new("struct vu_fault_span[]", spans)
        taken = _duplicates(uffd_fd, channel)
        with self._lock:
            number = lib.vu_faults_add(self._native, *taken, ranges, native, len(spans))
            client = Client(name, _admitted(name, number), self._client_stats)
            self.clients.append(client)
        return client

    def remove_client(self, client: Client) -> None:
        """Serves it no more. Its threads that wait are woken: they look again and, where the page is still missing,
        wait for whoever reads its userfaultfd next. Again: nothing."""
        with self._lock:
            if client in self.clients:
                client.freeze()
                self.clients.remove(client)
                lib.vu_faults_remove(self._native, client.number)

    def collect(self) -> list[Client]:
        """Removes clients whose processes have ended, and returns them."""
        with self._lock:
            gone = [client for client in self.clients if client.gone]
            for client in gone:
                self.remove_client(client)
        return gone

    # ---- background

    def place(self, guest: int, length: int) -> None:
        """Brings a range before the rest of the background. Returns at once."""
        self._queue([(guest, length)], first=True)

    def prefetch(self, order: Iterable[tuple[int, int]] | None = None) -> None:
        """Brings ranges (guest address, bytes) in the background, in this order behind what is queued already; None:
        everything, region by region. Returns at once. Raises ValueError unless they are whole pages within a region.
        """
        self._queue([(r.guest, r.size) for r in self._regions] if order is None else list(order), first=False)

    def _queue(self, ranges: Sequence[tuple[int, int]], *, first: bool) -> None:
        for guest, length in ranges:
            self._check_range(guest, length)
        self._supply.queue(ranges, first=first)

    def _check_range(self, guest: int, length: int) -> None:
        for region in self._regions:
            if region.guest <= guest and guest + length <= region.guest + region.size and length > 0:
                if guest % region.page_size or length % region.page_size:
                    raise ValueError(
                        f"{length:#x} bytes at guest address {guest:#x}: expected whole pages of {region.page_size:#x}"
                    )
                return
        raise ValueError(f"{length:#x} bytes at guest address {guest:#x} do not lie in one region")

    def withhold(self, guest: int, length: int) -> None:
        """These pages are never brought in the background, only when somebody waits for them."""
        self._check_range(guest, length)
        lib.vu_faults_withhold(self._native, guest, length, 1)

    def release(self, guest: int, length: int) -> None:
        """Withholds them no longer, and brings them in the background, before the rest."""
        self._check_range(guest, length)
        lib.vu_faults_withhold(self._native, guest, length, 0)
        self.place(guest, length)

    def poison(self, guest: int, length: int) -> int:
        """Gives up those pages of the range that are missing: whoever waits for one, or touches it later, gets SIGBUS,
        and bytes that come for it later are dropped. Returns how many. Raises Unsupported, ValueError."""
        self._check_range(guest, length)
        if not self._may_poison:
            raise Unsupported("this kernel has no UFFDIO_POISON, which came with Linux 6.6: missing pages stay missing")
        return int(lib.vu_faults_lose(self._native, guest, length))

    # ---- pause, wait

    def pause(self) -> None:
        """Places nothing more, except what is already under way; faults are recorded meanwhile."""
        self._supply.pause()

    def resume(self, source: PageSource | None = None) -> None:
        """Goes on after ``pause``, or after the source was lost: everything that is missing and was asked for is asked
        for again, what is waited for first. source: another one to ask from now on, which the server does not close.
        Waits for the threads of the source that was lost.
        """
        if isinstance(self.source, MappedSource) and source is not None:
            raise ValueError("a mapped source cannot be replaced: its pages are placed from where they are")
        self._supply.resume(source)

    @property
    def source(self) -> MappedSource | PageSource:
        """Where pages come from now."""
        return self._supply.source

    @property
    def lost(self) -> Exception | None:
        """Why the source was lost, until ``resume``."""
        return self._supply.lost

    @property
    def paused(self) -> bool:
        """Whether nothing is placed: by ``pause``, because the source is ``lost``, or after an error."""
        return self.stats().paused

    @property
    def complete(self) -> bool:
        """Whether every page is there, or lost for good."""
        stats = self.stats()
        return stats.received + stats.lost == stats.total

    def fileno(self) -> int:
        """An eventfd that becomes readable when the memory is complete, a client is gone or the server has paused by
        itself. ``noticed`` makes it unreadable again."""
        return self._notice

    def noticed(self) -> None:
        """To be called before one looks."""
        try:
            os.eventfd_read(self._notice)
        except BlockingIOError:
            return

    def wait(self, timeout: float | None = None) -> bool:
        """Waits until the memory is ``complete``, which needs that pages that are withheld are waited for or released:
        True; or the server has paused by itself, or ``timeout`` seconds have passed: False. For one thread at a
        time."""
        end = None if timeout is None else time.monotonic() + timeout
        waiting = select.poll()
        waiting.register(self._notice, select.POLLIN)
        while not self.complete:
            left = None if end is None else max(end - time.monotonic(), 0) * 1000
            if self.lost or self.stats().error or not waiting.poll(left):
                return self.complete
            self.noticed()
        return True

    def drain(self, timeout: float | None = None) -> bool:
        """Waits until all that was queued by ``place`` and ``prefetch`` is there, apart from what is withheld."""
        return self._supply.drain(timeout)

    # ---- what happened

    @property
    def present_fd(self) -> int:
        """A memfd for clients, that can only be mapped read-only: a bit for each page, set once it is there.

        The page with number n of region r (in the order of the memory's regions) is bit n % 8 of byte ``present_at[r]``
        + n // 8. It stays ours. A client that finds the bit set can touch the page without a fault.
        """
        return int(lib.vu_pages_fd(lib.vu_faults_pages(self._native)))

    @property
    def present_at(self) -> tuple[int, ...]:
        """Where the bits of each region begin, in bytes."""
        return tuple(int(lib.vu_faults_page(self._native, region.guest)) // 8 for region in self._regions)

    def stats(self) -> ServerStats:
        """Live; after ``close`` what they were then."""
        if self._final is not None:
            return self._final
        raw = ffi.new("struct vu_server_stats *")
        lib.vu_faults_stats(self._native, raw)
        return ServerStats.of(raw)

    def _client_stats(self, number: int) -> ClientStats:
        raw = ffi.new("struct vu_client_stats *")
        lib.vu_faults_client_stats(self._native, number, raw)
        return ClientStats.of(raw)

    def events(self, after: int = 0) -> list[Event]:
        """The record from behind sequence number ``after``: what of it is still kept, the oldest first."""
        found: list[Event] = []
        raw = ffi.new("struct vu_fault_event[256]")
        while count := lib.vu_faults_events(self._native, after, raw, 256):
            found += [Event(e.sequence, e.ns, EventKind(e.kind), e.client, e.guest, e.length) for e in raw[0:count]]
            after = found[-1].sequence
        return found

    # ---- the end

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the threads and closes every descriptor. Waits for the source's threads: one that is stuck in a
        function of the caller's has to be freed by the caller. Again: nothing.

        Fails closed. Where pages are missing, closing our userfaultfd would let the kernel fill them with zeros for
        everybody who shares the memory; so the memory becomes inaccessible in this process first, for good. Clients
        keep their own descriptors, and decide for themselves.
        """
        with self._lock:
            if self._closed:
                return
            self._closed = True
        lib.vu_faults_stop(self._native)
        self._supply.end()
        self._thread.join()
        self._final = self.stats()
        for client in self.clients:
            client.freeze()
        if not self.complete:
            for region in self._regions:
                region.revoke()
        self._discard()

    def _discard(self) -> None:
        if self._native is not None:
            lib.vu_faults_free(self._native)
            self._native = None
        for region in self._regions:
            self._forget(region)
        self._uffd.close()
        self._supply.close()
        os.close(self._control)
        os.close(self._notice)

    def _forget(self, region: MissingRegion) -> None:
        try:
            self._uffd.unregister(region.base, region.length)
        except OSError:  # never registered: the making failed
            return


def _duplicates(uffd_fd: int, channel: int) -> tuple[int, int]:
    """Of both, if there are both. Raises OSError."""
    uffd = os.dup(uffd_fd)
    try:
        return uffd, os.dup(channel) if channel >= 0 else -1
    except OSError:
        os.close(uffd)
        raise


def _admitted(name: str, number: int) -> int:
    """The number of a client that was added; raises what add_client raises otherwise."""
    if number >= 0:
        return number
    if number == lib.VU_E_SYS:
        raise OSError(ffi.errno, f"client {name}: {os.strerror(ffi.errno)}; expected a userfaultfd")
    if number == lib.VU_E_SIZE:
        raise ValueError(f"client {name}: there are {lib.VU_PAGES_CLIENTS} clients already, our own threads included")
    raise ValueError(f"client {name}: {explain(number)}; expected whole pages of regions of this memory")


def _mapped_at(source: MappedSource, region: MissingRegion) -> int:
    for piece in source.pieces:
        if piece.guest <= region.guest and region.guest + region.size <= piece.guest + piece.size:
            return piece.host + region.guest - piece.guest
    raise ValueError(f"the source has no piece that holds all of the region at guest address {region.guest:#x}")
