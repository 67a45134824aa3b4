"""What the back-end's requests do at a front-end that serves them: windows, notify pages, shared objects.

What belongs here: what is mapped and kept because a back-end asked for it, and what is refused. What does not: the
socket and the answers (``channel``), when a ring stops or a device is reset (``frontend``).

Nothing here waits. What is mapped is touched in C alone, so that a back-end that truncates its file harms nobody.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Sequence
from typing import Any, cast
from uuid import UUID

from vhostuser.channel import Fds
from vhostuser.frontend.channel import Answerer, config_changes_only
from vhostuser.memory import GuestMemory, Region
from vhostuser.protocol import (
    U64,
    BackendRequest,
    MemoryRegion,
    MmapMsg,
    Reply,
    Request,
    RequestRefused,
    Uuid,
    VringArea,
)

B = BackendRequest

MOST_MAPPINGS = 1024
"""Mappings of one back-end at most."""

MOST_OBJECTS = 1024
"""Objects that one table names at most."""


class Window:
    """One shared memory region of the device, as the guest would see it: ``size`` bytes, of which pieces are mapped."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._pieces = GuestMemory()  # "guest addresses" are offsets in the window

    @property
    def pieces(self) -> tuple[tuple[int, int], ...]:
        """Offset and length of what is mapped, in bytes, lowest first."""
        return tuple((piece.guest, piece.size) for piece in self._sorted())

    def _sorted(self) -> list[Region]:
        return sorted(self._pieces.regions, key=lambda piece: piece.guest)

    def map(self, asked: MmapMsg, fd: int) -> None:
        """Maps a piece; the caller keeps ``fd``. Raises RequestRefused."""
        if asked.length <= 0 or any(n % mmap.PAGESIZE for n in (asked.shm_offset, asked.length, asked.fd_offset)):
            raise RequestRefused(f"{asked}: offsets and length are whole pages")
        if asked.shm_offset + asked.length > self.size:
            raise RequestRefused(f"{asked}: the window has {self.size:#x} bytes")
        if len(self._pieces.regions) >= MOST_MAPPINGS:
            raise RequestRefused(f"{MOST_MAPPINGS} pieces are mapped already")
        description = MemoryRegion(asked.shm_offset, asked.length, 0, asked.fd_offset)
        # Overlap is judged first: a piece that does not fit is never mapped at all.
        if any(piece.guest < asked.shm_offset + asked.length and asked.shm_offset < piece.guest + piece.size
               for piece in self._pieces.regions):  # fmt: skip
            raise RequestRefused(f"{asked}: something is mapped there")
        self._pieces = self._pieces.add(Region.map(fd, description, own=True, writable=bool(asked.flags & 1)))

    def unmap(self, asked: MmapMsg) -> None:
        """Unmaps a piece, the whole of it. Raises RequestRefused."""
        for piece in self._pieces.regions:
            if (piece.guest, piece.size) == (asked.shm_offset, asked.length):
                self._pieces = self._pieces.remove(piece)
                return
        raise RequestRefused(f"{asked}: no piece is mapped from there to there")

    def read(self, offset: int, length: int) -> bytes:
        """Copies out. Raises LookupError where nothing is mapped, MemoryLost if the file is gone."""
        return self._pieces.read(offset, length)

    def write(self, offset: int, data: bytes) -> None:
        """Copies in. Raises as ``read``, MemoryLost also for a piece that is read-only."""
        self._pieces.write(offset, data)

    def clear(self) -> None:
        """Unmaps everything."""
        self._pieces = GuestMemory()


class ObjectRegistry:
    """Which device exports which object, by UUID, for all back-ends of one machine. Owns a descriptor of what it has.

    An owner is whatever fetches its objects: a Frontend, whose ``get_shared_object`` is asked.
    """

    def __init__(self) -> None:
        self._owners: dict[UUID, Any] = {}
        self._fds: dict[UUID, int] = {}

    def add(self, uuid: UUID, owner: Any) -> None:
        """``owner`` exports it. Raises RequestRefused if it is exported already."""
        if uuid in self._owners or len(self._owners) >= MOST_OBJECTS:
            raise RequestRefused(f"{uuid} is exported already, or {MOST_OBJECTS} others are")
        self._owners[uuid] = owner

    def remove(self, uuid: UUID, owner: Any) -> None:
        """``owner`` exports it no longer. Raises RequestRefused for another's: "only the back-end owning the entry"."""
        if self._owners.get(uuid) is not owner or owner is None:
            raise RequestRefused(f"{uuid} is not this back-end's")
        self._forget(uuid)

    async def fetch(self, uuid: UUID) -> None:
        """Asks the owner for its descriptor, so that others can be given it. Raises RequestRefused."""
        if uuid not in self._owners:
            raise RequestRefused(f"nobody exports {uuid}")
        fd = await self._owners[uuid].get_shared_object(uuid)
        self._put(uuid, fd)

    def _put(self, uuid: UUID, fd: int) -> None:
        if (old := self._fds.pop(uuid, -1)) >= 0:
            os.close(old)
        self._fds[uuid] = fd

    def find(self, uuid: UUID) -> int:
        """A descriptor, which stays the registry's. Raises RequestRefused: it was not fetched."""
        if uuid not in self._fds:
            raise RequestRefused(f"there is no object {uuid} at hand")
        return self._fds[uuid]

    def forget(self, owner: Any) -> None:
        """``owner`` has gone, and everything that it exported."""
        for uuid in [uuid for uuid, its in self._owners.items() if its is owner]:
            self._forget(uuid)

    def _forget(self, uuid: UUID) -> None:
        self._owners.pop(uuid, None)
        if (fd := self._fds.pop(uuid, -1)) >= 0:
            os.close(fd)

    def close(self) -> None:
        """Closes what it has."""
        for uuid in list(self._owners):
            self._forget(uuid)


class BackendServices:
    """Answers the back-end's requests by doing what they ask: an ``Answerer``.

    sizes: bytes of each shared memory region by id, as ``get_shmem_config`` returns them. objects, owner: the registry,
    and who exports what this back-end adds. otherwise: decides about all other requests.
    """

    def __init__(
        self,
        sizes: Sequence[int] = (),
        objects: ObjectRegistry | None = None,
        owner: object = None,
        otherwise: Answerer = config_changes_only,
    ) -> None:
        self.windows = {shmid: Window(size) for shmid, size in enumerate(sizes) if size}
        self._notify: dict[int, GuestMemory] = {}
        self._objects = objects
        self._owner = owner
        self._otherwise = otherwise

    def __call__(self, request: Request) -> Reply | None:
        serve = _SERVED.get(cast(BackendRequest, request.code))
        if serve is None:
            return self._otherwise(request)
        assert isinstance(request.fds, Fds)
        return serve(self, request.payload, request.fds)

    # ---- notify pages

    @property
    def notify_pages(self) -> frozenset[int]:
        """Rings that have one."""
        return frozenset(self._notify)

    def notify(self, index: int) -> None:
        """What the guest does instead of a kick: writes the ring's number to its page. Raises KeyError, MemoryLost."""
        self._notify[index].write(0, index.to_bytes(2, "little"))

    def ring_stopped(self, index: int) -> None:
        """GET_VRING_BASE: its page is taken away."""
        self._notify.pop(index, None)

    def _host_notifier(self, area: VringArea, fds: Fds) -> None:
        self._notify.pop(area.index, None)  # "de-register the existing notifier if any"
        if not area.has_fd:
            return
        if area.size != mmap.PAGESIZE or area.offset % mmap.PAGESIZE:
            raise RequestRefused(f"{area}: expected one page of {mmap.PAGESIZE} bytes")
        region = Region.map(fds[0], MemoryRegion(0, area.size, 0, area.offset), own=True)
        self._notify[area.index] = GuestMemory([region])

    # ---- shared memory

    def _window(self, asked: MmapMsg) -> Window:
        if asked.shmid not in self.windows:
            raise RequestRefused(f"there is no shared memory region {asked.shmid}")
        return self.windows[asked.shmid]

    def _shmem_map(self, asked: MmapMsg, fds: Fds) -> None:
        self._window(asked).map(asked, fds[0])

    def _shmem_unmap(self, asked: MmapMsg, _: Fds) -> None:
        self._window(asked).unmap(asked)

    # ---- shared objects

    @property
    def _registry(self) -> ObjectRegistry:
        if self._objects is None:
            raise RequestRefused("no objects are shared here")
        return self._objects

    def _object_add(self, uuid: Uuid, _: Fds) -> None:
        self._registry.add(UUID(bytes=uuid.value), self._owner)

    def _object_remove(self, uuid: Uuid, _: Fds) -> None:
        self._registry.remove(UUID(bytes=uuid.value), self._owner)

    def _object_lookup(self, uuid: Uuid, _: Fds) -> Reply:
        return Reply(U64(0), (self._registry.find(UUID(bytes=uuid.value)),))

    # ---- the end

    def reset(self) -> None:
        """RESET_DEVICE: mappings go "across device reset", and the pages of the rings, which it disables, with them."""
        self._notify.clear()
        for window in self.windows.values():
            window.clear()

    def close(self) -> None:
        """The back-end has gone."""
        self.reset()
        if self._objects is not None:
            self._objects.forget(self._owner)


_SERVED: dict[BackendRequest, Callable[[BackendServices, Any, Fds], Reply | None]] = {
    B.VRING_HOST_NOTIFIER_MSG: BackendServices._host_notifier,
    B.SHMEM_MAP: BackendServices._shmem_map,
    B.SHMEM_UNMAP: BackendServices._shmem_unmap,
    B.SHARED_OBJECT_ADD: BackendServices._object_add,
    B.SHARED_OBJECT_REMOVE: BackendServices._object_remove,
    B.SHARED_OBJECT_LOOKUP: BackendServices._object_lookup,
}
