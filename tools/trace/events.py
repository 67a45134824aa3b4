"""What a trace consists of. Times are nanoseconds of the monotonic clock, since the trace began.

What belongs here: what the relay saw (sightings), and what an observer makes of it (events), as values. What does not:
how they come about (``relay``, ``observer``) and how they are written.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from vhostuser.protocol.witness import Message, RingState, Side, Wire


@dataclass(frozen=True, slots=True)
class Descriptor:
    """What a passed descriptor is. kind: memfd, file, eventfd, userfaultfd, socket, pipe, or the kernel's own word.

    size: bytes, of a memfd or file, else -1. detail: seals of a memfd, page size of huge pages, path of a file.
    """

    kind: str
    size: int = -1
    detail: str = ""


@dataclass(slots=True)
class Sighting:
    """A message went through. at: when its first byte came.

    data: its bytes as they came, of a nonsensically large one the beginning. late: how many of `fds` came behind its
    first byte. held: from its first byte here to its last byte there, what was done on purpose included. faults: what
    that was, in words.
    """

    at: int
    connection: int
    wire: Wire
    sender: Side
    data: bytes
    fds: tuple[Descriptor, ...] = ()
    late: int = 0
    held: int = 0
    faults: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Over:
    """Nothing more comes of this connection."""

    at: int
    connection: int


@dataclass(frozen=True, slots=True)
class Inquiry:
    """Somebody wants to know where everything stands."""

    at: int


@dataclass(frozen=True, slots=True)
class Passed:
    """A sighting, understood. latency: from the request to this answer, None unless this is one."""

    seen: Sighting
    message: Message
    latency: int | None = None


@dataclass(frozen=True, slots=True)
class Waits:
    """The sender of `message` has been waiting for its answer since `since`."""

    at: int
    connection: int
    message: Message
    since: int


@dataclass(frozen=True, slots=True)
class Notice:
    """Something about a connection, in words: who connects, who hangs up, and what was open then."""

    at: int
    connection: int
    text: str
    rings: tuple[RingState, ...] = ()


Seen = Sighting | Notice | Over | Inquiry
Report = Callable[[Callable[[], Seen]], None]
"""Takes the making of what was seen, and has to do it once: in the order of the reports, when there is time."""
Event = Passed | Waits | Notice
