"""What was seen of a run, as plain values: the only thing that the judgement, the report and the plot look at.

What belongs here: observations, and what follows from them by arithmetic. What does not: what is right (``rules``).
Times are nanoseconds of the monotonic clock; addresses are guest addresses unless they are said to be others.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from enum import StrEnum

from vhostuser.tools.postcopy.truth import Difference


class Outcome(StrEnum):
    """How a message to the back-end ended."""

    DONE = "done"
    REFUSED = "refused"
    SILENT = "not answered"
    WRONG = "answered against the protocol"
    LOST = "connection lost"


@dataclass(frozen=True, slots=True)
class Step:
    """One message of the handshake, or several that belong together, to one client."""

    client: int
    name: str
    outcome: Outcome
    seconds: float
    text: str = ""
    """Why, where it is not DONE."""


@dataclass(frozen=True, slots=True)
class Base:
    """What a client answered for a region. ``right``: None where its address space could not be looked at."""

    client: int
    region: int
    answered: int
    right: bool | None
    text: str = ""
    """What lies at that address instead."""


@dataclass(frozen=True, slots=True)
class Sighting:
    """What was to be seen at a moment at which nobody had a reason to touch guest memory."""

    moment: str
    """``rules.BEFORE_ACK`` or ``rules.BEFORE_RINGS``."""
    faults: tuple[tuple[int, int], ...]
    """(client, address)."""
    present: int
    """Pages in the file, none of which we had placed."""


class Happening(StrEnum):
    """Kinds of events."""

    FAULT = "fault"
    PLACED = "placed"
    WOKEN = "woken"


@dataclass(frozen=True, slots=True)
class Event:
    """Of the fault server. ``client``: None for what concerns all, and for our own threads."""

    at: int
    kind: Happening
    client: int | None
    guest: int
    size: int


@dataclass(frozen=True, slots=True)
class Probe:
    """A question on the control socket. ``seconds``: None if no answer came in time."""

    client: int
    at: int
    waiting: bool
    """Whether a fault of this client was known to wait at that time."""
    seconds: float | None


@dataclass(frozen=True, slots=True)
class Stuck:
    """A request that was not completed though all its pages were there."""

    client: int
    request: int
    seconds: float
    """Since its last page was there, or since it was offered if that was later."""
    asked: int
    """Faults of this client on the pages of the request, and of its ring while a thread sleeps."""
    asleep: int | None
    """Threads of the back-end that wait for a page, as the kernel tells; None if it does not."""


@dataclass(frozen=True, slots=True)
class Failed:
    """A request that was completed with another status than OK, or a ring that the device broke (``request`` -1)."""

    client: int
    request: int
    text: str


@dataclass(frozen=True, slots=True)
class Timed:
    """A completed request."""

    client: int
    request: int
    write: bool
    size: int
    offered: int
    completed: int


@dataclass
class Client:
    """One back-end under test."""

    name: str
    pid: int | None = None
    ended: str = ""
    """How its process ended or its connection was lost, while it was still needed."""
    faults: int = 0
    wakes: int = 0
    merged: int = 0
    """Pages that were waited for and woken together with a neighbour."""
    spurious: int = 0
    """Wakes for which it was not known to wait."""
    stray: int = 0
    """Faults outside of the regions, at the addresses that it answered."""
    blocked_ns: int = 0
    """The sum of the times from its faults to their wakes."""


@dataclass
class Record:
    """One run. ``label`` tells it from others of the same command."""

    label: str = ""
    by_channel: bool = False
    """Whether back-ends were woken by the wake channel, and not by us."""
    clients: list[Client] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    bases: list[Base] = field(default_factory=list)
    sightings: list[Sighting] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    lost_events: int = 0
    """Events for which the fault server had no room."""
    probes: list[Probe] = field(default_factory=list)
    offered: dict[tuple[int, int], int] = field(default_factory=dict)
    """When a client was first given a reason to touch a page; those of rings and canaries are not here."""
    canaries: frozenset[int] = frozenset()
    on_demand: frozenset[int] = frozenset()
    """Pages that did not come by themselves while requests were made."""
    canaries_present: int = 0
    """Of them, those that lay in the file before we placed them."""
    filled: int = 0
    """Other pages that lay in the file before we placed them: somebody touched them without a fault, and got zeros."""
    stuck: list[Stuck] = field(default_factory=list)
    failed: list[Failed] = field(default_factory=list)
    requests: list[Timed] = field(default_factory=list)
    planned: int = 0
    """Requests that were to be made."""
    differences: list[Difference] = field(default_factory=list)
    compared: int = 0
    """Bytes of memory and disks that were compared in the end."""
    began: int = 0
    """The first kick."""
    released: int = 0
    """From here on pages came; before, each back-end had to wait for its first."""
    ended: int = 0
    """The last request was completed; those that were read back afterwards do not count."""
    rest: int = 0
    """The last page that came by itself was there, and the last request completed; 0 if it did not come to that."""
    pages: int = 0
    zeros: int = 0
    """Of these, placed as zeros without data."""
    page_size: int = 4096
    regions: tuple[tuple[int, int], ...] = ()
    """(guest address, bytes) of each."""

    @property
    def request_seconds(self) -> float:
        """In which requests were made, and pages came."""
        return max(self.ended - self.released, 0) / 1e9

    def background(self) -> tuple[int, float]:
        """The pages that came by themselves, also where somebody waited for them, and the seconds until the last of
        them was there. 0 where that cannot be told: no page came by itself, or events were lost."""
        placed = [e for e in self.events if e.kind is Happening.PLACED and e.at <= self.rest]
        mine = [(e.at, page) for e in placed for page in range(e.guest, e.guest + e.size, self.page_size)]
        mine = [(at, page) for at, page in mine if page not in self.on_demand]
        if self.lost_events or len(mine) + len(self.on_demand) < self.pages:
            return 0, 0.0
        return len(mine), (max(at for at, _ in mine) - self.released) / 1e9 if mine else 0.0

    def step(self, client: int, name: str) -> Step | None:
        """What became of that message, None if it was never sent."""
        return next((step for step in self.steps if (step.client, step.name) == (client, name)), None)


def latencies(record: Record) -> dict[int | None, list[float]]:
    """Microseconds from each fault to the wake that ended it, sorted, by client; from the events that were kept. What
    was read before pages came does not count: it was held on purpose."""
    found: dict[int | None, list[float]] = {}
    for fault, wake in waits(record.events, record.page_size):
        if fault.at >= record.released:
            found.setdefault(fault.client, []).append((wake.at - fault.at) / 1000)
    return {client: sorted(times) for client, times in found.items()}


def histogram(times: Iterable[float]) -> list[int]:
    """By powers of two: element n counts those of 2**n up to 2**(n + 1), element 0 all below 2."""
    counts: list[int] = []
    for time in times:
        n = max(int(time), 1).bit_length() - 1
        counts += [0] * (n + 1 - len(counts))
        counts[n] += 1
    return counts


def waits(events: Iterable[Event], page_size: int) -> Iterator[tuple[Event, Event]]:
    """Each fault with the wake that ended it; those that nothing ended are left out."""
    waiting: defaultdict[tuple[int | None, int], list[Event]] = defaultdict(list)
    for event in events:
        if event.kind is Happening.FAULT:
            waiting[event.client, event.guest].append(event)
        elif event.kind is Happening.WOKEN:
            for guest in range(event.guest, event.guest + event.size, page_size):
                for fault in waiting.pop((event.client, guest), ()):
                    yield fault, event


def percentile(values: list[float], percent: float) -> float:
    """The smallest of the sorted ``values`` that ``percent`` of them do not exceed; 0 of none."""
    if not values:
        return 0.0
    return values[min(len(values) - 1, max(0, -(-int(len(values) * percent) // 100) - 1))]
