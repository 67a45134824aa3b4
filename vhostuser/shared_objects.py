"""Shared objects: descriptors, of dma-bufs mostly, that devices hand to each other by UUID, the front-end between them.

What belongs here: what a device exports, which is owned here, and what it imports. What does not: messages
(``announcements``), what is in an object.
"""

from __future__ import annotations

import os
from uuid import UUID

from vhostuser.announcements import Announcements
from vhostuser.hooks import Hook
from vhostuser.protocol import BackendRequest, ProtocolFeature, RequestRefused, Uuid

MOST_OBJECTS = 1024
"""Objects that one device exports at most."""


class ObjectTable:
    """What one device exports to one front-end, by UUID. Owns a descriptor of each.

    The coroutines may be awaited on any loop; they raise RequestRefused where the front-end refuses or cannot be asked.
    """

    def __init__(self, asking: Announcements) -> None:
        self._asking = asking
        self._objects: dict[UUID, int] = {}

    async def add(self, uuid: UUID, fd: int) -> None:
        """Exports the object (SHARED_OBJECT_ADD); ``fd`` stays the caller's. Raises OSError if it is no descriptor."""
        await self._asking.run(self._add(uuid, os.dup(fd)))

    async def _add(self, uuid: UUID, fd: int) -> None:
        if uuid in self._objects or len(self._objects) >= MOST_OBJECTS:
            os.close(fd)
            taken = uuid in self._objects
            raise RequestRefused(f"{uuid} is exported already" if taken else f"{MOST_OBJECTS} objects are exported")
        # From now on, for another device may ask for it before our answer is here.
        self._objects[uuid] = fd
        try:
            await self._asking.ask(BackendRequest.SHARED_OBJECT_ADD, Uuid(uuid.bytes))
        except BaseException:
            self._drop(uuid)
            raise

    async def remove(self, uuid: UUID) -> None:
        """Exports it no longer (SHARED_OBJECT_REMOVE), whatever the front-end says to that."""
        await self._asking.run(self._remove(uuid))

    async def _remove(self, uuid: UUID) -> None:
        if uuid not in self._objects:
            raise RequestRefused(f"{uuid} is not exported")
        self._drop(uuid)
        await self._asking.ask(BackendRequest.SHARED_OBJECT_REMOVE, Uuid(uuid.bytes))

    async def look_up(self, uuid: UUID) -> int:
        """A descriptor of what another device exports (SHARED_OBJECT_LOOKUP); it is the caller's to close."""
        return await self._asking.run(self._look_up(uuid), os.close)

    async def _look_up(self, uuid: UUID) -> int:
        _, fds = await self._asking.ask(BackendRequest.SHARED_OBJECT_LOOKUP, Uuid(uuid.bytes))
        return fds.take()

    def find(self, uuid: UUID) -> int:
        """A descriptor of our own object, which stays ours (GET_SHARED_OBJECT). Control thread. Raises
        RequestRefused."""
        if uuid not in self._objects:
            raise RequestRefused(f"{uuid} is not exported")
        return self._objects[uuid]

    def _drop(self, uuid: UUID) -> None:
        if (fd := self._objects.pop(uuid, -1)) >= 0:
            os.close(fd)

    def close(self) -> None:
        """The front-end has gone, and forgets what was exported to it."""
        for uuid in list(self._objects):
            self._drop(uuid)


class SharedObjects(Hook):
    """Mix it into a ``Device`` that exports or imports objects (SHARED_OBJECT)."""

    offers = ProtocolFeature.SHARED_OBJECT.mask

    table: ObjectTable | None = None
    """The runtime's: of the front-end that is served now."""

    @property
    def objects(self) -> ObjectTable:
        """What is exported to the front-end that is served now. Raises RequestRefused if there is none."""
        if self.table is None:
            raise RequestRefused("no front-end is served")
        return self.table
