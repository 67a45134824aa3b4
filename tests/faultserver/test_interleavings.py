"""No wake-up is lost in any order of steps: two clients, two pages, every interleaving, against the real state in C.

The kernel's part is modelled: who sleeps, which messages were not read yet, what a wake does. The server's part is
the functions that it consists of itself, one call a step. From every state that can be reached, every step that some
thread could make next is made; where none is left, nobody may sleep.

A state cannot be copied, so it is reached again from the beginning by the shortest list of steps that leads to it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest

from vhostuser._native import ffi, lib

CLIENTS, PAGES = (0, 1), (0, 1)
Key = tuple[Any, ...]
Step = tuple[Any, ...]


class World:
    """Two clients with a thread for each page, and a server in which everything that can happen at once does."""

    def __init__(self, *, fails: bool, run: int) -> None:
        error = ffi.new("int *")
        self.pages = ffi.gc(lib.vu_pages_new([len(PAGES)], 1, error), lib.vu_pages_free)
        for client in CLIENTS:
            assert lib.vu_pages_join(self.pages) == client
            lib.vu_pages_admit(self.pages, client)
        self.run = run
        # The kernel.
        self.running = {(client, page) for client in CLIENTS for page in PAGES}
        self.unread: set[tuple[int, int]] = set()
        self.asleep: set[tuple[int, int]] = set()
        self.there: set[int] = set()
        # The server: what its threads hold in hand.
        self.noted: set[tuple[int, int]] = set()
        self.wakes: list[tuple[int, int]] = []
        self.filling: tuple[int, int, int] | None = None  # first, count, how many of them were put
        self.demanded: tuple[int, ...] = ()
        self.placing: tuple[int, bool] | None = None  # page, whether it was put
        self.failing = 1 if fails else -1  # 0: it has failed

    def key(self) -> Key:
        """Everything on which the future depends. The clients are alike: states that differ in which is which are
        one."""
        return min(self._named(0), self._named(1))

    def _named(self, swap: int) -> Key:
        def named(threads: Iterable[tuple[int, ...]]) -> tuple[tuple[int, ...], ...]:
            return tuple((client ^ swap, *rest) for client, *rest in threads)

        found = ffi.new("struct vu_wait[8]")
        count = lib.vu_pages_waits(self.pages, found, 8)
        waits = named((found[n].client, found[n].page, found[n].asked) for n in range(count))
        sets = (self.running, self.unread, self.asleep, self.noted, self.wakes)
        places = (self.filling or (), self.demanded, self.placing or (), self.failing, sorted(self.there))
        return (*(sorted(named(threads)) for threads in sets), waits, *places, self._counts())

    def _counts(self) -> tuple[int, int]:
        counts = ffi.new("struct vu_pages_count *")
        lib.vu_pages_counts(self.pages, counts)
        return counts.received, counts.waiting

    # ---- what could happen next

    def steps(self) -> Iterator[Step]:
        for thread in sorted(self.running):
            yield "touch", *thread
        for thread in sorted(self.unread):
            yield "read", *thread
        for thread in sorted(self.noted):
            yield "record", *thread
        for wake in sorted(set(self.wakes)):
            yield "wake", *wake
        yield from self._filler()
        yield from self._server()

    def _filler(self) -> Iterator[Step]:
        if self.filling is None:
            if self.failing != 0:
                yield ("fill_claim",)
        elif self.filling[2] < self.filling[1]:
            yield ("fill_put",)
            if self.failing == 1 and not self.filling[2]:
                yield ("fill_fail",)
        else:
            yield ("fill_settle",)

    def _server(self) -> Iterator[Step]:
        if self.placing is not None:
            yield ("settle",) if self.placing[1] else ("put",)
        elif self.demanded:
            yield ("claim",)
        else:
            yield ("wanted",)

    def make(self, step: Step) -> None:
        name, *arguments = step
        call: Callable[..., None] = getattr(self, name)
        call(*arguments)

    # ---- the kernel

    def touch(self, client: int, page: int) -> None:
        """The thread looks: it finds the page, or sleeps and leaves a message."""
        self.running.discard((client, page))
        if page not in self.there:
            self.unread.add((client, page))
            self.asleep.add((client, page))

    def wake(self, client: int, page: int) -> None:
        """UFFDIO_WAKE: a sleeper looks again; a message of his that was not read is no more."""
        self.wakes.remove((client, page))
        lib.vu_pages_release(self.pages, client)
        if (client, page) in self.asleep:
            self.asleep.discard((client, page))
            self.unread.discard((client, page))
            self.running.add((client, page))

    # ---- the server's thread that reads

    def read(self, client: int, page: int) -> None:
        self.unread.discard((client, page))
        self.noted.add((client, page))

    def record(self, client: int, page: int) -> None:
        self.noted.discard((client, page))
        answer = lib.vu_pages_fault(self.pages, client, page, 1)
        if answer == lib.VU_PAGE_RECEIVED:
            assert lib.vu_pages_hold(self.pages, client)
            self.wakes.append((client, page))
        else:
            assert answer in (lib.VU_PAGE_MISSING, lib.VU_PAGE_MERGED)

    # ---- the thread that places in the background, runs of pages

    def fill_claim(self) -> None:
        first = ffi.new("uint64_t *")
        count = lib.vu_pages_claim(self.pages, 0, len(PAGES), self.run, first)
        self.filling = (first[0], count, 0) if count else None

    def fill_put(self) -> None:
        assert self.filling is not None
        first, count, done = self.filling
        self._put(first + done)
        self.filling = (first, count, done + 1)

    def fill_fail(self) -> None:
        """It can place nothing, and ends: what it has claimed is left to whoever is waited for."""
        assert self.filling is not None
        first, count, _ = self.filling
        lib.vu_pages_unclaim(self.pages, first, count)
        self.failing = 0
        self.filling = None

    def fill_settle(self) -> None:
        assert self.filling is not None
        self._settle(*self.filling[:2])
        self.filling = None

    # ---- the server's thread again: it places what is waited for

    def wanted(self) -> None:
        found = ffi.new("uint64_t[4]")
        count = lib.vu_pages_wanted(self.pages, found, 4)
        self.demanded = tuple(found[0:count])

    def claim(self) -> None:
        page, *self.demanded = self.demanded  # type: ignore[assignment]
        self.demanded = tuple(self.demanded)
        if lib.vu_pages_claim(self.pages, page, page + 1, 1, ffi.new("uint64_t *")):
            self.placing = (page, False)

    def put(self) -> None:
        assert self.placing is not None
        self._put(self.placing[0])
        self.placing = (self.placing[0], True)

    def settle(self) -> None:
        assert self.placing is not None
        self._settle(self.placing[0], 1)
        self.placing = None

    def _put(self, page: int) -> None:
        assert page not in self.there, f"page {page} is placed twice"
        self.there.add(page)

    def _settle(self, first: int, count: int) -> None:
        """One wait at a time, so that taking the rest is a path of its own."""
        waits = ffi.new("struct vu_wait[1]")
        taken = lib.vu_pages_settle(self.pages, first, count, 0, waits, 1)
        while taken:
            self.wakes.append((waits[0].client, waits[0].page))
            taken = lib.vu_pages_take(self.pages, first, count, waits, 1)


# ---- all of them


def reach(path: tuple[Step, ...], **settings: int) -> World:
    world = World(**settings)
    for step in path:
        world.make(step)
    return world


def explore(**settings: int) -> tuple[int, list[World]]:
    """Every state: how many there are, and those in which no step changes anything any more."""
    start = str(World(**settings).key())
    seen = {start}
    queue: deque[tuple[str, tuple[Step, ...]]] = deque([(start, ())])
    ends = []
    while queue:
        here, path = queue.popleft()
        steps = list(reach(path, **settings).steps())
        reached = [(step, str(reach((*path, step), **settings).key())) for step in steps]
        for step, key in reached:
            if key not in seen:
                seen.add(key)
                queue.append((key, (*path, step)))
        if all(key == here for _, key in reached):
            ends.append(reach(path, **settings))
    return len(seen), ends


@pytest.mark.parametrize(("run", "fails"), [(1, False), (2, True)])
def test_whoever_sleeps_is_woken_in_every_order(run: int, fails: bool) -> None:
    """run: pages that the filling thread claims at once. fails: it may find, at any time, that it cannot place them."""
    states, ends = explore(run=run, fails=fails)
    assert states > 1000
    assert ends
    for end in ends:
        assert not end.asleep, f"asleep for ever: {end.asleep}"
        assert end.there == set(PAGES)
        assert not end.running and not end.wakes
