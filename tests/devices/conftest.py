"""Guest memory, a split ring written by hand, and the block engine run over it: no thread, no socket, no driver code.

The ring is written here byte by byte so that a test can put anything into it, and so that a mistake in the project's
own driver side cannot hide one in the device side. Network interfaces are driven through a real connection instead
(``interface``).
"""

from __future__ import annotations

import fcntl
import itertools
import mmap
import os
import select
import struct
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.devices.interface import Connected, Interface
from vhostuser._native import ffi, lib
from vhostuser.devices.ends import End
from vhostuser.devices.net import NetSettings

GUEST = 1 << 32
# Where the parts of the ring are, with room for 4096 entries.
DESC, AVAIL, USED, HEAP = 0, 1 << 16, 1 << 17, 1 << 18
NEXT, WRITE, INDIRECT = 1, 2, 4

UNTOUCHED = 0xEE
"""What every byte that the device may write holds before."""


class Memory:
    """One region of guest memory at guest address ``guest``, handed out from ``free`` on."""

    def __init__(self, guest: int, size: int, free: int = 0) -> None:
        self.fd = os.memfd_create("guest", os.MFD_CLOEXEC)
        os.ftruncate(self.fd, size)
        self.bytes = mmap.mmap(self.fd, size)
        self.guest, self.size, self._first = guest, size, free
        self._free = free
        error = ffi.new("int *")
        self.region = ffi.gc(lib.vu_region_map(self.fd, guest, size, guest, 0, 0, error), lib.vu_region_put)
        assert self.region != ffi.NULL, error[0]

    def take(self, length: int) -> int:
        """The guest address of fresh bytes, at an odd distance from the ones before."""
        address, self._free = self._free, self._free + length + 3
        assert self._free <= self.size, "the test wants more guest memory than there is"
        return self.guest + address

    def put(self, data: bytes) -> int:
        address = self.take(len(data))
        self.bytes[address - self.guest : address - self.guest + len(data)] = data
        return address

    def get(self, address: int, length: int) -> bytes:
        return self.bytes[address - self.guest : address - self.guest + length]

    def clear(self) -> None:
        self._free = self._first

    def close(self) -> None:
        self.bytes.close()
        os.close(self.fd)


@dataclass
class Answer:
    """What came back for one chain."""

    length: int
    data: bytes
    """The writable part without its last byte."""
    status: int


@dataclass
class Disk:
    """The engine on an image, and the driver's side of its ring."""

    fd: int
    sectors: int
    read_only: bool = False
    writeback: bool = True
    block_size: int = 512
    serial: bytes = b"a serial number"
    log_bytes: int = 0
    ring_size: int = 256
    evicted: bool = False
    """The page cache holds nothing of the image when the engine starts."""

    def __post_init__(self) -> None:
        error = ffi.new("int *")
        self.memory = Memory(GUEST, 8 << 20, HEAP)
        self.fragile = Memory(GUEST + (1 << 24), 1 << 20)
        regions = [self.memory.region, self.fragile.region]
        self.map = ffi.gc(lib.vu_map_new(regions, 2, error), lib.vu_map_put)
        assert self.map != ffi.NULL, error[0]
        self.log_fd = os.memfd_create("log", os.MFD_CLOEXEC)
        self.log = ffi.NULL
        if self.log_bytes:
            os.ftruncate(self.log_fd, self.log_bytes)
            self.log = ffi.gc(lib.vu_log_map(self.log_fd, self.log_bytes, 0, error), lib.vu_log_put)
        ring = {"size": self.ring_size, "flags": lib.VU_RING_INDIRECT | lib.VU_RING_GUEST_ADDR}
        ring |= {"desc": GUEST + DESC, "avail": GUEST + AVAIL, "used": GUEST + USED}
        self.queue = ffi.gc(
            lib.vu_queue_new(self.map, ffi.new("struct vu_ring *", ring), self.log, ffi.NULL, ffi.NULL, error),
            lib.vu_queue_free,
        )
        assert self.queue != ffi.NULL, error[0]
        self.call = os.eventfd(0, os.EFD_NONBLOCK)
        self.stop = os.eventfd(1, os.EFD_NONBLOCK)  # already set: the engine serves what is there, then returns
        lib.vu_queue_set_call(self.queue, self.call)
        self.blk = ffi.gc(lib.vu_blk_new(self._config(), error), lib.vu_blk_free)
        assert self.blk != ffi.NULL, error[0]
        self.available = self.used = self.next_desc = 0

    def _config(self) -> object:
        changes = 0 if self.read_only else lib.VU_BLK_DISCARD | lib.VU_BLK_WRITE_ZEROES
        return ffi.new(
            "struct vu_blk_config *",
            {
                "fd": self.fd,
                "flags": changes | self.read_only * lib.VU_BLK_READ_ONLY | self.writeback * lib.VU_BLK_WRITEBACK,
                "sectors": self.sectors,
                "block_size": self.block_size,
                "max_segments": 8,
                "poll_us": 0,
                "serial": self.serial.ljust(20, b"\0"),
            },
        )

    def close(self) -> None:
        for handle in (self.blk, self.queue, self.map, self.log):
            if handle != ffi.NULL:
                ffi.release(handle)
        for fd in (self.call, self.stop, self.log_fd):
            os.close(fd)
        self.memory.close()
        self.fragile.close()

    # ---- the driver's side

    def offer(self, readable: Sequence[tuple[int, int]], writable: Sequence[tuple[int, int]]) -> int:
        """Makes one chain of (guest address, length) available; its head. An indirect table where it is long."""
        parts = [(*part, 0) for part in readable] + [(*part, WRITE) for part in writable]
        table = b"".join(
            struct.pack("<QIHH", address, length, flags | (NEXT if i + 1 < len(parts) else 0), i + 1)
            for i, (address, length, flags) in enumerate(parts)
        )
        at = self.memory.put(table)
        head = self.next_desc
        self.next_desc = (head + 1) % self.ring_size
        struct.pack_into("<QIHH", self.memory.bytes, DESC + 16 * head, at, len(table), INDIRECT, 0)
        struct.pack_into("<H", self.memory.bytes, AVAIL + 4 + 2 * (self.available % self.ring_size), head)
        self.available = self.available + 1 & 0xFFFF
        # Not by pack_into, which clears the bytes first: an engine that looks just then sees an index of 0.
        self.memory.bytes[AVAIL + 2 : AVAIL + 4] = struct.pack("<H", self.available)
        return head

    def run(self) -> int:
        """Serves what is available, at most one batch."""
        if self.evicted:
            os.fdatasync(self.fd)
            os.posix_fadvise(self.fd, 0, 0, os.POSIX_FADV_DONTNEED)
        code: int = lib.vu_blk_run(self.blk, self.queue, -1, self.stop)
        return code

    def completed(self) -> dict[int, int]:
        """Length by head, of what was used since last asked."""
        (index,) = struct.unpack_from("<H", self.memory.bytes, USED + 2)
        found = {}
        while self.used != index:
            head, length = struct.unpack_from("<II", self.memory.bytes, USED + 4 + 8 * (self.used % self.ring_size))
            found[head] = length
            self.used = self.used + 1 & 0xFFFF
        return found

    def place(self, data: bytes, cuts: Sequence[int] = ()) -> list[tuple[int, int]]:
        """Puts data into guest memory, cut into segments at ``cuts``."""
        edges = [0, *sorted(cut for cut in set(cuts) if 0 < cut < len(data)), len(data)]
        return [(self.memory.put(data[low:high]), high - low) for low, high in itertools.pairwise(edges) if high > low]

    def exchange(
        self, readable: bytes, writable: int, read_cuts: Sequence[int] = (), write_cuts: Sequence[int] = ()
    ) -> Answer:
        """One chain of these bytes, served; what came back."""
        self.memory.clear()
        space = self.place(bytes([UNTOUCHED]) * writable, write_cuts)
        head = self.offer(self.place(readable, read_cuts), space)
        assert self.run() == 0
        used = self.completed()
        assert list(used) == [head]
        back = b"".join(self.memory.get(address, length) for address, length in space)
        return Answer(used[head], back[:-1], back[-1] if back else UNTOUCHED)

    def request(self, kind: int, sector: int = 0, data: bytes = b"", room: int = 0) -> Answer:
        """One well-formed request with ``data`` to read and ``room`` bytes to write beside the status."""
        return self.exchange(self.header(kind, sector) + data, room + 1)

    def stats(self) -> dict[str, int]:
        stats = ffi.new("struct vu_blk_stats *")
        lib.vu_blk_get_stats(self.blk, stats)
        return {name: getattr(stats, name) for name, _ in ffi.typeof("struct vu_blk_stats").fields}

    def content(self) -> bytes:
        return self.stored(0, self.sectors)

    def stored(self, low: int, high: int) -> bytes:
        """What sectors ``low`` to ``high`` of the image hold; zeroes behind its end."""
        with mmap.mmap(-1, (high - low) * 512) as aligned:
            os.preadv(self.fd, [aligned], low * 512)
            return aligned[:]

    @staticmethod
    def header(kind: int, sector: int = 0) -> bytes:
        return struct.pack("<IIQ", kind, 0, sector)

    @staticmethod
    def ranges(*parts: tuple[int, int, int]) -> bytes:
        """Discard and write-zeroes ranges: (sector, sectors, flags)."""
        return b"".join(struct.pack("<QII", *part) for part in parts)


MEDIA = ("memory", "direct", "evicted")
"""A file in memory; one on a medium past the page cache; one on a medium through a page cache that is empty."""


class Disks:
    """Makes disks that are closed at the end. ``directory`` is where files on a medium go."""

    def __init__(self, medium: str = "memory", directory: Path | None = None) -> None:
        self.medium = medium
        self._directory = directory
        self._open: list[Disk] = []
        self._fds: list[int] = []

    def __enter__(self) -> Disks:
        return self

    def __exit__(self, *_: object) -> None:
        for disk in self._open:
            disk.close()
        for fd in self._fds:
            os.close(fd)

    def image(self, sectors: int, seals: int = 0) -> int:
        """A descriptor of an image filled with a pattern that differs from sector to sector."""
        if self._directory is not None and self.medium != "memory":
            if seals:
                pytest.skip("only files in memory can be sealed")
            return self.file(self._directory / f"image{len(self._fds)}", sectors, direct=self.medium == "direct")
        fd = os.memfd_create("image", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.pwrite(fd, self.pattern(0, sectors), 0)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
        return self.keep(fd)

    def file(self, path: Path, sectors: int, *, direct: bool) -> int:
        """The same on a medium; skips the test where that takes no direct I/O of 512 bytes."""
        with path.open("wb") as file:
            file.write(self.pattern(0, sectors))
            file.flush()
            os.fsync(file.fileno())
        try:
            fd = self.keep(os.open(path, os.O_RDWR | (os.O_DIRECT if direct else 0)))
            with mmap.mmap(-1, 512) as aligned:
                os.preadv(fd, [aligned], 512)
        except OSError as error:
            pytest.skip(f"{path}: no direct I/O of 512 bytes here: {error.strerror}")
        return fd

    @staticmethod
    def pattern(low: int, high: int) -> bytes:
        """What sectors ``low`` to ``high`` of a fresh image hold."""
        return b"".join(bytes([sector % 251 + 1]) * 512 for sector in range(low, high))

    def keep(self, fd: int) -> int:
        """Closes ``fd`` at the end."""
        self._fds.append(fd)
        return fd

    def __call__(self, sectors: int = 64, fd: int = -1, **settings: object) -> Disk:
        settings.setdefault("evicted", fd < 0 and self.medium == "evicted")
        disk = Disk(fd if fd >= 0 else self.image(sectors), sectors, **settings)  # type: ignore[arg-type]
        self._open.append(disk)
        return disk


@pytest.fixture(scope="session")
def disk_maker() -> type[Disks]:
    """For tests that need fresh disks many times over."""
    return Disks


@pytest.fixture(params=MEDIA)
def disks(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Disks]:
    """Disks for one test, on every kind of medium."""
    with Disks(request.param, tmp_path) as made:
        yield made


class Served:
    """A disk whose engine is on a thread."""

    def __init__(self, disk: Disk, kick: int) -> None:
        self.disk, self.kick = disk, kick
        self.codes: list[int] = []
        os.eventfd_read(disk.stop)
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        self.codes.append(lib.vu_blk_run(self.disk.blk, self.disk.queue, self.kick, self.disk.stop))

    def completed(self, count: int) -> dict[int, int]:
        """Waits until ``count`` chains have been used."""
        used: dict[int, int] = {}
        while len(used) < count:
            assert select.select([self.disk.call], [], [], 5)[0], f"only {len(used)} of {count} came back"
            os.eventfd_read(self.disk.call)
            used |= self.disk.completed()
        return used

    def stop(self) -> int:
        os.eventfd_write(self.disk.stop, 1)
        return self.ended()

    def ended(self) -> int:
        """Waits for its end; what it returned."""
        self._thread.join(5)
        assert self.codes, "the engine did not stop"
        return self.codes[0]


@pytest.fixture
def served(disks: Disks) -> type[Served]:
    """To put a disk's engine on a thread."""
    return Served


@pytest.fixture
async def connected() -> AsyncIterator[Connected]:
    made: list[Interface] = []

    async def make(end: End, settings: NetSettings | None = None, **options: object) -> Interface:
        driver = {name: options.pop(name) for name in ("features", "slots", "slot_bytes") if name in options}
        made.append(Interface(end, settings, **driver))  # type: ignore[arg-type]
        return await made[-1].start(**options)  # type: ignore[arg-type]

    yield make
    for interface in made:
        await interface.close()
