"""The back-end's own requests, at the front-end's end of the socket that SET_BACKEND_REQ_FD gave it.

What belongs here: reading, answering, keeping what came for whoever asks. What does not: what the front-end's own
requests do (``frontend``); the back-end's end is ``backend_channel``.

An answer is decided at once, by a function that cannot wait: a back-end may do nothing else until it has the answer,
this front-end's requests included, so a decision that made one of them would never end.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections import deque
from collections.abc import Callable, Iterable
from typing import NamedTuple

from vhostuser.channel import Channel, Fds
from vhostuser.frontend.ring import FrontendRing
from vhostuser.protocol import (
    BackendRequest,
    Payload,
    RemoteProtocolError,
    Reply,
    Request,
    RequestRefused,
    Server,
    VringState,
)

log = logging.getLogger("vhostuser")

MOST_EVENTS = 256
"""Requests that wait to be collected; further ones are refused."""

Answerer = Callable[[Request], Reply | None]
"""Decides about a request: returns None or the reply that the message needs, or raises RequestRefused.

It may look at ``request.fds`` or take them (they are ``Fds``). Descriptors of a Reply are sent, and stay its own.
"""


def config_changes_only(request: Request) -> None:
    """The default: takes CONFIG_CHANGE_MSG, in which there is nothing to decide, and refuses everything else."""
    if request.code is not BackendRequest.CONFIG_CHANGE_MSG:
        raise RequestRefused(f"{request.code.name} is not served here")


NOTIFICATIONS = frozenset({BackendRequest.VRING_CALL, BackendRequest.VRING_ERR})
"""Signals and no events: what is to be done about them the answer does, and they are not kept."""


def notifying(rings: Iterable[FrontendRing], others: Answerer = config_changes_only) -> Answerer:
    """In-band notifications: VRING_CALL and VRING_ERR signal the eventfds of these rings, so that ``called`` and
    ``broken`` are as with descriptors. Everything else is for ``others``."""
    by_index = {ring.index: ring for ring in rings}

    def answer(request: Request) -> Reply | None:
        if request.code not in NOTIFICATIONS:
            return others(request)
        assert isinstance(request.payload, VringState)
        if (ring := by_index.get(request.payload.index)) is None:
            raise RequestRefused(f"{request.code.name} of ring {request.payload.index}, which is none of ours")
        os.eventfd_write(ring.call_fd if request.code is BackendRequest.VRING_CALL else ring.err_fd, 1)
        return None

    return answer


class BackendEvent(NamedTuple):
    """A request of the back-end that was answered with yes. fds: what the answer did not take; the receiver's."""

    code: BackendRequest
    payload: Payload
    fds: Fds


class BackendRequests:
    """Serves the back-end's requests on ``sock``, which it owns. Belongs to the loop's thread.

    ``session`` is the answering end (``FrontendSession.channel``). Every request that ``answer`` accepts, but for
    ``NOTIFICATIONS``, is then to be collected with ``next``, unless ``keep`` is false. What it refuses, or raises any
    other exception for, is refused; that is logged.
    """

    def __init__(
        self, sock: socket.socket, session: Server, answer: Answerer = config_changes_only, *, keep: bool = True
    ) -> None:
        self._channel = Channel(sock)
        self._session = session
        self._answer = answer
        self._keeps = keep
        self._events: deque[BackendEvent] = deque()
        self._more = asyncio.Event()
        self._error: RemoteProtocolError | None = None
        self._task = asyncio.ensure_future(self._serve())

    async def next(self) -> BackendEvent:
        """The oldest request that was not collected yet.

        Raises RemoteProtocolError when the back-end has broken the protocol, EOFError when it has closed its end or
        ``close`` was called; first come those that were accepted before.
        """
        while not self._events:
            if self._error is not None:
                raise self._error
            if self._task.done():
                raise EOFError("the back-end channel is closed")
            self._more.clear()
            await self._more.wait()
        return self._events.popleft()

    def close(self) -> None:
        """Closes the socket, and the descriptors of what was not collected. Again: nothing."""
        self._task.cancel()
        self._channel.close()
        while self._events:
            self._events.popleft().fds.close()
        self._more.set()

    # ---- serving

    async def _serve(self) -> None:
        try:
            while (request := await self._request()) is not None:
                await self._finish(request)
        except RemoteProtocolError as error:
            log.warning("the back-end channel is closed: %s", error)
            self._channel.offer(error.answer)
            self._error = error
        except ConnectionError:
            pass  # it has gone with an answer unread
        finally:
            self._channel.end()
            # Whoever waits looks at the task, which is done one step from now.
            self._task.add_done_callback(lambda _: self._more.set())

    async def _request(self) -> Request | None:
        """The next request, with its descriptors; None at the end of the stream."""
        first: Fds | None = None
        while True:
            data, came = await self._channel.receive(self._session.wanted)
            if not data:
                self._session.eof()
                return None
            first = came if first is None else first
            try:
                request = self._session.receive(data, came)
            except BaseException:
                came.close()
                first.close()
                raise
            if request is not None:
                return request

    async def _finish(self, request: Request) -> None:
        assert isinstance(request.fds, Fds)
        try:
            outcome = self._decide(request)
            outgoing = self._session.finish(request, outcome)
            if self._keeps and not isinstance(outcome, RequestRefused):
                self._keep(request, request.fds)
            if outgoing is not None:
                await self._channel.send(outgoing.data, outgoing.fds)
        finally:
            request.fds.close()

    def _decide(self, request: Request) -> Reply | RequestRefused | None:
        if request.refusal is not None:
            return request.refusal
        if len(self._events) >= MOST_EVENTS and request.code not in NOTIFICATIONS:
            return RequestRefused(f"{MOST_EVENTS} requests were not collected")
        try:
            return self._answer(request)
        except RequestRefused as refusal:
            log.info("back-end channel: %s", refusal)
            return refusal
        except Exception as error:
            log.exception("back-end channel: %s failed", request.code.name)
            return RequestRefused(f"{request.code.name} failed: {error}")

    def _keep(self, request: Request, fds: Fds) -> None:
        assert isinstance(request.code, BackendRequest)
        if request.code in NOTIFICATIONS:
            return
        kept = Fds()
        kept.extend(fds)
        self._events.append(BackendEvent(request.code, request.payload, kept))
        self._more.set()
