"""Requests that only devices with a certain hook fulfil, and what such devices are given for one front-end.

What belongs here: which hook a request goes to, what is opened and closed with a connection. What does not: the hooks
(``hooks``, ``shared_objects``, ``shared_memory``), what every device fulfils (``device_requests``).

Control thread only; nothing here waits.
"""

from __future__ import annotations

import logging
import os
import socket
from typing import TypeVar
from uuid import UUID

from vhostuser.announcements import Announcements
from vhostuser.arguments import fds_of, payload_of
from vhostuser.device import Device
from vhostuser.hooks import CryptoSessions, GpuSocket, HostNotifiers
from vhostuser.protocol import (
    U64,
    BackendRequest,
    BackendSession,
    CryptoSession,
    Empty,
    FrontendRequest,
    ProtocolFeature,
    Reply,
    Request,
    RequestRefused,
    Uuid,
    VringArea,
)
from vhostuser.shared_memory import Mappings, SharedMemoryRegions, shmem_config
from vhostuser.shared_objects import ObjectTable, SharedObjects

log = logging.getLogger("vhostuser")

T = TypeVar("T")

MOST_SESSIONS = 1024
"""Crypto sessions that one front-end has open at most."""


class HookRequests:
    """Fulfils them for one connection, whose ``asking`` is the device's way to the front-end. Raises RequestRefused."""

    def __init__(self, device: Device, session: BackendSession, asking: Announcements, name: str) -> None:
        self._device = device
        self._session = session
        self._asking = asking
        self._name = name
        self._sessions: set[int] = set()
        self._notifiers: dict[int, bool] = {}
        """Rings that run, and whether an area was offered for them."""
        if isinstance(device, SharedMemoryRegions):
            device.mappings = Mappings(asking, device.shmem_sizes)
        if isinstance(device, SharedObjects):
            device.table = ObjectTable(asking)

    def close(self) -> None:
        """The front-end has gone: nothing of it stays."""
        device = self._device
        if isinstance(device, SharedObjects) and device.table is not None:
            device.table.close()
            device.table = None
        if isinstance(device, SharedMemoryRegions):
            device.mappings = None
        for session_id in self._sessions:
            assert isinstance(device, CryptoSessions)
            device.close_crypto_session(session_id)
        self._sessions.clear()

    def _having(self, kind: type[T]) -> T:
        if not isinstance(self._device, kind):
            raise RequestRefused(f"the device has no {kind.__name__}")
        return self._device

    # ---- requests

    async def get_shared_object(self, request: Request) -> Reply:
        # QEMU sends no UUID: it leaves the size of the message at 0.
        if not isinstance(request.payload, Uuid):
            raise RequestRefused("no UUID was sent")
        fd = self._having(SharedObjects).objects.find(UUID(bytes=request.payload.value))
        return Reply(Empty(), fds=(os.dup(fd),))

    async def get_shmem_config(self, request: Request) -> Reply:
        return Reply(shmem_config(self._having(SharedMemoryRegions).shmem_sizes))

    async def create_crypto_session(self, request: Request) -> Reply:
        asked = payload_of(request, CryptoSession)
        if len(self._sessions) >= MOST_SESSIONS:
            raise RequestRefused(f"{MOST_SESSIONS} crypto sessions are open already")
        session_id = self._having(CryptoSessions).create_crypto_session(asked.op_code, asked.parameters)
        self._sessions.add(session_id)
        return Reply(CryptoSession(asked.op_code, asked.parameters, session_id))

    async def close_crypto_session(self, request: Request) -> None:
        session_id = payload_of(request, U64).value
        if session_id not in self._sessions:
            raise RequestRefused(f"there is no crypto session {session_id}")
        self._sessions.remove(session_id)
        self._having(CryptoSessions).close_crypto_session(session_id)

    async def gpu_set_socket(self, request: Request) -> None:
        device = self._having(GpuSocket)
        sock = _unix_stream(fds_of(request)[0])
        try:
            device.gpu_socket(sock)
        except BaseException:
            sock.detach()
            raise
        fds_of(request).take()

    # ---- after every request

    def follow(self, code: FrontendRequest | BackendRequest) -> None:
        """What a request that was fulfilled brings about."""
        if code is FrontendRequest.RESET_DEVICE and isinstance(self._device, SharedMemoryRegions):
            self._device.shmem.reset()
        self.offer_notifiers()

    def offer_notifiers(self) -> None:
        """Offers the areas of rings that run by now, and takes back those of rings that do not any more."""
        if not isinstance(self._device, HostNotifiers) or self._asking.channel is None:
            return
        if not self._session.has(ProtocolFeature.HOST_NOTIFIER):
            return
        running = {index for index, ring in enumerate(self._session.rings) if ring.runs}
        for index in running - set(self._notifiers):
            area = self._device.host_notifier(index)
            self._notifiers[index] = area is not None
            if area is not None:
                self._notifier(VringArea(index, area.size, area.offset), area.fd)
        for index in set(self._notifiers) - running:
            # Of a suspended device the front-end takes them away by itself: it has asked for the stop.
            if self._notifiers.pop(index) and not self._session.suspended:
                self._notifier(VringArea(index, 0, 0, has_fd=False))

    def _notifier(self, area: VringArea, *fds: int) -> None:
        try:
            answered = self._asking.request(BackendRequest.VRING_HOST_NOTIFIER_MSG, area, fds)
        except RequestRefused as refusal:
            self._unheard(area, refusal)
        else:
            answered.add_done_callback(lambda done: self._unheard(area, done.exception()))

    def _unheard(self, area: VringArea, refusal: BaseException | None) -> None:
        if refusal is not None:
            log.info("%s: ring %d goes on with kicks alone: %s", self._name, area.index, refusal)


def _unix_stream(fd: int) -> socket.socket:
    """A socket object for ``fd``, which its caller still owns. Raises RequestRefused."""
    try:
        sock = socket.socket(fileno=fd)
    except OSError as error:
        raise RequestRefused(f"the descriptor is no socket: {error.strerror}") from None
    if (sock.family, sock.type) != (socket.AF_UNIX, socket.SOCK_STREAM):
        sock.detach()
        raise RequestRefused("the descriptor is no Unix stream socket")
    return sock
