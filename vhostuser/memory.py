"""Guest memory as a front-end shares it: regions, the immutable set of them, the dirty log.

What belongs here: who owns a mapping, and what is said when one is refused. What does not: page faults (``uffd``,
``postcopy``), rings (``virtqueue``).

Three kinds of addresses: *guest* (physical, what drivers write into descriptors), *user* (of the front-end's process,
what it writes into messages) and *host* (ours).
"""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from operator import attrgetter
from typing import Any, NamedTuple, Protocol, Self

from vhostuser._native import ffi, lib
from vhostuser.protocol import RequestRefused, VhostUserError

_WORDS = {
    lib.VU_E_NOMEM: "there is no memory left, or the driver asks for more than a queue may take",
    lib.VU_E_FAULT: "guest memory is gone: its file was truncated, or the front-end was lost in postcopy",
    lib.VU_E_RANGE: "an address lies outside of guest memory",
    lib.VU_E_OVERFLOW: "an address and its length wrap around the address space",
    lib.VU_E_OVERLAP: "it overlaps with another that says otherwise",
    lib.VU_E_SHORT: "the file is smaller than what should lie in it",
    lib.VU_E_SIZE: "a size that the specification forbids",
    lib.VU_E_ALIGN: "an address is not aligned as the specification asks",
    lib.VU_E_INDEX: "the available index is further ahead than the ring has entries",
    lib.VU_E_HEAD: "a descriptor number outside of its table, or of a chain that is in use already",
    lib.VU_E_LOOP: "a chain is longer than its table, so it is a loop",
    lib.VU_E_INDIRECT: "an indirect table that was not negotiated, is nested, is empty or goes on with NEXT",
    lib.VU_E_ORDER: "a readable descriptor follows a writable one",
    lib.VU_E_INFLIGHT: "the in-flight region contradicts itself or the ring",
    lib.VU_E_CLOSED: "the queue was closed",
    lib.VU_E_MISSING: "a translation is missing: the front-end was asked for it",
    lib.VU_E_ACCESS: "the access is not permitted, or the permissions are not 1 (read), 2 (write) or 3",
    lib.VU_E_PIECES: "a part of the ring is not in one piece of guest memory behind its IOMMU",
    lib.VU_E_FILE: "the descriptor is not a regular file: share a memfd, or a file of tmpfs or hugetlbfs",
}


_RANGES = 1024


class MemoryLost(VhostUserError):
    """Guest memory could not be touched: its file was truncated, or it was revoked when the front-end was lost."""

    def __init__(self) -> None:
        super().__init__(explain(lib.VU_E_FAULT))


class Described(Protocol):
    """What a front-end says of a region; ``protocol.MemoryRegion`` is one."""

    @property
    def guest(self) -> int: ...
    @property
    def size(self) -> int: ...
    @property
    def user(self) -> int: ...
    @property
    def offset(self) -> int: ...


class DescribedInflight(Protocol):
    """What SET_INFLIGHT_FD says of the region; ``protocol.Inflight`` is one. Sizes in bytes and entries."""

    @property
    def mmap_size(self) -> int: ...
    @property
    def mmap_offset(self) -> int: ...
    @property
    def num_queues(self) -> int: ...
    @property
    def queue_size(self) -> int: ...


class HostPages(NamedTuple):
    """Whole pages of one region that hold a part of a guest range; in bytes."""

    host: int
    length: int
    inside: int
    """Of ``length``, what lies within the range."""


def explain(code: int) -> str:
    """A ``VU_E_`` code in words. Right after a call that failed with VU_E_SYS: the system's own words."""
    if code == lib.VU_E_SYS:
        return os.strerror(ffi.errno)
    return _WORDS.get(code, f"error {code}")


class Region:
    """One mapping of a front-end's file. Unmapped when nobody refers to it any more: no map, no queue, no Region.

    ``guest``, ``size``, ``user``, ``offset`` are as the front-end gave them; ``host`` is our address of the first byte;
    ``base`` and ``length`` are the whole mapping, in pages of ``page_size`` bytes (the huge page's where ``hugetlb``);
    ``device`` and ``inode`` name the file; ``sealed`` tells whether it can never shrink (F_SEAL_SHRINK).
    """

    __slots__ = (
        "base", "device", "guest", "host", "hugetlb", "inode", "length", "native", "offset", "page_size", "sealed",
        "size", "user",
    )  # fmt: skip

    guest: int
    size: int
    user: int
    offset: int
    host: int
    base: int
    length: int
    page_size: int
    device: int
    inode: int
    hugetlb: bool
    sealed: bool
    native: Any

    @classmethod
    def map(
        cls,
        fd: int,
        description: Described,
        *,
        at_user: bool = False,
        hidden: bool = False,
        own: bool = False,
        writable: bool = True,
    ) -> Self:
        """Maps a region; the caller keeps ``fd``. Touches nothing.

        at_user: at the front-end's own address, if that range is free here. hidden: inaccessible until ``reveal``.
        own: we are the front-end, so that ``user`` becomes our address. writable: if not, a write raises MemoryLost.
        Raises RequestRefused.
        """
        flags = at_user * lib.VU_REGION_AT_USER | hidden * lib.VU_REGION_HIDDEN | own * lib.VU_REGION_OWN
        flags |= (not writable) * lib.VU_REGION_READ_ONLY
        error = ffi.new("int *")
        asked = description
        native = lib.vu_region_map(fd, asked.guest, asked.size, asked.user, asked.offset, flags, error)
        if native == ffi.NULL:
            raise RequestRefused(
                f"region of {asked.size:#x} bytes at guest address {asked.guest:#x}, offset {asked.offset:#x} of its "
                f"file: {explain(error[0])}"
            )
        return cls._of(native)

    @classmethod
    def private(cls, guest: int, size: int) -> Self:
        """Anonymous memory of whole pages that no other process has. Raises RequestRefused."""
        error = ffi.new("int *")
        native = lib.vu_region_private(guest, size, error)
        if native == ffi.NULL:
            raise RequestRefused(f"private region of {size:#x} bytes at guest address {guest:#x}: {explain(error[0])}")
        return cls._of(native)

    @classmethod
    def _of(cls, native: Any) -> Self:
        """Takes over the reference."""
        region = cls()
        region.native = ffi.gc(native, lib.vu_region_put)
        info = ffi.new("struct vu_region_info *")
        lib.vu_region_describe(native, info)
        for name in ("guest", "size", "user", "offset", "host", "base", "length", "page_size", "device", "inode"):
            setattr(region, name, getattr(info, name))
        region.hugetlb, region.sealed = bool(info.hugetlb), bool(info.sealed)
        return region

    def reveal(self) -> None:
        """Makes a hidden region accessible. Raises MemoryLost once it was revoked."""
        _check(lib.vu_region_reveal(self.native))

    def revoke(self) -> None:
        """Makes the region inaccessible for good; who touches it, or is woken from a fault in it, gets MemoryLost."""
        _check(lib.vu_region_revoke(self.native))

    def no_huge(self) -> None:
        """Empties our page table of it and forbids transparent huge pages, as userfaultfd needs. The file stays."""
        _check(lib.vu_region_no_huge(self.native))

    def pages(self, guest: int, length: int) -> HostPages:
        """Our pages that hold bytes of this guest range, at least one of which is in the region."""
        first, end = max(guest, self.guest), min(guest + length, self.guest + self.size)
        start = first + self.host - self.guest
        stop = end + self.host - self.guest
        host = start - start % self.page_size
        return HostPages(host, stop + -stop % self.page_size - host, end - first)

    def same(self, description: Described, fd: int) -> bool:
        """Whether a front-end that says this, with this descriptor, means this very region."""
        numbers = (self.guest, self.size, self.user, self.offset)
        if numbers != (description.guest, description.size, description.user, description.offset):
            return False
        status = os.fstat(fd)
        return (status.st_dev, status.st_ino) == (self.device, self.inode)

    def state(self) -> dict[str, object]:
        """For the state dump: JSON-able values."""
        return {
            "guest": f"{self.guest:#x}",
            "size": self.size,
            "user": f"{self.user:#x}",
            "host": f"{self.host:#x}",
            "page_size": self.page_size,
            "sealed": self.sealed,
        }

    def __repr__(self) -> str:
        return f"<Region guest {self.guest:#x} + {self.size:#x}, user {self.user:#x}, host {self.host:#x}>"


_guest = attrgetter("guest")


class GuestMemory:
    """An immutable set of regions; may be shared between threads. Raises RequestRefused for regions that overlap."""

    __slots__ = ("_by_guest", "native", "regions")

    def __init__(self, regions: Sequence[Region] = ()) -> None:
        self.regions = tuple(regions)
        self._by_guest = sorted(self.regions, key=_guest)
        error = ffi.new("int *")
        native = lib.vu_map_new([region.native for region in self.regions], len(self.regions), error)
        if native == ffi.NULL:
            raise RequestRefused(explain(error[0]))
        self.native = ffi.gc(native, lib.vu_map_put)

    def __bool__(self) -> bool:
        """Whether there is any memory."""
        return bool(self.regions)

    @property
    def sealed(self) -> bool:
        """Whether none of it can be lost: no file can be truncated, nor lacks a huge page when one is first touched."""
        return all(region.sealed and not region.hugetlb for region in self.regions)

    # ---- other sets

    def add(self, region: Region) -> GuestMemory:
        """These regions and one more. Raises RequestRefused if it overlaps one of them."""
        return GuestMemory((*self.regions, region))

    def remove(self, region: Region) -> GuestMemory:
        """These regions without this one, which must be of the set."""
        return GuestMemory(tuple(kept for kept in self.regions if kept is not region))

    def find(self, guest: int, size: int, user: int) -> Region:
        """The region that a REM_MEM_REG with these numbers means. Raises RequestRefused if there is none."""
        for region in self.regions:
            if (region.guest, region.size, region.user) == (guest, size, user):
                return region
        raise RequestRefused(
            f"there is no region of {size:#x} bytes at guest address {guest:#x} and user address {user:#x}"
        )

    def same(self, description: Described, fd: int) -> Region | None:
        """The region that is mapped already from the same place of the same file for the same addresses, if any."""
        return next((region for region in self.regions if region.same(description, fd)), None)

    # ---- translation of one byte's address; LookupError where nothing is mapped

    def guest_to_host(self, guest: int) -> int:
        """Our address of a guest address."""
        return _mapped(lib.vu_map_guest_to_host(self.native, guest), guest, "guest")

    def user_to_host(self, user: int) -> int:
        """Our address of an address of the front-end."""
        return _mapped(lib.vu_map_user_to_host(self.native, user), user, "user")

    def user_to_guest(self, user: int) -> int:
        """The guest address of an address of the front-end."""
        error = ffi.new("int *")
        guest = int(lib.vu_map_user_to_guest(self.native, user, error))
        return _mapped(guest, user, "user", found=not error[0])

    def guest_to_user(self, guest: int) -> int:
        """The front-end's address of a guest address."""
        for region in self.regions:
            if region.guest <= guest < region.guest + region.size:
                return region.user + guest - region.guest
        return _mapped(0, guest, "guest")

    def guest_to_pages(self, guest: int, length: int) -> Iterator[HostPages]:
        """Our pages that hold bytes of a guest range of any length, for each region that it meets; no LookupError."""
        first = max(0, bisect_right(self._by_guest, guest, key=_guest) - 1)
        for number in range(first, len(self._by_guest)):
            region = self._by_guest[number]
            if region.guest >= guest + length:
                return
            if guest < region.guest + region.size and length:
                yield region.pages(guest, length)

    # ---- copies; they touch guest memory and may block, so never on the control thread

    def read(self, guest: int, length: int) -> bytes:
        """Copies out. Raises LookupError outside of memory, MemoryLost if it is gone."""
        data = bytearray(length)
        _copied(lib.vu_map_read(self.native, guest, ffi.from_buffer(data), length), guest, length)
        return bytes(data)

    def write(self, guest: int, data: bytes | bytearray | memoryview) -> None:
        """Copies in; nothing is marked in a dirty log. Raises as ``read``."""
        source = ffi.from_buffer(data)
        _copied(lib.vu_map_write(self.native, guest, source, len(source)), guest, len(source))

    def publish(self, guest: int, value: int) -> None:
        """Stores 16 bits, in one piece, behind everything that was stored before. Raises as ``read``."""
        _copied(lib.vu_map_publish16(self.native, guest, value & 0xFFFF), guest, 2)

    def revoke(self) -> None:
        """Revokes every region. About 10 ms for each GiB of mapped pages; touches nothing."""
        _check(lib.vu_map_revoke(self.native))


class PrivateMemory:
    """Guest memory that nobody shares: private anonymous regions (guest address, bytes). Raises RequestRefused.

    For ``faultserver.FaultServer``, whose pages can then be moved in instead of copied. ``fds``: it has none.
    """

    fds: tuple[int, ...] = ()

    def __init__(self, *regions: tuple[int, int]) -> None:
        self.map = GuestMemory([Region.private(guest, size) for guest, size in regions])


class DirtyLog:
    """The mapped log of written pages: a bit for each 4096 bytes of guest memory. Unmapped with the last reference."""

    __slots__ = ("native", "size")

    def __init__(self, native: Any, size: int) -> None:
        self.native = native
        self.size = size

    @classmethod
    def map(cls, fd: int, size: int, offset: int = 0) -> Self:
        """Maps ``size`` bytes from ``offset`` of the file; the caller keeps ``fd``. Raises RequestRefused."""
        error = ffi.new("int *")
        native = lib.vu_log_map(fd, size, offset, error)
        if native == ffi.NULL:
            raise RequestRefused(f"dirty log of {size} bytes at offset {offset} of its file: {explain(error[0])}")
        return cls(ffi.gc(native, lib.vu_log_put), size)

    def tell(self, fd: int) -> None:
        """An eventfd that is signalled when marks were added, once for a batch of requests; -1: none is.

        Only while no queue has the log. ``fd`` stays the caller's, and open for as long as one may have it.
        """
        lib.vu_log_set_event(self.native, fd)

    def take(self) -> list[tuple[int, int]]:
        """Takes every mark away; the (guest address, bytes) of each run of marked pages, lowest first.

        Raises MemoryLost if the log was truncated.
        """
        page, ranges = ffi.new("uint64_t *"), ffi.new("vu_range[]", _RANGES)
        taken: list[tuple[int, int]] = []
        while True:
            count = lib.vu_log_take(self.native, page, ranges, _RANGES)
            _check(count)
            taken += [(run.guest, run.length) for run in ranges[0:count]]
            if count <= _RANGES - lib.VU_LOG_RANGES:
                return _joined(taken)

    def mark(self, guest: int, length: int) -> None:
        """Marks the pages of a range as written. Raises LookupError for pages that the log does not cover."""
        _copied(lib.vu_log_mark(self.native, guest, length), guest, length)


def _joined(runs: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Runs that follow each other at once, as where one call ended, made one."""
    joined: list[tuple[int, int]] = []
    for guest, length in runs:
        if joined and sum(joined[-1]) == guest:
            guest, length = joined[-1][0], joined.pop()[1] + length
        joined.append((guest, length))
    return joined


def _check(code: int) -> None:
    if code == lib.VU_E_FAULT:
        raise MemoryLost
    if code < 0:
        raise OSError(ffi.errno, explain(code))


def _copied(result: int, guest: int, length: int) -> None:
    if result == lib.VU_E_FAULT:
        raise MemoryLost
    if result < 0:
        raise LookupError(f"{length} bytes at guest address {guest:#x}: {explain(result)}")


def _mapped(address: int, asked: int, kind: str, *, found: bool | None = None) -> int:
    if not (address if found is None else found):
        raise LookupError(f"nothing is mapped at {kind} address {asked:#x}")
    return address
