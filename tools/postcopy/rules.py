"""What a back-end has to do in postcopy, and the judgement of a record by it.

What belongs here: the rules, each with a stable id that names the fault, and the evidence for each fault. What does
not: how evidence is gathered (``run``), how a judgement is shown (``report``).

The rules stand in the order in which one fault causes the next: the first that is broken is the one to look at.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from typing import Final

from vhostuser.tools.postcopy.record import Event, Happening, Outcome, Record, Stuck
from vhostuser.tools.postcopy.truth import Difference


class State(StrEnum):
    """What a run says about one rule."""

    HELD = "ok"
    BROKEN = "broken"
    UNTRIED = "not tried"


@dataclass(frozen=True, slots=True)
class Finding:
    """One fault of one back-end. ``client``: its name; empty where it cannot be told whose fault it is."""

    id: str
    client: str
    expected: str
    actual: str


@dataclass(frozen=True, slots=True)
class Check:
    """What became of one rule."""

    id: str
    state: State
    findings: tuple[Finding, ...] = ()


@dataclass(frozen=True, slots=True)
class Verdict:
    """The judgement of one run: ``passed`` if no rule was broken and every rule was tried."""

    checks: tuple[Check, ...]

    @property
    def findings(self) -> list[Finding]:
        """All of them, causes before consequences."""
        return [finding for check in self.checks for finding in check.findings]

    @property
    def passed(self) -> bool:
        return all(check.state is State.HELD for check in self.checks)


Evidence = Iterator[tuple[int | None, str]]
"""(client's index or None, what was seen instead) for every fault."""


@dataclass(frozen=True, slots=True)
class Rule:
    """``expected``: what a back-end that is right does. ``tried``: whether the run got so far as to tell."""

    id: str
    expected: str
    evidence: Callable[[Record], Evidence]
    tried: Callable[[Record], bool]

    def check(self, record: Record) -> Check:
        findings = tuple(
            Finding(self.id, record.clients[client].name if client is not None else "", self.expected, actual)
            for client, actual in self.evidence(record)
        )
        if findings:
            return Check(self.id, State.BROKEN, findings)
        return Check(self.id, State.HELD if self.tried(record) else State.UNTRIED)


def judge(record: Record) -> Verdict:
    """Every rule, in order."""
    return Verdict(tuple(rule.check(record) for rule in RULES))


# ---- the handshake

ADVISE, LISTEN, ACK, RINGS, END = (
    "POSTCOPY_ADVISE",
    "POSTCOPY_LISTEN",
    "the acknowledgement",
    "the rings",
    "POSTCOPY_END",
)
OFFER, TABLE = "the negotiation", "the memory table"
BEFORE_ACK, BEFORE_RINGS = "before the acknowledgement", "before the rings were set up"


def _step(name: str, record: Record) -> Evidence:
    """A message that did not end well; lost connections are a rule of their own."""
    for step in record.steps:
        if step.name == name and step.outcome not in (Outcome.DONE, Outcome.LOST):
            reason = f": {step.text}" if step.text else ""
            yield step.client, f"{step.name} was {step.outcome}{reason}"


def _came_to(name: str, record: Record) -> bool:
    """Whether that message ended well for every client."""
    done = {step.client for step in record.steps if step.name == name and step.outcome is Outcome.DONE}
    return bool(record.clients) and len(done) == len(record.clients)


def _died(record: Record) -> Evidence:
    for index, client in enumerate(record.clients):
        if client.ended:
            last = next((step.name for step in reversed(record.steps) if step.client == index), "the connection")
            yield index, f"{client.ended} (last step: {last})"


# ---- addresses


def _bases(record: Record) -> Evidence:
    for base in record.bases:
        if base.right is False:
            yield base.client, f"{base.answered:#x} for region {base.region}: {base.text}"
    for index, client in enumerate(record.clients):
        if client.stray:
            yield index, f"{_count(client.stray, 'fault')} at addresses that lie in no region as it answered them"


# ---- touching


def _sighted(moment: str, record: Record) -> Evidence:
    for sighting in record.sightings:
        if sighting.moment != moment:
            continue
        for client, count in sorted(Counter(client for client, _ in sighting.faults).items()):
            yield client, f"{_count(count, 'thread')} waited for a page {moment}"
        if sighting.present:
            yield _only(record), f"{_count(sighting.present, 'page')} in the file {moment}; we had placed none"


def _invented(record: Record) -> Evidence:
    """Pages asked for, or filled, that no ring and no request refers to (yet)."""
    yield from _sighted(BEFORE_RINGS, record)
    early: Counter[int] = Counter()
    for event in record.events:
        if event.kind is Happening.FAULT and event.client is not None and _unreasonable(record, event):
            early[event.client] += 1
    for client, count in sorted(early.items()):
        yield client, f"{_count(count, 'fault')} on pages that nothing it was given refers to"
    if record.canaries_present:
        yield (
            _only(record),
            f"{_count(record.canaries_present, 'page')} that nobody refers to in the file before we placed any",
        )


def _unreasonable(record: Record, event: Event) -> bool:
    if event.guest in record.canaries:
        return True
    offered = record.offered.get((event.client or 0, event.guest), 0)
    return event.at < offered


# ---- waiting


def _control(record: Record) -> Evidence:
    for index, _ in enumerate(record.clients):
        silent = [probe for probe in record.probes if probe.client == index and probe.seconds is None]
        if silent:
            while_ = " while a thread waited for a page" if any(probe.waiting for probe in silent) else ""
            yield index, f"{_count(len(silent), 'question')} not answered{while_}"


def _probed(record: Record) -> bool:
    return {probe.client for probe in record.probes if probe.waiting} == set(range(len(record.clients)))


class _Kind(StrEnum):
    NEVER_WOKEN = "never-woken"
    UNREPORTED = "unreported-fault"
    LOST = "request-lost"


def _stuck(kind: _Kind, record: Record) -> Evidence:
    """Requests that outlive their last page: woken in vain, asleep without our knowledge, or forgotten."""
    for index, _ in enumerate(record.clients):
        stuck = [one for one in record.stuck if one.client == index and _kind(record, one) is kind]
        if not stuck:
            continue
        longest = max(one.seconds for one in stuck)
        asleep = max((one.asleep for one in stuck if one.asleep is not None), default=None)
        threads = "" if asleep is None else f"; {_count(asleep, 'thread')} of it waiting for a page"
        yield (
            index,
            f"{_count(len(stuck), 'request')} open {longest:.1f} s after the last page of each was there{threads}",
        )


def _kind(record: Record, one: Stuck) -> _Kind:
    """A thread that sleeps on though we ourselves have woken every page that it asked for, at addresses that are right,
    sleeps on a page that it did not ask us for."""
    by_us = not record.by_channel and all(base.right for base in record.bases if base.client == one.client)
    if one.asleep and (by_us or not one.asked):
        return _Kind.UNREPORTED
    return _Kind.NEVER_WOKEN if one.asked else _Kind.LOST


def _failed(record: Record) -> Evidence:
    for index, _ in enumerate(record.clients):
        failed = [one for one in record.failed if one.client == index]
        if failed:
            several = f" and {len(failed) - 1} more" if len(failed) > 1 else ""
            yield index, f"{failed[0].text}{several}"


# ---- content


def _zeros(record: Record) -> Evidence:
    if record.filled:
        yield (
            _only(record),
            f"{_count(record.filled, 'page')} filled with zeros, without a fault, before we placed them",
        )
    yield from _different(True, record)


def _different(zeros: bool, record: Record) -> Evidence:
    for where, found in _by_place(one for one in record.differences if one.zeros == zeros):
        size = sum(one.size for one in found)
        yield (
            _only(record),
            f"{size} bytes of {where} {'are zero' if zeros else 'differ'}, the first at {found[0].offset:#x}",
        )


def _by_place(found: Iterable[Difference]) -> list[tuple[str, Sequence[Difference]]]:
    places: dict[str, list[Difference]] = {}
    for one in found:
        places.setdefault(one.where, []).append(one)
    return list(places.items())


def _compared(record: Record) -> bool:
    return record.compared > 0


def _requested(record: Record) -> bool:
    return bool(record.requests) and len(record.requests) >= record.planned


def _only(record: Record) -> int | None:
    """The one back-end there is; None where it could be any of several."""
    return 0 if len(record.clients) == 1 else None


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' if number != 1 else ''}"


RULES: Final = (
    Rule(
        "no-pagefault",
        "offers the protocol feature PAGEFAULT and takes what it offers",
        partial(_step, OFFER),
        partial(_came_to, OFFER),
    ),
    Rule(
        "advise-descriptor",
        "answers POSTCOPY_ADVISE with an empty payload and exactly one descriptor, a userfaultfd",
        partial(_step, ADVISE),
        partial(_came_to, ADVISE),
    ),
    Rule(
        "listen-not-acked",
        "acknowledges POSTCOPY_LISTEN with a u64 of 0",
        partial(_step, LISTEN),
        partial(_came_to, LISTEN),
    ),
    Rule(
        "table-not-answered",
        "answers memory messages after LISTEN with the same message, its own addresses in it",
        partial(_step, TABLE),
        partial(_came_to, TABLE),
    ),
    Rule(
        "wrong-bases",
        "answers for each region the address at which it has mapped it",
        _bases,
        lambda record: any(base.right for base in record.bases) or _requested(record),
    ),
    Rule(
        "touched-before-ack",
        "touches nothing of new memory before the front-end has acknowledged its addresses",
        partial(_sighted, BEFORE_ACK),
        lambda record: any(sighting.moment == BEFORE_ACK for sighting in record.sightings),
    ),
    Rule(
        "control-blocked",
        "answers the control socket while its threads wait for pages",
        _control,
        _probed,
    ),
    Rule(
        "set-up-failed",
        "takes the acknowledgement and sets its rings up",
        lambda record: (seen for name in (ACK, RINGS) for seen in _step(name, record)),
        partial(_came_to, RINGS),
    ),
    Rule(
        "prefaulted",
        "touches a page only when a ring or a request gives it a reason to",
        _invented,
        lambda record: bool(record.requests),
    ),
    Rule(
        "read-zeros",
        "sees in every page what the source had in it",
        _zeros,
        _compared,
    ),
    Rule(
        "never-woken",
        "goes on with a request when its pages have been placed and its threads woken",
        partial(_stuck, _Kind.NEVER_WOKEN),
        _requested,
    ),
    Rule(
        "unreported-fault",
        "waits only for pages that are watched by the descriptor it gave us",
        partial(_stuck, _Kind.UNREPORTED),
        _requested,
    ),
    Rule(
        "request-lost",
        "completes every request whose pages are there",
        partial(_stuck, _Kind.LOST),
        _requested,
    ),
    Rule(
        "request-failed",
        "completes every request with status OK",
        _failed,
        _requested,
    ),
    Rule(
        "wrong-data",
        "moves every byte to where it belongs",
        partial(_different, False),
        _compared,
    ),
    Rule(
        "end-not-answered",
        "answers POSTCOPY_END with a u64 of 0",
        partial(_step, END),
        partial(_came_to, END),
    ),
    Rule(
        "died",
        "lives, and keeps the connection, until the front-end closes it",
        _died,
        partial(_came_to, END),
    ),
)
