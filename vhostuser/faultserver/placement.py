"""How missing pages can be placed and who is woken for them, and what that asks of the kernel and of the memory.

What belongs here: the choices, and the refusal of those that cannot be had here. What does not: placing
(native/faultput.c), waking (native/faultwake.c), who chooses (``server``).
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import Protocol

from vhostuser.protocol import VhostUserError
from vhostuser.uffd import Feature, Mode


class Placement(enum.IntEnum):
    """How a page gets to where every process finds it."""

    COPY = 0
    """UFFDIO_COPY: whole or not at all. For memory that is shared, and for private memory."""
    ZEROPAGE = 1
    """UFFDIO_ZEROPAGE: zeros, whatever the source says. Not on hugetlbfs."""
    CONTINUE = 2
    """The file is written first, then UFFDIO_CONTINUE maps the page for whoever waits. Only with clients that have
    minor faults reported: another could see half a page. Every client faults once for each page that it touches."""
    MOVE = 3
    """UFFDIO_MOVE: the page itself changes its address. Private anonymous memory, and no clients but this process."""


class WakePolicy(enum.IntEnum):
    """Who is woken for a page."""

    BROADCAST = 0
    """Every client for every page, as QEMU does."""
    DEMAND = 1
    """Who is known to wait; page by page."""
    BATCH = 2
    """Who is known to wait; runs of pages are placed and neighbouring pages woken by one request each."""


class Unsupported(VhostUserError):
    """The kernel, the memory or a client lacks what was asked for; the text says which and what to do."""


# ---- what is given


class MissingRegion(Protocol):
    guest: int
    size: int
    host: int
    base: int
    length: int
    page_size: int
    offset: int
    hugetlb: bool

    def no_huge(self) -> None: ...
    def revoke(self) -> None: ...


class RegionMap(Protocol):
    @property
    def regions(self) -> Sequence[MissingRegion]: ...


class Memory(Protocol):
    """Guest memory as the server sees it: ``frontend.SharedMemory`` is one. Region n lies in file n.

    Guest addresses, sizes and offsets are multiples of the region's page size.
    """

    @property
    def map(self) -> RegionMap: ...
    @property
    def fds(self) -> Sequence[int]: ...


class ClientRegion(Protocol):
    """Where a client has guest memory: part of one region or all of it, bytes, whole pages."""

    @property
    def guest(self) -> int: ...
    @property
    def host(self) -> int: ...
    @property
    def size(self) -> int: ...


# ---- what cannot be had


def check_support(
    features: Feature,
    regions: Sequence[MissingRegion],
    fds: Sequence[int],
    placement: Placement,
    deadline: float | None,
) -> None:
    """Raises Unsupported for what the kernel or the memory lacks. fds: the regions' files, empty for private memory."""
    huge = any(region.hugetlb for region in regions)
    if deadline is not None and Feature.POISON not in features:
        raise Unsupported("a deadline needs UFFDIO_POISON, which came with Linux 6.6; without it waits have no end")
    if placement is Placement.ZEROPAGE and huge:
        raise Unsupported("UFFDIO_ZEROPAGE does not know hugetlbfs; take COPY")
    if placement is Placement.MOVE:
        if Feature.MOVE not in features:
            raise Unsupported("UFFDIO_MOVE came with Linux 6.8; take COPY")
        if fds:
            raise Unsupported("MOVE places private anonymous memory, this one lies in files; take COPY")
    minor = Feature.MINOR_HUGETLBFS | Feature.MINOR_SHMEM
    if placement is Placement.CONTINUE:
        if features & minor != minor:
            raise Unsupported(
                "CONTINUE needs minor faults of shmem and hugetlbfs, which came with Linux 5.14; take COPY"
            )
        if len(fds) < len(regions):
            raise Unsupported("CONTINUE writes into the memory's files, and this memory has none; take COPY or MOVE")


def check_client(name: str, placement: Placement, mode: Mode) -> None:
    """Raises Unsupported for a client, registered for faults of ``mode``, that cannot be served in this way."""
    if placement is Placement.MOVE:
        raise Unsupported(f"client {name}: MOVE places private memory, which no other process has; take COPY")
    if placement is Placement.CONTINUE and mode != Mode.MISSING | Mode.MINOR:
        raise Unsupported(
            f"client {name}: CONTINUE needs a client registered MISSING and MINOR, this one is {mode!r} and could see "
            "half a page; take COPY"
        )
