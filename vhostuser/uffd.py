"""userfaultfd: the descriptor that makes missing pages somebody's business, and the threads that touch such pages.

What belongs here: the typed face of native/uffd.c and native/touch.c, and what to tell a user who is not permitted to
have a userfaultfd. What does not: when to register and when to wake (``postcopy``).

A userfaultfd belongs to the address space of the process that opened it: every address below is one of that process.
"""

from __future__ import annotations

import enum
import errno
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, NamedTuple, Protocol, Self

from vhostuser._native import ffi, lib
from vhostuser.protocol import VhostUserError
from vhostuser.threads import spawn

DEVICE = "/dev/userfaultfd"


class Feature(enum.IntFlag):
    """What a kernel's userfaultfd can do (``UFFD_FEATURE_`` in linux/userfaultfd.h), the part that matters here.

    Each may be asked for when one is opened. ``EVENT_`` ones may not be among them: whoever changes a mapping would
    wait for somebody to read its event.
    """

    MISSING_HUGETLBFS = 1 << 4
    MISSING_SHMEM = 1 << 5
    MINOR_HUGETLBFS = 1 << 9
    MINOR_SHMEM = 1 << 10
    POISON = 1 << 14
    MOVE = 1 << 16


FEATURE_NAMES = (
    "PAGEFAULT_FLAG_WP", "EVENT_FORK", "EVENT_REMAP", "EVENT_REMOVE", "MISSING_HUGETLBFS", "MISSING_SHMEM",
    "EVENT_UNMAP", "SIGBUS", "THREAD_ID", "MINOR_HUGETLBFS", "MINOR_SHMEM", "EXACT_ADDRESS", "WP_HUGETLBFS_SHMEM",
    "WP_UNPOPULATED", "POISON", "WP_ASYNC", "MOVE",
)  # fmt: skip
"""Of all features by bit number, up to Linux 6.8."""

NEEDED_FOR_POSTCOPY = Feature.MISSING_SHMEM | Feature.MISSING_HUGETLBFS


class Mode(enum.IntFlag):
    """Which faults are reported."""

    MISSING = 1
    """The page is in neither the page table nor the file."""
    MINOR = 2
    """The page is in the file and not yet in the page table."""


class Fault(NamedTuple):
    """A thread waits."""

    address: int
    """Of the page; in the address space of the process that opened the userfaultfd."""
    write: bool
    minor: bool


class NotPermitted(VhostUserError):
    """No userfaultfd that serves postcopy can be had; the text says what was tried and how to cure it, in one line."""


class Userfaultfd:
    """Owns one userfaultfd. It is never closed by accident: call ``close``, or use it as a context manager.

    Closing the last descriptor while pages are missing makes the kernel fill them with zeros for everybody who shares
    the memory, hence no finaliser. Methods are system calls that never touch guest memory; they raise OSError with
    the kernel's errno. Addresses and lengths are bytes, multiples of the page size of the memory.
    """

    def __init__(self, fd: int) -> None:
        """Takes over ``fd``, a userfaultfd whose handshake is done."""
        self._fd = fd

    @classmethod
    def open(cls, device_fd: int = -1, features: int = 0) -> Self:
        """Opens one that sees faults in system calls too: by ``device_fd``, a descriptor of /dev/userfaultfd that
        stays the caller's, or if that is -1 by /dev/userfaultfd and else by userfaultfd(2).

        Raises NotPermitted. UFFD_USER_MODE_ONLY is never asked for: reading from a file into a missing page would
        give EFAULT.
        """
        return cls(_through(_ways(device_fd), lambda fd: lib.vu_uffd_open(fd, features)))

    @staticmethod
    def probe(device_fd: int = -1) -> Feature:
        """The features of the kernel, by a throw-away descriptor; bits that have no name here are left out.

        Raises NotPermitted where postcopy cannot be offered: none may be opened, or missing pages of shmem and of
        hugetlbfs are not both reported.
        """
        found = ffi.new("uint64_t *")
        _through(_ways(device_fd), lambda fd: lib.vu_uffd_features(fd, found))
        features = Feature(found[0] & sum(Feature))
        if lacking := NEEDED_FOR_POSTCOPY & ~features:
            raise NotPermitted(f"this kernel's userfaultfd lacks {lacking.name}, which came with Linux 4.11")
        return features

    def fileno(self) -> int:
        """The descriptor, which stays ours."""
        return self._fd

    @property
    def closed(self) -> bool:
        """Whether ``close`` was called."""
        return self._fd < 0

    def close(self) -> None:
        """Closes our descriptor. Others may hold duplicates: only ``unregister`` is sure to wake those who wait."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def register(self, host: int, length: int, mode: Mode = Mode.MISSING) -> int:
        """Reports faults in the range from now on; returns the mask of ioctl numbers that the kernel allows there."""
        ioctls = ffi.new("uint64_t *")
        _check(lib.vu_uffd_register(self._fd, host, length, mode, ioctls))
        return int(ioctls[0])

    def unregister(self, host: int, length: int) -> None:
        """Reports no more; wakes those who wait in the range, who then find what the file holds, or zeros."""
        _check(lib.vu_uffd_unregister(self._fd, host, length))

    def wake(self, host: int, length: int) -> None:
        """Those who wait in the range look again."""
        _check(lib.vu_uffd_wake(self._fd, host, length))

    def copy(self, host: int, data: bytes | bytearray | memoryview, *, wake: bool = True) -> int:
        """Places ``data``; returns the number of bytes placed, which may be less than all.

        FileExistsError: the first page is there already. BlockingIOError: the memory's layout is changing, try again.
        """
        source = ffi.from_buffer(data)
        return _check(lib.vu_uffd_copy(self._fd, host, source, len(source), wake))

    def zeropage(self, host: int, length: int, *, wake: bool = True) -> int:
        """Places zeros, otherwise as ``copy``; not on hugetlbfs."""
        return _check(lib.vu_uffd_zeropage(self._fd, host, length, wake))

    def continue_(self, host: int, length: int, *, wake: bool = True) -> int:
        """Ends minor faults: maps pages that the file holds. Returns and raises as ``copy``."""
        return _check(lib.vu_uffd_continue(self._fd, host, length, wake))

    def move(self, to: int, source: int, length: int, *, wake: bool = True) -> int:
        """Moves pages of private anonymous memory within this process, otherwise as ``copy`` (``Feature.MOVE``)."""
        return _check(lib.vu_uffd_move(self._fd, to, source, length, wake))

    def poison(self, host: int, length: int) -> int:
        """Missing pages give SIGBUS from now on; stops at the first page that is there (``Feature.POISON``)."""
        return _check(lib.vu_uffd_poison(self._fd, host, length))

    def read(self, most: int = 64) -> list[Fault]:
        """Up to ``most`` (at most 64) faults that nobody has read yet; empty if there are none. Never blocks."""
        addresses, flags = ffi.new("uint64_t[]", most), ffi.new("uint64_t[]", most)
        count = _check(lib.vu_uffd_read(self._fd, addresses, flags, most))
        return [Fault(addresses[i], bool(flags[i] & 1), bool(flags[i] & 4)) for i in range(count)]


def _check(result: int) -> int:
    if result >= 0:
        return result
    number = ffi.errno
    raise OSError(number, os.strerror(number))


# ---- ways to a userfaultfd


class _Way(Protocol):
    name: str

    def attempt(self, call: Callable[[int], int]) -> int:
        """Calls ``call`` with a descriptor of the device, or -1 for the system call. Raises OSError."""

    def cure(self, number: int) -> str:
        """What to do about that errno."""


class _Passed:
    """A descriptor of /dev/userfaultfd that somebody with more rights has opened for us."""

    def __init__(self, device_fd: int) -> None:
        self.name = f"descriptor {device_fd}"
        self._device_fd = device_fd

    def attempt(self, call: Callable[[int], int]) -> int:
        return _check(call(self._device_fd))

    def cure(self, number: int) -> str:
        return "pass a descriptor of /dev/userfaultfd that is open for reading and writing"


class _Device:
    def __init__(self) -> None:
        self.name = DEVICE

    def attempt(self, call: Callable[[int], int]) -> int:
        device_fd = os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC)
        try:
            return _check(call(device_fd))
        finally:
            os.close(device_fd)

    def cure(self, number: int) -> str:
        if number in (errno.EACCES, errno.EPERM):
            return f"setfacl -m u:{os.geteuid()}:rw {DEVICE}, or have it opened for us and passed (--uffd-fd)"
        return "Linux 6.1 or later has this device, a container must be given it"


class _SystemCall:
    def __init__(self) -> None:
        self.name = "userfaultfd(2)"

    def attempt(self, call: Callable[[int], int]) -> int:
        return _check(call(-1))

    def cure(self, number: int) -> str:
        if number == errno.EPERM:
            return "sysctl vm.unprivileged_userfaultfd=1, CAP_SYS_PTRACE, or a container whose seccomp filter allows it"
        return "a kernel with CONFIG_USERFAULTFD"


def _ways(device_fd: int) -> list[_Way]:
    return [_Passed(device_fd)] if device_fd >= 0 else [_Device(), _SystemCall()]


def _through(ways: Sequence[_Way], call: Callable[[int], int]) -> int:
    """The result of ``call`` (given a descriptor of the device, or -1) by the first way that works."""
    failures = []
    for way in ways:
        try:
            return way.attempt(call)
        except OSError as error:
            number = error.errno or 0
            name = errno.errorcode.get(number, str(number))
            failures.append((f"{way.name}: {os.strerror(number)} ({name})", way.cure(number)))
    tried, cures = zip(*failures, strict=True)
    raise NotPermitted(f"no userfaultfd: {'; '.join(tried)}. Cure: {'; or '.join(cures)}")


class Attempt(NamedTuple):
    """One way to a userfaultfd, tried. errno: 0 where it worked, then with the kernel's features; else with a cure."""

    way: str
    errno: int
    features: int = 0
    cure: str = ""


def attempts(device_fd: int = -1) -> list[Attempt]:
    """Tries every way on its own, by throw-away descriptors; never raises."""
    return [_attempt(way) for way in _ways(device_fd)]


def _attempt(way: _Way) -> Attempt:
    found = ffi.new("uint64_t *")
    try:
        way.attempt(lambda fd: lib.vu_uffd_features(fd, found))
    except OSError as error:
        number = error.errno or errno.EIO
        return Attempt(way.name, number, cure=way.cure(number))
    return Attempt(way.name, 0, int(found[0]))


# ---- touch threads


@dataclass(frozen=True)
class FaultStats:
    """What waiting for missing pages has cost so far; see ``struct vu_fault_stats``."""

    waited: int
    """Times that a thread waited for a page."""
    ahead: int
    """Of those, waits in parallel by touch threads, before the request ran."""
    lost: int
    """Pages that could not be had: revoked, or cut off the file."""
    blocked_ns: int
    """Nanoseconds, the sum over all waits."""
    histogram: tuple[int, ...]
    """Waits by duration: element n counts those of 2**n up to 2**(n + 1) microseconds, element 0 all below 2."""


class TouchPool:
    """Threads that touch missing pages several at once; one for a process. They start when first needed.

    threads: how many pages can be asked for at a time. A request over 32 missing pages takes about 32 / threads round
    trips to whoever brings the pages. capacity: pages waiting to be asked for; when there are more, whoever wants one
    touches it himself.
    """

    def __init__(self, threads: int = 32, capacity: int = 4096) -> None:
        if threads < 1 or capacity < 1:
            raise ValueError(f"threads and capacity must be 1 or more, not {threads} and {capacity}")
        self._count = threads
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()
        self._touch = lib.vu_touch_new(capacity)
        if self._touch == ffi.NULL:
            raise MemoryError(f"no memory for a pool of {capacity} pages")

    @property
    def native(self) -> Any:
        """The ``vu_touch *`` for vu_queue_set_touch; whoever takes it keeps this object. Starts the threads."""
        with self._lock:
            if not self._threads:
                self._start()
        return self._touch

    def _start(self) -> None:
        for number in range(self._count):
            self._threads.append(spawn(lambda: lib.vu_touch_run(self._touch), f"touch {number}"))

    def stats(self) -> FaultStats:
        """Since the pool was made."""
        raw = ffi.new("struct vu_fault_stats *")
        lib.vu_touch_stats(self._touch, raw)
        return FaultStats(raw.waited, raw.ahead, raw.lost, raw.blocked_ns, tuple(raw.histogram))

    @property
    def threads(self) -> int:
        """How many there are: none before they are first needed."""
        return len(self._threads)

    def close(self) -> None:
        """Ends the threads and frees the pool, which no queue may have any more. Waits for those in a fault."""
        lib.vu_touch_stop(self._touch)
        for thread in self._threads:
            thread.join()
        lib.vu_touch_free(self._touch)
        self._touch = ffi.NULL
