"""Several sources at once: all bring pages, none is placed twice, and the loss of one holds up nobody."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faultserver.conftest import MIB, PAGE, PATIENCE, Bed, content, good, pages, until
from tests.faultserver.test_sources import Line, Source
from vhostuser.faultserver import CallableSource, Channels, ChannelStats, Placement, SourceLost, StreamSource
from vhostuser.testing import leaks
from vhostuser.uffd import Mode

BOTH = Mode.MISSING | Mode.MINOR
Fetch = Callable[[int, int], bytes]


def whole(bed: Bed, memory: object, size: int) -> None:
    assert memory.map.read(0, size) == content(0, size)  # type: ignore[attr-defined]


def settled(channels: Channels, placed: int) -> list[ChannelStats]:
    """What is counted when all of that has been, which is just after it was placed."""
    until(lambda: sum(each.placed for each in channels.stats()) == placed, f"{placed} pages placed")
    return channels.stats()


class Meeting:
    """Sources that bring nothing until all of them have been asked for something."""

    def __init__(self, count: int) -> None:
        self._barrier = threading.Barrier(count)
        self._first = threading.local()

    def fetch(self, guest: int, length: int) -> bytes:
        if not getattr(self._first, "done", False):
            self._first.done = True
            self._barrier.wait(PATIENCE)
        return content(guest, length)


def test_all_bring_pages_at_the_same_time_and_none_is_placed_twice(bed: Bed) -> None:
    memory = bed.memory((0, 4 * MIB))
    meeting = Meeting(3)
    channels = Channels(*(CallableSource(meeting.fetch, threads=1) for _ in range(3)))
    server = bed.server(memory, channels)
    server.prefetch()
    assert server.wait(PATIENCE)
    stats = settled(channels, 4 * MIB // PAGE)
    assert server.stats().placed == 4 * MIB // PAGE
    assert (server.stats().duplicates, sum(each.brought for each in stats)) == (0, 4 * MIB)
    assert all(each.asked and not each.lost for each in stats)
    whole(bed, memory, 4 * MIB)


class Failing:
    """A source that fails at its first request, and at all until it is healed; ``failed`` is set then."""

    def __init__(self) -> None:
        self.failed = threading.Event()
        self.ill = True
        self.asked: list[int] = []

    def fetch(self, guest: int, length: int) -> bytes:
        self.asked.append(guest)
        if self.ill:
            self.failed.set()
            raise OSError(5, "the line is down")
        return content(guest, length)


class Waiting:
    """A source that waits for an event before it brings anything."""

    def __init__(self, event: threading.Event) -> None:
        self._event = event

    def fetch(self, guest: int, length: int) -> bytes:
        assert self._event.wait(PATIENCE)
        return content(guest, length)


@pytest.mark.parametrize("threads", [1, 3])
def test_a_lost_channel_is_told_and_the_others_bring_what_it_was_asked_for(bed: Bed, threads: int) -> None:
    memory = bed.memory((0, 2 * MIB))
    failing, told = Failing(), []
    sources = (CallableSource(failing.fetch, threads=threads), CallableSource(Waiting(failing.failed).fetch))
    channels = Channels(*sources, on_loss=lambda number, why: told.append((number, str(why))))
    server = bed.server(memory, channels)
    server.prefetch()
    assert server.wait(PATIENCE)
    until(lambda: told, "the loss is told")
    assert told == [(0, "[Errno 5] the line is down")]
    assert (server.lost, server.paused) == (None, False)
    first, second = settled(channels, 512)
    assert (str(first.lost), first.losses, first.placed) == ("[Errno 5] the line is down", 1, 0)
    assert (second.lost, second.placed) == (None, 512)
    whole(bed, memory, 2 * MIB)


def test_who_waits_for_a_page_of_the_lost_channel_gets_it_from_another(bed: Bed) -> None:
    """The page is one that is withheld: it is brought for nobody but who waits for it."""
    memory = bed.memory()
    failing = Failing()
    channels = Channels(CallableSource(failing.fetch, threads=1))
    other = Failing()
    other.ill = False
    held = threading.Event()

    def after(guest: int, length: int) -> bytes:
        assert held.wait(PATIENCE)
        return other.fetch(guest, length)

    channels = Channels(CallableSource(failing.fetch, threads=1), CallableSource(after, threads=1))
    server = bed.server(memory, channels)
    server.withhold(0, 64 * PAGE)
    process, _ = bed.client(server, memory)
    for number in range(8):  # whichever channel is asked, some of these are the first's
        process.read(pages(number))
    assert failing.failed.wait(PATIENCE)
    held.set()
    assert good(process.answers(8))
    assert set(failing.asked) <= set(other.asked)


def test_a_channel_that_is_restored_brings_pages_again(bed: Bed) -> None:
    memory = bed.memory((0, 2 * MIB))
    failing, done = Failing(), threading.Event()
    channels = Channels(CallableSource(failing.fetch, threads=2), CallableSource(Waiting(done).fetch, threads=1))
    server = bed.server(memory, channels)
    with pytest.raises(ValueError, match="is not lost"):
        channels.restore(0)
    server.prefetch()
    until(lambda: channels.stats()[0].lost, "the loss")
    failing.ill = False
    with pytest.raises(ValueError, match="3 threads cannot take the place of one of 2"):
        channels.restore(0, CallableSource(content, threads=3))
    channels.restore(0)
    until(lambda: channels.stats()[0].placed, "the other is waiting, this one brings pages")
    done.set()
    assert server.wait(PATIENCE)
    first, _ = settled(channels, 512)
    assert (first.lost, first.losses) == (None, 1)
    whole(bed, memory, 2 * MIB)


def test_another_source_takes_a_lost_channel_s_place(bed: Bed) -> None:
    memory = bed.memory((0, MIB))
    failing, done = Failing(), threading.Event()
    channels = Channels(CallableSource(failing.fetch, threads=1), CallableSource(Waiting(done).fetch, threads=1))
    server = bed.server(memory, channels)
    server.prefetch()
    until(lambda: channels.stats()[0].lost, "the loss")
    channels.restore(0, CallableSource(content, threads=1))
    until(lambda: channels.stats()[0].placed, "it brings pages")
    done.set()
    assert server.wait(PATIENCE)
    whole(bed, memory, MIB)


def test_the_loss_of_the_last_is_the_loss_of_the_source_until_all_begin_again(bed: Bed) -> None:
    memory = bed.memory((0, MIB))
    failing = [Failing(), Failing()]
    channels = Channels(*(CallableSource(each.fetch) for each in failing))
    server = bed.server(memory, channels)
    server.prefetch()
    assert not server.wait(PATIENCE)
    assert isinstance(server.lost, SourceLost)
    assert "all 2 channels are lost" in str(server.lost)
    with pytest.raises(ValueError, match="has lost all"):
        channels.restore(0)
    for each in failing:
        each.ill = False
    server.resume()
    assert server.wait(PATIENCE)
    assert [each.losses for each in channels.stats()] == [1, 1]
    whole(bed, memory, MIB)


def test_a_loss_during_a_pause_brings_nothing_before_its_end(bed: Bed) -> None:
    memory = bed.memory()
    asked, failing = threading.Event(), Failing()

    def fail(guest: int, length: int) -> bytes:
        asked.set()
        assert go.wait(PATIENCE)
        return failing.fetch(guest, length)

    go = threading.Event()
    channels = Channels(CallableSource(fail, threads=1), CallableSource(Waiting(asked).fetch, threads=1))
    server = bed.server(memory, channels)
    server.prefetch([(0, PAGE)])
    server.prefetch([(PAGE, PAGE)])
    assert asked.wait(PATIENCE)
    server.pause()
    go.set()
    until(lambda: channels.stats()[0].lost, "the loss")
    server.prefetch()
    before = server.stats().received
    assert before <= 2, "what was under way"
    server.resume()
    assert server.wait(PATIENCE)
    whole(bed, memory, 64 * PAGE)


@pytest.mark.parametrize("placement", [Placement.COPY, Placement.CONTINUE])
def test_streams_to_processes_of_which_one_is_killed(bed: Bed, tmp_path: Path, placement: Placement) -> None:
    """With CONTINUE each stream fills the memory's file on a path of its own; the client is told afterwards."""
    memory = bed.memory((0, 4 * MIB))
    sources = []
    for name in "ab":
        (tmp_path / name).mkdir()
        sources.append(bed.closing(Source(tmp_path / name, bandwidth=8 * MIB)))
    channels = Channels(*(StreamSource(source.connect) for source in sources))
    mode = BOTH if placement is Placement.CONTINUE else Mode.MISSING
    server = bed.server(memory, channels, placement=placement)
    process, _ = bed.client(server, memory, mode=mode)
    server.prefetch()
    process.read(*(pages(*range(number, 1024, 16)) for number in range(4)))
    until(lambda: all(each.placed for each in channels.stats()), "both bring pages")
    sources[0].process.kill()
    assert good(process.answers(4))
    assert server.wait(PATIENCE)
    process.read([(0, 4 * MIB)])
    assert good(process.answers(1))
    first, second = settled(channels, 1024)
    assert isinstance(first.lost, SourceLost | OSError)
    assert (second.lost, server.lost) == (None, None)
    assert server.stats().placed == 1024


def test_streams_that_are_slow_are_faster_together(bed: Bed) -> None:
    """Each line carries 4 MiB a second, by its own clock: two carry the same twice as fast as one could."""
    memory = bed.memory((0, 4 * MIB))
    lines = [Line(bandwidth=4 * MIB) for _ in range(2)]
    channels = Channels(*(StreamSource(line.connect) for line in lines))
    server = bed.server(memory, channels)
    server.prefetch()
    assert server.wait(PATIENCE)
    for each in settled(channels, 1024):
        assert each.placed > 200, "neither has waited for the other"


def test_a_mistake_in_one_source_is_its_loss_alone(bed: Bed) -> None:
    memory = bed.memory()
    mistaken = CallableSource(lambda guest, length: [][0], threads=1)
    channels = Channels(mistaken, CallableSource(content))
    server = bed.server(memory, channels)
    server.prefetch()
    assert server.wait(PATIENCE)
    whole(bed, memory, 64 * PAGE)


def test_a_mistake_in_who_is_told_is_the_loss_of_all(bed: Bed) -> None:
    def tell(number: int, reason: Exception) -> None:
        raise KeyError("who is told")

    memory = bed.memory()
    channels = Channels(CallableSource(Failing().fetch, threads=1), CallableSource(Failing().fetch), on_loss=tell)
    server = bed.server(memory, channels)
    server.prefetch()
    assert not server.wait(PATIENCE)
    assert isinstance(server.lost, KeyError | SourceLost)


def test_there_must_be_a_source() -> None:
    with pytest.raises(ValueError, match="one source"):
        Channels()


@pytest.mark.parametrize("seed", range(8))
def test_whatever_is_lost_when_every_page_comes_once(bed: Bed, seed: int) -> None:
    """Each channel is lost at random requests and restored at random; somebody waits for random pages meanwhile."""
    chance = random.Random(seed)
    memory = bed.memory((0, MIB))
    lock = threading.Lock()

    def fetch(guest: int, length: int) -> bytes:
        with lock:
            fails = chance.random() < 0.2
        if fails:
            raise OSError(5, "by chance")
        return content(guest, length)

    channels = Channels(*(CallableSource(fetch, threads=2, most=4 * PAGE) for _ in range(3)))
    with leaks.no_open_fds():
        server = bed.server(memory, channels)
        process, _ = bed.client(server, memory)
        process.read(*(pages(*(chance.randrange(256) for _ in range(20))) for _ in range(3)))
        server.prefetch()
        while not server.wait(0.001):
            if server.lost:
                server.resume()
            for number, each in enumerate(channels.stats()):
                if each.lost:
                    try_to_restore(channels, number)
        assert good(process.answers(3))
        settled(channels, 256)
        assert server.stats().placed == 256
        whole(bed, memory, MIB)
        process.close()
        server.close()


def try_to_restore(channels: Channels, number: int) -> None:
    try:
        channels.restore(number)
    except ValueError:  # all have been lost meanwhile
        return
