"""One ring of a connection: what the front-end told about it, its descriptors, and the thread that serves it.

What belongs here: the owner of a ring's eventfds and its start and stop. What does not: whether it should run, which
``lifecycle`` decides.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import stat
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from vhostuser._native import lib
from vhostuser.dataplane import DataThread, EngineRunner, LoopRunner, Runner
from vhostuser.device import Device, Engine
from vhostuser.iotlb import DeviceIotlb
from vhostuser.memory import DirtyLog, GuestMemory
from vhostuser.protocol import VHOST_VRING_F_LOG, QueueBroken, RequestRefused, VirtioFeature, VringAddress
from vhostuser.queuestats import QueueStats
from vhostuser.uffd import TouchPool
from vhostuser.virtqueue import DeviceQueue, InflightRegion, RingSetup

lib.vu_event_open()

_EVENTFD = Path("anon_inode:[eventfd]")

# How long a stop is waited for before something is done about it, in seconds, again and again.
_DELAY = 0.1

POLLED = -1
"""The kick of a ring whose front-end gave none: the ring is polled."""


def usable_event(fd: int, name: str, *, pipe: bool) -> int:
    """Makes an eventfd, or with ``pipe`` a pipe, that came from the front-end safe to wait on and to signal.

    A peer may pass anything: a blocking descriptor would stop the thread that signals it, a plain file cannot be waited
    for, and whoever waits for a pidfd or an O_PATH would spin. ``pipe`` is for waiting only: a thread that waits for
    room in a full pipe could be let go by its reader alone. Raises RequestRefused for those that cannot be used; the
    caller still owns ``fd`` then.
    """
    try:
        usable = Path(f"/proc/self/fd/{fd}").readlink() == _EVENTFD or (pipe and stat.S_ISFIFO(os.fstat(fd).st_mode))
        os.set_blocking(fd, False)
    except OSError:
        usable = False
    if not usable:
        raise RequestRefused(f"the {name} descriptor is no eventfd{' and no pipe' * pipe}")
    return fd


class Ring:
    """Owns the kick, call and err descriptors. All methods belong to the control thread; none touches guest memory."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.size = 0
        self.base = 0
        self.address: VringAddress | None = None
        self.swapped = False
        """Its byte order is not this machine's (SET_VRING_ENDIAN); of no meaning unless the driver is a legacy one."""
        self.kick: int | None = None
        self.obstacle = ""
        """Why the ring cannot be opened as it is set up now; tried again when something changes."""
        self.broken: QueueBroken | None = None
        """Sticky until the front-end gives a new kick or a new address."""
        self.stopping = False
        """Whether somebody waits for its stop."""
        self.enabled = False
        """While it runs: whether its requests are executed, and not thrown away."""
        self._call = self._err = -1
        self._calls: bool | None = None
        """Whether calls have a descriptor; None: the front-end has not said."""
        self._in_band = -1
        """An eventfd of ours that the data thread signals instead, for calls that go out as messages; kept for the
        life of the ring, as the number of the other is."""
        self._messages = False
        self._watched = False
        self._before = QueueStats()  # of the queues before this one
        self._queue: DeviceQueue | None = None
        self._runner: Runner | None = None

    @property
    def running(self) -> bool:
        """Whether a thread serves the ring."""
        return self._runner is not None

    @property
    def configured(self) -> bool:
        """Whether everything that a start needs has been said."""
        return self.size > 0 and self.address is not None and self.kick is not None and self.broken is None

    # ---- descriptors

    def set_kick(self, fd: int | None, kicked: Callable[[], None]) -> None:
        """Takes the kick eventfd (None: the ring is polled); ``kicked`` is called at the first kick, then nothing more.

        The counter is left for the data thread to read, so no kick is lost between the two.
        """
        self.drop_kick()
        self.broken = None
        self.kick = POLLED if fd is None else fd
        if fd is not None:
            asyncio.get_running_loop().add_reader(fd, self._first_kick, kicked)
            self._watched = True

    def _first_kick(self, kicked: Callable[[], None]) -> None:
        self._unwatch()
        kicked()

    def _unwatch(self) -> None:
        if self._watched and self.kick is not None:
            asyncio.get_running_loop().remove_reader(self.kick)
        self._watched = False

    def drop_kick(self) -> None:
        """Forgets and closes the kick; the loop stops watching first, or it would spin on a number used again."""
        self._unwatch()
        if self.kick is not None and self.kick != POLLED:
            os.close(self.kick)
        self.kick = None

    def kick_in_band(self, kicked: Callable[[], None]) -> None:
        """Kicks the ring for a front-end that does it by message; ``kicked`` as for ``set_kick``.

        Without a descriptor of the front-end's the thread is woken by one of ours, until the ring is stopped.
        """
        if self.kick is None:
            self.set_kick(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK), kicked)
        assert self.kick is not None
        if self.kick != POLLED:
            lib.vu_event_signal(self.kick)

    def call_in_band(self, called: Callable[[], None] | None) -> None:
        """Until the front-end says where to call, ``called`` is, on this loop, once for all calls that came together.

        None: nobody is. The data thread signals an eventfd as ever, so that no request costs a message.
        """
        loop = asyncio.get_running_loop()
        if self._in_band >= 0:
            loop.remove_reader(self._in_band)
        elif called is not None:
            self._in_band = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        if called is not None:
            loop.add_reader(self._in_band, self._pass_on, called)
        self._messages = called is not None
        if self._queue is not None:
            self._queue.set_call(self._where)

    def _pass_on(self, called: Callable[[], None]) -> None:
        os.eventfd_read(self._in_band)
        called()

    @property
    def _where(self) -> int:
        """What calls are signalled on; -1: they are not."""
        if self._calls is None:
            return self._in_band if self._messages else -1
        return self._call if self._calls else -1

    def set_call(self, fd: int | None) -> None:
        """Takes the call eventfd (None: the driver is not to be called), also while the ring runs.

        The number that the data thread writes to stays the same for the life of the ring: dup2 replaces what is
        behind it in one step, so that no thread can write to a descriptor that was closed and used again.
        """
        self._calls = fd is not None
        if fd is not None:
            self._call = _replace(self._call, fd)
        if self._queue is not None:
            self._queue.set_call(self._where)
            self.call()

    def call(self) -> None:
        """Calls the driver, whatever it asked for; a call without a reason does no harm."""
        if self._where >= 0:
            lib.vu_event_signal(self._where)

    def nudge(self) -> None:
        """Kicks the ring and, if it runs, calls the driver: for what somebody else may have taken from the eventfds."""
        if self.kick is not None and self.kick != POLLED:
            lib.vu_event_signal(self.kick)
        if self.running:
            self.call()

    def set_err(self, fd: int | None) -> None:
        """Takes the err eventfd, or drops the one there is."""
        if fd is not None:
            self._err = _replace(self._err, fd)
        elif self._err >= 0:
            os.close(self._err)
            self._err = -1

    def signal_err(self) -> bool:
        """Tells the front-end that the ring is broken; False if it has given nothing to be told by."""
        if self._err >= 0:
            lib.vu_event_signal(self._err)
        return self._err >= 0

    # ---- start and stop

    def setup(self, features: int) -> RingSetup:
        """What the queue is opened with."""
        assert self.address is not None
        modern = features & (VirtioFeature.VERSION_1.mask | VirtioFeature.RING_PACKED.mask)
        return RingSetup(
            size=self.size,
            desc=self.address.desc,
            avail=self.address.avail,
            used=self.address.used,
            log=self.address.log,
            log_used=bool(self.address.flags & VHOST_VRING_F_LOG and features & VirtioFeature.LOG_ALL.mask),
            base=self.base,
            index=self.index,
            features=features,
            swapped=self.swapped and not modern,
        )

    def open(
        self,
        memory: GuestMemory,
        features: int,
        log: DirtyLog | None,
        inflight: InflightRegion | None,
        touch: TouchPool | None,
        iotlb: DeviceIotlb | None,
    ) -> DeviceQueue:
        """Validates the ring against memory. Raises QueueBroken if it does not fit; touches nothing."""
        queue = self.setup(features).open(memory, log=log, inflight=inflight, iotlb=iotlb)
        queue.set_touch(touch)
        queue.set_call(self._where)
        queue.force_signal()
        return queue

    def run(
        self,
        queue: DeviceQueue,
        device: Device,
        engine: Engine | None,
        data: DataThread,
        name: str,
        *,
        enabled: bool = True,
    ) -> Runner:
        """Serves ``queue``, which the ring owns from here."""
        self.enabled = enabled
        assert self.kick is not None and self._runner is None
        self._unwatch()
        self._queue = queue
        if engine is None:
            self._runner = LoopRunner(data, device, queue, self.kick, name)
        else:
            self._runner = EngineRunner(engine, queue, self.kick, f"{name} ring {self.index}")
        # Requests may have been completed just before the ring stopped, their call lost with the old eventfd.
        self.call()
        return self._runner

    def uses(self, iova: int, size: int) -> bool:
        """Whether it runs and has memory at these I/O virtual addresses in use. After they were invalidated."""
        return self._queue is not None and self._queue.uses(iova, size)

    async def halt(self, delayed: Callable[[], None], *, leave: bool = False) -> None:
        """Stops serving: waits until every request that was taken is completed; then ``base`` is the next index.

        leave: where requests are tracked, those that do not end by themselves are given up and stay in flight. Waits as
        long as guest memory or the device makes a request wait, and calls ``delayed`` from time to time; the caller
        watches for the loss of the front-end. A ring that broke is left with its code in ``broken``.
        """
        runner = self._runner
        if runner is None:
            return
        if leave and self._queue is not None and self._queue.leave_in_flight():
            runner.abandon()
        else:
            runner.stop()
        self.stopping = True
        try:
            while not runner.finished.done():
                if not (await asyncio.wait((runner.finished,), timeout=_DELAY))[0]:
                    delayed()
        finally:
            self.stopping = False
        self.broken = runner.finished.result() or self.broken
        if self._runner is runner:
            self._runner = None
            self._close_queue()

    def abandon(self) -> None:
        """Stops serving without waiting for requests that do not end; ``halt`` as ever."""
        if self._runner is not None:
            self._runner.abandon()

    def free_caller(self) -> None:
        """Lets a thread go that waits in a call.

        The eventfd is the front-end's too: it can be made a blocking one and filled. One that has room is left alone,
        or a call that the driver has not yet seen would be lost.
        """
        if self._call >= 0 and not _has_room(self._call):
            with contextlib.suppress(OSError):
                os.preadv(self._call, [bytearray(8)], -1, os.RWF_NOWAIT)

    def _close_queue(self) -> None:
        if self._queue is not None:
            self.base = self._queue.base
            self._before = replace(self._before + self._queue.stats(), out=0, oldest=0)
            self._queue.close()
            self._queue = None

    def close(self) -> None:
        """Closes every descriptor; the ring must have been halted."""
        self.drop_kick()
        self._close_queue()
        self.call_in_band(None)
        for fd in (self._call, self._err, self._in_band):
            if fd >= 0:
                os.close(fd)
        self._call = self._err = self._in_band = -1

    def stats(self) -> QueueStats:
        """What its queues have done on this connection."""
        return self._before + self._queue.stats() if self._queue is not None else self._before

    def state(self) -> dict[str, object]:
        """For the state dump; JSON-able."""
        return {
            "index": self.index,
            "size": self.size,
            "running": self.running,
            "base": self._queue.base if self._queue is not None else self.base,
            "broken": str(self.broken) if self.broken else None,
            "obstacle": self.obstacle or None,
        }


def _has_room(fd: int) -> bool:
    poll = select.poll()
    poll.register(fd, select.POLLOUT)
    return bool(poll.poll(0))


def _replace(number: int, fd: int) -> int:
    """Puts ``fd`` behind ``number`` and closes ``fd``, or keeps it when there is no number yet."""
    if number < 0:
        return fd
    try:
        os.dup2(fd, number, inheritable=False)
    finally:
        os.close(fd)
    return number
