"""The device's own state, on a disk that offers everything."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from tests.conformance.broken.everything import STATE, offer_everything
from tests.conformance.broken.registry import F, fault, handling
from vhostuser.connection import Connection
from vhostuser.protocol import (
    FRONTEND,
    DeviceStateReply,
    DeviceStateTransfer,
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


@fault("state.save", "state.load", "state.twice", "state.cut-off")
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


@fault("state.cut-off")
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

    def rule(state: State, transfer: Any) -> str:
        return "" if may_be(state, transfer) else "there is no such transfer"

    FRONTEND[F.SET_DEVICE_STATE_FD] = replace(FRONTEND[F.SET_DEVICE_STATE_FD], rules=(rule,))  # type: ignore[index]


@fault("state.running")
def moves_state_while_rings_run() -> None:
    _known(lambda _, transfer: transfer.direction in (0, 1) and not transfer.phase)


@fault("state.direction")
def loads_whatever_it_does_not_save() -> None:
    _known(lambda state, transfer: state.suspended and not transfer.phase)


@fault("state.phase")
def looks_at_no_phase() -> None:
    _known(lambda state, transfer: state.suspended and transfer.direction in (0, 1))
