"""A record of a run in which everything went right, for tests to spoil."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from vhostuser.tools.postcopy.record import (
    Base,
    Client,
    Event,
    Happening,
    Outcome,
    Probe,
    Record,
    Sighting,
    Step,
    Timed,
)
from vhostuser.tools.postcopy.rules import ACK, ADVISE, BEFORE_ACK, BEFORE_RINGS, END, LISTEN, OFFER, RINGS, TABLE
from vhostuser.uffd import NotPermitted, Userfaultfd

MS = 1_000_000
PAGE = 4096
STEPS = (OFFER, ADVISE, LISTEN, TABLE, ACK, RINGS, END)


def good_record(clients: int = 1) -> Record:
    """Two requests for each client, a fault each, woken 100 us later."""
    record = Record(
        label="test",
        planned=2 * clients,
        began=9 * MS,
        released=10 * MS,
        ended=20 * MS,
        rest=20 * MS,
        pages=64,
        compared=64 * PAGE,
    )
    for index in range(clients):
        client = Client(f"blk {index}", 100 + index, faults=2, wakes=2, blocked_ns=200_000)
        record.clients.append(client)
        record.steps += [Step(index, name, Outcome.DONE, 0.001) for name in STEPS]
        record.bases.append(Base(index, 0, 0x7F0000000000, True))
        record.probes.append(Probe(index, 11 * MS, True, 0.0001))
        record.requests += [Timed(index, n, bool(n), PAGE, 10 * MS, 12 * MS) for n in range(2)]
        for page in (1, 2):
            record.offered[index, page * PAGE] = 10 * MS
            at = (10 + page) * MS
            record.events += [
                Event(at, Happening.FAULT, index, page * PAGE, PAGE),
                Event(at + 50_000, Happening.PLACED, None, page * PAGE, PAGE),
                Event(at + 100_000, Happening.WOKEN, index, page * PAGE, PAGE),
            ]
    record.sightings += [Sighting(BEFORE_ACK, (), 0), Sighting(BEFORE_RINGS, (), 0)]
    record.regions = ((0, 2 << 20), (1 << 30, 2 << 20))
    record.canaries = frozenset({60 * PAGE})
    return record


@pytest.fixture
def good() -> Callable[..., Record]:
    """Makes records in which everything went right."""
    return good_record


@pytest.fixture(scope="session")
def permitted() -> None:
    """For tests that need a userfaultfd which sees faults in system calls."""
    try:
        Userfaultfd.probe()
    except NotPermitted as error:
        pytest.skip(str(error))
