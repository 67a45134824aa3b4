"""The block engine with requests under way while others go on: a medium that is waited for, by an io_uring."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.devices.conftest import USED
from tests.devices.test_engine import lose, unwritten_pages
from vhostuser._native import lib

IN, OUT, FLUSH, GET_ID, DISCARD, WRITE_ZEROES = 0, 1, 4, 8, 11, 13
OK, IOERR, UNSUPP = 0, 1, 2
UNMAP = 1
SECTORS = 64

IN, OUT, FLUSH, GET_ID, DISCARD, WRITE_ZEROES = 0, 1, 4, 8, 11, 13
OK, IOERR, UNSUPP = 0, 1, 2
UNMAP = 1
SECTORS = 64


def io_urings() -> int:
    """How many this process has open."""
    found = 0
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            found += "io_uring" in str(entry.readlink())
    return found


@pytest.fixture
def waiting(disks: Any) -> Any:
    """Disks whose medium is waited for by an io_uring, if this kernel gives one."""
    if disks.medium == "memory":
        pytest.skip("nothing is waited for in memory")
    fd = ctypes.CDLL(None, use_errno=True).syscall(425, 1, bytes(120))
    if fd < 0:
        pytest.skip(f"io_uring_setup: {errno.errorcode[ctypes.get_errno()]}")
    os.close(fd)
    return disks


def offer_read(disk: Any, sector: int, length: int) -> tuple[int, int]:
    """Offers a read of whole pages into aligned memory; its head and where the data will be."""
    at = -(-disk.memory.take(length + 4096) // 4096) * 4096
    return disk.offer(disk.place(disk.header(IN, sector)), [(at, length), *disk.place(b"?")]), at


def test_more_requests_than_can_be_under_way_are_all_served(waiting: Any, served: Any) -> None:
    disk = waiting(SECTORS, ring_size=512)
    if disk.evicted:
        os.posix_fadvise(disk.fd, 0, 0, os.POSIX_FADV_DONTNEED)
    wanted = dict(offer_read(disk, 8 * (n % 8), 4096) for n in range(300))
    engine = served(disk, -1)
    used = engine.completed(300)
    assert io_urings() == 1
    assert engine.stop() == 0
    assert io_urings() == 0
    assert used == dict.fromkeys(wanted, 4097)
    for n, at in enumerate(wanted.values()):
        assert disk.memory.get(at, 4096) == waiting.pattern(8 * (n % 8), 8 * (n % 8) + 8)
    assert lib.vu_queue_out(disk.queue) == 0


def test_no_more_are_taken_than_can_be_under_way(waiting: Any, served: Any, tmp_path: Path) -> None:
    disk = waiting(1 << 16, fd=waiting.file(tmp_path / "large", 1 << 16, direct=False), ring_size=512)
    os.pwrite(disk.fd, os.urandom(32 << 20), 0)  # so that the first ones take their time
    heads = [disk.offer(disk.place(disk.header(FLUSH)), disk.place(b"?")) for _ in range(300)]
    engine = served(disk, -1)
    assert engine.completed(300) == dict.fromkeys(heads, 1)
    assert engine.stop() == 0


def test_unaligned_requests_share_a_few_bounce_buffers(waiting: Any) -> None:
    disk = waiting(SECTORS)
    heads = [disk.offer(disk.place(disk.header(IN, n)), disk.place(bytes(1025), [n + 1, 600])) for n in range(60)]
    assert disk.run() == 0
    assert disk.completed() == dict.fromkeys(heads, 1025)
    assert disk.stats()["errors"] == 0


def test_what_does_not_wait_overtakes_a_flush(waiting: Any) -> None:
    disk = waiting(SECTORS)
    flush = disk.offer(disk.place(disk.header(FLUSH)), disk.place(b"?"))
    quick = disk.offer(disk.place(disk.header(GET_ID)), disk.place(bytes(21)))
    assert disk.run() == 0
    assert list(disk.completed()) == [quick, flush]


def test_a_flush_covers_every_write_that_came_back_before_it(disks: Any, tmp_path: Path) -> None:
    path = tmp_path / "image"
    disk = disks(SECTORS, fd=disks.file(path, SECTORS, direct=False))
    for _ in range(20):
        assert disk.request(OUT, 8, os.urandom(4096)).status == OK
        assert disk.request(FLUSH).status == OK
        assert not unwritten_pages(disk.fd)


def test_a_stop_waits_for_what_is_under_way(waiting: Any, served: Any) -> None:
    disk = waiting(SECTORS, ring_size=512)
    engine = served(disk, -1)
    wanted = [offer_read(disk, 0, 4096)[0] for _ in range(100)]
    code = engine.stop()
    used = disk.completed()
    assert code == 0
    assert lib.vu_queue_out(disk.queue) == 0
    assert set(used) <= set(wanted)
    assert set(used.values()) <= {4097}


def test_nothing_is_written_into_guest_memory_after_the_ring_broke(waiting: Any) -> None:
    """The first requests are on their way when a later one finds no place for its status."""
    disk = waiting(1024, ring_size=512, evicted=True)
    pieces = 40
    for n in range(50):  # together more pieces than wait for one submission
        at = -(-disk.memory.take(4096 * 9 + 4096) // 4096) * 4096
        disk.offer(
            disk.place(disk.header(IN, 8 * n)),
            [*((at + 512 * piece, 512) for piece in range(pieces)), *disk.place(b"?")],
        )
    disk.offer(disk.place(disk.header(99)), [(disk.fragile.take(1), 1)])
    lose(disk.fragile)
    assert disk.run() == lib.VU_E_FAULT
    after = disk.memory.bytes[:]
    assert io_urings() == 0
    os.fsync(disk.fd)
    # Not the comparison itself: a difference of megabytes takes minutes to be shown.
    unchanged = disk.memory.bytes[:] == after
    assert unchanged


def test_what_is_under_way_when_the_driver_breaks_the_ring_is_returned(waiting: Any, served: Any) -> None:
    disk = waiting(SECTORS, ring_size=512, evicted=True)
    good = [offer_read(disk, 0, 4096)[0] for _ in range(100)]
    disk.offer([(1 << 40, 16)], disk.place(b"?"))
    engine = served(disk, -1)
    assert engine.completed(100) == dict.fromkeys(good, 4097)
    assert engine.ended() == lib.VU_E_RANGE
    assert lib.vu_queue_out(disk.queue) == 0


def test_a_write_through_request_is_on_the_medium_also_when_many_are_under_way(waiting: Any, tmp_path: Path) -> None:
    disk = waiting(1024, fd=waiting.file(tmp_path / "image", 1024, direct=False), writeback=False)
    data = os.urandom(4096)
    heads = [disk.offer(disk.place(disk.header(OUT, 8 * n) + data), disk.place(b"?")) for n in range(50)]
    assert disk.run() == 0
    assert disk.completed() == dict.fromkeys(heads, 1)
    assert not unwritten_pages(disk.fd)
    assert disk.content()[: 50 * 4096] == data * 50


FORBID = """
import ctypes, struct, sys, pytest
# Load the number of the system call; the one that is forbidden fails with EPERM.
steps = [(0x20, 0, 0, 0), (0x15, 0, 1, int(sys.argv[1])), (0x06, 0, 0, 0x50001), (0x06, 0, 0, 0x7FFF0000)]
code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))
program = struct.pack("HxxxxxxP", len(steps), ctypes.addressof(code))
libc = ctypes.CDLL(None)
if libc.prctl(38, 1, 0, 0, 0) or libc.prctl(22, 2, program, 0, 0):
    sys.exit(77)
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", *sys.argv[2:]]))
"""


@pytest.mark.parametrize("number", [425, 426], ids=["io_uring_setup", "io_uring_enter"])
def test_without_an_io_uring_everything_is_served_all_the_same(number: int) -> None:
    """A filter as a container has it, or one that comes after the setup: the tests of this file, once more."""
    here = Path(__file__)
    others = "not without_an_io_uring and not overtakes and not all_served and not broke"
    done = subprocess.run(
        [sys.executable, "-c", FORBID, str(number), str(here), "-k", others, "--rootdir", str(here.parents[2])],
        capture_output=True,
        text=True,
        cwd=here.parents[2],
    )
    if done.returncode == 77:
        pytest.skip("this kernel takes no seccomp filter")
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_ring_that_stops_asks_for_kicks(disks: Any) -> None:
    """The next one to serve it starts at a kick, which a driver that was told to send none would never send."""
    disk = disks()
    disk.memory.bytes[USED : USED + 2] = b"\x01\x00"  # VIRTQ_USED_F_NO_NOTIFY
    assert disk.run() == 0
    assert disk.memory.bytes[USED : USED + 2] == b"\0\0"
