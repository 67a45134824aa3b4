"""What a front-end does because its back-end asks for it: notify pages, shared memory, shared objects.

What belongs here: requests behind features that are offered for these cases alone. What does not: answers as such, and
harm (``channel``).
"""

from __future__ import annotations

import contextlib
import mmap
import os
from collections.abc import Iterator

from vhostuser.conformance.frontend_cases.channel import Line, case, not_done, said
from vhostuser.conformance.frontend_cases.rules import Rules
from vhostuser.conformance.standin import SHMEM_SIZE
from vhostuser.conformance.suite import check
from vhostuser.protocol import U64, BackendRequest, MmapMsg, Payload, ProtocolFeature, Uuid, VringArea

B, P = BackendRequest, ProtocolFeature
NOTIFIER = Rules("notifier", B.VRING_HOST_NOTIFIER_MSG.clause)
SHMEM = Rules("shmem", B.SHMEM_MAP.clause)
OBJECTS = Rules("objects", B.SHARED_OBJECT_ADD.clause)

_PAGE = mmap.PAGESIZE
_UUID = Uuid(bytes(range(1, 17)))
_FREE = 4 * _PAGE
"""Where in the shared memory region most pieces are put."""


@contextlib.contextmanager
def _file(pages: int = 8) -> Iterator[int]:
    fd = os.memfd_create("shared", os.MFD_CLOEXEC)
    try:
        os.truncate(fd, pages * _PAGE)
        yield fd
    finally:
        os.close(fd)


async def _done(line: Line, code: BackendRequest, payload: Payload, *fds: int) -> None:
    await line.send(code, payload.pack(), *fds)
    answer = (await said(line)).body
    check(answer == U64(0).pack(), f"{code.name} done", f"answered {answer.hex()}")


# ---- notify pages

_NOTIFIER = (P.HOST_NOTIFIER, P.BACKEND_SEND_FD)


@case("given", "The page of a ring is taken or refused, and the channel goes on.", *_NOTIFIER, rules=NOTIFIER)
async def given(line: Line) -> None:
    with _file() as fd:
        await line.send(B.VRING_HOST_NOTIFIER_MSG, VringArea(0, _PAGE, 0).pack(), fd)
        await said(line)
    await _done(line, B.VRING_HOST_NOTIFIER_MSG, VringArea(0, 0, 0, has_fd=False))


@case("taken-away", "Taking away the page of a ring that has none is done.", *_NOTIFIER, rules=NOTIFIER)
async def taken_away(line: Line) -> None:
    await _done(line, B.VRING_HOST_NOTIFIER_MSG, VringArea(0, 0, 0, has_fd=False))


@case("size", "An area that is not one page of the host is not taken.", *_NOTIFIER, should=True, rules=NOTIFIER)
async def size(line: Line) -> None:
    with _file() as fd:
        await not_done(line, B.VRING_HOST_NOTIFIER_MSG, VringArea(0, 2 * _PAGE, 0).pack(), fd)


@case("offset", "An area that does not begin with a page is not taken.", *_NOTIFIER, should=True, rules=NOTIFIER)
async def offset(line: Line) -> None:
    with _file() as fd:
        await not_done(line, B.VRING_HOST_NOTIFIER_MSG, VringArea(0, _PAGE, 100).pack(), fd)


@case("no-file", "A descriptor that cannot be mapped is not taken for a page.", *_NOTIFIER, rules=NOTIFIER)
async def no_file(line: Line) -> None:
    read, write = os.pipe()
    try:
        await not_done(line, B.VRING_HOST_NOTIFIER_MSG, VringArea(0, _PAGE, 0).pack(), read)
    finally:
        os.close(read)
        os.close(write)


# ---- shared memory

_SHMEM = (P.SHMEM, P.BACKEND_SEND_FD)


def _piece(offset: int = _FREE, length: int = _PAGE, shmid: int = 1, fd_offset: int = 0) -> MmapMsg:
    return MmapMsg(shmid, fd_offset, offset, length, 1)


@case("map", "A piece of a file is mapped, and unmapped.", *_SHMEM, rules=SHMEM)
async def map_(line: Line) -> None:
    with _file() as fd:
        await _done(line, B.SHMEM_MAP, _piece(), fd)
    await _done(line, B.SHMEM_UNMAP, _piece())


@case("again", "Where a piece was unmapped another can be mapped.", *_SHMEM, rules=SHMEM,
      section=B.SHMEM_UNMAP.clause)  # fmt: skip
async def again(line: Line) -> None:
    for _ in range(2):
        with _file() as fd:
            await _done(line, B.SHMEM_MAP, _piece(), fd)
        await _done(line, B.SHMEM_UNMAP, _piece())


@case("neighbours", "Pieces may touch each other.", *_SHMEM, rules=SHMEM)
async def neighbours(line: Line) -> None:
    with _file() as fd:
        for number in (1, 0, 2):
            await _done(line, B.SHMEM_MAP, _piece(number * _PAGE), fd)


@case("overlap", "Mapping over a mapping fails, and leaves it.", *_SHMEM, rules=SHMEM)
async def overlap(line: Line) -> None:
    with _file() as fd:
        await _done(line, B.SHMEM_MAP, _piece(length=2 * _PAGE), fd)
        await not_done(line, B.SHMEM_MAP, _piece(_FREE + _PAGE).pack(), fd)
    await _done(line, B.SHMEM_UNMAP, _piece(length=2 * _PAGE))


@case("beyond", "What does not fit the region is not mapped.", *_SHMEM, rules=SHMEM)
async def beyond(line: Line) -> None:
    with _file() as fd:
        await not_done(line, B.SHMEM_MAP, _piece(SHMEM_SIZE - _PAGE, 2 * _PAGE).pack(), fd)


@case("wraps", "An offset and a length that wrap around are not mapped.", *_SHMEM, rules=SHMEM)
async def wraps(line: Line) -> None:
    with _file() as fd:
        await not_done(line, B.SHMEM_MAP, _piece((1 << 64) - _PAGE, 2 * _PAGE).pack(), fd)


@case("no-region", "Nothing is mapped into a region that the device does not have.", *_SHMEM, rules=SHMEM)
async def no_region(line: Line) -> None:
    with _file() as fd:
        await not_done(line, B.SHMEM_MAP, _piece(shmid=2).pack(), fd)


@case("part", "A piece is unmapped as a whole.", *_SHMEM, rules=SHMEM, section=B.SHMEM_UNMAP.clause)
async def part(line: Line) -> None:
    with _file() as fd:
        await _done(line, B.SHMEM_MAP, _piece(length=2 * _PAGE), fd)
    await not_done(line, B.SHMEM_UNMAP, _piece().pack())


@case("nothing", "What is not mapped is not unmapped.", *_SHMEM, rules=SHMEM, section=B.SHMEM_UNMAP.clause)
async def nothing(line: Line) -> None:
    await not_done(line, B.SHMEM_UNMAP, _piece().pack())


@case("truncated", "A file that is truncated under its mapping does no harm.", *_SHMEM, rules=SHMEM)
async def truncated(line: Line) -> None:
    with _file() as fd:
        await _done(line, B.SHMEM_MAP, _piece(), fd)
        os.truncate(fd, 0)
    await _done(line, B.SHMEM_UNMAP, _piece())


# ---- shared objects


@case("add", "An object is added, and removed.", P.SHARED_OBJECT, rules=OBJECTS)
async def add(line: Line) -> None:
    await _done(line, B.SHARED_OBJECT_ADD, _UUID)
    await _done(line, B.SHARED_OBJECT_REMOVE, _UUID)


@case("unknown", "Looking up what nobody exports is answered with no, and without a descriptor.", P.SHARED_OBJECT,
      rules=OBJECTS, section=B.SHARED_OBJECT_LOOKUP.clause)  # fmt: skip
async def unknown(line: Line) -> None:
    await line.send(B.SHARED_OBJECT_LOOKUP, _UUID.pack())
    answer = (await said(line)).body
    check(len(answer) == 8 and any(answer), "a u64 that is not 0", f"{answer.hex()}")


@case("twice", "What is exported already is not added again.", P.SHARED_OBJECT, rules=OBJECTS, should=True)
async def twice(line: Line) -> None:
    await _done(line, B.SHARED_OBJECT_ADD, _UUID)
    await not_done(line, B.SHARED_OBJECT_ADD, _UUID.pack())


@case("not-there", "Removing what nobody exports is not done.", P.SHARED_OBJECT, rules=OBJECTS, should=True,
      section=B.SHARED_OBJECT_REMOVE.clause)  # fmt: skip
async def not_there(line: Line) -> None:
    await not_done(line, B.SHARED_OBJECT_REMOVE, _UUID.pack())
