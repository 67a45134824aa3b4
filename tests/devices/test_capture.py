"""What passes a network device, in a pcapng file: every frame, both ways, as Wireshark reads it; and frames that go on
whatever becomes of the file."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import resource
import struct
import subprocess
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from shutil import which

import pytest

from tests.devices.interface import MAC, Interface, frame
from vhostuser.devices.capture import LOST, Capture
from vhostuser.devices.ends import End, EndError, Hub, Sink, loopback
from vhostuser.devices.net import FRAMES, MTU_MOST, Net, NetSettings
from vhostuser.metrics import Sample
from vhostuser.testing.leaks import no_open_fds

Connected = Callable[[End], Awaitable[Interface]]


@pytest.fixture
async def connected() -> AsyncIterator[Connected]:
    """Makes started interfaces in front of an end."""
    async with contextlib.AsyncExitStack() as stack:

        async def make(end: End) -> Interface:
            interface = Interface(end, NetSettings(mtu=MTU_MOST), slot_bytes=16384, slots=16)
            stack.push_async_callback(interface.close)
            return await interface.start()

        yield make


async def end(capture: Capture, *guests: Interface) -> None:
    """A frame is recorded when its ring is done with it, which is after the guest has it."""
    for guest in guests:
        for ring in guest.pair.rings:
            await guest.pair.frontend.stop_ring(ring)
    capture.close()


# ---- reading, by the grammar of the draft and nothing of ours


@dataclass(frozen=True)
class Packet:
    interface: str
    at: int
    data: bytes
    length: int
    flags: int


def blocks(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Kinds and bodies. Section 3.1: the length stands at both ends, and is a multiple of 4."""
    while data:
        kind, size = struct.unpack_from("<II", data)
        assert size % 4 == 0 and size >= 12 and struct.unpack_from("<I", data, size - 4) == (size,)
        yield kind, data[8 : size - 4]
        data = data[size:]


def options(data: bytes) -> dict[int, bytes]:
    """Section 3.5."""
    found = {}
    while True:
        code, size = struct.unpack_from("<HH", data)
        if not code:
            assert (size, data[4:]) == (0, b"")
            return found
        found[code] = data[4 : 4 + size]
        data = data[4 + size + -size % 4 :]


def read(path: Path) -> list[Packet]:
    """Sections 4.1 to 4.3. In the order of their times: threads write side by side."""
    (kind, section), *rest = blocks(path.read_bytes())
    assert kind == 0x0A0D0D0A and struct.unpack_from("<IHHq", section) == (0x1A2B3C4D, 1, 0, -1)
    names, packets = [], []
    for kind, body in rest:
        if kind == 1:
            assert struct.unpack_from("<HH", body) == (1, 0), "Ethernet"
            said = options(body[8:])
            assert said[9] == b"\x09", "nanoseconds"
            names.append(said[2].decode())
        else:
            assert kind == 6
            number, high, low, kept, length = struct.unpack_from("<IIIII", body)
            (flags,) = struct.unpack("<I", options(body[20 + kept + -kept % 4 :])[2])
            packets.append(Packet(names[number], high << 32 | low, body[20 : 20 + kept], length, flags))
    return sorted(packets, key=lambda packet: packet.at)


IN, OUT = 1, 2


# ---- frames


@pytest.mark.parametrize("make", [loopback, lambda: loopback(2)], ids=["one pair", "two"])
async def test_every_frame_is_in_it_both_ways(connected: Connected, tmp_path: Path, make: Callable[[], End]) -> None:
    path, began = tmp_path / "file", time.time_ns()
    capture = Capture(str(path), ["port"])
    guest = await connected(capture.end(make(), 0))
    sent = [frame(size, size) for size in (14, 60, 61, 62, 63, 1514, 9000)]
    for data in sent:
        guest.send(data)
        assert [got for _, got in await guest.receive(1)] == [data]
    await guest.pair.frontend.send_rarp(MAC)
    ((_, announced),) = await guest.receive(1)
    await end(capture, guest)
    packets = read(path)
    for direction in (IN, OUT):
        assert [packet.data for packet in packets if packet.flags == direction] == [*sent, announced]
    assert all(began <= packet.at <= time.time_ns() for packet in packets)
    assert {packet.interface for packet in packets} == {"port"}
    assert not lost(guest.device) and path.stat().st_mode & 0o777 == 0o600


async def test_each_port_is_an_interface(connected: Connected, tmp_path: Path) -> None:
    capture = Capture(str(tmp_path / "file"), ["one", "other"])
    one, other = [await connected(capture.end(port, number)) for number, port in enumerate(Hub(2, 1).ports)]
    one.send(frame())
    assert [data for _, data in await other.receive(1)] == [frame()]
    await end(capture, one, other)
    assert [(packet.interface, packet.flags) for packet in read(tmp_path / "file")] == [("one", OUT), ("other", IN)]


@pytest.mark.parametrize("snap", [14, 15, 64])
async def test_of_long_frames_the_beginning_is_kept_and_the_length_told(
    connected: Connected, tmp_path: Path, snap: int
) -> None:
    capture = Capture(str(tmp_path / "file"), ["port"], snap=snap)
    guest = await connected(capture.end(loopback(), 0))
    guest.send(frame(1000), frame(60, 2))
    assert [data for _, data in await guest.receive(2)] == [frame(1000), frame(60, 2)], "themselves are whole"
    await end(capture, guest)
    for direction in (IN, OUT):
        kept = [(packet.data, packet.length) for packet in read(tmp_path / "file") if packet.flags == direction]
        assert kept == [(frame(1000)[:snap], 1000), (frame(60, 2)[:snap], 60)]


@pytest.mark.skipif(not which("tshark"), reason="tshark is not installed")
async def test_wireshark_reads_it(connected: Connected, tmp_path: Path) -> None:
    capture = Capture(str(tmp_path / "file"), ["/run/net.sock"], snap=40)
    guest = await connected(capture.end(loopback(), 0))
    guest.send(frame(1000))
    await guest.receive(1)
    await end(capture, guest)
    fields = ("frame.interface_name", "frame.packet_flags_direction", "frame.len", "frame.cap_len", "eth.src")
    command = ["tshark", "-r", str(tmp_path / "file"), "-Tfields", *[word for name in fields for word in ("-e", name)]]
    home = {"HOME": str(tmp_path), "PATH": "/usr/bin:/bin"}
    done = await asyncio.to_thread(subprocess.run, command, env=home, capture_output=True, text=True, check=True)
    seen = [line.split("\t") for line in done.stdout.splitlines()]
    assert sorted((line[0], int(line[1], 16), *line[2:]) for line in seen) == [
        ("/run/net.sock", direction, "1000", "40", MAC.hex(":")) for direction in (IN, OUT)
    ]


# ---- files that take nothing


def lost(device: Net) -> int:
    samples: list[Sample] = [sample for sample in device.measure() if sample.metric is LOST]
    return sum(int(sample.value) for sample in samples)  # type: ignore[arg-type]


async def test_a_slow_file_stops_no_frame(
    connected: Connected, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A pipe that nobody reads. What it has no room for is counted, and said once."""
    os.mkfifo(tmp_path / "file")
    reader = os.open(tmp_path / "file", os.O_RDONLY | os.O_NONBLOCK)
    capture = Capture(str(tmp_path / "file"), ["port"])
    guest = await connected(capture.end(Sink(), 0))
    while lost(guest.device) < 100:
        guest.send(*[frame(16000, seed) for seed in range(8)])
        await guest.sent(8)
    count = guest.counted(FRAMES, 1)
    os.set_blocking(reader, False)
    data = bytearray()
    draining = asyncio.ensure_future(asyncio.to_thread(capture.close))
    while not draining.done():
        with contextlib.suppress(BlockingIOError):
            data += os.read(reader, 1 << 20)
        await asyncio.sleep(0)
    with contextlib.suppress(BlockingIOError):
        while more := os.read(reader, 1 << 20):
            data += more
    os.close(reader)
    (tmp_path / "read").write_bytes(data)
    packets = read(tmp_path / "read")
    assert len(packets) + lost(guest.device) == count, "each is in it or counted"
    assert caplog.text.count("it is too slow") == 1


async def test_a_full_disk_stops_no_frame_and_leaves_whole_blocks(
    connected: Connected, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A file that may not grow; then it may."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    capture = Capture(str(tmp_path / "file"), ["port"])
    guest = await connected(capture.end(Sink(), 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        while lost(guest.device) < 10:
            guest.send(frame(9001))
            await guest.sent(1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    caplog.set_level(logging.DEBUG)
    guest.send(frame(60))
    await guest.sent(1)
    capture.close()
    packets = read(tmp_path / "file")
    assert packets[-1].data == frame(60), "written on when there is room again"
    assert {packet.data for packet in packets[:-1]} == {frame(9001)} and len(packets) > 10
    assert len(packets) + lost(guest.device) == guest.counted(FRAMES, 1)
    assert caplog.text.count("frames are missing in it from here on: File too large") == 1


def test_a_file_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    with pytest.raises(EndError, match=r"capture .*/nowhere/file: No such file or directory"):
        Capture(str(tmp_path / "nowhere/file"), ["port"])


async def test_nothing_is_left_of_a_capture(tmp_path: Path) -> None:
    with no_open_fds():
        capture = Capture(str(tmp_path / "file"), ["port"])
        end = capture.end(Sink(), 0)
        attending = asyncio.ensure_future(end.attend(lambda up: None))
        await asyncio.sleep(0)
        attending.cancel()
        await asyncio.wait([attending])
        del capture, end, attending
