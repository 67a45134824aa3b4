"""Clients that come, go and die, and many that fault at once."""

from __future__ import annotations

import contextlib
import gc
import mmap
import random
import socket
import threading
import weakref
from pathlib import Path
from typing import Any

import pytest

from tests.faultserver.conftest import MIB, PAGE, Bed, ClientRegion, content, good, pages, until
from vhostuser._native import lib
from vhostuser.faultserver import CallableSource, EventKind, FaultServer, WakePolicy
from vhostuser.protocol import Wake, WakeAck, unpack_wake
from vhostuser.testing.leaks import open_fds
from vhostuser.uffd import Userfaultfd

SEEDS = (1, 20261121)


# ---- death


@pytest.mark.parametrize("policy", list(WakePolicy))
def test_a_client_killed_while_it_waits_harms_nobody(bed: Bed, policy: WakePolicy) -> None:
    memory = bed.memory()
    server = bed.server(memory, wake=policy, events=256)
    victim, dead = bed.client(server, memory)
    other, alive = bed.client(server, memory)
    server.pause()
    victim.read(*(pages(number) for number in range(8)))
    other.read(*(pages(number) for number in range(4, 12)))
    until(lambda: server.stats().waiting == 16, "sixteen threads wait")
    before = open_fds()
    victim.kill()
    until(lambda: dead.gone, "the death is noticed")
    assert server.stats().waiting == 8
    assert len(open_fds()) == len(before) - 1, "the descriptor of the dead is closed"
    assert not alive.gone
    server.resume()
    assert good(other.answers(8))
    assert [event.client for event in server.events() if event.kind is EventKind.GONE] == [dead.number]
    assert server.collect() == [dead]
    assert dead.gone and dead.stats().faults == 8


def test_a_client_that_dies_while_pages_are_placed(bed: Bed) -> None:
    memory = bed.memory((0, 16 * MIB))
    server = bed.server(memory, wake=WakePolicy.BROADCAST)
    victims = [bed.client(server, memory) for _ in range(3)]
    other, alive = bed.client(server, memory)
    for process, _ in (*victims, (other, alive)):
        process.read(*([(at, MIB) for at in range(0, 16 * MIB, MIB)] for _ in range(2)))
    server.prefetch()
    for process, _ in victims:
        process.kill()
    assert good(other.answers(2))
    assert server.wait(10)
    until(lambda: all(dead.gone for _, dead in victims), "all deaths are noticed")
    assert server.collect() == [dead for _, dead in victims]
    assert alive in server.clients and len(server.clients) == 2


def test_numbers_are_used_again_when_clients_go(bed: Bed) -> None:
    memory = bed.memory()
    server = bed.server(memory)
    process = bed.process(memory)
    numbers = set()
    for _ in range(100):
        client = server.add_client("again", process.uffd, process.regions)
        numbers.add(client.number)
        server.remove_client(client)
        server.remove_client(client)
    assert len(numbers) == 1
    server.add_client("again", process.uffd, process.regions)
    process.read(pages(3))
    assert good(process.answers(1))


def test_there_is_room_for_63_clients(bed: Bed, no_leaks: None) -> None:
    """One is our own threads. Each needs a userfaultfd of its own; any will do here."""
    memory = bed.memory()
    server = bed.server(memory)
    for number in range(63):
        with Userfaultfd.open() as uffd:
            server.add_client(f"client {number}", uffd.fileno(), [])
    with Userfaultfd.open() as uffd, pytest.raises(ValueError, match="client 64th: there are 64 clients already"):
        server.add_client("64th", uffd.fileno(), [])
    bed.close()


def test_whoever_waits_when_its_client_is_removed_can_be_served_by_the_next(bed: Bed) -> None:
    """Removing wakes: the thread looks again, and its new message is read by whoever reads next."""
    memory = bed.memory()
    server = bed.server(memory)
    process, client = bed.client(server, memory)
    server.pause()
    process.read(pages(3))
    until(lambda: server.stats().waiting == 1, "it waits")
    server.remove_client(client)
    assert server.stats().waiting == 0
    server.resume()
    server.add_client("again", process.uffd, process.regions)
    assert good(process.answers(1))


@pytest.mark.parametrize(
    ("guest", "size"),
    [(0, 65 * PAGE), (64 * PAGE, PAGE), (100, PAGE), (0, PAGE + 1)],
    ids=["long", "beyond", "odd", "part"],
)
def test_regions_that_are_none_of_ours_are_refused(bed: Bed, guest: int, size: int) -> None:
    memory = bed.memory()
    server = bed.server(memory)
    process = bed.process(memory)
    fds = open_fds()
    with pytest.raises(ValueError, match=r"client wrong: .*; expected whole pages of regions of this memory"):
        server.add_client("wrong", process.uffd, [ClientRegion(guest, process.regions[0].host, size)])
    assert open_fds() == fds
    assert len(server.clients) == 1


def test_what_is_no_userfaultfd_is_refused(bed: Bed, no_leaks: None) -> None:
    """A file, that no loop can watch; a number that is nothing; a channel that is nothing."""
    server = bed.server(bed.memory())
    expected = r"client wrong: .*; expected a userfaultfd"
    with Path("/etc/passwd").open("rb") as file, pytest.raises(OSError, match=expected):
        server.add_client("wrong", file.fileno(), [])
    for fds in ((1 << 20, -1), (0, 1 << 20)):
        with pytest.raises(OSError, match="Bad file descriptor"):
            server.add_client("wrong", fds[0], [], channel=fds[1])
    bed.close()


def test_a_client_may_have_the_memory_in_pieces(bed: Bed) -> None:
    memory = bed.memory()
    server = bed.server(memory)
    process = bed.process(memory)
    host = process.regions[0].host
    pieces = [ClientRegion(n * 16 * PAGE, host + n * 16 * PAGE, 16 * PAGE) for n in (1, 0, 3)]
    client = server.add_client("pieces", process.uffd, pieces)
    process.read(pages(3), pages(15, 16), pages(63))
    assert good(process.answers(3))
    process.read(pages(40))
    until(lambda: client.stats().stray == 1, "a fault where it is not known to have memory")


# ---- what they see


def test_the_bitmap_of_what_is_there(bed: Bed) -> None:
    """Whoever has it may look, and only look."""
    memory = bed.memory((0, 70 * PAGE), (16 * MIB, 3 * PAGE))
    server = bed.server(memory)
    fd = server.present_fd
    with pytest.raises(PermissionError):
        mmap.mmap(fd, 0, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    with mmap.mmap(fd, 0, prot=mmap.PROT_READ) as bits:
        at = server.present_at
        assert at == (0, 16)
        server.prefetch([(64 * PAGE, 2 * PAGE), (16 * MIB + PAGE, PAGE)])
        assert server.drain(10)
        assert [n for n in range(70) if bits[at[0] + n // 8] >> n % 8 & 1] == [64, 65]
        assert [n for n in range(3) if bits[at[1] + n // 8] >> n % 8 & 1] == [1]


def test_waits_are_counted_by_their_length(bed: Bed) -> None:
    memory = bed.memory()
    server = bed.server(memory)
    process, client = bed.client(server, memory)
    process.read(pages(1, 2, 3))
    process.answers(1)
    until(lambda: client.stats().woken == 3, "the last wake is counted")
    stats = client.stats()
    assert sum(stats.histogram) == 3
    assert stats.blocked_ns >= sum(count << n for n, count in enumerate(stats.histogram) if n) * 1000


def test_neighbours_are_woken_together(bed: Bed) -> None:
    """A run of pages that a client waits for, one thread each, is one wake; a gap makes two."""
    memory = bed.memory()
    server = bed.server(memory)
    process, client = bed.client(server, memory)
    server.pause()
    process.read(*(pages(number) for number in (8, 9, 10, 12)))
    until(lambda: server.stats().waiting == 4, "four threads wait")
    lib.vu_faults_place(server._native, 8 * PAGE, 5 * PAGE, content(8 * PAGE, 5 * PAGE))
    assert good(process.answers(4))
    assert (client.stats().wakes, client.stats().woken, client.stats().merged_wakes) == (2, 4, 2)


# ---- the wake channel


class BackEnd:
    """The other end of a wake channel: wakes by the client's userfaultfd, and says so."""

    def __init__(self, sock: socket.socket, process: Any) -> None:
        self.sock = sock
        self._process = process
        self.heard: list[Wake] = []

    def serve(self, count: int) -> None:
        """As many messages."""
        host = self._process.regions[0].host
        for _ in range(count):
            wake = unpack_wake(self.sock.recv(1 << 16))
            assert isinstance(wake, Wake)
            self.heard.append(wake)
            for guest, length in wake.ranges:
                assert lib.vu_uffd_wake(self._process.uffd, host + guest, length) == 0
            self.sock.send(WakeAck(wake.id, wake.length).pack())


def test_a_client_can_be_woken_by_messages(bed: Bed) -> None:
    memory = bed.memory()
    server = bed.server(memory)
    process = bed.process(memory)
    ours, theirs = bed.pair()
    client = server.add_client("by message", process.uffd, process.regions, channel=ours.fileno())
    back_end = BackEnd(theirs, process)
    process.read(pages(7))
    back_end.serve(1)
    assert good(process.answers(1))
    assert [wake.ranges for wake in back_end.heard] == [((7 * PAGE, PAGE),)]
    until(lambda: client.stats().acknowledged == PAGE, "the acknowledgement is read")
    until(lambda: client.stats().channel == 1, "the message is counted")
    assert client.stats().wakes == 1


def test_a_channel_that_is_full_holds_up_nobody(bed: Bed) -> None:
    """What finds no room is woken by the descriptor."""
    memory = bed.memory()
    server = bed.server(memory)
    process = bed.process(memory)
    ours, _ = bed.pair()
    ours.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while True:
            ours.send(b"nobody reads this")
    client = server.add_client("slow", process.uffd, process.regions, channel=ours.fileno())
    process.read(pages(7))
    assert good(process.answers(1))
    assert client.stats().channel == 0


def test_a_channel_that_is_closed_leaves_nobody_asleep(bed: Bed) -> None:
    """Messages that were not read are made good."""
    memory = bed.memory((0, 4 * MIB))
    server = bed.server(memory)
    process = bed.process(memory)
    ours, theirs = bed.pair()
    client = server.add_client("deaf", process.uffd, process.regions, channel=ours.fileno())
    process.read(*([(page * PAGE, PAGE) for page in range(start, 1024, 8)] for start in range(8)))
    until(lambda: client.stats().channel >= 8, "messages that nobody reads")
    theirs.close()
    assert good(process.answers(8))
    assert server.stats().received == 1024


def test_a_message_has_no_more_ranges_than_the_client_takes(bed: Bed) -> None:
    memory = bed.memory()
    server = bed.server(memory)
    process = bed.process(memory)
    ours, theirs = bed.pair()
    server.add_client("narrow", process.uffd, process.regions, channel=ours.fileno(), channel_ranges=2)
    back_end = BackEnd(theirs, process)
    server.pause()
    process.read(*(pages(number) for number in (1, 3, 5, 6, 8, 10)))
    until(lambda: server.stats().waiting == 6, "six threads wait")
    lib.vu_faults_place(server._native, 0, 16 * PAGE, content(0, 16 * PAGE))
    back_end.serve(3)
    assert good(process.answers(6))
    assert [len(wake.ranges) for wake in back_end.heard] == [2, 2, 1]


# ---- many at once


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("policy", list(WakePolicy))
def test_stress(bed: Bed, policy: WakePolicy, seed: int) -> None:
    """Two processes and this one, eight threads each, in random orders, from a source with random delays, with a
    background, clients that come and go, and pauses: everybody is woken and finds the right bytes."""
    chance = random.Random(seed)
    delay = threading.Event()

    def fetch(guest: int, length: int) -> bytes:
        delay.wait(chance.random() / 1000)
        return content(guest, length)

    memory = bed.memory((0, 2 * MIB), (64 * MIB, MIB))
    server = bed.server(memory, CallableSource(fetch, threads=4, most=8 * PAGE), wake=policy)
    everything = [(at, PAGE) for at in (*range(0, 2 * MIB, PAGE), *range(64 * MIB, 65 * MIB, PAGE))]
    readers: list[Any] = [bed.client(server, memory)[0] for _ in range(2)]
    idle, _ = bed.client(server, memory)
    readers.append(bed.threads(memory))
    for reader in readers:
        reader.read(*(chance.sample(everything, 128) for _ in range(8)))
    server.prefetch(chance.sample([(at, 16 * PAGE) for at in range(0, 2 * MIB, 16 * PAGE)], 20))
    for _ in range(5):
        server.pause()
        guest = server.add_client("passing by", idle.uffd, idle.regions)
        delay.wait(chance.random() / 100)
        server.resume()
        server.remove_client(guest)
    assert all(good(reader.answers(8)) for reader in readers)
    server.prefetch()
    assert server.wait(20)
    stats = server.stats()
    assert (stats.placed, stats.waiting, stats.present) == (stats.total, 0, 0)


def test_a_closed_server_keeps_no_memory(bed: Bed) -> None:
    """Huge pages are scarce: they must not wait for a garbage collection."""
    memory = bed.memory()
    server = FaultServer(memory, bed.image(memory))
    process = bed.process(memory)
    client = server.add_client("kept", process.uffd, process.regions)
    watched = weakref.ref(server)
    gc.disable()
    try:
        server.close()
        del server
        assert watched() is None
    finally:
        gc.enable()
    assert client.stats().faults == 0


def test_many_servers_come_and_go(bed: Bed, no_leaks: None) -> None:
    for _ in range(50):
        memory = bed.memory()
        with FaultServer(memory, CallableSource(content)) as server:
            server.prefetch()
            assert server.wait(10)
        memory.close()
    assert threading.active_count() < 10
