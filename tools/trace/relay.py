"""Passes everything on between two sockets: bytes, descriptors, the ends of streams, hang-ups.

What belongs here: what goes where and when, who owns each descriptor meanwhile, the second socket that a back-end is
given. What does not: what the bytes mean; the only message that this file knows is the one that brings that socket.

Messages are cut as ``codec.Reader`` cuts them, and for the same reason; but nothing is objected to. A header waits
until its twelve bytes are here, and goes on together with as much of the payload as has come with it. Everything is
passed on before it is looked at, its descriptors too, and looked at when nothing passes: who was sent something often
runs on this very processor, and not before we wait. A message whose size is nonsense makes everything after it its
payload, which passes as well; where the sender has put descriptors into the middle of a message, they go with the
bytes that they were received with.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

from vhostuser.channel import Channel, Fds
from vhostuser.protocol import HEADER_SIZE, FrontendRequest, Header, RemoteProtocolError
from vhostuser.protocol.witness import LARGEST_BODY, Side, Wire
from vhostuser.tools.trace.descriptors import describe, is_unix_stream
from vhostuser.tools.trace.events import Notice, Over, Report, Sighting
from vhostuser.tools.trace.faults import NOTHING, Faults, Plan

Piece = tuple[bytes, Fds]

_MOST_HELD = 8
"""Descriptors of one message that are kept until it is looked at; with more of them it is looked at at once, so that
ours are not all in use for the next."""


@dataclass(slots=True)
class _Passing:
    """A message on its way. data: its bytes so far, up to LARGEST_BODY of payload. left: bytes still to come.

    Owns the descriptors that came with it, until ``close``; `held` has them by the pieces that brought them.
    """

    began: int = 0
    data: bytearray = field(default_factory=bytearray)
    left: int = HEADER_SIZE
    header: Header | None = None
    late: int = 0
    plan: Plan = NOTHING
    gone: int = 0
    ended: bool = False
    held: list[Fds] = field(default_factory=list)

    @property
    def wanted(self) -> int:
        """Bytes to read next, at most; 0 when the message is complete."""
        return min(self.left, LARGEST_BODY)

    def add(self, piece: Piece) -> None:
        data, fds = piece
        self.held.append(fds)
        if self.data:
            self.late += len(fds)
        else:
            self.began = time.monotonic_ns()
        self.data += data[: HEADER_SIZE + LARGEST_BODY - len(self.data)]
        self.left -= len(data)
        if self.header is None and not self.left:
            self.header = Header.unpack(bytes(self.data))
            self.left = self.header.size

    def close(self) -> None:
        """Whatever has become of it: nothing of it stays with us."""
        for fds in self.held:
            fds.close()


class Killed(Exception):
    """The fault that was asked for: hang up on both."""


class Stream:
    """One direction of one socket.

    passed: takes each message that is complete. replace: may put another descriptor in the place of one.
    """

    def __init__(
        self,
        source: Channel,
        sink: Channel,
        plan: Callable[[Header], Plan],
        replace: Callable[[Header, Fds], None],
        passed: Callable[[_Passing], None],
    ) -> None:
        self._source = source
        self._sink = sink
        self._plan = plan
        self._replace = replace
        self._passed = passed

    async def run(self) -> int:
        """Until the source has hung up, or ended what it sends and then hung up. Returns bytes of a half message."""
        half = 0
        with contextlib.suppress(ConnectionError):  # then the other direction sees the hang-up
            half = await self._messages()
            self._sink.finish()
        await self._source.hung_up()
        return half

    async def _messages(self) -> int:
        while True:
            passing = _Passing()
            try:
                await self._message(passing)
            except BaseException:
                passing.close()
                raise
            if passing.ended:
                passing.close()
                return len(passing.data)
            self._passed(passing)
            if passing.plan.kill:
                raise Killed

    async def _message(self, passing: _Passing) -> None:
        """Passes one message on, or what there is of it at the end of the stream."""
        while passing.wanted and not passing.ended:
            pieces = await self._arrived(passing)
            await self._pass_on(passing, pieces)

    async def _arrived(self, passing: _Passing) -> list[Piece]:
        """The next pieces of a message: its whole header, or more of its payload; fewer at the end of the stream."""
        pieces: list[Piece] = []
        while passing.header is None or not pieces:
            piece = await self._source.receive(passing.wanted)
            if not piece[0]:
                passing.ended = True
                return pieces
            passing.add(piece)
            pieces.append(piece)
            if not passing.wanted:
                return pieces
        more = self._source.at_hand(passing.wanted)
        if more and more[0]:
            passing.add(more)
            pieces.append(more)
        return pieces

    async def _pass_on(self, passing: _Passing, pieces: list[Piece]) -> None:
        """Sends what has come, as one where no descriptors lie in between."""
        if not passing.gone and passing.header is not None:
            passing.plan = self._plan(passing.header)
            await asyncio.sleep(passing.plan.delay) if passing.plan.delay else None
        for data, fds in _joined(pieces):
            await self._send(passing, data, fds)

    async def _send(self, passing: _Passing, data: bytes, fds: Fds) -> None:
        if passing.header is not None and not passing.gone:
            data = passing.plan.corrupted(data)
            self._replace(passing.header, fds)
        await self._sink.send(data, () if passing.plan.drop else tuple(fds))
        passing.gone = time.monotonic_ns()


def _joined(pieces: list[Piece]) -> Iterator[Piece]:
    """Pieces, each with those behind it that have no descriptors."""
    while pieces:
        data, fds = pieces.pop(0)
        while pieces and not len(pieces[0][1]):
            data += pieces.pop(0)[0]
        yield data, fds


class Session:
    """One front-end and the back-end that it wants. Owns both sockets, and those of the back-end's own channel.

    report: see ``events``. began: when the trace began, in nanoseconds.
    """

    def __init__(self, number: int, report: Report, faults: Faults, *, began: int = 0) -> None:
        self._number = number
        self._report = report
        self._faults = faults
        self._began = began
        self._links: set[asyncio.Task[None]] = set()

    async def run(self, frontend: socket.socket, backend: socket.socket) -> None:
        """Until one of them has hung up; the back-end's channel ends with it."""
        try:
            await self._link(Wire.MAIN, frontend, backend)
        finally:
            for link in self._links:
                link.cancel()
            await asyncio.gather(*self._links, return_exceptions=True)
            over = Over(time.monotonic_ns() - self._began, self._number)
            self._report(lambda: over)

    def notice(self, text: str) -> None:
        """Something that is worth a line."""
        notice = Notice(time.monotonic_ns() - self._began, self._number, text)
        self._report(lambda: notice)

    async def _link(self, wire: Wire, frontend: socket.socket, backend: socket.socket) -> None:
        """Both directions of one socket, until one side has hung up."""
        with contextlib.ExitStack() as closing:
            near, far = (_channel(closing, sock) for sock in (frontend, backend))
            directions = {
                asyncio.ensure_future(self._stream(wire, Side.FRONTEND, near, far).run()): Side.FRONTEND,
                asyncio.ensure_future(self._stream(wire, Side.BACKEND, far, near).run()): Side.BACKEND,
            }
            try:
                done, _ = await asyncio.wait(directions, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for direction in directions:
                    direction.cancel()
                await asyncio.gather(*directions, return_exceptions=True)
            for direction in done:
                self._ended(wire, directions[direction], direction)

    def _ended(self, wire: Wire, side: Side, direction: asyncio.Future[int]) -> None:
        try:
            half = direction.result()
        except Killed:
            self.notice(f"{wire.value} socket: hung up on both, as asked (--kill-after)")
        except (OSError, RemoteProtocolError) as error:
            self.notice(f"{wire.value} socket: cannot go on: {error}")
        else:
            middle = f", {half} bytes into a message" if half else ""
            self.notice(f"{wire.value} socket: the {side.value} has hung up{middle}")

    def _stream(self, wire: Wire, sender: Side, source: Channel, sink: Channel) -> Stream:
        asks = sender is wire.asker
        brings_channel = wire is Wire.MAIN and asks
        return Stream(
            source,
            sink,
            lambda header: self._faults.plan(wire, header, request=asks),
            self._replace if brings_channel else lambda header, fds: None,
            lambda passing: self._passed(wire, sender, passing),
        )

    def _replace(self, header: Header, fds: Fds) -> None:
        """Takes the socket of the back-end's channel and gives one of ours in its place."""
        if header.request != FrontendRequest.SET_BACKEND_REQ_FD or len(fds) != 1 or not is_unix_stream(fds[0]):
            return
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        link = self._link(Wire.BACKEND, socket.socket(fileno=fds.take()), ours)
        task = asyncio.ensure_future(link)
        self._links.add(task)
        task.add_done_callback(self._links.discard)
        fds.extend(Fds((theirs.detach(),)))

    def _passed(self, wire: Wire, sender: Side, passing: _Passing) -> None:
        look = partial(self._look, wire, sender, passing)
        if sum(map(len, passing.held)) <= _MOST_HELD:
            self._report(look)
        else:
            sighting = look()
            self._report(lambda: sighting)

    def _look(self, wire: Wire, sender: Side, passing: _Passing) -> Sighting:
        """What there is to see of a message that has gone; then nothing of it is left."""
        at, held = passing.began - self._began, passing.gone - passing.began
        fds = tuple(describe(fd) for piece in passing.held for fd in piece)
        passing.close()
        return Sighting(
            at, self._number, wire, sender, bytes(passing.data), fds, passing.late, held, passing.plan.words
        )


def _channel(closing: contextlib.ExitStack, sock: socket.socket) -> Channel:
    closing.callback(sock.close)
    channel = Channel(sock)
    closing.callback(channel.close)
    return channel
