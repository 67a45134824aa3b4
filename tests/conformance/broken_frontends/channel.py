"""Faults at the front-end's end of the back-end's own channel.

What belongs here: how requests of the back-end are answered wrongly.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

from tests.conformance.broken_frontends.faults import (
    fault,
)
from tests.conformance.frontends import Life
from vhostuser.channel import Fds
from vhostuser.protocol import (
    HEADER_SIZE,
    NEED_REPLY,
    REPLY,
    VERSION,
    FrontendRequest,
    Header,
    ProtocolFeature,
    VhostUserError,
    VirtioFeature,
)
from vhostuser.raw import receive_message

F, P, V = FrontendRequest, ProtocolFeature, VirtioFeature


class Channel(Life):
    """Answers the back-end's requests by itself: right, until a fault is put in."""

    async def channel(self) -> None:
        await super().channel()
        backend = self.talk.backend
        if backend is not None:
            backend._task.cancel()
            await asyncio.gather(backend._task, return_exceptions=True)
            self.served = 0
            backend._task = asyncio.ensure_future(self._serve_channel(backend._channel))

    async def _serve_channel(self, channel: Any) -> None:
        with contextlib.suppress(ConnectionError, VhostUserError):
            while (header := await self.read(channel)) is not None:
                self.served += 1
                await self.reply(channel, header)
                if header.request == 2:
                    await self.changed()
        channel.end()

    async def read(self, channel: Any) -> Header | None:
        message = await receive_message(channel)
        if message is None or len(message.body) < message.header.size:
            self.ended(half=message is not None)
            return None
        self.release(message.fds)
        good = message.header.request == 2 and message.header.flags in (VERSION, VERSION | NEED_REPLY)
        return message.header if good and not message.body and not len(message.fds) else None

    def release(self, fds: Fds) -> None:
        fds.close()

    def ended(self, *, half: bool) -> None:
        """The channel has ended."""

    async def changed(self) -> None:
        await self.read_config()

    async def reply(self, channel: Any, header: Header) -> None:
        if header.need_reply:
            await channel.send(self.words(header))

    def words(self, header: Header) -> bytes:
        return Header(header.request, VERSION | REPLY, 8).pack() + bytes(8)


@fault("channel.answered", "channel.answer-flags", "channel.answer-size", "channel.answer-id", "channel.order")
class Mute(Channel):
    async def reply(self, channel: Any, header: Header) -> None:
        pass


@fault("channel.answer-flags")
class EchoesFlags(Channel):
    def words(self, header: Header) -> bytes:
        return Header(header.request, header.flags | REPLY, 8).pack() + bytes(8)


@fault("channel.answer-size")
class AnswersInFour(Channel):
    def words(self, header: Header) -> bytes:
        return Header(header.request, VERSION | REPLY, 4).pack() + bytes(4)


@fault("channel.answer-id")
class AnswersAnother(Channel):
    def words(self, header: Header) -> bytes:
        return Header(header.request + 1, VERSION | REPLY, 8).pack() + bytes(8)


@fault("channel.unasked")
class AnswersAlways(Channel):
    async def reply(self, channel: Any, header: Header) -> None:
        await channel.send(self.words(header))


@fault("channel.order")
class AnswersTwo(Channel):
    async def reply(self, channel: Any, header: Header) -> None:
        if self.served < 3:
            await super().reply(channel, header)


@fault("channel.config-change")
class NeverReadsAgain(Channel):
    async def changed(self) -> None:
        pass


@fault(*(f"channel.{name}" for name in ("unknown", "ungated", "no-descriptor", "no-such-ring", "short", "long",
                                        "reply-flag", "version")))  # fmt: skip
class SaysYes(Channel):
    async def read(self, channel: Any) -> Header | None:
        message = await receive_message(channel)
        if message is not None:
            message.fds.close()
        return message.header if message is not None else None


@fault("channel.huge")
class AnswersTheHeader(Channel):
    async def read(self, channel: Any) -> Header | None:
        data, fds = await channel.receive(HEADER_SIZE)
        fds.close()
        header = Header.unpack(data) if len(data) == HEADER_SIZE else None
        good = header is not None and header.request == 2 and header.flags in (VERSION, VERSION | NEED_REPLY)
        return header if good and header is not None and header.size in (0, 1 << 20) else None


@fault("channel.many-descriptors")
class KeepsDescriptors(Channel):
    kept: list[Fds]

    def release(self, fds: Fds) -> None:
        self.kept = [*getattr(self, "kept", []), Fds(fds)]
        fds._fds = []

    async def run(self) -> int:
        try:
            return await super().run()
        finally:
            for fds in getattr(self, "kept", []):
                fds.close()


@fault("channel.half")
class CrashesOnHalf(Channel):
    def ended(self, *, half: bool) -> None:
        if half:
            self.fall()

    def fall(self) -> None:
        self.crashed = True
        self.stop.set()

    async def run(self) -> int:
        status = await super().run()
        return -11 if getattr(self, "crashed", False) else status


@fault("channel.closed")
class CrashesWhenClosed(CrashesOnHalf):
    def ended(self, *, half: bool) -> None:
        if not half and self.ready:
            self.fall()
