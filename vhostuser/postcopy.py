"""The back-end's half of postcopy, for one connection.

What belongs here: the effects of the handshake on descriptors and mappings, in the order that keeps pages from being
filled with zeros. What does not: which message is allowed when (``protocol.postcopy``), what outlives the connection
(``record``), and bringing pages: the front-end does.

Nothing here touches guest memory. All methods belong to the control thread.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress

from vhostuser.memory import GuestMemory, MemoryLost, Region
from vhostuser.protocol import RequestRefused, WakeRange
from vhostuser.uffd import NotPermitted, TouchPool, Userfaultfd


class Postcopy:
    """Owns the userfaultfd that is shared with the front-end, from ADVISE until END or until the front-end is lost.

    A fault in a registered region goes to the front-end, which reads it from its duplicate of the descriptor, brings
    the page and wakes us. ``pool``: the touch threads of the process. ``device_fd``: as in ``Userfaultfd.open``.
    """

    def __init__(self, pool: TouchPool, *, device_fd: int = -1) -> None:
        self._pool = pool
        self._device_fd = device_fd
        self._uffd: Userfaultfd | None = None
        self._listening = False

    @property
    def active(self) -> bool:
        """Whether pages of guest memory may be missing: from LISTEN until END, or until ``revoke``."""
        return self._listening

    def touch_pool(self) -> TouchPool:
        """For the queues that are opened while ``active``."""
        return self._pool

    def advise(self) -> int:
        """The descriptor to send, which stays ours; the same one when asked again. Raises RequestRefused."""
        if self._uffd is None:
            try:
                self._uffd = Userfaultfd.open(self._device_fd)
            except NotPermitted as error:
                raise RequestRefused(str(error)) from None
        return self._uffd.fileno()

    def listen(self) -> None:
        """From here memory has holes. Again: nothing. Raises RequestRefused without ``advise``."""
        self._shared()
        self._listening = True

    def register(self, regions: Iterable[Region]) -> None:
        """Makes regions usable that were mapped out of reach: the front-end now knows where they are.

        Raises RequestRefused if the kernel will not watch a region, which then stays out of reach.
        """
        uffd = self._shared()
        for region in regions:
            try:
                region.no_huge()
                uffd.register(region.base, region.length)
            except OSError as error:
                raise RequestRefused(
                    f"{region}: userfaultfd cannot watch it ({error.strerror}): share a memfd, tmpfs or hugetlbfs file"
                ) from None
            with suppress(MemoryLost):  # released before the front-end acknowledged it
                region.reveal()

    def release(self, region: Region) -> None:
        """Before the front-end is told that it may forget ``region``: whoever waits in it gets an error.

        The front-end needs the region's base to wake anybody, so afterwards nobody would.
        """
        region.revoke()
        self._shared().unregister(region.base, region.length)

    def wake(self, memory: GuestMemory, ranges: Iterable[WakeRange]) -> int:
        """Whoever waits in these guest ranges looks again: the wake channel's way. Only while ``active``.

        Returns the bytes of them that are mapped, each range for itself. Where nobody watches nobody waits either, so a
        region that is not registered yet, or no longer, counts as any other.
        """
        uffd = self._shared()
        issued = 0
        for one in ranges:
            for pages in memory.guest_to_pages(*one):
                uffd.wake(pages.host, pages.length)
                issued += pages.inside
        return issued

    def end(self, memory: GuestMemory) -> None:
        """Every page has arrived. What was never sent is a hole for good and reads as zeros. Again: nothing.

        Call it before anything that waits for requests under way: nobody answers a fault any more, and one of the last
        pages may have come between a thread's look at it and its falling asleep. This wakes that thread.
        """
        self._part(memory)

    def revoke(self, memory: GuestMemory) -> None:
        """The front-end is lost: where pages may be missing nobody touches ``memory`` again; who waits gets an error.

        Closing the userfaultfd first would have the kernel place zero pages, for the whole guest and for good.
        Takes 10 ms per GiB of mapped pages; raises OSError if the kernel refuses, and then leaves the userfaultfd open,
        since waiting is better than zeros. Again: nothing.
        """
        if self._listening:
            memory.revoke()
        self._part(memory)

    def _shared(self) -> Userfaultfd:
        if self._uffd is None:
            raise RequestRefused("the front-end has no userfaultfd of ours: POSTCOPY_ADVISE comes first")
        return self._uffd

    def _part(self, memory: GuestMemory) -> None:
        """Unregisters and closes. The front-end may hold its duplicate for ever, so closing ours would wake nobody."""
        if self._uffd is None:
            return
        if self._listening:
            for region in memory.regions:
                self._uffd.unregister(region.base, region.length)
        self._listening = False
        self._uffd.close()
        self._uffd = None
