"""Makes events of sightings: what each message is, how long its answer took, who has waited too long.

What belongs here: every connection's witness and its unanswered requests, against the times that the sightings carry.
What does not: clocks, threads and sockets (``desk``, ``relay``); rules (``vhostuser.protocol.witness``).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from vhostuser.protocol.witness import Message, Witness
from vhostuser.tools.trace.events import Event, Inquiry, Notice, Over, Passed, Seen, Sighting, Waits


@dataclass(slots=True)
class _Wait:
    """since: when the request came. due: when it is worth a word, if it is still unanswered then."""

    since: int
    due: int


@dataclass(slots=True)
class _Connection:
    witness: Witness = field(default_factory=Witness)
    waits: dict[Message, _Wait] = field(default_factory=dict)


class Observer:
    """Of a whole trace. patience: nanoseconds after which a missing answer is told of, and again at twice the time."""

    def __init__(self, patience: int = 1_000_000_000) -> None:
        self._patience = patience
        self._connections: dict[int, _Connection] = {}

    def see(self, seen: Seen) -> Iterator[Event]:
        """What there is to say about that. Sightings come in the order in which they were passed on."""
        match seen:
            case Sighting():
                yield self._passed(self._connections.setdefault(seen.connection, _Connection()), seen)
            case Over():
                yield self._over(seen)
            case Inquiry(at):
                yield from self._status(at)
            case Notice():
                yield seen

    def overdue(self, now: int) -> Iterator[Event]:
        """Who has waited too long by now."""
        for number, connection in self._connections.items():
            for message, wait in connection.waits.items():
                if wait.due <= now:
                    wait.due = now + (now - wait.since)
                    yield Waits(now, number, message, wait.since)

    def next_due(self) -> int | None:
        """When ``overdue`` has something to say, if nothing happens before."""
        return min((wait.due for one in self._connections.values() for wait in one.waits.values()), default=None)

    def _passed(self, connection: _Connection, seen: Sighting) -> Passed:
        in_time = tuple(range(len(seen.fds) - seen.late))
        message = connection.witness.hear(seen.wire, seen.sender, seen.data, in_time, seen.late)
        wait = connection.waits.pop(message.answers, None) if message.answers else None
        if message.awaits:
            connection.waits[message] = _Wait(seen.at, seen.at + self._patience)
        return Passed(seen, message, seen.at - wait.since if wait else None)

    def _over(self, seen: Over) -> Notice:
        connection = self._connections.pop(seen.connection, _Connection())
        unanswered = ", ".join(message.name for message in connection.waits)
        return Notice(seen.at, seen.connection, f"over, without an answer to {unanswered}" if unanswered else "over")

    def _status(self, at: int) -> Iterator[Event]:
        for number, connection in self._connections.items():
            yield Notice(at, number, "as it stands:", connection.witness.rings())
            for message, wait in connection.waits.items():
                yield Waits(at, number, message, wait.since)
