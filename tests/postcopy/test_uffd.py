"""The typed face of userfaultfd: every request against the real kernel, and what a user without rights is told."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vhostuser import uffd as module
from vhostuser._native import ffi, lib
from vhostuser.uffd import DEVICE, Fault, Feature, Mode, NotPermitted, TouchPool, Userfaultfd

PAGE = 4096
PAGES = 8
HEADER = Path("/usr/include/linux/userfaultfd.h")
SYSCTL = Path("/proc/sys/vm/unprivileged_userfaultfd")


class Watched:
    """A mapping whose missing pages are reported; ``data`` must not be touched where they are."""

    def __init__(self, flags: int, fd: int = -1, mode: Mode = Mode.MISSING) -> None:
        self.data = mmap.mmap(fd, PAGES * PAGE, flags)
        self._view = ffi.from_buffer(self.data)
        self.host = int(ffi.cast("uintptr_t", self._view))
        self.uffd = Userfaultfd.open()
        self.ioctls = self.uffd.register(self.host, PAGES * PAGE, mode)

    def byte(self, page: int) -> bytes:
        """The first of a page that is there."""
        return bytes(ffi.buffer(self._view)[page * PAGE : page * PAGE + 1])

    def close(self) -> None:
        self.uffd.close()
        ffi.release(self._view)
        self.data.close()


@pytest.fixture
def private() -> Iterator[Watched]:
    """Anonymous private memory: all requests work there, and no other mapping can fill it."""
    made = Watched(mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    yield made
    made.close()


@pytest.fixture
def shared() -> Iterator[tuple[int, Watched]]:
    """A memfd and its mapping, with minor faults too."""
    fd = os.memfd_create("guest", os.MFD_CLOEXEC)
    os.ftruncate(fd, PAGES * PAGE)
    made = Watched(mmap.MAP_SHARED, fd, Mode.MISSING | Mode.MINOR)
    yield fd, made
    made.close()
    os.close(fd)


def read_into(host: int, file: Path) -> Callable[[], int]:
    """A read system call whose buffer may be a missing page."""
    buffer = ffi.buffer(ffi.cast("char *", host), 16)

    def call() -> int:
        with file.open("rb", buffering=0) as opened:
            return os.preadv(opened.fileno(), [buffer], 0)

    return call


# ---- numbers, opening


def test_numbers_are_those_of_the_kernel_header() -> None:
    """The ones it has: headers are often older than the kernel."""
    found = {name: 1 << int(bit) for name, bit in re.findall(r"UFFD_FEATURE_(\w+)\s+\(1<<(\d+)\)", HEADER.read_text())}
    assert found
    assert {feature.name: feature.value for feature in Feature if feature.name in found}.items() <= found.items()
    assert (Mode.MISSING, Mode.MINOR) == (lib.VU_UFFD_MISSING, lib.VU_UFFD_MINOR)


def test_a_userfaultfd_is_neither_inherited_nor_waited_for(no_leaks: None) -> None:
    with Userfaultfd.open() as opened:
        assert not os.get_inheritable(opened.fileno())
        assert fcntl.fcntl(opened.fileno(), fcntl.F_GETFL) & os.O_NONBLOCK
        assert opened.read() == []
    assert opened.closed
    opened.close()


def test_probing_leaves_nothing_open(no_leaks: None) -> None:
    assert Feature.MISSING_SHMEM | Feature.MISSING_HUGETLBFS in Userfaultfd.probe()


def test_the_system_call_does_where_there_is_no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "DEVICE", "/dev/nowhere")
    Userfaultfd.open().close()


def test_a_passed_descriptor_is_used_and_stays_open(monkeypatch: pytest.MonkeyPatch) -> None:
    if not Path(DEVICE).exists():
        pytest.skip(f"this kernel has no {DEVICE}")
    with Path(DEVICE).open("r+b", buffering=0) as device:
        monkeypatch.setattr(module, "_Device", None)
        monkeypatch.setattr(module, "_SystemCall", None)
        Userfaultfd.probe(device.fileno())
        Userfaultfd.open(device.fileno()).close()
        os.fstat(device.fileno())


def test_without_rights_both_ways_and_their_cures_are_named() -> None:
    """In one line: it becomes the log line that says why postcopy is not offered."""
    if os.geteuid() or SYSCTL.read_text().strip() != "0":
        pytest.skip("needs root, to give its rights up, and vm.unprivileged_userfaultfd=0")
    os.seteuid(65534)
    try:
        with pytest.raises(NotPermitted) as caught:
            Userfaultfd.probe()
    finally:
        os.seteuid(0)
    text = str(caught.value)
    for part in (
        DEVICE,
        "EACCES",
        "userfaultfd(2)",
        "EPERM",
        "u:65534:rw",
        "vm.unprivileged_userfaultfd=1",
        "--uffd-fd",
    ):
        assert part in text
    assert "\n" not in text


def test_a_kernel_that_reports_too_little_is_not_permitted(monkeypatch: pytest.MonkeyPatch) -> None:
    def old_kernel(device_fd: int, found: Any) -> int:
        found[0] = Feature.MISSING_SHMEM
        return 0

    monkeypatch.setattr(module, "lib", SimpleNamespace(vu_uffd_features=old_kernel))
    with pytest.raises(NotPermitted, match="lacks MISSING_HUGETLBFS"):
        Userfaultfd.probe()


def test_system_calls_may_wait_for_pages(private: Watched, background: Any, readable: Callable[[int], bool]) -> None:
    """UFFD_USER_MODE_ONLY would make this read fail with EFAULT."""
    reading = background(read_into(private.host, Path("/etc/passwd")))
    assert readable(private.uffd.fileno())
    assert private.uffd.read() == [Fault(private.host, write=True, minor=False)]
    private.uffd.zeropage(private.host, PAGE)
    assert reading.result() == 16


# ---- requests


def test_pages_are_placed_once(private: Watched) -> None:
    assert private.uffd.copy(private.host, b"x" * 2 * PAGE) == 2 * PAGE
    assert private.byte(1) == b"x"
    with pytest.raises(FileExistsError):
        private.uffd.copy(private.host, b"y" * PAGE)
    with pytest.raises(FileExistsError):
        private.uffd.zeropage(private.host + PAGE, PAGE)
    assert private.byte(0) == b"x"


def test_a_request_that_stops_half_way_says_how_far_it_came(private: Watched) -> None:
    private.uffd.copy(private.host + 2 * PAGE, b"x" * PAGE)
    assert private.uffd.copy(private.host, b"y" * 4 * PAGE) == 2 * PAGE
    assert private.uffd.zeropage(private.host + 3 * PAGE, 2 * PAGE) == 2 * PAGE


def test_a_refused_request_keeps_its_errno(private: Watched) -> None:
    """Nothing is written to the count then, so it stays 0."""
    with pytest.raises(OSError, match="Invalid argument") as caught:
        private.uffd.copy(private.host + 1, b"x" * PAGE)
    assert caught.value.errno == errno.EINVAL
    for call in (private.uffd.register, private.uffd.unregister, private.uffd.wake):
        with pytest.raises(OSError, match="Invalid argument"):
            call(private.host + 1, PAGE)


def test_nobody_is_woken_unless_asked(private: Watched, background: Any, readable: Callable[[int], bool]) -> None:
    reading = background(read_into(private.host, Path("/etc/passwd")))
    assert readable(private.uffd.fileno())
    private.uffd.copy(private.host, b"x" * PAGE, wake=False)
    assert not reading.done
    private.uffd.wake(private.host, PAGE)
    assert reading.result() == 16


def test_unregistering_wakes(private: Watched, background: Any, readable: Callable[[int], bool]) -> None:
    reading = background(read_into(private.host, Path("/etc/passwd")))
    assert readable(private.uffd.fileno())
    private.uffd.unregister(private.host, PAGES * PAGE)
    assert reading.result() == 16


def test_minor_faults_are_told_apart_and_continued(
    shared: tuple[int, Watched], background: Any, readable: Callable[[int], bool]
) -> None:
    fd, watched = shared
    os.pwrite(fd, b"z" * PAGE, 0)
    reading = background(read_into(watched.host, Path("/etc/passwd")))
    assert readable(watched.uffd.fileno())
    assert watched.uffd.read() == [Fault(watched.host, write=True, minor=True)]
    assert watched.uffd.continue_(watched.host, PAGE) == PAGE
    assert reading.result() == 16
    assert watched.byte(0) == b"r"  # of "root"


def test_reading_takes_no_more_than_asked_for(
    private: Watched, background: Any, readable: Callable[[int], bool]
) -> None:
    readings = [background(read_into(private.host + page * PAGE, Path("/etc/passwd"))) for page in range(3)]
    seen = []
    while len(seen) < 3:
        assert readable(private.uffd.fileno())
        batch = private.uffd.read(1)
        assert len(batch) <= 1
        seen += batch
    assert sorted(fault.address for fault in seen) == [private.host + page * PAGE for page in range(3)]
    private.uffd.zeropage(private.host, 3 * PAGE)
    assert [reading.result() for reading in readings] == [16, 16, 16]


def test_poison_makes_an_error_of_a_page_that_is_lost(private: Watched) -> None:
    if Feature.POISON not in Userfaultfd.probe():
        pytest.skip("this kernel has no UFFDIO_POISON")
    assert private.uffd.poison(private.host, 2 * PAGE) == 2 * PAGE
    with pytest.raises(OSError, match="Bad address"):
        read_into(private.host, Path("/etc/passwd"))()
    private.uffd.copy(private.host + 3 * PAGE, b"x" * PAGE)
    assert private.uffd.poison(private.host + 2 * PAGE, 2 * PAGE) == PAGE, "it stops at a page that is there"
    with pytest.raises(FileExistsError):
        private.uffd.poison(private.host + 3 * PAGE, PAGE)


def test_move_hands_a_page_over(private: Watched) -> None:
    if Feature.MOVE not in Userfaultfd.probe():
        pytest.skip("this kernel has no UFFDIO_MOVE")
    source = mmap.mmap(-1, PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    source[:1] = b"m"
    view = ffi.from_buffer(source)
    assert private.uffd.move(private.host, int(ffi.cast("uintptr_t", view)), PAGE) == PAGE
    assert private.byte(0) == b"m"
    ffi.release(view)


# ---- the pool's threads


def test_touch_threads_start_when_they_are_needed_and_take_no_signals() -> None:
    """A handled signal that hits a thread in a kernel-mode fault makes it spin."""
    pool = TouchPool(threads=2, capacity=8)
    assert pool.threads == 0
    assert pool.native == pool.native
    assert pool.threads == 2
    for thread in pool._threads:
        assert thread.daemon
        status = Path(f"/proc/self/task/{thread.native_id}/status").read_text()
        (blocked,) = re.findall(r"SigBlk:\s+(\w+)", status)
        assert {signal for signal in (2, 7, 10, 11, 15, 40) if not int(blocked, 16) >> (signal - 1) & 1} == {7, 11}
    pool.close()


def test_statistics_are_empty_before_the_first_fault(pool: TouchPool) -> None:
    stats = pool.stats()
    assert (stats.waited, stats.ahead, stats.lost, stats.blocked_ns, sum(stats.histogram)) == (0, 0, 0, 0, 0)
    assert len(stats.histogram) == 32


@pytest.mark.parametrize(("threads", "capacity"), [(0, 1), (1, 0), (-1, 1)])
def test_a_pool_has_threads_and_room(threads: int, capacity: int) -> None:
    with pytest.raises(ValueError, match="1 or more"):
        TouchPool(threads, capacity)
