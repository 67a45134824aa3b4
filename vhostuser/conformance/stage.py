"""Where cases about front-ends are tried: what this front-end does by itself, and a fresh one for every misbehaviour.

What belongs here: plays (a front-end, and the back-end that we are for it) from beginning to end, and what is kept of
them. What does not: rules (``frontend_cases``), answers (``standin``), processes (``caller``).

Most rules are tried on what was heard in a few plays in which we do everything right, the sessions. They are played
once, for all cases.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Hashable, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from pathlib import Path
from typing import Any

from vhostuser.conformance.caller import Caller, Launch, Meeting
from vhostuser.conformance.offer import Offer
from vhostuser.conformance.standin import StandIn, Twist
from vhostuser.conformance.suite import Unreachable
from vhostuser.conformance.transcript import Transcript, total
from vhostuser.protocol import FrontendRequest, ProtocolFeature, VirtioFeature

F, P, V = FrontendRequest, ProtocolFeature, VirtioFeature


# In so many pieces quiet is counted.
_LOOKS = 40


class Need(Enum):
    """What a case may need beside messages that the front-end sends."""

    PROCESS = "a front-end that this suite starts (--start)"


@dataclass(frozen=True)
class Settings:
    """Which front-end, and how long to wait, in seconds.

    path: where it connects to by itself. launch: starts it anew for every play instead. connect: it listens, and we
    connect. patience: for whatever must come. quiet: how long nothing comes when it has set everything up.
    """

    offer: Offer
    path: Path | None = None
    launch: Launch | None = None
    connect: bool = False
    patience: float = 3.0
    quiet: float = 0.2


class Taken(Enum):
    """How a front-end took what was done to it."""

    WENT_ON = "went on"
    CLOSED = "closed the connection"
    ENDED = "ended"
    SILENT = "kept the connection and said nothing"


@dataclass(frozen=True)
class Outcome:
    """How, and what came of it.

    detail: what it said next, or how it ended. last: the connection on which it happened. asked: it wanted an answer
    there. crash: the signal that ended it. hung: it did not end when it was asked to. lacking: what it did not set up
    again on a later connection.
    """

    kind: Taken
    detail: str
    last: Transcript
    asked: bool = True
    crash: str = ""
    hung: bool = False
    lacking: str = ""

    def __str__(self) -> str:
        return f"{self.kind.value} ({self.detail})" if self.detail else self.kind.value


@dataclass(frozen=True)
class Session:
    """A play in which we did everything right. connections: in their order. restart: between two of them we died.

    end, crash, hung: as Caller's.
    """

    offer: Offer
    connections: Sequence[Transcript]
    restart: bool = False
    end: str = ""
    crash: str = ""
    hung: bool = False


class Play:
    """A front-end and the back-end that we are for it, on as many connections as it makes."""

    def __init__(self, caller: Caller, offer: Offer, twist: Twist | None) -> None:
        self.caller = caller
        self.offer = offer
        self.twist = twist
        self.talks: list[StandIn] = []
        self._news = asyncio.Event()
        self._accepting: asyncio.Task[None] | None = None

    async def begin(self) -> None:
        """Starts the front-end, and takes every connection from now on."""
        meeting = self.caller.meeting or await self.caller.start()
        self._accepting = asyncio.ensure_future(self._accept(meeting))
        if self.caller.ended is not None:
            self.caller.ended.add_done_callback(lambda _: self._news.set())

    async def _accept(self, meeting: Meeting) -> None:
        while True:
            if meeting.connects and self.talks:
                await self.until(lambda: self.talks[-1].closed, None)
            sock = await meeting.next()
            number = f", connection {len(self.talks) + 1}" if self.talks else ""
            self.talks.append(StandIn(sock, self.offer, self.offer.name + number, self.twist, self._news))
            self._news.set()

    async def until(self, holds: Callable[[], bool], within: float | None) -> bool:
        """Waits until it holds, so many seconds. Does it? It is asked again whenever something happened."""
        try:
            async with asyncio.timeout(within):
                while not holds():
                    self._news.clear()
                    await self._news.wait()
        except TimeoutError:
            return holds()
        return True

    @property
    def over(self) -> bool:
        """The front-end has ended."""
        return self.caller.status is not None

    @property
    def extent(self) -> frozenset[int]:
        """Rings that are ready on the connection that was made last."""
        return frozenset(self.talks[-1].transcript.ready) if self.talks else frozenset()

    async def soon(self, holds: Callable[[], bool], quiet: float) -> bool:
        """Does it hold within so many seconds of quiet? They are counted in small pieces: time in which a busy machine
        did not let us look is no quiet."""
        for _ in range(_LOOKS):
            if holds():
                return True
            await asyncio.sleep(quiet / _LOOKS)
        return holds()

    async def settled(self, wanted: frozenset[int], quiet: float, within: float) -> None:
        """Waits until these rings (none given: any) are ready, or the front-end has ended, and nothing more comes."""
        await self.until(lambda: self.over or (bool(self.extent) and self.extent >= wanted), within)
        before = -1
        while not self.over and before != self._count():
            before = self._count()
            await self.soon(lambda before=before: self.over or self._count() != before, quiet)  # type: ignore[misc]

    def _count(self) -> int:
        return len(self.talks) + sum(len(talk.heard) for talk in self.talks)

    async def close(self) -> None:
        """Ends our part; the front-end is the bench's."""
        if self._accepting is not None:
            self._accepting.cancel()
            await asyncio.gather(self._accepting, return_exceptions=True)
        for talk in self.talks:
            talk.close()


@dataclass
class _Memory:
    """What was played already, by its name, or is being played."""

    played: dict[Hashable, asyncio.Task[Any]] = field(default_factory=dict)

    async def once(self, key: Hashable, play: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
        if key not in self.played:
            self.played[key] = asyncio.ensure_future(play())
        return await asyncio.shield(self.played[key])


class FrontendBench:
    """A ``suite.Bench`` for one front-end. Call ``look`` first, and ``close`` at the end."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.sessions: list[Session] = []
        self.sent: Counter[int] = Counter()
        """How often each request was sent in the sessions."""
        self._memory = _Memory()
        self._standing: Caller | None = None

    async def look(self) -> None:
        """Plays the sessions. Raises Unreachable if no front-end comes at all."""
        full = self.settings.offer
        self.sessions = [await self._session(full)]
        if not self.sessions[0].connections:
            end = self.sessions[0].end
            raise Unreachable(f"the front-end ended without a word: {end}" if end else "no front-end has connected")
        plain = full.without("with few protocol features", *(set(P) - {P.MQ, P.CONFIG}))
        for offer, restart in (
            (replace(full, name="with a restart"), True),
            (replace(full, name="with two memory slots", slots=2), False),
            (full.without("without memory slots", P.CONFIGURE_MEM_SLOTS), False),
            (plain, False),
            (full.without("without protocol features", V.PROTOCOL_FEATURES, *P), False),
        ):
            self.sessions.append(await self._session(offer, restart=restart))
        self.sent = total([each for session in self.sessions for each in session.connections])

    @property
    def extent(self) -> frozenset[int]:
        """Rings that the front-end makes ready by itself."""
        found = [connection.ready for session in self.sessions[:1] for connection in session.connections]
        return frozenset[int]().union(*found)

    def offer_for(self, code: FrontendRequest) -> Offer:
        """What to offer a front-end so that it sends this message: everything, where that will do."""
        for session in self.sessions:
            if any(connection.codes()[code] for connection in session.connections):
                return session.offer
        return self.settings.offer

    def lacks(self, needs: Sequence[Enum]) -> str:
        for need in needs:
            if isinstance(need, FrontendRequest) and not self.sent[need]:
                return f"it never sends {need.name}"
            if need is Need.PROCESS and self.settings.launch is None:
                return f"needs {need.value}"
        return ""

    @contextlib.asynccontextmanager
    async def open(self) -> AsyncIterator[FrontendBench]:
        """The bench itself: what is played for a case is its own, and what was played already is remembered."""
        yield self

    async def close(self) -> None:
        """Ends what still runs."""
        for task in self._memory.played.values():
            task.cancel()
        await asyncio.gather(*self._memory.played.values(), return_exceptions=True)
        if self._standing is not None:
            await self._standing.close()

    # ---- plays

    @contextlib.asynccontextmanager
    async def play(self, offer: Offer, twist: Twist | None = None) -> AsyncIterator[Play]:
        """A front-end of its own, or the one that runs already. Raises Unreachable."""
        caller = self._standing or self._caller()
        play = Play(caller, offer, twist)
        try:
            await play.begin()
            yield play
        finally:
            await play.close()
            if caller is not self._standing:
                await caller.close()

    def _caller(self) -> Caller:
        settings = self.settings
        caller = Caller(settings.path, settings.launch, connect=settings.connect, patience=settings.patience)
        if settings.launch is None:
            self._standing = caller
        return caller

    async def _session(self, offer: Offer, *, restart: bool = False) -> Session:
        settings = self.settings
        async with self.play(offer) as play:
            await play.until(lambda: bool(play.talks) or play.over, play.caller.starting)
            await play.settled(self.extent, settings.quiet, settings.patience)
            if restart and play.talks:
                play.talks[-1].hang_up()
                before = len(play.talks)
                await play.until(lambda: len(play.talks) > before or play.over, settings.patience)
                await play.settled(self.extent, settings.quiet, settings.patience if len(play.talks) > before else 0)
            hung = not await play.caller.stop()
            last = 0.0 if settings.launch is None else settings.patience
            await play.until(lambda: all(talk.closed for talk in play.talks), last)
            connections = [talk.transcript for talk in play.talks]
            return Session(offer, connections, restart, play.caller.end, play.caller.crash, hung)

    async def take(self, name: str, make: Callable[[], Twist], *, offer: Offer | None = None) -> Outcome | None:
        """What the front-end does when this is done to it; None: it never came to that. Played once for each name."""
        offered = offer or self.settings.offer
        outcome: Outcome | None = await self._memory.once(name, lambda: self._take(offered, make()))
        return outcome

    async def _take(self, offer: Offer, twist: Twist) -> Outcome | None:
        settings = self.settings
        async with self.play(offer, twist) as play:
            done = twist.done.is_set
            await play.until(lambda: bool(play.talks) or play.over, play.caller.starting)
            await play.until(lambda: done() or play.over or play.extent >= self.extent, settings.patience)
            ending = not done() and await self._coax(play, twist)
            if not done():
                return None
            talk = next(talk for talk in play.talks if talk.twisted_at is not None)
            await talk.acted.wait()
            await play.until(lambda: bool(talk.after) or talk.closed or play.over, settings.patience)
            kind, detail = _how(talk, play)
            if kind is Taken.WENT_ON and not ending:  # perhaps not for long
                kind = await self._watch(play, talk, twist)
            lacking = await self._returns(play, talk) if talk.gone else ""
            hung = not await play.caller.stop()
            return Outcome(kind, detail, talk.transcript, talk.asked, play.caller.crash, hung, lacking)

    async def _watch(self, play: Play, talk: StandIn, twist: Twist) -> Taken:
        """What becomes of a front-end that has gone on: where that matters, until it has set everything up."""

        def ended() -> bool:
            return talk.closed or play.over

        if twist.watch:
            await play.until(lambda: ended() or talk.transcript.ready >= self.extent, self.settings.patience)
        await play.soon(ended, self.settings.quiet)
        return Taken.CLOSED if ended() else Taken.WENT_ON

    async def _coax(self, play: Play, twist: Twist) -> bool:
        """Waits for what comes last: when everything was set up, or when the front-end is asked to end. Was it?"""
        done, settings = twist.done.is_set, self.settings
        await play.settled(self.extent, settings.quiet, settings.patience)
        if done() or play.over:
            return False
        stopping = asyncio.ensure_future(play.caller.stop())
        await play.until(lambda: done() or play.over, settings.patience if settings.launch else 0)
        stopping.cancel()
        return True

    async def _returns(self, play: Play, talk: StandIn) -> str:
        """What a front-end whose back-end has died does not set up again; empty also if it has ended by itself."""
        settings, wanted = self.settings, self.extent

        def back() -> bool:
            return play.talks[-1] is not talk and play.extent >= wanted and bool(play.talks[-1].heard)

        if await play.until(lambda: back() or play.over, settings.patience) or play.talks[-1] is talk:
            return ""
        left = ", ".join(map(str, sorted(wanted - play.extent)))
        return f"rings {left} not set up again" if play.talks[-1].heard else "nothing said on the new connection"


def _how(talk: StandIn, play: Play) -> tuple[Taken, str]:
    if play.over and not talk.after:
        return Taken.ENDED, play.caller.end
    if talk.after:
        return Taken.WENT_ON, f"with {talk.after[0]}"
    return (Taken.CLOSED, "") if talk.closed else (Taken.SILENT, "")
