"""The back-end's half of the handshake: what becomes of mappings, of those who wait, and of the shared file."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vhostuser.memory import GuestMemory, MemoryLost, Region
from vhostuser.postcopy import Postcopy
from vhostuser.protocol import RequestRefused
from vhostuser.uffd import TouchPool

PAGES = 8
USER = 0x7000_0000_0000
"""An address at which this process has nothing; a multiple of 2 MiB."""


@dataclass
class File:
    """A file of guest memory without any page."""

    fd: int
    page_size: int
    user: int = USER

    def describe(self, guest: int = 0, offset: int = 0) -> Any:
        return SimpleNamespace(guest=guest, size=PAGES * self.page_size, user=self.user, offset=offset)

    def map(self, guest: int = 0) -> Region:
        """As in postcopy: at the front-end's address, out of reach."""
        return Region.map(self.fd, self.describe(guest), at_user=True, hidden=True)

    @property
    def blocks(self) -> int:
        return os.fstat(self.fd).st_blocks


@pytest.fixture
def file(page_size: int) -> Iterator[Callable[[], File]]:
    """Makes files; each lies behind the one before in the front-end's address space."""
    made: list[File] = []

    def make() -> File:
        huge = os.MFD_HUGETLB | os.MFD_HUGE_2MB if page_size > 4096 else 0
        fd = os.memfd_create("guest", os.MFD_CLOEXEC | huge)
        os.ftruncate(fd, PAGES * page_size)
        made.append(File(fd, page_size, USER + len(made) * PAGES * page_size))
        return made[-1]

    yield make
    for one in made:
        if one.fd >= 0:
            os.close(one.fd)


@pytest.fixture
def half(pool: TouchPool) -> Iterator[Postcopy]:
    made = Postcopy(pool)
    yield made
    made.revoke(GuestMemory())


def listen(half: Postcopy, *regions: Region) -> GuestMemory:
    """The handshake up to the front-end's acknowledgement."""
    half.advise()
    half.listen()
    half.register(regions)
    return GuestMemory(regions)


@contextmanager
def front_end(half: Postcopy, region: Region, file: File, *, serve: bool) -> Iterator[None]:
    """Another process with the same memory and a duplicate of our userfaultfd."""
    uffd = half.advise()
    arguments = [file.fd, uffd, region.base, file.page_size, "serve" if serve else "hold"]
    process = subprocess.Popen(
        [sys.executable, Path(__file__).with_name("front_end.py"), *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
        pass_fds=[file.fd, uffd],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdin and process.stdout
    try:
        assert process.stdout.readline() == b"ready\n"
        yield
    finally:
        process.stdin.close()
        process.stdout.close()
        process.wait(10)


def wait_for_faults(half: Postcopy, count: int, readable: Callable[[int], bool]) -> None:
    """Until ``count`` threads wait; what they wait for is nobody's business any more."""
    uffd = half._uffd
    assert uffd is not None
    while count > 0:
        assert readable(uffd.fileno())
        count -= len(uffd.read())


class Reading:
    """Starts to read a byte of guest memory, which may wait for a page; the byte, or MemoryLost, is its result.

    On a thread of its own, so that a rule that is broken fails the test and does not stop it for ever.
    """

    def __init__(self, background: Any) -> None:
        self._background = background

    def __call__(self, memory: GuestMemory, guest: int) -> Any:
        def attempt() -> bytes | type[MemoryLost]:
            try:
                return memory.read(guest, 1)
            except MemoryLost:
                return MemoryLost

        return self._background(attempt)


@pytest.fixture
def reading(background: Any) -> Reading:
    return Reading(background)


# ---- ADVISE, LISTEN, the memory table, the acknowledgement


def test_advise_gives_one_descriptor_until_the_end(half: Postcopy) -> None:
    """QEMU sends ADVISE once per queue pair; each descriptor of ours would be polled and woken for nothing."""
    assert half.advise() == half.advise()
    assert not half.active
    half.end(GuestMemory())
    assert not half.active


def test_advise_is_refused_where_no_userfaultfd_can_be_had(pool: TouchPool) -> None:
    with Path("/dev/null").open("r+b", buffering=0) as wrong:
        half = Postcopy(pool, device_fd=wrong.fileno())
        with pytest.raises(RequestRefused, match="ENOTTY"):
            half.advise()


def test_listen_needs_advise(half: Postcopy) -> None:
    with pytest.raises(RequestRefused, match="POSTCOPY_ADVISE"):
        half.listen()
    half.advise()
    half.listen()
    half.listen()
    assert half.active


def test_regions_lie_at_the_addresses_of_the_front_end(half: Postcopy, file: Callable[[], File]) -> None:
    """QEMU files a back-end's requests under our address and looks for them under its own."""
    first, second = file(), file()
    regions = first.map(), second.map(1 << 40)
    assert [region.host for region in regions] == [first.user, second.user]
    listen(half, *regions)


def test_a_region_whose_address_is_taken_lies_elsewhere(half: Postcopy, file: Callable[[], File]) -> None:
    one = file()
    first, second = one.map(), one.map(1 << 40)
    assert first.host == one.user != second.host


def test_nothing_can_be_touched_before_the_acknowledgement(
    half: Postcopy, file: Callable[[], File], reading: Reading
) -> None:
    one = file()
    region = one.map()
    half.advise()
    half.listen()
    assert reading(GuestMemory([region]), 0).result() is MemoryLost
    assert one.blocks == 0


def test_another_process_places_and_wakes(half: Postcopy, file: Callable[[], File], reading: Reading) -> None:
    """The division of labour that the protocol rests on: COPY by their userfaultfd, WAKE by ours."""
    one = file()
    region = one.map()
    memory = listen(half, region)
    with front_end(half, region, one, serve=True):
        for page in (3, 0, 7):
            assert reading(memory, page * one.page_size + 5).result() == bytes([page + 1])
            memory.write(page * one.page_size, b"!")
            assert memory.read(page * one.page_size, 2) == bytes([ord("!"), page + 1])
    half.end(memory)


def test_memory_that_cannot_be_watched_stays_out_of_reach(half: Postcopy, tmp_path: Path, reading: Reading) -> None:
    """A file of a disk: postcopy is not for it, and reading it would look like guest memory."""
    path = tmp_path / "memory"
    path.write_bytes(b"x" * 4096 * PAGES)
    if os.statvfs(path).f_bavail == 0 or "tmpfs" in _file_system(path):
        pytest.skip("the temporary directory is a tmpfs")
    with path.open("r+b") as opened:
        region = Region.map(opened.fileno(), SimpleNamespace(guest=0, size=4096, user=0, offset=0), hidden=True)
        half.advise()
        half.listen()
        with pytest.raises(RequestRefused, match="memfd"):
            half.register([region])
        assert reading(GuestMemory([region]), 0).result() is MemoryLost


def _file_system(path: Path) -> str:
    mounts = (line.split() for line in Path("/proc/self/mounts").read_text().splitlines())
    inside = [mount for mount in mounts if path.is_relative_to(mount[1])]
    return max(inside, key=lambda mount: len(mount[1]))[2]


# ---- a region goes


def test_a_released_region_gives_up_its_waiters_and_no_others(
    half: Postcopy, file: Callable[[], File], reading: Reading, readable: Callable[[int], bool]
) -> None:
    gone, kept = file(), file()
    regions = gone.map(), kept.map(1 << 40)
    memory = listen(half, *regions)
    lost = reading(memory, 0)
    waits = reading(memory, 1 << 40)
    wait_for_faults(half, 2, readable)
    half.release(regions[0])
    assert lost.result() is MemoryLost
    assert gone.blocks == 0
    assert not waits.done
    half.end(memory.remove(regions[0]))
    assert waits.result() == b"\0"


def test_a_region_released_before_its_acknowledgement_stays_out_of_reach(
    half: Postcopy, file: Callable[[], File], reading: Reading
) -> None:
    one = file()
    region = one.map()
    half.advise()
    half.listen()
    half.release(region)
    half.register([region])
    assert reading(GuestMemory([region]), 0).result() is MemoryLost
    assert one.blocks == 0


# ---- the end, good or bad


def test_end_wakes_those_whom_nobody_answers_any_more(
    half: Postcopy, file: Callable[[], File], reading: Reading, readable: Callable[[int], bool]
) -> None:
    """The front-end holds its duplicate, and its fault thread has gone."""
    one = file()
    region = one.map()
    memory = listen(half, region)
    with front_end(half, region, one, serve=False):
        waits = reading(memory, 0)
        wait_for_faults(half, 1, readable)
        half.end(memory)
        assert waits.result() == b"\0"
        assert not half.active
        half.end(memory)
        assert reading(memory, one.page_size).result() == b"\0", "an ordinary mapping from now on"


def test_losing_the_front_end_takes_the_memory_away(
    half: Postcopy, file: Callable[[], File], reading: Reading, readable: Callable[[int], bool]
) -> None:
    """Even while the other side still holds a duplicate of the userfaultfd, which keeps its waiters waiting."""
    one = file()
    region = one.map()
    memory = listen(half, region)
    os.posix_fallocate(one.fd, 7 * one.page_size, one.page_size)
    with front_end(half, region, one, serve=False):
        waiting = [reading(memory, page * one.page_size) for page in range(4)]
        wait_for_faults(half, 4, readable)
        before = one.blocks
        half.revoke(memory)
        assert all(wait.result() is MemoryLost for wait in waiting)
    for page in range(PAGES):
        assert reading(memory, page * one.page_size).result() is MemoryLost, "pages that are here are gone too"
        with pytest.raises(MemoryLost):
            memory.write(page * one.page_size, b"x")
    assert one.blocks == before, "a zero page was placed for the whole guest"
    assert not half.active
    half.revoke(memory)


def test_a_front_end_lost_before_listen_takes_nothing_away(
    half: Postcopy, file: Callable[[], File], reading: Reading
) -> None:
    """A migration that ended in precopy says nothing after ADVISE; its memory is whole."""
    one = file()
    memory = GuestMemory([Region.map(one.fd, one.describe())])
    half.advise()
    half.revoke(memory)
    assert reading(memory, 0).result() == b"\0"


def test_after_the_end_the_front_end_may_start_again(
    half: Postcopy, file: Callable[[], File], reading: Reading
) -> None:
    one = file()
    for _ in range(3):
        region = one.map()
        memory = listen(half, region)
        with front_end(half, region, one, serve=True):
            assert reading(memory, 0).result() == b"\1"
        half.end(memory)
        del region, memory


def test_no_descriptor_stays_open(file: Callable[[], File], no_leaks: None, half: Postcopy) -> None:
    one = file()
    for finish in (half.end, half.revoke):
        finish(listen(half, one.map()))
    os.close(one.fd)
    one.fd = -1
