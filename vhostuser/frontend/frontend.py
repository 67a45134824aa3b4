"""Frontend: drives a back-end over a socket: connecting or listening, and whole procedures made of typed calls.

What belongs here: what takes more than one message. What does not: single requests (``calls``), pairing
answers (``requests``), what is legal (``protocol.session``), guest memory (``memory``), rings
(``ring``), postcopy (``postcopy``).
"""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path
from typing import Self

from vhostuser.driverqueue import DriverQueue
from vhostuser.frontend.calls import Calls
from vhostuser.frontend.channel import Answerer, BackendRequests, config_changes_only
from vhostuser.frontend.memory import SharedLog, SharedMemory
from vhostuser.frontend.ring import FrontendRing
from vhostuser.frontend.services import BackendServices, ObjectRegistry
from vhostuser.protocol import (
    DeviceStatus,
    FrontendRequest,
    LocalProtocolError,
    ProtocolFeature,
    RequestRefused,
    VirtioFeature,
)

DRIVABLE = ~(
    VirtioFeature.LOG_ALL.mask  # of no use before there is a log
    | VirtioFeature.NOTIFY_ON_EMPTY.mask  # calls that the driver has asked not to have
    | VirtioFeature.ACCESS_PLATFORM.mask
    | VirtioFeature.RING_PACKED.mask  # this and the next are taken by those who make their DriverQueue so
    | VirtioFeature.IN_ORDER.mask
    | VirtioFeature.NOTIFICATION_DATA.mask
    | VirtioFeature.NOTIF_CONFIG_DATA.mask
)
"""All virtio features but those that ``DriverQueue`` and ``FrontendRing`` have no part in unless they are told to."""

DRIVABLE_PROTOCOL = ~(
    ProtocolFeature.INBAND_NOTIFICATIONS.mask
    | ProtocolFeature.STATUS.mask  # for those who say driver_ok when their rings are set up
    | ProtocolFeature.XEN_MMAP.mask
    | ProtocolFeature.GPA_ADDRESSES.mask  # a back-end of before specification 10.0 may mean SHMEM by it
    | ProtocolFeature.GET_VRING_BASE_INFLIGHT.mask
)
"""All protocol features but those under which ``Frontend.start_ring``, ``stop_ring`` or memory messages would mean
something else."""


class Frontend(Calls):
    """The front-end's end of one connection; owns the socket. All methods belong to the loop's thread.

    Requests may be made by several tasks; they are sent in the order of the calls and answers are paired in that order.
    ``backend`` serves the back-end's own requests, once ``serve_backend`` was called.
    """

    backend: BackendRequests | None = None
    services: BackendServices | None = None
    """What ``serve_requests`` made."""

    @classmethod
    async def connect(cls, path: str | Path) -> Self:
        """Connects to a back-end that listens. Raises OSError."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.setblocking(False)
        try:
            await asyncio.get_running_loop().sock_connect(sock, str(path))
            return cls(sock)
        except OSError:
            sock.close()
            raise

    @staticmethod
    def listen(path: str | Path) -> Listener:
        """Waits for back-ends that connect. Raises OSError if the path is taken."""
        return Listener(path)

    def close(self) -> None:
        """Closes the connection and the back-end's channel; the back-end sees the end of both streams."""
        if self.backend is not None:
            self.backend.close()
        if self.services is not None:
            self.services.close()
        super().close()

    # ---- whole procedures

    async def negotiate(self, features: int = DRIVABLE, protocol_features: int = DRIVABLE_PROTOCOL) -> None:
        """Takes what the back-end offers of ``features`` and ``protocol_features``, and becomes the owner."""
        offered = await self.get_features()
        if offered & features & VirtioFeature.PROTOCOL_FEATURES.mask:
            await self.set_protocol_features(await self.get_protocol_features() & protocol_features)
        await self.set_owner()
        await self.set_features(offered & features)

    async def serve_backend(self, answer: Answerer = config_changes_only, *, keep: bool = True) -> BackendRequests:
        """Gives the back-end a channel for its own requests and serves it, instead of one given before.

        answer: decides what is accepted. keep: what was accepted is to be collected (``BackendRequests.next``). Raises
        as a request; LocalProtocolError without BACKEND_REQ.
        """
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        with theirs:
            try:
                await self.set_backend_req_fd(theirs.fileno())
            except BaseException:
                ours.close()
                raise
        if self.backend is not None:
            self.backend.close()
        self.backend = BackendRequests(ours, self.session.channel(), answer, keep=keep)
        return self.backend

    async def serve_requests(
        self, objects: ObjectRegistry | None = None, otherwise: Answerer = config_changes_only
    ) -> BackendServices:
        """Gives the back-end a channel and does what it asks for: windows of shared memory, notify pages, ``objects``.

        otherwise: decides about all other requests. Raises as ``serve_backend``.
        """
        sizes = await self.get_shmem_config() if self.session.has(ProtocolFeature.SHMEM) else ()
        services = BackendServices(sizes, objects, self, otherwise)
        await self.serve_backend(services, keep=False)
        if self.services is not None:
            self.services.close()
        self.services = services
        return services

    async def get_vring_base(self, index: int) -> int:
        """As of ``Calls``; a notify page of the ring's is taken away."""
        base = await super().get_vring_base(index)
        if self.services is not None:
            self.services.ring_stopped(index)
        return base

    async def reset_device(self) -> None:
        """As of ``Calls``; what the device had mapped is unmapped."""
        await super().reset_device()
        if self.services is not None:
            self.services.reset()

    async def set_memory(self, memory: SharedMemory, *, by_slots: bool = False) -> None:
        """Makes ``memory`` the whole of guest memory, as one table or (``by_slots``) by adding region after region."""
        if not by_slots:
            await self.set_mem_table(memory)
            return
        for region in memory.regions:
            await self.add_mem_reg(region)

    def new_ring(
        self, index: int, memory: SharedMemory, at: int, *, size: int = 64, indirect: bool = False
    ) -> FrontendRing:
        """A driver's ring of ``size`` entries at guest address ``at``, in the format and with the notifications that
        were negotiated. The caller owns it, and starts it. *Touches*. Raises QueueBroken where it does not fit."""
        has = self.session.has
        queue = DriverQueue(
            memory.map,
            at,
            size,
            event_idx=has(VirtioFeature.RING_EVENT_IDX),
            indirect=indirect,
            packed=has(VirtioFeature.RING_PACKED),
            in_order=has(VirtioFeature.IN_ORDER),
        )
        return FrontendRing(index, queue)

    async def start_ring(
        self,
        ring: FrontendRing,
        memory: SharedMemory,
        *,
        base: int | None = None,
        enable: bool = True,
        polled: bool = False,
        in_band: bool = False,
        log_used: bool = False,
    ) -> None:
        """Sets the ring up, gives its eventfds and enables it; it starts at the first kick.

        base: where to go on, from ``stop_ring``; None: the ring is new. polled: without a kick descriptor; it starts at
        once. in_band: without any eventfd: it starts at the first ``vring_kick``, and the back-end calls by messages
        (``channel.notifying``). log_used: writes to the used ring are marked in the dirty log. Raises
        LocalProtocolError where the ring is not of the format that was negotiated.
        """
        queue, index = ring.queue, ring.index
        if queue.packed != self.session.has(VirtioFeature.RING_PACKED):
            kind = "packed" if queue.packed else "split"
            raise LocalProtocolError(FrontendRequest.SET_VRING_NUM, f"ring {index} is {kind}, which was not negotiated")
        # Behind an IOMMU drivers know I/O virtual addresses alone, and those are what is told.
        as_it_is = self.session.has(ProtocolFeature.GPA_ADDRESSES) or self.session.has(VirtioFeature.ACCESS_PLATFORM)
        user = int if as_it_is else memory.map.guest_to_host
        log = queue.used if log_used else None
        await self.set_vring_num(index, queue.size)
        await self.set_vring_base(index, queue.first_base if base is None else base)
        await self.set_vring_addr(index, desc=user(queue.desc), avail=user(queue.avail), used=user(queue.used), log=log)
        if not in_band:
            await self.set_vring_err(index, ring.err_fd)
            await self.set_vring_call(index, ring.call_fd)
            await self.set_vring_kick(index, None if polled else ring.kick_fd)
        if enable and self.session.has(VirtioFeature.PROTOCOL_FEATURES):
            await self.set_vring_enable(index, True)

    async def driver_ok(self) -> None:
        """The rings are set up: with STATUS negotiated, none is served before this word. Without STATUS nothing.

        As drivers do it (virtio 1.3, 3.1.1): FEATURES_OK first, and read back. Raises RequestRefused where the back-end
        cannot work with the features that it was given.
        """
        if not self.session.has(ProtocolFeature.STATUS):
            return
        agreed = DeviceStatus.ACKNOWLEDGE | DeviceStatus.DRIVER | DeviceStatus.FEATURES_OK
        await self.set_status(agreed)
        if not await self.get_status() & DeviceStatus.FEATURES_OK:
            raise RequestRefused(f"{self.name} cannot work with these features (FEATURES_OK does not stay)")
        await self.set_status(agreed | DeviceStatus.DRIVER_OK)

    async def start_log(self, log: SharedLog) -> None:
        """Has the back-end mark what it writes in ``log``, as when a migration begins. Raises LocalProtocolError where
        LOG_SHMFD was not negotiated or LOG_ALL is not offered."""
        await self.set_log_base(log)
        await self.set_features(self.session.features | VirtioFeature.LOG_ALL.mask)

    async def stop_log(self) -> None:
        """Has the back-end mark nothing any more."""
        await self.set_features(self.session.features & ~VirtioFeature.LOG_ALL.mask)

    async def stop_ring(self, ring: FrontendRing) -> int:
        """Stops the ring; the base to start it with again."""
        return await self.get_vring_base(ring.index)


class Listener:
    """A socket on which back-ends connect. Owns it and its path, which is removed at the end."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._socket.setblocking(False)
            self._socket.bind(str(self.path))
            self._socket.listen()
        except OSError:
            self._socket.close()
            raise

    async def accept(self) -> Frontend:
        """The next back-end that connects. Raises OSError."""
        sock, _ = await asyncio.get_running_loop().sock_accept(self._socket)
        return Frontend(sock)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stops listening; what was accepted stays. Again: nothing."""
        if self._socket.fileno() >= 0:
            self._socket.close()
            self.path.unlink(missing_ok=True)
