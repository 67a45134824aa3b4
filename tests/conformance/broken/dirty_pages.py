"""Which pages are marked in the dirty log."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from tests.conformance.broken.registry import answering, crash, fault
from tests.conformance.plain import Queue, override
from tests.conformance.plain.queue import Chain
from vhostuser.memory import DirtyLog, MemoryLost
from vhostuser.protocol import BackendSession, FrontendRequest, Outgoing
from vhostuser.ring import Ring
from vhostuser.virtqueue import RingSetup

F = FrontendRequest


def _marks_used(change: Callable[[RingSetup], RingSetup]) -> None:
    right = Ring.setup
    Ring.setup = lambda ring, features: change(right(ring, features))  # type: ignore[method-assign]


@fault("log.used", "log.used-elsewhere")
def never_marks_the_used_ring() -> None:
    _marks_used(lambda setup: replace(setup, log_used=False))


@fault("log.used-elsewhere")
def marks_the_used_ring_where_it_is() -> None:
    _marks_used(lambda setup: replace(setup, log=0))


@fault("log.offset")
def logs_from_the_beginning() -> None:
    right = DirtyLog.map.__func__  # type: ignore[attr-defined]

    def mapped(kind: type[DirtyLog], fd: int, size: int, offset: int = 0) -> Any:
        return right(kind, fd, size, 0)

    DirtyLog.map = classmethod(mapped)  # type: ignore[assignment,method-assign]


# ---- data


@fault("log.data", "log.again", "log.before-return")
def marks_the_first_page_of_a_buffer() -> None:
    right = Queue.mark
    override(Queue, mark=lambda queue, guest, length: right(queue, guest, 1))


@fault("log.status")
def marks_no_status() -> None:
    right = Queue.mark_data
    override(Queue, mark_data=lambda queue, chain, length: right(queue, chain, min(length, chain.room - 1)))


@fault("log.written-only")
def marks_what_it_reads() -> None:
    right = Queue.mark_data

    def mark(queue: Queue, chain: Chain, length: int) -> None:
        right(queue, chain, length)
        for piece in chain.readable:
            queue.mark(*piece)

    override(Queue, mark_data=mark)


@fault("log.nothing-else")
def marks_a_page_more() -> None:
    right = Queue.mark_data

    def mark(queue: Queue, chain: Chain, length: int) -> None:
        right(queue, chain, length)
        guest, run = chain.writable[0]
        queue.mark(guest + run, 1)

    override(Queue, mark_data=mark)


@fault("log.used-unasked")
def marks_the_used_ring_unasked() -> None:
    override(Queue, mark_used=lambda queue, guest, length: queue.mark(guest, length))


# ---- when


@fault("log.again")
def logs_once() -> None:
    right = Queue.place
    logged: list[bool] = []

    def place(queue: Queue) -> None:
        right(queue)
        if logged[-2:] == [True, False]:
            queue.log = None
        elif logged[-1:] != [queue.log is not None]:
            logged.append(queue.log is not None)

    override(Queue, place=place)


@fault("log.before-return", "log.data")
def marks_after_it_has_returned() -> None:
    right = Queue.give_back

    def give_back(queue: Queue, chain: Chain, length: int) -> None:
        log, queue.log = queue.log, None
        right(queue, chain, length)
        if log is not None:
            time.sleep(0.05)
        queue.log = log
        queue.mark_data(chain, length)

    override(Queue, give_back=give_back)


@fault("log.after-stop")
def marks_with_the_next_message() -> None:
    logs: list[DirtyLog] = []
    right = Queue.close

    def close(queue: Queue) -> None:
        if queue.log is not None:
            logs.append(queue.log)
        right(queue)

    def change(_: BackendSession, request: Any, answer: Outgoing | None) -> Outgoing | None:
        if request.code is F.GET_FEATURES:
            while logs:
                logs.pop().mark(0, 1)
        return answer

    override(Queue, close=close)
    answering(change)


# ---- logs that do not fit


def _dies(of: type[Exception]) -> None:
    right = Queue.mark

    def mark(queue: Queue, guest: int, length: int) -> None:
        try:
            right(queue, guest, length)
        except of:
            crash()

    override(Queue, mark=mark)


@fault("log.too-small")
def dies_of_a_log_that_is_too_small() -> None:
    _dies(LookupError)


@fault("log.shrinks")
def dies_of_a_log_that_shrinks() -> None:
    _dies(MemoryLost)
