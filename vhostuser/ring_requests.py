"""Requests about single rings: what each of them changes, and which ring must not run meanwhile.

What belongs here: SET_VRING_*, GET_VRING_BASE, kicks. What does not: a ring's descriptors and its thread (``ring``),
when rings run (``lifecycle``), enabling, which the session does by itself.

Control thread only; nothing here touches guest memory. A request that must see its ring stopped waits for its thread.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

from vhostuser.arguments import event_of, payload_of
from vhostuser.lifecycle import Lifecycle
from vhostuser.protocol import Reply, Request, RequestRefused, VringAddress, VringEndian, VringFd, VringState
from vhostuser.ring import Ring


class RingRequests:
    """Fulfils them on the rings of ``life``; ``largest`` is the size that the device accepts at most, in entries.

    ``kicked`` is called at the first kick of a ring. Raises RequestRefused.
    """

    def __init__(self, life: Lifecycle, largest: int, kicked: Callable[[Ring], None]) -> None:
        self._life = life
        self._largest = largest
        self._kicked = kicked

    async def set_vring_num(self, request: Request) -> None:
        state = payload_of(request, VringState)
        ring = self._stopped(state.index)
        # The rule of the message has looked at the rest.
        if state.num > self._largest:
            raise RequestRefused(f"ring {state.index}: size {state.num} is more than {self._largest}")
        ring.size = state.num

    async def set_vring_addr(self, request: Request) -> None:
        address = payload_of(request, VringAddress)
        ring = self._life.rings[address.index]
        async with self._life.halted(ring):
            ring.address = address
            ring.broken = None

    async def set_vring_base(self, request: Request) -> None:
        state = payload_of(request, VringState)
        self._stopped(state.index).base = state.num

    async def set_vring_endian(self, request: Request) -> None:
        state = payload_of(request, VringState)
        self._stopped(state.index).swapped = (state.num == VringEndian.BIG) != (sys.byteorder == "big")

    def _stopped(self, index: int) -> Ring:
        ring = self._life.rings[index]
        if ring.running:
            raise RequestRefused(f"ring {index} runs: stop it first (GET_VRING_BASE)")
        return ring

    async def get_vring_base(self, request: Request) -> Reply:
        ring = self._life.rings[payload_of(request, VringState).index]
        async with self._life.halted(ring, leave=True):
            ring.drop_kick()
            self._life.forget_translations()
        return Reply(VringState(ring.index, ring.base))

    async def set_vring_kick(self, request: Request) -> None:
        ring = self._life.rings[payload_of(request, VringFd).index]
        async with self._life.halted(ring):
            ring.set_kick(event_of(request, "kick"), lambda: self._kicked(ring))

    async def vring_kick(self, request: Request) -> None:
        ring = self._life.rings[payload_of(request, VringState).index]
        ring.kick_in_band(lambda: self._kicked(ring))

    async def set_vring_call(self, request: Request) -> None:
        self._life.rings[payload_of(request, VringFd).index].set_call(event_of(request, "call"))

    async def set_vring_err(self, request: Request) -> None:
        self._life.rings[payload_of(request, VringFd).index].set_err(event_of(request, "err"))
