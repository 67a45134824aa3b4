"""What a case is and how it is run, whatever is tested.

What belongs here: cases, verdicts, running many at a time. What does not: what a case has at hand (``bench``), how
verdicts are shown (``report``).

A case is data and one coroutine function. It passes by returning; it fails by raising Violation, or any other
VhostUserError, TimeoutError or ConnectionError, which is how the peer's faults show themselves. Everything else that it
raises is an error of the case or of the machine, and says nothing about the peer.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, replace
from enum import Enum, StrEnum
from fnmatch import fnmatchcase
from typing import Generic, Protocol, TypeVar

from vhostuser.protocol import LocalProtocolError, VhostUserError

C = TypeVar("C")
C_co = TypeVar("C_co", covariant=True)


class Level(StrEnum):
    """How much a rule binds. SHOULD: also what the specification leaves open and every peer had better do."""

    MUST = "MUST"
    SHOULD = "SHOULD"


class Verdict(StrEnum):
    """What came of a case."""

    PASS = "PASS"
    FAIL = "FAIL"
    SKIP = "SKIP"
    ERROR = "ERROR"


class Violation(Exception):
    """The peer broke the rule. Both texts go on from a colon: what was expected, what was seen."""

    def __init__(self, expected: str, actual: str) -> None:
        self.expected = expected
        self.actual = actual
        super().__init__(f"expected {expected}, got {actual}")


class Skipped(Exception):
    """The rule cannot be tried on this peer or on this machine; the text says why."""


class Unreachable(Exception):
    """There is no peer to judge."""


@dataclass(frozen=True)
class Case(Generic[C]):
    """One rule and how it is tried.

    id: dotted, stable for ever. section: of the specification. rule: what it asks for, in our words, a full sentence.
    needs: features and abilities without which the rule cannot be tried. run: gets what the bench opens for it.
    """

    id: str
    section: str
    rule: str
    level: Level
    needs: tuple[Enum, ...]
    run: Callable[[C], Awaitable[None]]


class Theme(Generic[C]):
    """The cases of one theme, in order; their ids begin with its name. section: where its rules stand, unless said."""

    def __init__(self, name: str, section: str) -> None:
        self.name = name
        self.section = section
        self.cases: list[Case[C]] = []

    def must(self, name: str, rule: str, *needs: Enum, section: str = "") -> Callable[[Run[C]], Run[C]]:
        """Declares the function under it as the case of a rule that binds."""
        return self._adder(name, rule, Level.MUST, needs, section)

    def should(self, name: str, rule: str, *needs: Enum, section: str = "") -> Callable[[Run[C]], Run[C]]:
        """Declares the function under it as the case of a recommendation."""
        return self._adder(name, rule, Level.SHOULD, needs, section)

    def _adder(
        self, name: str, rule: str, level: Level, needs: tuple[Enum, ...], section: str
    ) -> Callable[[Run[C]], Run[C]]:
        def add(run: Run[C]) -> Run[C]:
            self.cases.append(Case(f"{self.name}.{name}", section or self.section, rule, level, needs, run))
            return run

        return add


Run = Callable[[C], Awaitable[None]]


@dataclass(frozen=True)
class Result(Generic[C]):
    """What came of a case. expected, actual: of a failure. reason: of a skip or an error. waiver: why it may fail."""

    case: Case[C]
    verdict: Verdict
    seconds: float = 0.0
    expected: str = ""
    actual: str = ""
    reason: str = ""
    waiver: str = ""

    def fails(self, *, strict: bool) -> bool:
        """Does it keep the peer from conforming? strict: recommendations count as rules."""
        if self.waiver:
            return False
        broken = self.verdict is Verdict.FAIL and (strict or self.case.level is Level.MUST)
        return broken or self.verdict is Verdict.ERROR


class Bench(Protocol[C_co]):
    """Where cases are tried."""

    def lacks(self, needs: Sequence[Enum]) -> str:
        """Why a case with these needs cannot be tried; empty if it can."""

    def open(self) -> AbstractAsyncContextManager[C_co]:
        """A fresh peer for one case. Raises Unreachable; leaving it raises Violation for what it did unasked."""


def select(cases: Iterable[Case[C]], ids: Sequence[str], sections: Sequence[str]) -> list[Case[C]]:
    """Those whose id is one of ``ids``, matches it as a pattern or begins with it, and whose section has one of
    ``sections`` in it; an empty list selects all."""
    return [
        case
        for case in cases
        if (not ids or any(_names(wanted, case.id) for wanted in ids))
        and (not sections or any(wanted.lower() in case.section.lower() for wanted in sections))
    ]


def _names(wanted: str, case_id: str) -> bool:
    return fnmatchcase(case_id, wanted) or case_id.startswith(f"{wanted.rstrip('.')}.")


async def judge(case: Case[C], bench: Bench[C], patience: float) -> Result[C]:
    """Tries one case, for ``patience`` seconds at most."""
    if lacking := bench.lacks(case.needs):
        return Result(case, Verdict.SKIP, reason=lacking)
    began = time.monotonic()
    result = await _try(case, bench, patience)
    return replace(result, seconds=time.monotonic() - began)


async def _try(case: Case[C], bench: Bench[C], patience: float) -> Result[C]:
    limit = asyncio.timeout(patience)
    try:
        async with limit, bench.open() as context:
            await case.run(context)
    except Violation as violation:
        return Result(case, Verdict.FAIL, expected=violation.expected, actual=violation.actual)
    except Skipped as skipped:
        return Result(case, Verdict.SKIP, reason=str(skipped))
    except LocalProtocolError as error:  # the case asked for something illegal
        return Result(case, Verdict.ERROR, reason=str(error))
    except (VhostUserError, TimeoutError, ConnectionError) as error:
        said = f"nothing for {patience:g} s" if limit.expired() else str(error) or type(error).__name__
        return Result(case, Verdict.FAIL, expected="every request answered, the connection kept", actual=said)
    except Unreachable as error:
        return Result(case, Verdict.ERROR, reason=str(error))
    except Exception as error:
        return Result(case, Verdict.ERROR, reason=f"{type(error).__name__}: {error}")
    return Result(case, Verdict.PASS)


async def judge_all(
    cases: Sequence[Case[C]], bench: Bench[C], *, jobs: int = 1, patience: float = 30.0
) -> AsyncIterator[Result[C]]:
    """Tries the cases, ``jobs`` at a time; results in the order in which they come."""
    waiting: Iterator[Case[C]] = iter(cases)
    results: asyncio.Queue[Result[C]] = asyncio.Queue()

    async def work() -> None:
        for case in waiting:
            results.put_nowait(await judge(case, bench, patience))

    workers = [asyncio.ensure_future(work()) for _ in range(jobs)]
    try:
        for _ in cases:
            yield await results.get()
    finally:
        for worker in workers:
            worker.cancel()
        await asyncio.gather(*workers, return_exceptions=True)


# ---- expectations


def check(holds: bool, expected: str, actual: str) -> None:
    """Raises Violation unless the rule holds."""
    if not holds:
        raise Violation(expected, actual)


def equal(what: str, actual: object, expected: object) -> None:
    """Raises Violation unless both are equal; ``what`` names the thing, as in "the base of ring 0"."""
    check(actual == expected, f"{what} to be {expected!r}", repr(actual))
