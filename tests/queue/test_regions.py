"""Mapping: what is asked of a file, where it goes, when it ends; losing it costs a request and not the process."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import gc
import mmap
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.queue.guest import PAGE, USER, Guest
from vhostuser.memory import DirtyLog, GuestMemory, MemoryLost, Region
from vhostuser.protocol import MemoryRegion, RequestRefused

HUGE = 2 << 20
TOP = 1 << 64


@pytest.fixture
def files() -> Iterator[Callable[..., int]]:
    made: list[int] = []

    def make(size: int, flags: int = 0) -> int:
        fd = os.memfd_create("region", os.MFD_CLOEXEC | flags)
        made.append(fd)
        os.truncate(fd, size)
        return fd

    yield make
    for fd in made:
        os.close(fd)


def mapping(region: Region) -> str:
    """The kernel's view of a region: its entry of smaps."""
    smaps = Path("/proc/self/smaps").read_text()
    found = re.search(rf"^{region.base:x}-{region.base + region.length:x} (?:.*\n)+?VmFlags:.*$", smaps, re.M)
    assert found, f"{region} is not mapped as it says"
    return found[0]


def count_mappings() -> int:
    return Path("/proc/self/maps").read_text().count("memfd:region")


# ---- the file


@pytest.mark.parametrize("offset", [0, 1, 0x123, PAGE - 1, PAGE, 3 * PAGE + 5])
@pytest.mark.parametrize("size", [1, PAGE - 1, PAGE, 2 * PAGE + 7])
def test_an_offset_need_not_be_a_page(files: Callable[..., int], offset: int, size: int) -> None:
    fd = files(8 * PAGE)
    os.pwrite(fd, bytes(range(251)) * (8 * PAGE // 251), 0)
    region = Region.map(fd, MemoryRegion(0x1000, size, USER, offset))
    assert region.base % PAGE == region.length % PAGE == 0
    assert region.host - region.base == offset % PAGE
    assert GuestMemory([region]).read(0x1000, size) == os.pread(fd, size, offset)


@pytest.mark.parametrize(
    ("numbers", "words"),
    [
        ((0, 0, 0, 0), "size"),
        ((0, PAGE + 1, 0, 0), "smaller"),
        ((0, PAGE, 0, 1), "smaller"),
        ((0, 1, 0, PAGE), "smaller"),
        ((0, PAGE, 0, TOP - 1), "wrap"),
        ((0, PAGE, 0, TOP - PAGE), "wrap"),
        ((0, TOP - 1, 0, 0), "smaller"),
        ((TOP - PAGE, PAGE, 0, 0), "wrap"),
        ((1, TOP - 1, 0, 0), "wrap"),
        ((0, PAGE, TOP - 1, 0), "wrap"),
    ],
)
def test_a_region_that_its_file_or_its_addresses_cannot_hold_is_refused(
    files: Callable[..., int], numbers: tuple[int, int, int, int], words: str
) -> None:
    with pytest.raises(RequestRefused, match=words):
        Region.map(files(PAGE), MemoryRegion(*numbers))


def test_only_regular_files_are_mapped() -> None:
    readable, writable = os.pipe()
    zero = os.open("/dev/zero", os.O_RDWR)
    directory = os.open("/tmp", os.O_RDONLY)
    for fd in (readable, zero, directory):
        with pytest.raises(RequestRefused, match="not a regular file"):
            Region.map(fd, MemoryRegion(0, PAGE, 0, 0))
        with pytest.raises(RequestRefused, match="not a regular file"):
            DirtyLog.map(fd, PAGE)
    for fd in (readable, writable, zero, directory):
        os.close(fd)


def test_a_descriptor_that_is_closed_or_read_only_is_refused_in_the_systems_words(files: Callable[..., int]) -> None:
    with pytest.raises(RequestRefused, match="Bad file descriptor"):
        Region.map(-1, MemoryRegion(0, PAGE, 0, 0))
    fd = os.open(f"/proc/self/fd/{files(PAGE)}", os.O_RDONLY)
    with pytest.raises(RequestRefused, match="Permission denied"):
        Region.map(fd, MemoryRegion(0, PAGE, 0, 0))
    os.close(fd)


def test_a_seal_against_shrinking_is_seen(files: Callable[..., int]) -> None:
    fd = files(PAGE, os.MFD_ALLOW_SEALING)
    assert not Region.map(fd, MemoryRegion(0, PAGE, 0, 0)).sealed
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    assert Region.map(fd, MemoryRegion(0, PAGE, 0, 0)).sealed


def test_the_file_is_known_again(files: Callable[..., int]) -> None:
    fd, other = files(2 * PAGE), files(2 * PAGE)
    said = MemoryRegion(0, PAGE, USER, PAGE)
    memory = GuestMemory([Region.map(fd, said)])
    assert memory.same(said, os.dup(fd)) is memory.regions[0]
    assert memory.same(said, other) is None
    assert memory.same(MemoryRegion(0, PAGE, USER, 0), fd) is None


@pytest.fixture
def huge_pages() -> Iterator[int]:
    """A file of two huge pages; reserves them if that is allowed."""
    setting = Path("/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages")
    before = int(setting.read_text()) if setting.exists() else 0
    try:
        fd = os.memfd_create("region", os.MFD_CLOEXEC | os.MFD_HUGETLB)
        os.truncate(fd, 2 * HUGE)
        if before < 4:
            setting.write_text("4")
        mmap.mmap(fd, 2 * HUGE).close()
    except OSError as error:
        pytest.skip(f"no huge pages: {error}")
    yield fd
    os.close(fd)
    if before < 4:
        setting.write_text(str(before))


@pytest.mark.parametrize("offset", [0, 4096, HUGE - 8192, HUGE])
def test_huge_pages_are_mapped_whole(huge_pages: int, offset: int) -> None:
    region = Region.map(huge_pages, MemoryRegion(0, 8192, USER, offset))
    assert region.hugetlb and region.page_size == HUGE
    assert region.base % HUGE == region.length % HUGE == 0
    assert region.host == region.base + offset % HUGE
    memory = GuestMemory([region])
    memory.write(8000, b"across")
    assert memory.read(8000, 6) == b"across"
    region.no_huge()


# ---- where


def test_at_the_front_ends_own_address_if_it_is_free(files: Callable[..., int]) -> None:
    fd, user = files(4 * PAGE), USER + 0x123000
    region = Region.map(fd, MemoryRegion(0, PAGE, user + 5, PAGE + 5), at_user=True)
    assert (region.host, region.base) == (user + 5, user)
    taken = Region.map(fd, MemoryRegion(0, PAGE, user, 0), at_user=True)
    assert taken.host != user, "what is there already must not be replaced"
    elsewhere = Region.map(fd, MemoryRegion(0, PAGE, user + PAGE + 1, 0), at_user=True)
    assert elsewhere.host % PAGE == 0, "an address at another place in its page cannot be had"


@pytest.mark.parametrize("user", [0, PAGE // 2, 1 << 62, TOP - 2 * PAGE, TOP - PAGE - 1])
def test_an_address_that_nobody_can_have_is_no_obstacle(files: Callable[..., int], user: int) -> None:
    assert Region.map(files(PAGE), MemoryRegion(0, PAGE, user, 0), at_user=True).host != user


def test_a_region_is_not_dumped_and_not_reserved(files: Callable[..., int]) -> None:
    flags = mapping(Region.map(files(PAGE), MemoryRegion(0, PAGE, 0, 0))).split("VmFlags:")[1].split()
    assert {"dd", "nr", "sh"} <= set(flags)


def test_mapping_touches_nothing(files: Callable[..., int]) -> None:
    fd = files(64 * PAGE)
    region = Region.map(fd, MemoryRegion(0, 64 * PAGE, 0, 0), hidden=True)
    memory = GuestMemory([region])
    region.no_huge()
    region.reveal()
    memory.revoke()
    assert os.fstat(fd).st_blocks == 0


def test_unmapped_with_the_last_reference(files: Callable[..., int]) -> None:
    fd = files(2 * PAGE)
    before = count_mappings()
    kept = Region.map(fd, MemoryRegion(0, PAGE, 0, 0))
    memory = GuestMemory([kept, Region.map(fd, MemoryRegion(PAGE, PAGE, PAGE, PAGE))])
    assert count_mappings() == before + 2
    less = memory.remove(memory.regions[1])
    del memory
    gc.collect()
    assert count_mappings() == before + 1
    assert less.read(0, 1) == b"\0"
    del kept, less
    gc.collect()
    assert count_mappings() == before


def test_regions_come_and_go_by_their_numbers(files: Callable[..., int]) -> None:
    fd = files(2 * PAGE)
    first, second = (Region.map(fd, MemoryRegion(at, PAGE, USER + at, at)) for at in (0, PAGE))
    memory = GuestMemory().add(first).add(second)
    assert memory.find(PAGE, PAGE, USER + PAGE) is second
    for numbers in ((0, PAGE, USER + PAGE), (0, 1, USER), (PAGE, PAGE, USER)):
        with pytest.raises(RequestRefused, match="no region"):
            memory.find(*numbers)
    assert memory.remove(first).regions == (second,)
    assert len(memory.regions) == 2, "a map never changes"
    with pytest.raises(RequestRefused, match="overlap"):
        memory.add(Region.map(fd, MemoryRegion(PAGE + 1, 1, 0, 0)))


# ---- lost memory


def test_a_truncated_file_costs_the_access_and_not_the_process(guest: Guest) -> None:
    guest.truncate(0, PAGE)
    for _ in range(3):  # the handlers stay in place
        with pytest.raises(MemoryLost):
            guest.memory.read(PAGE, 1)
        with pytest.raises(MemoryLost):
            guest.memory.write(PAGE - 1, b"xy")
    assert len(guest.memory.read(0, PAGE)) == PAGE, "what is left can be used"
    assert guest.memory.read(1 << 32, 1) == b"\0"


def test_revoked_memory_can_neither_be_read_nor_written_nor_revealed(guest: Guest) -> None:
    guest.put(0, b"secret")
    guest.memory.revoke()
    for address in (0, 1 << 32):
        with pytest.raises(MemoryLost):
            guest.memory.read(address, 1)
        with pytest.raises(MemoryLost):
            guest.memory.write(address, b"x")
    with pytest.raises(MemoryLost):
        guest.memory.regions[0].reveal()
    assert "---s" in mapping_of(guest.memory.regions[0])
    assert guest.get(0, 6) == b"secret", "the file itself is untouched"


def mapping_of(region: Region) -> str:
    return next(
        line for line in Path("/proc/self/maps").read_text().splitlines() if line.startswith(f"{region.base:x}-")
    )


def test_revoked_memory_cannot_be_used_by_a_system_call(guest: Guest) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    region = guest.memory.regions[0]
    region.revoke()
    for call in (libc.pread, libc.pwrite):
        assert call(guest.fds[2], ctypes.c_void_p(region.host), 1, 0) == -1
        assert ctypes.get_errno() == errno.EFAULT


def test_hidden_memory_is_inaccessible_until_it_is_revealed(files: Callable[..., int]) -> None:
    region = Region.map(files(PAGE), MemoryRegion(0, PAGE, 0, 0), hidden=True)
    memory = GuestMemory([region])
    with pytest.raises(MemoryLost):
        memory.read(0, 1)
    region.reveal()
    assert memory.read(0, 1) == b"\0"


def test_a_truncated_log_costs_the_mark(files: Callable[..., int]) -> None:
    fd = files(2 * PAGE)
    log = DirtyLog.map(fd, 2 * PAGE)
    os.truncate(fd, PAGE)
    with pytest.raises(MemoryLost):
        log.mark(PAGE * 8 * PAGE, 1)
    log.mark(0, 1)
    assert os.pread(fd, 1, 0) == b"\1"


# ---- whose fault it is

LOSE = """
import faulthandler, os, sys
from tests.queue.guest import Guest, PAGE
from vhostuser.memory import GuestMemory, MemoryLost
guest = Guest((0, 2 * PAGE))
{before}
guest.truncate(0, PAGE)
try:
    guest.memory.read(PAGE, 1)
except MemoryLost:
    print("lost", flush=True)
{after}
"""
CRASH = "import ctypes; ctypes.string_at(8)"


def run(before: str = "", after: str = "") -> subprocess.CompletedProcess[str]:
    code = LOSE.format(before=before, after=after)
    root = Path(__file__).parents[2]
    return subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=30)


def test_a_fault_of_our_own_still_kills() -> None:
    done = run(after=CRASH)
    assert (done.stdout, done.returncode) == ("lost\n", -11)


@pytest.mark.parametrize("again", [False, True])
def test_faulthandler_installed_later_neither_takes_our_faults_nor_loses_its_own(again: bool) -> None:
    # GuestMemory() is what puts the handlers back on top.
    enable = "faulthandler.enable(); GuestMemory()"
    done = run(before=f"{enable}; faulthandler.disable(); {enable}" if again else enable, after=CRASH)
    assert (done.stdout, done.returncode) == ("lost\n", -11)
    assert "Segmentation fault" in done.stderr and "string_at" in done.stderr


def test_a_fault_beside_the_regions_is_not_ours() -> None:
    done = run(after="os.kill(os.getpid(), 7)")
    assert (done.stdout, done.returncode) == ("lost\n", -7), "a signal that somebody sent kills as ever"
