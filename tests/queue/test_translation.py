"""Addresses: guest and user to host, copies across regions, and what a front-end may not say about its memory."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.queue.guest import PAGE, USER, Guest
from vhostuser._native import ffi, lib
from vhostuser.memory import GuestMemory, Region
from vhostuser.protocol import MemoryRegion, RequestRefused

TOP = 1 << 64
# Few and small numbers, so that ranges often touch, overlap or leave gaps of one byte.
starts = st.integers(0, 40).map(lambda step: step * 0x800) | st.sampled_from([TOP - 0x3000, TOP - 0x1000, 1 << 47])
descriptions = st.builds(MemoryRegion, guest=starts, size=st.sampled_from([1, 0x800, 0xFFF, 0x1000, 0x2000]),
                         user=starts, offset=st.sampled_from([0, 0x123, 0x1000]))  # fmt: skip


@pytest.fixture(scope="module")
def file() -> Iterator[int]:
    fd = os.memfd_create("guest", os.MFD_CLOEXEC)
    os.truncate(fd, 16 * PAGE)
    yield fd
    os.close(fd)


def overlap(left: tuple[int, int], right: tuple[int, int]) -> bool:
    return left[0] < right[0] + right[1] and right[0] < left[0] + left[1]


@given(parts=st.lists(descriptions, max_size=6), asked=st.lists(st.integers(0, 41 * 0x800), max_size=8))
def test_translation_is_what_a_linear_search_finds(file: int, parts: list[MemoryRegion], asked: list[int]) -> None:
    if any(part.guest + part.size >= TOP or part.user + part.size >= TOP for part in parts):
        parts = [part for part in parts if max(part.guest, part.user) + part.size < TOP]
    regions = [Region.map(file, part) for part in parts]
    clash = any(
        overlap((a.guest, a.size), (b.guest, b.size)) or overlap((a.user, a.size), (b.user, b.size))
        for number, a in enumerate(parts)
        for b in parts[:number]
    )
    if clash:
        with pytest.raises(RequestRefused, match="overlap"):
            GuestMemory(regions)
        return
    memory = GuestMemory(regions)
    for address in asked + [part.guest + part.size - 1 for part in parts] + [part.user for part in parts]:
        found = {region: address - region.guest for region in regions if 0 <= address - region.guest < region.size}
        expected = [region.host + inside for region, inside in found.items()]
        assert [translated(memory.guest_to_host, address)] == (expected or [None])
        found = {region: address - region.user for region in regions if 0 <= address - region.user < region.size}
        expected = [region.host + inside for region, inside in found.items()]
        assert [translated(memory.user_to_host, address)] == (expected or [None])
        guests = [region.guest + inside for region, inside in found.items()]
        assert [translated(memory.user_to_guest, address)] == (guests or [None])


@given(parts=st.lists(descriptions, max_size=6), asked=st.tuples(starts, st.sampled_from([0, 1, 0x900, 0x8001, TOP])))
def test_the_pages_of_a_range_are_those_of_its_bytes(
    file: int, parts: list[MemoryRegion], asked: tuple[int, int]
) -> None:
    """All of them, whole, in each region, and none that holds no byte of the range."""
    regions: list[Region] = []
    for part in parts:
        if max(part.guest, part.user) + part.size < TOP:
            with contextlib.suppress(RequestRefused):  # overlaps another
                regions = list(GuestMemory([*regions, Region.map(file, part)]).regions)
    guest, length = asked
    expected: dict[Region, set[int]] = {}
    for region in sorted(regions, key=lambda region: region.guest):
        inside = [byte for byte in range(region.size) if guest <= region.guest + byte < guest + length]
        if inside:
            expected[region] = {(region.host + byte) // PAGE for byte in inside}
    found = list(GuestMemory(regions).guest_to_pages(guest, length))
    assert [set(range(one.host // PAGE, (one.host + one.length) // PAGE)) for one in found] == list(expected.values())
    assert all(one.host % PAGE == one.length % PAGE == 0 for one in found)
    assert sum(one.inside for one in found) == sum(
        guest <= region.guest + byte < guest + length for region in regions for byte in range(region.size)
    )


def translated(translate: Callable[[int], int], address: int) -> int | None:
    try:
        return translate(address)
    except LookupError:
        return None


@given(start=st.integers(0, 3 * PAGE), length=st.integers(0, 4 * PAGE))
def test_copies_cross_adjacent_regions_and_stop_at_gaps(start: int, length: int) -> None:
    guest = Guest((0, PAGE), (PAGE, PAGE), (3 * PAGE, PAGE))
    guest.put(0, os.urandom(2 * PAGE))
    inside = start + length <= 2 * PAGE or 3 * PAGE <= start <= start + length <= 4 * PAGE or length == 0
    if inside:
        assert guest.memory.read(start, length) == guest.get(start, length)
        guest.memory.write(start, bytes(length))
        assert guest.get(start, length) == bytes(length)
    else:
        before = guest.get(0, 2 * PAGE)
        with pytest.raises(LookupError):
            guest.memory.read(start, length)
        with pytest.raises(LookupError):
            guest.memory.write(start, b"x" * length)
        assert guest.get(0, 2 * PAGE) == before, "a copy that is refused copies nothing"
    guest.close()


@pytest.mark.parametrize(("start", "length"), [(TOP - 1, 2), (PAGE, TOP - 1), (0, 1 << 63)])
def test_a_range_that_wraps_is_not_memory(guest: Guest, start: int, length: int) -> None:
    buffer = ffi.new("char[1]")
    assert lib.vu_map_read(guest.memory.native, start, buffer, length) == lib.VU_E_OVERFLOW
    assert lib.vu_map_write(guest.memory.native, start, buffer, length) == lib.VU_E_OVERFLOW


def test_guest_address_0_is_an_address(guest: Guest) -> None:
    assert guest.memory.user_to_guest(USER) == 0
    assert guest.memory.guest_to_user(0) == USER


def test_no_regions_are_memory_too() -> None:
    memory = GuestMemory()
    assert not memory
    with pytest.raises(LookupError):
        memory.guest_to_host(0)
    with pytest.raises(LookupError):
        memory.read(0, 1)
    assert memory.read(0, 0) == b""
