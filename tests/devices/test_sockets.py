"""Ends that are sockets: what the other side gets and may send, and what happens when it goes and comes again."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from tests.devices.interface import MAC, Interface, frame
from vhostuser.devices.ends import TSO, End, EndError
from vhostuser.devices.net import FRAMES, MTU_MOST, Net, NetSettings
from vhostuser.devices.sockets import Datagram, Stream
from vhostuser.testing.leaks import no_open_fds

LONGEST = 65557
Attended = Callable[[End], Awaitable[Interface]]


def wire(*frames: bytes) -> bytes:
    return b"".join(struct.pack(">I", len(data)) + data for data in frames)


class Peer:
    """The other side of a stream, which listens or connects; everything it waits for comes within ten seconds."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    async def frame(self) -> bytes:
        async with asyncio.timeout(10):
            (length,) = struct.unpack(">I", await self.reader.readexactly(4))
            return await self.reader.readexactly(length)

    async def ended(self) -> bool:
        async with asyncio.timeout(10):
            with contextlib.suppress(ConnectionResetError):
                return await self.reader.read() == b""
            return True

    def send(self, *frames: bytes) -> None:
        self.writer.write(wire(*frames))

    async def close(self) -> None:
        self.writer.close()
        with contextlib.suppress(ConnectionError):
            await self.writer.wait_closed()


class Server:
    """Takes the connections of an end that connects, in their order."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._peers: asyncio.Queue[Peer] = asyncio.Queue()

    async def __aenter__(self) -> Server:
        self._server = await asyncio.start_unix_server(
            lambda reader, writer: self._peers.put_nowait(Peer(reader, writer)), self.path
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()

    async def peer(self) -> Peer:
        return await asyncio.wait_for(self._peers.get(), 10)


def quick(end: Stream) -> Stream:
    """Does not pause for long."""
    end.PAUSES = (0.001, 0.01)  # type: ignore[misc]
    return end


async def link(guest: Interface, up: bool) -> None:
    """Waits until the guest is told so."""
    changed = asyncio.Event()
    guest.device.announce += (changed.set,)
    if guest.device.config()[6] != up:
        await asyncio.wait_for(changed.wait(), 10)
    assert await guest.pair.frontend.get_config(6, 2) == bytes([up, 0])


@pytest.fixture
async def attended() -> AsyncIterator[Attended]:
    """Makes started interfaces, whose ends are attended until the end of the test."""
    async with contextlib.AsyncExitStack() as stack:

        async def make(end: End, **options: int) -> Interface:
            interface = Interface(end, NetSettings(mtu=MTU_MOST), **options)
            stack.push_async_callback(interface.close)
            attending = asyncio.ensure_future(interface.device.attend())
            stack.callback(attending.cancel)
            return await interface.start()

        yield make


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[Server]:
    async with Server(tmp_path / "socket") as server:
        yield server


# ---- frames


async def test_frames_go_behind_their_lengths_both_ways(attended: Attended, server: Server) -> None:
    guest = await attended(Stream(str(server.path)), slot_bytes=16384, slots=8)
    peer = await server.peer()
    frames = [frame(size, size) for size in (14, 60, 1514, 16000)]
    for data in frames:
        guest.send(data)
        assert await peer.frame() == data
    peer.send(*frames, frame(LONGEST))
    assert [data for _, data in await guest.receive(5)] == [*frames, frame(LONGEST)]
    await guest.sent(4)
    assert guest.counted(FRAMES, 1) == 4 and guest.counted(FRAMES, 0) == 5


async def test_a_frame_may_come_in_any_pieces(attended: Attended, server: Server) -> None:
    guest = await attended(Stream(str(server.path)))
    peer = await server.peer()
    sent = [frame(60, seed) for seed in range(6)]
    data = wire(*sent)
    for start in (*range(130), 130):
        peer.writer.write(data[start : start + 1] if start < 130 else data[start:])
        await peer.writer.drain()
        await asyncio.sleep(0)
    assert [data for _, data in await guest.receive(6)] == sent


async def test_whoever_reads_slowly_gets_every_frame_whole(attended: Attended, server: Server) -> None:
    """A full socket: the rest of a frame goes before anything else, frames wait in the ring, and none is lost."""
    guest = await attended(Stream(str(server.path)), slot_bytes=16384, slots=32)
    peer = await server.peer()
    sent = [frame(9000 + seed, seed) for seed in range(200)]
    got: list[bytes] = []
    left = list(sent)
    while left or len(got) < len(sent):
        while left and guest.sender.send(left[:1]):
            left.pop(0)
        guest.publish(1)
        if len(got) == len(sent) - len(left):  # all of these have come, and their buffers have not
            await guest.sent(1)
            continue
        got.append(await peer.frame())
        guest.sender.collect()
    assert got == sent
    assert not guest.dropped(1)


async def test_a_full_socket_holds_up_neither_what_is_received_nor_a_stop(attended: Attended, server: Server) -> None:
    guest = await attended(Stream(str(server.path)), slot_bytes=16384, slots=32)
    peer = await server.peer()
    peer.reader._transport.pause_reading()  # type: ignore[attr-defined]
    for seed in range(64):
        if not guest.sender.send([frame(16000, seed)]):
            break
        guest.publish(1)
        await asyncio.sleep(0)
        guest.sender.collect()
    peer.send(frame(61))
    assert [data for _, data in await guest.receive(1)] == [frame(61)]
    await asyncio.wait_for(guest.pair.frontend.stop_ring(guest.pair.rings[1]), 10)


# ---- what is no frame


@pytest.mark.parametrize("length", [0, 1, 13, LONGEST + 1, 100_000, 0xFFFFFFFF])
async def test_a_length_that_no_frame_has_closes_the_connection(
    attended: Attended, server: Server, length: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Nobody knows where the next frame would begin. What came before counts, and a new connection begins anew."""
    caplog.set_level(logging.INFO)
    guest = await attended(quick(Stream(str(server.path))))
    peer = await server.peer()
    peer.writer.write(wire(frame(60)) + struct.pack(">I", length) + bytes(length if length < 1 << 20 else 100))
    assert [data for _, data in await guest.receive(1)] == [frame(60)]
    assert await peer.ended()
    other = await server.peer()
    other.send(frame(61))
    assert [data for _, data in await guest.receive(1)] == [frame(61)]
    assert f"closed for a frame of {length} bytes, 14 to {LONGEST} are possible" in caplog.text


# ---- connections


async def test_who_goes_is_connected_to_again_and_nothing_of_the_old_is_in_the_new(
    attended: Attended, server: Server
) -> None:
    guest = await attended(quick(Stream(str(server.path))))
    for round in range(5):
        peer = await server.peer()
        peer.send(frame(60, round))
        assert [data for _, data in await guest.receive(1)] == [frame(60, round)]
        await link(guest, True)
        guest.send(frame(64, round))
        assert await peer.frame() == frame(64, round)
        peer.writer.write(wire(frame(1000))[:500])  # half of a frame
        await peer.close()


async def test_the_last_words_of_who_goes_are_heard(attended: Attended, server: Server) -> None:
    guest = await attended(Stream(str(server.path)))
    peer = await server.peer()
    peer.send(*[frame(60, seed) for seed in range(200)])
    await peer.close()
    assert [data for _, data in await guest.receive(200)] == [frame(60, seed) for seed in range(200)]


async def test_without_a_connection_frames_are_refused_and_the_link_is_down(
    attended: Attended, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    guest = await attended(quick(Stream(str(tmp_path / "socket"))))
    assert await guest.pair.frontend.get_config(6, 2) == b"\0\0"
    guest.send(frame(), frame())
    await guest.sent(2)
    assert guest.dropped(1) == {"refused": 2}
    async with Server(tmp_path / "socket") as server:
        peer = await server.peer()
        await link(guest, True)
        guest.send(frame())
        assert await peer.frame() == frame()
        await peer.close()
        await link(guest, False)
    assert caplog.text.count("No such file or directory; trying again and again") == 1, "told once"


async def test_an_end_that_listens_takes_one_after_the_other(attended: Attended, tmp_path: Path) -> None:
    path = tmp_path / "socket"
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(str(path))
    listener.listen()
    end = quick(Stream(str(path)))
    end.listen(listener)
    guest = await attended(end)
    first, second = [Peer(*await asyncio.open_unix_connection(path)) for _ in range(2)]
    second.send(frame(62))
    first.send(frame(61))
    assert [data for _, data in await guest.receive(1)] == [frame(61)], "of the first"
    await first.close()
    assert [data for _, data in await guest.receive(1)] == [frame(62)]
    await second.close()
    end.close()


async def test_after_a_migration_the_other_side_hears_where_the_guest_is(attended: Attended, server: Server) -> None:
    guest = await attended(Stream(str(server.path)))
    peer = await server.peer()
    await guest.pair.frontend.send_rarp(MAC)
    assert (await peer.frame())[:14] == b"\xff" * 6 + MAC + b"\x80\x35"


async def test_what_came_for_whoever_was_there_before_is_forgotten_and_frames_still_begin_where_they_should(
    attended: Attended, server: Server
) -> None:
    guest = await attended(Stream(str(server.path)))
    peer = await server.peer()
    for ring in guest.pair.rings:
        await guest.pair.frontend.stop_ring(ring)
    data = wire(*[frame(60)] * 100, frame(61))
    peer.writer.write(data[:-30])
    await peer.writer.drain()
    for ring in guest.pair.rings:
        await guest.pair.frontend.start_ring(ring, guest.pair.memory)  # type: ignore[arg-type]
    await guest.running()
    peer.writer.write(data[-30:])
    assert [data for _, data in await guest.receive(1)] == [frame(61)]


async def test_nothing_is_left_of_an_end(server: Server) -> None:
    with no_open_fds():
        end = quick(Stream(str(server.path)))
        attending = asyncio.ensure_future(end.attend(lambda up: None))
        peers = [await server.peer()]
        await peers[0].close()
        peers.append(await server.peer())
        attending.cancel()
        await asyncio.wait([attending])
        await peers[1].close()
        del end, attending


def test_what_a_stream_cannot_do_is_not_offered() -> None:
    assert not Net(Stream("/nowhere")).features & sum(1 << feature for feature in TSO)
    with pytest.raises(EndError, match="one queue pair, not 2"):
        Stream("/nowhere", 2)


# ---- datagrams


@pytest.fixture
async def datagrams(attended: Attended, tmp_path: Path) -> AsyncIterator[tuple[Interface, socket.socket]]:
    """A guest, and the other side, bound and not connected, as QEMU's is."""
    local, remote = str(tmp_path / "local"), str(tmp_path / "remote")
    ours, theirs = [socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) for _ in range(2)]
    ours.bind(local)
    theirs.bind(remote)
    theirs.setblocking(False)
    end = Datagram(ours, remote)
    yield await attended(end), theirs
    theirs.close()
    end.close()


async def got(sock: socket.socket) -> bytes:
    return await asyncio.wait_for(asyncio.get_running_loop().sock_recv(sock, 1 << 17), 10)


async def test_a_datagram_is_a_frame(datagrams: tuple[Interface, socket.socket], tmp_path: Path) -> None:
    guest, other = datagrams
    for size in (14, 60, 1514, LONGEST - 100):
        other.sendto(frame(size), str(tmp_path / "local"))
        assert [data for _, data in await guest.receive(1)] == [frame(size)]
    for size in (14, 60, 1514, 2036):
        guest.send(frame(size))
        data, sender = await asyncio.get_running_loop().sock_recvfrom(other, 1 << 17)
        assert (data, sender) == (frame(size), str(tmp_path / "local")), "the other side knows us by our path"


async def test_what_is_no_frame_is_dropped_and_counted(
    datagrams: tuple[Interface, socket.socket], tmp_path: Path
) -> None:
    guest, other = datagrams
    for size in (0, 1, 13, LONGEST + 1, 100_000):
        other.sendto(bytes(size), str(tmp_path / "local"))
        other.sendto(frame(60, size), str(tmp_path / "local"))
        assert [data for _, data in await guest.receive(1)] == [frame(60, size)]
    assert guest.dropped(0) == {"runt": 3, "oversize": 2}


async def test_a_full_queue_keeps_frames_in_the_ring(datagrams: tuple[Interface, socket.socket]) -> None:
    """The other side's takes 10, unless the system was told otherwise (net.unix.max_dgram_qlen)."""
    guest, other = datagrams
    count, left, come = 600, list(range(600)), 0
    while come < count:
        while left and guest.sender.send([frame(60, left[0])]):
            left.pop(0)
        guest.publish(1)
        if come == count - len(left):  # all of these have come, and their buffers have not
            await guest.sent(1)
            continue
        assert await got(other) == frame(60, come)
        come += 1
        guest.sender.collect()
    assert not guest.dropped(1)


async def test_who_is_not_there_gets_nothing_and_who_comes_again_does(
    datagrams: tuple[Interface, socket.socket], tmp_path: Path
) -> None:
    guest, other = datagrams
    guest.send(frame(60, 1))
    assert await got(other) == frame(60, 1)
    other.close()
    guest.send(frame(60, 2))
    await guest.sent(2)
    (tmp_path / "remote").unlink()
    guest.send(frame(60, 3))
    await guest.sent(1)
    assert guest.dropped(1) == {"refused": 2}
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as again:
        again.bind(str(tmp_path / "remote"))
        again.setblocking(False)
        again.sendto(frame(61), str(tmp_path / "local"))
        assert [data for _, data in await guest.receive(1)] == [frame(61)]
        guest.send(frame(60, 4))
        assert await got(again) == frame(60, 4)


async def test_one_who_listens_to_us_alone_is_sent_to_as_well(
    datagrams: tuple[Interface, socket.socket], tmp_path: Path
) -> None:
    """Connected: it refuses the socket that we would ask for room."""
    guest, other = datagrams
    other.connect(str(tmp_path / "local"))
    for start in range(0, 300, 30):
        guest.send(*[frame(2000, seed) for seed in range(start, start + 30)])
        for seed in range(start, start + 30):
            assert await got(other) == frame(2000, seed)
        await guest.sent(30)
    assert not guest.dropped(1)


def test_a_datagram_socket_has_one_pair() -> None:
    with (
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock,
        pytest.raises(EndError, match="one queue pair, not 2"),
    ):
        Datagram(sock, "/nowhere", 2)
