"""Kicks, calls and errors as messages."""

from __future__ import annotations

import asyncio
import os
from typing import Any

from tests.conformance.broken.registry import F, fault, handling
from vhostuser.connection import Connection
from vhostuser.protocol import BackendRequest, VringState, encode
from vhostuser.ring import Ring
from vhostuser.ring_messages import RingMessages


@fault("inband.kick", "inband.kicks", "inband.stop-and-kick")
def acknowledges_kicks_and_does_nothing() -> None:
    async def change(connection: Connection, request: Any, right: Any) -> None:
        return None

    handling(F.VRING_KICK, change)


@fault("inband.kicks")
def sees_the_first_kick() -> None:
    right = Ring.kick_in_band
    Ring.kick_in_band = lambda ring, kicked: right(ring, kicked) if ring.kick is None else None  # type: ignore[method-assign]


@fault("inband.stop-and-kick")
def is_kicked_in_band_until_it_is_stopped() -> None:
    right, drop = Ring.kick_in_band, Ring.drop_kick
    stopped: set[Ring] = set()

    def drop_kick(ring: Ring) -> None:
        if ring.kick is not None:
            stopped.add(ring)
        drop(ring)

    Ring.drop_kick = drop_kick  # type: ignore[method-assign]
    Ring.kick_in_band = lambda ring, kicked: None if ring in stopped else right(ring, kicked)  # type: ignore[method-assign]


@fault("inband.call", "inband.call-asks")
def sends_no_calls() -> None:
    RingMessages.call = lambda messages, index: None  # type: ignore[method-assign]


@fault("inband.call-asks")
def does_not_wait_to_be_heard() -> None:
    def call(messages: RingMessages, index: int) -> None:
        messages._announcements.tell(BackendRequest.VRING_CALL, VringState(index))

    RingMessages.call = call  # type: ignore[method-assign]


@fault("inband.call-descriptor", "inband.call-polled")
def calls_in_band_whatever_it_was_given() -> None:
    Ring._where = property(lambda ring: ring._in_band)  # type: ignore[assignment,method-assign]


@fault("inband.call-polled")
def takes_no_descriptor_for_a_wish_to_be_called() -> None:
    right = Ring.set_call

    def set_call(ring: Ring, fd: int | None) -> None:
        right(ring, fd)
        if fd is None:
            ring._calls = None

    Ring.set_call = set_call  # type: ignore[method-assign]


@fault("inband.unread")
def waits_for_its_call_to_be_heard() -> None:
    async def change(connection: Connection, request: Any, right: Any) -> None:
        await right(connection, request)
        for _ in range(10_000):
            await asyncio.sleep(0.01)
            if not connection._ring_messages._out:
                return

    handling(F.VRING_KICK, change)


@fault("inband.suspended")
def calls_once_more_when_it_has_stopped() -> None:
    right = RingMessages.send_due

    def send_due(messages: RingMessages) -> None:
        channel = messages._announcements.channel
        if channel is not None and messages._announcements._session.suspended:
            os.write(channel._channel._sock.fileno(), encode(BackendRequest.VRING_CALL, 1, VringState(0)))
        right(messages)

    RingMessages.send_due = send_due  # type: ignore[method-assign]


@fault("inband.err")
def keeps_broken_rings_to_itself() -> None:
    RingMessages.broke = lambda messages, ring: None  # type: ignore[method-assign]


@fault("inband.err-descriptor")
def says_it_twice() -> None:
    right = Ring.signal_err

    def signal_err(ring: Ring) -> bool:
        right(ring)
        return False

    Ring.signal_err = signal_err  # type: ignore[method-assign]
