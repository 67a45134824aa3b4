"""The device's own state, on a disk that offers everything."""

from __future__ import annotations

import asyncio
import os
import select
import signal
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from tests.conformance.broken.everything import STATE, offer_everything
from tests.conformance.broken.registry import F, answering, crash, fault, handling
from vhostuser import transfer
from vhostuser.connection import Connection
from vhostuser.device import Device
from vhostuser.protocol import (
    FRONTEND,
    BackendSession,
    DeviceStateReply,
    DeviceStateTransfer,
    Outgoing,
    Reply,
    Request,
    RequestRefused,
    TransferDirection,
)
from vhostuser.protocol.state import State


def _moving(direction: TransferDirection, change: Callable[[Connection, Any], Any]) -> None:
    """Has transfers in this direction done in another way."""
    offer_everything()

    async def move(connection: Connection, request: Request, right: Any) -> Any:
        assert isinstance(request.payload, DeviceStateTransfer)
        changed = request.payload.direction == direction
        return await (change if changed else right)(connection, request)

    handling(F.SET_DEVICE_STATE_FD, move)


@fault("state.save", "state.load", "state.twice", "state.cut-off", "state.goes-on")
def never_ends_the_state() -> None:
    async def save(connection: Connection, request: Any) -> Reply:
        os.write(request.fds[0], STATE)
        connection.end = request.fds.take()  # type: ignore[attr-defined]
        return Reply(DeviceStateReply())

    _moving(TransferDirection.SAVE, save)


@fault("state.twice")
def saves_its_state_once() -> None:
    saved: list[Connection] = []
    offer_everything()

    async def move(connection: Connection, request: Any, right: Any) -> Any:
        if connection in saved:
            raise RequestRefused("the state is gone")
        saved.append(connection)
        return await right(connection, request)

    handling(F.SET_DEVICE_STATE_FD, move)


@fault("state.load")
def loads_no_state() -> None:
    async def load(connection: Connection, request: Any) -> Reply:
        raise RequestRefused("only ever saved")

    _moving(TransferDirection.LOAD, load)


@fault("state.reply")
def says_that_a_descriptor_comes_along() -> None:
    offer_everything()

    def change(_: BackendSession, request: Any, answer: Outgoing | None) -> Outgoing | None:
        if answer is None or request.code is not F.SET_DEVICE_STATE_FD:
            return answer
        return Outgoing(answer.data[:-8] + bytes(8))

    answering(change)


@fault("state.descriptors")
def keeps_channels_of_its_state_open() -> None:
    offer_everything()
    right = transfer._open_again

    def open_again(fd: int, mode: int) -> int:
        if mode == os.O_RDONLY:  # or nobody would see the end of what is saved
            os.dup(fd)
        return right(fd, mode)

    transfer._open_again = open_again


# ---- while it moves


def _blocking(events: int) -> Callable[[int], Any]:
    """Waits for a channel without doing anything else."""

    async def wait(fd: int) -> None:
        poll = select.poll()
        poll.register(fd, events)
        poll.poll()

    return wait


@fault("state.slow-reader")
def does_nothing_else_until_its_state_is_read() -> None:
    offer_everything()
    transfer.writable = _blocking(select.POLLOUT)  # type: ignore[attr-defined]


@fault("state.slow-writer", "state.in-pieces")
def does_nothing_else_until_the_state_is_there() -> None:
    offer_everything()
    transfer.readable = _blocking(select.POLLIN)  # type: ignore[attr-defined]


@fault("state.reader-gone")
def dies_of_sigpipe() -> None:
    offer_everything()
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)


@fault("state.left")
def dies_with_a_state_under_way() -> None:
    offer_everything()
    right = transfer.StateTransfer.end

    def end(moving: transfer.StateTransfer) -> None:
        if moving._failure is not None and not moving._failure.done():
            crash()
        right(moving)

    transfer.StateTransfer.end = end  # type: ignore[method-assign]


@fault("state.in-pieces")
def takes_the_first_piece_for_the_state() -> None:
    offer_everything()

    async def load(fd: int, device: Device, suspended: Callable[[], bool]) -> None:
        device.load_state(await transfer._read(fd))

    transfer._load = load


@fault("state.after-failure")
def never_forgets_a_failure() -> None:
    offer_everything()
    failed: set[Connection] = set()

    async def check(connection: Connection, request: Any, right: Any) -> None:
        if connection in failed:
            raise RequestRefused("it has failed before")
        try:
            await right(connection, request)
        except RequestRefused:
            failed.add(connection)
            raise

    handling(F.CHECK_DEVICE_STATE, check)


@fault("state.goes-on")
def starts_nothing_once_its_state_was_saved() -> None:
    saved: set[Connection] = set()
    offer_everything()

    async def move(connection: Connection, request: Any, right: Any) -> Any:
        saved.add(connection)
        return await right(connection, request)

    async def enable(connection: Connection, request: Any, right: Any) -> Any:
        if connection in saved:
            raise RequestRefused("the device is elsewhere")
        return await right(connection, request)

    handling(F.SET_DEVICE_STATE_FD, move)
    handling(F.SET_VRING_KICK, enable)


# ---- what is loaded


def _judging(judge: Callable[[bytes], bool]) -> None:
    """Loads what is judged so."""
    offer_everything()

    def load(_: Device, state: bytes) -> None:
        if not judge(state):
            raise RequestRefused("another state")

    Device.load_state = load  # type: ignore[method-assign]


@fault("state.nonsense")
def looks_at_the_length_of_a_state() -> None:
    _judging(lambda state: len(state) == len(STATE))


@fault("state.too-long")
def looks_at_the_beginning_of_a_state() -> None:
    _judging(lambda state: state.startswith(STATE))


@fault("state.empty")
def takes_no_state_for_one() -> None:
    _judging(lambda state: state in (STATE, b""))


@fault("state.loaded")
def saves_what_it_had_before() -> None:
    offer_everything()
    loaded: set[Device] = set()

    def load(device: Device, _: bytes) -> None:
        loaded.add(device)

    Device.load_state = load  # type: ignore[method-assign]
    Device.save_state = lambda device: STATE[::-1] if device in loaded else STATE  # type: ignore[method-assign]


@fault("state.cut-off", "state.empty", "state.nonsense", "state.too-long", "state.reader-gone")
def checks_nothing() -> None:
    offer_everything()

    async def check(connection: Connection, request: Any, right: Any) -> None:
        return None

    handling(F.CHECK_DEVICE_STATE, check)


@fault("state.check-alone")
def waits_for_a_transfer_to_check() -> None:
    offer_everything()

    async def check(connection: Connection, request: Any, right: Any) -> None:
        if connection._transfer._failure is None:
            await asyncio.Event().wait()
        await right(connection, request)

    handling(F.CHECK_DEVICE_STATE, check)


# ---- transfers that must not be


def _known(may_be: Callable[[State, DeviceStateTransfer], bool]) -> None:
    """Has the rule for transfers replaced."""
    offer_everything()

    def rule(state: State, move: Any) -> str:
        return "" if may_be(state, move) else "there is no such transfer"

    FRONTEND[F.SET_DEVICE_STATE_FD] = replace(FRONTEND[F.SET_DEVICE_STATE_FD], rules=(rule,))  # type: ignore[index]


@fault("state.load-running")
def loads_state_while_rings_run() -> None:
    _known(
        lambda state, move: (
            (state.suspended or move.direction == TransferDirection.LOAD)
            and (move.direction, move.phase) in ((0, 0), (1, 0))
        )
    )


@fault("state.running", "state.load-running")
def moves_state_while_rings_run() -> None:
    _known(lambda _, move: move.direction in (0, 1) and not move.phase)


@fault("state.direction")
def loads_whatever_it_does_not_save() -> None:
    _known(lambda state, move: state.suspended and not move.phase)


@fault("state.phase")
def looks_at_no_phase() -> None:
    _known(lambda state, move: state.suspended and move.direction in (0, 1))
