"""Shared memory regions of a device: files that the front-end maps for the guest, in windows that the device describes.

What belongs here: what is mapped where, and whether more fits. What does not: messages (``announcements``), the
front-end's half (``frontend.windows``).

After specification 10.0: bit 22, GET_SHMEM_CONFIG, SHMEM_MAP and SHMEM_UNMAP. Virtio calls them shared memory regions.
"""

from __future__ import annotations

import asyncio
import contextlib
import mmap
from collections.abc import Mapping

from vhostuser.announcements import Announcements
from vhostuser.backend_channel import Answered
from vhostuser.hooks import Hook
from vhostuser.protocol import SHMEM_REGIONS, BackendRequest, MmapMsg, ProtocolFeature, RequestRefused, ShmemConfig

MOST_MAPPINGS = 1024
"""Mappings of one device at most; each costs the front-end a piece of its address space."""


def shmem_config(sizes: Mapping[int, int]) -> ShmemConfig:
    """What GET_SHMEM_CONFIG says of regions of so many bytes, by id. Raises ValueError: ids are 0 to 255, sizes whole
    pages."""
    wrong = [shmid for shmid, size in sizes.items() if not 0 <= shmid < SHMEM_REGIONS or size <= 0 or _odd(size)]
    if wrong:
        raise ValueError(f"shared memory region {wrong[0]} of {sizes[wrong[0]]} bytes: ids are 0 to 255, sizes pages")
    return ShmemConfig(len(sizes), tuple(sizes.get(shmid, 0) for shmid in range(SHMEM_REGIONS)))


class Mappings:
    """What one front-end has mapped for one device.

    The coroutines may be awaited on any loop; they raise RequestRefused where the front-end refuses, cannot be asked,
    or what is asked is not right. Where REPLY_ACK was not negotiated nobody learns whether it has mapped anything.
    """

    def __init__(self, asking: Announcements, sizes: Mapping[int, int]) -> None:
        self._asking = asking
        self._sizes = sizes
        self._mapped: list[MmapMsg] = []

    @property
    def mapped(self) -> tuple[MmapMsg, ...]:
        """What is mapped, or being mapped or unmapped."""
        return tuple(self._mapped)

    async def map(
        self, shmid: int, offset: int, length: int, fd: int, *, fd_offset: int = 0, writable: bool = False
    ) -> None:
        """Has ``length`` bytes of the file from ``fd_offset`` on mapped at ``offset`` of region ``shmid``.

        Offsets and lengths are whole pages; nothing may be mapped there yet. ``fd`` stays the caller's.
        """
        await self._asking.run(self._map(MmapMsg(shmid, fd_offset, offset, length, int(writable)), fd))

    async def unmap(self, shmid: int, offset: int) -> None:
        """Takes away the whole of what was mapped at ``offset`` of region ``shmid``."""
        await self._asking.run(self._unmap(shmid, offset))

    async def _map(self, area: MmapMsg, fd: int) -> None:
        self._check(area)
        answered = self._asking.request(BackendRequest.SHMEM_MAP, area, (fd,))
        self._mapped.append(area)
        answered.add_done_callback(lambda done: self._forget(area) if _refused(done) else None)
        try:
            await self._asking.settled(answered, BackendRequest.SHMEM_MAP)
        except BaseException:
            # Nobody waits any more. If it is mapped after all, nobody knows, and it must not stay.
            answered.add_done_callback(lambda done: self._unwanted(area, done))
            raise
        answered.result()

    def _check(self, area: MmapMsg) -> None:
        size = self._sizes.get(area.shmid, 0)
        if not size:
            raise RequestRefused(f"there is no shared memory region {area.shmid}")
        if area.length <= 0 or any(map(_odd, (area.shm_offset, area.length, area.fd_offset))):
            raise RequestRefused(f"{_words(area)} from {area.fd_offset:#x} of a file: expected whole pages")
        if area.shm_offset + area.length > size:
            raise RequestRefused(f"{_words(area)}: the region has {size:#x} bytes")
        if any(_overlap(area, other) for other in self._mapped):
            raise RequestRefused(f"{_words(area)}: something is mapped there")
        if len(self._mapped) >= MOST_MAPPINGS:
            raise RequestRefused(f"{MOST_MAPPINGS} pieces are mapped already")

    async def _unmap(self, shmid: int, offset: int) -> None:
        area = next((each for each in self._mapped if (each.shmid, each.shm_offset) == (shmid, offset)), None)
        if area is None:
            raise RequestRefused(f"nothing is mapped at {offset:#x} of shared memory region {shmid}")
        answered = self._take_back(area)
        await self._asking.settled(answered, BackendRequest.SHMEM_UNMAP)
        answered.result()

    def _take_back(self, area: MmapMsg) -> asyncio.Future[Answered]:
        answered = self._asking.request(BackendRequest.SHMEM_UNMAP, area)
        # Also where the front-end says no: it has nothing there, after a reset say.
        answered.add_done_callback(lambda _: self._forget(area))
        return answered

    def _unwanted(self, area: MmapMsg, answered: asyncio.Future[Answered]) -> None:
        if not _refused(answered):
            with contextlib.suppress(RequestRefused):
                self._take_back(area)

    def _forget(self, area: MmapMsg) -> None:
        self._mapped = [each for each in self._mapped if each is not area]

    def reset(self) -> None:
        """The device was reset: the front-end has unmapped everything by itself."""
        self._mapped = []


def _refused(answered: asyncio.Future[Answered]) -> bool:
    return answered.cancelled() or answered.exception() is not None


def _overlap(one: MmapMsg, other: MmapMsg) -> bool:
    return (
        one.shmid == other.shmid
        and one.shm_offset < other.shm_offset + other.length
        and other.shm_offset < one.shm_offset + one.length
    )


def _odd(number: int) -> bool:
    return number % mmap.PAGESIZE != 0


def _words(area: MmapMsg) -> str:
    return f"{area.length:#x} bytes at {area.shm_offset:#x} of shared memory region {area.shmid}"


class SharedMemoryRegions(Hook):
    """Mix it into a ``Device`` that has shared memory regions (SHMEM)."""

    offers = ProtocolFeature.SHMEM.mask | ProtocolFeature.BACKEND_SEND_FD.mask

    shmem_sizes: Mapping[int, int] = {}
    """Bytes of each region by its id, 0 to 255: whole pages, and the same as long as the device lives."""

    mappings: Mappings | None = None
    """The runtime's: of the front-end that is served now."""

    @property
    def shmem(self) -> Mappings:
        """What the front-end that is served now has mapped. Raises RequestRefused if there is none."""
        if self.mappings is None:
            raise RequestRefused("no front-end is served")
        return self.mappings
