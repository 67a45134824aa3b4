"""Kicks and calls, and where a ring leaves off."""

from __future__ import annotations

import os
import select
import time
from collections import Counter
from typing import Any

from tests.conformance.broken.registry import answering, crash, fault, handling
from tests.conformance.plain import Disk, Queue, override
from tests.conformance.plain.queue import Chain
from vhostuser import ring as rings
from vhostuser.connection import Connection
from vhostuser.lifecycle import Lifecycle
from vhostuser.protocol import BackendSession, FrontendRequest, Outgoing, Reply, VirtioFeature, VringState
from vhostuser.ring import Ring

F = FrontendRequest

# ---- kicks


@fault("kick.before-enable", "ring.state.kick-then-enable")
def loses_early_kicks() -> None:
    right = Lifecycle.kicked

    def kicked(life: Lifecycle, ring: Ring) -> None:
        if life._session.rings[ring.index].enabled:
            right(life, ring)

    Lifecycle.kicked = kicked  # type: ignore[method-assign]


@fault("kick.before-message")
def takes_what_a_new_kick_descriptor_says() -> None:
    right = Ring.set_kick

    def set_kick(ring: Ring, fd: int | None, kicked: Any) -> None:
        if fd is not None and select.select([fd], [], [], 0)[0]:
            os.eventfd_read(fd)
        right(ring, fd, kicked)

    Ring.set_kick = set_kick  # type: ignore[method-assign]


@fault("kick.without-request", "ring.state.started-enabled", "ring.state.twice-kicked", "ring.state.twice-enabled")
def ends_after_a_kick_for_nothing() -> None:
    right = Disk.rest

    def rest(disk: Disk, queue: Queue, kick: int, stop: int) -> int:
        if queue.base == queue.setup.base and disk.stopped(kick):
            select.select([stop], [], [])
        return right(disk, queue, kick, stop)

    override(Disk, rest=rest)


@fault("kick.counter")
def takes_a_large_counter_for_an_error() -> None:
    right = Disk.rest

    def rest(disk: Disk, queue: Queue, kick: int, stop: int) -> int:
        select.select([kick, stop], [], [])
        if disk.stopped(kick):
            count = os.eventfd_read(kick)
            if count >= 1 << 32:
                raise queue.broken_by(-1)
            return kick
        return right(disk, queue, kick, stop)

    override(Disk, rest=rest)


@fault("kick.blocking")
def reads_kicks_until_there_are_none() -> None:
    right = Disk.rest

    def rest(disk: Disk, queue: Queue, kick: int, stop: int) -> int:
        kick = right(disk, queue, kick, stop)
        try:
            while not disk.stopped(stop):
                os.read(kick, 8)
        except BlockingIOError:
            pass
        return kick

    override(Disk, rest=rest)


@fault("kick.each")
def does_not_look_again_before_it_sleeps() -> None:
    """Made to matter once in 256 requests: what is offered between its last look and its sleep is not seen."""
    arm, rest = Queue.arm, Disk.rest

    def armed(queue: Queue) -> bool:
        return False if queue.returned % 256 == 255 else arm(queue)

    def rested(disk: Disk, queue: Queue, kick: int, stop: int) -> int:
        if queue.returned % 256 == 255:
            select.select([kick, stop], [], [])
            if not disk.stopped(stop):
                os.eventfd_read(kick)
        return rest(disk, queue, kick, stop)

    override(Queue, arm=armed)
    override(Disk, rest=rested)


@fault("kick.replaced")
def keeps_the_first_kick() -> None:
    async def change(connection: Connection, request: Any, right: Any) -> Any:
        if not connection.rings[request.payload.index].running:
            await right(connection, request)

    handling(F.SET_VRING_KICK, change)


@fault("kick.replaced-leak")
def keeps_calls_that_were_replaced_open() -> None:
    def replace(number: int, fd: int) -> int:
        if number >= 0:
            os.dup2(fd, number, inheritable=False)
            return number
        return fd

    rings._replace = replace


@fault("kick.polled")
def polls_no_ring() -> None:
    right = Disk.rest

    def rest(disk: Disk, queue: Queue, kick: int, stop: int) -> int:
        if kick < 0:
            select.select([stop], [], [])
        return right(disk, queue, kick, stop)

    override(Disk, rest=rest)


@fault("kick.no-spin")
def spins_where_nobody_kicks_any_more() -> None:
    right = Disk.rest

    def rest(disk: Disk, queue: Queue, kick: int, stop: int) -> int:
        left = right(disk, queue, kick, stop)
        return left if left >= 0 else kick

    override(Disk, rest=rest)


@fault("kick.polled-index", "kick.polled")
def takes_bit_8_for_a_part_of_the_index() -> None:
    async def change(connection: Connection, request: Any, right: Any) -> Any:
        if not request.payload.has_fd:
            crash()
        return await right(connection, request)

    handling(F.SET_VRING_KICK, change)


# ---- calls


@fault("call.called", "call.every-time", "call.replaced", "split.event-idx-called", "split.event-idx-stress")
def never_calls() -> None:
    override(Queue, call=lambda queue: None)


@fault("call.every-time", "split.event-idx-called")
def calls_once() -> None:
    right = Queue.call

    def call(queue: Queue) -> None:
        if queue.returned < 3:
            right(queue)

    override(Queue, call=call)


@fault("call.not-wanted")
def calls_against_the_flag() -> None:
    right = Queue.wants_call
    override(Queue, wants_call=lambda queue: right(queue) or not queue.has(VirtioFeature.RING_EVENT_IDX))


@fault("call.on-empty", "call.on-empty-event-idx")
def does_not_say_that_it_has_run_empty() -> None:
    override(Queue, runs_empty=lambda queue: False)


@fault("call.on-empty-event-idx")
def heeds_the_event_index_alone() -> None:
    right = Queue.runs_empty
    override(Queue, runs_empty=lambda queue: not queue.has(VirtioFeature.RING_EVENT_IDX) and right(queue))


@fault("split.event-idx-far")
def calls_for_each_request() -> None:
    override(Queue, passed=lambda queue, event, now, before: True)


@fault("call.replaced", "call.none")
def keeps_the_first_call() -> None:
    async def change(connection: Connection, request: Any, right: Any) -> Any:
        if not connection.rings[request.payload.index].running:
            await right(connection, request)

    handling(F.SET_VRING_CALL, change)


@fault("call.full")
def takes_a_full_call_for_an_error() -> None:
    override(Queue, call=lambda queue: os.eventfd_write(queue.call_fd, 1))


@fault("call.at-start")
def calls_for_nothing_but_requests() -> None:
    Ring.call = lambda ring: None  # type: ignore[method-assign]


# ---- bases


@fault("base.given")
def base_of_nothing_is_0() -> None:
    async def change(connection: Connection, request: Any, right: Any) -> Any:
        ring = connection.rings[request.payload.index]
        return await right(connection, request) if ring.running else Reply(VringState(ring.index, 0))

    handling(F.GET_VRING_BASE, change)


@fault("base.index")
def base_of_another_ring() -> None:
    def change(_: BackendSession, request: Any, answer: Outgoing | None) -> Outgoing | None:
        if answer is None or request.code is not F.GET_VRING_BASE:
            return answer
        return Outgoing(answer.data[:12] + bytes([answer.data[12] ^ 1]) + answer.data[13:])

    answering(change)


@fault("base.untouched", "base.before-negotiation")
def dies_of_an_unknown_ring() -> None:
    async def change(connection: Connection, request: Any, right: Any) -> Any:
        if not connection.rings[request.payload.index].size:
            crash()
        return await right(connection, request)

    handling(F.GET_VRING_BASE, change)


@fault("base.count", "base.goes-on", "base.twice")
def base_is_one_ahead() -> None:
    async def change(connection: Connection, request: Any, right: Any) -> Any:
        answer = (await right(connection, request)).payload
        return Reply(VringState(answer.index, answer.num + (answer.num > 0)))

    handling(F.GET_VRING_BASE, change)


@fault("base.twice")
def forgets_its_base_once_it_was_told() -> None:
    async def change(connection: Connection, request: Any, right: Any) -> Any:
        answer = await right(connection, request)
        connection.rings[request.payload.index].base = 0
        return answer

    handling(F.GET_VRING_BASE, change)


def _forgets_the_base(stops: int) -> None:
    """After so many stops of a ring it begins with its first chain, whatever it is told."""
    stopped: Counter[tuple[Connection, int]] = Counter()

    async def stop(connection: Connection, request: Any, right: Any) -> Any:
        stopped[connection, request.payload.index] += 1
        return await right(connection, request)

    async def begin(connection: Connection, request: Any, right: Any) -> None:
        await right(connection, request)
        if stopped[connection, request.payload.index] == stops:
            connection.rings[request.payload.index].base = 0

    handling(F.GET_VRING_BASE, stop)
    handling(F.SET_VRING_BASE, begin)


@fault("base.set", "base.wrap")
def begins_with_the_first_chain() -> None:
    _forgets_the_base(0)


@fault("base.goes-on")
def goes_on_three_times() -> None:
    _forgets_the_base(4)


@fault("base.not-taken-later")
def begins_again_with_what_is_newly_offered() -> None:
    right = Queue.start

    def start(queue: Queue) -> None:
        right(queue)
        if queue.setup.base in (1, 0x8003_8003):
            queue.next = queue.after(queue.next, queue.waiting())

    override(Queue, start=start)


@fault("base.drained")
def base_is_what_was_offered() -> None:
    """It is slow, so that a stop comes in the middle."""
    base, serve = Queue.base, Disk.serve

    def served(disk: Disk, chain: Chain) -> int:
        time.sleep(0.002)
        return serve(disk, chain)

    def offered(queue: Queue) -> int:
        if queue.started and queue.memory:
            return queue.ring.base(queue.after(queue.next, queue.waiting()), queue.used)
        return base.fget(queue)

    override(Disk, serve=served)
    override(Queue, base=property(offered))


@fault("base.answers-after-stop", "ring.state.stop-of-running")
def answers_nothing_while_it_is_suspended() -> None:
    suspended: set[BackendSession] = set()

    def change(session: BackendSession, request: Any, answer: Outgoing | None) -> Outgoing | None:
        if request.code is F.GET_VRING_BASE:
            suspended.add(session)
        elif request.code is F.SET_VRING_KICK:
            suspended.discard(session)
        return None if request.code is F.GET_FEATURES and session in suspended else answer

    answering(change)


@fault("base.wrap")
def counts_on_behind_65535() -> None:
    override(Queue, after=lambda queue, index, places=1: index + places)
