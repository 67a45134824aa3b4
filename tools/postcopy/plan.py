"""What lies where in guest memory and on the disks, and which requests are made: decided before anything runs.

What belongs here: addresses, sectors and order, from a seed. What does not: contents (``truth``), and anything that
runs.

Guest memory is laid out so: in the first region the rings, each on pages of its own, then a slot of 64 bytes for every
request (header and status); everything behind is cut into frames of 4096 bytes for the requests' data, save a few whole
pages that no request ever refers to, the *canaries*: a back-end that asks for one has invented the access.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

FRAME = 4096
SECTOR = 512
SLOT = 64
STATUS = 32
"""Where the status byte lies in a slot; the header is at its start."""
HEADER_BYTES = 16
APART = 1 << 30
"""Regions begin at multiples of so many guest bytes, with a hole behind each."""
MOST_FRAMES = 4
MOST_SEGMENTS = 3


class PlanError(Exception):
    """There is no such memory, or too little of it: one line."""


@dataclass(frozen=True, slots=True)
class Area:
    """``size`` bytes of guest memory from guest address ``guest`` on."""

    guest: int
    size: int

    @property
    def end(self) -> int:
        return self.guest + self.size


@dataclass(frozen=True, slots=True)
class Request:
    """One block request: ``write``: from guest memory to the disk. ``segments`` are its data, ``sector`` its place.
    ``shared``: other clients write the same data to their disks."""

    number: int
    write: bool
    sector: int
    slot: int
    segments: tuple[Area, ...]
    shared: bool = False

    @property
    def header(self) -> Area:
        return Area(self.slot, HEADER_BYTES)

    @property
    def status(self) -> Area:
        return Area(self.slot + STATUS, 1)

    @property
    def length(self) -> int:
        """Bytes of data."""
        return sum(segment.size for segment in self.segments)

    @property
    def areas(self) -> tuple[Area, ...]:
        """Everything in guest memory that the device may touch for it, the ring aside."""
        return (self.header, *self.segments, self.status)


@dataclass(frozen=True)
class Plan:
    """``rings``, ``requests`` and ``sectors`` have an element for each client, in order."""

    page_size: int
    regions: tuple[Area, ...]
    rings: tuple[Area, ...]
    canaries: tuple[int, ...]
    """Guest addresses of pages that nobody has a reason to touch."""
    withheld: tuple[int, ...]
    """Of pages with data that come only when somebody waits for them."""
    zeros: tuple[int, ...]
    """Of pages with data that hold nothing but zeros at the source."""
    requests: tuple[tuple[Request, ...], ...]
    sectors: tuple[int, ...]
    """Of each disk."""

    @property
    def size(self) -> int:
        """Bytes of guest memory."""
        return sum(region.size for region in self.regions)

    def page(self, guest: int) -> int:
        """The guest address of the page that ``guest`` lies in. (Regions begin at multiples of every page size.)"""
        return guest - guest % self.page_size

    def pages(self, areas: Sequence[Area]) -> set[int]:
        """The guest addresses of all pages of ``areas``."""
        return {page for area in areas for page in range(self.page(area.guest), area.end, self.page_size)}

    def all_pages(self) -> Iterator[int]:
        """Every page's guest address, in order."""
        for region in self.regions:
            yield from range(region.guest, region.end, self.page_size)

    def all_pages_but(self, others: Collection[int]) -> Iterator[int]:
        """Every page's guest address that is not among ``others``."""
        return (page for page in self.all_pages() if page not in others)

    @property
    def on_demand(self) -> frozenset[int]:
        """Guest addresses of the pages that do not come by themselves."""
        return frozenset(self.withheld) | frozenset(self.canaries)

    def runs(self, pages: Iterable[int]) -> list[Area]:
        """Pages, neighbouring ones put together. (Regions are never neighbours.)"""
        found: list[Area] = []
        for page in sorted(pages):
            if found and found[-1].end == page:
                found[-1] = Area(found[-1].guest, found[-1].size + self.page_size)
            else:
                found.append(Area(page, self.page_size))
        return found

    def locate(self, guest: int) -> tuple[int, int]:
        """The region's index and the offset in it. Raises LookupError."""
        for index, region in enumerate(self.regions):
            if region.guest <= guest < region.end:
                return index, guest - region.guest
        raise LookupError(f"guest address {guest:#x} lies in no region")


@dataclass(frozen=True)
class Shape:
    """What a plan is made from. ``size``: bytes of guest memory in all. ``requests``: the most for each client, 0: as
    many as there is memory for. ``ring_bytes``: of one ring. ``withhold``, ``zeros``: per cent."""

    size: int
    regions: int
    page_size: int
    clients: int
    ring_bytes: int
    requests: int = 0
    withhold: int = 0
    zeros: int = 0
    seed: int = 1


def make_plan(shape: Shape) -> Plan:
    """The plan of a shape; the same one each time. Raises PlanError."""
    dice = random.Random(shape.seed)
    regions = _regions(shape)
    rings = tuple(Area(index * _whole(shape.ring_bytes, shape), shape.ring_bytes) for index in range(shape.clients))
    slots = Area(shape.clients * _whole(shape.ring_bytes, shape), 0)
    frames = sum(region.size for region in regions) // FRAME
    data = slots.guest + -(-frames * SLOT * shape.clients // FRAME) * FRAME
    if data + shape.page_size > regions[0].end:
        raise PlanError(
            f"regions of {regions[0].size >> 20} MiB have no room for the rings of {shape.clients} back-ends and data: "
            "give more memory or fewer regions"
        )
    pages = [page for region in regions for page in range(region.guest, region.end, shape.page_size)]
    spare = [page for page in pages if page >= data]
    canaries = tuple(sorted(dice.sample(spare, max(1, len(spare) // 32))))
    segments = list(_segments(dice, regions, data, set(canaries), shape.page_size))
    dice.shuffle(segments)
    requests, sectors = _requests(dice, segments, slots.guest, shape)
    busy = sorted({page for page in spare if page not in canaries})
    withheld = tuple(sorted(dice.sample(busy, len(busy) * shape.withhold // 100)))
    zeros = tuple(sorted(dice.sample(busy, len(busy) * shape.zeros // 100)))
    return Plan(shape.page_size, regions, rings, canaries, withheld, zeros, requests, sectors)


def _whole(size: int, shape: Shape) -> int:
    return -(-size // shape.page_size) * shape.page_size


def _regions(shape: Shape) -> tuple[Area, ...]:
    size = shape.size // shape.regions // shape.page_size * shape.page_size
    if not size:
        raise PlanError(f"{shape.size} bytes of memory make no {shape.regions} regions of whole pages")
    apart = (size // APART + 1) * APART
    return tuple(Area(index * apart, size) for index in range(shape.regions))


def _segments(
    dice: random.Random, regions: Sequence[Area], first: int, avoid: set[int], page_size: int
) -> Iterator[Area]:
    """Pieces of one to four adjacent frames, beginning and ending anywhere at a multiple of 512 bytes."""
    for region in regions:
        at = max(region.guest, first)
        while at < region.end:
            page = at - at % page_size
            if page in avoid:
                at = page + page_size
                continue
            # Adjacent frames may lie in two pages; they must not run into a canary or out of the region.
            frames = dice.randint(1, MOST_FRAMES)
            end = next(
                (edge for edge in range(at + FRAME, at + frames * FRAME, FRAME) if edge in avoid or edge >= region.end),
                min(at + frames * FRAME, region.end),
            )
            start = at + dice.randrange(0, FRAME, SECTOR)
            stop = dice.randrange(max(end - FRAME, start) + SECTOR, end + 1, SECTOR)
            yield Area(start, stop - start)
            at = end


def _requests(
    dice: random.Random, segments: list[Area], slots: int, shape: Shape
) -> tuple[tuple[tuple[Request, ...], ...], tuple[int, ...]]:
    """Hands the segments out. With several clients a quarter of the data is written to disk by all of them, at about
    the same time, so that they wait for the same pages."""
    together = len(segments) // 4 if shape.clients > 1 else 0
    pool = iter(segments)
    shared = list(_grouped(dice, islice(pool, together)))
    own: list[list[tuple[Area, ...]]] = [[] for _ in range(shape.clients)]
    for turn, group in enumerate(_grouped(dice, pool)):
        own[turn % shape.clients].append(group)
    made, sectors = [], []
    next_slot = slots
    for groups in own:
        asked = [(group, dice.random() < 0.5, False) for group in groups]
        step = len(asked) // len(shared) + 1 if shared else 1
        for turn, group in enumerate(shared):
            asked.insert(turn * (step + 1), (group, True, True))
        sector, requests = 0, []
        for number, (group, write, common) in enumerate(islice(asked, shape.requests or None)):
            requests.append(Request(number, write, sector, next_slot, group, common))
            sector += requests[-1].length // SECTOR
            next_slot += SLOT
        if not requests:
            raise PlanError("there is no memory left for a single request: give more")
        made.append(tuple(requests))
        sectors.append(sector)
    return tuple(made), tuple(sectors)


def _grouped(dice: random.Random, segments: Iterator[Area]) -> Iterator[tuple[Area, ...]]:
    while group := tuple(islice(segments, dice.randint(1, MOST_SEGMENTS))):
        yield group
