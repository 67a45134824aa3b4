"""One front-end: its negotiation, its memory and the life of its rings.

What belongs here: what each request does to the device. What does not: whether a request is allowed and what is sent
back (``protocol.session``), how bytes travel (``channel``), how a ring is served (``ring``, ``dataplane``).

Everything runs on the control thread and nothing touches guest memory. A ring is started and stopped in one place only,
``_settle``: requests change what is wanted, and settling makes it so. Requests that must see a ring stopped wait for
its thread; the loop serves everything else meanwhile and watches the socket for the loss of the front-end.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TypeVar

from vhostuser.backend_channel import BackendChannel
from vhostuser.channel import Channel, Fds
from vhostuser.dataplane import DataThread
from vhostuser.device import Device, DeviceFailed
from vhostuser.memory import DirtyLog, GuestMemory, Region
from vhostuser.postcopy import MemoryRecord, Postcopy
from vhostuser.protocol import (
    U64,
    BackendRequest,
    BackendSession,
    Config,
    Effect,
    Empty,
    FrontendRequest,
    Inflight,
    Log,
    MemoryRegion,
    MemoryTable,
    Payload,
    ProtocolFeature,
    QueueBroken,
    RemoteProtocolError,
    Reply,
    Request,
    RequestRefused,
    SingleRegion,
    VirtioFeature,
    VringAddress,
    VringFd,
    VringState,
)
from vhostuser.protocol import Postcopy as PostcopyState
from vhostuser.ring import Ring, usable_event
from vhostuser.virtqueue import InflightRegion

log = logging.getLogger("vhostuser")

P = TypeVar("P", bound=Payload)

# How often memory that a lost front-end left with holes is looked at again, in seconds.
_HOLES_AGAIN = 0.25

TRANSPORT_FEATURES = (
    VirtioFeature.LOG_ALL.mask
    | VirtioFeature.RING_INDIRECT_DESC.mask
    | VirtioFeature.RING_EVENT_IDX.mask
    | VirtioFeature.PROTOCOL_FEATURES.mask
    | VirtioFeature.VERSION_1.mask
)
"""The virtio feature bits that the runtime offers for every device."""

PROTOCOL_FEATURES = (
    ProtocolFeature.MQ,
    ProtocolFeature.LOG_SHMFD,
    ProtocolFeature.REPLY_ACK,
    ProtocolFeature.BACKEND_REQ,
    ProtocolFeature.CONFIG,
    ProtocolFeature.INFLIGHT_SHMFD,
    ProtocolFeature.CONFIGURE_MEM_SLOTS,
)
"""What the runtime offers whatever the device; PAGEFAULT comes from ``Postcopy``."""


class Connection:
    """Serves ``device`` to the front-end at the other end of ``sock``; owns the socket, memory and rings.

    ``postcopy`` is the back-end's half of postcopy, or None where PAGEFAULT is not offered. ``record`` remembers memory
    that must not be touched while it has holes. ``mem_slots`` is the answer to GET_MAX_MEM_SLOTS; with 0
    CONFIGURE_MEM_SLOTS is not offered.
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
        self.name = name
        self._device = device
        self._postcopy = postcopy
        self._record = record
        self._channel = Channel(sock)
        self._session = BackendSession(
            features=TRANSPORT_FEATURES | device.features,
            protocol_features=_offered(postcopy is not None, mem_slots),
            queue_count=device.queues,
            max_slots=mem_slots,
        )
        self._mem_slots = mem_slots
        self.rings = [Ring(index) for index in range(device.queues)]
        self.memory = GuestMemory()
        self._unregistered: list[Region] = []
        self._holes: list[int] = []
        self._dirty_log: DirtyLog | None = None
        self._inflight: InflightRegion | None = None
        self._backend_channel: BackendChannel | None = None
        self.data = DataThread(f"{name} data")
        self._device_started = False
        self._config_changed = False
        self._lock = asyncio.Lock()
        self._changed = asyncio.Event()
        device.announce += (self._announce,)

    # ---- the life of the connection

    async def serve(self) -> None:
        """Answers the front-end until it has gone; then everything is stopped, unmapped and closed.

        Never raises for what the peer does: a violation of the protocol is logged and ends the connection.
        """
        helpers = [asyncio.ensure_future(self._settle_when_changed()), asyncio.ensure_future(self._watch_loss())]
        try:
            await self._converse()
        except RemoteProtocolError as error:
            log.error("%s: the connection is closed: %s", self.name, error)
            with contextlib.suppress(ConnectionError):
                await self._channel.send(error.answer)
        except ConnectionError:
            pass
        finally:
            for helper in helpers:
                helper.cancel()
            await asyncio.shield(self._close())

    async def _converse(self) -> None:
        while (received := await self._next_request()) is not None:
            request, fds = received
            try:
                await self._answer(request)
            finally:
                fds.close()

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
            async with self._lock:
                await self._stop_what_may_not_run()
            self._changed.set()
            if outgoing is not None:
                await self._channel.send(outgoing.data, outgoing.fds)
        finally:
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
            return refusal

    async def _watch_loss(self) -> None:
        """Fails closed: when the front-end is lost in postcopy nobody will bring the missing pages any more."""
        await self._channel.lost.wait()
        if self._postcopy is not None and self._postcopy.active:
            log.error("%s: the front-end was lost in postcopy: guest memory is given up", self.name)
            self._postcopy.revoke(self.memory)

    async def _close(self) -> None:
        if self._postcopy is not None:
            self._postcopy.revoke(self.memory)
        async with self._lock:
            for ring in self.rings:
                ring.drop_kick()
            await self._stop_what_may_not_run()
        for ring in self.rings:
            ring.close()
        self._device.announce = tuple(fn for fn in self._device.announce if fn != self._announce)
        self._set_holes([])
        if self._backend_channel is not None:
            self._backend_channel.close()
        self.memory, self._dirty_log, self._inflight = GuestMemory(), None, None
        self._channel.close()
        await self.data.close()

    # ---- starting and stopping rings

    def _may_run(self, ring: Ring) -> bool:
        return (
            self._session.rings[ring.index].runs
            and ring.configured
            and not self._holes
            and self._session.postcopy is not PostcopyState.AWAITING_ACK
        )

    async def _settle_when_changed(self) -> None:
        while True:
            await self._changed.wait()
            self._changed.clear()
            try:
                async with self._lock:
                    await self._settle()
            except Exception as error:
                # What a device does not foresee is shown in full; either way its front-end must not wait for ever.
                log.error("%s: the device does not start or stop: %s", self.name, error, exc_info=_surprise(error))
                self._channel.end()

    async def _settle(self) -> None:
        """Makes what runs equal to what may run. Call with the lock held."""
        await self._stop_what_may_not_run()
        waiting = [ring for ring in self.rings if self._may_run(ring) and not ring.running]
        if waiting and not self._device_started:
            await self.data.run(self._device.start(self._session.features))
            self._device_started = True
        for ring in waiting:
            if self._may_run(ring):
                self._start(ring)
        if self._config_changed and self._device_started:
            self._announce()

    async def _stop_what_may_not_run(self) -> None:
        """Call with the lock held. When nothing may run any more, the device is stopped before this returns."""
        for ring in self.rings:
            if ring.running and not self._may_run(ring):
                await ring.halt()
        if self._device_started and not any(self._may_run(ring) for ring in self.rings):
            self._device_started = False
            await self.data.run(self._device.stop())

    def _start(self, ring: Ring) -> None:
        features = self._session.features
        touch = self._postcopy.touch_pool() if self._postcopy is not None and self._postcopy.active else None
        logged = self._dirty_log if features & VirtioFeature.LOG_ALL.mask else None
        try:
            queue = ring.open(self.memory, features, logged, self._inflight, touch)
        except QueueBroken as error:
            if ring.obstacle != str(error):
                log.error("%s: ring %d cannot start: %s", self.name, ring.index, error)
                ring.signal_err()
            ring.obstacle = str(error)
            return
        ring.obstacle = ""
        runner = ring.run(queue, self._device, self._device.engine(), self.data, self.name)
        runner.finished.add_done_callback(lambda finished: self._ring_ended(ring, finished))

    def _ring_ended(self, ring: Ring, finished: asyncio.Future[None]) -> None:
        error = finished.exception()
        if error is None:
            return
        log.error("%s: ring %d stopped: %s", self.name, ring.index, error)
        ring.broken = (
            error
            if isinstance(error, QueueBroken)
            else QueueBroken(ring.index, -1, 0, f"{type(error).__name__}: {error}")
        )
        ring.signal_err()
        self._changed.set()

    @contextlib.asynccontextmanager
    async def _halted(self, *rings: Ring) -> AsyncIterator[None]:
        """The rings (default: all) do not run inside; those that may are started again afterwards."""
        async with self._lock:
            for ring in rings or self.rings:
                await ring.halt()
            yield
        self._changed.set()

    def _kicked(self, ring: Ring) -> None:
        self._session.kicked(ring.index)
        self._changed.set()

    # ---- features and configuration space

    async def _set_features(self, request: Request) -> None:
        changes = _payload(request, U64).value ^ self._session.features
        if changes and any(ring.running for ring in self.rings):
            # The halt alone is not enough: a ring must not be opened again before finish() has the new features.
            async with self._halted():
                pass

    async def _get_config(self, request: Request) -> Reply:
        asked = _payload(request, Config)
        space = self._device.config()
        if asked.offset + asked.size > 256:
            raise RequestRefused(f"configuration space has 256 bytes, not {asked.offset + asked.size}")
        data = space.ljust(256, b"\0")[asked.offset : asked.offset + asked.size]
        return Reply(Config(asked.offset, asked.size, asked.flags, data))

    async def _set_config(self, request: Request) -> None:
        written = _payload(request, Config)
        self._device.set_config(written.offset, written.data, migration=bool(written.flags & 1))

    # ---- memory

    def _map(self, description: MemoryRegion, fd: int) -> Region:
        listening = self._listening
        kept = self.memory.same(description, fd)
        if kept is not None:
            return kept
        region = Region.map(fd, description, at_user=listening, hidden=listening)
        if listening:
            self._unregistered.append(region)
            if region.host != region.user:
                log.warning("%s: %s: the front-end's own address is taken", self.name, region)
        return region

    @property
    def _listening(self) -> bool:
        return self._session.postcopy in (PostcopyState.LISTENING, PostcopyState.AWAITING_ACK)

    async def _set_mem_table(self, request: Request) -> Reply | None:
        table = _payload(request, MemoryTable)
        fds = _fds(request)
        memory = GuestMemory(tuple(self._map(region, fd) for region, fd in zip(table.regions, fds, strict=True)))
        self._remember(fds)
        for region in self.memory.regions:
            if region not in memory.regions:
                self._release(region)
        async with self._halted():
            self.memory = memory
        if not self._listening:
            return None
        return Reply(MemoryTable(tuple(self._based(region) for region in table.regions)))

    async def _add_mem_reg(self, request: Request) -> Reply | None:
        description = _payload(request, SingleRegion).region
        if len(self.memory.regions) >= self._mem_slots:
            raise RequestRefused(f"all {self._mem_slots} memory slots are taken")
        memory = self.memory.add(self._map(description, _fds(request)[0]))
        self._remember(_fds(request))
        async with self._halted():
            self.memory = memory
        return Reply(SingleRegion(self._based(description))) if self._listening else None

    async def _rem_mem_reg(self, request: Request) -> None:
        gone = _payload(request, SingleRegion).region
        region = self.memory.find(gone.guest, gone.size, gone.user)
        self._release(region)
        async with self._halted():
            self.memory = self.memory.remove(region)

    def _release(self, region: Region) -> None:
        """In postcopy: whoever waits in a region that goes away must stop waiting before its rings can halt."""
        if self._postcopy is not None and self._postcopy.active:
            self._postcopy.release(region)

    def _based(self, description: MemoryRegion) -> MemoryRegion:
        """The description with our address in place of the front-end's."""
        host = self.memory.find(description.guest, description.size, description.user).host
        return MemoryRegion(description.guest, description.size, host, description.offset)

    def _remember(self, fds: Fds) -> None:
        """In postcopy: records the memory. Outside: memory so recorded is left alone until it has no holes."""
        if self._record is None:
            return
        if self._listening:
            self._record.add(fds)
        else:
            self._set_holes([os.dup(fd) for fd in fds if self._record.holds(fd)])
            if self._holes:
                log.warning(
                    "%s: rings wait: a postcopy migration into this memory is under way and pages are missing",
                    self.name,
                )
                self._look_at_holes()

    def _look_at_holes(self) -> None:
        assert self._record is not None
        if all(not self._record.holds(fd) for fd in self._holes):
            if self._holes:
                log.warning("%s: the memory is whole, rings may start", self.name)
                self._record.forget()
            self._set_holes([])
            self._changed.set()
        else:
            asyncio.get_running_loop().call_later(_HOLES_AGAIN, self._look_at_holes)

    def _set_holes(self, fds: list[int]) -> None:
        for fd in self._holes:
            os.close(fd)
        self._holes = fds

    async def _set_log_base(self, request: Request) -> Reply | None:
        if not isinstance(request.payload, Log):
            raise RequestRefused("a dirty log without a descriptor cannot be written: negotiate LOG_SHMFD")
        area = request.payload
        dirty_log = DirtyLog.map(_fds(request)[0], area.size, area.offset)
        async with self._halted():
            self._dirty_log = dirty_log
        return None

    # ---- rings

    async def _set_vring_num(self, request: Request) -> None:
        state = _payload(request, VringState)
        ring = self._stopped_ring(state.index)
        if not 1 <= state.num <= self._device.queue_size or state.num & (state.num - 1):
            raise RequestRefused(
                f"ring {state.index}: size {state.num} is not a power of two from 1 to {self._device.queue_size}"
            )
        ring.size = state.num

    async def _set_vring_addr(self, request: Request) -> None:
        address = _payload(request, VringAddress)
        ring = self.rings[address.index]
        async with self._halted(ring):
            ring.address = address
            ring.broken = None

    async def _set_vring_base(self, request: Request) -> None:
        state = _payload(request, VringState)
        self._stopped_ring(state.index).base = state.num

    def _stopped_ring(self, index: int) -> Ring:
        ring = self.rings[index]
        if ring.running:
            raise RequestRefused(f"ring {index} runs: stop it first (GET_VRING_BASE)")
        return ring

    async def _get_vring_base(self, request: Request) -> Reply:
        ring = self.rings[_payload(request, VringState).index]
        async with self._lock:
            await ring.halt()
            ring.drop_kick()
        return Reply(VringState(ring.index, ring.base))

    async def _set_vring_kick(self, request: Request) -> None:
        ring, fd = self._event(request, "kick")
        async with self._halted(ring):
            ring.set_kick(fd, lambda: self._kicked(ring))

    async def _set_vring_call(self, request: Request) -> None:
        ring, fd = self._event(request, "call")
        ring.set_call(fd)

    async def _set_vring_err(self, request: Request) -> None:
        ring, fd = self._event(request, "err")
        ring.set_err(fd)

    def _event(self, request: Request, name: str) -> tuple[Ring, int | None]:
        """The ring and the descriptor, now ours; None if the front-end said that there is none."""
        which = _payload(request, VringFd)
        if which.has_fd:
            usable_event(_fds(request)[0], name)
        return self.rings[which.index], _fds(request).take() if which.has_fd else None

    # ---- in-flight tracking

    async def _get_inflight_fd(self, request: Request) -> Reply:
        asked = _payload(request, Inflight)
        if not asked.num_queues or asked.num_queues > self._device.queues:
            raise RequestRefused(f"in-flight region for {asked.num_queues} rings of {self._device.queues}")
        fd, size = InflightRegion.create(asked.num_queues, asked.queue_size)
        return Reply(Inflight(size, 0, asked.num_queues, asked.queue_size), fds=(fd,))

    async def _set_inflight_fd(self, request: Request) -> None:
        given = _payload(request, Inflight)
        region = InflightRegion.map(_fds(request)[0], given)
        async with self._halted():
            self._inflight = region

    # ---- postcopy

    def _half(self) -> Postcopy:
        if self._postcopy is None:
            raise RequestRefused("PAGEFAULT was not offered")
        return self._postcopy

    async def _postcopy_advise(self, request: Request) -> Reply:
        return Reply(Empty(), fds=(os.dup(self._half().advise()),))

    async def _postcopy_listen(self, request: Request) -> None:
        if request.effect is Effect.LISTEN and self.memory.regions:
            raise RequestRefused("POSTCOPY_LISTEN must come before the memory table")
        self._half().listen()

    async def _postcopy_ack(self, request: Request) -> None:
        # QEMU repeats the acknowledgement when a guest reboots; nothing is left to register then.
        try:
            self._half().register(self._unregistered)
        except OSError as error:
            raise RequestRefused(f"the kernel does not register guest memory: {error.strerror}") from None
        self._unregistered = []

    async def _postcopy_end(self, request: Request) -> None:
        # With the end of postcopy no page is missing, so rings stop at once, and start again without fault-ahead.
        async with self._halted():
            self._half().end(self.memory)

    # ---- the back-end channel

    async def _set_backend_req_fd(self, request: Request) -> None:
        fd = _fds(request).take()
        try:
            channel = BackendChannel(fd, self._session.channel())
        except OSError as error:
            os.close(fd)
            raise RequestRefused(f"the descriptor is not a socket: {error.strerror}") from None
        if self._backend_channel is not None:
            self._backend_channel.close()
        self._backend_channel = channel

    def _announce(self) -> None:
        """CONFIG_CHANGE; a suspended device must not send anything, so it then waits for the first ring."""
        self._config_changed = not self._device_started
        if self._device_started and self._backend_channel is not None:
            self._backend_channel.send(BackendRequest.CONFIG_CHANGE_MSG)

    # ---- what others see

    @property
    def postcopy(self) -> PostcopyState:
        """Where the postcopy handshake stands."""
        return self._session.postcopy

    def state(self) -> dict[str, object]:
        """For the state dump: JSON-able values."""
        return {
            "socket": self.name,
            "features": self._session.features,
            "protocol_features": self._session.protocol_features,
            "regions": [region.state() for region in self.memory.regions],
            "rings": [ring.state() for ring in self.rings],
            "postcopy": self._session.postcopy.name,
        }


def _surprise(error: Exception) -> Exception | None:
    return None if isinstance(error, DeviceFailed) else error


def _payload(request: Request, kind: type[P]) -> P:
    assert isinstance(request.payload, kind)
    return request.payload


def _fds(request: Request) -> Fds:
    assert isinstance(request.fds, Fds)
    return request.fds


def _offered(pagefault: bool, mem_slots: int) -> int:
    bits = sum(feature.mask for feature in PROTOCOL_FEATURES)
    if pagefault:
        bits |= ProtocolFeature.PAGEFAULT.mask
    if not mem_slots:
        bits &= ~ProtocolFeature.CONFIGURE_MEM_SLOTS.mask
    return bits


HANDLERS: dict[int, Callable[[Connection, Request], Awaitable[Reply | None]]] = {
    FrontendRequest.POSTCOPY_ACK: Connection._postcopy_ack,
    FrontendRequest.SET_FEATURES: Connection._set_features,
    FrontendRequest.SET_MEM_TABLE: Connection._set_mem_table,
    FrontendRequest.SET_LOG_BASE: Connection._set_log_base,
    FrontendRequest.SET_VRING_NUM: Connection._set_vring_num,
    FrontendRequest.SET_VRING_ADDR: Connection._set_vring_addr,
    FrontendRequest.SET_VRING_BASE: Connection._set_vring_base,
    FrontendRequest.GET_VRING_BASE: Connection._get_vring_base,
    FrontendRequest.SET_VRING_KICK: Connection._set_vring_kick,
    FrontendRequest.SET_VRING_CALL: Connection._set_vring_call,
    FrontendRequest.SET_VRING_ERR: Connection._set_vring_err,
    FrontendRequest.SET_BACKEND_REQ_FD: Connection._set_backend_req_fd,
    FrontendRequest.GET_CONFIG: Connection._get_config,
    FrontendRequest.SET_CONFIG: Connection._set_config,
    FrontendRequest.POSTCOPY_ADVISE: Connection._postcopy_advise,
    FrontendRequest.POSTCOPY_LISTEN: Connection._postcopy_listen,
    FrontendRequest.POSTCOPY_END: Connection._postcopy_end,
    FrontendRequest.GET_INFLIGHT_FD: Connection._get_inflight_fd,
    FrontendRequest.SET_INFLIGHT_FD: Connection._set_inflight_fd,
    FrontendRequest.ADD_MEM_REG: Connection._add_mem_reg,
    FrontendRequest.REM_MEM_REG: Connection._rem_mem_reg,
}
"""What the runtime adds to what the session does by itself. A test compares both with the catalog."""
