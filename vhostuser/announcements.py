"""What one front-end is told and asked of our own accord, and when.

What belongs here: the rules of time (a suspended device says nothing, nobody waits for a front-end that waits for us),
and what is told by the runtime itself. What does not: the socket (``backend_channel``), what devices ask (``hooks``).
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import os
from collections.abc import Callable, Coroutine, Iterator, Sequence
from typing import Any, TypeVar

from vhostuser.backend_channel import Answered, BackendChannel
from vhostuser.channel import Fds
from vhostuser.protocol import BackendRequest, BackendSession, Payload, ProtocolFeature, RequestRefused

T = TypeVar("T")

WITHHELD = 0.25
"""Seconds for which a front-end that waits for our answer may still answer us."""

_SUSPENDED = "a suspended device sends nothing"


class Announcements:
    """Owns the channel that the front-end gave last. ``name`` is the front-end's, for the log.

    Control thread only, but for ``run``, by which devices come there.

    No deadlock: a device may wait in ``ask`` while the front-end waits for that device's ring, in GET_VRING_BASE say,
    and answers nothing before it has its own answer (QEMU does, since 8.0). So an ``ask`` gives up when the front-end
    has waited for ``WITHHELD`` seconds; the answer is still read when it comes.
    """

    def __init__(self, name: str, session: BackendSession) -> None:
        self._name = name
        self._session = session
        self._channel: BackendChannel | None = None
        self._config_changed = False
        self._answering = False
        self._withheld = asyncio.Event()
        self._loop = asyncio.get_running_loop()

    @property
    def channel(self) -> BackendChannel | None:
        """What the front-end gave last."""
        return self._channel

    def take_channel(self, fds: Fds) -> None:
        """SET_BACKEND_REQ_FD: the first of them is the channel, instead of the one before. Raises RequestRefused."""
        fd = fds.take()
        session = self._session
        try:
            channel = BackendChannel(fd, session.channel(), session.has, self._name, lambda: self._answering)
        except OSError as error:
            os.close(fd)
            raise RequestRefused(f"the descriptor cannot be the back-end channel: {error.strerror}") from None
        self.close()
        self._channel = channel

    @contextlib.contextmanager
    def answering(self) -> Iterator[None]:
        """The front-end waits for what is done inside."""
        self._answering = True
        patience = asyncio.get_running_loop().call_later(WITHHELD, self._withheld.set)
        try:
            yield
        finally:
            patience.cancel()
            self._answering = False
            self._withheld.clear()

    # ---- telling and asking

    def tell(self, code: BackendRequest, payload: Payload | None = None) -> bool:
        """Sends a request without asking for an answer and without waiting; one that waits already is not sent twice.

        False where it cannot be sent: there is no channel (any more), the device is suspended, or the front-end has
        long not read. A message whose feature was not negotiated is not sent either, which is logged.
        """
        return self._channel is not None and not self._session.suspended and self._channel.send(code, payload)

    def request(
        self, code: BackendRequest, payload: Payload | None = None, fds: Sequence[int] = ()
    ) -> asyncio.Future[Answered]:
        """Sends a request and returns the answer to come, however late; see ``BackendChannel.request``.

        Raises RequestRefused where it cannot be sent.
        """
        if self._channel is None:
            raise RequestRefused(f"{code.name}: the front-end has given no back-end channel")
        if self._session.suspended:
            raise RequestRefused(f"{code.name}: {_SUSPENDED}")
        return self._channel.request(code, payload, fds)

    async def ask(self, code: BackendRequest, payload: Payload | None = None, fds: Sequence[int] = ()) -> Answered:
        """Sends a request, waits for the answer and returns it. Its descriptors are the caller's.

        Raises RequestRefused where the front-end says no, cannot be asked, or waits for us.
        """
        answered = self.request(code, payload, fds)
        try:
            await self.settled(answered, code)
        except BaseException:
            answered.add_done_callback(_close_late)
            raise
        return answered.result()

    async def settled(self, answered: asyncio.Future[Answered], code: BackendRequest) -> None:
        """Waits until ``answered`` is done. Raises RequestRefused where the front-end waits for us meanwhile."""
        withheld = asyncio.ensure_future(self._withheld.wait())
        try:
            await asyncio.wait((answered, withheld), return_when=asyncio.FIRST_COMPLETED)
        finally:
            withheld.cancel()
        if not answered.done():
            raise RequestRefused(f"{code.name}: the front-end waits for an answer of ours and gives none itself")

    async def run(self, coroutine: Coroutine[Any, Any, T], dispose: Callable[[T], object] = lambda _: None) -> T:
        """Runs ``coroutine`` on the control thread and waits for it on any loop.

        Who is cancelled on another loop waits no longer; the coroutine goes on, and ``dispose`` gets what it returns.
        """
        if asyncio.get_running_loop() is self._loop:
            return await coroutine
        running = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        waiting = asyncio.wrap_future(running)
        try:
            return await asyncio.shield(waiting)
        except asyncio.CancelledError:
            waiting.add_done_callback(lambda done: done.cancelled() or done.exception())
            running.add_done_callback(
                lambda done: None if done.cancelled() or done.exception() else dispose(done.result())
            )
            raise

    # ---- what the runtime tells

    def config_changed(self) -> None:
        """CONFIG_CHANGE is due."""
        self._config_changed = True
        self.send_due()

    def send_due(self) -> None:
        """After whatever the front-end was told: CONFIG_CHANGE, once for all changes, and nothing while suspended."""
        if self._channel is None:
            return
        if self._session.suspended:
            self._channel.drop_waiting(_SUSPENDED)
        elif self._config_changed:
            self._config_changed = False
            if self._session.has(ProtocolFeature.CONFIG):
                self._channel.send(BackendRequest.CONFIG_CHANGE_MSG)

    def close(self) -> None:
        """Closes the channel, if there is one; what was not sent or not answered is refused."""
        if self._channel is not None:
            self._channel.close()
        self._channel = None


def _close_late(answered: asyncio.Future[Answered]) -> None:
    if _succeeded(answered):
        answered.result()[1].close()


def _succeeded(done: asyncio.Future[Any] | concurrent.futures.Future[Any]) -> bool:
    return not done.cancelled() and done.exception() is None
