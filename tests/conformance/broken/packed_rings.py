"""Places, wrap counters, ids and event suppression of packed rings.

What belongs here: faults that split rings cannot have. What does not: those of a step that both formats take (the other
modules), which have the twins of their cases found too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from tests.conformance.broken.registry import crash, fault, handling
from tests.conformance.plain import Queue, override
from tests.conformance.plain.packed import AVAIL, DISABLE, USED, PackedRing
from tests.conformance.plain.queue import Chain
from tests.conformance.plain.ring import NEXT, WRITE, Bad, Descriptor, Part, Store
from vhostuser._native import lib
from vhostuser.connection import Connection
from vhostuser.memory import GuestMemory
from vhostuser.protocol import FrontendRequest, Reply, VirtioFeature, VringState

F = FrontendRequest
PLACES = 0x7FFF_7FFF
"""The bits of a base that are no wrap counters."""


def _packed(queue: Queue) -> bool:
    return isinstance(queue.ring, PackedRing)


# ---- sizes and rounds


@fault("packed.size-5", "packed.size-100", "packed.wrap")
def wants_sizes_that_are_powers_of_two() -> None:
    right = PackedRing.parts

    def parts(size: int) -> tuple[Part, Part, Part]:
        if size & (size - 1):
            raise Bad(lib.VU_E_SIZE)
        return right(size)

    override(PackedRing, parts=staticmethod(parts))


@fault("packed.wrap", "packed.size-5", "packed.size-4")
def wrap_counter_turns_only_between_chains() -> None:
    """Of small rings, for not everything is to fail."""
    right = Queue.after

    def after(queue: Queue, position: int, places: int = 1) -> int:
        size, behind = queue.ring.size, right(queue, position, places)
        turned = position // size != behind // size and behind % size
        return (behind + size) % queue.ring.modulus if _packed(queue) and size < 8 and turned else behind

    override(Queue, after=after)


@fault("packed.size-1")
def wants_a_place_free() -> None:
    right = PackedRing.ahead
    override(PackedRing, ahead=lambda ring, taken, used: min(right(ring, taken, used), ring.size - 1))


# ---- where it begins


def _given(change: Callable[[int], int]) -> None:
    """What becomes of the first base that a packed ring is given."""
    given: set[tuple[Connection, int]] = set()

    async def begin(connection: Connection, request: Any, right: Any) -> None:
        await right(connection, request)
        ring = connection.rings[request.payload.index]
        if connection._packed and (connection, ring.index) not in given:
            ring.base = change(ring.base)
        given.add((connection, ring.index))

    handling(F.SET_VRING_BASE, begin)


@fault("packed.base-place", "packed.base-wrap")
def begins_with_the_first_place() -> None:
    _given(lambda base: base & ~PLACES)


@fault("packed.base-wrap")
def begins_with_a_wrap_counter_of_1() -> None:
    _given(lambda base: base | 0x8000_8000)


@fault("packed.base-half", "packed.base.count", "packed.base.given", "packed.base.twice")
def tells_half_of_a_base() -> None:
    async def change(connection: Connection, request: Any, right: Any) -> Any:
        answer = (await right(connection, request)).payload
        return Reply(VringState(answer.index, answer.num & 0xFFFF))

    handling(F.GET_VRING_BASE, change)


@fault("packed.reset")
def remembers_wrap_counters() -> None:
    remembered: dict[tuple[GuestMemory, int], int] = {}
    start, close = Queue.start, Queue.close

    def started(queue: Queue) -> None:
        start(queue)
        if _packed(queue) and not queue.next and remembered.get((queue.memory, queue.index), 0) >= queue.ring.size:
            queue.next = queue.used = queue.signalled = queue.ring.size

    def closed(queue: Queue) -> None:
        if queue.started:
            remembered[queue.memory, queue.index] = queue.next
        close(queue)

    override(Queue, start=started, close=closed)


# ---- what is available


@fault("packed.first-last")
def looks_at_the_second_descriptor() -> None:
    right = PackedRing.ahead

    def ahead(ring: PackedRing, taken: int, used: int) -> int:
        return right(ring, taken, used) or int(taken == used and ring.is_available(taken + 1))

    override(PackedRing, ahead=ahead)


def _available(judge: Callable[[PackedRing, int, int], bool]) -> None:
    """Takes a descriptor for available by its position and its flags."""
    override(
        PackedRing,
        is_available=lambda ring, position: judge(ring, position, ring.descriptor(position).flags),
    )


@fault("packed.flags-equal")
def looks_at_avail_alone() -> None:
    _available(lambda ring, position, flags: bool(flags & AVAIL) == ring.wrap(position))


@fault("packed.other-round")
def looks_whether_the_flags_differ() -> None:
    _available(lambda ring, position, flags: flags & (AVAIL | USED) in (AVAIL, USED))


# ---- what is returned


@fault("packed.id")
def takes_a_buffer_id_for_an_index() -> None:
    right = PackedRing.name

    def name(ring: PackedRing, head: int) -> tuple[int, int]:
        identity, places = right(ring, head)
        if identity >= ring.size:
            raise Bad(lib.VU_E_HEAD)
        return identity, places

    override(PackedRing, name=name)


@fault("packed.id-of-last")
def returns_the_id_of_the_first_descriptor() -> None:
    right = PackedRing.name

    def name(ring: PackedRing, head: int) -> tuple[int, int]:
        return ring.descriptor(head).after, right(ring, head)[1]

    override(PackedRing, name=name)


@fault("packed.written", "packed.used-length")
def says_nowhere_that_it_has_written() -> None:
    right = PackedRing.used_flags
    override(PackedRing, used_flags=lambda ring, position, length: right(ring, position, length) & ~WRITE)


@fault("packed.skipped")
def returns_a_chain_behind_the_first_descriptor_of_the_one_before() -> None:
    """If more have been offered together."""
    right = Queue.give_back

    def give_back(queue: Queue, chain: Chain, length: int) -> None:
        if _packed(queue) and not queue.returned and queue.waiting():
            chain.places = 1
        right(queue, chain, length)

    override(Queue, give_back=give_back)


# ---- indirect tables


@fault("packed.table-next", "packed.indirect", "packed.both")
def follows_tables_as_long_as_they_say_next() -> None:
    right = PackedRing.linked

    def linked(ring: PackedRing, table: int, count: int, index: int) -> Iterator[Descriptor]:
        for number, descriptor in enumerate(right(ring, table, count, index)):
            yield descriptor
            if table != ring.desc and not ring.descriptor_at(table, number).flags & NEXT:
                return

    override(PackedRing, linked=linked)


# ---- notifications


def _passes(judge: Callable[[Queue, int, int, int], bool]) -> None:
    right = Queue.passed

    def passed(queue: Queue, event: int, now: int, before: int) -> bool:
        return judge(queue, event, now, before) if _packed(queue) else right(queue, event, now, before)

    override(Queue, passed=passed)


@fault("packed.event-round")
def compares_places_without_wrap_counters() -> None:
    _passes(lambda queue, event, now, before: (now - event - 1) % queue.ring.size < (now - before) % queue.ring.size)


@fault("packed.event-behind")
def calls_only_where_a_chain_begins() -> None:
    _passes(lambda queue, event, now, before: event == before)


@fault("packed.event-enable")
def always_looks_for_a_place() -> None:
    override(PackedRing, looks_at_event=lambda ring: True)


@fault("packed.event-disable")
def calls_unless_a_place_is_asked_for() -> None:
    right = Queue.wants_call

    def wants_call(queue: Queue) -> bool:
        event_idx = _packed(queue) and queue.has(VirtioFeature.RING_EVENT_IDX)
        return right(queue) or (event_idx and not queue.ring.looks_at_event())

    override(Queue, wants_call=wants_call)


@fault("packed.kick-wanted")
def never_asks_for_kicks() -> None:
    right = PackedRing.asking

    def asking(ring: PackedRing, taken: int, *, event_idx: bool) -> list[Store]:
        return right(ring, taken, event_idx=event_idx) if event_idx else [(ring.used + 2, DISABLE)]

    override(PackedRing, asking=asking)


# ---- what no driver does


@fault("packed.overfull")
def dies_of_a_ring_that_is_full() -> None:
    """One of four places, which nobody fills by chains of three."""
    right = PackedRing.ahead

    def ahead(ring: PackedRing, taken: int, used: int) -> int:
        found = right(ring, taken, used)
        if found == ring.size == 4:
            crash()
        return found

    override(PackedRing, ahead=ahead)
