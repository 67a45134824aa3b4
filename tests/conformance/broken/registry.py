"""What a fault is, the list of all, and the places where our disk is patched by more than one of them.

What belongs here: nothing about any one fault (the themes' modules).
"""

from __future__ import annotations

import os
import runpy
import signal
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from vhostuser.conformance.backend_cases import CASES
from vhostuser.conformance.backend_cases.twins import has_twin, twin_id
from vhostuser.conformance.bench import Device
from vhostuser.conformance.peer import Peer
from vhostuser.conformance.suite import Case, select
from vhostuser.connection import HANDLERS, Connection
from vhostuser.protocol import BackendSession, FrontendRequest, Outgoing

F = FrontendRequest


class Fault(NamedTuple):
    """What to patch, and the cases that must fail; none for a device that is right. device: as for ``--device``.

    packed: the twins of those cases, on packed rings, must fail too.
    """

    patch: Callable[[], object]
    fails: tuple[str, ...]
    device: Device = Device.BLK
    packed: bool = True

    def cases(self) -> list[Case[Peer]]:
        """The cases that must fail."""
        named = select(CASES, self.fails, [])
        also = {twin_id(case.id) for case in named if has_twin(case)} if self.packed else set()
        return named + [case for case in CASES if case.id in also and case not in named]


FAULTS: dict[str, Fault] = {}


def _add(name: str, fault: Fault) -> None:
    assert name not in FAULTS, f"two faults are called {name}"
    FAULTS[name] = fault


def fault(*fails: str, packed: bool = True) -> Callable[[Callable[[], None]], Callable[[], None]]:
    """Declares the function under it as a fault of this name. packed: it is one of packed rings too."""

    def add(patch: Callable[[], None]) -> Callable[[], None]:
        _add(patch.__name__, Fault(patch, fails, packed=packed))
        return patch

    return add


def net_fault(*fails: str) -> Callable[[Callable[[], None]], Callable[[], None]]:
    """``fault``, of our network interface."""

    def add(patch: Callable[[], None]) -> Callable[[], None]:
        _add(patch.__name__, Fault(patch, fails, Device.NET))
        return patch

    return add


def script(path: Path, *fails: str) -> None:
    """Declares a disk that is a program of its own as a fault of its name."""
    FAULTS[path.stem] = Fault(partial(runpy.run_path, str(path), run_name="__main__"), fails)


def answering(change: Callable[[BackendSession, Any, Outgoing | None], Outgoing | None]) -> None:
    """Has every answer changed: from the session, the request, and the answer that is right."""
    right = BackendSession.finish

    def finish(session: BackendSession, request: Any, outcome: Any = None) -> Outgoing | None:
        return change(session, request, right(session, request, outcome))

    BackendSession.finish = finish  # type: ignore[method-assign]


def handling(code: F, change: Callable[[Connection, Any, Any], Any]) -> None:
    """Has a request handled in another way: by the connection, the request, and what is right."""
    right = HANDLERS[code]

    async def handle(connection: Connection, request: Any) -> Any:
        return await change(connection, request, right)

    HANDLERS[code] = handle


def crash() -> None:
    """As a bad access would."""
    os.kill(os.getpid(), signal.SIGSEGV)


def number(code: F, change: Callable[[BackendSession, int], int]) -> None:
    """Has the answer to a question for a number changed."""
    right = BackendSession._known

    def known(session: BackendSession, request: Any) -> Any:
        payload = right(session, request)
        return replace(payload, value=change(session, payload.value)) if request.code is code else payload

    BackendSession._known = known  # type: ignore[method-assign]
