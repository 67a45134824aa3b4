"""Frames that cases send, and what a frame that came must be like: as data, without rings.

What belongs here: feature bits of virtio-net, frames of any size, TCP segments and their checksums. What does not: the
header in front of a frame (``drivers.net``), rings and buffers (``nic``).
"""

from __future__ import annotations

from enum import IntEnum
from struct import Struct, pack, unpack_from

from vhostuser.conformance.suite import check

ETHER = 14
"""Bytes of an Ethernet header."""
TCP_AT, TCP_SUM_AT = ETHER + 20, 16
"""Where a TCP header begins in a frame of ``segment``, and where its checksum is in it."""
SEGMENT_HEADERS = TCP_AT + 20
_EXPERIMENTAL = b"\x88\xb5"  # IEEE 802, local experimental 1: nobody answers
_RARP = b"\x80\x35"
_US, _THEM = b"\x02\x00\x00\x00\x00\x01", b"\x02\x01"
_BYTES = bytes(range(251)) * 264
_IPV4 = Struct(">BBHHHBBH4s4s")
_TCP = Struct(">HHIIBBHHH")


class NetFeature(IntEnum):
    """Feature bits of virtio-net that rules depend on (virtio 1.2, section 5.1.3)."""

    CSUM = 0
    GUEST_CSUM = 1
    MTU = 3
    MAC = 5
    GUEST_TSO4 = 7
    GUEST_TSO6 = 8
    GUEST_ECN = 9
    GUEST_UFO = 10
    HOST_TSO4 = 11
    HOST_TSO6 = 12
    HOST_ECN = 13
    HOST_UFO = 14
    MRG_RXBUF = 15
    STATUS = 16
    MQ = 22
    SPEED_DUPLEX = 63

    @property
    def mask(self) -> int:
        """The bit itself."""
        return 1 << self


# ---- any frame


def frame(size: int = 100, number: int = 0) -> bytes:
    """A frame of ``size`` bytes, 14 or more, that no other number has: the source address has it in it."""
    addresses = _THEM + number.to_bytes(4, "big")
    body = _BYTES[number % 251 :]
    return (_US + addresses + _EXPERIMENTAL + body)[:size]


def number_of(data: bytes) -> int:
    """The number of a frame that ``frame`` made."""
    return int.from_bytes(data[8:12], "big")


def same(came: bytes, sent: bytes) -> None:
    """Sees that a frame is as it was sent. Raises Violation, with the first difference."""
    if came == sent:
        return
    shared = min(len(came), len(sent))
    differs = next((at for at in range(shared) if came[at] != sent[at]), shared)
    check(False, f"the frame of {len(sent)} bytes as it was sent", f"{len(came)} bytes, others from byte {differs} on")


def announcement(mac: bytes) -> bytes:
    """A reverse ARP request from this address (RFC 903), without padding."""
    request = pack(">HHBBH", 1, 0x0800, 6, 4, 3) + (mac + bytes(4)) * 2
    return b"\xff" * 6 + mac + _RARP + request


def is_announcement(data: bytes) -> bool:
    """Is it a reverse ARP message?"""
    return data[12:14] == _RARP


# ---- TCP


def segment(size: int) -> bytes:
    """A TCP segment over IPv4 of ``size`` bytes in all, 54 to 65549. In place of its checksum it has the sum of the
    pseudo header, as a driver leaves it (5.1.6.2)."""
    length = size - ETHER
    addresses = b"\x0a\x00\x00\x01", b"\x0a\x00\x00\x02"
    half = _IPV4.pack(0x45, 0, length, 1, 0x4000, 64, 6, 0, *addresses)
    ip = half[:10] + pack(">H", 0xFFFF ^ folded(half)) + half[12:]
    pseudo = folded(b"".join(addresses) + pack(">HH", 6, length - 20))
    tcp = _TCP.pack(1000, 2000, 1, 1, 0x50, 0x10, 65535, pseudo, 0)
    return (_US + _THEM + bytes(4) + b"\x08\x00" + ip + tcp + _BYTES)[:size]


def complete(data: bytes) -> bytes:
    """The same segment with its checksum filled in."""
    total = 0xFFFF ^ folded(data[TCP_AT:])
    at = TCP_AT + TCP_SUM_AT
    return data[:at] + pack(">H", total) + data[at + 2 :]


def folded(data: bytes) -> int:
    """The ones' complement sum of 16-bit words (RFC 1071)."""
    padded = data + bytes(len(data) % 2)
    total: int = sum(unpack_from(f">{len(padded) // 2}H", padded))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total
