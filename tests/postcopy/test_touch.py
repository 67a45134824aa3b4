"""Fault-ahead: who touches which page when, who gets which chain back, and what becomes of both when memory is lost."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vhostuser._native import ffi, lib
from vhostuser.uffd import TouchPool

Guests = Callable[..., Any]
HUGE = 2 << 20


def test_a_chain_whose_pages_are_here_does_not_wait(guests: Guests, pool: TouchPool) -> None:
    guest = guests()
    guest.place(5, 6)
    chain = guest.chain(5, 6)
    assert guest.submit(chain) == 0
    assert guest.waiting == 0
    assert pool.stats().waited == 0


def test_pages_of_a_chain_are_asked_for_at_once(guests: Guests, pool: TouchPool, page_size: int, pages_of: Any) -> None:
    guest = guests(page_size, 16)
    pages = [3, 11, 5, 9, 7, 4]
    chain = guest.chain(*pages)
    assert guest.submit(chain) == 1
    assert sorted(guest.faults(len(pages))) == sorted(pages), "all before the first has come"
    guest.place(*pages[:-1])
    assert guest.collect() == []
    guest.place(pages[-1])
    assert guest.collected(1) == [chain]
    assert chain.fault == 0
    pages_of(guest, pages, guest.chain_bytes(chain))
    stats = pool.stats()
    assert stats.waited == stats.ahead == sum(stats.histogram) == len(pages)
    assert stats.lost == 0


def test_segments_in_one_page_ask_for_it_once(guests: Guests) -> None:
    guest = guests()
    chain = guest.chain(5, 5, 6, 6, 5)
    assert guest.submit(chain) == 1
    assert sorted(guest.faults(2)) == [5, 6]
    guest.place(5, 6)
    assert guest.collected(1) == [chain]
    assert guest.uffd.read() == []


def test_a_segment_over_many_pages_asks_for_all_of_them(guests: Guests) -> None:
    guest = guests(pages=40)
    guest.place(7, 9)
    chain = guest.chain(5, length=6 * 4096 - 1)
    assert guest.submit(chain) == 1
    assert sorted(guest.faults(4)) == [5, 6, 8, 10]
    guest.place(5, 6, 8, 10)
    assert guest.collected(1) == [chain]


def test_chains_that_share_a_page_touch_it_once(guests: Guests, page_size: int) -> None:
    guest = guests(page_size, 16)
    first, second = guest.chain(5, 6), guest.chain(6, 7)
    assert guest.submit(first) == guest.submit(second) == 1
    assert guest.waiting == 2
    assert sorted(guest.faults(3)) == [5, 6, 7]
    guest.place(5, 6)
    assert guest.collected(1) == [first]
    guest.place(7)
    assert guest.collected(1) == [second]
    assert guest.uffd.read() == []


def test_queues_share_pages_too(guests: Guests, pool: TouchPool) -> None:
    guest = guests()
    chain, popped = guest.chain(5, 6), ffi.new("vu_chain *[1]")
    other = guest.new_queue()
    assert lib.vu_queue_set_touch(other, pool.native) == 0
    assert lib.vu_queue_pop(other, popped, 1) == 1
    assert guest.submit(chain) == lib.vu_ahead_submit(other, popped[0], 0) == 1
    assert sorted(guest.faults(2)) == [5, 6]
    guest.place(5, 6)
    assert guest.collected(1) == [chain]
    assert lib.vu_ahead_collect(other, popped, 1) == 1
    assert guest.uffd.read() == []
    ffi.release(other)


def test_one_page_and_nothing_else_to_do_is_touched_by_the_caller(
    guests: Guests, pool: TouchPool, background: Any
) -> None:
    guest = guests()
    chain = guest.chain(5)
    submitted = background(lambda: guest.submit(chain, alone=True))
    assert guest.faults(1) == [5]
    guest.place(5)
    assert submitted.result() == 0
    assert guest.waiting == 0
    stats = pool.stats()
    assert (stats.waited, stats.ahead) == (1, 0)


def test_segments_in_one_page_are_one_page(guests: Guests, pool: TouchPool, background: Any) -> None:
    """The header and the data of a small request often share a page."""
    guest = guests()
    chain = guest.chain(5, 5)
    submitted = background(lambda: guest.submit(chain, alone=True))
    guest.faults(1)
    guest.place(5)
    assert submitted.result() == 0
    assert pool.stats().ahead == 0


def test_a_page_that_nobody_had_to_wait_for_is_no_fault(guests: Guests, pool: TouchPool, huge_pages: None) -> None:
    """On hugetlbfs mincore knows our own page table only, so a page that others have brought looks missing."""
    guest = guests(HUGE, 16)
    os.posix_fallocate(guest.fd, 5 * HUGE, HUGE)
    chain = guest.chain(5)
    if guest.submit(chain):  # 0 when the page was touched while the search went on
        assert guest.collected(1) == [chain]
    assert pool.stats().waited == 0


def test_alone_means_nothing_while_other_chains_wait(guests: Guests) -> None:
    guest = guests()
    first, second = guest.chain(5), guest.chain(6)
    assert guest.submit(first) == 1
    assert guest.submit(second, alone=True) == 1, "the queue has to look after the first"
    guest.faults(2)
    guest.place(5, 6)
    assert sorted(map(id_of, guest.collected(2))) == sorted(map(id_of, [first, second]))


def test_a_full_pool_makes_the_submitter_touch(guests: Guests, background: Any) -> None:
    small = TouchPool(threads=1, capacity=2)
    guest = guests(touch=small)
    pages = list(range(5, 15))
    chain = guest.chain(*pages)
    with guest.serving():
        if background(lambda: guest.submit(chain)).result():
            assert guest.collected(1) == [chain]
    assert chain.fault == 0
    assert small.stats().waited == len(pages)
    guest.close()
    small.close()


def test_a_stopped_pool_finishes_what_it_took(guests: Guests, background: Any) -> None:
    mine = TouchPool(threads=2, capacity=16)
    guest = guests(touch=mine)
    chain = guest.chain(5, 6, 7, 8)
    assert guest.submit(chain) == 1
    closing = background(lambda: lib.vu_touch_stop(mine.native))
    closing.result()
    with guest.serving():
        assert guest.collected(1) == [chain]
    guest.close()
    mine.close()


def test_ring_pages_are_touched_at_once(guests: Guests, background: Any) -> None:
    """Ring pages are guest memory too: 512 entries take three pages of descriptors and tables here."""
    guest = guests(pages=8, ring=256, ring_missing=True)
    touched = background(lambda: lib.vu_queue_touch_ring(guest.queue))
    pages = guest.faults(2)
    assert sorted(pages) == [0, 1]
    guest.place(1)
    assert not touched.done
    guest.place(0)
    assert touched.result() == 0


def test_a_queue_without_a_pool_never_waits(guests: Guests) -> None:
    guest = guests(touch=None)
    chain = guest.chain(5)
    assert guest.submit(chain) == 0
    assert guest.collect() == []
    assert lib.vu_ahead_fd(guest.queue) == -1
    assert lib.vu_queue_touch_ring(guest.queue) == 0


def test_the_eventfd_is_readable_while_there_is_something_to_collect(guests: Guests) -> None:
    guest = guests()
    chains = [guest.chain(page) for page in (5, 6, 7)]
    for chain in chains:
        assert guest.submit(chain) == 1
    guest.faults(3)
    guest.place(5, 6, 7)
    found = guest.collected(1)
    while len(found) < 3:
        found += guest.collected(1)
    assert sorted(map(id_of, found)) == sorted(map(id_of, chains))
    with pytest.raises(BlockingIOError):
        os.eventfd_read(lib.vu_ahead_fd(guest.queue))


# ---- memory that is lost


def test_revoked_while_threads_wait(guests: Guests, pool: TouchPool, page_size: int) -> None:
    """The other side holds a duplicate of the userfaultfd, as a front-end that was stopped in a debugger would."""
    guest = guests(page_size, 16)
    duplicate = os.dup(guest.uffd.fileno())
    chain = guest.chain(5, 6, 7)
    assert guest.submit(chain) == 1
    guest.faults(3)
    before = guest.blocks
    guest.revoke()
    guest.uffd.close()
    assert guest.collected(1) == [chain]
    assert chain.fault == lib.VU_E_FAULT
    assert guest.blocks == before, "a zero page was placed for the whole guest"
    assert pool.stats().lost == 3
    byte = ffi.new("uint8_t *")
    for page in (0, 5, 9):
        assert lib.vu_map_read(guest.map, page * page_size, byte, 1) == lib.VU_E_FAULT
        assert lib.vu_map_write(guest.map, page * page_size, byte, 1) == lib.VU_E_FAULT
    assert guest.blocks == before
    os.close(duplicate)


def test_revoked_while_the_submitter_waits(guests: Guests, background: Any) -> None:
    guest = guests()
    chain = guest.chain(5)
    submitted = background(lambda: guest.submit(chain, alone=True))
    guest.faults(1)
    guest.revoke()
    assert submitted.result() == 0
    assert chain.fault == lib.VU_E_FAULT


def test_revoked_while_the_ring_is_touched(guests: Guests, background: Any) -> None:
    guest = guests(pages=8, ring=256, ring_missing=True)
    touched = background(lambda: lib.vu_queue_touch_ring(guest.queue))
    guest.faults(2)
    guest.revoke()
    assert touched.result() == lib.VU_E_FAULT


def test_a_file_cut_off_while_threads_wait(guests: Guests, pool: TouchPool, page_size: int) -> None:
    guest = guests(page_size, 16)
    chain, whole = guest.chain(5, 12), guest.chain(5)
    assert guest.submit(chain) == guest.submit(whole) == 1
    guest.faults(2)
    os.ftruncate(guest.fd, 8 * page_size)
    guest.uffd.wake(guest.base + 12 * page_size, page_size)
    guest.place(5)
    assert sorted(map(id_of, guest.collected(2))) == sorted(map(id_of, [chain, whole]))
    assert (chain.fault, whole.fault) == (lib.VU_E_FAULT, 0)
    assert pool.stats().lost == 1


def test_a_queue_freed_while_its_pages_are_on_the_way(guests: Guests) -> None:
    """Its chains are gone; the pages that nobody has begun to touch are left alone, those that were come to nothing."""
    single = TouchPool(threads=1, capacity=16)
    gone, other = guests(touch=single), guests(touch=single)
    chain = gone.chain(5, 6, 7)
    assert gone.submit(chain) == 1
    assert gone.faults(1) == [5]
    kept = other.chain(8)
    assert other.submit(kept) == 1
    ffi.release(gone.queue)
    gone.place(5)
    assert other.faults(1) == [8]
    other.place(8)
    assert other.collected(1) == [kept]
    assert gone.uffd.read() == []
    guests.close()
    single.close()


def test_a_map_outlives_the_queue_while_a_thread_is_in_it(guests: Guests) -> None:
    """Freed from under a waiting thread, the addresses could be given to somebody else."""
    mine = TouchPool(threads=1, capacity=4)
    guest = guests(touch=mine)
    assert guest.submit(guest.chain(5, 6)) == 1
    guest.faults(1)
    for handle in (guest.queue, guest.map, guest.region):
        ffi.release(handle)
    assert mapped(guest)
    guest.place(5)
    mine.close()
    assert not mapped(guest)
    guest.uffd.close()


def mapped(guest: Any) -> bool:
    lines = Path("/proc/self/maps").read_text().splitlines()
    return any(line.startswith(f"{guest.base:x}-") and "memfd:guest" in line for line in lines)


# ---- any order


def id_of(chain: Any) -> int:
    return int(ffi.cast("uintptr_t", chain))


@pytest.fixture
def tiny() -> Iterator[TouchPool]:
    """Fewer threads and less room than the property below asks for."""
    made = TouchPool(threads=3, capacity=5)
    yield made
    made.close()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    batches=st.lists(
        st.lists(st.lists(st.integers(2, 39), min_size=1, max_size=6), min_size=1, max_size=4), min_size=1, max_size=6
    ),
    present=st.sets(st.integers(2, 39)),
    seed=st.integers(0, 1 << 32),
    lost_after=st.none() | st.integers(0, 12),
)
def test_every_chain_comes_back_exactly_once(
    guests: Guests,
    tiny: TouchPool,
    batches: list[list[list[int]]],
    present: set[int],
    seed: int,
    lost_after: int | None,
) -> None:
    """Whatever is resident, shared, too much for the pool, or lost on the way."""
    guest = guests(ring=256, touch=tiny)
    guest.place(*present)
    chains, found = [], []
    with guest.serving(random.Random(seed)):
        for number, batch in enumerate(batches):
            popped = [guest.chain(*pages) for pages in batch]
            chains += popped
            if number == lost_after:
                guest.revoke()
            found += [chain for chain in popped if not guest.submit(chain, alone=len(popped) == 1)]
            found += guest.collect(3)
            assert guest.waiting == len(chains) - len(found)
            if number == lost_after:
                break
        found += guest.collected(guest.waiting)
    assert guest.waiting == 0
    assert sorted(map(id_of, found)) == sorted(map(id_of, chains))
    assert lost_after is not None or not any(chain.fault for chain in found)
    guest.close()
