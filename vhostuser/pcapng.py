"""The blocks of a pcapng file (draft-ietf-opsawg-pcapng): what Wireshark and its relatives read. Pure: bytes out.

What belongs here: the blocks, in the byte order of this machine, which the first of them tells. What does not: what
packets are about. The data path of network devices makes packet blocks of its own (``native/capture.c``).
"""

from __future__ import annotations

import struct
from typing import Final

_SECTION, _INTERFACE, _PACKET = 0x0A0D0D0A, 1, 6
_NANOSECONDS: Final = b"\x09"

INBOUND: Final = 1
OUTBOUND: Final = 2


def section(application: str) -> bytes:
    """The first block of a file. application: what writes it."""
    return _block(_SECTION, struct.pack("=IHHq", 0x1A2B3C4D, 1, 0, -1) + _options((4, application.encode())))


def interface(link: int, name: str, snap: int = 0) -> bytes:
    """Where packets come from; the first such block is number 0. Times are in nanoseconds.

    link: a LINKTYPE number. snap: bytes of each packet that are kept at most; 0: all.
    """
    options = _options((2, name.encode(errors="surrogateescape")), (9, _NANOSECONDS))
    return _block(_INTERFACE, struct.pack("=HHI", link, 0, snap) + options)


def packet(interface: int, at: int, data: bytes, *, length: int, direction: int) -> bytes:
    """One packet. at: nanoseconds since 1970. length: of the whole packet, of which ``data`` is the beginning.
    direction: INBOUND or OUTBOUND."""
    head = struct.pack("=IIIII", interface, at >> 32, at & 0xFFFFFFFF, len(data), length)
    return _block(_PACKET, head + _padded(data) + _options((2, struct.pack("=I", direction))))


def _block(kind: int, body: bytes) -> bytes:
    size = 12 + len(body)
    return struct.pack("=II", kind, size) + body + struct.pack("=I", size)


def _options(*options: tuple[int, bytes]) -> bytes:
    return b"".join(struct.pack("=HH", code, len(data)) + _padded(data) for code, data in options) + bytes(4)


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)
