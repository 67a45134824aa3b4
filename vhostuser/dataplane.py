"""Data threads: where queues are served, away from the control thread.

What belongs here: the threads that may touch guest memory, the loop on which Python devices run, batching, and the stop
of both kinds of ring. What does not: when a ring starts or stops (``lifecycle``), how a thread begins (``threads``).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Protocol, TypeVar

from vhostuser.device import Device, Engine
from vhostuser.memory import explain
from vhostuser.protocol import QueueBroken
from vhostuser.threads import spawn
from vhostuser.virtqueue import DeviceQueue, Request

log = logging.getLogger("vhostuser")

T = TypeVar("T")

# How often a ring without kicks (VHOST_USER_VRING_NOFD_MASK) is looked at, in seconds. uvloop's timers count whole
# milliseconds, and less than one is none.
_POLL = 0.001
# How long a ring that has just been busy is looked at before its thread sleeps, in nanoseconds.
_PATIENCE = 50_000


def new_event_loop() -> asyncio.AbstractEventLoop:
    """A uvloop where it is installed, else asyncio's own."""
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop()
    return uvloop.new_event_loop()


class DataThread:
    """One thread with an event loop of its own, for the coroutines of one device."""

    def __init__(self, name: str) -> None:
        """Raises OSError or RuntimeError when the system has no descriptor or thread left."""
        self.loop = new_event_loop()
        self._control = asyncio.get_running_loop()
        self._ended = asyncio.Event()
        self._running: set[asyncio.Future[Any]] = set()
        try:
            self._thread = spawn(self._run, name)
        except BaseException:
            self.loop.close()
            raise

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        self.loop.run_forever()
        self.loop.close()
        with contextlib.suppress(RuntimeError):  # the control loop is gone, and with it the process
            self._control.call_soon_threadsafe(self._ended.set)

    async def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Runs ``coroutine`` on the data thread and waits for it on the caller's loop.

        Cancelling the wait does not cancel the coroutine: half of a stop would be worse than none.
        """
        running = asyncio.wrap_future(asyncio.run_coroutine_threadsafe(coroutine, self.loop))
        self._running.add(running)
        running.add_done_callback(self._running.discard)
        return await asyncio.shield(running)

    async def idle(self) -> None:
        """Waits until every coroutine is done."""
        if self._running:
            await asyncio.wait(self._running)

    def leave(self) -> None:
        """Cancels what it runs, and ends the thread when that is over; waits for nothing."""
        asyncio.run_coroutine_threadsafe(self._wind_up(), self.loop)

    async def _wind_up(self) -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        if others:
            await asyncio.wait(others)
        self.loop.stop()

    async def close(self) -> None:
        """Ends the thread, which must be idle, and waits until it is back on its loop."""
        self.loop.call_soon_threadsafe(self.loop.stop)
        await self._ended.wait()
        self._thread.join()  # it has nothing left to do


class Runner(Protocol):
    """A ring that is being served. Made and used on the control thread."""

    finished: asyncio.Future[QueueBroken | None]
    """Done when nobody serves the ring any more; why, if that was not asked for."""

    def stop(self) -> None:
        """Asks for the end: what was popped is completed, then ``finished`` is done. Returns at once."""

    def abandon(self) -> None:
        """Asks for the end without completing what does not end by itself. Returns at once."""


class EngineRunner:
    """One native engine on one ring, on a thread of the ring's own."""

    def __init__(self, engine: Engine, queue: DeviceQueue, kick: int, name: str) -> None:
        """Raises OSError or RuntimeError when the system has no descriptor or thread left."""
        self._loop = asyncio.get_running_loop()
        self.finished: asyncio.Future[QueueBroken | None] = self._loop.create_future()
        self._asked = False
        self._stop = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        try:
            spawn(lambda: self._run(engine, queue, kick), name)
        except BaseException:
            os.close(self._stop)
            raise

    def _run(self, engine: Engine, queue: DeviceQueue, kick: int) -> None:
        error: Exception | None = None
        try:
            code = engine.run(queue, kick, self._stop)
            if code < 0:
                error = queue.broken or QueueBroken(queue.index, -1, code, explain(code))
        except Exception as caught:
            error = caught
        with contextlib.suppress(RuntimeError):  # the control loop is gone, and with it the process
            self._loop.call_soon_threadsafe(self._end, queue.index, error)

    def _end(self, index: int, error: Exception | None) -> None:
        os.close(self._stop)
        self._stop = -1
        _resolve(self.finished, index, error, asked=self._asked)

    def stop(self) -> None:
        self._asked = True
        if self._stop >= 0:
            os.eventfd_write(self._stop, 1)

    def abandon(self) -> None:
        """As ``stop``: C waits for nothing but guest memory and the medium, and neither can be cut short."""
        self.stop()


class LoopRunner:
    """One Python device on one ring, on the connection's data thread."""

    def __init__(self, thread: DataThread, device: Device, queue: DeviceQueue, kick: int, name: str) -> None:
        self._loop = asyncio.get_running_loop()
        self._data_loop = thread.loop
        self.finished: asyncio.Future[QueueBroken | None] = self._loop.create_future()
        self._asked = False
        self._served: ServedQueue | None = None
        self._data_loop.call_soon_threadsafe(self._begin, device, queue, kick, name)

    def _begin(self, device: Device, queue: DeviceQueue, kick: int, name: str) -> None:
        # Made here and not in the task, which has not begun yet when a stop comes right behind.
        try:
            self._served = ServedQueue(queue, kick, device.requests_at_once, name)
        except Exception as error:
            self._end(queue.index, error)
        else:
            self._task = asyncio.ensure_future(self._run(device, self._served))

    async def _run(self, device: Device, served: ServedQueue) -> None:
        error: Exception | None = None
        try:
            await served.run(asyncio.ensure_future(device.serve(served)))
        except Exception as caught:
            error = caught
        finally:
            served.close()
        self._end(served.index, error)

    def _end(self, index: int, error: Exception | None) -> None:
        def resolve() -> None:
            _resolve(self.finished, index, error, asked=self._asked)

        with contextlib.suppress(RuntimeError):  # the control loop is gone, and with it the process
            self._loop.call_soon_threadsafe(resolve)

    def stop(self) -> None:
        self._pass_on(ServedQueue.stop)

    def abandon(self) -> None:
        self._pass_on(ServedQueue.abandon)

    def _pass_on(self, end: Callable[[ServedQueue], None]) -> None:
        def pass_on() -> None:
            if self._served is not None:
                end(self._served)

        self._asked = True
        self._data_loop.call_soon_threadsafe(pass_on)


def _resolve(finished: asyncio.Future[QueueBroken | None], index: int, error: Exception | None, *, asked: bool) -> None:
    """Whoever stops serving without having been asked has broken the ring: nobody looks at it any more."""
    if finished.done():
        return
    if error is None and not asked:
        finished.set_result(QueueBroken(index, -1, 0, "the device has stopped serving it"))
    elif error is None or isinstance(error, QueueBroken):
        finished.set_result(error)
    else:
        finished.set_result(QueueBroken(index, -1, 0, f"{type(error).__name__}: {error}"))


class ServedQueue:
    """What ``Device.serve`` works on: a queue with its kicks, in batches. Lives on the data thread.

    One used-index update and at most one call eventfd write are made for ``GROUP`` requests, or for all that were
    completed in one turn of the loop.
    """

    def __init__(self, queue: DeviceQueue, kick: int, limit: int, name: str) -> None:
        self._queue = queue
        self._name = name
        self._kick = kick
        self._limit = limit
        self._loop = asyncio.get_running_loop()
        self._wake = asyncio.Event()
        self._broken: QueueBroken | None = None
        self._stopping = False
        self._stopped = asyncio.Event()
        self._flushing = False
        queue.on_finished = self._finished
        if kick >= 0:
            self._loop.add_reader(kick, self._kicked)
        if queue.ahead_fd >= 0:
            self._loop.add_reader(queue.ahead_fd, self._wake.set)
        if queue.translated_fd >= 0:
            self._loop.add_reader(queue.translated_fd, self._translated)

    @property
    def index(self) -> int:
        """The ring's index."""
        return self._queue.index

    async def requests(self, most: int = 64) -> list[Request]:
        """The next 1 to ``most`` requests; waits until there is one. May touch guest memory.

        Complete each with ``Request.complete``, in any order. Raises QueueBroken when the driver broke the ring, after
        what was taken before has been returned to it.
        """
        # Without this a busy ring would never let the loop see anything else, the stop among it.
        await asyncio.sleep(0)
        patience = time.perf_counter_ns() + _PATIENCE
        while True:
            if batch := self._take(most):
                return batch
            if self._broken is not None and not self._queue.out:
                raise self._broken
            # A driver that is fast is about to offer more; asking for a kick and sleeping would cost both sides more.
            if self._stopping or self._queue.out or time.perf_counter_ns() > patience:
                await self._idle()

    def _take(self, most: int) -> list[Request]:
        """What can be had at once; requests whose pages are here go before those that wait for some."""
        self._wake.clear()
        queue = self._queue
        # Also when stopping: these were popped before, and must be completed.
        ready = queue.collect(most) if queue.ahead_fd >= 0 else []
        room = min(most - len(ready), self._limit - queue.out) if self._takes else 0
        if room > 0:
            popped = self._pop(room)
            ready += popped if queue.ahead_fd < 0 else queue.resident(popped)
        return ready

    @property
    def _takes(self) -> bool:
        return not self._stopping and self._broken is None

    def _pop(self, most: int) -> list[Request]:
        try:
            return self._queue.pop(most)
        except QueueBroken as error:
            self._broken = error
            return []

    async def _idle(self) -> None:
        """Sleeps until a kick, a page, a completion or the stop."""
        if self._takes and self._queue.out < self._limit and self._queue.arm():
            return
        if self._kick < 0:
            self._loop.call_later(_POLL, self._wake.set)
        await self._wake.wait()

    def _kicked(self) -> None:
        try:
            gone = not os.read(self._kick, 8)
        except BlockingIOError:
            gone = False
        except OSError:
            gone = True
        self._queue.kicked()
        if gone:
            # A pipe whose other end is closed is readable for ever: look at the ring from time to time instead.
            self._loop.remove_reader(self._kick)
            self._kick = -1
        self._wake.set()

    def _translated(self) -> None:
        os.eventfd_read(self._queue.translated_fd)
        self._wake.set()

    def _finished(self, count: int) -> None:
        if count > 1:
            self._flush()
        elif not self._flushing:
            self._flushing = True
            self._loop.call_soon(self._end_turn)

    def _end_turn(self) -> None:
        self._flushing = False
        self._flush()

    def _flush(self) -> None:
        # The error is sticky: the next pop raises it where it is expected.
        with contextlib.suppress(QueueBroken):
            self._queue.flush()
        self._wake.set()
        if self._stopping and not self._queue.out:
            self._stopped.set()

    def stop(self) -> None:
        """No new request is handed out; ``run`` ends when those under way have been completed."""
        self._stopping = True
        self._wake.set()
        if not self._queue.out:
            self._stopped.set()

    def abandon(self) -> None:
        """``run`` ends as soon as ``serving`` lets itself be cancelled; requests under way are not completed."""
        self._stopping = True
        self._wake.set()
        self._stopped.set()

    async def run(self, serving: asyncio.Future[None]) -> None:
        """Waits for the end of ``serving``, or for the stop, and then cancels it."""
        stopped = asyncio.ensure_future(self._stopped.wait())
        await asyncio.wait((serving, stopped), return_when=asyncio.FIRST_COMPLETED)
        stopped.cancel()
        if not serving.done():
            serving.cancel()
        try:
            await serving
        except asyncio.CancelledError:
            pass
        except BaseExceptionGroup as group:
            broken, other = group.split(QueueBroken)
            if broken is None:
                raise
            raise _first(broken) from other
        self._queue.flush()

    def close(self) -> None:
        """Stops watching; the descriptors belong to others."""
        # Else the queue and this object keep each other, and guest memory mapped, until a garbage collection.
        self._queue.on_finished = None
        if self._kick >= 0:
            self._loop.remove_reader(self._kick)
        if self._queue.ahead_fd >= 0:
            self._loop.remove_reader(self._queue.ahead_fd)
        if self._queue.translated_fd >= 0:
            self._loop.remove_reader(self._queue.translated_fd)

    async def dispatch(
        self,
        handle: Callable[[Request], Awaitable[None]],
        failed: Callable[[Request, Exception], None],
        group: asyncio.TaskGroup,
    ) -> None:
        """Calls ``handle`` for every request, up to the limit at once, on tasks of ``group`` and on this one."""
        await _Workers(self, handle, failed, group).work()

    def log_failure(self, what: str, error: BaseException) -> None:
        """One line, and a traceback for those who debug."""
        where, kind = f"{self._name}: ring {self.index}", type(error).__name__
        log.error("%s: %s: %s: %s", where, what, kind, error, exc_info=log.isEnabledFor(logging.DEBUG))


class _Workers:
    """The tasks that call ``handle`` for the requests of one queue.

    A handler that never suspends costs no task and no turn of the loop: one worker takes a batch, goes through it and
    takes the next. Only when it is suspended does another go on: each has the loop look, right behind it, whether
    something is left to do.
    """

    def __init__(
        self,
        served: ServedQueue,
        handle: Callable[[Request], Awaitable[None]],
        failed: Callable[[Request, Exception], None],
        group: asyncio.TaskGroup,
    ) -> None:
        self._served = served
        self._handle = handle
        self._failed = failed
        self._group = group
        self._loop = asyncio.get_running_loop()
        self._ready: deque[Request] = deque()
        self._idle: list[asyncio.Future[None]] = []
        self._taking = False  # one of them waits for requests
        self._over = False

    async def work(self) -> None:
        """One worker. It ends when it is cancelled or the queue breaks, and then all do."""
        try:
            while True:
                if not self._ready and not self._taking:
                    await self._take()
                self._loop.call_soon(self._look)
                await self._go_through()
                if self._taking:
                    future: asyncio.Future[None] = self._loop.create_future()
                    self._idle.append(future)
                    await future
        finally:
            self._over = True

    async def _take(self) -> None:
        self._taking = True
        try:
            self._ready.extend(await self._served.requests())
        finally:
            self._taking = False

    def _look(self) -> None:
        if self._over or (self._taking and not self._ready):
            return
        if self._idle:
            self._idle.pop().set_result(None)
        else:
            self._group.create_task(self.work())

    async def _go_through(self) -> None:
        ready, handle = self._ready, self._handle
        while ready:
            request = ready.popleft()
            try:
                await handle(request)
            except Exception as error:
                self._fail(request, error)
            except asyncio.CancelledError:
                if _being_cancelled():
                    raise
                self._fail(request, RuntimeError("something that it waited for was cancelled"))
            if not request.completed:
                request.complete()

    def _fail(self, request: Request, error: Exception) -> None:
        self._served.log_failure("a request failed", error)
        try:
            if not request.completed:
                self._failed(request, error)
        except Exception as again:
            self._served.log_failure("the device could not report that", again)


def _being_cancelled() -> bool:
    task = asyncio.current_task()
    return task is None or task.cancelling() > 0


def _first(group: BaseExceptionGroup[QueueBroken]) -> BaseException:
    leaf: BaseException = group
    while isinstance(leaf, BaseExceptionGroup):
        leaf = leaf.exceptions[0]
    return leaf
