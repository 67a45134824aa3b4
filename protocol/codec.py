"""Framing: twelve bytes of header, then so many of payload, and the descriptors that come with the first byte.

Knows how messages are cut out of the byte stream, not which messages there are: whoever owns a Reader judges each
header. Why exactly `wanted` bytes and never more: the kernel glues the bytes of one message to those of the next in one
read and hands over the descriptors of either, so that nobody could tell whose they are.
"""

import struct
from collections.abc import Callable, Collection
from typing import NamedTuple, Self

from vhostuser.protocol.codes import NEED_REPLY, REPLY, VERSION, VERSION_MASK
from vhostuser.protocol.errors import LocalProtocolError, RemoteProtocolError
from vhostuser.protocol.payloads import Empty, Payload

HEADER_SIZE = 12
"""Bytes of a header; what the channel reads first."""

MAX_FDS = 8
"""Descriptors of one message, at most: a memory table of eight regions, and the bound for back-end requests."""

_HEADER = struct.Struct("=III")
_FRAMING = "Message Specification, Header"


class Header(NamedTuple):
    """The three fields of a header. size counts the payload alone."""

    request: int
    flags: int
    size: int

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        """Read from HEADER_SIZE bytes."""
        return cls(*_HEADER.unpack(data))

    def pack(self) -> bytes:
        """The HEADER_SIZE bytes."""
        return _HEADER.pack(*self)

    @property
    def need_reply(self) -> bool:
        """Does the sender ask for an ack?"""
        return bool(self.flags & NEED_REPLY)

    def check_request(self) -> None:
        """Raise RemoteProtocolError unless the flags are those of a request."""
        if self.flags & VERSION_MASK != VERSION:
            self._wrong(f"version {self.flags & VERSION_MASK}, expected {VERSION}")
        if self.flags & REPLY:
            self._wrong("a reply came where a request was expected")
        if self.flags & ~(VERSION_MASK | NEED_REPLY):
            self._wrong(f"flags {self.flags:#x} use reserved bits")

    def check_reply(self) -> None:
        """Raise RemoteProtocolError unless the flags are exactly those of a reply, the rule that QEMU enforces."""
        if self.flags != VERSION | REPLY:
            self._wrong(f"reply with flags {self.flags:#x}, expected exactly {VERSION | REPLY:#x}")

    def _wrong(self, reason: str) -> None:
        raise RemoteProtocolError(self.request, reason, clause=_FRAMING)


def encode(request: int, flags: int, payload: Payload | None = None) -> bytes:
    """Header and payload as one piece, so that descriptors go out with the header. Raises LocalProtocolError."""
    try:
        body = (payload or Empty()).pack()
    except ValueError as error:
        raise LocalProtocolError(request, str(error)) from None
    return Header(request, flags, len(body)).pack() + body


class Frame(NamedTuple):
    """One complete message before its payload is read."""

    header: Header
    body: bytes
    fds: Collection[int]


class Reader:
    """Puts one message together, from pieces of any size up to `wanted`.

    admit(header, fds) is called once per message, before any byte of the payload is asked for, with the number of
    descriptors that came along; it raises to reject the message and so bounds what is ever buffered.
    """

    def __init__(self, admit: Callable[[Header, int], None]) -> None:
        self._admit = admit
        self._start()

    def _start(self) -> None:
        self._data = bytearray()
        self._header: Header | None = None
        self._fds: Collection[int] = ()

    @property
    def wanted(self) -> int:
        """Bytes that belong to this message for certain. More than 0."""
        end = HEADER_SIZE if self._header is None else HEADER_SIZE + self._header.size
        return end - len(self._data)

    @property
    def started(self) -> bool:
        """Is part of a message here?"""
        return bool(self._data)

    def feed(self, data: bytes, fds: Collection[int]) -> Frame | None:
        """Take 1 to `wanted` bytes and what came with them; a Frame when the message is complete."""
        if not 0 < len(data) <= self.wanted:
            raise LocalProtocolError(None, f"{len(data)} bytes read where 1 to {self.wanted} were wanted")
        self._take_fds(fds)
        self._data += data
        if self._header is None and len(self._data) == HEADER_SIZE:
            header = Header.unpack(bytes(self._data))
            self._admit(header, len(self._fds))
            self._header = header
        if self._header is None or self.wanted:
            return None
        frame = Frame(self._header, bytes(self._data[HEADER_SIZE:]), self._fds)
        self._start()
        return frame

    def _take_fds(self, fds: Collection[int]) -> None:
        if not self.started:
            self._fds = fds
        elif len(fds):
            code = self._header.request if self._header else None
            raise RemoteProtocolError(code, "descriptors must come with the first byte of a message", clause=_FRAMING)

    def eof(self) -> None:
        """The peer closed its end: raise RemoteProtocolError unless that was between two messages."""
        if self.started:
            code = self._header.request if self._header else None
            raise RemoteProtocolError(code, f"closed with {self.wanted} bytes of a message missing", clause=_FRAMING)
