"""Fixtures that several groups of tests share."""

import asyncio
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest

from vhostuser.backend import Backend
from vhostuser.dataplane import new_event_loop
from vhostuser.device import Device
from vhostuser.driverqueue import DriverQueue
from vhostuser.frontend import Frontend, FrontendRing, SharedMemory

MIB = 1 << 20
HUGE_PAGES = Path("/sys/kernel/mm/hugepages/hugepages-2048kB")


class Pair:
    """A back-end and a front-end in one process, connected."""

    def __init__(self, backend: Backend, frontend: Frontend, serving: asyncio.Task[None]) -> None:
        self.backend = backend
        self.frontend = frontend
        self.serving = serving
        self.memory: SharedMemory | None = None
        self.rings: list[FrontendRing] = []

    async def set_up(self, *, rings: int = 1, size: int = 64, event_idx: bool = True, enable: bool = True) -> None:
        """Negotiates everything, shares 4 MiB of memory at guest address 0 and starts the rings."""
        self.memory = SharedMemory((0, 4 * MIB))
        await self.frontend.negotiate()
        await self.frontend.set_memory(self.memory)
        for index in range(rings):
            ring = self.add_ring(index, size=size, event_idx=event_idx)
            await self.frontend.start_ring(ring, self.memory, enable=enable)

    def add_ring(self, index: int, *, size: int = 64, event_idx: bool = False) -> FrontendRing:
        """A driver's ring in the memory; the back-end does not know it yet."""
        assert self.memory is not None
        queue = DriverQueue(self.memory.map, index * 64 * 1024, size, event_idx=event_idx)
        self.rings.append(FrontendRing(index, queue))
        return self.rings[-1]

    async def close(self) -> None:
        """Disconnects and waits until the back-end has cleaned up; may be called again."""
        self.frontend.close()
        done, _ = await asyncio.wait((self.serving,), timeout=10)
        assert done, "the back-end does not end"
        assert self.serving.cancelled() or self.serving.exception() is None
        while self.rings:
            self.rings.pop().close()
        if self.memory is not None:
            self.memory.close()


def connect(device: Device | Callable[[], Device], **options: object) -> Pair:
    """A pair on a socket pair; call ``close`` at the end."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    backend = Backend(device, **options)  # type: ignore[arg-type]
    return Pair(backend, Frontend(ours), asyncio.ensure_future(backend.serve(theirs, "test")))


@pytest.fixture
async def pairs() -> AsyncIterator[Callable[..., Pair]]:
    """Makes pairs that are closed at the end of the test."""
    made: list[Pair] = []

    def make(device: Device | Callable[[], Device], **options: object) -> Pair:
        made.append(connect(device, **options))
        return made[-1]

    yield make
    for pair in made:
        await pair.close()


def open_fds() -> dict[int, str]:
    """This process's descriptors and what they are."""
    found = {}
    for entry in Path("/proc/self/fd").iterdir():
        try:
            found[int(entry.name)] = str(entry.readlink())
        except OSError:  # the directory's own
            continue
    return found


def threads() -> int:
    """This process's threads."""
    return len(list(Path("/proc/self/task").iterdir()))


@pytest.fixture
def no_leaks() -> Iterator[None]:
    """Fails if the test leaves descriptors behind."""
    new_event_loop().close()  # uvloop keeps a pipe for signals from its first loop on
    before = open_fds()
    yield
    left = {fd: what for fd, what in open_fds().items() if fd not in before}
    assert not left, f"descriptors left open: {left}"


@pytest.fixture(scope="session")
def huge_pages() -> Iterator[None]:
    """64 huge pages of 2 MiB that nobody else uses, for this session."""
    free = HUGE_PAGES / "free_hugepages"
    total = HUGE_PAGES / "nr_hugepages"
    if not HUGE_PAGES.exists():
        pytest.skip("the kernel has no huge pages of 2 MiB")
    before, wanted = int(total.read_text()), 64
    if int(free.read_text()) < wanted:
        try:
            total.write_text(str(before + wanted))
        except OSError as error:
            pytest.skip(f"too few free huge pages and no right to add some: {error.strerror}")
    if int(free.read_text()) < wanted:
        pytest.skip(f"there is no memory for {wanted} huge pages")
    yield
    if int(total.read_text()) == before + wanted:
        total.write_text(str(before))
