"""The byte order of legacy rings, of a disk that offers to heed it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from tests.conformance.broken.everything import offer_everything
from tests.conformance.broken.registry import F, fault, handling
from vhostuser.connection import Connection
from vhostuser.protocol import FRONTEND, rules
from vhostuser.ring import Ring
from vhostuser.virtqueue import RingSetup


def _opening(change: Callable[[RingSetup, Ring], RingSetup]) -> None:
    right = Ring.setup
    Ring.setup = lambda ring, features: change(right(ring, features), ring)  # type: ignore[method-assign]


@fault("endian.big", "endian.big-indirect", "endian.goes-on")
def has_one_order() -> None:
    offer_everything()
    _opening(lambda setup, ring: replace(setup, swapped=False))


@fault("endian.big-indirect")
def has_one_order_in_tables() -> None:
    """What it cannot follow it refuses: the ring breaks."""
    offer_everything()
    _opening(lambda setup, ring: replace(setup, features=setup.features & ~(setup.swapped << 28)))


@fault("endian.little", "endian.said-again")
def takes_every_word_for_big() -> None:
    async def change(connection: Connection, request: Any, right: Any) -> None:
        await right(connection, request)
        connection.rings[request.payload.index].swapped = True

    offer_everything()
    handling(F.SET_VRING_ENDIAN, change)


@fault("endian.said-again")
def hears_the_first_word() -> None:
    said: set[Ring] = set()

    async def change(connection: Connection, request: Any, right: Any) -> None:
        ring = connection.rings[request.payload.index]
        if ring not in said:
            await right(connection, request)
        said.add(ring)

    offer_everything()
    handling(F.SET_VRING_ENDIAN, change)


@fault("endian.goes-on")
def tells_bases_in_the_order_of_the_ring() -> None:
    async def change(connection: Connection, request: Any, right: Any) -> Any:
        reply = await right(connection, request)
        num = reply.payload.num
        if connection.rings[request.payload.index].swapped:
            num = int.from_bytes(num.to_bytes(2, "little"), "big")
        return reply._replace(payload=replace(reply.payload, num=num))

    offer_everything()
    handling(F.GET_VRING_BASE, change)


def _without(rule: Any) -> None:
    offer_everything()
    row = FRONTEND[F.SET_VRING_ENDIAN]
    FRONTEND[F.SET_VRING_ENDIAN] = replace(  # type: ignore[index]
        row, rules=tuple(kept for kept in row.rules if kept is not rule)
    )


@fault("endian.modern")
def takes_any_ring_for_a_legacy_one() -> None:
    _without(rules.order_of_a_legacy_ring)


@fault("endian.neither")
def takes_any_order() -> None:
    _without(rules.zero_or_one)
