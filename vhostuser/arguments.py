"""What a request brings along, typed: its payload and its descriptors.

What belongs here: taking them out of a request whose form the session has judged. What does not: what they are for
(``connection``).
"""

from __future__ import annotations

from typing import TypeVar

from vhostuser.channel import Fds
from vhostuser.protocol import Payload, Request, VringAddress, VringFd, VringState
from vhostuser.ring import usable_event

P = TypeVar("P", bound=Payload)


def payload_of(request: Request, kind: type[P]) -> P:
    """Its payload, which is of this kind by its row."""
    assert isinstance(request.payload, kind)
    return request.payload


def fds_of(request: Request) -> Fds:
    """Its descriptors, which close with it unless they are taken."""
    assert isinstance(request.fds, Fds)
    return request.fds


def event_of(request: Request, name: str) -> int | None:
    """The descriptor, now ours; None if the front-end said that there is none. Raises RequestRefused."""
    if not payload_of(request, VringFd).has_fd:
        return None
    usable_event(fds_of(request)[0], name, pipe=name == "kick")
    return fds_of(request).take()


def ring_of(request: Request) -> int | None:
    """The ring that it is about, if it is about one."""
    payload = request.payload
    return payload.index if isinstance(payload, VringAddress | VringFd | VringState) else None
