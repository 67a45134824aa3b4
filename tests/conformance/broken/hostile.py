"""What no driver puts into a ring."""

from __future__ import annotations

import asyncio
import os
from typing import Any

from tests.conformance.broken.registry import FAULTS, Fault, crash, fault
from tests.conformance.plain import Queue, override
from tests.conformance.plain.queue import Chain
from tests.conformance.plain.ring import NEXT, Bad, Descriptor
from tests.conformance.plain.ring import Ring as Fields
from vhostuser._native import lib
from vhostuser.lifecycle import Lifecycle
from vhostuser.protocol import (
    FrontendRequest,
)
from vhostuser.ring import Ring

F = FrontendRequest


@fault("hostile.reported", "packed.reported")
def reports_nothing() -> None:
    Ring.signal_err = lambda ring: None  # type: ignore[method-assign]


@fault("hostile.control-kept", "hostile.recovers", "hostile.reported", "packed.control-kept", "packed.recovers")
def leaves_for_a_broken_ring() -> None:
    right = Lifecycle._ring_ended

    def ended(life: Lifecycle, ring: Ring, broken: Any) -> None:
        if broken is None:
            right(life, ring, broken)
        else:
            life._failed()

    Lifecycle._ring_ended = ended  # type: ignore[method-assign]


def _dies(name: str, codes: tuple[int, ...], *fails: str) -> None:
    """A disk that does not look before it follows what such a ring says."""

    def patch() -> None:
        right = Lifecycle._ring_ended

        def ended(life: Lifecycle, ring: Ring, broken: Any) -> None:
            if broken is not None and broken.code in codes:
                crash()
            right(life, ring, broken)

        Lifecycle._ring_ended = ended  # type: ignore[method-assign]

    FAULTS[f"dies_of_{name}"] = Fault(patch, fails)


_dies("circles", (lib.VU_E_LOOP,), "hostile.loop", "hostile.indirect-loop", "hostile.loop-of-one")
_dies("order", (lib.VU_E_ORDER,), "hostile.readable-after-writable")
_dies("jumps", (lib.VU_E_INDEX,), "hostile.index-ahead", "hostile.index-back")
_dies("numbers", (lib.VU_E_HEAD,), "hostile.head-outside", "hostile.head-far-outside", "hostile.next-outside")
_dies("links_of_tables", (lib.VU_E_HEAD,), "hostile.indirect-link-outside")
_dies("tables", (lib.VU_E_INDIRECT,), "hostile.indirect-odd", "hostile.indirect-empty", "hostile.indirect-nested")
_dies("long_tables", (lib.VU_E_SIZE,), "hostile.indirect-huge")
_dies("wraps", (lib.VU_E_OVERFLOW,), "hostile.buffer-wraps")
_dies(
    "addresses", (lib.VU_E_RANGE,),
    *("hostile.indirect-outside", "hostile.indirect-over-the-end", "hostile.buffer-outside", "hostile.buffer-huge"),
    *("hostile.buffer-over-the-end", "hostile.header-outside", "hostile.status-outside", "memory.unmaps-data"),
)  # fmt: skip
_dies("lost_memory", (lib.VU_E_FAULT,), "memory.file-shrinks-ring")


@fault("hostile.changes")
def dies_of_a_broken_ring_that_is_kicked_on_and_on() -> None:
    right, drop = Lifecycle._ring_ended, Ring.drop_kick
    kicks = 0

    def dropped(ring: Ring) -> None:
        if ring.broken is not None and ring.kick is not None:
            asyncio.get_running_loop().remove_reader(ring.kick)
        drop(ring)

    def kicked(ring: Ring) -> None:
        nonlocal kicks
        kicks += os.eventfd_read(ring.kick) if ring.kick is not None else 0
        if kicks > 8:
            crash()

    def ended(life: Lifecycle, ring: Ring, broken: Any) -> None:
        right(life, ring, broken)
        if broken is not None and ring.kick is not None:
            asyncio.get_running_loop().add_reader(ring.kick, kicked, ring)

    Ring.drop_kick = dropped  # type: ignore[method-assign]

    Lifecycle._ring_ended = ended  # type: ignore[method-assign]


@fault("hostile.over-the-ring")
def dies_of_data_in_the_ring() -> None:
    right = Queue.add

    def add(queue: Queue, chain: Chain, descriptor: Descriptor) -> None:
        if descriptor.guest == queue.ring.desc:
            crash()
        right(queue, chain, descriptor)

    override(Queue, add=add)


@fault("hostile.head-twice")
def dies_of_a_head_that_is_out() -> None:
    right = Queue.take

    def take(queue: Queue) -> Chain | None:
        heads = [queue.ring.avail_head(queue.next + n) for n in range(2 if queue.waiting() > 1 else 0)]
        if heads and heads[0] == heads[1]:
            crash()
        return right(queue)

    override(Queue, take=take)


@fault("hostile.indirect-and-next")
def dies_of_a_table_with_a_link() -> None:
    right = Queue.check_table

    def check(queue: Queue, descriptor: Descriptor) -> None:
        if descriptor.flags & NEXT:
            crash()
        right(queue, descriptor)

    override(Queue, check_table=check)


# ---- rings where no ring can be


def _places(code: int) -> None:
    """A disk that crashes where it should have judged a ring's place with this code."""
    right = Queue.part

    def part(queue: Queue, user: int, length: int, alignment: int) -> int:
        try:
            return right(queue, user, length, alignment)
        except Bad as bad:
            if bad.code == code:
                crash()
            raise

    override(Queue, part=part)


@fault("address.outside", "address.null", "memory.unmaps-ring", "slots.removed-ring")
def dies_of_a_ring_outside_of_memory() -> None:
    right = Queue.part

    def part(queue: Queue, user: int, length: int, alignment: int) -> int:
        if not any(region.user <= user < region.user + region.size for region in queue.memory.regions):
            crash()
        return right(queue, user, length, alignment)

    override(Queue, part=part)


@fault("address.desc-over-the-end", "address.avail-over-the-end", "address.used-over-the-end")
def looks_only_where_a_ring_begins() -> None:
    right = Queue.part
    override(Queue, part=lambda queue, user, length, alignment: right(queue, user, 1, alignment))
    for name in ("descriptor_at", "avail_head", "put_used"):
        override(Fields, **{name: _crashing(getattr(Fields, name))})


def _crashing(step: Any) -> Any:
    """What is outside of memory is taken for inside."""

    def done(*arguments: Any) -> Any:
        try:
            return step(*arguments)
        except (Bad, LookupError):
            crash()

    return done


@fault("address.misaligned")
def dies_of_odd_addresses() -> None:
    _places(lib.VU_E_ALIGN)


@fault("address.overlapping")
def dies_of_parts_on_each_other() -> None:
    right = Queue.place

    def place(queue: Queue) -> None:
        right(queue)
        if queue.ring.desc == queue.ring.avail:
            crash()

    override(Queue, place=place)
