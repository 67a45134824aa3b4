"""Requests about the device as a whole: its configuration space, its status and resets, what only its kind knows.

What belongs here: payloads taken apart, and the device's own methods called with them. What does not: what the device
makes of them (``device``), rings (``ring_requests``), memory (``connection``).

Control thread only. A reset waits until the rings and the device have stopped, and nothing else here waits.
"""

from __future__ import annotations

import logging
import sys

from vhostuser.arguments import payload_of
from vhostuser.device import Device
from vhostuser.lifecycle import Lifecycle
from vhostuser.protocol import U64, BackendSession, Config, DeviceStatus, Reply, Request, RequestRefused

log = logging.getLogger("vhostuser")

_SPACE = 256
"""Bytes of configuration space that a message can name."""


class DeviceRequests:
    """Fulfils them for the front-end called ``name``, for the log. Raises RequestRefused, as the device does."""

    def __init__(self, name: str, device: Device, session: BackendSession, life: Lifecycle) -> None:
        self._name = name
        self._device = device
        self._session = session
        self._life = life

    # ---- configuration space

    async def get_config(self, request: Request) -> Reply:
        asked = _part(request)
        data = self._device.config().ljust(_SPACE, b"\0")[asked.offset : asked.offset + asked.size]
        return Reply(Config(asked.offset, asked.size, asked.flags, data))

    async def set_config(self, request: Request) -> None:
        written = _part(request)
        self._device.set_config(written.offset, written.data, migration=bool(written.flags & 1))

    # ---- status and resets

    async def set_status(self, request: Request) -> None:
        """0 is the driver's reset: rings stop, and the device with them, as when the front-end had stopped each.

        It does not forget what ``reset`` would: QEMU says it at every stop, also before it asks for the device's state.
        """
        status = payload_of(request, U64).value
        if status & DeviceStatus.FAILED and not self._session.status & DeviceStatus.FAILED:
            log.warning("%s: the driver has given the device up (FAILED)", self._name)
        if not status:
            await self._stop_everything()

    async def reset_device(self, request: Request) -> None:
        await self._stop_everything()
        # What was under way is done. Whose requests the region will name next is for the front-end to say.
        self._life.inflight = None
        self._device.reset()

    async def _stop_everything(self) -> None:
        await self._life.restart_device()
        for ring in self._life.rings:
            ring.drop_kick()  # a stray late kick starts nothing
        self._life.forget_translations()

    # ---- network devices

    async def send_rarp(self, request: Request) -> None:
        self._device.announce_guest(payload_of(request, U64).value.to_bytes(8, sys.byteorder)[:6])

    async def net_set_mtu(self, request: Request) -> None:
        self._device.set_mtu(payload_of(request, U64).value)


def _part(request: Request) -> Config:
    """What of configuration space it is about. Raises RequestRefused for what lies beyond any."""
    part = payload_of(request, Config)
    if part.offset + part.size > _SPACE:
        raise RequestRefused(f"configuration space has {_SPACE} bytes, not {part.offset + part.size}")
    return part
