"""The network device through a real connection, with the ends that stay in the process (virtio 1.3, section 5.1)."""

from __future__ import annotations

import asyncio
import struct

import pytest

from tests.devices.interface import MAC, RECEIVED, Connected, Interface, bit, frame
from vhostuser.devices.ends import TSO, Hub, NetFeature, Sink, Source, loopback
from vhostuser.devices.net import BYTES, FRAMES, USELESS, Net, NetSettings
from vhostuser.drivers.net import MRG_RXBUF, NetHeader
from vhostuser.frontend import DRIVABLE, SharedLog
from vhostuser.protocol import BackendRequest, ProtocolFeature, RequestRefused, VirtioFeature

LEGACY = DRIVABLE & ~VirtioFeature.VERSION_1.mask
PLAIN = DRIVABLE & ~bit(MRG_RXBUF)
PACKED = DRIVABLE | VirtioFeature.RING_PACKED.mask
ANY_LENGTH = DRIVABLE & ~bit(NetFeature.MTU)
HEADERS = pytest.mark.parametrize(
    "features",
    [DRIVABLE, PLAIN, LEGACY, LEGACY & ~bit(MRG_RXBUF), PACKED],
    ids=["merged", "plain", "old-merged", "old-plain", "packed"],
)

# ---- frames


@HEADERS
async def test_frames_come_back_from_the_loop_as_they_were_sent(connected: Connected, features: int) -> None:
    guest = await connected(loopback(), features=features)
    frames = [frame(size, size) for size in (14, 60, 64, 1000, 1514)] * 20
    got = []
    for start in range(0, 100, 10):
        guest.send(*frames[start : start + 10])
        got += await guest.receive(10)
        await guest.sent(10)
    assert [data for _, data in got] == frames
    one = 1 if guest.header == 12 else None
    assert {header for header, _ in got} == {NetHeader(num_buffers=one)}
    for ring in (0, 1):
        assert guest.counted(FRAMES, ring) == 100
        assert guest.counted(BYTES, ring) == sum(map(len, frames))
        assert not guest.dropped(ring)


@pytest.mark.parametrize("size", [14, 52, 53, 100, 116, 117, 600, 2000])
async def test_a_long_frame_takes_several_buffers_each_but_the_last_full(connected: Connected, size: int) -> None:
    """5.1.6.3.2, 5.1.6.4: num_buffers says how many."""
    guest = await connected(loopback(), features=ANY_LENGTH, slot_bytes=64, slots=60)
    at = guest.put(bytes(12) + frame(size))
    for _ in range(3):
        assert guest.pair.rings[1].queue.offer([(at, 12 + size)]) is not None
        guest.publish(1)
        ((header, data),) = await guest.receive(1)
        assert data == frame(size)
        assert header.num_buffers == -(-(size + 12) // 64)


async def test_a_header_in_any_pieces_and_empty_descriptors_are_one_frame(connected: Connected) -> None:
    """2.7.4.1: a device must not assume where descriptors begin."""
    guest = await connected(loopback())
    wire = bytes(12) + frame(60)
    for pieces in ([wire], [wire[:10], wire[10:12], wire[12:]], [wire[i : i + 1] for i in range(40)] + [wire[40:]]):
        assert await guest.transmit(*pieces) == 0
        assert [data for _, data in await guest.receive(1)] == [frame(60)]
    assert await guest.transmit(b"", wire[:11], b"", wire[11:20], b"", wire[20:], b"") == 0
    assert [data for _, data in await guest.receive(1)] == [frame(60)]


async def test_a_header_that_is_said_to_be_writable_is_read(connected: Connected) -> None:
    """DPDK's driver says so of the first descriptor of an indirect table on a packed ring (seen in 22.11)."""
    guest = await connected(loopback(), features=PACKED, indirect=True)
    pieces = [(guest.put(bytes(12)), 12, True), (guest.put(frame(60)), 60, False)]
    assert guest.pair.rings[1].queue.offer_in_order(pieces) is not None
    guest.publish(1)
    assert [data for _, data in await guest.receive(1)] == [frame(60)]


async def test_the_longest_frame_passes_and_one_byte_more_does_not(connected: Connected) -> None:
    guest = await connected(loopback(), features=ANY_LENGTH, slot_bytes=16384, slots=8)
    longest = 65535 + 14 + 8
    wire = bytes(12) + frame(longest)
    assert await guest.transmit(wire[:40000], wire[40000:]) == 0
    ((header, data),) = await guest.receive(1)
    assert (header.num_buffers, data) == (5, frame(longest))
    await guest.transmit(wire, b"x")
    assert guest.dropped(1) == {"oversize": 1}


async def test_a_source_never_ends_and_a_sink_takes_everything(connected: Connected) -> None:
    guest = await connected(Source(size=1000))
    got = await guest.receive(200)
    assert {data for _, data in got} == {got[0][1]} and len(got[0][1]) == 1000
    guest.send(frame(), frame())
    await guest.sent(2)
    assert guest.counted(FRAMES, 1) == 2
    quiet = await connected(Sink())
    quiet.send(frame())
    await quiet.sent(1)
    assert quiet.counted(BYTES, 1) == 60 and not quiet.counted(FRAMES, 0)


# ---- what is not a frame


def header(kind: int = 0, size: int = 0, *, needs: int = 1, start: int = 34, offset: int = 16) -> bytes:
    return struct.pack("<BBHHHHH", needs, kind, 0, size, start, offset, 0)


BAD = {
    "nothing": ((b"",), "header"),
    "11 bytes": ((bytes(11),), "header"),
    "a header alone": ((bytes(12),), "runt"),
    "13 bytes": ((bytes(12), bytes(13)), "runt"),
    "checksum behind the frame": ((header(start=34, offset=25), frame(60)), "checksum"),
    "checksum one byte out": ((header(start=34, offset=24 + 1), frame(60)), "checksum"),
    "checksum from the end": ((header(start=0xFFFF, offset=0xFFFF), frame(60)), "checksum"),
    "checksum in the Ethernet header": ((header(start=13, offset=4), frame(60)), "checksum"),
    "segments of nothing": ((header(kind=1, size=0), frame(1000)), "segmentation"),
    "segments without a checksum": ((header(kind=1, size=500, needs=0), frame(1000)), "segmentation"),
    "UDP fragments": ((header(kind=3, size=500), frame(1000)), "segmentation"),
    "a kind that does not exist": ((header(kind=2, size=500), frame(1000)), "segmentation"),
    "every bit": ((header(kind=0xFF, size=500), frame(1000)), "segmentation"),
    "UDP with the congestion bit": ((header(kind=0x85, size=500), frame(1000)), "segmentation"),
}


@pytest.mark.parametrize("name", BAD)
async def test_what_is_no_frame_is_dropped_counted_and_never_forwarded(connected: Connected, name: str) -> None:
    pieces, reason = BAD[name]
    guest = await connected(loopback())
    assert await guest.transmit(*pieces) == 0
    assert guest.dropped(1) == {reason: 1}
    guest.send(frame(77))
    assert [data for _, data in await guest.receive(1)] == [frame(77)], "and nothing before it"
    await guest.sent(1)
    assert guest.counted(FRAMES, 1) == 1


WITHOUT = [
    (NetFeature.CSUM, header(), "checksum"),
    (NetFeature.HOST_TSO4, header(kind=1, size=500), "segmentation"),
    (NetFeature.HOST_TSO6, header(kind=4, size=500), "segmentation"),
    (NetFeature.HOST_USO, header(kind=5, size=500), "segmentation"),
    (NetFeature.HOST_ECN, header(kind=0x81, size=500), "segmentation"),
]


@pytest.mark.parametrize(("feature", "front", "reason"), WITHOUT, ids=lambda value: getattr(value, "name", None))
async def test_offloads_pass_if_they_were_negotiated(
    connected: Connected, feature: NetFeature, front: bytes, reason: str
) -> None:
    guest = await connected(loopback())
    await guest.transmit(front, frame(1000))
    ((got, data),) = await guest.receive(1)
    assert (got.pack()[:10], data) == (front[:10], frame(1000))
    without = await connected(loopback(), features=DRIVABLE & ~bit(feature))
    await without.transmit(front, frame(1000))
    assert without.dropped(1) == {reason: 1}


async def test_what_a_header_says_beside_its_offloads_is_not_passed_on(connected: Connected) -> None:
    guest = await connected(loopback())
    await guest.transmit(struct.pack("<BBHHHHH", 0xFE, 0, 99, 98, 97, 96, 95), frame())
    ((got, _),) = await guest.receive(1)
    assert got == NetHeader(num_buffers=1)


# ---- what a driver accepts


def udp(payload: bytes) -> tuple[bytes, bytes]:
    """A frame of UDP whose checksum field has the pseudo header's sum, and the same with the sum completed."""
    length = 8 + len(payload)
    addresses = bytes([10, 0, 0, 1, 10, 0, 0, 2])
    ip = struct.pack(">BBHHHBBH", 0x45, 0, 20 + length, 0, 0, 64, 17, 0) + addresses
    pseudo = _sum(addresses + struct.pack(">HH", 17, length))
    start = frame(12) + b"\x08\x00" + ip + struct.pack(">HHH", 1000, 2000, length)
    whole = _sum(addresses + struct.pack(">HH", 17, length) + start[34:] + b"\0\0" + payload)
    return start + struct.pack(">H", pseudo) + payload, start + struct.pack(">H", ~whole & 0xFFFF or 0xFFFF) + payload


def _sum(data: bytes) -> int:
    data += b"\0" * (len(data) % 2)
    total = sum(struct.unpack(f">{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total


@pytest.mark.parametrize("payload", [b"", b"x", b"odd", b"even", bytes(range(256)) * 5, b"\xff\xff" * 30])
async def test_a_checksum_is_completed_for_a_driver_that_cannot(connected: Connected, payload: bytes) -> None:
    """5.1.6.4.1: without GUEST_CSUM packets must be fully checksummed."""
    guest = await connected(loopback(), features=DRIVABLE & ~bit(NetFeature.GUEST_CSUM))
    partial, whole = udp(payload)
    await guest.transmit(header(start=34, offset=6), partial)
    ((got, data),) = await guest.receive(1)
    assert (got, data) == (NetHeader(num_buffers=1), whole)


async def test_a_checksum_is_completed_once_however_often_the_frame_is_looked_at(connected: Connected) -> None:
    """A frame that waits for a buffer is looked at again; until then its bytes stay what they were."""
    guest = await connected(loopback(), features=DRIVABLE & ~bit(NetFeature.GUEST_CSUM), post=False)
    await guest.running()
    partial, whole = udp(b"waits")
    queue, memory = guest.pair.rings[0].queue, guest.pair.memory
    assert memory is not None
    for _ in range(8):
        await guest.transmit(header(start=34, offset=6), partial)
        head = queue.offer(writable=[(RECEIVED, 2048)])
        guest.publish(0)
        while (used := queue.take()) is None:
            await guest.called(0)
        assert used == (head, 12 + len(whole))
        assert memory.read(RECEIVED + 12, len(whole)) == whole


@pytest.mark.parametrize(
    ("kind", "feature"),
    [
        (1, NetFeature.GUEST_TSO4),
        (4, NetFeature.GUEST_TSO6),
        (5, NetFeature.GUEST_USO4),
        (5, NetFeature.GUEST_USO6),
        (0x81, NetFeature.GUEST_ECN),
    ],
)
async def test_segments_are_dropped_for_a_driver_that_cannot_take_them(
    connected: Connected, kind: int, feature: NetFeature
) -> None:
    guest = await connected(loopback(), features=DRIVABLE & ~bit(feature))
    await guest.transmit(header(kind=kind, size=500), frame(1000))
    guest.send(frame())
    assert [data for _, data in await guest.receive(1)] == [frame()]
    assert guest.dropped(0) == {"segmentation": 1}


# ---- buffers


async def test_a_frame_waits_for_buffers(connected: Connected) -> None:
    guest = await connected(loopback(), post=False)
    await guest.running()
    guest.send(frame(60), frame(61))
    await guest.sent(2)
    guest.post()
    assert [len(data) for _, data in await guest.receive(2)] == [60, 61]


async def test_buffers_that_no_header_fits_into_go_back_empty(connected: Connected) -> None:
    guest = await connected(loopback(), post=False)
    await guest.running()
    queue = guest.pair.rings[0].queue
    heads = [queue.offer(readable=[(RECEIVED, 64)]), queue.offer(writable=[(RECEIVED, 11)])]
    heads.append(queue.offer(writable=[(RECEIVED, 0)]))
    good = queue.offer(writable=[(RECEIVED, 11), (RECEIVED + 11, 1), (RECEIVED + 64, 60)])
    guest.publish(0)
    guest.send(frame(60))
    used: list[tuple[int, int]] = []
    while len(used) < 4:
        used += queue.take_many()
        if len(used) < 4:
            await guest.called(0)
    assert used == [(head, 0) for head in heads] + [(good, 72)]
    assert guest.pair.memory is not None and guest.pair.memory.read(RECEIVED + 64, 60) == frame(60)
    assert guest.counted(USELESS, 0) == 3


async def test_a_driver_that_negotiated_the_mtu_gets_no_longer_packet(connected: Connected) -> None:
    """5.1.4.1; two VLAN tags are no part of a packet."""
    guest = await connected(loopback())
    for size in (1500 + 23, 1500 + 22):
        await guest.transmit(bytes(12), frame(size))
    assert [len(data) for _, data in await guest.receive(1)] == [1522]
    assert guest.dropped(0) == {"oversize": 1}


async def test_an_mtu_that_is_told_while_rings_run_counts_from_then_on(connected: Connected) -> None:
    guest = await connected(loopback())
    await guest.pair.frontend.net_set_mtu(1000)
    for size in (1000 + 23, 1000 + 22):
        await guest.transmit(bytes(12), frame(size))
    assert [len(data) for _, data in await guest.receive(1)] == [1022]
    assert guest.dropped(0) == {"oversize": 1}


async def test_a_buffer_that_no_frame_fits_into_is_in_nobodys_way(connected: Connected) -> None:
    guest = await connected(loopback(), features=PLAIN, post=False)
    await guest.running()
    queue = guest.pair.rings[0].queue
    small, large = queue.offer(writable=[(RECEIVED, 12 + 13)]), queue.offer(writable=[(RECEIVED + 64, 2048)])
    guest.publish(0)
    await guest.transmit(bytes(12), frame(60))
    used: list[tuple[int, int]] = []
    while len(used) < 2:
        used += queue.take_many()
        if len(used) < 2:
            await guest.called(0)
    assert used == [(small, 0), (large, 72)]


async def test_a_frame_that_no_buffer_can_hold_is_dropped(connected: Connected) -> None:
    guest = await connected(loopback(), features=PLAIN, slot_bytes=128)
    for size in (117, 116):
        await guest.transmit(bytes(12), frame(size))
    assert [len(data) for _, data in await guest.receive(1)] == [116]
    assert guest.dropped(0) == {"room": 1}


async def test_a_frame_longer_than_the_whole_ring_is_dropped(connected: Connected) -> None:
    """64 entries of 64 bytes: 4096 with the header."""
    guest = await connected(loopback(), features=ANY_LENGTH, slot_bytes=64, slots=64)
    for size in (4085, 4084, 60):
        await guest.transmit(bytes(12), frame(size))
    assert [len(data) for _, data in await guest.receive(2)] == [4084, 60]
    assert guest.dropped(0) == {"room": 1}


@pytest.mark.parametrize("features", [DRIVABLE, PACKED], ids=["split", "packed"])
async def test_buffers_that_were_taken_and_not_used_are_given_back_at_a_stop(
    connected: Connected, features: int
) -> None:
    """GET_VRING_BASE: the next one goes on where frames end, and every buffer is still the driver's to be filled."""
    guest = await connected(loopback(), features=features)
    guest.send(*[frame(60, seed) for seed in range(5)])
    assert len(await guest.receive(5)) == 5
    base = await guest.pair.frontend.stop_ring(guest.pair.rings[0])
    assert base & 0x7FFF == 5
    await guest.pair.frontend.start_ring(guest.pair.rings[0], guest.pair.memory, base=base)  # type: ignore[arg-type]
    guest.kick()
    for round in range(20):  # more than there are buffers: none is lost
        guest.send(*[frame(60, 100 + round)] * 5)
        assert [data for _, data in await guest.receive(5)] == [frame(60, 100 + round)] * 5
        await guest.sent(5 if round else 10)


async def returned(guest: Interface, ring: int, count: int) -> list[int | None]:
    """The heads of the next chains of a ring that come back."""
    heads: list[int | None] = []
    while len(heads) < count:
        heads += [head for head, _ in guest.pair.rings[ring].queue.take_many(count - len(heads))]
        if len(heads) < count:
            await guest.called(ring)
    return heads


@pytest.mark.parametrize("features", [DRIVABLE, PACKED], ids=["split", "packed"])
async def test_buffers_come_back_in_the_order_in_which_they_were_offered(connected: Connected, features: int) -> None:
    """2.7.9, 2.8.10: dropped frames, useless buffers and those of frames in several pieces have their turn too. The
    second round begins with the head that came back last; a stop is between two frames. IN_ORDER is offered and not
    taken: under it our driver would not look at every entry."""
    guest = await connected(loopback(), features=features, post=False)
    assert await guest.pair.frontend.get_features() & VirtioFeature.IN_ORDER.mask
    receive, transmit = (ring.queue for ring in guest.pair.rings)
    await guest.running()
    wires = [guest.put(bytes(12) + frame(size)) for size in (60, 100, 61)]
    for _ in range(2):
        empty = [receive.offer(writable=[(RECEIVED + 256 * i, size)]) for i, size in enumerate((11, 72, 3, 64, 64, 80))]
        guest.publish(0)
        full = [transmit.offer([(wires[i], n)]) for i, n in ((0, 72), (0, 13), (1, 112), (0, 5))]
        guest.publish(1)
        assert await returned(guest, 1, len(full)) == full
        assert await returned(guest, 0, 5) == empty[:5]
        base = await guest.pair.frontend.stop_ring(guest.pair.rings[0])
        await guest.pair.frontend.start_ring(guest.pair.rings[0], guest.pair.memory, base=base)  # type: ignore[arg-type]
        guest.kick()
        full = [transmit.offer([(wires[2], 73)])]
        guest.publish(1)
        assert await returned(guest, 1, 1) == full
        assert await returned(guest, 0, 1) == empty[5:]


async def test_what_is_received_is_in_the_dirty_log(connected: Connected) -> None:
    guest = await connected(loopback(), slot_bytes=4096, slots=8, features=DRIVABLE)
    assert guest.pair.memory is not None
    log = SharedLog(guest.pair.memory.end)
    await guest.pair.frontend.start_log(log)
    guest.send(frame(1000))
    await guest.receive(1)
    marked = {page for start, length in log.take() for page in range(start, start + length, 4096)}
    assert RECEIVED + 7 * 4096 in marked or RECEIVED in marked
    assert sum(page >= RECEIVED for page in marked) == 1, "one buffer, and nothing that was sent"
    log.close()


# ---- rings that are disabled (section "Ring states")


async def test_a_disabled_transmit_ring_is_emptied_without_effect(connected: Connected) -> None:
    guest = await connected(loopback(), enable=False)
    for seed in range(3):
        guest.send(frame(60, seed))
        await guest.sent(1)
    assert not guest.receiver.receive()
    await guest.pair.frontend.set_vring_enable(0, True)
    await guest.pair.frontend.set_vring_enable(1, True)
    guest.send(frame(99))
    assert [data for _, data in await guest.receive(1)] == [frame(99)]
    await guest.sent(1)
    await guest.pair.frontend.set_vring_enable(1, False)
    guest.send(frame(98))
    await guest.sent(1)
    await guest.pair.frontend.set_vring_enable(1, True)
    guest.send(frame(97))
    assert [data for _, data in await guest.receive(1)] == [frame(97)]
    await guest.sent(1)
    assert guest.counted(FRAMES, 1) == 2


async def test_a_disabled_receive_ring_is_left_alone(connected: Connected) -> None:
    guest = await connected(loopback())
    await guest.pair.frontend.set_vring_enable(0, False)
    guest.send(frame(98))
    await guest.sent(1)
    assert not guest.receiver.receive()
    await guest.pair.frontend.set_vring_enable(0, True)
    assert [data for _, data in await guest.receive(1)] == [frame(98)]


# ---- what the front-end and the driver are told


async def test_features_and_configuration_space(connected: Connected) -> None:
    settings = NetSettings(mac=MAC, mtu=9000, speed=25_000)
    guest = await connected(Hub(1, 4).ports[0], settings)
    frontend = guest.pair.frontend
    offered = await frontend.get_features()
    for feature in (NetFeature.MAC, NetFeature.MTU, NetFeature.STATUS, NetFeature.MQ, NetFeature.MRG_RXBUF, *TSO):
        assert offered >> feature & 1, feature.name
    assert await frontend.get_queue_num() == 4, "front-ends count pairs"
    space = await frontend.get_config(0, 17)
    assert struct.unpack("<6sHHHIB", space) == (MAC, 1, 4, 9000, 25_000, 1)
    assert not Net(Sink()).features & bit(*TSO), "a sink has nothing to leave work to"
    assert not Net(Sink()).features >> NetFeature.MQ & 1
    with pytest.raises(RequestRefused):
        guest.device.set_config(0, MAC, migration=False)
    guest.device.set_config(0, bytes(17), migration=True)
    assert guest.device.config() == space


async def test_a_link_that_goes_down_is_announced(connected: Connected) -> None:
    guest = await connected(loopback())
    backend = await guest.pair.frontend.serve_backend()
    guest.device.set_link(False)
    event = await asyncio.wait_for(backend.next(), 5)
    assert event.code is BackendRequest.CONFIG_CHANGE_MSG
    assert await guest.pair.frontend.get_config(6, 2) == b"\0\0"
    guest.device.set_link(True)
    assert await guest.pair.frontend.get_config(6, 2) == b"\1\0"


async def test_the_mtu_of_the_front_end_is_taken_or_refused(connected: Connected) -> None:
    guest = await connected(loopback())
    await guest.pair.frontend.net_set_mtu(9000)
    assert await guest.pair.frontend.get_config(10, 2) == struct.pack("<H", 9000)
    for wrong in (67, 65536, 1 << 40):
        with pytest.raises(RequestRefused):
            await guest.pair.frontend.net_set_mtu(wrong)
    assert await guest.pair.frontend.get_config(10, 2) == struct.pack("<H", 9000)


async def test_after_a_migration_the_network_hears_where_the_guest_is(connected: Connected) -> None:
    """SEND_RARP: a reverse ARP request from the guest's address."""
    one, other = [await connected(port) for port in Hub(2, 1).ports]
    await one.pair.frontend.send_rarp(MAC)
    ((_, data),) = await other.receive(1)
    assert data[:14] == b"\xff" * 6 + MAC + b"\x80\x35"
    assert data[14:42] == bytes.fromhex("0001080006040003") + (MAC + bytes(4)) * 2
    assert len(data) == 60


async def test_with_several_pairs_memory_comes_in_whole_tables(connected: Connected) -> None:
    """QEMU 7.2 adds every region once for each pair, which would be refused the second time."""
    guest = await connected(Hub(1, 2).ports[0])
    offered = await guest.pair.frontend.get_protocol_features()
    assert not offered & ProtocolFeature.CONFIGURE_MEM_SLOTS.mask


def test_with_several_pairs_programs_do_not_offer_postcopy() -> None:
    assert not Net(Sink()).postcopy_obstacle
    assert "more than one queue pair" in Net(Sink(2)).postcopy_obstacle


def test_only_net_features_are_offered_for_which_there_is_a_message() -> None:
    assert Net(Sink()).protocol_features == ProtocolFeature.RARP.mask | ProtocolFeature.MTU.mask
