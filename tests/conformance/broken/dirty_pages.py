"""Which pages are marked in the dirty log."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from tests.conformance.broken.registry import fault
from vhostuser.memory import DirtyLog
from vhostuser.protocol import (
    FrontendRequest,
)
from vhostuser.ring import Ring
from vhostuser.virtqueue import RingSetup

F = FrontendRequest


def _marks_used(change: Callable[[RingSetup], RingSetup]) -> None:
    right = Ring.setup
    Ring.setup = lambda ring, features: change(right(ring, features))  # type: ignore[method-assign]


@fault("log.used", "log.used-elsewhere")
def never_marks_the_used_ring() -> None:
    _marks_used(lambda setup: replace(setup, log_used=False))


@fault("log.used-elsewhere")
def marks_the_used_ring_where_it_is() -> None:
    _marks_used(lambda setup: replace(setup, log=0))


@fault("log.offset")
def logs_from_the_beginning() -> None:
    right = DirtyLog.map.__func__  # type: ignore[attr-defined]

    def mapped(kind: type[DirtyLog], fd: int, size: int, offset: int = 0) -> Any:
        return right(kind, fd, size, 0)

    DirtyLog.map = classmethod(mapped)  # type: ignore[assignment,method-assign]
