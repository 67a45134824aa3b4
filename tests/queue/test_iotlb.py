"""The device IOTLB's table against a page by page model of it, and its bound."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vhostuser._native import lib
from vhostuser.frontend import SharedMemory
from vhostuser.iotlb import DeviceIotlb
from vhostuser.memory import GuestMemory
from vhostuser.protocol import RequestRefused

PAGE, PAGES = 4096, 24
GUEST = 1 << 30
Model = dict[int, tuple[int, int]]
"""By page: the page of memory that it is, and the access."""


@pytest.fixture(scope="module")
def memory() -> Iterator[GuestMemory]:
    shared = SharedMemory((GUEST, 64 * PAGE))
    yield shared.map
    shared.close()


pages = st.integers(0, PAGES - 1)
updates = st.tuples(st.just("update"), pages, st.integers(1, 8), st.integers(0, 3), st.sampled_from([1, 2, 3]))
removals = st.tuples(st.just("invalidate"), pages, st.integers(1, 8), st.just(0), st.just(0))


def update(model: Model, page: int, count: int, shift: int, access: int) -> bool:
    """False where it contradicts what is there."""
    wanted = {each: each + shift for each in range(page, page + count)}
    if any(model[each][0] != wanted[each] for each in wanted if each in model):
        return False
    model.update({each: (to, access | model.get(each, (0, 0))[1]) for each, to in wanted.items()})
    return True


@given(steps=st.lists(updates | removals, max_size=30))
def test_it_says_what_a_page_by_page_table_says(
    memory: GuestMemory, steps: list[tuple[str, int, int, int, int]]
) -> None:
    """Whatever was joined or cut: every page means what was said of it last."""
    iotlb, model, user = DeviceIotlb(1), Model(), memory.guest_to_user(GUEST)
    for kind, page, count, shift, access in steps:
        if kind == "invalidate":
            iotlb.invalidate(page * PAGE, count * PAGE)
            for each in range(page, page + count):
                model.pop(each, None)
            continue
        taken = False
        with contextlib.suppress(RequestRefused):
            iotlb.update(memory, page * PAGE, count * PAGE, user + (page + shift) * PAGE, access)
            taken = True
        assert taken == update(model, page, count, shift, access)
    for page in range(PAGES + 8):
        found = model.get(page)
        for inside in (0, PAGE - 1):
            expected = (user + found[0] * PAGE + inside, found[1]) if found else None
            assert iotlb.look(page * PAGE + inside) == expected
    iotlb.close()


def test_neighbours_are_one_translation(memory: GuestMemory) -> None:
    iotlb, user = DeviceIotlb(1), memory.guest_to_user(GUEST)
    for page in (3, 1, 2, 0):
        iotlb.update(memory, page * PAGE, PAGE, user + page * PAGE, 3)
    assert len(iotlb) == 1
    iotlb.invalidate(PAGE, PAGE)
    assert len(iotlb) == 2
    iotlb.close()


def test_a_flood_is_bounded(memory: GuestMemory) -> None:
    """A full table is emptied, which loses nothing but time: what is needed is asked for again."""
    iotlb, user = DeviceIotlb(1), memory.guest_to_user(GUEST)
    most = 0
    for number in range(lib.VU_IOTLB_MOST + 100):
        iotlb.update(memory, number * 2 * PAGE, PAGE, user, 3)
        most = max(most, len(iotlb))
    assert lib.VU_IOTLB_MOST - 8 < most <= lib.VU_IOTLB_MOST
    assert len(iotlb) < 200
    iotlb.close()


def test_the_last_page_of_all(memory: GuestMemory) -> None:
    iotlb, user = DeviceIotlb(1), memory.guest_to_user(GUEST)
    top = (1 << 64) - 2 * PAGE
    iotlb.update(memory, top, PAGE, user, 3)
    assert iotlb.look(top + PAGE - 1) == (user + PAGE - 1, 3)
    iotlb.invalidate(0, 0)
    assert len(iotlb) == 0
    iotlb.close()
