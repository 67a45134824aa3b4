"""What guest memory and disks must hold: at the source, and after every request that was completed.

What belongs here: contents, from a seed, and the comparison of what was found with them. What does not: reading the
real memory and the real disks (``run``, ``load``). All of it is kept in memory here, twice what the guest has.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from vhostuser.tools.postcopy.plan import FRAME, SECTOR, Area, Plan, Request

_HEADER = struct.Struct("<IIQ")
_READ, _WRITE = 0, 1
NO_STATUS = 0xFF
"""What a status byte holds until the device has written it."""
_PIECE = 1 << 20


@dataclass(frozen=True, slots=True)
class Difference:
    """``size`` bytes that are not what they must be, at ``offset`` of ``where``; ``zeros``: all of them were zero."""

    where: str
    offset: int
    size: int
    zeros: bool


def _random(dice: random.Random, size: int) -> bytearray:
    """In pieces: the generator makes a number of each, and numbers have a largest size."""
    content = bytearray()
    while len(content) < size:
        content += dice.randbytes(min(_PIECE, size - len(content)))
    return content


def header_of(request: Request) -> bytes:
    """What the driver writes there."""
    return _HEADER.pack(_WRITE if request.write else _READ, 0, request.sector)


class Truth:
    """The content of memory and disks; ``completed`` moves it on.

    Random bytes, so that no piece of it is all zeros but the pages that are planned to be.

    May be used by one thread for each client at a time: clients change different parts of it.
    """

    def __init__(self, plan: Plan, seed: int) -> None:
        dice = random.Random(f"content {seed}")
        self.plan = plan
        self.memory = [_random(dice, region.size) for region in plan.regions]
        """Of each region."""
        for run in plan.runs(plan.zeros):
            self.store(run, bytes(run.size))
        self.disks = [_random(dice, sectors * SECTOR) for sectors in plan.sectors]
        """Of each client."""
        for request in (request for requests in plan.requests for request in requests):
            self.store(request.header, header_of(request))
            self.store(request.status, bytes([NO_STATUS]))

    def completed(self, client: int, request: Request) -> None:
        """The device has done the request."""
        self.store(request.status, b"\0")
        disk = self.disks[client]
        place = slice(request.sector * SECTOR, request.sector * SECTOR + request.length)
        if request.write:
            disk[place] = b"".join(map(self.read, request.segments))
            return
        data = memoryview(bytes(disk[place]))
        for segment in request.segments:
            self.store(segment, data[: segment.size])
            data = data[segment.size :]

    def read(self, area: Area) -> bytes:
        """What guest memory must hold there."""
        region, offset = self.plan.locate(area.guest)
        return bytes(self.memory[region][offset : offset + area.size])

    def store(self, area: Area, data: bytes | memoryview) -> None:
        """Guest memory must hold this there."""
        region, offset = self.plan.locate(area.guest)
        self.memory[region][offset : offset + area.size] = data


def memory_differences(truth: Truth, region: int, found: bytes, offset: int = 0) -> Iterator[Difference]:
    """Where a part of a region, read at ``offset``, is not what it must be; the rings are left out: both ends write
    them, and what is in them is checked as it is used."""
    area = truth.plan.regions[region]
    rings = [(ring.guest - area.guest, ring.end - area.guest) for ring in truth.plan.rings if area.guest <= ring.guest]
    must = memoryview(truth.memory[region])[offset : offset + len(found)]
    yield from differences(f"guest memory, region {region}", must, found, offset, skip=rings)


def disk_differences(truth: Truth, client: int, found: bytes) -> Iterator[Difference]:
    """Where a disk is not what it must be."""
    yield from differences(f"disk {client}", memoryview(truth.disks[client]), found)


def differences(
    where: str,
    must: bytes | memoryview,
    found: bytes,
    offset: int = 0,
    skip: Sequence[tuple[int, int]] = (),
) -> Iterator[Difference]:
    """Neighbouring sectors that differ in the same way, as one difference each; ``skip``: ranges of offsets to leave
    out, whole sectors of them. What was found may be too short: the rest of it counts as zeros."""
    found = found.ljust(len(must), b"\0")
    open_: Difference | None = None
    for at in _differing(memoryview(must), memoryview(found)):
        place = offset + at
        if any(start < place + SECTOR and place < end for start, end in skip):
            continue
        piece = found[at : at + SECTOR]
        zeros = not any(piece)
        if open_ and open_.offset + open_.size == place and open_.zeros == zeros:
            open_ = Difference(where, open_.offset, open_.size + len(piece), zeros)
            continue
        if open_:
            yield open_
        open_ = Difference(where, place, len(piece), zeros)
    if open_:
        yield open_


def _differing(must: memoryview, found: memoryview) -> Iterator[int]:
    """Offsets of the sectors that differ; large pieces are compared whole first."""
    for step, at, end in ((_PIECE, at, at + _PIECE) for at in range(0, len(must), _PIECE)):
        if must[at : at + step] == found[at : at + step]:
            continue
        for frame in range(at, min(end, len(must)), FRAME):
            if must[frame : frame + FRAME] != found[frame : frame + FRAME]:
                yield from (
                    sector
                    for sector in range(frame, min(frame + FRAME, len(must)), SECTOR)
                    if must[sector : sector + SECTOR] != found[sector : sector + SECTOR]
                )
