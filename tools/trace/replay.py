"""Says a recorded front-end's part to another back-end, and compares what that answers with what was answered then.

What belongs here: what a transcript (``jsonlines``) has to be said, descriptors made anew, the comparison. What does
not: options (``command``).

The front-end's requests alone are said, on the main socket. A descriptor stands for what it was: memory of the same
size full of zeros, an eventfd that nobody signals, a socket whose other end is open; so rings are set up and stay idle.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from vhostuser.channel import Channel
from vhostuser.protocol.witness import Side, Wire, Witness
from vhostuser.raw import receive_message
from vhostuser.tools.trace.descriptors import describe
from vhostuser.tools.trace.events import Descriptor
from vhostuser.tools.trace.words import words


class TranscriptError(ValueError):
    """This is no transcript, or there is nothing in it to say; one line."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back: the message's bytes, and the kinds of its descriptors."""

    data: bytes
    kinds: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Step:
    """A request, and the answer that it had, None where there was none."""

    name: str
    data: bytes
    fds: tuple[Descriptor, ...] = ()
    answer: Answer | None = None


@dataclass(frozen=True, slots=True)
class Difference:
    """A request whose answer was another one. then, now: in words."""

    number: int
    name: str
    then: str
    now: str


def steps(lines: Iterable[str], connection: int = 1) -> list[Step]:
    """What that connection's front-end said. Raises TranscriptError."""
    found: list[Step] = []
    waiting: list[int] = []
    for entry in _messages(lines, connection):
        data = bytes.fromhex(entry["bytes"])
        fds = tuple(Descriptor(**what) for what in entry["fds"])
        if entry["kind"] == "request":
            waiting += [len(found)] if entry["awaits"] else []
            found.append(Step(entry["message"], data, fds))
            continue
        asked = next((n for n in waiting if found[n].data[:4] == data[:4]), None)
        if asked is not None:
            waiting.remove(asked)
            found[asked] = replace(found[asked], answer=Answer(data, tuple(what.kind for what in fds)))
    if not found:
        raise TranscriptError(f"connection {connection} of this transcript has no message of a front-end")
    return found


def _messages(lines: Iterable[str], connection: int) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(lines, 1):
        try:
            entry = json.loads(line)
            wanted = entry["event"] == "message" and entry["connection"] == connection
            if wanted and entry["socket"] == Wire.MAIN.value:
                yield entry
        except (ValueError, KeyError, TypeError):
            raise TranscriptError(f"line {number} is none of 'vhostuser trace --json'") from None


@dataclass(slots=True)
class _Made:
    """Descriptors that stand for recorded ones, until the end of the replay."""

    fds: list[int] = field(default_factory=list)

    def make(self, what: Descriptor) -> int:
        """One of that kind; of a kind that cannot be made, /dev/null."""
        made = _make(what)
        self.fds += made
        return made[0]

    def close(self) -> None:
        while self.fds:
            os.close(self.fds.pop())


def _make(what: Descriptor) -> list[int]:
    if what.kind == "eventfd":
        return [os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)]
    if what.kind == "socket":
        return [end.detach() for end in socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)]
    if what.size < 0:
        return [os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)]
    fd = os.memfd_create("replay", os.MFD_CLOEXEC)
    os.ftruncate(fd, what.size)
    return [fd]


class _Account:
    """One telling of the conversation, in words."""

    def __init__(self) -> None:
        self._witness = Witness()

    def of(self, step: Step, answer: Answer | None) -> str:
        """What this answer to the next step says, and what is wrong with it."""
        self._witness.hear(Wire.MAIN, Side.FRONTEND, step.data, range(len(step.fds)))
        if answer is None:
            return "no answer"
        heard = self._witness.hear(Wire.MAIN, Side.BACKEND, answer.data, range(len(answer.kinds)))
        wrong = [f"wrong: {complaint.reason}" for complaint in heard.complaints]
        return ", ".join(filter(None, (words(heard), *answer.kinds, *wrong))) or "empty"


async def replay(sock: socket.socket, script: Sequence[Step], patience: float = 3.0) -> AsyncIterator[Difference]:
    """Says all steps and yields the differences; ends with the first answer that does not come. Takes over ``sock``.

    patience: seconds for each answer that was recorded. A request without a recorded answer is not waited for.
    """
    then, now = _Account(), _Account()
    with contextlib.closing(_Made()) as made, contextlib.closing(Channel(sock)) as channel:
        for number, step in enumerate(script, 1):
            answer = await _say(channel, step, tuple(made.make(what) for what in step.fds), patience)
            told = Difference(number, step.name, then.of(step, step.answer), now.of(step, answer))
            if answer != step.answer:
                yield told
            if answer is None and step.answer is not None:
                return


async def _say(channel: Channel, step: Step, fds: tuple[int, ...], patience: float) -> Answer | None:
    """What it was answered with; None without an answer."""
    try:
        await channel.send(step.data, fds)
        if step.answer is None:
            return None
        async with asyncio.timeout(patience):
            message = await receive_message(channel)
    except (TimeoutError, ConnectionError):
        return None
    if message is None:
        return None
    with contextlib.closing(message.fds):
        return Answer(message.header.pack() + message.body, tuple(describe(fd).kind for fd in message.fds))
