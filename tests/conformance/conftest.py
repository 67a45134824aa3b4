"""A bench and cases in memory, to try the engine with."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from enum import Enum

from vhostuser.conformance.suite import Case, Level, Result, Verdict


class Ability(Enum):
    """What a case may need here."""

    FLY = "the ability to fly"


class Bench:
    """Opens a list, in which cases leave what they like. outcome: raised at the end, as by a back-end that crashed."""

    def __init__(self, *, outcome: Exception | None = None) -> None:
        self.outcome = outcome
        self.opened: list[list[str]] = []

    def lacks(self, needs: Sequence[Enum]) -> str:
        return next((f"needs {need.value}" for need in needs), "")

    @contextlib.asynccontextmanager
    async def open(self) -> AsyncIterator[list[str]]:
        self.opened.append([])
        yield self.opened[-1]
        if self.outcome is not None:
            raise self.outcome


async def nothing(_: list[str]) -> None:
    """A case that passes."""


def case(
    run: Callable[[list[str]], Awaitable[None]] = nothing,
    *needs: Enum,
    name: str = "theme.case",
    level: Level = Level.MUST,
    section: str = "Some section",
) -> Case[list[str]]:
    return Case(name, section, "The rule.", level, needs, run)


def result(verdict: Verdict, name: str = "theme.case", *, level: Level = Level.MUST, **said: str) -> Result[list[str]]:
    return Result(case(name=name, level=level), verdict, **said)
