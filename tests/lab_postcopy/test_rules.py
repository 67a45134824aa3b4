"""The judgement: a right run passes, and each fault is named by its id, with what was seen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from vhostuser.tools.postcopy.record import (
    Base,
    Event,
    Failed,
    Happening,
    Outcome,
    Probe,
    Record,
    Sighting,
    Step,
    Stuck,
)
from vhostuser.tools.postcopy.rules import (
    ADVISE,
    BEFORE_ACK,
    BEFORE_RINGS,
    END,
    LISTEN,
    OFFER,
    RINGS,
    RULES,
    TABLE,
    State,
    judge,
)
from vhostuser.tools.postcopy.truth import Difference

Good = Callable[..., Record]
PAGE = 4096


def ends(step: str, outcome: Outcome) -> Callable[[Record], None]:
    """The run stops at a step."""

    def spoil(record: Record) -> None:
        at = next(n for n, one in enumerate(record.steps) if one.name == step)
        record.steps[at:] = [Step(0, step, outcome, 1.0, "why")]

    return spoil


def adds(name: str, *items: object) -> Callable[[Record], None]:
    return lambda record: getattr(record, name).extend(items)


def sighted(moment: str, faults: int, present: int) -> Callable[[Record], None]:
    return adds("sightings", Sighting(moment, tuple((0, 0x1000 * n) for n in range(faults)), present))


def sets(name: str, value: object) -> Callable[[Record], None]:
    return lambda record: setattr(record, name, value)


def of_client(name: str, value: object) -> Callable[[Record], None]:
    return lambda record: setattr(record.clients[0], name, value)


def fault(guest: int, at: int) -> Event:
    return Event(at, Happening.FAULT, 0, guest, PAGE)


FAULTS: dict[str, tuple[str, Callable[[Record], None], str]] = {
    "no-pagefault": ("no-pagefault", ends(OFFER, Outcome.REFUSED), "why"),
    "advise-refused": ("advise-descriptor", ends(ADVISE, Outcome.REFUSED), "refused"),
    "advise-wrong": ("advise-descriptor", ends(ADVISE, Outcome.WRONG), "against the protocol"),
    "listen": ("listen-not-acked", ends(LISTEN, Outcome.SILENT), "not answered"),
    "table": ("table-not-answered", ends(TABLE, Outcome.WRONG), "against the protocol"),
    "bases": ("wrong-bases", adds("bases", Base(0, 1, 0xABC000, False, "not mapped there")), "0xabc000"),
    "outside": ("wrong-bases", of_client("stray", 2), "2 faults"),
    "early-fault": ("touched-before-ack", sighted(BEFORE_ACK, 2, 0), "2 threads"),
    "early-page": ("touched-before-ack", sighted(BEFORE_ACK, 0, 1), "1 page in the file"),
    "rings": ("set-up-failed", ends(RINGS, Outcome.REFUSED), "why"),
    "prefault": ("prefaulted", sighted(BEFORE_RINGS, 3, 0), "3 threads"),
    "populate": ("prefaulted", sighted(BEFORE_RINGS, 0, 64), "64 pages in the file"),
    "canary": ("prefaulted", adds("events", fault(60 * PAGE, 15_000_000)), "1 fault"),
    "too-early": ("prefaulted", adds("events", fault(PAGE, 9_000_000)), "1 fault"),
    "canary-filled": ("prefaulted", sets("canaries_present", 4), "4 pages"),
    "control": ("control-blocked", adds("probes", Probe(0, 12_000_000, True, None)), "1 question"),
    "control-idle": ("control-blocked", adds("probes", Probe(0, 12_000_000, False, None)), "1 question not answered"),
    "stuck": ("never-woken", adds("stuck", Stuck(0, 5, 2.0, 3, 0)), "1 request open 2.0 s"),
    "stuck-asleep": ("unreported-fault", adds("stuck", Stuck(0, 5, 2.0, 3, 1)), "1 thread"),
    "stuck-awake": ("never-woken", adds("stuck", Stuck(0, 5, 2.0, 3, None)), "1 request"),
    "unreported": ("unreported-fault", adds("stuck", Stuck(0, 5, 2.0, 0, 2)), "2 threads"),
    "forgotten": ("request-lost", adds("stuck", Stuck(0, 5, 2.0, 0, 0)), "0 threads"),
    "status": ("request-failed", adds("failed", Failed(0, 1, "request 1 ended with IOERR")), "IOERR"),
    "zeros": (
        "read-zeros",
        adds("differences", Difference("disk 0", 512, 1024, True)),
        "1024 bytes of disk 0 are zero",
    ),
    "filled": ("read-zeros", sets("filled", 3), "3 pages"),
    "wrong": ("wrong-data", adds("differences", Difference("disk 0", 512, 512, False)), "0x200"),
    "end": ("end-not-answered", ends(END, Outcome.SILENT), "not answered"),
    "died": ("died", of_client("ended", "was ended by SIGSEGV"), "SIGSEGV"),
}


def test_a_run_in_which_everything_went_right_passes(good: Good) -> None:
    verdict = judge(good())
    assert verdict.passed
    assert [check.id for check in verdict.checks] == [rule.id for rule in RULES]
    assert not verdict.findings


@pytest.mark.parametrize("name", FAULTS)
def test_each_fault_is_named(good: Good, name: str) -> None:
    expected, spoil, words = FAULTS[name]
    record = good()
    spoil(record)
    verdict = judge(record)
    assert not verdict.passed
    assert [finding.id for finding in verdict.findings] == [expected]
    (finding,) = verdict.findings
    assert finding.client == "blk 0"
    assert words in finding.actual
    assert finding.expected


def test_every_rule_has_a_fault_here() -> None:
    assert {expected for expected, *_ in FAULTS.values()} == {rule.id for rule in RULES}


def test_a_run_that_stopped_says_what_it_has_not_tried(good: Good) -> None:
    record = good()
    ends(LISTEN, Outcome.SILENT)(record)
    record.bases, record.requests, record.probes, record.sightings, record.compared = [], [], [], [], 0
    states = {check.id: check.state for check in judge(record).checks}
    assert states.pop("listen-not-acked") is State.BROKEN
    held = {name for name, state in states.items() if state is State.HELD}
    assert held == {"no-pagefault", "advise-descriptor"}


def test_nothing_passes_that_was_not_tried(good: Good) -> None:
    record = good()
    record.requests.clear()
    verdict = judge(record)
    assert not verdict.findings
    assert not verdict.passed


def test_a_lost_connection_is_one_fault_and_not_also_that_of_the_step(good: Good) -> None:
    record = good()
    ends(LISTEN, Outcome.LOST)(record)
    record.clients[0].ended = "ended with status 1"
    (finding,) = judge(record).findings
    assert (finding.id, finding.actual) == ("died", f"ended with status 1 (last step: {LISTEN})")


def test_where_an_address_space_cannot_be_looked_at_the_requests_tell(good: Good) -> None:
    record = good()
    record.bases = [replace(base, right=None) for base in record.bases]
    assert judge(record).passed


def test_a_fault_of_one_of_two_is_laid_at_its_door(good: Good) -> None:
    record = good(2)
    record.stuck.append(Stuck(1, 0, 1.5, 1, 0))
    record.differences.append(Difference("disk 0", 0, 512, True))
    assert [(finding.id, finding.client) for finding in judge(record).findings] == [
        ("read-zeros", ""),
        ("never-woken", "blk 1"),
    ]


def test_a_thread_that_sleeps_on_was_not_woken_where_waking_was_its_own_affair(good: Good) -> None:
    record = good()
    record.by_channel = True
    record.stuck.append(Stuck(0, 5, 2.0, 3, 1))
    assert [finding.id for finding in judge(record).findings] == ["never-woken"]


def test_our_own_threads_may_touch_what_they_like(good: Good) -> None:
    record = good()
    record.events.append(Event(0, Happening.FAULT, None, 60 * PAGE, PAGE))
    assert judge(record).passed
