"""Pairs, stops, calls, the dirty log and missing pages of a network interface."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

from tests.conformance.broken.registry import F, net_fault
from tests.conformance.broken.ring_states import changing
from tests.conformance.plain import Interface, Loop, Queue, override
from tests.conformance.plain.net import Frame
from tests.conformance.plain.queue import Chain
from vhostuser.connection import Connection
from vhostuser.devices.ends import NetFeature
from vhostuser.devices.net import Net
from vhostuser.memory import GuestMemory, Region
from vhostuser.postcopy import Postcopy
from vhostuser.protocol.state import State

# ---- pairs


def _forwards(change: Any) -> None:
    """Which pair gets a frame, from the device, the pair in which it was sent, and the frame; None: nobody."""
    right = Interface.forward

    def forward(device: Interface, pair: int, frame: Frame) -> None:
        to = change(device, pair, frame)
        if to is not None:
            right(device, to, frame)

    override(Interface, forward=forward)


@net_fault("net.pairs.each", "net.pairs.together", "net.pairs.stopped")
def has_one_pair_in_truth() -> None:
    _forwards(lambda device, pair, frame: 0)


@net_fault("net.pairs.one-alone", "net.pairs.disabled", "net.pairs.together")
def spreads_frames_over_pairs_that_nobody_started() -> None:
    _forwards(lambda device, pair, frame: frame.data[11] % 2 if device.has(NetFeature.MQ) else pair)


@net_fault("net.pairs.stopped", "net.stop.receive")
def stops_as_a_whole() -> None:
    stopped: set[Interface] = set()
    right = Interface.give_up

    def give_up(device: Interface, queue: Queue) -> None:
        right(device, queue)
        stopped.add(device)

    override(Interface, give_up=give_up)
    _forwards(lambda device, pair, frame: None if device in stopped else pair)


# ---- disabled


def _serves_disabled(half: int) -> None:
    right = Net.disabled_engine

    def disabled_engine(device: Net, index: int) -> Any:
        return device.engine() if index % 2 == half else right(device, index)

    Net.disabled_engine = disabled_engine  # type: ignore[method-assign]
    override(Interface)


@net_fault("net.disabled.transmit")
def sends_what_a_disabled_ring_has() -> None:
    _serves_disabled(1)


@net_fault("net.disabled.receive", "net.disabled.from-the-start")
def receives_into_a_disabled_ring() -> None:
    _serves_disabled(0)


@net_fault("net.disabled.receive-again", "net.stop.buffers-left")
def receives_until_its_ring_is_disabled() -> None:
    right = Interface.run_receive
    ran: set[tuple[Interface, int]] = set()

    def run_receive(device: Interface, queue: Queue, kick: int, stop: int) -> int:
        if (device, queue.index) in ran:
            device.wait(queue.index // 2, stop, stop, look=False)
            return 0
        ran.add((device, queue.index))
        return right(device, queue, kick, stop)

    override(Interface, run_receive=run_receive)


@net_fault("net.disabled.without-bit-30")
def waits_for_enable_without_bit_30() -> None:
    def change(state: State, code: Any, payload: Any, right: Callable[[], None]) -> None:
        if code is F.SET_FEATURES:
            state.features = payload.value
        else:
            right()

    override(Interface)
    changing(change)


# ---- stops


def _bases(half: int, off: int) -> None:
    right = Queue.base.fget  # type: ignore[attr-defined]

    def base(queue: Queue) -> int:
        told: int = right(queue)
        return (told + off) % 65536 if queue.index % 2 == half and told else told

    override(Queue, base=property(base))


@net_fault("net.stop.transmit", "net.stop.transmit-all")
def sends_the_last_frame_again_after_a_stop() -> None:
    _bases(1, -1)


@net_fault("net.stop.receive", "net.stop.buffers-left")
def tells_one_buffer_too_many() -> None:
    _bases(0, 1)


@net_fault("net.stop.silent")
def writes_after_a_stop() -> None:
    right = Interface.give_up

    def give_up(device: Interface, queue: Queue) -> None:
        chain = queue.take() if queue.waiting() else None
        if chain is not None:
            queue.next = (queue.next - 1) % 65536
            threading.Timer(0.02, chain.write, (b"late",)).start()
        right(device, queue)

    override(Interface, give_up=give_up)


@net_fault("net.reconnect.old-frames")
def keeps_frames_for_the_next_front_end() -> None:
    override(Loop, start=lambda end, features: None)


@net_fault("net.reconnect.in-traffic")
def never_sends_again_when_frames_were_left() -> None:
    left: set[Loop] = set()

    def start(end: Loop, features: int) -> None:
        if any(end.boxes):
            left.add(end)

    override(Loop, start=start)
    _forwards(lambda device, pair, frame: None if device.end in left else pair)


# ---- calls


def _receiving(queue: Queue) -> bool:
    return queue.index % 2 == 0


@net_fault("net.called.receive", "net.called.each-ring", "net.called.event-idx")
def calls_for_what_was_sent_alone() -> None:
    right = Queue.signal
    override(Queue, signal=lambda queue: None if _receiving(queue) else right(queue))


@net_fault("net.called.not-wanted")
def calls_for_frames_unasked() -> None:
    right = Queue.wants_call

    def wants_call(queue: Queue) -> bool:
        new = queue.used != queue.signalled
        return right(queue) or (new and _receiving(queue))

    override(Queue, wants_call=wants_call)


def _passed(change: Any) -> None:
    right = Queue.passed

    def passed(queue: Queue, event: int, now: int, before: int) -> bool:
        told = right(queue, event, now, before)
        return bool(change(queue, event, now, before, told)) if _receiving(queue) else told

    override(Queue, passed=passed)


@net_fault("net.called.event-idx")
def is_one_frame_late() -> None:
    right = Queue.passed
    _passed(lambda queue, event, now, before, told: right(queue, event + 1, now, before))


@net_fault("net.called.event-idx-far")
def calls_for_every_frame() -> None:
    _passed(lambda queue, event, now, before, told: True)


@net_fault("net.called.each-ring")
def calls_both_rings_of_a_pair() -> None:
    right_run, right = Interface.run, Queue.call
    others: dict[tuple[Any, int], Queue] = {}

    def run(device: Interface, queue: Any, kick: int, stop: int) -> int:
        others[queue.memory, queue.index] = queue
        return right_run(device, queue, kick, stop)

    def call(queue: Queue) -> None:
        right(queue)
        if (other := others.get((queue.memory, queue.index ^ 1))) is not None and other.call_fd >= 0:
            right(other)

    override(Interface, run=run)
    override(Queue, call=call)


# ---- the dirty log


@net_fault("net.log.receive")
def marks_the_first_page_of_a_frame() -> None:
    right = Queue.mark
    override(Queue, mark=lambda queue, guest, length: right(queue, guest, min(length, 4096)))


@net_fault("net.log.merged")
def marks_the_first_buffer_of_a_frame() -> None:
    right = Interface.mark

    def mark(device: Interface, queue: Queue, chain: Chain, length: int, number: int) -> None:
        if not number:
            right(device, queue, chain, length, number)

    override(Interface, mark=mark)


@net_fault("net.log.used")
def marks_the_used_ring_of_what_was_sent_alone() -> None:
    right = Queue.mark_used
    override(Queue, mark_used=lambda queue, guest, length: None if _receiving(queue) else right(queue, guest, length))


@net_fault("net.log.transmit")
def marks_frames_that_it_sends() -> None:
    right = Interface.finish

    def finish(device: Interface, queue: Queue, chain: Chain) -> None:
        for piece in chain.readable:
            queue.mark(*piece)
        right(device, queue, chain)

    override(Interface, finish=finish)


@net_fault("net.log.unused")
def marks_the_whole_of_a_buffer() -> None:
    right = Interface.mark
    override(
        Interface, mark=lambda device, queue, chain, length, number: right(device, queue, chain, chain.room, number)
    )


@net_fault("net.log.before-return")
def marks_when_the_frame_has_gone() -> None:
    right = Interface.mark

    def mark(*arguments: Any) -> None:
        threading.Timer(0.01, right, arguments).start()

    override(Interface, mark=mark)


# ---- missing pages


@net_fault("net.postcopy.receive", "net.postcopy.transmit", "net.postcopy.merged")
def waits_for_no_page() -> None:
    def register(half: Postcopy, regions: list[Region]) -> None:
        for region in regions:
            region.reveal()

    override(Interface)
    Postcopy.register = register  # type: ignore[assignment,method-assign]


@net_fault("net.postcopy.other-ring")
def moves_one_frame_at_a_time() -> None:
    lock = threading.Lock()
    fill, serve = Interface.fill, Interface.serve

    def filled(device: Interface, chains: list[Chain], frame: Frame) -> list[tuple[Chain, int]]:
        with lock:
            return fill(device, chains, frame)

    def served(device: Interface, chain: Chain) -> int:
        with lock:
            return serve(device, chain)

    override(Interface, fill=filled, serve=served)


@net_fault("net.postcopy.control")
def answers_between_frames() -> None:
    moving: set[tuple[GuestMemory, int]] = set()
    fill = Interface.fill

    def filled(device: Interface, chains: list[Chain], frame: Frame) -> list[tuple[Chain, int]]:
        moving.add((chains[0].memory, chains[0].head))
        found = fill(device, chains, frame)
        moving.discard((chains[0].memory, chains[0].head))
        return found

    right = Connection._outcome

    async def outcome(connection: Connection, request: Any) -> Any:
        for _ in range(2000 * bool(moving)):
            await asyncio.sleep(0.001 * bool(moving))
        return await right(connection, request)

    override(Interface, fill=filled)
    Connection._outcome = outcome  # type: ignore[method-assign]
