"""The wake channel: a front-end names guest ranges, the back-end wakes whoever waits in them by its own userfaultfd.

What belongs here: the messages and the order in which both ends send them. What does not: translating ranges and waking
(the back-end's runtime), sockets.

The channel is no part of vhost-user and needs none of its messages: a SOCK_SEQPACKET Unix socket beside the back-end's
own. A datagram is a message, in native byte order since both ends share the machine; as C has it::

    struct hello { uint32_t kind /* 1 */, version, ranges; };
    struct range { uint64_t guest, length; };
    struct wake  { uint32_t kind /* 2 */, count; uint64_t id; struct range ranges[/* count */]; };
    struct ack   { uint32_t kind /* 3 */, status; uint64_t id, issued; };
    struct error { uint32_t kind /* 4 */, reason; };

The front-end begins with HELLO and the highest version it speaks; the back-end answers with HELLO: the version that
holds from here (no higher) and how many ranges it takes in a message. Then each WAKE is answered by one ACK, in order,
after the wakes were issued. WAKEs may be sent without waiting for ACKs by who goes on reading ACKs: a back-end
whose ACK finds no room reads no more until it does. ERROR is the back-end's last word, followed by the end of file.

What a range means, all of it defined so that a page too many may be woken and never one too few:

- Guest addresses; a range may cover several regions and what lies between them. Parts where nothing is mapped are left
  out and not counted. No ranges, or a length of 0, is nothing and counts 0.
- A range that begins or ends within a page of its region (a huge one, where the memory has those) wakes the whole page.
- ``issued`` counts the bytes that were asked for and mapped, each range for itself: it equals the sum of the lengths if
  and only if everything was mapped. The kernel does not tell whether anybody waited.
- Outside of postcopy nobody waits, and the ACK says so: NO_POSTCOPY, 0 bytes.
- A range that wraps around the address space and more ranges than HELLO allowed break the protocol, as do datagrams
  that are none of these or come out of order. Nothing of such a message is issued, and the answer is ERROR.

One front-end at a time has the channel: another that connects has its HELLO answered when the first has gone.
"""

import struct
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Final, NamedTuple

from vhostuser.protocol.errors import LocalProtocolError, RemoteProtocolError

WAKE_VERSION: Final = 1
"""The version of the channel that is spoken here."""

WAKE_MAX_RANGES: Final = 255
"""Ranges in a message, at most."""

WAKE_MAX_SIZE: Final = 16 + 16 * WAKE_MAX_RANGES
"""Bytes of the largest message; to read one more tells a datagram that is too long."""

_KIND = struct.Struct("=I")
_HELLO = struct.Struct("=III")
_WAKE = struct.Struct("=IIQ")
_RANGE = struct.Struct("=QQ")
_ACK = struct.Struct("=IIQQ")
_ERROR = struct.Struct("=II")
_END = 1 << 64


class WakeKind(IntEnum):
    """The first field of every message."""

    HELLO = 1
    WAKE = 2
    ACK = 3
    ERROR = 4


class WakeStatus(IntEnum):
    """What became of a WAKE."""

    ISSUED = 0
    """Whoever waited in the mapped part looks again."""
    NO_POSTCOPY = 1
    """The back-end has no userfaultfd in use, so nobody waits."""


class WakeReason(IntEnum):
    """How the last datagram broke the protocol."""

    MALFORMED = 1
    """An unknown kind, a size that its fields do not tell, or a field with a value that does not exist."""
    COUNT = 2
    """More ranges than the back-end's HELLO allowed."""
    RANGE = 3
    """A range wraps around the address space."""
    ORDER = 4
    """Not expected now, or never from this end."""


class WakeRange(NamedTuple):
    """Guest addresses, in bytes."""

    guest: int
    length: int


@dataclass(frozen=True, slots=True)
class WakeHello:
    """version: the highest that the front-end speaks, or the back-end's choice. ranges: what the sender takes."""

    version: int = WAKE_VERSION
    ranges: int = 0

    def pack(self) -> bytes:
        return _HELLO.pack(WakeKind.HELLO, self.version, self.ranges)


@dataclass(frozen=True, slots=True)
class Wake:
    """id: any number, for the ACK."""

    id: int
    ranges: tuple[WakeRange, ...]

    def pack(self) -> bytes:
        head = _WAKE.pack(WakeKind.WAKE, len(self.ranges), self.id)
        return head + b"".join(_RANGE.pack(*one) for one in self.ranges)

    @property
    def length(self) -> int:
        """The sum of the lengths: ``WakeAck.issued`` if everything was mapped."""
        return sum(one.length for one in self.ranges)


@dataclass(frozen=True, slots=True)
class WakeAck:
    """id: of the WAKE. issued: bytes of its ranges that were mapped and for which the wake was issued."""

    id: int
    issued: int
    status: WakeStatus = WakeStatus.ISSUED

    def pack(self) -> bytes:
        return _ACK.pack(WakeKind.ACK, self.status, self.id, self.issued)


@dataclass(frozen=True, slots=True)
class WakeError:
    """The back-end's last message."""

    reason: WakeReason

    def pack(self) -> bytes:
        return _ERROR.pack(WakeKind.ERROR, self.reason)


WakeMessage = WakeHello | Wake | WakeAck | WakeError


def unpack_wake(datagram: bytes) -> WakeMessage:
    """The message that a datagram is. Raises RemoteProtocolError."""
    kind = _KIND.unpack_from(datagram)[0] if len(datagram) >= _KIND.size else 0
    try:
        return _UNPACK[kind](datagram)
    except KeyError:
        reason = f"{len(datagram)} bytes that begin with kind {kind}, expected a kind from 1 to 4"
    except (struct.error, ValueError) as error:
        reason = f"{WakeKind(kind).name} of {len(datagram)} bytes: {error}"
    raise _broken(WakeReason.MALFORMED, reason)


def _hello(datagram: bytes) -> WakeHello:
    _, version, ranges = _HELLO.unpack(datagram)
    if not version:
        raise ValueError("version 0, the first is 1")
    return WakeHello(version, ranges)


def _wake(datagram: bytes) -> Wake:
    _, count, number = _WAKE.unpack_from(datagram)
    if count > WAKE_MAX_RANGES:
        raise _broken(WakeReason.COUNT, f"WAKE with {count} ranges, at most {WAKE_MAX_RANGES} are taken")
    if len(datagram) != _WAKE.size + count * _RANGE.size:
        raise ValueError(f"{count} ranges take {_WAKE.size + count * _RANGE.size} bytes")
    ranges = tuple(map(WakeRange._make, _RANGE.iter_unpack(datagram[_WAKE.size :])))
    for guest, length in ranges:
        if guest + length > _END:
            raise _broken(WakeReason.RANGE, f"{length:#x} bytes at {guest:#x} wrap around the address space")
    return Wake(number, ranges)


def _ack(datagram: bytes) -> WakeAck:
    _, status, number, issued = _ACK.unpack(datagram)
    return WakeAck(number, issued, WakeStatus(status))


def _error(datagram: bytes) -> WakeError:
    _, reason = _ERROR.unpack(datagram)
    return WakeError(WakeReason(reason))


_UNPACK: Final[Mapping[int, Callable[[bytes], WakeMessage]]] = {
    WakeKind.HELLO: _hello,
    WakeKind.WAKE: _wake,
    WakeKind.ACK: _ack,
    WakeKind.ERROR: _error,
}


def _broken(reason: WakeReason, words: str) -> RemoteProtocolError:
    return RemoteProtocolError(None, f"wake channel: {words}", answer=WakeError(reason).pack())


class WakeServer:
    """The back-end's end of one channel."""

    def __init__(self) -> None:
        self._greeted = False

    def receive(self, datagram: bytes) -> WakeHello | Wake:
        """A HELLO to send back as it is, or a WAKE to be fulfilled and acknowledged.

        Raises RemoteProtocolError: send its ``answer`` and close.
        """
        match unpack_wake(datagram):
            case WakeHello(version) if not self._greeted:
                self._greeted = True
                return WakeHello(min(version, WAKE_VERSION), WAKE_MAX_RANGES)
            case Wake() as wake if self._greeted:
                return wake
            case other:
                expected = "WAKE" if self._greeted else "HELLO"
                raise _broken(WakeReason.ORDER, f"{other} came, {expected} was expected")


class WakeClient:
    """The front-end's end of one channel: begin with ``WakeHello()``."""

    def __init__(self) -> None:
        self.ranges = 0
        """How many the back-end takes in a message; 0 until its HELLO has come."""
        self._id = 0
        self._waiting: deque[Wake] = deque()

    def request(self, ranges: Iterable[tuple[int, int]]) -> Iterator[Wake]:
        """The messages that these (guest address, length) take, none if there are no ranges.

        Each counts as sent when it is taken. Raises LocalProtocolError before the back-end's HELLO was received, and
        for a range that does not fit into the address space.
        """
        if not self.ranges:
            raise LocalProtocolError(None, "wake channel: the back-end has not said HELLO yet")
        rest = [_checked(*one) for one in ranges]
        while rest:
            batch, rest = rest[: self.ranges], rest[self.ranges :]
            self._id += 1
            self._waiting.append(Wake(self._id, tuple(batch)))
            yield self._waiting[-1]

    def receive(self, datagram: bytes) -> WakeAck | None:
        """The acknowledgement of the oldest message that has none yet, or None for the HELLO.

        Raises RemoteProtocolError, and then there is nothing to send: close.
        """
        match unpack_wake(datagram):
            case WakeHello(version, ranges) if not self.ranges and version <= WAKE_VERSION and ranges:
                self.ranges = min(ranges, WAKE_MAX_RANGES)
                return None
            case WakeAck() as ack if self._waiting and self._acknowledges(ack, self._waiting[0]):
                self._waiting.popleft()
                return ack
            case WakeError(reason):
                raise RemoteProtocolError(None, f"wake channel: the back-end refuses what we sent: {reason.name}")
            case other:
                raise RemoteProtocolError(None, f"wake channel: {other} answers nothing that was sent")

    def _acknowledges(self, ack: WakeAck, wake: Wake) -> bool:
        return ack.id == wake.id and ack.issued <= (wake.length if ack.status is WakeStatus.ISSUED else 0)


def _checked(guest: int, length: int) -> WakeRange:
    if guest < 0 or length < 0 or guest + length > _END:
        raise LocalProtocolError(None, f"{length:#x} bytes at {guest:#x} do not fit into an address space of 64 bits")
    return WakeRange(guest, length)
