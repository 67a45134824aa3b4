"""The dirty log against what the kernel says was written through the back-end's mapping: no page is missing from it.

How many are in it without having been written is counted and told: none, but where a device leaves gaps.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import random
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.devices.interface import EVERYBODY, MAC
from tests.devices.written import PAGE, Written, other_mapping
from vhostuser.device import Device
from vhostuser.devices.blk import Blk
from vhostuser.devices.ends import loopback
from vhostuser.devices.image import Image
from vhostuser.devices.net import Net
from vhostuser.driverqueue import Segment
from vhostuser.frontend import DRIVABLE, FrontendRing, SharedLog, SharedMemory
from vhostuser.protocol import VirtioFeature
from vhostuser.testing.pair import MIB, Pair
from vhostuser.virtqueue import Request

ROUNDS = int(os.environ.get("VHOSTUSER_AUDITS", "12"))
RINGS, END = MIB, 8 * MIB
"""Guest memory: rings, the tables of which the back-end only reads, and then buffers."""
Chain = tuple[list[Segment], list[Segment]]


class Place:
    """Hands out buffers of odd sizes anywhere, none twice in a round, so that pages have few bytes each written."""

    def __init__(self, memory: SharedMemory, chance: random.Random) -> None:
        self.memory, self.chance = memory, chance
        self.at = RINGS

    def take(self, length: int) -> Segment:
        self.at += self.chance.choice([0, 1, 16, 4000, PAGE, 3 * PAGE])
        segment = (self.at, length)
        self.at += length
        assert self.at <= END
        return segment

    def put(self, data: bytes) -> Segment:
        segment = self.take(len(data))
        self.memory.write(segment[0], data)
        return segment

    def pieces(self, length: int) -> list[Segment]:
        """So many bytes in up to five segments."""
        cuts = sorted(self.chance.randrange(length + 1) for _ in range(self.chance.randrange(5)))
        edges = [0, *cuts, length]
        return [self.take(high - low) for low, high in itertools.pairwise(edges) if high > low]


# ---- what is asked of a device


def reading(place: Place) -> Chain:
    """Reads and writes, flushes between them."""
    kind = place.chance.choice([0, 0, 0, 1, 4])
    return _block_request(place, kind, place.chance.randrange(400), place.chance.choice([512, 1024, 8192, 20480]))


def failing(place: Place) -> Chain:
    """Sectors that there are not, half of a sector, types that nobody knows."""
    kind = place.chance.choice([0, 0, 1, 8, 11, 77])
    return _block_request(place, kind, place.chance.choice([1, 600]), place.chance.choice([512, 8192, 700, 20]))


def _block_request(place: Place, kind: int, sector: int, length: int) -> Chain:
    header = place.put(kind.to_bytes(4, "little") + bytes(4) + sector.to_bytes(8, "little"))
    if kind in (1, 11):
        return [header, place.put(place.chance.randbytes(length))], [place.take(1)]
    return [header], [*(place.pieces(length) if kind != 4 else []), place.take(1)]


def frame(place: Place) -> Chain:
    length = place.chance.randrange(60, 1500)
    return [place.put(bytes(12) + EVERYBODY + MAC + b"\x88\xb5" + place.chance.randbytes(length - 14))], []


def room(place: Place) -> Chain:
    return [], place.pieces(place.chance.choice([200, 1600, 4096]))


def text(place: Place) -> Chain:
    return [place.put(place.chance.randbytes(place.chance.randrange(1, 9000)))], place.pieces(9000)


class Scribbler(Device):
    """In Python: writes somewhere in the room that there is, and says how far or leaves that to the runtime."""

    queues = 1
    chance = random.Random(20261201)

    async def handle(self, request: Request) -> None:
        data = request.read()
        for _ in range(self.chance.randrange(3)):
            request.write(data[: self.chance.randrange(len(data) + 1)], self.chance.randrange(request.writable))
        if self.chance.random() < 0.3:
            await asyncio.sleep(0)


def disk(directory: Path) -> Device:
    path = directory / "disk"
    path.write_bytes(random.Random(1).randbytes(512 * 512))
    return Blk(Image(path))


class Kind(NamedTuple):
    """A device, and what is asked of each of its rings. gaps: in what it says was written there may be holes."""

    make: Callable[[Path], Device]
    asked: list[Callable[[Place], Chain]]
    gaps: bool = False


KINDS = {
    "disk": Kind(disk, [reading]),
    "disk-fails": Kind(disk, [failing], gaps=True),  # the status is behind data that was not read
    "interface": Kind(lambda _: Net(loopback()), [room, frame]),
    "python": Kind(lambda _: Scribbler(), [text], gaps=True),
}


# ---- the audit


async def load(place: Place, rings: list[FrontendRing], asked: list[Callable[[Place], Chain]]) -> None:
    """Offers forty requests to each ring, and waits until the last ring has returned them."""
    place.at = RINGS
    counts = []
    for ring, make in zip(rings, asked, strict=True):
        heads = ring.queue.offer_many([make(place) for _ in range(40)])
        counts.append(len(heads))
        ring.queue.publish()
        ring.kick()
    while counts[-1]:
        ring = rings[-1]
        counts[-1] -= len(ring.queue.take_many())
        if counts[-1] and not ring.queue.arm():
            await asyncio.wait_for(ring.called(), 10)


def features_of(*, packed: bool, event_idx: bool, indirect: bool) -> int:
    without = ~(VirtioFeature.RING_EVENT_IDX.mask if not event_idx else 0)
    without &= ~(VirtioFeature.RING_INDIRECT_DESC.mask if not indirect else 0)
    return DRIVABLE & without | (VirtioFeature.RING_PACKED.mask if packed else 0)


def pages(ranges: list[tuple[int, int]]) -> set[int]:
    return {page for guest, length in ranges for page in range(guest // PAGE, (guest + length) // PAGE)}


@pytest.mark.parametrize("used", [True, False], ids=["ring-logged", "ring-not-logged"])
@pytest.mark.parametrize("indirect", [False, True], ids=["direct", "indirect"])
@pytest.mark.parametrize("event_idx", [False, True], ids=["flags", "event-idx"])
@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
@pytest.mark.parametrize("kind", KINDS)
async def test_no_page_is_missing_from_the_log(
    pairs: Callable[..., Pair],
    tmp_path: Path,
    record_property: Callable[[str, object], None],
    kind: str,
    packed: bool,
    event_idx: bool,
    indirect: bool,
    used: bool,
) -> None:
    """SET_LOG_BASE: every page that the back-end writes is marked, the used ring's where that was asked for."""
    make, asked, gaps = KINDS[kind]
    pair, memory = pairs(make(tmp_path), postcopy=False), SharedMemory((0, END))
    features = features_of(packed=packed, event_idx=event_idx, indirect=indirect)
    await pair.set_up(rings=0, features=features, memory=memory)
    (region,) = memory.regions
    size = 64 if indirect else 512  # with more there is no room for tables; of 512 the used ring has two pages
    rings = [pair.add_ring(index, size=size, indirect=indirect) for index in range(len(asked))]
    bases: list[int | None] = [None] * len(rings)
    place = Place(memory, random.Random(f"{kind} {packed} {event_idx} {indirect}"))
    under: set[int] = set()
    over = told = 0
    with closing(SharedLog(END)) as log, closing(Written(other_mapping(region.fd, region.region.host), END)) as written:
        await pair.frontend.start_log(log)
        for _ in range(ROUNDS):
            for index, ring in enumerate(rings):
                await pair.frontend.start_ring(ring, memory, base=bases[index], log_used=used)
                ring.kick()
            await load(place, rings, asked)
            bases = [await pair.frontend.stop_ring(ring) for ring in rings]
            for ring in rings:
                ring.queue.take_many()
            truth, marked = written.take(), pages(log.take())
            if not used:
                truth = {page for page in truth if page >= RINGS // PAGE}
            under |= truth - marked
            over += len(marked - truth)
            told += len(marked)
    record_property("pages marked", told)
    record_property("of these not written", over)
    print(f"{told} pages marked, {over} of them not written")
    assert not under, "written, and not in the log"
    assert told > 10 * ROUNDS
    assert gaps or not over, "not written, and in the log"
