"""Which rings of a connection run, and the device's start before the first and stop after the last.

What belongs here: the one place that starts and stops rings and the device. Requests change what is wanted
(``protocol.session``, ``connection``); settling makes it so. What does not: what one ring needs for that (``ring``),
the threads (``dataplane``).

Control thread only. A start and a stop may take long; they run on the data thread, and a request waits for them only if
its answer promises something about them. GET_FEATURES never does, nor does a change to a ring that does not run.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from typing import Any

from vhostuser import measures
from vhostuser.dataplane import DataThread
from vhostuser.device import Device, DeviceFailed
from vhostuser.iotlb import DeviceIotlb
from vhostuser.memory import DirtyLog
from vhostuser.metrics import Sample
from vhostuser.protocol import BackendSession, Postcopy, ProtocolFeature, QueueBroken, VirtioFeature
from vhostuser.regions import Regions
from vhostuser.ring import Ring
from vhostuser.virtqueue import InflightRegion, NotTranslated

log = logging.getLogger("vhostuser")

# Seconds after the last hole was filled at which rings are nudged, see Lifecycle.memory_whole.
_NUDGES = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)


class _LeftBehind(Exception):
    """The device's start or stop is not waited for any more; that was logged."""


class Lifecycle:
    """Owns the rings and the data thread, which is made when the device first starts.

    ``failed`` is called when the device cannot go on: its front-end must not wait for ever. ``broke`` is called when a
    ring cannot go on, or cannot start as it is set up.
    """

    def __init__(
        self,
        name: str,
        device: Device,
        session: BackendSession,
        *,
        failed: Callable[[], None],
        broke: Callable[[Ring], None],
    ) -> None:
        self._name = name
        self._device = device
        self._session = session
        self._failed = failed
        self._broke = broke
        self.rings = [Ring(index) for index in range(device.queues)]
        self.dirty_log: DirtyLog | None = None
        self.log_event = -1
        """An eventfd, ours, that is signalled when the log has changed."""
        self.inflight: InflightRegion | None = None
        self.iotlb: DeviceIotlb | None = None
        """What addresses go through where ACCESS_PLATFORM was negotiated; ``iommu_requests`` fills it."""
        self.data: DataThread | None = None
        self._device_active = False
        """From before the device's start until after its stop."""
        self._device_busy = ""
        self._ending = False
        self._patience_over = asyncio.Event()
        self._changed = asyncio.Event()
        # Held while rings or the device are on their way between two states.
        self._lock = asyncio.Lock()
        self._settling: asyncio.Task[None] | None = None
        self._nudges: list[asyncio.TimerHandle] = []

    def begin(self, regions: Regions) -> None:
        """Starts settling; ``regions`` is the memory that rings are opened on."""
        self._settling = asyncio.ensure_future(self._settle_when_changed(regions))

    def changed(self) -> None:
        """Something changed: rings that may run by now are started soon."""
        self._changed.set()

    def memory_whole(self) -> None:
        """The last hole that a lost front-end or back-end left in memory was filled: rings may start.

        Nudges them for a while. Until its migration is over, QEMU's fault thread polls the number of the dead
        back-end's userfaultfd, and eats what is signalled on the eventfd that has the number since ("Read 8 bytes from
        userfaultfd expected 32", seen on 7.2: it took the very first kick, and the guest waited for its disk for ever).
        """
        self._changed.set()
        loop = asyncio.get_running_loop()
        self._nudges = [loop.call_later(delay, self._nudge) for delay in _NUDGES]

    def _nudge(self) -> None:
        for ring in self.rings:
            ring.nudge()

    def kicked(self, ring: Ring) -> None:
        """The ring's first kick was seen."""
        self._session.kicked(ring.index)
        self._changed.set()

    # ---- what requests wait for

    @contextlib.asynccontextmanager
    async def halted(self, *rings: Ring, leave: bool = False) -> AsyncIterator[None]:
        """The rings (default: all) do not run inside; those that may are started again afterwards.

        leave: requests under way are left in flight, if that was negotiated. What is done inside must not wait. Rings
        that do not run are not waited for either, even while others are being started: those are opened after the wait,
        as they are described then.
        """
        if any(ring.running for ring in rings or self.rings):
            async with self._lock:
                for ring in rings or self.rings:
                    await ring.halt(self._free_callers, leave=leave and self._leaves)
                yield
        else:
            yield
        self._changed.set()

    def set_log(self, dirty_log: DirtyLog | None, event: int) -> None:
        """What rings mark from here on, and an eventfd that hears of it, which becomes ours. Only while none runs."""
        if event != self.log_event and self.log_event >= 0:
            os.close(self.log_event)
        self.dirty_log, self.log_event = dirty_log, event
        if dirty_log is not None:
            dirty_log.tell(event)

    async def stop_unwanted(self) -> None:
        """Returns when nothing runs that may not, nor a device without rings. At once if that is so already."""
        if (self._device_active and not self._any_wanted()) or any(map(self._runs_unwanted, self.rings)):
            async with self._lock:
                await self._stop_unwanted()

    async def restart_device(self) -> None:
        """Stops everything, so that the device starts again with what has changed."""
        async with self._lock:
            for ring in self.rings:
                await ring.halt(self._free_callers)
            await self._stop_device()
        self._changed.set()

    async def close(self) -> None:
        """Stops and closes everything, a start under way included: it is followed by its stop. Never raises."""
        self._ending = True
        self._changed.set()
        for nudge in self._nudges:
            nudge.cancel()
        if self._settling is not None:
            await self._settling
        async with self._lock:
            await self._stop_unwanted()
        for ring in self.rings:
            ring.close()
        self.set_log(None, -1)
        self.inflight = None
        if self.data is not None:
            await self._end_thread(self.data)

    async def _end_thread(self, data: DataThread) -> None:
        try:
            await self._in_time(data.idle())
        except _LeftBehind:
            data.leave()
        else:
            await data.close()

    def leave_behind(self) -> None:
        """The front-end has long gone: a start or stop of the device that does not return is not waited for."""
        self._patience_over.set()

    def abandon(self) -> None:
        """The front-end has gone and requests do not end: a device in Python is cancelled, they are not completed.

        Whoever serves the rings next gets them again, by the in-flight region or by the used index.
        """
        if any(ring.running for ring in self.rings):
            log.warning("%s: requests that do not end are given up: the front-end has gone", self._name)
        for ring in self.rings:
            ring.abandon()

    def waits_for(self) -> str:
        """What a request that does not get on waits for, in words; empty if it is not for a ring or the device."""
        for ring in self.rings:
            if ring.stopping:
                return f"ring {ring.index} to stop: {_under_way(ring)}"
        return f"the device to {self._device_busy}" if self._device_busy else ""

    def measure(self) -> Iterator[Sample]:
        """Samples of every ring."""
        for ring, agreed in zip(self.rings, self._session.rings, strict=True):
            yield from measures.of_queue(ring.index, ring.stats())
            yield measures.STATE.sample(int(agreed.started), queue=ring.index, state="started")
            yield measures.STATE.sample(int(agreed.enabled), queue=ring.index, state="enabled")
            yield measures.STATE.sample(int(ring.running), queue=ring.index, state="running")
            yield measures.STATE.sample(int(ring.broken is not None), queue=ring.index, state="broken")

    def forget_translations(self) -> None:
        """Empties the device IOTLB if no ring runs: a front-end does not tell a stopped device what becomes invalid."""
        if self.iotlb is not None and not any(ring.running for ring in self.rings):
            self.iotlb.clear()

    # ---- what is wanted

    def _wanted(self, ring: Ring) -> bool:
        return not self._ending and ring.configured and self._served(ring)

    def _served(self, ring: Ring) -> bool:
        """As the two ends have agreed: also where a disabled ring has somebody to throw its requests away."""
        agreed = self._session.rings[ring.index]
        if not self._session.ready:
            return False
        return agreed.runs or (agreed.started and self._device.disabled_engine(ring.index) is not None)

    def _any_wanted(self) -> bool:
        return any(self._wanted(ring) for ring in self.rings)

    def _runs_unwanted(self, ring: Ring) -> bool:
        enabled = self._session.rings[ring.index].enabled
        return ring.running and not (self._wanted(ring) and ring.enabled == enabled)

    def _may_run(self, ring: Ring, regions: Regions) -> bool:
        """Wanted, and its memory may be touched: not before the front-end knows where it is."""
        return self._wanted(ring) and regions.usable and self._session.postcopy is not Postcopy.AWAITING_ACK

    @property
    def _leaves(self) -> bool:
        """Whether a ring that stops may leave requests in flight. Not to a successor that may never come."""
        return not self._ending and self._session.has(ProtocolFeature.GET_VRING_BASE_INFLIGHT)

    # ---- making it so

    async def _settle_when_changed(self, regions: Regions) -> None:
        while not self._ending:
            await self._changed.wait()
            self._changed.clear()
            try:
                async with self._lock:
                    await self._settle(regions)
            except Exception as error:
                self._give_up("start", error)

    async def _settle(self, regions: Regions) -> None:
        """Makes what runs equal to what may run. Call with the lock held."""
        await self._stop_unwanted()
        waiting = [ring for ring in self.rings if self._may_run(ring, regions) and not ring.running]
        if waiting and not self._device_active:
            await self._start_device()
        for ring in waiting:
            # Again, for the start may have taken long.
            if self._may_run(ring, regions):
                self._start(ring, regions)

    async def _start_device(self) -> None:
        if self._device.left_behind is not None and not self._device.left_behind.done():
            raise DeviceFailed("what an earlier front-end left behind has not returned yet")
        self._device.left_behind = None
        if self.data is None:
            self.data = DataThread(f"{self._name} data")
        self._device_active = True
        self._device_busy = "start"
        try:
            await self._in_time(self.data.run(self._begin_device()))
        except BaseException:
            self._device_active = False
            raise
        finally:
            self._device_busy = ""

    async def _begin_device(self) -> None:
        """On the data thread. A start that nobody waits for any more is followed by its stop at once: else a disk, say,
        would stay locked."""
        await self._device.start(self._session.features)
        if self._device.left_behind is not None:
            await self._device.stop()

    async def _in_time(self, coroutine: Coroutine[Any, Any, None]) -> None:
        """Waits for the device; raises _LeftBehind when it takes too long after its front-end has gone."""
        running = asyncio.ensure_future(coroutine)
        over = asyncio.ensure_future(self._patience_over.wait())
        try:
            await asyncio.wait((running, over), return_when=asyncio.FIRST_COMPLETED)
        finally:
            over.cancel()
        if running.done():
            return running.result()
        if self._device.left_behind is None:
            log.error("%s: the device's start or stop does not return and is left behind", self._name)
            self._device.left_behind = running
        raise _LeftBehind

    async def _stop_unwanted(self) -> None:
        """Call with the lock held."""
        for ring in self.rings:
            if self._runs_unwanted(ring):
                # QEMU disables a ring before it asks for its base: that must not wait longer than the latter.
                await ring.halt(self._free_callers, leave=self._leaves)
        if not self._any_wanted():
            await self._stop_device()

    async def _stop_device(self) -> None:
        """Call with the lock held, when no ring runs."""
        if not self._device_active or self.data is None:
            return
        self._device_busy = "stop"
        try:
            await self._in_time(self.data.run(self._device.stop()))
        except Exception as error:
            self._give_up("stop", error)
        finally:
            self._device_active = False
            self._device_busy = ""

    def _give_up(self, what: str, error: Exception) -> None:
        if not isinstance(error, _LeftBehind):
            # What a device does not foresee is shown in full.
            surprise = None if isinstance(error, DeviceFailed | OSError) else error
            log.error("%s: the device does not %s: %s", self._name, what, error, exc_info=surprise)
        self._ending = True
        self._failed()

    def _free_callers(self) -> None:
        # Of all rings: those of a device in Python share a thread.
        for ring in self.rings:
            ring.free_caller()

    # ---- one ring

    def _start(self, ring: Ring, regions: Regions) -> None:
        features = self._session.features
        logged = self.dirty_log if features & VirtioFeature.LOG_ALL.mask else None
        try:
            queue = ring.open(regions.memory, features, logged, self._inflight_of(ring), regions.touch, self.iotlb)
        except NotTranslated as waits:
            ring.obstacle = str(waits)
            return
        except QueueBroken as error:
            if ring.obstacle != str(error):
                log.error("%s: ring %d cannot start: %s", self._name, ring.index, error)
                self._broke(ring)
            ring.obstacle = str(error)
            return
        ring.obstacle = ""
        assert self.data is not None
        enabled = self._session.rings[ring.index].enabled
        engine = self._device.engine() if enabled else self._device.disabled_engine(ring.index)
        runner = ring.run(queue, self._device, engine, self.data, self._name, enabled=enabled)
        runner.finished.add_done_callback(lambda finished: self._ring_ended(ring, finished.result()))

    def _inflight_of(self, ring: Ring) -> InflightRegion | None:
        """Where the ring's requests are tracked. A ring that has more entries than the region goes without: QEMU asks
        for another size than its guest then takes (``virtqueue.INFLIGHT_ROOM``), and the machine has to boot."""
        if self.inflight is None or ring.size <= self.inflight.queue_size:
            return self.inflight
        told = "%s: ring %d has %d entries, the in-flight region %d: what is under way is lost with this process"
        log.warning(told, self._name, ring.index, ring.size, self.inflight.queue_size)
        return None

    def _ring_ended(self, ring: Ring, broken: QueueBroken | None) -> None:
        if broken is None:
            return
        log.error("%s: ring %d stopped: %s", self._name, ring.index, broken)
        ring.broken = broken
        self._broke(ring)
        self._changed.set()


def _under_way(ring: Ring) -> str:
    stats = ring.stats()
    if not stats.out:
        return "no request is under way"
    oldest = (time.monotonic_ns() - stats.oldest) / 1e9
    return f"{stats.out} {'request is' if stats.out == 1 else 'requests are'} under way, the oldest for {oldest:.1f} s"
