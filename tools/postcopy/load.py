"""The guest's driver: one thread for each back-end that keeps block requests in flight and checks what comes of them.

What belongs here: offering, taking back, comparing. What does not: which requests (``plan``), what is right
(``truth``), when a request counts as stuck (``run``).

The thread touches guest memory through its ring only, and there may wait for pages as a virtual CPU does. What the
device has written is read from the files, where a page that is missing reads as zeros and is not filled by it.
"""

from __future__ import annotations

import os
import select
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import chain, cycle
from typing import NamedTuple, Self

from vhostuser.frontend import FrontendRing
from vhostuser.memory import MemoryLost
from vhostuser.protocol import QueueBroken
from vhostuser.threads import spawn
from vhostuser.tools.postcopy.guest import Guest
from vhostuser.tools.postcopy.plan import Area, Request
from vhostuser.tools.postcopy.record import Failed, Timed
from vhostuser.tools.postcopy.truth import NO_STATUS, Difference, Truth, differences, header_of

_STATUS = {1: "IOERR", 2: "UNSUPP", NO_STATUS: "no status at all"}
_SPOILT = 0xA5
_LOOK_AGAIN_MS = 100
"""A call may be swallowed by a broken back-end; whether requests were completed does not depend on it."""


class Open(NamedTuple):
    """A request in flight."""

    request: Request
    offered: int


class Load:
    """The driver of one back-end's ring, which it owns; a context manager.

    Read ``open``, ``done``, ``failed``, ``differences`` and ``ended`` from any thread. depth: requests in flight.
    on_offer: called for each request when the device can see it, with the time.
    """

    def __init__(
        self,
        client: int,
        ring: FrontendRing,
        truth: Truth,
        guest: Guest,
        depth: int,
        on_offer: Callable[[int, Request, int], None],
    ) -> None:
        self.client = client
        self.ring = ring
        self.open: dict[int, Open] = {}
        self.done: list[Timed] = []
        self.failed: list[Failed] = []
        self.differences: list[Difference] = []
        self._truth = truth
        self._guest = guest
        self._depth = depth
        self._on_offer = on_offer
        self._next: Iterator[Request] = iter(())
        self._waiting: Request | None = None
        self._stop = os.eventfd(0, os.EFD_CLOEXEC)
        self._thread: threading.Thread | None = None

    def prepare(self, requests: Iterable[Request]) -> None:
        """Puts the first of ``requests`` into the ring, while memory is whole."""
        self._next = iter(requests)
        self._fill()
        self.ring.queue.publish()
        self.ring.queue.arm()

    def hand_over(self) -> None:
        """The time of what ``prepare`` has offered begins: from here on the device may be told of the ring."""
        now = time.monotonic_ns()
        for head, one in self.open.items():
            self.open[head] = Open(one.request, now)
            self._on_offer(self.client, one.request, now)

    def start(self, *, repeat_until: int = 0) -> None:
        """Kicks, and goes on until all requests are completed; until the time ``repeat_until`` they are made again."""
        self._next = chain(self._next, self._again(repeat_until))
        self.ring.kick()
        self._run()

    def read_back(self, writes: Iterable[Request]) -> None:
        """Reads from the disk what these have written, into the same buffers, after spoiling those. Memory is whole;
        ``ended`` tells when it is done."""
        self._next = (self._turned(request) for request in writes)
        self._run()

    def _turned(self, request: Request) -> Request:
        read = replace(request, write=False)
        self._truth.store(read.header, header_of(read))
        self._guest.write(read.header.guest, header_of(read))
        self._guest.write(read.status.guest, bytes([NO_STATUS]))
        for segment in read.segments:
            self._guest.write(segment.guest, bytes([_SPOILT]) * segment.size)
        return read

    def _run(self) -> None:
        self._thread = spawn(self._serve, f"driver {self.client}")

    @property
    def ended(self) -> bool:
        """Whether the thread has nothing more to do: all is completed, or the ring is broken, or it was stopped."""
        return self._thread is not None and not self._thread.is_alive()

    def stop(self, within: float = 1.0) -> bool:
        """Makes no more requests and does not wait for those in flight; whether the thread has ended in time."""
        os.eventfd_write(self._stop, 1)
        if self._thread is not None:
            self._thread.join(within)
        return self._thread is None or not self._thread.is_alive()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Stops. A thread that does not end keeps its descriptors, for as long as the process lives."""
        if self.stop():
            self.ring.close()
            os.close(self._stop)

    # ---- the thread

    def _serve(self) -> None:
        try:
            while self._fill() or self.open:
                self._publish()
                if not self._reap() and self._stopped_while_asleep():
                    return
        except QueueBroken as error:
            self.failed.append(Failed(self.client, -1, f"the device broke its ring: {error}"))
        except MemoryLost as error:
            self.failed.append(Failed(self.client, -1, str(error)))

    def _again(self, until: int) -> Iterator[Request]:
        """The completed ones once more, which is all of them."""
        if time.monotonic_ns() >= until:
            return
        all_of_them = self._truth.plan.requests[self.client]
        for request in cycle(all_of_them):
            if time.monotonic_ns() >= until:
                return
            if not any(one.request is request for one in self.open.values()):
                self._guest.write(request.status.guest, bytes([NO_STATUS]))
                yield request

    def _fill(self) -> bool:
        """Offers requests; whether any were."""
        offered = False
        while len(self.open) < self._depth:
            request = self._waiting or next(self._next, None)
            self._waiting = request
            if request is None or (head := self._offer(request)) is None:
                break
            self._waiting = None
            now = time.monotonic_ns()
            self.open[head] = Open(request, now)
            if self._thread is not None:
                self._on_offer(self.client, request, now)
            offered = True
        return offered

    def _offer(self, request: Request) -> int | None:
        header, status = [_pair(request.header)], [_pair(request.status)]
        data = [_pair(segment) for segment in request.segments]
        if request.write:
            return self.ring.queue.offer(header + data, status)
        return self.ring.queue.offer(header, data + status)

    def _publish(self) -> None:
        if self.ring.queue.publish():
            self.ring.kick()

    def _reap(self) -> bool:
        """Takes what the device has returned; whether that was anything."""
        taken = False
        while (used := self.ring.queue.take()) is not None:
            one = self.open.pop(used[0])
            self._check(one, time.monotonic_ns())
            taken = True
        return taken

    def _check(self, one: Open, now: int) -> None:
        request = one.request
        status = self._guest.read(request.status)[0]
        if status:
            what = _STATUS.get(status, f"status {status}")
            self.failed.append(Failed(self.client, request.number, f"request {request.number} ended with {what}"))
            return
        self._truth.completed(self.client, request)
        if not request.write:
            for segment in request.segments:
                where = f"a read of disk {self.client} into guest memory at {segment.guest:#x}"
                self.differences += differences(where, self._truth.read(segment), self._guest.read(segment))
        self.done.append(Timed(self.client, request.number, request.write, request.length, one.offered, now))

    def _stopped_while_asleep(self) -> bool:
        if self.ring.queue.arm():
            return False
        poll = select.poll()
        poll.register(self.ring.call_fd, select.POLLIN)
        poll.register(self._stop, select.POLLIN)
        ready = {fd for fd, _ in poll.poll(_LOOK_AGAIN_MS)}
        if self.ring.call_fd in ready:
            os.eventfd_read(self.ring.call_fd)
        return self._stop in ready


def _pair(area: Area) -> tuple[int, int]:
    return area.guest, area.size
