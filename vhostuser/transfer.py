"""The device's own state on its way to or from the front-end (DEVICE_STATE).

What belongs here: reading and writing the channel, and what became of it. What does not: what the state is
(``device``), when it may be moved (``protocol.rules``).

Everything runs on the control thread and nothing holds it up: neither a slow reader nor a writer that never ends.
Section "Migrating back-end state".
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import stat
from collections.abc import Awaitable, Callable
from functools import partial

from vhostuser.channel import readable, writable
from vhostuser.device import Device
from vhostuser.protocol import DeviceStateTransfer, RequestRefused, TransferDirection

_PIECE = 64 * 1024


class StateTransfer:
    """Moves the state of ``device``, once at a time.

    suspended: whether the device is at rest, asked before a state is loaded.
    """

    def __init__(self, device: Device, suspended: Callable[[], bool]) -> None:
        self._device = device
        self._suspended = suspended
        self._failure: asyncio.Future[str] | None = None

    def begin(self, transfer: DeviceStateTransfer, fd: int) -> None:
        """Begins a transfer through a pipe, of which the caller keeps ``fd``, and ends one before it.

        Raises RequestRefused for a channel that is no pipe or that nobody reads, and for what the device refuses to
        save.
        """
        self.end()
        move: Callable[[], Awaitable[None]]
        if transfer.direction == TransferDirection.SAVE:
            state = self._device.save_state()
            own = _open_again(fd, os.O_WRONLY)
            move = partial(_write, own, state)
        else:
            own = _open_again(fd, os.O_RDONLY)
            move = partial(_load, own, self._device, self._suspended)
        self._failure = asyncio.ensure_future(_failure_of(move))
        self._failure.add_done_callback(lambda _: os.close(own))

    async def check(self) -> None:
        """Waits for the end of the channel. Raises RequestRefused if the state did not arrive, or was of no use."""
        if self._failure is None:
            raise RequestRefused("no state was moved")
        failing = self._failure
        await asyncio.wait((failing,))
        if failing.cancelled():
            raise RequestRefused("the device's state was not moved: the front-end has left")
        if failure := failing.result():
            raise RequestRefused(failure)

    def end(self) -> None:
        """Ends a transfer where it is. Without one: nothing."""
        if self._failure is not None:
            self._failure.cancel()
        self._failure = None


def _open_again(fd: int, mode: int) -> int:
    """An open file of our own: the front-end could make the one that it gave us block at any time."""
    if not stat.S_ISFIFO(os.fstat(fd).st_mode):
        raise RequestRefused("the channel for the device's state is no pipe")
    try:
        return os.open(f"/proc/self/fd/{fd}", mode | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise RequestRefused(f"the channel for the device's state: {error.strerror}") from None


async def _failure_of(move: Callable[[], Awaitable[None]]) -> str:
    try:
        await move()
    except Exception as error:  # whatever a device raises for bytes that it cannot take: struct.error, KeyError, ...
        return f"the device's state was not moved: {error or type(error).__name__}"
    return ""


async def _write(fd: int, state: bytes) -> None:
    left = memoryview(state)
    while left:
        try:
            left = left[os.write(fd, left[:_PIECE]) :]
        except BlockingIOError:
            await writable(fd)
        else:
            await asyncio.sleep(0)  # a fast reader must not keep the loop from everybody else


async def _load(fd: int, device: Device, suspended: Callable[[], bool]) -> None:
    state = bytearray()
    while piece := await _read(fd):
        state += piece
        if len(state) > device.state_limit:
            raise RequestRefused(f"more than {device.state_limit} bytes")
    if not suspended():
        raise RequestRefused("a ring was started before it had arrived")
    device.load_state(bytes(state))


async def _read(fd: int) -> bytes:
    while True:
        await readable(fd)
        with contextlib.suppress(BlockingIOError):
            return os.read(fd, _PIECE)
