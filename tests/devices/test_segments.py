"""Frames that leave segmentation to the device, for a driver that takes no such frame (virtio 1.3, 5.1.6.2, 5.1.6.4).

What comes out is judged by the rules of IP, TCP and UDP alone: every length, checksum and number is computed here from
nothing.
"""

from __future__ import annotations

import random
import struct
from dataclasses import dataclass, replace

import pytest

from tests.devices.interface import RECEIVED, Connected, Interface, bit, frame
from vhostuser.devices.ends import Hub, NetFeature
from vhostuser.devices.net import FRAMES
from vhostuser.drivers.net import NetHeader
from vhostuser.frontend import DRIVABLE

TCPV4, TCPV6, UDP_L4, ECN = 1, 4, 5, 0x80
DESTINATION_OPTIONS = 60
FIN, PSH, ACK, CWR = 1, 8, 16, 128
SEGMENTING = bit(
    *(NetFeature.GUEST_TSO4, NetFeature.GUEST_TSO6, NetFeature.GUEST_ECN, NetFeature.GUEST_USO4, NetFeature.GUEST_USO6)
)
CHECKSUMS = DRIVABLE & ~SEGMENTING
NOTHING = CHECKSUMS & ~bit(NetFeature.GUEST_CSUM)


def checksum(data: bytes) -> int:
    """RFC 1071, of which 0 says that the data with its checksum are whole."""
    data += b"\0" * (len(data) % 2)
    total = sum(struct.unpack(f">{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


@dataclass(frozen=True)
class Long:
    """A frame that is to be cut."""

    six: bool = False
    udp: bool = False
    tags: bytes = b""
    between: bytes = b""
    """IPv4 options, or IPv6 extension headers."""
    options: bytes = b""
    flags: int = ACK
    ecn: int = 0

    @property
    def transport(self) -> int:
        return 14 + len(self.tags) + (40 if self.six else 20) + len(self.between)

    @property
    def headers(self) -> int:
        return self.transport + (8 if self.udp else 20 + len(self.options))

    def kind(self) -> int:
        return (UDP_L4 if self.udp else TCPV6 if self.six else TCPV4) | self.ecn

    def front(self, size: int) -> bytes:
        """The virtio header."""
        offset = 6 if self.udp else 16
        return struct.pack("<BBHHHHH", 1, self.kind(), self.headers, size, self.transport, offset, 0)

    def frame(self, payload: bytes) -> bytes:
        """With the pseudo header's sum where the checksum goes."""
        length = self.headers - self.transport + len(payload)
        ethernet = frame(12) + self.tags + (b"\x86\xdd" if self.six else b"\x08\x00")
        protocol = 17 if self.udp else 6
        if self.six:
            addresses = bytes(range(32))
            following = DESTINATION_OPTIONS if self.between else protocol
            ip = struct.pack(">IHBB", 0x6 << 28, len(self.between) + length & 0xFFFF, following, 64)
            ip += addresses + self.between
        else:
            addresses = bytes([10, 0, 0, 1, 10, 0, 0, 2])
            first, total = 0x45 + len(self.between) // 4, 20 + len(self.between) + length & 0xFFFF
            ip = struct.pack(">BBHHHBBH", first, 0, total, 0xFFFE, 0x4000, 64, protocol, 0) + addresses + self.between
        pseudo = ~checksum(addresses + struct.pack(">IHH", length, 0, protocol)) & 0xFFFF
        if self.udp:
            transport = struct.pack(">HHHH", 1000, 2000, length & 0xFFFF, pseudo)
        else:
            words = (5 + len(self.options) // 4) << 4
            transport = struct.pack(">HHIIBBHHH", 1000, 2000, 0xFFFFFF00, 7, words, self.flags, 99, pseudo, 0)
        return ethernet + ip + transport + self.options + payload


SHAPES = {
    "TCP": Long(),
    "TCP with options": Long(options=bytes([1, 1, 8, 10]) + bytes(8)),
    "TCP, tagged": Long(tags=b"\x81\x00\x00\x05"),
    "TCP, tagged twice": Long(tags=b"\x88\xa8\x00\x05\x81\x00\x00\x06"),
    "TCP, IPv4 with options": Long(between=b"\x94\x04\x00\x00"),
    "TCP, IPv6": Long(six=True),
    "TCP, IPv6, tagged": Long(six=True, tags=b"\x81\x00\x00\x05"),
    "TCP, IPv6 with destination options": Long(six=True, between=b"\x06\x01" + bytes(14)),
    "UDP": Long(udp=True),
    "UDP, IPv6": Long(six=True, udp=True),
}


async def two(connected: Connected, features: int, **options: object) -> tuple[Interface, Interface]:
    ports = Hub(2, 1).ports
    one = await connected(ports[0])
    return one, await connected(ports[1], features=features, **options)


async def transmit(guest: Interface, front: bytes, data: bytes) -> None:
    """In pieces that are no larger than a page."""
    wire = front + bytes(guest.header - len(front)) + data
    assert await guest.transmit(*(wire[at : at + 4000] for at in range(0, len(wire), 4000))) == 0


def is_whole(long: Long, segment: bytes, *, header: NetHeader) -> None:
    """Every length and checksum of one segment; one that is left to the driver is completed first."""
    network, transport = 14 + len(long.tags), long.transport
    if header.flags:
        assert (header.flags, header.csum_start, header.csum_offset) == (1, transport, 6 if long.udp else 16)
        at = header.csum_start + header.csum_offset
        completed = checksum(segment[header.csum_start :])
        segment = segment[:at] + struct.pack(">H", completed) + segment[at + 2 :]
    length = len(segment) - transport
    if long.six:
        assert struct.unpack_from(">H", segment, network + 4)[0] == len(segment) - network - 40
        addresses = segment[network + 8 : network + 40]
    else:
        assert struct.unpack_from(">H", segment, network + 2)[0] == len(segment) - network
        assert checksum(segment[network:transport]) == 0
        addresses = segment[network + 12 : network + 20]
    if long.udp:
        assert struct.unpack_from(">H", segment, transport + 4)[0] == length
    pseudo = addresses + struct.pack(">IHH", length, 0, 17 if long.udp else 6)
    assert checksum(pseudo + segment[transport:]) == 0


@pytest.mark.parametrize("features", [CHECKSUMS, NOTHING], ids=["checksums", "nothing"])
@pytest.mark.parametrize("shape", SHAPES)
async def test_a_long_frame_comes_as_segments_that_are_whole(connected: Connected, shape: str, features: int) -> None:
    long, size = SHAPES[shape], 1400
    one, other = await two(connected, features)
    for length in (1, size - 1, size, size + 1, 10 * size, 60_001):
        payload = random.Random(length).randbytes(length)
        await transmit(one, long.front(size), long.frame(payload))
        got = await other.receive(-(-length // size))
        for number, (header, segment) in enumerate(got):
            assert header.gso_type == 0 and bool(header.flags) == (features == CHECKSUMS)
            is_whole(long, segment, header=header)
            numbers_agree(long, segment, number, size)
        assert b"".join(segment[long.headers :] for _, segment in got) == payload
        assert {len(segment) - long.headers for _, segment in got[:-1]} <= {size}
    assert not other.dropped(0)


def numbers_agree(long: Long, segment: bytes, number: int, size: int) -> None:
    """Each datagram has a number of its own (RFC 791), and TCP goes on where the segment before it ended."""
    if not long.six:
        assert struct.unpack_from(">H", segment, 18 + len(long.tags))[0] == (0xFFFE + number) % 2**16
    if not long.udp:
        assert struct.unpack_from(">I", segment, long.transport + 4)[0] == (0xFFFFFF00 + number * size) % 2**32


async def test_what_ends_a_stream_is_said_once_and_at_the_end(connected: Connected) -> None:
    """And that the window was reduced at the beginning (RFC 3168, 6.1.2)."""
    long = replace(SHAPES["TCP"], flags=FIN | PSH | ACK | CWR, ecn=ECN)
    one, other = await two(connected, CHECKSUMS)
    await transmit(one, long.front(100), long.frame(bytes(350)))
    flags = [segment[long.transport + 13] for _, segment in await other.receive(4)]
    assert flags == [ACK | CWR, ACK, ACK, FIN | PSH | ACK]


@pytest.mark.parametrize(
    ("shape", "missing"),
    [("TCP", NetFeature.GUEST_TSO4), ("TCP, IPv6", NetFeature.GUEST_TSO6), ("UDP", NetFeature.GUEST_USO4)],
)
async def test_only_what_the_driver_does_not_take_is_cut(connected: Connected, shape: str, missing: NetFeature) -> None:
    long = SHAPES[shape]
    data = long.frame(bytes(3000))
    one, other = await two(connected, DRIVABLE)
    await transmit(one, long.front(1000), data)
    ((header, got),) = await other.receive(1)
    assert (header.gso_type, header.gso_size, got) == (long.kind(), 1000, data)
    one, other = await two(connected, DRIVABLE & ~bit(missing))
    await transmit(one, long.front(1000), data)
    assert len(await other.receive(3)) == 3


async def test_segments_wait_for_buffers_and_come_once(connected: Connected) -> None:
    """One buffer after another: a frame is looked at again for each, its checksums are right all the same."""
    long = SHAPES["TCP"]
    one, other = await two(connected, NOTHING, post=False)
    await other.running()
    payload = random.Random(1).randbytes(70 * 500)
    await transmit(one, long.front(500), long.frame(payload))
    one.send(frame(77))
    queue, memory = other.pair.rings[0].queue, other.pair.memory
    assert memory is not None
    got = []
    while len(got) < 71:
        queue.offer(writable=[(RECEIVED, 2048)])
        other.publish(0)
        while (used := queue.take()) is None:
            await other.called(0)
        got.append(memory.read(RECEIVED + other.header, used[1] - other.header))
    for number, segment in enumerate(got[:-1]):
        is_whole(long, segment, header=NetHeader())
        numbers_agree(long, segment, number, 500)
    assert b"".join(segment[long.headers :] for segment in got[:-1]) == payload
    assert got[-1] == frame(77)
    assert other.counted(FRAMES, 0) == 71


async def test_others_come_before_and_behind_a_frame_that_is_cut(connected: Connected) -> None:
    long = SHAPES["TCP"]
    one, other = await two(connected, CHECKSUMS)
    for _ in range(5):
        one.send(frame(61), frame(62))
        await one.sent(2)
        await transmit(one, long.front(1000), long.frame(bytes(2500)))
        one.send(frame(63))
        await one.sent(1)
    lengths = [len(data) for _, data in await other.receive(30)]
    assert lengths == [61, 62, 1054, 1054, 554, 63] * 5


# ---- what is not cut


def patched(data: bytes, at: int, value: bytes) -> bytes:
    return data[:at] + value + data[at + len(value) :]


TCP, SIX = SHAPES["TCP"], SHAPES["TCP, IPv6"]
OPTIONS = SHAPES["TCP, IPv6 with destination options"]
WHOLE = TCP.frame(bytes(3000))
WRONG = {
    "of another type": (TCP.front(1000), patched(WHOLE, 12, b"\x88\xb5")),
    "IPv6 that says it is IPv4": (TCP.front(1000), patched(WHOLE, 12, b"\x86\xdd")),
    "of another version": (TCP.front(1000), patched(WHOLE, 14, b"\x65")),
    "with options that are not there": (TCP.front(1000), patched(WHOLE, 14, b"\x46")),
    "a fragment": (TCP.front(1000), patched(WHOLE, 20, b"\x20\x00")),
    "behind another fragment": (TCP.front(1000), patched(WHOLE, 20, b"\x00\x01")),
    "of another protocol": (TCP.front(1000), patched(WHOLE, 23, b"\x11")),
    "without a TCP header": (TCP.front(1000), patched(WHOLE, 46, b"\x40")),
    "with a TCP header longer than the frame": (TCP.front(10), patched(TCP.frame(bytes(20)), 46, b"\xf0")),
    "that ends in the TCP header": (TCP.front(1000), WHOLE[:53]),
    "whose checksum is elsewhere": (patched(TCP.front(1000), 8, b"\x06"), WHOLE),
    "whose TCP begins elsewhere": (patched(TCP.front(1000), 6, b"\x26"), WHOLE),
    "whose TCP begins before IP": (patched(TCP.front(1000), 6, b"\x0e"), WHOLE),
    "of the other version's kind": (patched(TCP.front(1000), 1, bytes([TCPV6])), WHOLE),
    "UDP by its kind alone": (patched(TCP.front(1000), 1, bytes([UDP_L4])), WHOLE),
    "in too many pieces": (TCP.front(47), TCP.frame(bytes(65_000))),
    "of one byte each": (TCP.front(1), TCP.frame(bytes(65_000))),
    "with headers without end": (
        replace(OPTIONS, between=b"\x06\x3f" + bytes(510)).front(1000),
        replace(OPTIONS, between=b"\x06\x3f" + bytes(510)).frame(bytes(3000)),
    ),
    "with an extension header longer than it is": (
        OPTIONS.front(1000),
        patched(OPTIONS.frame(bytes(3000)), 55, b"\x09"),
    ),
    "with an extension header that is none": (OPTIONS.front(1000), patched(OPTIONS.frame(bytes(3000)), 54, b"\x3b")),
    "tags alone": (TCP.front(1000), frame(12) + b"\x81\x00" * 1000),
}


@pytest.mark.parametrize("name", WRONG)
async def test_a_frame_whose_headers_do_not_agree_is_dropped_and_counted(connected: Connected, name: str) -> None:
    front, data = WRONG[name]
    one, other = await two(connected, CHECKSUMS)
    await transmit(one, front, data)
    one.send(frame(77))
    assert [data for _, data in await other.receive(1)] == [frame(77)], "and nothing before it"
    assert other.dropped(0) == {"segmentation": 1}


async def test_whatever_a_guest_writes_others_get_segments_or_nothing(connected: Connected) -> None:
    dice = random.Random(20261130)
    one, other = await two(connected, NOTHING)
    for round in range(300):
        long = dice.choice(list(SHAPES.values()))
        data = bytearray(long.frame(dice.randbytes(dice.choice((0, 10, 3000)))))
        front = bytearray(long.front(dice.choice((100, 536, 1460))))
        for _ in range(dice.randint(0, 3)):
            data[dice.randrange(12, min(len(data), 90))] = dice.randrange(256)
        if dice.random() < 0.3:
            front[dice.randrange(2, 10)] = dice.randrange(256)
        await transmit(one, bytes(front), bytes(data))
        end = frame(99, round)
        one.send(end)
        got: list[bytes] = []
        while end not in got:
            got += [data for _, data in await other.receive(1)]
        assert sum(map(len, got)) < 64 * (len(data) + 512)
        await one.sent(1)
    assert one.counted(FRAMES, 1) + sum(one.dropped(1).values()) == 600
