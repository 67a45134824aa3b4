"""A guest's IOMMU as a front-end plays it: mappings that come and go, and the back-end's questions about them.

What belongs here: what is mapped where, answering misses, taking mappings back. What does not: guest memory
(``memory``), the back-end's channel as such (``channel``). Section "IOMMU support".
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import NamedTuple

from vhostuser.frontend.frontend import Frontend
from vhostuser.frontend.memory import SharedMemory
from vhostuser.protocol import BackendRequest, Iotlb, IotlbType, Request, RequestRefused

PAGE = 4096
READ, WRITE, BOTH = 1, 2, 3


class Mapping(NamedTuple):
    """``size`` bytes of I/O virtual addresses that are guest memory from ``guest`` on, all of it in one region."""

    iova: int
    guest: int
    size: int
    access: int


def _without(mapping: Mapping, start: int, stop: int) -> Iterator[Mapping]:
    """What is left of a mapping beside a range."""
    end = mapping.iova + mapping.size
    if mapping.iova < start:
        yield mapping._replace(size=min(end, start) - mapping.iova)
    if end > stop:
        skipped = max(stop - mapping.iova, 0)
        yield mapping._replace(iova=mapping.iova + skipped, guest=mapping.guest + skipped, size=mapping.size - skipped)


class Iommu:
    """Serves the back-end's channel for ``frontend``, which has negotiated ACCESS_PLATFORM. Belongs to its loop.

    view: the memory as a driver sees it that writes I/O virtual addresses into its rings: in ``SharedMemory``'s terms
    these are its guest addresses. It has what was mapped, also after that was taken back. granule: bytes of what one
    miss is answered with, at most.
    """

    def __init__(self, frontend: Frontend, memory: SharedMemory, *, granule: int = PAGE) -> None:
        self._frontend = frontend
        self.memory = memory
        self._granule = granule
        self._mappings: list[Mapping] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._asked = asyncio.Event()
        self.view = SharedMemory()
        self.misses: list[Iotlb] = []
        """Every miss so far."""
        self.failures: list[Iotlb] = []
        """Every access failure that was reported."""
        self.answering = asyncio.Event()
        """While it is cleared misses are noted, and answered later."""
        self.answering.set()

    async def serve(self) -> None:
        """Gives the back-end its channel."""
        await self._frontend.serve_backend(self._decide)

    # ---- what is mapped

    def map(self, iova: int, guest: int, size: int, access: int = BOTH) -> None:
        """Maps whole pages; the back-end is not told before it asks. Raises RequestRefused where something is in the
        view already, LookupError outside of memory."""
        mapping = Mapping(iova, guest, size, access)
        self._see(mapping)
        self._mappings.append(mapping)

    def remap(self, iova: int, guest: int, size: int, access: int = BOTH) -> None:
        """Maps what was taken back to other memory. The view stays what it was, the back-end is not told."""
        self._mappings.append(Mapping(iova, guest, size, access))

    async def unmap(self, iova: int, size: int) -> None:
        """Takes back what is mapped there, and has the back-end forget it; returns when it has."""
        self._mappings = [left for each in self._mappings for left in _without(each, iova, iova + size)]
        await self._frontend.iotlb_msg(Iotlb(iova, size, 0, 0, IotlbType.INVALIDATE))

    def _see(self, mapping: Mapping) -> None:
        for region in self.memory.regions:
            inside = mapping.guest - region.region.guest
            if inside >= 0 and inside + mapping.size <= region.region.size:
                offset = region.region.offset + inside
                self.view.add(mapping.iova, mapping.size, offset=offset, file=region.fd)
                return
        raise LookupError(f"guest address {mapping.guest:#x} with {mapping.size:#x} bytes lies in no one region")

    def update(self, iova: int) -> Iotlb | None:
        """What the back-end is told of an address; None if nothing is mapped there."""
        for each in self._mappings:
            if each.iova <= iova < each.iova + each.size:
                start = max(iova - iova % self._granule, each.iova)
                size = min(self._granule, each.iova + each.size - start)
                user = self.user(each.guest + start - each.iova)
                return Iotlb(start, size, user, each.access, IotlbType.UPDATE)
        return None

    def user(self, guest: int) -> int:
        """The user address of a guest address, as updates have it. Raises LookupError outside of memory."""
        return self.memory.map.guest_to_user(guest)

    async def tell(self, iova: int, size: int) -> None:
        """Updates for a range before anybody asks, as QEMU does it for used rings."""
        end = iova + size
        while iova < end:
            message = self.update(iova)
            if message is None:
                raise LookupError(f"nothing is mapped at I/O virtual address {iova:#x}")
            await self._frontend.iotlb_msg(message)
            iova = message.iova + message.size

    # ---- what is asked

    async def asked(self, count: int = 1) -> list[Iotlb]:
        """Waits for so many misses since the beginning; all of them."""
        while len(self.misses) < count:
            self._asked.clear()
            await self._asked.wait()
        return self.misses

    async def failed(self) -> Iotlb:
        """Waits for an access failure; the first."""
        while not self.failures:
            self._asked.clear()
            await self._asked.wait()
        return self.failures[0]

    def _decide(self, request: Request) -> None:
        """Notes it. A miss is answered by an update of its own, which cannot wait in here."""
        if request.code is not BackendRequest.IOTLB_MSG:
            if request.code is not BackendRequest.CONFIG_CHANGE_MSG:
                raise RequestRefused(f"{request.code.name} is not served here")
            return
        assert isinstance(request.payload, Iotlb)
        self._note(request.payload)

    def _note(self, message: Iotlb) -> None:
        self._asked.set()
        if message.type == IotlbType.ACCESS_FAIL:
            self.failures.append(message)
            return
        self.misses.append(message)
        task = asyncio.ensure_future(self._answer(message))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _answer(self, miss: Iotlb) -> None:
        await self.answering.wait()
        if (message := self.update(miss.iova)) is not None:
            await self._frontend.iotlb_msg(message)

    def close(self) -> None:
        """Answers nothing any more, and closes the view. Again: nothing."""
        for task in self._tasks:
            task.cancel()
        self.view.close()
