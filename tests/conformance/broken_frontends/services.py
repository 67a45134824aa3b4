"""Faults in what a front-end does because its back-end asks for it.

What belongs here: notify pages, shared memory, shared objects. What does not: how it answers (``channel``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from tests.conformance.broken_frontends.faults import FAULTS, Fault
from tests.conformance.frontends import Life
from vhostuser.channel import Fds
from vhostuser.frontend import BackendServices, ObjectRegistry
from vhostuser.memory import Region
from vhostuser.protocol import U64, MemoryRegion, MmapMsg, Reply, Request, RequestRefused, VringArea
from vhostuser.protocol import BackendRequest as B


def fault(*fails: str) -> Any:
    """Declares the services under it as a front-end's fault of their name."""

    def add(kind: type[BackendServices]) -> type[BackendServices]:
        class Serving(Life):
            def services(self, sizes: Sequence[int]) -> BackendServices:
                return kind(sizes, ObjectRegistry(), self.talk)

        FAULTS[kind.__name__] = Fault(Serving, fails)
        return kind

    return add


def refusing(*codes: B) -> Any:
    """Refuses these requests whatever they say."""

    def call(services: BackendServices, request: Request) -> Reply | None:
        if request.code in codes:
            raise RequestRefused("no")
        return BackendServices.__call__(services, request)

    return call


def accepting(*codes: B) -> Any:
    """Says yes to these and does nothing."""

    def call(services: BackendServices, request: Request) -> Reply | None:
        return None if request.code in codes else BackendServices.__call__(services, request)

    return call


# ---- notify pages


@fault("notifier.given", "notifier.taken-away")
class KeepsPages(BackendServices):
    def __call__(self, request: Request) -> Reply | None:
        if isinstance(request.payload, VringArea) and not request.payload.has_fd:
            raise RequestRefused("the page is in use")
        return super().__call__(request)


@fault("notifier.size", "notifier.offset")
class MapsAnyArea(BackendServices):
    def __call__(self, request: Request) -> Reply | None:
        if not isinstance(request.payload, VringArea) or not request.payload.has_fd:
            return super().__call__(request)
        assert isinstance(request.fds, Fds)
        area = request.payload
        Region.map(request.fds[0], MemoryRegion(0, area.size, 0, area.offset), own=True)
        return None


@fault("notifier.size", "notifier.offset", "notifier.no-file")
class MapsNoPage(BackendServices):
    __call__ = accepting(B.VRING_HOST_NOTIFIER_MSG)


# ---- shared memory

MAPPED = ("shmem.map", "shmem.again", "shmem.neighbours", "shmem.overlap", "shmem.part", "shmem.truncated")


@fault(*MAPPED)
class MapsNothing(BackendServices):
    __call__ = refusing(B.SHMEM_MAP)


@fault("shmem.again", "shmem.part", "shmem.nothing")
class UnmapsNothing(BackendServices):
    __call__ = accepting(B.SHMEM_UNMAP)


@fault("shmem.overlap", "shmem.beyond", "shmem.wraps", "shmem.no-region")
class SaysThatItMaps(BackendServices):
    def __call__(self, request: Request) -> Reply | None:
        try:
            return super().__call__(request)
        except RequestRefused:
            if request.code is B.SHMEM_MAP:
                return None
            raise


@fault("shmem.neighbours")
class CountsToTheEnd(BackendServices):
    """The last byte of a piece is taken for the first behind it."""

    def _shmem_map(self, asked: MmapMsg, fds: Fds) -> None:
        for start, length in self._window(asked).pieces:
            if asked.shm_offset <= start + length and start <= asked.shm_offset + asked.length:
                raise RequestRefused("something is mapped there")
        super()._shmem_map(asked, fds)

    def __call__(self, request: Request) -> Reply | None:
        if request.code is not B.SHMEM_MAP:
            return super().__call__(request)
        assert isinstance(request.payload, MmapMsg)
        assert isinstance(request.fds, Fds)
        return self._shmem_map(request.payload, request.fds)


@fault("shmem.overlap")
class MapsOver(CountsToTheEnd):
    def _shmem_map(self, asked: MmapMsg, fds: Fds) -> None:
        window = self._window(asked)
        for start, length in window.pieces:
            if asked.shm_offset < start + length and start < asked.shm_offset + asked.length:
                window.unmap(replace(asked, shm_offset=start, length=length))
        BackendServices._shmem_map(self, asked, fds)


@fault("shmem.beyond")
class HasMoreRoom(BackendServices):
    def __init__(self, sizes: Sequence[int], *others: Any) -> None:
        super().__init__([size * 2 for size in sizes], *others)


@fault("shmem.part", "shmem.nothing")
class UnmapsAnything(BackendServices):
    def __call__(self, request: Request) -> Reply | None:
        if request.code is not B.SHMEM_UNMAP:
            return super().__call__(request)
        assert isinstance(request.payload, MmapMsg)
        window = self._window(request.payload)
        for start, length in window.pieces:
            if start <= request.payload.shm_offset < start + length:
                window.unmap(replace(request.payload, shm_offset=start, length=length))
        return None


@fault("shmem.truncated")
class LooksAtWhatItUnmaps(BackendServices):
    def __call__(self, request: Request) -> Reply | None:
        if request.code is B.SHMEM_UNMAP and isinstance(request.payload, MmapMsg):
            self._window(request.payload).read(request.payload.shm_offset, 1)
        return super().__call__(request)


# ---- shared objects


@fault("objects.add", "objects.twice")
class TakesNoObjects(BackendServices):
    __call__ = refusing(B.SHARED_OBJECT_ADD)


@fault("objects.twice", "objects.not-there")
class CountsNoObjects(BackendServices):
    __call__ = accepting(B.SHARED_OBJECT_ADD, B.SHARED_OBJECT_REMOVE)


@fault("objects.unknown")
class FindsAnyObject(BackendServices):
    def __call__(self, request: Request) -> Reply | None:
        if request.code is not B.SHARED_OBJECT_LOOKUP:
            return super().__call__(request)
        return Reply(U64(0), (0,))
