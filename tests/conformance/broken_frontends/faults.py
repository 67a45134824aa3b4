"""What a fault is, and the means to make one: steps left out or moved, messages said that should not be.

What belongs here: what several groups of faults need. What does not: faults.
"""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from tests.conformance.frontends import MIB, STEPS, Life
from vhostuser.conformance.frontend_cases import CASES
from vhostuser.protocol import (
    VERSION,
    FrontendRequest,
    Payload,
    ProtocolFeature,
    VirtioFeature,
)

F, P, V = FrontendRequest, ProtocolFeature, VirtioFeature


class Fault(NamedTuple):
    """A front-end with a fault, and the cases that must fail. patience: seconds to wait for what it must do."""

    make: Callable[[Path], Life]
    fails: tuple[str, ...]
    patience: float = 12.0


FAULTS: dict[str, Fault] = {}


def fault(*fails: str, name: str = "") -> Callable[[type[Life]], type[Life]]:
    """Declares the class under it as a fault of its name."""

    def add(kind: type[Life]) -> type[Life]:
        FAULTS[name or kind.__name__] = Fault(kind, fails)
        return kind

    return add


def without(*steps: str) -> tuple[str, ...]:
    """A session that leaves steps out."""
    return tuple(step for step in STEPS if step not in steps)


def moved(step: str, after: str) -> tuple[str, ...]:
    """A session with one step in another place."""
    steps = list(without(step))
    steps.insert(steps.index(after) + 1, step)
    return tuple(steps)


async def nothing(*_: object, **__: object) -> None:
    """In place of a call that is not made."""


def spelt(code: F) -> str:
    return code.name.lower().replace("_", "-")


IDS = {case.id for case in CASES}
TOP = STEPS[-1]


Say = Callable[[Life], Awaitable[None]]


def saying(step: str, say: Say, *fails: str, name: str, first: bool = False) -> None:
    """A fault that does something behind a step, or (``first``) before it."""

    async def told(life: Life) -> None:
        if first:
            await say(life)
        await getattr(super(kind, life), step)()
        if not first:
            await say(life)

    kind = type(name, (Life,), {step: told})
    FAULTS[name] = Fault(kind, fails)


Maker = Callable[[], int]
"""Makes a descriptor."""


def raw(code: int, payload: Payload | bytes = b"", *, fds: Maker | None = None, flags: int = VERSION) -> Say:
    """Says one message, whatever it is."""

    async def say(life: Life) -> None:
        made = [fds()] if fds is not None else []
        try:
            await life.talk.raw(code, payload, *made, flags=flags)
        finally:
            for fd in made:
                os.close(fd)

    return say


def eventfd() -> int:
    return os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)


def file(size: int = MIB) -> int:
    fd = os.memfd_create("fault", os.MFD_CLOEXEC)
    os.truncate(fd, size)
    return fd


def only(holds: Callable[[Life], bool], say: Say) -> Say:
    """Says it where that holds."""

    async def maybe(life: Life) -> None:
        if holds(life):
            await say(life)

    return maybe


def about(theme: str) -> list[F]:
    """Messages for which the theme has a case each."""
    return [code for code in F if f"{theme}.{spelt(code)}" in IDS]


def named(theme: str, codes: Sequence[F]) -> tuple[str, ...]:
    return tuple(f"{theme}.{spelt(code)}" for code in codes)
