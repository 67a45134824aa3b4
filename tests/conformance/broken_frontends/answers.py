"""Front-ends that take wrong answers, cannot wait, or do not survive their back-end.

What belongs here: what is wrong with what they make of a back-end. What does not: its own channel (``channel``).
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from tests.conformance.broken_frontends.faults import (
    FAULTS,
    IDS,
    Fault,
    about,
    fault,
    file,
    named,
    raw,
    without,
)
from tests.conformance.frontends import RINGS, SIZE, Crash, Life, Talk
from vhostuser.conformance.frontend_cases.answers import WRONG
from vhostuser.frontend import FrontendRing
from vhostuser.protocol import (
    FRONTEND,
    REPLY,
    VERSION,
    FrontendRequest,
    Header,
    Inflight,
    Payload,
    ProtocolFeature,
    RemoteProtocolError,
    RequestRefused,
    VirtioFeature,
)
from vhostuser.raw import receive_message

F, P, V = FrontendRequest, ProtocolFeature, VirtioFeature


class Careless(Life):
    """Takes any message for the answer to some requests."""

    codes: Sequence[F]

    async def answer(self, talk: Talk, code: F, read: Callable[[F], Awaitable[Any]]) -> Any:
        if code not in self.codes:
            return await read(code)
        message = await receive_message(talk._channel)
        if message is None:
            raise RemoteProtocolError(code, "closed")
        size = 20 if code is F.GET_CONFIG else FRONTEND[code].reply[0].sizes[0]
        body = (message.body + bytes(size))[:size]
        talk.session.receive(Header(code, VERSION | REPLY, size).pack(), message.fds)
        return talk.session.receive(body), message.fds


class Fragile(Life):
    """Is ended by a signal when its back-end is lost while it waits for the answer to some requests."""

    codes: Sequence[F]

    def failed(self, code: F, error: Exception) -> None:
        # What is not acknowledged is found lost by the next.
        unnoticed = self.sent is F.SET_PROTOCOL_FEATURES and self.sent in self.codes
        if self.talk.lost.is_set() and (code in self.codes or unnoticed):
            raise Crash
        raise error


class Deaf(Life):
    """Does not hear that it is to end while it waits for the answer to some requests."""

    codes: Sequence[F]
    told = False

    def asked(self) -> None:
        if self.waiting in self.codes:
            self.told = True
        else:
            super().asked()

    async def after(self, talk: Talk, code: F, payload: Payload | None, fds: Sequence[int]) -> None:
        if self.told:
            super().asked()

    async def wind_up(self) -> None:
        self.talk.timeout = None
        await super().wind_up()


class Hasty(Life):
    """Gives up when the answer to some requests takes longer than a few milliseconds."""

    codes: Sequence[F]

    async def answer(self, talk: Talk, code: F, read: Callable[[F], Awaitable[Any]]) -> Any:
        reading = asyncio.ensure_future(read(code))
        for _ in range(12):  # not at once: a busy machine is no reason
            if code not in self.codes or reading.done():
                return await reading
            await asyncio.sleep(0.001)
        reading.cancel()
        raise RemoteProtocolError(code, "too late")


class Choppy(Life):
    """Takes a part of an answer to some requests for the whole."""

    codes: Sequence[F]

    async def answer(self, talk: Talk, code: F, read: Callable[[F], Awaitable[Any]]) -> Any:
        if code not in self.codes:
            return await read(code)
        wanted = talk.session.wanted
        data, came = await talk._channel.receive(wanted)
        if len(data) < wanted:
            came.close()
            raise RemoteProtocolError(code, "not an answer")
        talk.session.receive(data, came)
        answer, rest = await read(code)
        came.extend(rest)
        return answer, came


class Stubborn(Life):
    """Takes no for yes in the answer to some requests."""

    codes: Sequence[F]

    def failed(self, code: F, error: Exception) -> None:
        if not (code in self.codes and isinstance(error, RequestRefused)):
            raise error


def at(kind: type[Life], name: str, codes: Sequence[F], *themes: str) -> None:
    """A fault at some requests."""
    fails = tuple(case for theme in themes for case in named(theme, codes) if case in IDS)
    FAULTS[f"{kind.__name__}{name}"] = Fault(type(name, (kind,), {"codes": codes}), fails)


_TAKEN = [f"answer.{way}" for way in (*WRONG, "version", "need-reply")]
at(Careless, "Features", [F.GET_FEATURES, F.GET_PROTOCOL_FEATURES], *_TAKEN)
at(Careless, "Numbers", [F.GET_QUEUE_NUM, F.GET_MAX_MEM_SLOTS, F.GET_STATUS], *_TAKEN)
at(Careless, "Structs", [F.GET_CONFIG, F.GET_INFLIGHT_FD], *_TAKEN)
at(Careless, "Bases", [F.GET_VRING_BASE], *_TAKEN)
at(Hasty, "", about("answer.late"), "answer.late")
at(Deaf, "", about("answer.never"), "answer.never")
at(Choppy, "", about("answer.pieces"), "answer.pieces")
at(Stubborn, "", [code for code in about("refused") if not FRONTEND[code].reply], "refused")
_DEATHS = about("death.at")
for _part in range(0, len(_DEATHS), 8):
    at(Fragile, str(_part // 8), _DEATHS[_part : _part + 8], "death.at", "answer.half")


@fault("refused.get-config")
class NeedsItsConfig(Life):
    def failed(self, code: F, error: Exception) -> None:
        if code is F.GET_CONFIG and isinstance(error, RequestRefused):
            raise Crash
        raise error


@fault("refused.get-inflight-fd")
class GivesBackNothing(Life):
    async def inflight(self) -> None:
        await super().inflight()
        if self.has(P.INFLIGHT_SHMFD) and self.buffer is None:
            await raw(F.SET_INFLIGHT_FD, Inflight(0, 0, RINGS, SIZE), fds=file)(self)


# ---- ends


@fault("life.survives")
class CrashesOnLittle(Life):
    async def features(self) -> None:
        await super().features()
        if not self.offered & V.PROTOCOL_FEATURES.mask:
            raise Crash


@fault("life.ends")
class DeafOnLittle(Life):
    offered = V.PROTOCOL_FEATURES.mask  # until it has heard

    def asked(self) -> None:
        if self.offered & V.PROTOCOL_FEATURES.mask:
            super().asked()


@fault("life.sets-up")
class SetsNothingUp(Life):
    steps = without("set_up", "enable", "driver_ok", "log", "hotplug")


FAULTS["SetsNothingUp"] = FAULTS["SetsNothingUp"]._replace(patience=0.5)  # for nothing, in every session


@fault("death.while-running")
class CrashesWhenLost(Life):
    def lost(self) -> None:
        if not self.stop.is_set():
            raise Crash


@fault("death.while-running")
class ComesBackWithHalf(Life):
    short = False

    def lost(self) -> None:
        self.short = True

    async def start(self, ring: FrontendRing) -> None:
        if not (self.short and ring.index):
            await super().start(ring)
