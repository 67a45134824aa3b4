"""What an author of a device subclasses.

What belongs here: the contract between a device and the runtime. What does not: sockets, messages, the life of rings
(``lifecycle``), threads (``dataplane``).

A device is written in one of three tiers, the first that is fast enough:

1. ``async def handle(self, request)``: one request at a time, any number of them under way at once;
2. ``async def serve(self, queue)``: batches, the device decides what is taken and when;
3. ``def engine(self)``: a native engine, one thread per ring in C.

Everything that the runtime calls runs on the connection's *data thread*, except what says otherwise. The data thread
may wait for guest memory, so nothing there may hold a lock that the control thread takes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, ClassVar, Protocol

from vhostuser.metrics import Metric, Sample
from vhostuser.protocol import RequestRefused

if TYPE_CHECKING:
    from vhostuser.dataplane import ServedQueue
    from vhostuser.virtqueue import DeviceQueue, Request


class Engine(Protocol):
    """A native data path. One engine serves all rings of its device."""

    def run(self, queue: DeviceQueue, kick: int, stop: int) -> int:
        """Serves ``queue`` until the eventfd ``stop`` is readable and no request is under way.

        Runs on a thread of the ring's own and stays in C, the GIL released; may touch guest memory and block.
        ``kick`` is an eventfd or -1 for a ring without kicks, which is polled. Returns 0, or a negative ``VU_E_``
        code if the ring broke.
        """


class DeviceFailed(Exception):
    """Raised by ``Device.start``: the device cannot work now. One line that says why and what helps.

    The runtime logs it and closes the connection; the front-end may come back.
    """


class Device:
    """A virtio device without its transport."""

    virtio_id: ClassVar[int] = 0
    """The device's number in the virtio specification, section "Device Types"."""

    queues: int = 1
    """How many rings the device has (GET_QUEUE_NUM)."""

    queue_num: int | None = None
    """What GET_QUEUE_NUM says where that is not ``queues``: of a network device front-ends expect pairs of rings."""

    queue_size: int = 1024
    """The largest ring that the device accepts, in entries; at most 32768. Nobody asks for it, so fewer than 1024 are
    for devices whose front-ends are known: QEMU 10 makes rings of 1024 for an input device, and does not survive a
    refusal."""

    requests_at_once: int = 128
    """How many requests of one ring may be in ``handle`` at the same time."""

    features: int = 0
    """Feature bits of the device type (0 to 23, 50 and up), and IN_ORDER where every ring returns requests in the order
    in which it took them. The transport adds its own."""

    metrics: ClassVar[tuple[Metric, ...]] = ()
    """What the device counts beside what the runtime does for every queue; ``measure`` has the numbers."""

    protocol_features: int = 0
    """Protocol feature bits of the device type: RARP with ``announce_guest``, MTU with ``set_mtu``, DEVICE_STATE with
    ``save_state`` and ``load_state``; CROSS_ENDIAN where requests are read in the order of ``Request.byteorder``;
    GET_VRING_BASE_INFLIGHT where a request may be cut off at any time and done again from the start, by whoever serves
    the ring next."""

    state_limit: int = 16 << 20
    """The most bytes that ``load_state`` is given."""

    mem_slots: int = 509
    """The largest answer to GET_MAX_MEM_SLOTS; 0: memory comes as whole tables only."""

    postcopy_obstacle: str = ""
    """Why programs do not offer postcopy for this device unless they are told to; empty: nothing is in the way."""

    announce: tuple[Callable[[], None], ...] = ()
    """The runtime's: what ``config_changed`` calls, one for each connection."""

    left_behind: asyncio.Future[None] | None = None
    """The runtime's: a ``start`` or ``stop`` that was not waited for any longer; the device starts again when it is
    done."""

    def config(self) -> bytes:
        """The whole configuration space as it is now. Called on the control thread; must not block."""
        return b""

    def set_config(self, offset: int, data: bytes, *, migration: bool) -> None:
        """The driver (or, with ``migration``, the front-end after a migration) writes configuration space.

        Called on the control thread; must not block. Raises RequestRefused for bytes that are not writable (unless
        ``migration``); by default nothing is.
        """
        raise RequestRefused(f"configuration space is read-only (write of {len(data)} bytes at offset {offset})")

    def config_changed(self) -> None:
        """Tells every front-end that configuration space has changed (CONFIG_CHANGE). Control thread only."""
        for announce in self.announce:
            announce()

    def check_features(self, features: int) -> None:
        """Raises RequestRefused for virtio bits that the device cannot work with: a set without VERSION_1, say.

        All of them were offered. The front-end learns of it by the refusal of SET_FEATURES, and where STATUS was
        negotiated by FEATURES_OK, which does not stay. Control thread; must not block.
        """

    def reset(self) -> None:
        """Forgets what drivers have told it and is as it was made (RESET_DEVICE). Every ring is stopped, and so is the
        device. Control thread; must not block."""

    def set_mtu(self, mtu: int) -> None:
        """The MTU that the guest was told, in bytes (NET_SET_MTU). Control thread; must not block.

        Raises RequestRefused.
        """
        raise RequestRefused("the device has no MTU")

    def announce_guest(self, mac: bytes) -> None:
        """The guest with this address of 6 bytes has come from another host (SEND_RARP): tell the network.

        Control thread; must not block. Raises RequestRefused.
        """
        raise RequestRefused("the device has no network")

    def save_state(self) -> bytes:
        """What the driver could notice if it were lost, for a device of the same kind on another host (DEVICE_STATE).

        Called on the control thread while every ring is stopped; must not block. Rings and configuration space are
        carried by the front-end. Raises RequestRefused; the device may be started again afterwards, if migration fails.
        """
        raise RequestRefused("the device has no state")

    def load_state(self, state: bytes) -> None:
        """Goes on as the device that ``save_state`` described, at most ``state_limit`` bytes from an untrusted source.

        Called on the control thread before any ring starts; must not block. Raises anything, such as ``struct.error``,
        for what is no state of such a device, and is then as it was before: the front-end is told by
        CHECK_DEVICE_STATE, and the connection goes on.
        """
        raise RequestRefused("the device has no state")

    async def start(self, features: int) -> None:
        """The first ring is about to start; ``features`` are the negotiated virtio bits. May block.

        Raises DeviceFailed when the device cannot serve. Half a minute after the front-end has gone it is not waited
        for any more, and cancelled at its next ``await``; one that returns in spite of that is followed by ``stop``.
        """

    async def stop(self) -> None:
        """The last ring has stopped and no request is under way; also after the front-end was lost. May block, and is
        waited for as ``start`` is."""

    def engine(self) -> Engine | None:
        """The native engine, asked for after ``start``; None for a device in Python."""
        return None

    def disabled_engine(self, index: int) -> Engine | None:
        """What serves ring ``index`` while it is started but disabled, asked for after ``start``; None: nobody does.

        "The back-end must process the ring without causing any side effects" (Ring states): where requests would pile
        up, throw them away.
        """
        return None

    async def serve(self, queue: ServedQueue) -> None:
        """Serves one ring until it is stopped (this coroutine is then cancelled while it waits for requests)."""
        async with asyncio.TaskGroup() as group:
            await queue.dispatch(self.handle, self.failed, group)

    async def handle(self, request: Request) -> None:
        """Serves one request: ``request.read``, ``request.write``.

        On return the request is completed with what was written into it, unless ``request.complete`` was called.
        Cancelled if it has not returned some seconds after the front-end has gone, and, where the device takes part in
        GET_VRING_BASE_INFLIGHT, when its ring is stopped; the request is then not completed, and comes again.
        """
        raise NotImplementedError(f"{type(self).__name__} has neither handle() nor serve() nor engine()")

    def failed(self, request: Request, error: Exception) -> None:
        """``handle`` raised: write the device's own error status. By default the request is completed empty."""

    def measure(self) -> Iterable[Sample]:
        """Samples of ``metrics`` as they are now, with a counter's whole life. Control thread; must not block."""
        return ()

    def state(self) -> dict[str, object]:
        """What SIGUSR1 shows of the device beside what it measures: JSON-able values. Control thread."""
        return {}
