"""Guest memory of a front-end: regions, files, who closes what; the dirty log; the in-flight buffer."""

import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vhostuser.frontend import InflightBuffer, SharedLog, SharedMemory
from vhostuser.memory import MemoryLost
from vhostuser.protocol import Inflight, RequestRefused
from vhostuser.virtqueue import InflightRegion

PAGE = 4096
MIB = 1 << 20


@pytest.fixture(autouse=True)
def clean(no_leaks: None) -> Iterator[None]:
    yield


def test_regions_with_holes_and_offsets_in_one_file() -> None:
    with SharedMemory((0, 2 * PAGE)) as memory:
        first = memory.regions[0]
        second = memory.add(1 << 40, PAGE, offset=PAGE, file=first.fd)
        memory.write(1 << 40, b"shared")
        assert memory.read(PAGE, 6) == b"shared", "both regions show the second page of the file"
        with pytest.raises(LookupError):
            memory.read(2 * PAGE, 1)
        assert memory.end == (1 << 40) + PAGE
        for region in (first, second):
            described = region.describe()
            assert memory.map.user_to_guest(described.user) == described.guest, "user addresses are our own"


def test_a_region_in_the_middle_of_a_page_of_its_file() -> None:
    with SharedMemory() as memory:
        region = memory.add(0x1000, 100, offset=PAGE + 8)
        memory.write(0x1000, b"here")
        assert os.pread(region.fd, 4, PAGE + 8) == b"here"
        assert os.fstat(region.fd).st_size == PAGE + 108


def test_regions_come_and_go() -> None:
    memory = SharedMemory((0, PAGE))
    added = memory.add(MIB, PAGE)
    old = memory.map
    memory.write(MIB, b"x")
    memory.remove(added)
    assert old.read(MIB, 1) == b"x", "who has the old map keeps what was mapped"
    with pytest.raises(LookupError):
        memory.read(MIB, 1)
    with pytest.raises(ValueError, match="not of this memory"):
        memory.remove(added)
    assert len(memory.fds) == len(memory.table().regions) == 1
    memory.close()
    memory.close()


@pytest.mark.parametrize(("guest", "size"), [(0, PAGE), (PAGE - 1, PAGE), ((1 << 64) - 1, 2), (MIB, 0)])
def test_a_region_that_cannot_be_is_refused_and_leaves_nothing(guest: int, size: int) -> None:
    with SharedMemory((0, PAGE)) as memory:
        with pytest.raises(RequestRefused):
            memory.add(guest, size)
        assert len(memory.regions) == len(memory.map.regions) == 1
    with pytest.raises(RequestRefused):
        SharedMemory((0, PAGE), (0, PAGE))


def test_sealed_files_cannot_shrink() -> None:
    with SharedMemory((0, PAGE), sealed=True) as memory:
        assert memory.map.sealed
        assert fcntl.fcntl(memory.fds[0], fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK
        with pytest.raises(PermissionError):
            os.truncate(memory.fds[0], 0)
    with SharedMemory((0, PAGE)) as memory:
        assert not memory.map.sealed


def test_memory_in_a_directory(tmp_path: Path) -> None:
    with SharedMemory((0, PAGE), directory=tmp_path) as memory:
        memory.write(0, b"on disk")
        assert os.pread(memory.fds[0], 7, 0) == b"on disk"
    assert list(tmp_path.iterdir()) == []


def test_huge_pages(huge_pages: None) -> None:
    with SharedMemory((0, 4 * MIB), hugetlb=True) as memory:
        memory.add(1 << 32, MIB, offset=MIB, file=memory.fds[0])
        assert memory.regions[0].region.page_size == 2 * MIB
        assert memory.regions[0].region.hugetlb
        memory.write(1 << 32, b"second MiB")
        assert memory.read(MIB, 10) == b"second MiB"


# ---- the dirty log


@given(st.sets(st.integers(0, 16 * 1024 - 1), max_size=600))
def test_the_log_gives_the_marked_pages_as_runs_and_forgets_them(pages: set[int]) -> None:
    log = SharedLog(16 * 1024 * PAGE)
    for page in pages:
        log.log.mark(page * PAGE, 1)
    runs = log.take()
    assert sorted(pages) == [page for guest, length in runs for page in range(guest // PAGE, (guest + length) // PAGE)]
    assert all(end < start for (_, end), (start, _) in zip([(g, g + n) for g, n in runs], runs[1:], strict=False))
    assert log.take() == []
    log.close()


def test_a_log_of_every_other_page_needs_several_calls() -> None:
    with_holes = [(page * PAGE, PAGE) for page in range(0, 8192, 2)]
    log = SharedLog(8192 * PAGE)
    for guest, _ in with_holes:
        log.log.mark(guest, 1)
    assert log.take() == with_holes
    log.log.mark(0, 8192 * PAGE)
    assert log.take() == [(0, 8192 * PAGE)]
    for guest, _ in with_holes[:1016]:
        log.log.mark(guest, 1)
    log.log.mark(2032 * PAGE, 64 * PAGE)
    assert log.take()[1015:] == [(2030 * PAGE, PAGE), (2032 * PAGE, 64 * PAGE)], "a run is whole where one call ends"
    log.close()


@pytest.mark.parametrize(("end", "size"), [(0, 8), (1, 8), (64 * PAGE, 8), (64 * PAGE + 1, 16)])
def test_the_log_covers_all_pages_in_whole_words(end: int, size: int) -> None:
    log = SharedLog(end)
    assert (log.describe().size, os.fstat(log.fd).st_size) == (size, size)
    log.close()
    log.close()


def test_a_log_that_was_cut_is_an_error() -> None:
    log = SharedLog(1 << 30)
    os.truncate(log.fd, 0)
    with pytest.raises(MemoryLost):
        log.take()
    log.close()


# ---- the in-flight buffer


def test_the_in_flight_buffer_tells_what_was_taken() -> None:
    fd, size = InflightRegion.create(2, 4)
    buffer = InflightBuffer(fd, Inflight(size, 0, 2, 4))
    each = size // 2
    os.pwrite(fd, bytes.fromhex("0000000000000000 0100 0400 0200 0700"), each)
    os.pwrite(fd, bytes.fromhex("01 0000000000 0000 0900000000000000"), each + 16)
    os.pwrite(fd, bytes.fromhex("01 0000000000 0000 0300000000000000"), each + 16 + 3 * 16)
    assert buffer.queue(0).version == 0
    second = buffer.queue(1)
    assert (second.version, second.desc_num, second.last_batch_head, second.used_idx) == (1, 4, 2, 7)
    assert second.heads == (3, 0)
    assert buffer.packed_queue(1).old_free_head == 7, "the layout is the ring's, which the caller knows"
    with pytest.raises(IndexError):
        buffer.queue(2)
    buffer.close()
    buffer.close()
