"""Postcopy: more in tests/lab_postcopy/broken."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from tests.conformance.broken.registry import F, answering, fault, handling, script
from vhostuser.connection import Connection
from vhostuser.memory import Region
from vhostuser.postcopy import Postcopy
from vhostuser.protocol import (
    FRONTEND,
    BackendSession,
    Effect,
    Header,
    Outgoing,
    ProtocolFeature,
    Reply,
    RequestRefused,
    VirtioFeature,
)
from vhostuser.protocol import Postcopy as Handshake
from vhostuser.protocol.postcopy import HANDSHAKE, Step


@fault("postcopy.listen-mapped")
def listens_with_regions() -> None:
    async def change(connection: Connection, request: Any, right: Any) -> Any:
        connection._regions.listen()

    handling(F.POSTCOPY_LISTEN, change)


# ---- before SET_FEATURES, which comes with the rings


def _featureless(connection: Connection) -> bool:
    return not connection._session.has(VirtioFeature.VERSION_1)


@fault("postcopy.advise")
def opens_its_userfaultfd_with_the_features() -> None:
    async def change(connection: Connection, request: Any, right: Any) -> Any:
        answer = await right(connection, request)
        return Reply(answer.payload) if _featureless(connection) else answer

    handling(F.POSTCOPY_ADVISE, change)


@fault("postcopy.advise-userfaultfd")
def gives_what_it_has_for_a_userfaultfd() -> None:
    async def change(connection: Connection, request: Any, right: Any) -> Any:
        answer = await right(connection, request)
        if _featureless(connection):
            other = os.eventfd(0)
            os.dup2(other, answer.fds[0])
            os.close(other)
        return answer

    handling(F.POSTCOPY_ADVISE, change)


@fault("postcopy.listen")
def listens_to_nobody_without_features() -> None:
    async def change(connection: Connection, request: Any, right: Any) -> None:
        if _featureless(connection):
            raise RequestRefused("there are no features yet")
        await right(connection, request)

    handling(F.POSTCOPY_LISTEN, change)


# ---- the order of messages


@fault("postcopy.advise-again")
def advises_once() -> None:
    advised = set()

    async def change(connection: Connection, request: Any, right: Any) -> Any:
        if connection in advised:
            raise RequestRefused("once is enough")
        advised.add(connection)
        return await right(connection, request)

    handling(F.POSTCOPY_ADVISE, change)


@fault("postcopy.advise-only")
def stops_for_advice() -> None:
    async def change(connection: Connection, request: Any, right: Any) -> Any:
        async with connection._life.halted():
            for ring in connection._session.rings:
                ring.enabled = False
        return await right(connection, request)

    handling(F.POSTCOPY_ADVISE, change)


@fault("postcopy.advise-leak")
def leaks_userfaultfds() -> None:
    async def change(connection: Connection, request: Any, right: Any) -> Any:
        answer = await right(connection, request)
        os.dup(answer.fds[0])
        return answer

    handling(F.POSTCOPY_ADVISE, change)


@fault("postcopy.listen-always")
def acknowledges_listen_as_any_message() -> None:
    answering(
        lambda session, request, answer: (
            None if request.code is F.POSTCOPY_LISTEN and not session.has(ProtocolFeature.REPLY_ACK) else answer
        )
    )


@fault("postcopy.listen-unadvised")
def listens_unadvised() -> None:
    FRONTEND[F.POSTCOPY_LISTEN] = replace(FRONTEND[F.POSTCOPY_LISTEN], rules=())  # type: ignore[index]
    HANDSHAKE[Handshake.IDLE][F.POSTCOPY_LISTEN] = Step(Handshake.IDLE, Effect.NOTHING)  # type: ignore[index]

    async def change(connection: Connection, request: Any, right: Any) -> None:
        if connection._session.postcopy is not Handshake.IDLE:
            await right(connection, request)

    handling(F.POSTCOPY_LISTEN, change)


@fault("postcopy.listen-again")
def listens_once() -> None:
    async def change(connection: Connection, request: Any, right: Any) -> None:
        if connection._listening:
            raise RequestRefused("once is enough")
        await right(connection, request)

    handling(F.POSTCOPY_LISTEN, change)


# ---- regions


def _acknowledges_in_postcopy_too(code: F) -> None:
    """By a u64, as in precopy, where our addresses are asked for."""

    def change(_: BackendSession, request: Any, answer: Outgoing | None) -> Outgoing | None:
        if answer is None or request.code is not code or not request.row.reply:
            return answer
        return Outgoing(Header(code, 5, 8).pack() + bytes(8))

    answering(change)


@fault("postcopy.slots", "postcopy.ack-slots")
def tells_no_address_of_a_region() -> None:
    _acknowledges_in_postcopy_too(F.ADD_MEM_REG)


@fault("postcopy.table", "postcopy.table-order")
def tells_no_addresses_of_a_table() -> None:
    _acknowledges_in_postcopy_too(F.SET_MEM_TABLE)


@fault("postcopy.loss")
def closes_its_userfaultfd_first() -> None:
    """Whereupon the kernel places pages of zeros."""
    Postcopy.revoke = Postcopy._part  # type: ignore[method-assign]


@fault("postcopy.hugetlb")
def tells_no_huge_page_from_others() -> None:
    """Addresses of 4 KiB pages, for which a userfaultfd on hugetlbfs has no ear."""
    right = Region._of.__func__  # type: ignore[attr-defined]

    def of(kind: type[Region], native: Any) -> Region:
        region: Region = right(kind, native)
        if region.hugetlb:
            region.length -= 4096
        return region

    Region._of = classmethod(of)  # type: ignore[assignment,method-assign]


# ---- disks of the laboratory

_LABORATORY = Path(__file__).parents[2] / "lab_postcopy/broken"


def _laboratory(name: str, *fails: str) -> None:
    script(_LABORATORY / f"{name}.py", *(f"postcopy.{case}" for case in fails))


_laboratory("bases_of_other_regions", "two-regions", "two-regions-in-table")
_laboratory("bases_of_the_front_end", "ack-empty", "ack-u64", "ack-slots")
_laboratory("bases_off_by_a_page", "fault", "end")
_laboratory("blocks_the_control_socket", "control")
_laboratory("end_not_answered", "end", "end-again", "second")
_laboratory("prefaults", "no-more-than-needed")
_laboratory("fills_before_the_ack", "no-touch", "no-hole-filled")
_laboratory("registers_nothing", "fault", "no-hole-filled", "loss-then-next", "data")
_laboratory("unregisters_early", "waits", "two-regions")
