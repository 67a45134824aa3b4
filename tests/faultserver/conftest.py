"""Memory with holes, processes that share it, and sources of pages, all real.

The clients are processes of their own (client.py); the server runs in the test's. Nothing sleeps: whatever must happen
is waited for, and counts as never happening after PATIENCE.
"""

from __future__ import annotations

import errno
import itertools
import json
import os
import random
import select
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.faultserver import client as program
from vhostuser.faultserver import Client, FaultServer, FilePiece, MappedFile
from vhostuser.frontend.memory import SharedMemory
from vhostuser.memory import PrivateMemory
from vhostuser.uffd import Mode, NotPermitted, Userfaultfd

PAGE, HUGE, MIB = 4096, 2 << 20, 1 << 20
PATIENCE = 20.0
HUGE_PAGES = Path("/sys/kernel/mm/hugepages/hugepages-2048kB")
content = program.content


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker("postcopy")


@pytest.fixture(scope="session", autouse=True)
def permitted() -> None:
    """Everything here needs a userfaultfd that sees faults in system calls."""
    try:
        Userfaultfd.probe()
    except NotPermitted as error:
        pytest.skip(str(error))


def until(condition: Callable[[], Any], what: str) -> Any:
    """Waits for something that has no descriptor to wait on."""
    end = time.monotonic() + PATIENCE
    while not (found := condition()):
        assert time.monotonic() < end, f"it never happened: {what}"
        time.sleep(0.001)
    return found


class ClientRegion(NamedTuple):
    guest: int
    host: int
    size: int


class Process:
    """A client, seen from the test."""

    def __init__(self, memory: SharedMemory, mode: Mode = Mode.MISSING) -> None:
        self._sock, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._sock.settimeout(PATIENCE)
        command = [sys.executable, program.__file__, str(theirs.fileno())]
        self.process = subprocess.Popen(command, pass_fds=[theirs.fileno()])
        theirs.close()
        regions = memory.map.regions
        hello = {"mode": int(mode), "regions": [(r.guest, r.size, r.offset) for r in regions]}
        socket.send_fds(self._sock, [json.dumps(hello).encode()], memory.fds)
        message, (self.uffd,), _, _ = socket.recv_fds(self._sock, 1 << 16, 1)
        hosts = json.loads(message)
        self.regions = [ClientRegion(r.guest, host, r.size) for r, host in zip(regions, hosts, strict=True)]
        self._jobs = itertools.count()

    def read(self, *reads: Sequence[tuple[int, int]]) -> None:
        """Each argument is a list of reads (guest address, bytes) for a thread of its own. Returns at once."""
        jobs = [(next(self._jobs), list(one)) for one in reads]
        self._sock.send(json.dumps(jobs).encode())

    def answers(self, count: int) -> list[program.Answer]:
        """What ``count`` threads have read, when they have."""
        return [program.Answer(**json.loads(self._sock.recv(1 << 20))) for _ in range(count)]

    def idle(self) -> bool:
        """Whether no thread has answered."""
        return not select.select([self._sock], [], [], 0)[0]

    def kill(self) -> None:
        """SIGKILL."""
        self.process.kill()
        self.process.wait()

    def close(self) -> None:
        self.kill()
        self._sock.close()
        if self.uffd >= 0:
            os.close(self.uffd)
            self.uffd = -1


class Threads:
    """Threads of this process that read the memory: a stand-in for virtual CPUs."""

    def __init__(self, memory: SharedMemory) -> None:
        self._memory = memory.map
        self._threads: list[threading.Thread] = []
        self._answers: list[program.Answer] = []

    def read(self, *reads: Sequence[tuple[int, int]]) -> None:
        for one in reads:
            work = [list(each) for each in one]
            self._threads.append(threading.Thread(target=self._work, args=(work,), daemon=True))
            self._threads[-1].start()

    def _work(self, reads: list[list[int]]) -> None:
        self._answers.append(program.read_all(self._memory, 0, reads))

    def answers(self, count: int = 0) -> list[program.Answer]:
        """Of all threads, however many, when they have done."""
        for thread in self._threads:
            thread.join(PATIENCE)
            assert not thread.is_alive(), "a thread was never woken"
        return self._answers

    def idle(self) -> bool:
        return not self._answers


class Bed:
    """Memory, an image of what belongs there, clients and a server; closed in the right order at the end."""

    def __init__(self) -> None:
        self._close: list[Callable[[], None]] = []
        self.random = random.Random(1)

    def closing(self, thing: Any) -> Any:
        self._close.append(thing.close)
        return thing

    def memory(self, *regions: tuple[int, int], hugetlb: bool = False) -> SharedMemory:
        """Default: one region of 64 small pages at 0."""
        return self.closing(SharedMemory(*(regions or ((0, 64 * PAGE),)), hugetlb=hugetlb))

    def private(self, *regions: tuple[int, int]) -> PrivateMemory:
        """Default: 64 small pages at 0."""
        return PrivateMemory(*(regions or ((0, 64 * PAGE),)))

    def image(self, memory: Any) -> MappedFile:
        """A mapped source that holds what belongs into the memory."""
        pieces = []
        for region in memory.map.regions:
            fd = os.memfd_create("image", os.MFD_CLOEXEC)
            for at in range(0, region.size, HUGE):
                os.pwrite(fd, content(region.guest + at, min(HUGE, region.size - at)), at)
            pieces.append(FilePiece(region.guest, region.size, fd))
        source = MappedFile(*pieces)
        for piece in pieces:
            os.close(piece.fd)
        return self.closing(source)

    def server(self, memory: Any, source: Any = None, **settings: Any) -> FaultServer:
        return self.closing(FaultServer(memory, source or self.image(memory), **settings))

    def pair(self) -> tuple[socket.socket, socket.socket]:
        """Both ends of a wake channel on which HELLO has been said."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        return self.closing(ours), self.closing(theirs)

    def process(self, memory: SharedMemory, mode: Mode = Mode.MISSING) -> Process:
        return self.closing(Process(memory, mode))

    def client(self, server: FaultServer, memory: SharedMemory, **settings: Any) -> tuple[Process, Client]:
        process = self.process(memory, settings.get("mode", Mode.MISSING))
        return process, server.add_client(f"client {process.process.pid}", process.uffd, process.regions, **settings)

    def threads(self, memory: SharedMemory) -> Threads:
        return Threads(memory)

    def close(self) -> None:
        while self._close:
            self._close.pop()()


@contextmanager
def more_huge_pages(count: int) -> Iterator[None]:
    """So many more of 2 MiB than there were, for as long as it lasts. Raises OSError where they cannot be had."""
    total, free = HUGE_PAGES / "nr_hugepages", HUGE_PAGES / "free_hugepages"
    before = int(free.read_text())
    total.write_text(str(int(total.read_text()) + count))
    try:
        if int(free.read_text()) < before + count:
            raise OSError(errno.ENOMEM, f"there is no memory for {count} huge pages")
        yield
    finally:
        total.write_text(str(max(int(total.read_text()) - count, 0)))


@pytest.fixture(scope="session")
def huge_pages() -> Iterator[None]:
    """So many free huge pages as the tests need at a time."""
    with ExitStack() as stack:
        try:
            stack.enter_context(more_huge_pages(16))
        except OSError as error:
            pytest.skip(f"no huge pages of 2 MiB: {error.strerror}")
        yield


@pytest.fixture
def bed() -> Iterator[Bed]:
    made = Bed()
    yield made
    made.close()


def pages(*numbers: int, size: int = PAGE) -> list[tuple[int, int]]:
    """Reads of whole pages at guest address 0."""
    return [(number * size, size) for number in numbers]


def good(answers: Sequence[program.Answer]) -> bool:
    """Whether every page held what it should."""
    return not any(answer.wrong or answer.lost for answer in answers)
