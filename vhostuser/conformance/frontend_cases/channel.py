"""The back-end's own channel, which SET_BACKEND_REQ_FD brings: what the front-end answers, and what it survives.

What belongs here: requests of the back-end. What does not: the message that brings the channel (``framing``).
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Awaitable, Callable

from vhostuser.channel import Channel
from vhostuser.conformance.frontend_cases.rules import Rules
from vhostuser.conformance.stage import FrontendBench, Play
from vhostuser.conformance.standin import pack
from vhostuser.conformance.suite import Skipped, Violation, check
from vhostuser.protocol import (
    NEED_REPLY,
    REPLY,
    U64,
    VERSION,
    BackendRequest,
    Empty,
    FrontendRequest,
    ProtocolFeature,
    Uuid,
    VringArea,
)
from vhostuser.raw import RawMessage, receive_message

B, F = BackendRequest, FrontendRequest
CASES = Rules("channel", "Back-end message types")

_UNKNOWN = 999
_ASK = VERSION | NEED_REPLY


class Line:
    """The back-end's end of its channel, when everything was set up. Owns it."""

    def __init__(self, sock: socket.socket, play: Play, patience: float, quiet: float) -> None:
        self.play = play
        self.patience = patience
        self.quiet = quiet
        self._channel = Channel(sock)

    async def send(self, code: int, body: bytes = b"", *fds: int, flags: int = _ASK, size: int | None = None) -> None:
        """Sends a message of any content."""
        try:
            await self._channel.send(pack(code, body, flags, size), fds)
        except ConnectionError:
            return

    async def answer(self) -> RawMessage | None:
        """The next answer; None at the end of the channel. Raises TimeoutError."""
        async with asyncio.timeout(self.patience):
            message = await receive_message(self._channel)
        if message is not None:
            message.fds.close()
        return message

    async def answer_soon(self) -> RawMessage | None:
        """The same where none may come. Raises TimeoutError when it is quiet."""
        reading = asyncio.ensure_future(self.answer())
        try:
            if not await self.play.soon(reading.done, self.quiet):
                raise TimeoutError
            return reading.result()
        finally:
            reading.cancel()

    async def reaction(self) -> str:
        """How a request was taken: done, refused, closed or silent."""
        try:
            message = await self.answer()
        except TimeoutError:
            return "silent"
        if message is None:
            return "closed"
        return "done" if message.body == U64(0).pack() else "refused"

    def end(self) -> None:
        """Closes it. Again: nothing."""
        self._channel.close()

    async def lives(self) -> None:
        """The front-end still runs after a while, and ends when it is asked to."""
        await self.play.soon(lambda: self.play.over, self.quiet)
        hung = not await self.play.caller.stop()
        crash = self.play.caller.crash
        check(not crash, "the front-end to survive what a back-end does", crash)
        check(not hung, "a front-end that can be ended (SIGTERM)", "it does not end")


def case(
    name: str, rule: str, *needs: ProtocolFeature, should: bool = False, section: str = "", rules: Rules = CASES
) -> Callable[[Callable[[Line], Awaitable[None]]], Callable[[Line], Awaitable[None]]]:
    """Declares the function under it as a case on an open channel; that the front-end survives belongs to each.

    needs: what is offered beside the usual, and must be taken.
    """

    def add(run: Callable[[Line], Awaitable[None]]) -> Callable[[Line], Awaitable[None]]:
        async def on_channel(bench: FrontendBench) -> None:
            settings = bench.settings
            async with bench.play(settings.offer.also(*needs) if needs else settings.offer) as play:
                await play.until(lambda: bool(play.talks) or play.over, play.caller.starting)
                await play.settled(bench.extent, settings.quiet, settings.patience)
                talk = play.talks[-1] if play.talks else None
                if talk is None or talk.backend_socket is None:
                    raise Skipped("it gives the back-end no channel this time")
                if lacking := [feature.name for feature in needs if not talk.agreed(feature)]:
                    raise Skipped(f"it does not take {lacking[0]}")
                line = Line(talk.backend_socket.dup(), play, settings.patience, settings.quiet)
                try:
                    await run(line)
                    await line.lives()
                finally:
                    line.end()

        declare = rules.should if should else rules.must
        declare(name, rule, F.SET_BACKEND_REQ_FD, section=section)(on_channel)
        return run

    return add


async def said(line: Line) -> RawMessage:
    """The answer that must come."""
    try:
        message = await line.answer()
    except TimeoutError:
        raise Violation("an answer", f"nothing for {line.patience:g} s") from None
    if message is None:
        raise Violation("an answer", "the channel closed")
    return message


def _heard(line: Line, code: FrontendRequest) -> int:
    return sum(talk.transcript.codes()[code] for talk in line.play.talks)


# ---- what is right


@case("answered", "A request that asks for an answer has one.", section="VHOST_USER_PROTOCOL_F_REPLY_ACK")
async def answered(line: Line) -> None:
    await line.send(B.CONFIG_CHANGE_MSG)
    await said(line)


@case("answer-flags", "An answer has the version and the flag of a reply, and nothing else.",
      section="Message Specification, Header")  # fmt: skip
async def answer_flags(line: Line) -> None:
    await line.send(B.CONFIG_CHANGE_MSG)
    flags = (await said(line)).header.flags
    check(flags == VERSION | REPLY, "flags 0x5", f"flags {flags:#x}")


@case("answer-size", "An answer is a u64.", section="VHOST_USER_PROTOCOL_F_REPLY_ACK")
async def answer_size(line: Line) -> None:
    await line.send(B.CONFIG_CHANGE_MSG)
    body = (await said(line)).body
    check(len(body) == 8, "8 bytes", f"{len(body)} bytes")


@case("answer-id", "An answer has the id of its request.", section="Message Specification, Header")
async def answer_id(line: Line) -> None:
    await line.send(B.CONFIG_CHANGE_MSG)
    request = (await said(line)).header.request
    check(request == B.CONFIG_CHANGE_MSG, f"an answer to request {int(B.CONFIG_CHANGE_MSG)}", f"to request {request}")


@case("unasked", "Where no answer is asked for, none comes.", section="VHOST_USER_PROTOCOL_F_REPLY_ACK")
async def unasked(line: Line) -> None:
    await line.send(B.CONFIG_CHANGE_MSG, flags=VERSION)
    try:
        message = await line.answer_soon()
    except TimeoutError:
        return
    check(message is None, "no answer", "one")


@case("order", "Requests are answered one by one, in their order.", section="VHOST_USER_PROTOCOL_F_REPLY_ACK")
async def order(line: Line) -> None:
    for _ in range(3):
        await line.send(B.CONFIG_CHANGE_MSG)
    for _ in range(3):
        await said(line)


@case("config-change", "When its configuration space has changed, it is read again.", should=True,
      section="VHOST_USER_BACKEND_CONFIG_CHANGE_MSG")  # fmt: skip
async def config_change(line: Line) -> None:
    before = _heard(line, F.GET_CONFIG)
    if not before:
        raise Skipped("it never sends GET_CONFIG")
    await line.send(B.CONFIG_CHANGE_MSG, flags=VERSION)
    read = await line.play.until(lambda: _heard(line, F.GET_CONFIG) > before, line.patience)
    check(read, "GET_CONFIG", f"nothing for {line.patience:g} s")


# ---- what is wrong


async def not_done(line: Line, code: int, body: bytes = b"", *fds: int, flags: int = _ASK) -> None:
    """The request must not be taken for done."""
    await line.send(code, body, *fds, flags=flags)
    reaction = await line.reaction()
    check(reaction in ("refused", "closed"), "a refusal, or the channel closed", f"it was {reaction}")


@case("unknown", "A request that does not exist is not taken for done.")
async def unknown(line: Line) -> None:
    await not_done(line, _UNKNOWN)


@case("ungated", "A request whose feature was not negotiated is not taken for done.", should=True,
      section="VHOST_USER_BACKEND_SHARED_OBJECT_ADD")  # fmt: skip
async def ungated(line: Line) -> None:
    await not_done(line, B.SHARED_OBJECT_ADD, Uuid(bytes(15) + b"\1").pack())


@case("no-descriptor", "A part of a queue's page without its descriptor is not taken for done.",
      section="VHOST_USER_BACKEND_VRING_HOST_NOTIFIER_MSG")  # fmt: skip
async def no_descriptor(line: Line) -> None:
    await not_done(line, B.VRING_HOST_NOTIFIER_MSG, VringArea(0, 4096, 0).pack())


@case("no-such-ring", "A request about a ring that does not exist is not taken for done.",
      section="VHOST_USER_BACKEND_VRING_HOST_NOTIFIER_MSG")  # fmt: skip
async def no_such_ring(line: Line) -> None:
    await not_done(line, B.VRING_HOST_NOTIFIER_MSG, VringArea(200, 0, 0, has_fd=False).pack())


@case("short", "A request that is too short is not taken for done.", should=True)
async def short(line: Line) -> None:
    await not_done(line, B.VRING_HOST_NOTIFIER_MSG, VringArea(0, 0, 0, has_fd=False).pack()[:8])


@case("long", "A request that is too long is not taken for done.", should=True)
async def long(line: Line) -> None:
    await not_done(line, B.CONFIG_CHANGE_MSG, bytes(8))


@case("huge", "A request of 1 MiB is not taken for done, and does no harm.")
async def huge(line: Line) -> None:
    await line.send(B.CONFIG_CHANGE_MSG, bytes(64), size=1 << 20)
    reaction = await _reaction_or_wait(line)
    check(reaction != "done", "a refusal, the channel closed, or more waited for", f"it was {reaction}")


async def _reaction_or_wait(line: Line) -> str:
    try:
        message = await line.answer_soon()
    except TimeoutError:
        return "waits"
    return "closed" if message is None else "done" if message.body == U64(0).pack() else "refused"


@case("reply-flag", "A request with the flag of a reply is not taken for done.", should=True,
      section="Message Specification, Header")  # fmt: skip
async def reply_flag(line: Line) -> None:
    await line.send(B.CONFIG_CHANGE_MSG, flags=_ASK | REPLY)
    reaction = await _reaction_or_wait(line)
    check(reaction != "done", "a refusal, silence, or the channel closed", f"it was {reaction}")


@case("version", "A request of version 2 is not taken for done.", should=True, section="Message Specification, Header")
async def version(line: Line) -> None:
    await line.send(B.CONFIG_CHANGE_MSG, flags=2 | NEED_REPLY)
    reaction = await _reaction_or_wait(line)
    check(reaction != "done", "a refusal, silence, or the channel closed", f"it was {reaction}")


@case("many-descriptors", "Nine descriptors where none belong do no harm, and are closed.", should=True)
async def many_descriptors(line: Line) -> None:
    read, write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        await line.send(B.CONFIG_CHANGE_MSG, Empty().pack(), *[write] * 9)
        os.close(write)
        await _reaction_or_wait(line)
        check(await _closed(read, line.patience), "the descriptors closed", f"still open after {line.patience:g} s")
    finally:
        os.close(read)


async def _closed(read: int, within: float) -> bool:
    """Has every other end of this pipe been closed?"""
    deadline = asyncio.get_running_loop().time() + within
    while asyncio.get_running_loop().time() < deadline:
        try:
            if os.read(read, 1) == b"":
                return True
        except BlockingIOError:
            await asyncio.sleep(0.005)
    return False


@case("half", "A channel that ends within a request does no harm.")
async def half(line: Line) -> None:
    await line.send(B.VRING_HOST_NOTIFIER_MSG, bytes(8), size=24)
    line.end()


@case("closed", "A channel that is closed does no harm.")
async def closed(line: Line) -> None:
    line.end()
