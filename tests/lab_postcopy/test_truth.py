"""What memory and disks must hold, and how differences from it are found."""

from __future__ import annotations

import struct

from vhostuser.tools.postcopy.plan import SECTOR, Shape, make_plan
from vhostuser.tools.postcopy.truth import (
    NO_STATUS,
    Difference,
    Truth,
    differences,
    disk_differences,
    memory_differences,
)

MIB = 1 << 20


def truth() -> Truth:
    return Truth(make_plan(Shape(4 * MIB, 2, 4096, 1, 6000)), 1)


def test_headers_lie_ready_at_the_source() -> None:
    made = truth()
    for request in made.plan.requests[0]:
        assert struct.unpack("<IIQ", made.read(request.header)) == (int(request.write), 0, request.sector)
        assert made.read(request.status) == bytes([NO_STATUS])


def test_no_sector_of_memory_or_disk_is_zero() -> None:
    made = truth()
    for content in (*made.memory, *made.disks):
        assert all(any(content[at : at + SECTOR]) for at in range(0, len(content), SECTOR))


def test_a_completed_read_moves_the_disk_into_memory_and_a_write_memory_to_the_disk() -> None:
    made = truth()
    for request in made.plan.requests[0]:
        disk = bytes(made.disks[0][request.sector * SECTOR :][: request.length])
        memory = b"".join(map(made.read, request.segments))
        made.completed(0, request)
        assert b"".join(map(made.read, request.segments)) == (memory if request.write else disk)
        assert made.disks[0][request.sector * SECTOR :][: request.length] == (memory if request.write else disk)
        assert made.read(request.status) == b"\0"


def test_nothing_differs_from_itself_and_rings_do_not_count() -> None:
    made = truth()
    memory = bytearray(made.memory[0])
    ring = made.plan.rings[0]
    memory[ring.guest : ring.end] = bytes(ring.size)
    assert not list(memory_differences(made, 0, bytes(memory)))
    assert not list(disk_differences(made, 0, bytes(made.disks[0])))


def test_every_single_wrong_byte_is_found() -> None:
    made = truth()
    first = made.plan.requests[0][0].slot // SECTOR * SECTOR
    for at in (first, first + 70_000, 2 * MIB - 1):
        memory = bytearray(made.memory[0])
        memory[at] ^= 1
        (found,) = memory_differences(made, 0, bytes(memory))
        assert found == Difference("guest memory, region 0", at // SECTOR * SECTOR, SECTOR, zeros=False)


def test_neighbours_are_one_difference_and_zeros_are_told_from_other_bytes() -> None:
    must = b"\1" * (8 * SECTOR)
    found = must[:SECTOR] + bytes(2 * SECTOR) + b"\2" * SECTOR + must[4 * SECTOR :]
    assert list(differences("x", must, found)) == [
        Difference("x", SECTOR, 2 * SECTOR, zeros=True),
        Difference("x", 3 * SECTOR, SECTOR, zeros=False),
    ]


def test_what_is_missing_at_the_end_counts_as_zeros() -> None:
    assert list(differences("x", b"\1" * (2 * SECTOR), b"\1" * SECTOR)) == [Difference("x", SECTOR, SECTOR, zeros=True)]


def test_a_part_is_compared_where_it_belongs() -> None:
    made = truth()
    part = bytearray(made.memory[1][MIB : MIB + 4096])
    part[0] ^= 1
    assert [one.offset for one in memory_differences(made, 1, bytes(part), MIB)] == [MIB]
