"""A disk that offers every protocol feature, so that cases about messages of other kinds of devices can be tried on it.

What belongs here: what our disk leaves to others, done in the plainest way that is right. What does not: faults.
"""

from __future__ import annotations

import mmap
import os
import socket
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from tests.conformance.broken.registry import FAULTS, F, Fault
from vhostuser import connection
from vhostuser.connection import HANDLERS, Connection
from vhostuser.device import Device
from vhostuser.devices.blk import Blk
from vhostuser.hooks import CryptoSessions, GpuSocket, HostNotifiers, NotifierArea
from vhostuser.protocol import FRONTEND, Empty, ProtocolFeature, Reply, Request, RequestRefused, VirtioFeature
from vhostuser.shared_memory import SharedMemoryRegions
from vhostuser.shared_objects import SharedObjects
from vhostuser.tools import disk

P, V = ProtocolFeature, VirtioFeature

OFFERED = (P.RARP, P.MTU, P.CROSS_ENDIAN, P.DEVICE_STATE, P.GPA_ADDRESSES)
STATE = b"the state of a disk: nothing"


def offer_everything() -> None:
    """Patches our disk to this."""
    right = connection.protocol_features
    connection.protocol_features = lambda **what: right(**what) | sum(feature.mask for feature in OFFERED)
    connection.TRANSPORT_FEATURES |= V.ACCESS_PLATFORM.mask | V.NET_F_MTU.mask
    for code, row in FRONTEND.items():
        if row.unserved and row.gate.features:
            FRONTEND[code] = replace(row, unserved="")  # type: ignore[index]
    HANDLERS.update(_ANSWERS)
    Device.save_state = lambda _: STATE  # type: ignore[method-assign]
    Device.load_state = _load_state  # type: ignore[method-assign]
    disk.Blk = Everything  # type: ignore[misc]


async def _done(_: Connection, __: Request) -> None:
    """There is nothing to do."""


async def _object(_: Connection, __: Request) -> Reply:
    return Reply(Empty(), fds=(os.memfd_create("object", os.MFD_CLOEXEC),))


def find_everything() -> None:
    """No session and no object is refused for there being none: what is tried is another reason."""
    HANDLERS[F.CLOSE_CRYPTO_SESSION] = _done
    HANDLERS[F.GET_SHARED_OBJECT] = _object


class Everything(SharedMemoryRegions, SharedObjects, HostNotifiers, CryptoSessions, GpuSocket, Blk):
    """A disk with every hook: a notify page for each ring, a region of shared memory, sessions that do nothing."""

    shmem_sizes = MappingProxyType({1: 1 << 20})
    sessions = 0

    def host_notifier(self, index: int) -> NotifierArea | None:
        if not hasattr(self, "pages"):
            self.pages = os.memfd_create("pages", os.MFD_CLOEXEC)
            os.truncate(self.pages, 256 * mmap.PAGESIZE)
        return NotifierArea(self.pages, index * mmap.PAGESIZE, mmap.PAGESIZE)

    def create_crypto_session(self, op_code: int, parameters: bytes) -> int:
        self.sessions += 1
        return self.sessions

    def gpu_socket(self, sock: socket.socket) -> None:
        sock.close()


def _load_state(_: Device, state: bytes) -> None:
    if state != STATE:
        raise RequestRefused("a part of the state")


_ANSWERS: dict[int, Any] = {
    F.SEND_RARP: _done,
    F.NET_SET_MTU: _done,
}

FAULTS["offers_everything"] = Fault(offer_everything, ())
