"""``--wake-socket``: a program whose threads are woken by messages, and the life of its socket file."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import stat
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.devices.test_program import PATIENCE, Program, answers, front_end, run
from vhostuser.driverqueue import DriverQueue
from vhostuser.faultserver import FaultServer, FilePiece, MappedFile
from vhostuser.frontend import DRIVABLE, Frontend, FrontendRing, PostcopyClient, SharedMemory
from vhostuser.protocol import FrontendRequest, PostcopyAck, ProtocolFeature
from vhostuser.uffd import Userfaultfd
from vhostuser.wake import BlockingWakeChannel, WakeChannel

EVENT_IDX = 1 << 29
SECTORS = b"\5" * 8192
HEADER, STATUS, DATA = 0x8000, 0x8010, 0x10000


class Paths:
    def __init__(self, directory: Path) -> None:
        self.main, self.wake, self.disk = directory / "s", directory / "w", directory / "disk.img"
        self.disk.write_bytes(SECTORS)

    @property
    def options(self) -> list[str]:
        return [f"--blk-file={self.disk}", f"--socket-path={self.main}", f"--wake-socket={self.wake}"]


@pytest.fixture
def paths(tmp_path: Path) -> Paths:
    return Paths(tmp_path)


@pytest.fixture
def start(paths: Paths, tmp_path: Path) -> Iterator[Callable[..., Program]]:
    started: list[Program] = []

    def make(*arguments: str) -> Program:
        started.append(Program([*paths.options, *arguments], tmp_path / "notify"))
        return started[-1]

    yield make
    for program in started:
        program.process.kill()
        program.process.communicate()


def test_it_has_the_permissions_of_the_main_socket_and_goes_with_the_program(
    start: Callable[..., Program], paths: Paths
) -> None:
    program = start()
    assert stat.S_IMODE(paths.wake.stat().st_mode) == stat.S_IMODE(paths.main.stat().st_mode) == 0o600
    with BlockingWakeChannel.connect(str(paths.wake)) as channel:
        assert channel.wake([(0, 4096)]) == 0
        status, errors = program.end(signal.SIGTERM)
    assert (status, "Traceback" in errors) == (0, False)
    assert not {entry.name for entry in paths.main.parent.iterdir()} - {"disk.img"}
    start("--socket-mode=0660", f"--socket-group={os.getegid()}")
    assert (stat.S_IMODE(paths.wake.stat().st_mode), paths.wake.stat().st_gid) == (0o660, os.getegid())


def test_a_dead_socket_is_replaced_and_a_living_one_is_not(start: Callable[..., Program], paths: Paths) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as dead:
        dead.bind(str(paths.wake))
    start()
    other = [f"--blk-file={paths.disk}", f"--socket-path={paths.main}2", f"--wake-socket={paths.wake}"]
    ended = run(*other)
    assert (ended.returncode, ended.stderr.count("\n")) == (1, 1)
    assert str(paths.wake) in ended.stderr
    assert not Path(f"{paths.main}2").exists()


def test_the_same_path_for_both_is_a_usage_error(paths: Paths) -> None:
    ended = run(f"--blk-file={paths.disk}", f"--socket-path={paths.main}", f"--wake-socket={paths.main}")
    assert (ended.returncode, ended.stderr.count("\n")) == (2, 1)
    assert "--wake-socket" in ended.stderr


def test_who_is_silent_on_it_disturbs_nobody(start: Callable[..., Program], paths: Paths) -> None:
    start()
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as silent, front_end(paths.main) as sock:
        silent.connect(str(paths.wake))
        assert answers(sock)


@pytest.mark.postcopy
async def test_a_request_that_waits_for_a_page_is_released_by_a_message(
    start: Callable[..., Program], paths: Paths
) -> None:
    """The front-end places by its own userfaultfd and does no ioctl on the program's."""
    start()
    memory = SharedMemory((0, 1 << 20))
    host = memory.map.regions[0].host
    ring = FrontendRing(0, DriverQueue(memory.map, 0, 16))
    memory.map.write(HEADER, struct.pack("<IIQ", 0, 0, 0) + b"\xff")
    ring.queue.offer([(HEADER, 16)], [(DATA, len(SECTORS)), (STATUS, 1)])
    ring.queue.publish()
    async with await Frontend.connect(str(paths.main)) as frontend, await WakeChannel.connect(str(paths.wake)) as wakes:
        theirs = await in_postcopy(frontend, memory)
        await frontend.start_ring(ring, memory)
        ring.kick()
        pages = {await faulted(theirs), await faulted(theirs)}
        with Userfaultfd.open() as ours:
            ours.register(host + DATA, len(SECTORS))
            ours.copy(host + DATA, b"\1" * len(SECTORS))
            assert memory.map.read(STATUS, 1) == b"\xff", "it was woken without a message"
            assert await wakes.wake([(DATA, len(SECTORS))]) == len(SECTORS)
            async with asyncio.timeout(PATIENCE):
                while ring.queue.take() is None:  # a ring calls once when it starts
                    await ring.called()
            ours.unregister(host + DATA, len(SECTORS))
        assert len(pages) == 2
        assert memory.map.read(STATUS, 1) == b"\0"
        assert memory.map.read(DATA, len(SECTORS)) == SECTORS
        await frontend.request(FrontendRequest.POSTCOPY_END)
        assert await wakes.wake([(DATA, len(SECTORS))]) == 0
    theirs.close()
    ring.close()
    memory.close()


@pytest.mark.postcopy
async def test_a_fault_server_wakes_the_program_by_messages_only(start: Callable[..., Program], paths: Paths) -> None:
    """Every page is missing, the ring's too; and the server's own wakes by descriptor would show in its counters."""
    start()
    memory = SharedMemory((0, 1 << 20))
    ring = FrontendRing(0, DriverQueue(memory.map, 0, 16))
    memory.map.write(HEADER, struct.pack("<IIQ", 0, 0, 0) + b"\xff")
    ring.queue.offer([(HEADER, 16)], [(DATA, len(SECTORS)), (STATUS, 1)])
    ring.queue.publish()
    with moved(memory) as source, FaultServer(memory, source) as server:
        async with await Frontend.connect(str(paths.main)) as frontend:
            await frontend.negotiate(features=DRIVABLE & ~EVENT_IDX)
            if not frontend.session.has(ProtocolFeature.PAGEFAULT):
                pytest.skip("userfaultfd is not permitted here")
            with await PostcopyClient.advise(frontend) as client, BlockingWakeChannel.connect(str(paths.wake)) as wakes:
                await client.listen()
                await client.share(memory)
                served = server.add_client(
                    "blk", client.uffd, client.regions, channel=wakes.fileno(), channel_ranges=wakes.ranges
                )
                await client.acknowledge()
                await frontend.start_ring(ring, memory)
                ring.kick()
                async with asyncio.timeout(PATIENCE):
                    while ring.queue.take() is None:  # may wait for a page itself, as a virtual CPU does
                        await ring.called()
                server.prefetch()
                await asyncio.to_thread(server.wait)
                stats = served.stats()
                await client.end()
    assert memory.map.read(DATA, len(SECTORS)) == SECTORS
    assert stats.woken >= 3  # the header, two pages of data
    assert stats.acknowledged >= 4096 * stats.woken
    assert stats.wakes == stats.channel
    ring.close()
    memory.close()


@contextmanager
def moved(memory: SharedMemory) -> Iterator[MappedFile]:
    """What the memory held, as a source; the memory itself becomes a hole."""
    size = memory.map.regions[0].size
    fd = os.memfd_create("source", os.MFD_CLOEXEC)
    os.write(fd, memory.map.read(0, size))
    os.truncate(memory.fds[0], 0)
    os.truncate(memory.fds[0], size)
    source = MappedFile(FilePiece(0, size, fd))
    os.close(fd)
    yield source
    source.close()


async def in_postcopy(frontend: Frontend, memory: SharedMemory) -> Userfaultfd:
    """The back-end's userfaultfd, once the handshake is done."""
    await frontend.negotiate(features=DRIVABLE & ~EVENT_IDX)
    if not frontend.session.has(ProtocolFeature.PAGEFAULT):
        pytest.skip("userfaultfd is not permitted here")
    _, fds = await frontend.request(FrontendRequest.POSTCOPY_ADVISE)
    await frontend.request(FrontendRequest.POSTCOPY_LISTEN)
    await frontend.set_memory(memory)
    await frontend.request(FrontendRequest.POSTCOPY_ACK, PostcopyAck())
    return Userfaultfd(fds.take())


async def faulted(theirs: Userfaultfd) -> Any:
    """The address of the next fault."""
    loop = asyncio.get_running_loop()
    ready = asyncio.Event()
    loop.add_reader(theirs.fileno(), ready.set)
    try:
        await asyncio.wait_for(ready.wait(), PATIENCE)
    finally:
        loop.remove_reader(theirs.fileno())
    (fault,) = theirs.read(1)
    return fault.address
