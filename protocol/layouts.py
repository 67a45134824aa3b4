"""Payloads taken apart for readers that are not Python: the parts of each, in order, with their sizes.

What belongs here: saying the layouts of payloads.py again, as data. What does not: reading or writing bytes, any
language. The layouts are read by the names of construct's classes, whose only importer is payloads.py.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

from vhostuser.protocol import payloads as p


class Form(StrEnum):
    """What a part is. INDEX: a u64 with a number in bits 0 to 7, and bit 8 set where no descriptor comes along."""

    NUMBER = "number"
    SIGNED = "signed"
    BYTES = "bytes"
    PADDING = "padding"
    INDEX = "index"
    GROUP = "group"


@dataclass(frozen=True, slots=True)
class Part:
    """Some bytes of a payload.

    name: the field of the dataclass. size: bytes; None reaches to the end of the payload, or to what follows it.
    parts, times: of a group, what it consists of and how often; None is as often as there is room.
    """

    form: Form
    name: str = ""
    size: int | None = None
    parts: tuple["Part", ...] = ()
    times: int | None = 1


def _number(name: str, size: int = 8) -> Part:
    return Part(Form.NUMBER, name, size)


_BY_HAND: Final[Mapping[type[p.Payload], tuple[Part, ...]]] = {
    p.Empty: (),
    p.PostcopyAck: (),
    p.U64: (_number("value"),),
    p.VringState: (_number("index", 4), _number("num", 4)),
    p.VringFd: (Part(Form.INDEX, "index", 8),),
    p.DeviceStateReply: (Part(Form.INDEX, "error", 8),),
    p.VringArea: (Part(Form.INDEX, "index", 8), _number("size"), _number("offset")),
    p.CryptoSession: (_number("op_code"), Part(Form.BYTES, "parameters"), Part(Form.SIGNED, "session_id", 8)),
}
"""Those whose dataclass has other fields than the wire, or that have no layout of construct's."""


def parts(kind: type[p.Payload]) -> tuple[Part, ...]:
    """What the payload consists of; what PostcopyAck may hold is nothing to anybody."""
    found = _BY_HAND.get(kind)
    return tuple(_parts(kind.layout)) if found is None else found  # type: ignore[attr-defined]


def _parts(layout: Any) -> Iterator[Part]:
    for item in layout.subcons:
        inner = item.subcon if type(item).__name__ == "Renamed" else item
        if type(inner).__name__ != "Terminated":
            yield _part(item.name or "", inner)


def _part(name: str, item: Any) -> Part:
    match type(item).__name__:
        case "FormatField" | "Rebuild":
            return _number(name, item.sizeof())
        case "Padded":
            return Part(Form.PADDING, "", item.sizeof())
        case "Bytes":
            return Part(Form.BYTES, name, item.sizeof())
        case "GreedyBytes":
            return Part(Form.BYTES, name)
        case "Struct":
            return Part(Form.GROUP, name, item.sizeof(), tuple(_parts(item)))
        case "Array":
            return Part(Form.GROUP, name, item.sizeof(), (_part("", item.subcon),), item.count)
        case "GreedyRange":
            return Part(Form.GROUP, name, None, tuple(_parts(item.subcon)), None)
        case other:
            raise TypeError(f"{name}: nobody has said yet what a {other} looks like from outside")
