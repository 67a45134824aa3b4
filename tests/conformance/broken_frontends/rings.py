"""Faults of rings: values, order, addresses, descriptors.

What belongs here: what is wrong with rings. The one behind the last is not used by the front-end itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from tests.conformance.broken_frontends.faults import (
    TOP,
    eventfd,
    fault,
    file,
    nothing,
    only,
    raw,
    saying,
)
from tests.conformance.frontends import MIB, RINGS, SIZE, Life
from vhostuser.frontend import FrontendRing
from vhostuser.protocol import (
    U64,
    FrontendRequest,
    ProtocolFeature,
    VirtioFeature,
    VringAddress,
    VringFd,
    VringState,
)

F, P, V = FrontendRequest, ProtocolFeature, VirtioFeature


_SPARE = RINGS

saying(TOP, raw(F.SET_VRING_CALL, VringFd(9, has_fd=False)), "ring.index", name="ring_that_is_not_there")
saying(TOP, raw(F.SET_VRING_NUM, VringState(_SPARE, 0)), "ring.size", name="ring_of_nothing")
saying(TOP, raw(F.SET_VRING_NUM, VringState(_SPARE, 100)), "ring.power-of-two", name="ring_of_100")
saying(TOP, raw(F.SET_VRING_BASE, VringState(_SPARE, 1 << 16)), "ring.base", name="base_of_17_bits")
saying(TOP, only(lambda life: life.has(V.PROTOCOL_FEATURES), raw(F.SET_VRING_ENABLE, VringState(_SPARE, 2))),
       "ring.enable-number", name="enables_by_2")  # fmt: skip
saying(TOP, raw(F.SET_VRING_KICK, VringFd(_SPARE), fds=eventfd), "ring-order.size-before-kick",
       "ring-order.address-before-kick", "ring-order.base-before-kick", "ring-order.enabled", "ring-order.stopped",
       name="ring_of_a_kick_alone")  # fmt: skip
saying(TOP, raw(F.SET_VRING_NUM, VringState(0, 2 * SIZE)), "ring-order.still-size", name="size_changes")
saying(TOP, raw(F.SET_VRING_BASE, VringState(0, 7)), "ring-order.still-base", name="base_changes")


def address(life: Life, index: int, like: int, **changes: int) -> VringAddress:
    queue, user = life.rings[like].queue, life.memory.map.guest_to_host
    return replace(VringAddress(index, 0, user(queue.desc), user(queue.used), user(queue.avail), 0), **changes)


def addressing(name: str, make: Callable[[Life], VringAddress], *fails: str, num: bool = True) -> None:
    async def say(life: Life) -> None:
        address = make(life)
        if num and address.index == _SPARE:
            await life.talk.raw(F.SET_VRING_NUM, VringState(_SPARE, 16))
        await life.talk.raw(F.SET_VRING_ADDR, address)

    saying("set_up", say, *fails, name=name)


def _free(life: Life, **changes: int) -> VringAddress:
    """Addresses for the spare ring, in memory that nobody uses."""
    at = life.memory.map.guest_to_host(MIB // 2)
    return replace(VringAddress(_SPARE, 0, at, at + 8192, at + 4096, 0), **changes)


addressing("addresses_change", lambda life: replace(_free(life), index=0), "ring-order.still-address")
addressing("addresses_without_size", _free, "ring-order.size-before-address", num=False)
addressing("addresses_nowhere", lambda life: _free(life, desc=4096), "address.inside")
addressing("addresses_crooked", lambda life: _free(life, used=_free(life).used + 2), "address.aligned")
addressing("parts_overlap", lambda life: _free(life, avail=_free(life).desc), "address.disjoint")
addressing("ring_in_another", lambda life: address(life, _SPARE, 0), "address.other-rings")
addressing("flags_of_an_address", lambda life: _free(life, flags=2), "address.flags")

saying(TOP, raw(F.SET_VRING_KICK, VringFd(0), fds=file), "event.kick-kind", name="kick_of_a_file")
saying(TOP, raw(F.SET_VRING_CALL, VringFd(0), fds=file), "event.call-kind", name="call_of_a_file")
saying(TOP, raw(F.SET_VRING_ERR, VringFd(0), fds=file), "event.err-kind", name="err_of_a_file")
saying(TOP, raw(F.SET_VRING_CALL, U64(1 << 9 | 1 << 8)), "event.reserved-bits", name="reserved_bits_of_a_word")


async def _same_kick(life: Life) -> None:
    await life.talk.raw(F.SET_VRING_KICK, VringFd(1), life.rings[0].kick_fd)


saying(TOP, _same_kick, "event.own-kick", name="one_kick_for_two")


@fault("event.called")
class NeverCalled(Life):
    async def start(self, ring: FrontendRing) -> None:
        told, self.talk.set_vring_call = self.talk.set_vring_call, nothing  # type: ignore[method-assign]
        await super().start(ring)
        self.talk.set_vring_call = told  # type: ignore[method-assign]
