"""One front-end: the conversation with it.

What belongs here: who fulfils which request, and those about features, memory and postcopy. What does not: whether a
request is allowed and what is sent back (``protocol.session``), how bytes travel (``channel``), when rings and the
device start and stop (``lifecycle``), what memory is mapped (``regions``), single rings (``ring_requests``), what the
device does by itself (``device_requests``).

Everything runs on the control thread and nothing touches guest memory. Requests are done strictly in order: a front-end
without REPLY_ACK takes the answer to a later GET_FEATURES for the end of the requests before it. A request that must
see a ring stopped therefore waits for its thread; the loop serves other connections meanwhile and watches the socket
for the loss of the front-end. No request waits for what goes on by itself, such as the start of a device; only
CHECK_DEVICE_STATE does, whose answer is how it ended, and then until the front-end leaves at the latest.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import Awaitable, Callable, Iterable, Iterator
from dataclasses import replace

from vhostuser.announcements import Announcements
from vhostuser.arguments import fds_of, payload_of, ring_of
from vhostuser.channel import Channel, Fds
from vhostuser.dataplane import DataThread
from vhostuser.device import Device
from vhostuser.device_requests import DeviceRequests
from vhostuser.hook_requests import HookRequests
from vhostuser.hooks import offered_by
from vhostuser.iommu_requests import IommuRequests
from vhostuser.lifecycle import Lifecycle
from vhostuser.log_requests import LogRequests
from vhostuser.memory import GuestMemory, Region
from vhostuser.metrics import Sample
from vhostuser.offer import TRANSPORT_FEATURES, protocol_features
from vhostuser.postcopy import Postcopy
from vhostuser.protocol import (
    U64,
    BackendSession,
    DeviceStateTransfer,
    Effect,
    Empty,
    FrontendRequest,
    Inflight,
    MemoryRegion,
    MemoryTable,
    ProtocolFeature,
    RemoteProtocolError,
    Reply,
    Request,
    RequestRefused,
    SingleRegion,
    VirtioFeature,
    Wake,
    WakeAck,
    feature_names,
    protocol_feature_names,
)
from vhostuser.protocol import Postcopy as PostcopyState
from vhostuser.record import MemoryRecord
from vhostuser.regions import Regions
from vhostuser.ring import Ring
from vhostuser.ring_messages import RingMessages
from vhostuser.ring_requests import RingRequests
from vhostuser.transfer import StateTransfer
from vhostuser.virtqueue import InflightRegion
from vhostuser.watch import MessageWatch

log = logging.getLogger("vhostuser")

_STOPPING = frozenset(
    {
        FrontendRequest.GET_VRING_BASE,
        FrontendRequest.SET_VRING_ENABLE,
        FrontendRequest.RESET_OWNER,
        FrontendRequest.RESET_DEVICE,
        FrontendRequest.SET_STATUS,
    }
)
"""Requests by whose answer rings have stopped, and with the last of them the device."""

# How long requests under way may go on when their front-end has gone, in seconds: the next one waits for them.
_GRACE = 5.0
# How long the device's start or stop may take then: a disk syncs what it has cached.
_PATIENCE = 30.0


class Connection:
    """Serves ``device`` to the front-end at the other end of ``sock``; owns the socket, memory and rings.

    ``postcopy`` is the back-end's half of postcopy, or None where PAGEFAULT is not offered. ``record`` remembers memory
    that must not be touched while it has holes. ``mem_slots`` is the answer to GET_MAX_MEM_SLOTS; with 0
    CONFIGURE_MEM_SLOTS is not offered. Raises OSError when no descriptor is left; ``sock`` is then still the caller's.
    """

    def __init__(
        self,
        sock: socket.socket,
        device: Device,
        *,
        name: str,
        postcopy: Postcopy | None,
        record: MemoryRecord | None,
        mem_slots: int = 509,
    ) -> None:
        mem_slots = min(mem_slots, device.mem_slots)
        self.name = name
        self.device = device
        self._channel = Channel(sock)
        self._session = BackendSession(
            features=TRANSPORT_FEATURES | device.features,
            protocol_features=protocol_features(pagefault=postcopy is not None, mem_slots=mem_slots)
            | device.protocol_features
            | offered_by(device),
            queue_count=device.queues,
            queue_num=device.queue_num,
            max_slots=mem_slots,
        )
        self._mem_slots = mem_slots
        self._announcements = Announcements(name, self._session)
        self._ring_messages = RingMessages(self._session, self._announcements)
        broke = self._ring_messages.broke
        self._life = Lifecycle(name, device, self._session, failed=self._channel.end, broke=broke)
        self._regions = Regions(name, postcopy, record, self._life.memory_whole)
        self._watch = MessageWatch(name, self._waits_for)
        self._sending = False
        device.announce += (self._announcements.config_changed,)
        self._of_rings = RingRequests(self._life, device.queue_size, self._kicked)
        self._of_log = LogRequests(self._life)
        self._of_device = DeviceRequests(name, device, self._session, self._life)
        self._of_hooks = HookRequests(device, self._session, self._announcements, name)
        self._of_iommu = IommuRequests(name, self._life, lambda: self.memory, self._announcements.tell)
        self._transfer = StateTransfer(device, lambda: self._session.suspended)

    # ---- the life of the connection

    async def serve(self) -> None:
        """Answers the front-end until it has gone; then everything is stopped, unmapped and closed.

        Never raises for what the peer or the device does: it is logged in a line and ends the connection.
        """
        watching = asyncio.ensure_future(self._watch_loss())
        self._life.begin(self._regions)
        try:
            await self._converse()
        except RemoteProtocolError as error:
            log.error("%s: the connection is closed: %s", self.name, error)
            self._watch.cut_off("protocol")
            self._channel.offer(error.answer)
        except ConnectionError:
            pass
        except Exception as error:
            self._watch.cut_off("failure")
            log.error("%s: the connection is closed: %s", self.name, error, exc_info=error)
        finally:
            watching.cancel()
            await asyncio.shield(self._close())

    async def _converse(self) -> None:
        while (received := await self._next_request()) is not None:
            request, fds = received
            try:
                with self._watch.answering(str(request.row), ring_of(request)), self._announcements.answering():
                    await self._answer(request)
            finally:
                fds.close()
            # A peer that never lets the socket run dry must not keep the loop from everybody else.
            await asyncio.sleep(0)

    async def _next_request(self) -> tuple[Request, Fds] | None:
        """Reads exactly one message; the caller closes what is left of its descriptors."""
        fds: Fds | None = None
        came: Fds | None = None
        try:
            while True:
                data, came = await self._channel.receive(self._session.wanted)
                if not data:
                    self._session.eof()
                    return None
                # The first piece's are the message's; the session rejects any that come later.
                fds = came if fds is None else fds
                request = self._session.receive(data, came)
                if request is not None:
                    return request, fds
        except BaseException:
            for owner in (fds, came):
                if owner is not None:
                    owner.close()
            raise

    async def _answer(self, request: Request) -> None:
        outcome = await self._outcome(request)
        try:
            outgoing = self._session.finish(request, outcome)
            if request.code in _STOPPING:
                await self._life.stop_unwanted()
            self._life.changed()
            self._send_due()
            self._of_hooks.follow(request.code)
            if outgoing is not None:
                self._sending = True
                await self._channel.send(outgoing.data, outgoing.fds)
        finally:
            self._sending = False
            if isinstance(outcome, Reply):
                for fd in outcome.fds:
                    os.close(fd)

    async def _outcome(self, request: Request) -> Reply | RequestRefused | None:
        handler = HANDLERS.get(request.code)
        try:
            if request.refusal is not None:
                raise request.refusal
            if request.row.unserved:
                raise RequestRefused(request.row.unserved)
            return await handler(self, request) if handler is not None else None
        except RequestRefused as refusal:
            log.warning("%s: %s refused: %s", self.name, request.row, refusal)
            self._watch.refused(str(request.row))
            return refusal
        except Exception as error:
            # A full table of descriptors, a device that raises: what was promised cannot be known any more.
            debugging = log.isEnabledFor(logging.DEBUG)
            log.error("%s: %s failed, the connection is closed: %s", self.name, request.row, error, exc_info=debugging)
            self._watch.cut_off("failure")
            raise ConnectionAbortedError from error

    def _waits_for(self) -> str:
        if self._sending:
            return "the front-end to read the answer"
        missing = ", while pages of guest memory may be missing" * self._listening
        return (self._life.waits_for() or "nothing that is known") + missing

    async def _watch_loss(self) -> None:
        """Fails closed: when the front-end is lost in postcopy nobody will bring the missing pages any more.

        A request of the front-end's may be waiting for a ring that does not stop, so that nobody sees the end.
        """
        await self._channel.lost.wait()
        self._regions.revoke()
        self._transfer.end()
        await asyncio.sleep(_GRACE)
        self._life.abandon()
        await asyncio.sleep(_PATIENCE - _GRACE)
        self._life.leave_behind()

    async def _close(self) -> None:
        ours = self._announcements.config_changed
        self.device.announce = tuple(each for each in self.device.announce if each != ours)
        self._regions.revoke()
        self._transfer.end()
        loop = asyncio.get_running_loop()
        giving_up = [loop.call_later(_GRACE, self._life.abandon), loop.call_later(_PATIENCE, self._life.leave_behind)]
        await self._life.close()
        for each in giving_up:
            each.cancel()
        self._of_iommu.close()
        self._regions.close()
        self._announcements.close()
        self._of_hooks.close()
        self._channel.close()

    # ---- the device's own state

    async def _set_device_state_fd(self, request: Request) -> None:
        self._transfer.begin(payload_of(request, DeviceStateTransfer), fds_of(request)[0])

    async def _check_device_state(self, request: Request) -> None:
        await self._transfer.check()

    # ---- features

    async def _set_features(self, request: Request) -> None:
        features = payload_of(request, U64).value
        self.device.check_features(features)
        log.info("%s: features: %s", self.name, feature_names(features))
        changes = features ^ self._session.features
        # The halt alone is not enough: nothing may be started again before finish() has the new features.
        if changes & ~VirtioFeature.LOG_ALL.mask:
            await self._life.restart_device()
            self._of_iommu.negotiated(features)
        elif changes:
            async with self._life.halted():
                pass

    async def _set_protocol_features(self, request: Request) -> None:
        features = payload_of(request, U64).value
        log.info("%s: protocol features: %s", self.name, protocol_feature_names(features))
        self._ring_messages.negotiated(self.rings, features)

    # ---- memory

    @property
    def _listening(self) -> bool:
        return self._session.postcopy in (PostcopyState.LISTENING, PostcopyState.AWAITING_ACK)

    async def _set_mem_table(self, request: Request) -> Reply | None:
        descriptions = [self._named(region) for region in payload_of(request, MemoryTable).regions]
        regions = self._regions.map(descriptions, fds_of(request), listening=self._listening)
        await self._adopt(GuestMemory(regions), zip(regions, fds_of(request), strict=True))
        if not self._listening:
            return None
        return Reply(MemoryTable(tuple(self._regions.based(description) for description in descriptions)))

    async def _add_mem_reg(self, request: Request) -> Reply | None:
        description = self._named(payload_of(request, SingleRegion).region)
        if len(self.memory.regions) >= self._mem_slots:
            raise RequestRefused(f"all {self._mem_slots} memory slots are taken")
        (region,) = self._regions.map([description], fds_of(request), listening=self._listening)
        await self._adopt(self.memory.add(region), [(region, fds_of(request)[0])])
        return Reply(SingleRegion(self._regions.based(description))) if self._listening else None

    async def _rem_mem_reg(self, request: Request) -> None:
        gone = self._named(payload_of(request, SingleRegion).region)
        await self._adopt(self.memory.remove(self.memory.find(gone.guest, gone.size, gone.user)), [])

    def _named(self, region: MemoryRegion) -> MemoryRegion:
        """With GPA_ADDRESSES whatever names a user address elsewhere names a guest address, so here too."""
        return replace(region, user=region.guest) if self._session.has(ProtocolFeature.GPA_ADDRESSES) else region

    async def _adopt(self, memory: GuestMemory, arrived: Iterable[tuple[Region, int]]) -> None:
        self._regions.release(memory)
        async with self._life.halted():
            self._regions.adopt(memory, arrived, listening=self._listening)
            self._life.forget_translations()

    # ---- in-flight tracking

    @property
    def _packed(self) -> bool:
        """Front-ends say the features before they ask for a region, whose layout depends on them."""
        return self._session.has(VirtioFeature.RING_PACKED)

    async def _get_inflight_fd(self, request: Request) -> Reply:
        asked = payload_of(request, Inflight)
        if not asked.num_queues or asked.num_queues > self.device.queues:
            raise RequestRefused(f"in-flight region for {asked.num_queues} rings of {self.device.queues}")
        fd, size = InflightRegion.create(asked.num_queues, asked.queue_size, packed=self._packed)
        return Reply(Inflight(size, 0, asked.num_queues, asked.queue_size), fds=(fd,))

    async def _set_inflight_fd(self, request: Request) -> None:
        given = payload_of(request, Inflight)
        region = InflightRegion.map(fds_of(request)[0], given, packed=self._packed)
        async with self._life.halted():
            self._life.inflight = region

    # ---- postcopy

    async def _postcopy_advise(self, request: Request) -> Reply:
        return Reply(Empty(), fds=(self._regions.advise(),))

    async def _postcopy_listen(self, request: Request) -> None:
        if request.effect is Effect.LISTEN and self.memory.regions:
            raise RequestRefused("POSTCOPY_LISTEN must come before the memory table")
        # What it sent before it left may still be read; pages that are missed from now on nobody would bring.
        if self._channel.lost.is_set():
            raise RequestRefused("the front-end has left")
        self._regions.listen()

    async def _postcopy_ack(self, request: Request) -> None:
        self._regions.acknowledged()

    async def _postcopy_end(self, request: Request) -> None:
        self._regions.end()
        # No page is missing any more: rings go on without fault-ahead.
        async with self._life.halted():
            pass

    def wake(self, wake: Wake) -> WakeAck:
        """Fulfils a message of the wake channel, which is a socket beside this connection's."""
        return self._regions.wake(wake)

    # ---- what goes back without having been asked for

    def _kicked(self, ring: Ring) -> None:
        self._life.kicked(ring)
        self._send_due()
        self._of_hooks.offer_notifiers()

    def _send_due(self) -> None:
        self._announcements.send_due()
        self._ring_messages.send_due()

    async def _set_backend_req_fd(self, request: Request) -> None:
        self._announcements.take_channel(fds_of(request))
        self._of_iommu.tell_due()

    # ---- what others see

    @property
    def memory(self) -> GuestMemory:
        """What is mapped now."""
        return self._regions.memory

    @property
    def rings(self) -> list[Ring]:
        """Every ring of the device."""
        return self._life.rings

    @property
    def data(self) -> DataThread | None:
        """The data thread, once the device has started."""
        return self._life.data

    @property
    def postcopy(self) -> PostcopyState:
        """Where the postcopy handshake stands."""
        return self._session.postcopy

    def measure(self) -> Iterator[Sample]:
        """Samples of what was done on this connection and of what there is now, without the device's own."""
        yield from self._life.measure()
        yield from self._watch.measure()
        yield from self._regions.measure()

    def state(self) -> dict[str, object]:
        """For the state dump: JSON-able values."""
        session = self._session
        return {
            "socket": self.name,
            "features": feature_names(session.features),
            "protocol_features": protocol_feature_names(session.protocol_features),
            "status": session.status.name or "",
            "regions": [region.state() for region in self.memory.regions],
            "memory_usable": self._regions.usable,
            "dirty_log": self._life.dirty_log is not None,
            "inflight": self._life.inflight is not None,
            "rings": [
                {**ring.state(), "started": agreed.started, "enabled": agreed.enabled}
                for ring, agreed in zip(self.rings, session.rings, strict=True)
            ],
            "postcopy": session.postcopy.name,
        }


_Handler = Callable[[Connection, Request], Awaitable[Reply | None]]


def _by_rings(fulfil: Callable[[RingRequests, Request], Awaitable[Reply | None]]) -> _Handler:
    return lambda connection, request: fulfil(connection._of_rings, request)


def _by_log(fulfil: Callable[[LogRequests, Request], Awaitable[Reply | None]]) -> _Handler:
    return lambda connection, request: fulfil(connection._of_log, request)


def _by_device(fulfil: Callable[[DeviceRequests, Request], Awaitable[Reply | None]]) -> _Handler:
    return lambda connection, request: fulfil(connection._of_device, request)


def _by_hook(fulfil: Callable[[HookRequests, Request], Awaitable[Reply | None]]) -> _Handler:
    return lambda connection, request: fulfil(connection._of_hooks, request)


HANDLERS: dict[int, _Handler] = {
    FrontendRequest.POSTCOPY_ACK: Connection._postcopy_ack,
    FrontendRequest.SET_FEATURES: Connection._set_features,
    FrontendRequest.SET_PROTOCOL_FEATURES: Connection._set_protocol_features,
    FrontendRequest.SET_MEM_TABLE: Connection._set_mem_table,
    FrontendRequest.SET_LOG_BASE: _by_log(LogRequests.set_log_base),
    FrontendRequest.SET_LOG_FD: _by_log(LogRequests.set_log_fd),
    FrontendRequest.SET_VRING_NUM: _by_rings(RingRequests.set_vring_num),
    FrontendRequest.SET_VRING_ADDR: _by_rings(RingRequests.set_vring_addr),
    FrontendRequest.SET_VRING_BASE: _by_rings(RingRequests.set_vring_base),
    FrontendRequest.GET_VRING_BASE: _by_rings(RingRequests.get_vring_base),
    FrontendRequest.SET_VRING_KICK: _by_rings(RingRequests.set_vring_kick),
    FrontendRequest.SET_VRING_ENDIAN: _by_rings(RingRequests.set_vring_endian),
    FrontendRequest.VRING_KICK: _by_rings(RingRequests.vring_kick),
    FrontendRequest.SET_VRING_CALL: _by_rings(RingRequests.set_vring_call),
    FrontendRequest.SET_VRING_ERR: _by_rings(RingRequests.set_vring_err),
    FrontendRequest.SEND_RARP: _by_device(DeviceRequests.send_rarp),
    FrontendRequest.NET_SET_MTU: _by_device(DeviceRequests.net_set_mtu),
    FrontendRequest.SET_BACKEND_REQ_FD: Connection._set_backend_req_fd,
    FrontendRequest.IOTLB_MSG: lambda connection, request: connection._of_iommu.iotlb_msg(request),
    FrontendRequest.GET_CONFIG: _by_device(DeviceRequests.get_config),
    FrontendRequest.SET_STATUS: _by_device(DeviceRequests.set_status),
    FrontendRequest.RESET_DEVICE: _by_device(DeviceRequests.reset_device),
    FrontendRequest.SET_CONFIG: _by_device(DeviceRequests.set_config),
    FrontendRequest.POSTCOPY_ADVISE: Connection._postcopy_advise,
    FrontendRequest.POSTCOPY_LISTEN: Connection._postcopy_listen,
    FrontendRequest.POSTCOPY_END: Connection._postcopy_end,
    FrontendRequest.GET_INFLIGHT_FD: Connection._get_inflight_fd,
    FrontendRequest.SET_INFLIGHT_FD: Connection._set_inflight_fd,
    FrontendRequest.ADD_MEM_REG: Connection._add_mem_reg,
    FrontendRequest.REM_MEM_REG: Connection._rem_mem_reg,
    FrontendRequest.SET_DEVICE_STATE_FD: Connection._set_device_state_fd,
    FrontendRequest.CHECK_DEVICE_STATE: Connection._check_device_state,
    FrontendRequest.GET_SHARED_OBJECT: _by_hook(HookRequests.get_shared_object),
    FrontendRequest.GET_SHMEM_CONFIG: _by_hook(HookRequests.get_shmem_config),
    FrontendRequest.CREATE_CRYPTO_SESSION: _by_hook(HookRequests.create_crypto_session),
    FrontendRequest.CLOSE_CRYPTO_SESSION: _by_hook(HookRequests.close_crypto_session),
    FrontendRequest.GPU_SET_SOCKET: _by_hook(HookRequests.gpu_set_socket),
}
"""What the runtime adds to what the session does by itself."""
