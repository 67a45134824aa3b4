"""What a fault server tells: its clients, counters, the record of events.

What belongs here: names and meanings of what native/faultserver.c counts. What does not: anything that counts.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Self


@dataclass(frozen=True)
class ClientStats:
    """Counted since the client was added."""

    faults: int
    """Messages read from its userfaultfd."""
    merged_faults: int
    """Of these, for a page that the client waited for already."""
    late: int
    """Of these, for a page that had come before the message was read: woken at once."""
    stray: int
    """Of these, at addresses that belong to no region: nothing is done about them."""
    wakes: int
    """Requests to wake it, whatever their kind."""
    woken: int
    """Pages that it waited for and was woken for."""
    merged_wakes: int
    """Of these, woken together with a neighbouring page."""
    spurious: int
    """Wakes although it was not known to wait."""
    refused: int
    """Requests that the kernel refused."""
    channel: int
    """Messages sent by the wake channel."""
    acknowledged: int
    """Bytes that the client says it has woken by messages of the wake channel."""
    blocked_ns: int
    """Nanoseconds, the sum of the times from reading a fault to its wake."""
    histogram: tuple[int, ...]
    """These times: element n counts those of 2**n up to 2**(n + 1) microseconds, element 0 all below 2."""
    gone: bool
    """Its process has ended; its descriptors are closed."""

    @classmethod
    def of(cls, raw: Any) -> Self:
        """From a ``struct vu_client_stats *``."""
        values = {name: getattr(raw, name) for name in cls.__dataclass_fields__}
        return cls(**values | {"histogram": tuple(raw.histogram), "gone": bool(raw.gone)})


class Client:
    """A process that shares the memory; made by ``FaultServer.add_client``. ``number`` is unique among those there
    are."""

    def __init__(self, name: str, number: int, stats: Callable[[int], ClientStats]) -> None:
        self.name = name
        self.number = number
        self._stats = stats

    def stats(self) -> ClientStats:
        """Live; after the client was removed, what they were then."""
        return self._stats(self.number)

    @property
    def gone(self) -> bool:
        """Whether its process has ended. Noticed within 0.1 s, or by the first request that the kernel refuses."""
        return self.stats().gone

    def freeze(self) -> None:
        """For the server, which goes, and with it the memory: nothing here may keep it."""
        last = self.stats()
        self._stats = lambda number: last

    def __repr__(self) -> str:
        return f"<Client {self.number} {self.name}>"


@dataclass(frozen=True)
class ServerStats:
    """Counted since the server was made; pages, where nothing else is said."""

    total: int
    received: int
    """Placed, or found to be there."""
    lost: int
    """Poisoned."""
    waiting: int
    """Waited for now, by each client for itself."""
    placed: int
    """Placed by us."""
    demanded: int
    """Of these, waited for by somebody at that moment."""
    zero: int
    """Of these, placed as zeros."""
    duplicates: int
    """Came again and were dropped."""
    present: int
    """Were there before we placed them: somebody touched memory in which faults were not reported yet."""
    requests: int
    """Placements: requests to the kernel."""
    paused: bool
    error: int
    """errno of the placement that paused the server, or 0."""

    @classmethod
    def of(cls, raw: Any) -> Self:
        """From a ``struct vu_server_stats *``."""
        pages = {name: getattr(raw.pages, name) for name in ("total", "received", "lost", "waiting")}
        counted = ("placed", "demanded", "zero", "duplicates", "present", "requests", "error")
        return cls(**pages, **{name: getattr(raw, name) for name in counted}, paused=bool(raw.paused))


class EventKind(enum.IntEnum):
    """What happened."""

    FAULT = 0
    PLACED = 1
    WOKEN = 2
    LOST = 3
    """Poisoned: the deadline has passed."""
    GONE = 4
    PRESENT = 5
    """Found to be there when it was to be placed."""


class Event(NamedTuple):
    """One line of the record."""

    sequence: int
    ns: int
    """CLOCK_MONOTONIC."""
    kind: EventKind
    client: int
    """``Client.number``, of FAULT, WOKEN and GONE."""
    guest: int
    length: int
