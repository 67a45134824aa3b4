"""Requests in flight, as a ring marks them and takes them up again."""

from __future__ import annotations

import os
from typing import Any

from tests.conformance.broken.registry import crash, fault, handling
from tests.conformance.plain import InflightQueue, Queue, override
from tests.conformance.plain.inflight import USED_AT
from tests.conformance.plain.ring import Bad
from vhostuser._native import lib
from vhostuser.connection import Connection
from vhostuser.lifecycle import Lifecycle
from vhostuser.protocol import FrontendRequest, RequestRefused
from vhostuser.ring import Ring
from vhostuser.virtqueue import InflightRegion

# ---- while it runs


@fault("inflight.kept-under-load", "inflight.kept")
def leaves_marks_behind() -> None:
    right = InflightQueue.finish
    override(InflightQueue, finish=lambda own, head: None if own.counter else right(own, head))


@fault("inflight.kept", "inflight.wrap")
def tells_no_used_index() -> None:
    override(InflightQueue, seal=lambda own, used: None)


# ---- after a crash


@fault("inflight.out-of-order")
def forgets_what_was_in_flight() -> None:
    right = InflightQueue.recover

    def recover(own: InflightQueue, used: int) -> list[int]:
        right(own, used)
        return []

    override(InflightQueue, recover=recover)


@fault("inflight.resubmitted", "inflight.resubmitted-and-on")
def goes_on_from_the_base_after_those_in_flight() -> None:
    right = Queue.start

    def start(queue: Queue) -> None:
        right(queue)
        queue.next = queue.setup.base

    override(Queue, start=start)


@fault("inflight.order")
def does_again_in_the_order_of_the_table() -> None:
    right = InflightQueue.taken
    override(InflightQueue, taken=lambda own: sorted(right(own)))


@fault("inflight.returned", "inflight.wrap")
def does_again_what_it_returned_last() -> None:
    override(InflightQueue, finish_batch=lambda own, given_back: None)


@fault("inflight.wrap")
def compares_indexes_without_wrapping() -> None:
    right = InflightQueue.finish_batch

    def finish(own: InflightQueue, given_back: int) -> None:
        if own.load(USED_AT, 2) + given_back > 65535:
            raise Bad(lib.VU_E_INFLIGHT)
        right(own, given_back)

    override(InflightQueue, finish_batch=finish)


@fault("inflight.fresh-buffer-old-ring", "inflight.reboot")
def wants_the_used_index_that_it_left() -> None:
    right = InflightQueue.recover

    def recover(own: InflightQueue, used: int) -> list[int]:
        if not own.taken() and own.load(USED_AT, 2) != used:
            raise Bad(lib.VU_E_INFLIGHT)
        return right(own, used)

    override(InflightQueue, recover=recover)


@fault("inflight.killed")
def takes_only_a_buffer_that_it_has_made() -> None:
    made: list[int] = []
    create = InflightRegion.create

    def created(queues: int, size: int, **more: bool) -> tuple[int, int]:
        fd, length = create(queues, size, **more)
        made.append(os.fstat(fd).st_ino)
        return fd, length

    async def change(connection: Connection, request: Any, right: Any) -> Any:
        if os.fstat(request.fds[0]).st_ino not in made:
            raise RequestRefused("this is somebody else's")
        return await right(connection, request)

    InflightRegion.create = staticmethod(created)  # type: ignore[method-assign]
    handling(FrontendRequest.SET_INFLIGHT_FD, change)


# ---- buffers that do not fit


@fault("inflight.nonsense")
def dies_of_nonsense_in_the_buffer() -> None:
    right = InflightQueue.recover

    def recover(own: InflightQueue, used: int) -> list[int]:
        try:
            return right(own, used)
        except Bad:
            crash()
            raise

    override(InflightQueue, recover=recover)


@fault("inflight.other-size")
def dies_of_a_buffer_for_a_smaller_ring() -> None:
    right = Lifecycle._inflight_of
    sizes: dict[Lifecycle, int] = {}

    async def given(connection: Connection, request: Any, handle: Any) -> Any:
        sizes[connection._life] = request.payload.queue_size
        return await handle(connection, request)

    def chosen(life: Lifecycle, ring: Ring) -> InflightRegion | None:
        if ring.size > sizes.get(life, ring.size):
            crash()
        return right(life, ring)

    handling(FrontendRequest.SET_INFLIGHT_FD, given)
    Lifecycle._inflight_of = chosen  # type: ignore[method-assign]
