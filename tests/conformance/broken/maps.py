"""Guest memory, and where it is."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tests.conformance.broken.registry import fault
from vhostuser.memory import Region
from vhostuser.protocol import (
    FrontendRequest,
)

F = FrontendRequest


@fault("memory.offset", "memory.odd-offset", "memory.one-file")
def maps_from_the_beginning() -> None:
    right = Region.map.__func__  # type: ignore[attr-defined]

    def mapped(kind: type[Region], fd: int, described: Any, *rest: Any, **more: Any) -> Any:
        return right(kind, fd, replace(described, offset=0), *rest, **more)

    Region.map = classmethod(mapped)  # type: ignore[assignment,method-assign]
