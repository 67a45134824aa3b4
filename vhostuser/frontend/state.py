"""A device's own state, taken from one back-end and given to another (DEVICE_STATE).

What belongs here: the channel, and the order of steps. What does not: the messages (``calls``), what the bytes mean.
Section "Migrating back-end state".
"""

from __future__ import annotations

import contextlib
import os

from vhostuser.channel import readable, writable
from vhostuser.frontend.calls import Calls
from vhostuser.protocol import TransferDirection

_PIECE = 1 << 16


async def save_state(frontend: Calls) -> bytes:
    """The whole state of the back-end's device, of which every ring must be stopped.

    Waits for the back-end, as long as it goes on sending; touches no guest memory. Raises RequestRefused for a state
    that cannot be had, LocalProtocolError without DEVICE_STATE.
    """
    channel = await _channel(frontend, TransferDirection.SAVE)
    try:
        state = bytearray()
        while piece := await _read(channel):
            state += piece
    finally:
        os.close(channel)
    await frontend.check_device_state()
    return bytes(state)


async def load_state(frontend: Calls, state: bytes) -> None:
    """Gives the back-end's device the state of another, before any ring is started. As ``save_state``."""
    channel = await _channel(frontend, TransferDirection.LOAD)
    try:
        # A back-end that has seen enough closes its end, and the check says why.
        with contextlib.suppress(BrokenPipeError):
            await _write(channel, state)
    finally:
        os.close(channel)
    await frontend.check_device_state()


async def _channel(frontend: Calls, direction: TransferDirection) -> int:
    """Our end, which does not block: of a pipe, or of the channel that the back-end prefers."""
    read, write = os.pipe2(os.O_CLOEXEC)
    ours, theirs = (read, write) if direction is TransferDirection.SAVE else (write, read)
    try:
        preferred = await frontend.set_device_state_fd(direction, theirs)
    except BaseException:
        os.close(ours)
        raise
    finally:
        os.close(theirs)
    if preferred is not None:
        os.close(ours)
        ours = preferred
    os.set_blocking(ours, False)
    return ours


async def _read(fd: int) -> bytes:
    while True:
        await readable(fd)
        with contextlib.suppress(BlockingIOError):
            return os.read(fd, _PIECE)


async def _write(fd: int, state: bytes) -> None:
    left = memoryview(state)
    while left:
        await writable(fd)
        with contextlib.suppress(BlockingIOError):
            left = left[os.write(fd, left[:_PIECE]) :]
