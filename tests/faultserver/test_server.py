"""One memory, several processes: who faults is served, and woken, and finds the right bytes."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from tests.faultserver.conftest import MIB, PAGE, Bed, content, good, pages, until
from vhostuser.faultserver import CallableSource, EventKind, FaultServer, FileSource, WakePolicy


def test_a_page_that_is_touched_comes_and_no_other(bed: Bed) -> None:
    memory = bed.memory()
    server = bed.server(memory)
    process, client = bed.client(server, memory)
    process.read(pages(7))
    assert good(process.answers(1))
    assert (server.stats().received, server.stats().demanded) == (1, 1)
    assert (client.stats().faults, client.stats().woken, client.stats().wakes) == (1, 1, 1)
    assert not server.complete


def test_two_processes_and_our_own_threads_wait_for_one_page(bed: Bed) -> None:
    memory = bed.memory()
    server = bed.server(memory)
    server.pause()
    waiting = [bed.client(server, memory) for _ in range(2)]
    own = bed.threads(memory)
    for process, _ in waiting:
        process.read(pages(3), pages(3))
    own.read(pages(3), pages(3))
    until(lambda: server.stats().waiting == 3, "three wait")
    assert own.idle() and all(process.idle() for process, _ in waiting)
    server.resume()
    assert good(own.answers())
    assert all(good(process.answers(2)) for process, _ in waiting)
    assert server.stats().placed == 1


@pytest.mark.parametrize("policy", list(WakePolicy))
def test_everything_comes_in_the_background(bed: Bed, policy: WakePolicy) -> None:
    memory = bed.memory((0, MIB), (16 * MIB, 3 * PAGE))
    server = bed.server(memory, wake=policy)
    process, client = bed.client(server, memory)
    server.prefetch()
    assert server.wait(10)
    process.read([(0, MIB), (16 * MIB, 3 * PAGE)])
    assert good(process.answers(1))
    assert client.stats().faults == 0
    assert (client.stats().spurious > 0) == (policy is WakePolicy.BROADCAST)


def test_withheld_pages_come_only_when_they_are_waited_for(bed: Bed) -> None:
    memory = bed.memory()
    server = bed.server(memory)
    process, _ = bed.client(server, memory)
    server.withhold(8 * PAGE, 4 * PAGE)
    server.prefetch()
    assert server.drain(10)
    assert server.stats().received == 60
    process.read(pages(9))
    assert good(process.answers(1))
    assert server.stats().received == 61
    server.release(8 * PAGE, 4 * PAGE)
    assert server.wait(10)
    assert server.complete


def test_a_callable_is_asked_for_what_is_waited_for(bed: Bed) -> None:
    memory = bed.memory()
    asked: list[int] = []

    def fetch(guest: int, length: int) -> bytes:
        asked.append(guest)
        return content(guest, length)

    server = bed.server(memory, CallableSource(fetch))
    process, _ = bed.client(server, memory)
    process.read(pages(5), pages(6))
    assert good(process.answers(2))
    assert sorted(asked) == [5 * PAGE, 6 * PAGE]
    server.prefetch()
    assert server.wait(10)
    assert server.stats().duplicates == 0


def test_a_file_is_read_with_pread(bed: Bed, tmp_path: Any) -> None:
    memory = bed.memory()
    path = tmp_path / "image"
    path.write_bytes(content(0, 64 * PAGE))
    bed.server(memory, bed.closing(FileSource.image(path, [(0, 64 * PAGE)])))
    own = bed.threads(memory)
    own.read(pages(*range(64)))
    assert good(own.answers())


def test_the_record_tells_what_happened_in_order(bed: Bed) -> None:
    memory = bed.memory()
    server = bed.server(memory, events=64)
    process, client = bed.client(server, memory)
    process.read(pages(2))
    process.answers(1)
    events = until(lambda: len(server.events()) == 3 and server.events(), "three events")
    assert [event.kind for event in events] == [EventKind.FAULT, EventKind.PLACED, EventKind.WOKEN]
    assert {(event.guest, event.length) for event in events} == {(2 * PAGE, PAGE)}
    assert (events[0].client, events[2].client) == (client.number, client.number)
    assert events[0].ns <= events[1].ns <= events[2].ns


def test_what_cannot_be_served_is_refused_and_nothing_is_left_of_it(bed: Bed, no_leaks: None) -> None:
    memory = bed.memory()
    source = bed.image(memory)
    for settings in ({"batch": 0}, {"batch": 65}, {"events": 3}):
        with pytest.raises(ValueError, match="a batch 1 to 64 pages, events a power of two"):
            FaultServer(memory, source, **settings)
    with pytest.raises(ValueError, match="no piece that holds all of the region at guest address 0x10000000"):
        FaultServer(bed.memory((1 << 28, PAGE)), source)
    with FaultServer(memory, source) as server:
        for wrong in ((0, 65 * PAGE), (64 * PAGE, PAGE), (0, 0), (100, PAGE)):
            for call in (server.place, server.withhold, server.release, server.poison):
                with pytest.raises(ValueError, match="guest address"):
                    call(*wrong)
        server.prefetch()
        assert server.wait(10)
    assert server.stats().received == 64
    bed.close()


def test_nothing_is_left_behind(bed: Bed, no_leaks: None) -> None:
    before = threading.active_count()
    memory = bed.memory()
    with FaultServer(memory, source := bed.image(memory)) as server:
        process, client = bed.client(server, memory)
        server.remove_client(client)
        assert server.prefetch() is None
        assert server.wait(10)
    process.close()
    source.close()
    memory.close()
    assert threading.active_count() == before
