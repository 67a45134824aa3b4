"""What a killed back-end leaves in the buffer of requests in flight, and what a stop leaves there, taken up wrongly.

What belongs here: faults that rings of both formats can have, and of packed rings' buffers. What does not: those of
split rings alone (``in_flight``), messages (``inflight``).
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import replace
from threading import Timer
from typing import Any

from tests.conformance.broken.registry import crash, fault, handling, number
from tests.conformance.plain import Disk, InflightQueue, Queue, install, override
from tests.conformance.plain.inflight import LAST_AT
from tests.conformance.plain.inflight_packed import PackedInflightQueue
from tests.conformance.plain.packed import PackedRing
from tests.conformance.plain.ring import Bad
from vhostuser.connection import Connection
from vhostuser.protocol import (
    FRONTEND,
    FrontendRequest,
    ProtocolFeature,
    QueueRegionPacked,
    QueueRegionSplit,
    Reply,
    RequestRefused,
    VirtioFeature,
    VringState,
)

F, P = FrontendRequest, ProtocolFeature
Region = Any
SIZE = 64


def _finds(change: Callable[[Region], Region]) -> None:
    """Has the buffer of the first ring changed when it is set."""

    async def change_it(connection: Connection, request: Any, right: Any) -> Any:
        given, (fd, *_) = request.payload, request.fds
        packed = connection._session.has(VirtioFeature.RING_PACKED)
        kind: Any = QueueRegionPacked if packed else QueueRegionSplit
        part = os.pread(fd, given.mmap_size // given.num_queues, given.mmap_offset)
        os.pwrite(fd, change(kind.parse(part)).pack(), given.mmap_offset)
        return await right(connection, request)

    handling(F.SET_INFLIGHT_FD, change_it)


# ---- while it runs


@fault("inflight.right", "inflight.right-again")
def writes_features_into_the_buffer() -> None:
    for kind in (InflightQueue, PackedInflightQueue):
        _seals(kind, kind.seal)


def _seals(kind: type[InflightQueue], right: Callable[[Any, int], None]) -> None:
    def seal(own: Any, used: int) -> None:
        right(own, used)
        own.store(0, 8, 1)

    override(kind, seal=seal)


@fault("inflight.set-again")
def keeps_the_first_buffer() -> None:
    async def change(connection: Connection, request: Any, right: Any) -> Any:
        return await right(connection, request) if connection._life.inflight is None else None

    handling(F.SET_INFLIGHT_FD, change)


@fault("inflight.get-keeps")
def forgets_its_buffer_when_another_is_made() -> None:
    async def change(connection: Connection, request: Any, right: Any) -> Any:
        async with connection._life.halted():
            connection._life.inflight = None
        return await right(connection, request)

    handling(F.GET_INFLIGHT_FD, change)


# ---- after a crash


@fault("inflight.many-in-order")
def does_again_what_was_taken_last_first() -> None:
    _finds(
        lambda region: replace(
            region, states=tuple(state._replace(counter=SIZE - state.counter & 0xFF) for state in region.states)
        )
    )


@fault("inflight.batch", packed=False)
def knows_batches_of_one() -> None:
    """As libvhost-user and DPDK do."""
    right = InflightQueue.finish_batch
    override(InflightQueue, finish_batch=lambda own, given_back: right(own, min(given_back, 1)))


@fault("inflight.batch-half-cleared", packed=False)
def unmarks_what_is_marked() -> None:
    """As many of those as were given back."""

    def finish(own: InflightQueue, given_back: int) -> None:
        for head in own.taken()[:given_back]:
            own.finish(head)

    override(InflightQueue, finish_batch=finish)


@fault("inflight.batch-linked", packed=False)
def takes_what_was_linked_for_given_back() -> None:
    right = InflightQueue.resume

    def resume(own: InflightQueue, queue: Queue) -> None:
        right(own, queue)
        last = own.load(LAST_AT, 2)
        queue.again = [head for head in queue.again if head != last]

    override(InflightQueue, resume=resume)


@fault("packed.inflight.batch", "packed.inflight.batch-half-cleared")
def does_again_every_packed_chain_that_is_marked() -> None:
    override(PackedInflightQueue, in_flight=lambda own, region, flags: region.heads)


@fault("packed.inflight.batch-linked")
def takes_what_was_linked_for_shown() -> None:
    QueueRegionPacked.seen = lambda own, flags: True  # type: ignore[method-assign]
    install()


@fault("packed.inflight.right-again")
def names_chains_of_before_for_ever() -> None:
    right = PackedInflightQueue.chain_again

    def again(own: PackedInflightQueue, queue: Any, entry: int) -> Any:
        chain = right(own, queue, entry)
        own.entries[chain.head] = (entry + 1) % own.size
        return chain

    override(PackedInflightQueue, chain_again=again)


@fault("inflight.fresh-with-marks")
def follows_a_buffer_that_nobody_has_used() -> None:
    _finds(
        lambda region: (
            replace(region, version=1, desc_num=SIZE) if any(state.inflight for state in region.states) else region
        )
    )


@fault("inflight.idle-of-another-size")
def wants_the_size_of_before() -> None:
    def change(region: Region) -> Region:
        if region.version and region.desc_num != SIZE:
            raise RequestRefused("another size of ring")
        return region

    _finds(change)


@fault("inflight.later-version")
def dies_of_a_later_version() -> None:
    def change(region: Region) -> Region:
        if region.version > 1:
            crash()
        return region

    _finds(change)


@fault("inflight.circle", "inflight.outside", "inflight.index-far-off", "inflight.nonsense", packed=False)
def dies_of_lists_that_do_not_fit() -> None:
    right = InflightQueue.finish_batch

    def finish(own: InflightQueue, given_back: int) -> None:
        try:
            right(own, given_back)
        except Bad:
            crash()
            raise

    override(InflightQueue, finish_batch=finish)


@fault("packed.inflight.circle", "packed.inflight.outside", "packed.inflight.index-far-off")
def dies_of_packed_lists_that_do_not_fit() -> None:
    right = PackedInflightQueue.judge

    def judge(own: PackedInflightQueue, ring: PackedRing, region: QueueRegionPacked) -> tuple[int, ...]:
        try:
            return right(own, ring, region)
        except Bad:
            crash()
            raise

    override(PackedInflightQueue, judge=judge)


# ---- what a stop leaves


def _leaves(connection: Connection) -> bool:
    return connection._session.has(P.GET_VRING_BASE_INFLIGHT)


@fault("left.named", "left.untracked")
def counts_one_more_as_taken() -> None:
    _counts_one_more()


@fault("left.once", packed=False)
def counts_one_more_of_a_split_ring() -> None:
    _counts_one_more()


def _counts_one_more() -> None:
    async def change(connection: Connection, request: Any, right: Any) -> Any:
        reply = await right(connection, request)
        state = reply.payload
        return Reply(VringState(state.index, state.num + 1)) if _leaves(connection) else reply

    handling(F.GET_VRING_BASE, change)


def _at_the_end(of_one: Callable[[Queue, Any], None]) -> None:
    """Serves slowly, and when a ring has stopped so that requests may be left, does this with the next one."""
    serve, close, asked = Disk.serve, Queue.close, list[bool]()

    def slowly(disk: Disk, chain: Any) -> int:
        time.sleep(0.004)
        return serve(disk, chain)

    def closed(queue: Queue) -> None:
        if asked and (chain := queue.take()) is not None:
            of_one(queue, chain)
        else:
            close(queue)

    async def change(connection: Connection, request: Any, right: Any) -> Any:
        asked.extend([True] * _leaves(connection))
        return await right(connection, request)

    override(Disk, serve=slowly)
    override(Queue, close=closed)
    handling(F.GET_VRING_BASE, change)


@fault("left.quiet")
def gives_back_later_what_was_under_way() -> None:
    def later(queue: Queue, chain: Any) -> None:
        timer = Timer(0.01, queue.give_back, (chain, 1))
        timer.daemon = True
        timer.start()

    _at_the_end(later)


@fault("packed.left.once")
def takes_what_it_leaves_for_given_back() -> None:
    def forget(queue: Queue, chain: Any) -> None:
        own = queue.inflight
        assert own is not None
        own.link(chain.head)
        own.move(queue.ring, queue.after(queue.used, chain.places))
        own.finish(chain.head)
        own.seal(queue.used)

    _at_the_end(forget)


@fault("left.offered")
def offers_to_leave_requests_without_a_buffer() -> None:
    number(F.GET_PROTOCOL_FEATURES, lambda _, value: value & ~P.INFLIGHT_SHMFD.mask)


@fault("left.alone")
def takes_the_one_without_the_other() -> None:
    row = FRONTEND[F.SET_PROTOCOL_FEATURES]
    rules = tuple(rule for rule in row.rules if rule.__name__ != "left_in_flight_is_tracked")
    FRONTEND[F.SET_PROTOCOL_FEATURES] = replace(row, rules=rules)  # type: ignore[index]
