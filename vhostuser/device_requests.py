"""Requests that the device fulfils by itself: its configuration space, and what only its kind knows.

What belongs here: payloads taken apart, and the device's own methods called with them. What does not: what the device
makes of them (``device``), rings (``ring_requests``), memory (``connection``).

Control thread only; nothing here waits.
"""

from __future__ import annotations

import sys

from vhostuser.arguments import payload_of
from vhostuser.device import Device
from vhostuser.protocol import U64, Config, Reply, Request, RequestRefused

_SPACE = 256
"""Bytes of configuration space that a message can name."""


class DeviceRequests:
    """Fulfils them for one connection. Raises RequestRefused, as the device does."""

    def __init__(self, device: Device) -> None:
        self._device = device

    async def get_config(self, request: Request) -> Reply:
        asked = _part(request)
        data = self._device.config().ljust(_SPACE, b"\0")[asked.offset : asked.offset + asked.size]
        return Reply(Config(asked.offset, asked.size, asked.flags, data))

    async def set_config(self, request: Request) -> None:
        written = _part(request)
        self._device.set_config(written.offset, written.data, migration=bool(written.flags & 1))

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
