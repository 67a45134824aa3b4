"""Events as lines for people. Pure: an event in, text out."""

from __future__ import annotations

from typing import Final

from vhostuser.protocol import NEED_REPLY
from vhostuser.protocol.witness import Message, Side
from vhostuser.tools.trace.events import Event, Notice, Passed, Waits
from vhostuser.tools.trace.words import descriptor, duration, words

_INDENT: Final = " " * 13
_COLOURS: Final = {"request": "\x1b[36m", "reply": "\x1b[32m", "wrong": "\x1b[31m", "aside": "\x1b[2m"}
_END: Final = "\x1b[0m"


def lines(event: Event, *, colour: bool = False) -> str:
    """One line, and indented ones below it for what goes with the event."""
    return "\n".join(_paint(text, kind) if colour else text for kind, text in _lines(event))


def _paint(text: str, kind: str) -> str:
    return f"{_COLOURS[kind]}{text}{_END}"


def _lines(event: Event) -> list[tuple[str, str]]:
    if isinstance(event, Passed):
        return [_headline(event), *_below(event)]
    start = f"{_at(event.at)} {event.connection}"
    if isinstance(event, Waits):
        return [("wrong", f"{start} {_wait(event)}")]
    return [("aside", f"{start} {event.text}"), *_rings(event)]


def _at(nanoseconds: int) -> str:
    return f"{nanoseconds / 1e9:12.6f}"


def _headline(event: Passed) -> tuple[str, str]:
    message = event.message
    need = "need_reply" if message.is_request and message.header.flags & NEED_REPLY else ""
    said = " ".join(filter(None, (need, words(message), "refused" if message.refused else "")))
    latency = f" ({duration(event.latency)})" if event.latency is not None else ""
    kind = "request" if message.is_request else "reply"
    return (
        kind,
        f"{_at(event.seen.at)} {event.seen.connection} {_arrow(message)} {_name(message)}{latency}: {said}".rstrip(
            ": "
        ),
    )


def _arrow(message: Message) -> str:
    return "front-end ->" if message.sender is Side.FRONTEND else " back-end <-"


def _name(message: Message) -> str:
    return message.name if message.is_request else f"{message.name} reply"


def _below(event: Passed) -> list[tuple[str, str]]:
    return [
        *(("aside", f"{_INDENT}fd: {descriptor(what)}") for what in event.seen.fds),
        *(("aside", f"{_INDENT}{ring}") for ring in event.message.rings),
        *(("wrong", f"{_INDENT}on purpose: {fault}") for fault in event.seen.faults),
        *(("wrong", f"{_INDENT}wrong: {what.reason} (see {what.section})") for what in event.message.complaints),
    ]


def _rings(event: Notice) -> list[tuple[str, str]]:
    return [("aside", f"{_INDENT}{ring}") for ring in event.rings]


def _wait(event: Waits) -> str:
    message = event.message
    waited = duration(event.at - event.since)
    sender, other = message.sender.value, message.sender.other.value
    return f"the {sender} has waited for {waited} for the {other}'s answer to {message.name}"
