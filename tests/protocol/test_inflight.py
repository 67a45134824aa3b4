"""The codec and the rules of the in-flight region: a line for each rule that is broken, none for one that is right."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vhostuser.protocol import DescStatePacked, DescStateSplit, QueueRegionPacked, QueueRegionSplit, inflight_parts

AVAIL, USED = 1 << 7, 1 << 15

# A split ring of four: 2 and 0 are out, in this order; 3 and 1 were returned together, 1 first.
SPLIT = QueueRegionSplit(
    0, 1, 4, 3, 10, (DescStateSplit(1, 0, 7), DescStateSplit(0, 0, 5), DescStateSplit(1, 0, 6), DescStateSplit(0, 1, 4))
)
# A packed ring of six: a chain of two from entry 0 on, one of one in entry 2; 3, 4 and 5 are free.
PACKED = QueueRegionPacked(
    *(0, 1, 6, 3, 3, 2, 2, 1, 1),
    (
        DescStatePacked(1, next=1, last=1, num=2, counter=9),
        DescStatePacked(next=2, id=40),
        DescStatePacked(1, next=3, last=2, num=1, counter=8, id=41),
        *(DescStatePacked(next=after) for after in (4, 5, 6)),
    ),
)


def with_state(region: Any, index: int, **changes: int) -> Any:
    states = list(region.states)
    states[index] = states[index]._replace(**changes)
    return replace(region, states=tuple(states))


# ---- bytes


def test_the_layout_is_the_one_of_the_specification() -> None:
    """QueueRegionSplit and QueueRegionPacked of the section "Inflight I/O tracking", padded as in C."""
    assert SPLIT.pack()[:16] == bytes.fromhex("0000000000000000 0100 0400 0300 0a00")
    assert SPLIT.pack()[16 + 3 * 16 :] == bytes.fromhex("00 0000000000 0100 0400000000000000")
    assert PACKED.pack()[:32] == bytes.fromhex("0000000000000000 0100 0600 0300 0300 0200 0200 01 01") + bytes(10)
    copied = PACKED.states[2]._replace(flags=2, len=512, addr=0x1000)
    assert replace(PACKED, states=(copied,)).pack()[32:] == bytes.fromhex(
        "01 00 0300 0200 0100 0800000000000000 2900 0200 00020000 0010000000000000"
    )


@given(st.binary(min_size=32, max_size=400))
def test_any_bytes_are_read_and_judged(part: bytes) -> None:
    for kind in (QueueRegionSplit, QueueRegionPacked):
        parsed = kind.parse(part)
        assert kind.parse(parsed.pack()) == parsed
        for known in (None, 0, 7, 0xFFFF):
            assert all("\n" not in line for line in parsed.violations(4, known))
            parsed.recovered(known or 0)


@pytest.mark.parametrize("kind", [QueueRegionSplit, QueueRegionPacked])
def test_a_part_without_room_for_its_header(kind: type[QueueRegionSplit] | type[QueueRegionPacked]) -> None:
    with pytest.raises(ValueError, match="bytes, expected"):
        kind.parse(bytes(15))


def test_a_region_is_divided_evenly() -> None:
    assert inflight_parts(b"aabbcc", 3) == [b"aa", b"bb", b"cc"]
    for queues in (0, 7):
        with pytest.raises(ValueError, match="6 bytes for"):
            inflight_parts(b"aabbcc", queues)


# ---- what is in flight


def test_chains_come_in_the_order_in_which_they_were_taken() -> None:
    assert SPLIT.heads == (2, 0)
    assert PACKED.heads == (2, 0)
    assert [PACKED.id_of(head) for head in PACKED.heads] == [41, 40]


def test_a_batch_that_the_driver_has_back_is_not_executed_again() -> None:
    """Split: the ring's used index is ahead by the batch, and its list tells which chains those were."""
    died = with_state(with_state(replace(SPLIT, used_idx=8), 1, inflight=1), 3, inflight=1)
    assert died.heads == (3, 1, 2, 0) and died.recovered(10) == (2, 0)
    assert died.recovered(8) == died.heads, "nothing was returned: the used index has not moved"
    assert not list(died.violations(4, 10))


def test_whether_a_packed_batch_was_returned_its_first_descriptor_tells() -> None:
    died = with_state(replace(PACKED, free_head=0, used_idx=4), 1, next=3)
    assert died.recovered(AVAIL | USED) == (2,)
    assert died.recovered(AVAIL) == (2, 0)
    for flags in (AVAIL, AVAIL | USED, None):
        assert not list(died.violations(6, flags))


# ---- what is wrong


def test_regions_that_are_right() -> None:
    assert not list(SPLIT.violations()) and not list(SPLIT.violations(4, 10))
    assert not list(PACKED.violations()) and not list(PACKED.violations(6, 0))


@pytest.mark.parametrize("region", [SPLIT, PACKED])
def test_of_a_part_that_nobody_has_used_nothing_is_judged(region: Any) -> None:
    """Version 0, beside anything and with any used index: a ring may come from another host."""
    fresh = with_state(replace(region, version=0, desc_num=999, used_idx=777), 1, inflight=1)
    assert not list(fresh.violations(4, 1000)) and fresh.heads == ()


SPLIT_LIES: list[tuple[QueueRegionSplit, str]] = [
    (replace(SPLIT, version=2), "version 2, expected 0 or 1"),
    (replace(SPLIT, features=1), "features 0x1, expected 0"),
    (replace(SPLIT, states=SPLIT.states[:3]), "desc_num 4, there is room for 3 entries"),
    (replace(SPLIT, last_batch_head=4), "last_batch_head 4, expected less than 4"),
    (replace(SPLIT, used_idx=11), "used_idx 11, 65535 behind the ring's 10, expected 4 at most"),
    (replace(SPLIT, used_idx=5), "used_idx 5, 5 behind the ring's 10, expected 4 at most"),
    (with_state(SPLIT, 2, inflight=2), "entry 2: inflight 2, expected 0 or 1"),
    (with_state(SPLIT, 2, next=4), "entry 2: next 4, expected 3 at most"),
    (with_state(SPLIT, 2, counter=7), "entries 0 and 2 have the counter 7, expected an order"),
    (
        with_state(replace(SPLIT, used_idx=8), 3, next=3),
        "the list of the last batch has 1 entries and then loops or leaves, expected 2",
    ),
]
PACKED_LIES: list[tuple[QueueRegionPacked, str]] = [
    (replace(PACKED, version=9), "version 9, expected 0 or 1"),
    (replace(PACKED, states=PACKED.states[:2]), "desc_num 6, there is room for 2 entries"),
    (replace(PACKED, used_idx=6), "used_idx 6, expected less than 6"),
    (replace(PACKED, old_used_idx=9), "old_used_idx 9, expected less than 6"),
    (replace(PACKED, used_wrap_counter=2), "used_wrap_counter 2, expected 0 or 1"),
    (replace(PACKED, old_used_wrap_counter=2), "old_used_wrap_counter 2, expected 0 or 1"),
    (replace(PACKED, free_head=7), "free_head 7, expected 6 at most"),
    (replace(PACKED, old_free_head=7), "old_free_head 7, expected 6 at most"),
    (replace(PACKED, old_free_head=4), "1 of 6 entries are in no list"),
    (replace(PACKED, used_wrap_counter=0, used_idx=5), "used_idx is 9 ahead of old_used_idx, expected 6 at most"),
    (with_state(PACKED, 4, next=3), "the free list loops"),
    (with_state(PACKED, 4, next=7), "entry 4: next 7, expected 6 at most"),
    (with_state(PACKED, 0, inflight=3), "entry 0: inflight 3, expected 0 or 1"),
    (with_state(PACKED, 0, counter=8), "entries 0 and 2 have the counter 8, expected an order"),
    (with_state(PACKED, 0, num=0), "the chain of 0: num 0 and last 1 are not what its list has"),
    (with_state(PACKED, 0, last=2), "the chain of 0: num 2 and last 2 are not what its list has"),
    (with_state(PACKED, 0, next=3), "entry 3 is in the chain of 0 and in the free list"),
    (with_state(PACKED, 1, inflight=1, num=1, last=1), "entry 1 is in the chain of 0 and in the chain of 1"),
]


@pytest.mark.parametrize(("region", "line"), SPLIT_LIES, ids=[line for _, line in SPLIT_LIES])
def test_a_split_region_that_breaks_a_rule(region: QueueRegionSplit, line: str) -> None:
    assert line in list(region.violations(used_idx=10))


@pytest.mark.parametrize(("region", "line"), PACKED_LIES, ids=[line for _, line in PACKED_LIES])
def test_a_packed_region_that_breaks_a_rule(region: QueueRegionPacked, line: str) -> None:
    """The ring says that nothing was returned since old_used_idx."""
    assert line in list(region.violations(flags=AVAIL))


@pytest.mark.parametrize("region", [SPLIT, PACKED])
def test_the_size_is_the_ring_s(region: Any) -> None:
    assert list(region.violations(32)) == [f"desc_num {region.desc_num}, the ring has 32"]
    assert next(replace(region, desc_num=0).violations()) == "desc_num 0, expected 1 to 32768"
