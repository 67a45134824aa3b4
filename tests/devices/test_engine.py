"""The block engine serves what virtio 1.3 section 5.2.6 asks, whatever the layout, and never says OK to what failed."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import select
import struct
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vhostuser._native import ffi, lib

IN, OUT, FLUSH, GET_ID, DISCARD, WRITE_ZEROES = 0, 1, 4, 8, 11, 13
OK, IOERR, UNSUPP = 0, 1, 2
UNMAP = 1
SECTORS = 64

# ---- every request, in every layout, against a bytearray


def model(disk: bytearray, kind: int, sector: int, data: bytes, room: int) -> tuple[int, bytes]:
    """Status and data of one request, by the specification; ``disk`` is changed."""
    if kind in (IN, OUT):
        length = room if kind == IN else len(data)
        here = slice(sector * 512, sector * 512 + length)
        if length % 512 or here.stop > len(disk):
            return IOERR, b""
        if kind == IN:
            return OK, bytes(disk[here])
        disk[here] = data
        return OK, b""
    if kind == GET_ID:
        return OK, b"a serial number".ljust(20, b"\0")[:room]
    if kind in (DISCARD, WRITE_ZEROES):
        return model_ranges(disk, kind, data), b""
    return (OK if kind == FLUSH else UNSUPP), b""


def model_ranges(disk: bytearray, kind: int, data: bytes) -> int:
    if not data or len(data) % 16 or len(data) // 16 > 8:
        return IOERR
    parts = list(struct.iter_unpack("<QII", data))
    for sector, count, flags in parts:
        if flags & ~(UNMAP if kind == WRITE_ZEROES else 0):
            return UNSUPP
        if (sector + count) * 512 > len(disk):
            return IOERR
    for sector, count, _ in parts:
        disk[sector * 512 : (sector + count) * 512] = bytes(count * 512)
    return OK


anywhere = st.one_of(st.integers(0, SECTORS + 2), st.sampled_from([2**32, 2**55, 2**63, 2**64 - 1]))
some_ranges = st.lists(st.tuples(anywhere, st.integers(0, SECTORS), st.sampled_from([0, 0, 0, 1, 2])), max_size=9)
cuts = st.lists(st.integers(1, 5000), max_size=20)
lengths = st.one_of(st.integers(0, 9).map(lambda count: 512 * count), st.integers(0, 3000))
content = st.builds(lambda length, byte: bytes([byte]) * length, lengths, st.integers(0, 255))
requests = st.one_of(
    st.tuples(st.just(IN), anywhere, st.just(b""), lengths),
    st.tuples(st.just(OUT), anywhere, content, st.just(0)),
    st.tuples(
        st.sampled_from([DISCARD, WRITE_ZEROES]),
        anywhere,
        some_ranges.map(lambda parts: b"".join(struct.pack("<QII", *part) for part in parts)),
        st.just(0),
    ),
    st.tuples(st.sampled_from([FLUSH, GET_ID, 2, 1 << 31, 99]), anywhere, st.binary(max_size=40), st.integers(0, 60)),
)


def play(disk: Any, script: list[Any]) -> None:
    expected = bytearray(disk.content())
    for (kind, sector, data, room), read_cuts, write_cuts in script:
        status, back = model(expected, kind, sector, data, room)
        answer = disk.exchange(disk.header(kind, sector) + data, room + 1, read_cuts, write_cuts)
        assert answer.status == status
        if status == OK:
            assert answer.data[: len(back)] == back
            assert answer.length == len(back) + 1
        assert disk.content() == bytes(expected)


@settings(max_examples=200, deadline=None)
@given(script=st.lists(st.tuples(requests, cuts, cuts), max_size=8))
def test_the_disk_is_what_a_bytearray_says(disk_maker: Any, script: list[Any]) -> None:
    with disk_maker() as disks:
        play(disks(SECTORS), script)


@pytest.mark.parametrize("direct", [True, False], ids=["direct", "evicted"])
@settings(max_examples=40, deadline=None)
@given(script=st.lists(st.tuples(requests, cuts, cuts), max_size=8))
def test_the_same_on_a_medium_that_is_waited_for(
    disk_maker: Any, tmp_path_factory: Any, direct: bool, script: list[Any]
) -> None:
    path = tmp_path_factory.getbasetemp() / "image"
    with disk_maker() as disks:
        play(disks(SECTORS, fd=disks.file(path, SECTORS, direct=direct), evicted=not direct), script)


def test_direct_io_takes_aligned_buffers_without_a_copy_and_keeps_the_end(disks: Any, tmp_path: Path) -> None:
    path = tmp_path / "image"
    disk = disks(SECTORS, fd=disks.file(path, SECTORS, direct=True))
    assert disk.exchange(disk.header(IN, 8), 4097).data == disks.pattern(8, 16)
    os.truncate(path, 40 * 512)
    assert disk.request(IN, 36, room=4096).status == IOERR


def test_a_chain_of_more_segments_than_one_system_call_takes(disks: Any) -> None:
    disk = disks(SECTORS, ring_size=4096)
    data = os.urandom(20 * 512)
    # 16 bytes of header and 10,240 of data, the first 4,000 in segments of one byte.
    assert disk.exchange(disk.header(OUT, 3) + data, 1, range(1, 4000)).status == OK
    assert disk.content()[3 * 512 : 23 * 512] == data
    assert disk.exchange(disk.header(IN, 3), len(data) + 1, (), range(1, 4000)).data == data


def test_one_batch_of_many_requests_is_returned_whole(disks: Any) -> None:
    disk = disks(SECTORS)
    spaces = {}
    for sector in range(50):
        space = disk.place(b"?" * 513)
        spaces[disk.offer(disk.place(disk.header(IN, sector)), space)] = space[0][0]
    assert disk.run() == 0
    assert disk.completed() == dict.fromkeys(spaces, 513)
    for sector, address in enumerate(spaces.values()):
        assert disk.memory.get(address, 513) == disks.pattern(sector, sector + 1) + bytes([OK])
    assert os.eventfd_read(disk.call) >= 1
    counted = disk.stats()
    assert (counted["reads"], counted["bytes_read"]) == (50, 50 * 512)


# ---- chains that are no requests


@pytest.mark.parametrize("length", [0, 1, 15])
def test_a_short_header_is_an_error(disks: Any, length: int) -> None:
    answer = disks().exchange(bytes(length), 1)
    assert (answer.status, answer.length) == (IOERR, 1)


def test_a_chain_without_room_for_the_status_is_returned_untouched_and_not_executed(disks: Any) -> None:
    disk = disks(SECTORS)
    before = disk.content()
    assert disk.exchange(disk.header(OUT, 0) + bytes(512), 0).length == 0
    assert disk.content() == before
    assert disk.stats()["errors"] == 1


def test_only_the_last_byte_is_the_status(disks: Any) -> None:
    answer = disks().exchange(struct.pack("<IIQ", 99, 0, 0), 10)
    assert (answer.status, answer.length, answer.data) == (UNSUPP, 1, b"\xee" * 9)


def test_bytes_behind_the_header_of_a_read_are_ignored(disks: Any) -> None:
    disk = disks()
    assert disk.exchange(disk.header(IN, 1) + b"more", 513).data == disks.pattern(1, 2)


@pytest.mark.parametrize("sector", [SECTORS, SECTORS - 1, 2**55 - 1, 2**55, 2**64 - 1])
@pytest.mark.parametrize("kind", [IN, OUT])
def test_nothing_beyond_the_capacity_is_served_whatever_wraps(disks: Any, kind: int, sector: int) -> None:
    disk = disks(SECTORS, fd=disks.image(SECTORS + 8))  # the file is larger than what the guest may see
    answer = disk.request(kind, sector, bytes(1024) * (kind == OUT), 1024 * (kind == IN))
    assert (answer.status, answer.length) == (IOERR, 1)
    assert disk.stored(SECTORS, SECTORS + 8) == disks.pattern(SECTORS, SECTORS + 8)


@pytest.mark.parametrize(("sector", "length"), [(1, 4096), (8, 512), (8, 4608)])
def test_requests_must_be_whole_blocks(disks: Any, sector: int, length: int) -> None:
    disk = disks(SECTORS, block_size=4096)
    assert disk.request(IN, sector, room=length).status == IOERR
    assert disk.request(OUT, sector, bytes(length)).status == IOERR
    assert disk.request(DISCARD, 0, disk.ranges((sector, length // 512, 0))).status == IOERR
    assert disk.content() == disks.pattern(0, SECTORS)
    assert disk.request(IN, 8, room=4096).status == OK


# ---- what fails is said to fail


def test_the_end_of_the_image_inside_the_capacity_is_an_error_and_not_zeroes(disks: Any) -> None:
    disk = disks(SECTORS)
    os.ftruncate(disk.fd, 10 * 512)
    answer = disk.request(IN, 8, room=4 * 512)
    assert (answer.status, answer.length) == (IOERR, 2 * 512 + 1)
    assert answer.data[:1024] == disks.pattern(8, 10)
    assert set(answer.data[1024:]) <= {0xEE, 0}, "direct I/O clears the rest of the last block"


def test_a_read_only_disk_refuses_every_change(disks: Any) -> None:
    disk = disks(SECTORS, read_only=True)
    for kind, data in ((OUT, bytes(512)), (DISCARD, disk.ranges((0, 1, 0))), (WRITE_ZEROES, disk.ranges((0, 1, 0)))):
        assert disk.request(kind, 0, data).status == IOERR
    assert disk.content() == disks.pattern(0, SECTORS)
    assert disk.request(IN, 0, room=512).status == OK


def test_a_write_that_the_kernel_refuses_is_not_acknowledged(disks: Any) -> None:
    disk = disks(SECTORS, fd=disks.image(SECTORS, fcntl.F_SEAL_WRITE))
    for kind, data in (
        (OUT, bytes(512)),
        (DISCARD, disk.ranges((0, 1, 0))),
        (WRITE_ZEROES, disk.ranges((0, 1, 0))),
        (WRITE_ZEROES, disk.ranges((0, 1, UNMAP))),
    ):
        assert disk.request(kind, 0, data).status == IOERR
    assert disk.content() == disks.pattern(0, SECTORS)
    assert disk.stats()["errors"] == 4


def test_no_space_is_an_error(disks: Any) -> None:
    """ENOSPC for every write and EINVAL for fdatasync, by a device that has no space ever."""
    disk = disks(SECTORS, fd=disks.keep(os.open("/dev/full", os.O_RDWR)))
    assert disk.request(OUT, 0, bytes(512)).status == IOERR
    assert disk.request(FLUSH).status == IOERR
    assert disk.request(IN, 0, room=512).status == OK


def test_no_space_in_the_middle_of_a_write_is_an_error(disks: Any) -> None:
    disk = disks(SECTORS, fd=disks.image(4, fcntl.F_SEAL_GROW))
    assert disk.request(OUT, 2, bytes(4 * 512)).status == IOERR
    assert disk.request(OUT, 2, bytes(2 * 512)).status == OK


def test_an_error_of_the_medium_is_an_error(disks: Any) -> None:
    disk = disks(SECTORS, fd=disks.keep(os.open("/", os.O_RDONLY)))
    assert disk.request(IN, 0, room=512).status == IOERR
    assert disk.request(OUT, 0, bytes(512)).status == IOERR


def test_discard_that_the_file_system_does_not_know_is_unsupported(disks: Any) -> None:
    disk = disks(SECTORS, fd=disks.keep(os.open("/dev/null", os.O_RDWR)))
    status = disk.request(DISCARD, 0, disk.ranges((0, 1, 0))).status
    assert status in (IOERR, UNSUPP)


# ---- discard and write zeroes


@pytest.mark.parametrize("kind", [DISCARD, WRITE_ZEROES])
def test_all_ranges_are_judged_before_the_first_is_changed(disks: Any, kind: int) -> None:
    disk = disks(SECTORS)
    assert disk.request(kind, 0, disk.ranges((0, 4, 0), (SECTORS, 1, 0))).status == IOERR
    assert disk.request(kind, 0, disk.ranges((0, 4, 0), (8, 1, 4))).status == UNSUPP
    assert disk.content() == disks.pattern(0, SECTORS)


def test_the_unmap_flag_belongs_to_write_zeroes_only(disks: Any) -> None:
    disk = disks(SECTORS)
    assert disk.request(DISCARD, 0, disk.ranges((0, 4, UNMAP))).status == UNSUPP
    assert disk.request(WRITE_ZEROES, 0, disk.ranges((0, 4, UNMAP))).status == OK


def test_ranges_longer_than_announced_are_served_and_more_of_them_are_not(disks: Any) -> None:
    disk = disks(40000)  # 8 ranges are announced
    assert disk.request(WRITE_ZEROES, 0, disk.ranges((100, 39000, 0))).status == OK
    assert disk.content() == disks.pattern(0, 100) + bytes(39000 * 512) + disks.pattern(39100, 40000)
    assert disk.request(DISCARD, 0, disk.ranges(*[(0, 1, 0)] * 9)).status == IOERR


def test_write_zeroes_keeps_the_space_unless_told_to_unmap(disks: Any) -> None:
    disk = disks(1024)
    full = os.fstat(disk.fd).st_blocks
    assert disk.request(WRITE_ZEROES, 0, disk.ranges((0, 512, 0))).status == OK
    assert os.fstat(disk.fd).st_blocks == full
    assert disk.request(WRITE_ZEROES, 0, disk.ranges((0, 512, UNMAP))).status == OK
    assert os.fstat(disk.fd).st_blocks == full - 512
    assert disk.request(DISCARD, 0, disk.ranges((512, 512, 0))).status == OK
    assert os.fstat(disk.fd).st_blocks == 0


# ---- the write cache


class CacheStat(ctypes.Structure):
    """What cachestat(2) tells of a range: pages of the page cache."""

    _fields_ = [(name, ctypes.c_uint64) for name in ("cache", "dirty", "writeback", "evicted", "recently_evicted")]


def unwritten_pages(fd: int) -> int:
    """Pages of the file that are not on the medium."""
    span, stat = (ctypes.c_uint64 * 2)(0, 0), CacheStat()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.syscall(451, fd, span, ctypes.byref(stat), 0) < 0:
        pytest.skip(f"cachestat: {errno.errorcode[ctypes.get_errno()]}")
    return int(stat.dirty + stat.writeback)


@pytest.mark.parametrize("kind", [OUT, WRITE_ZEROES])
def test_without_a_write_cache_a_write_is_on_the_medium_before_its_status(
    disks: Any, tmp_path: Path, kind: int
) -> None:
    path = tmp_path / "image"
    path.write_bytes(disks.pattern(0, 1024))
    fd = disks.keep(os.open(path, os.O_RDWR))
    os.fsync(fd)
    disk = disks(1024, fd=fd)
    data = disk.ranges((8, 504, 0)) if kind == WRITE_ZEROES else os.urandom(4096)
    if kind == OUT:
        assert disk.request(kind, 8, data).status == OK
        assert unwritten_pages(fd), "this file system writes through anyway and proves nothing"
        assert disk.request(FLUSH).status == OK
        assert not unwritten_pages(fd)
    lib.vu_blk_set_writeback(disk.blk, 0)
    assert disk.request(kind, 8, data).status == OK
    assert not unwritten_pages(fd)


# ---- guest memory that goes away, dirty log


def lose(memory: Any) -> None:
    """The front-end truncates the file under our mapping."""
    os.ftruncate(memory.fd, 0)


@pytest.mark.parametrize("kind", [IN, OUT])
def test_lost_data_pages_fail_that_request_alone(disks: Any, kind: int) -> None:
    disk = disks(SECTORS)
    data = (disk.fragile.take(1024), 1024)
    head, status = disk.place(disk.header(kind, 0)), disk.place(b"?")
    offered = disk.offer([*head, data], status) if kind == OUT else disk.offer(head, [data, *status])
    lose(disk.fragile)
    assert disk.run() == 0
    assert disk.completed() == {offered: 1}
    assert disk.memory.get(status[0][0], 1) == bytes([IOERR])
    assert disk.content() == disks.pattern(0, SECTORS)
    assert disk.request(IN, 0, room=512).status == OK


def test_a_lost_header_fails_that_request_alone(disks: Any) -> None:
    disk = disks(SECTORS)
    status = disk.place(b"?")
    offered = disk.offer([(disk.fragile.put(disk.header(FLUSH)), 16)], status)
    lose(disk.fragile)
    assert disk.run() == 0
    assert disk.completed() == {offered: 1}
    assert disk.memory.get(status[0][0], 1) == bytes([IOERR])


def test_a_status_that_cannot_be_written_breaks_the_ring_and_keeps_what_came_before(disks: Any) -> None:
    disk = disks(SECTORS)
    good = disk.offer(disk.place(disk.header(99)), disk.place(b"?"))
    disk.offer(disk.place(disk.header(99)), [(disk.fragile.take(1), 1)])
    lose(disk.fragile)
    assert disk.run() == lib.VU_E_FAULT
    assert disk.completed() == {good: 1}


def test_chains_in_front_of_one_that_breaks_the_ring_are_returned_with_one_call(disks: Any) -> None:
    disk = disks(SECTORS)
    good = [disk.offer(disk.place(disk.header(OUT, n) + bytes([n]) * 512), disk.place(b"?")) for n in range(3)]
    disk.offer([(1 << 40, 16)], disk.place(b"?"))
    assert disk.run() == lib.VU_E_RANGE
    assert disk.completed() == dict.fromkeys(good, 1)
    assert os.eventfd_read(disk.call) == 1
    assert disk.content()[:1536] == bytes(512) + b"\1" * 512 + b"\2" * 512


def test_every_page_that_a_read_may_have_written_is_in_the_dirty_log(disks: Any) -> None:
    disk = disks(SECTORS, log_bytes=1 << 18)
    os.ftruncate(disk.fd, 10 * 512)  # the read fails in the middle, after 1,024 bytes
    page = GUEST_PAGE + 10
    at = page * 4096 + 2048
    disk.offer(disk.place(disk.header(IN, 8)), [(at, 8193)])
    assert disk.run() == 0
    marked = os.pread(disk.log_fd, 1 << 18, 0)
    assert [n for n in range(page - 1, page + 5) if marked[n // 8] >> n % 8 & 1] == [page, page + 1, page + 2]


GUEST_PAGE = (1 << 32) // 4096

# ---- the thread's life


def test_a_bad_configuration_is_refused() -> None:
    error = ffi.new("int *")
    for bad in ({"block_size": 513}, {"block_size": 256}, {"block_size": 0}, {"block_size": 512, "max_segments": 257}):
        assert lib.vu_blk_new(ffi.new("struct vu_blk_config *", {"fd": 0, **bad}), error) == ffi.NULL
        assert error[0] == lib.VU_E_SIZE
    assert lib.vu_blk_new(ffi.new("struct vu_blk_config *", {"fd": -1, "block_size": 512}), error) == ffi.NULL
    assert error[0] == lib.VU_E_SYS


@pytest.mark.parametrize("kicks", ["eventfd", "blocking eventfd", "polled", "pipe whose writer has gone"])
def test_a_thread_serves_what_comes_and_stops_when_told(disks: Any, kicks: str) -> None:
    disk = disks(SECTORS)
    os.eventfd_read(disk.stop)
    os.set_blocking(disk.call, True)
    kick = disks.keep(os.eventfd(0, 0 if kicks == "blocking eventfd" else os.EFD_NONBLOCK))
    codes: list[int] = []
    given = -1 if kicks == "polled" else closed_pipe(disks) if kicks.startswith("pipe") else kick
    thread = threading.Thread(
        target=lambda: codes.append(lib.vu_blk_run(disk.blk, disk.queue, given, disk.stop)), daemon=True
    )
    thread.start()
    for sector in range(5):
        offered = disk.offer(disk.place(disk.header(IN, sector)), disk.place(bytes(513)))
        os.eventfd_write(kick, 1)
        os.eventfd_read(disk.call)
        assert disk.completed() == {offered: 513}
    os.eventfd_write(disk.stop, 1)
    thread.join(5)
    assert codes == [0]


def test_a_kick_whose_other_end_is_gone_does_not_make_the_thread_spin(disks: Any) -> None:
    disk = disks(SECTORS)
    os.eventfd_read(disk.stop)
    spent: list[float] = []

    def serve() -> None:
        before = time.thread_time()
        lib.vu_blk_run(disk.blk, disk.queue, closed_pipe(disks), disk.stop)
        spent.append(time.thread_time() - before)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    assert not select.select([disk.call], [], [], 0.1)[0]  # nothing is offered, so no call comes
    os.eventfd_write(disk.stop, 1)
    thread.join(5)
    assert spent[0] < 0.05


def test_a_driver_that_cannot_be_called_is_served_all_the_same(disks: Any) -> None:
    disk = disks(SECTORS)
    reader, writer = os.pipe2(os.O_NONBLOCK)
    os.close(reader)
    lib.vu_queue_set_call(disk.queue, disks.keep(writer))
    assert disk.request(FLUSH).status == OK


def closed_pipe(disks: Any) -> int:
    reader, writer = os.pipe()
    os.close(writer)
    return int(disks.keep(reader))


def test_the_capacity_can_grow_while_it_serves(disks: Any) -> None:
    disk = disks(SECTORS, fd=disks.image(2 * SECTORS))
    assert disk.request(IN, SECTORS, room=512).status == IOERR
    lib.vu_blk_set_sectors(disk.blk, 2 * SECTORS)
    assert disk.request(IN, SECTORS, room=512).status == OK
