"""Messages as packets of a pcapng file: what Wireshark and its relatives read. Pure: an event in, bytes out.

What belongs here: what stands in front of a message in its packet (docs/trace.md has it). What does not: the blocks of
the file (``vhostuser.pcapng``), where the bytes go (``command``), what Wireshark makes of them (``dissector``).

The link type is the first that is free for private use. Only messages are packets; who waits for whom is to be
seen in their times.
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Callable, Iterable
from enum import IntEnum, IntFlag
from typing import Final

from vhostuser import pcapng
from vhostuser.protocol.witness import Message, Side, Wire
from vhostuser.tools.trace.events import Descriptor, Event, Passed

LINK_USER0: Final = 147
_VERSION: Final = 1
_HEAD: Final = struct.Struct("<BBHIIIQIIQQ")
_ITEM: Final = struct.Struct("<BBH")
_UNKNOWN: Final = 0xFFFFFFFF
_NO_SIZE: Final = (1 << 64) - 1
_WIRES: Final = tuple(Wire)


class Flag(IntFlag):
    """Of a packet. BIG_ENDIAN: the numbers of the message; our own header is little-endian always."""

    FROM_BACKEND = 1
    BACKEND_CHANNEL = 2
    REPLY = 4
    AWAITS = 8
    REFUSED = 16
    BIG_ENDIAN = 32


class Item(IntEnum):
    """What our own header may hold any number of."""

    DESCRIPTOR = 1
    VIOLATION = 2
    RING = 3
    FAULT = 4


class Packets:
    """A writer's memory: which packet a request was. began: when the trace began, in nanoseconds since 1970."""

    def __init__(self, began: int) -> None:
        self._began = began
        self._count = 0
        self._requests: dict[Message, int] = {}

    def start(self) -> bytes:
        """The blocks in front of all packets: the file's, and one "interface" for each of a connection's sockets."""
        names = {Wire.MAIN: "the front-end's socket", Wire.BACKEND: "the back-end's own channel"}
        wires = [pcapng.interface(LINK_USER0, names[wire]) for wire in _WIRES]
        return pcapng.section("vhostuser trace") + b"".join(wires)

    def of(self, event: Event) -> bytes:
        """The event as a packet; nothing if it is no message."""
        if not isinstance(event, Passed):
            return b""
        self._count += 1
        message = event.message
        answers = self._requests.pop(message.answers, 0) if message.answers else 0
        if message.awaits:
            self._requests[message] = self._count
        data = head(event, answers) + event.seen.data
        cut = 12 + message.header.size - len(event.seen.data)
        return pcapng.packet(
            _WIRES.index(message.wire),
            self._began + event.seen.at,
            data,
            length=min(len(data) + cut, _UNKNOWN),
            direction=pcapng.INBOUND if message.sender is Side.FRONTEND else pcapng.OUTBOUND,
        )


def head(event: Passed, answers: int = 0) -> bytes:
    """What stands in front of the message. answers: number of the packet of its request, 0 if it has none."""
    seen, message = event.seen, event.message
    items = b"".join(_items(event))
    code = int(message.row.code) if message.row else _UNKNOWN
    return (
        _HEAD.pack(
            _VERSION, _flags(message), 0, _HEAD.size + len(items), seen.connection, code, seen.at, answers, 0,
            event.latency or 0, seen.held,
        ) + items
    )  # fmt: skip


def _flags(message: Message) -> Flag:
    flags = {
        Flag.FROM_BACKEND: message.sender is Side.BACKEND,
        Flag.BACKEND_CHANNEL: message.wire is Wire.BACKEND,
        Flag.REPLY: not message.is_request,
        Flag.AWAITS: message.awaits,
        Flag.REFUSED: message.refused,
        Flag.BIG_ENDIAN: sys.byteorder == "big",
    }
    return Flag(sum(flag for flag, holds in flags.items() if holds))


def _items(event: Passed) -> Iterable[bytes]:
    message = event.message
    yield from (_item(Item.DESCRIPTOR, _descriptor(what)) for what in event.seen.fds)
    yield from (_item(Item.VIOLATION, _texts(what.section, what.reason)) for what in message.complaints)
    yield from (_item(Item.RING, _texts(str(ring))) for ring in message.rings)
    yield from (_item(Item.FAULT, _texts(fault)) for fault in event.seen.faults)


def _item(kind: Item, data: bytes) -> bytes:
    data = data[:0xFFFF]
    return _ITEM.pack(kind, 0, len(data)) + data


def _descriptor(what: Descriptor) -> bytes:
    return struct.pack("<Q", what.size if what.size >= 0 else _NO_SIZE) + _texts(what.kind, what.detail)


def _texts(*texts: str) -> bytes:
    return b"\0".join(text.encode(errors="replace").replace(b"\0", b"") for text in texts)


def writer(write: Callable[[bytes], object], began: int) -> Callable[[Event], None]:
    """Takes events, and has their packets written, each at once. began: in nanoseconds since 1970."""
    packets = Packets(began)
    write(packets.start())

    def one(event: Event) -> None:
        if packet := packets.of(event):
            write(packet)

    return one
