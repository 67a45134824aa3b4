"""Who is behind which port of a bridge: learnt, moved, forgotten, bounded (IEEE 802.1D, 7.8 and 7.9)."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vhostuser._native import ffi, lib

AGEING = 300
SHARE = 4
"""Stations that a port surely has room for, wherever their addresses fall."""


class Stations:
    """The native table, and a slow one that forgets nothing and never is full."""

    def __init__(self, ageing: int = AGEING) -> None:
        error = ffi.new("int *")
        self.native: Any = ffi.gc(lib.vu_stations_new(ageing, error), lib.vu_stations_free)
        self.ageing = ageing
        self.slow: dict[bytes, tuple[int, int]] = {}

    def learn(self, address: bytes, port: int, now: int) -> None:
        lib.vu_stations_learn(self.native, address, port, now % 2**32)
        self.slow[address] = port, now

    def find(self, address: bytes, now: int) -> int:
        return lib.vu_stations_find(self.native, address, now % 2**32)

    def expected(self, address: bytes, now: int) -> int:
        port, seen = self.slow.get(address, (-1, 0))
        return port if now - seen < self.ageing else -1

    def count(self, port: int, now: int) -> int:
        return lib.vu_stations_count(self.native, port, now % 2**32)


def address(number: int) -> bytes:
    return b"\x02" + number.to_bytes(5, "big")


@given(
    st.lists(st.tuples(st.integers(1, SHARE), st.integers(0, 1), st.integers(0, 200)), max_size=60),
    st.sampled_from((0, 1000, 2**31 - 200, 2**32 - 200)),
)
def test_few_stations_are_known_where_they_were_heard_last_until_they_are_silent_too_long(
    heard: list[tuple[int, int, int]], start: int
) -> None:
    """Whatever the clock says: it goes round once in 136 years."""
    stations, now = Stations(), start
    for number, port, later in heard:
        now += later
        stations.learn(address(number), port, now)
        for other in range(SHARE + 2):
            assert stations.find(address(other), now) == stations.expected(address(other), now)
        for port in range(2):
            assert stations.count(port, now) == sum(stations.expected(known, now) == port for known in stations.slow)


@given(
    st.lists(st.tuples(st.integers(1, (1 << 40) - 1), st.integers(0, 5), st.integers(0, 1)), max_size=300), st.randoms()
)
def test_of_many_none_is_ever_said_to_be_where_it_was_not_heard_last(
    heard: list[tuple[int, int, int]], random: Any
) -> None:
    stations, now = Stations(), 0
    for number, port, later in heard:
        now += later
        stations.learn(address(number), port, now)
        assert stations.find(address(number), now) == port
        asked = random.choice(heard)[0]
        assert stations.find(address(asked), now) in (-1, stations.expected(address(asked), now))


@pytest.mark.parametrize("ageing", [1, 300])
def test_a_station_is_known_for_as_long_as_it_ages(ageing: int) -> None:
    stations = Stations(ageing)
    stations.learn(address(1), 7, 1000)
    assert stations.find(address(1), 1000 + ageing - 1) == 7
    assert stations.find(address(1), 1000 + ageing) == -1
    assert stations.find(address(1), 999) == 7, "a thread whose clock is behind"


def test_with_an_age_of_nothing_nobody_is_known() -> None:
    stations = Stations(0)
    stations.learn(address(1), 7, 1000)
    assert stations.find(address(1), 1000) == -1
    error = ffi.new("int *")
    assert lib.vu_stations_new(2**31, error) == ffi.NULL and error[0] == lib.VU_E_SIZE


def test_a_port_that_makes_addresses_up_takes_half_the_table_and_no_more() -> None:
    """Whether it comes first or last: the stations of the others find room, and most keep it."""
    for liar_first in (True, False):
        stations = Stations()
        ports = (1, 0) if liar_first else (0, 1)
        for port in ports:
            for number in range(100_000 if port else 200):
                stations.learn(address(port << 32 | number), port, 10)
        assert stations.count(1, 10) == lib.VU_STATIONS // 2
        honest = sum(stations.find(address(number), 10) == 0 for number in range(200))
        assert stations.count(0, 10) == honest > 190


def test_who_was_behind_a_port_is_forgotten_and_nobody_else() -> None:
    stations = Stations()
    for number in range(100):
        stations.learn(address(number), number % 3, 10)
    lib.vu_stations_forget(stations.native, 1)
    for number in range(100):
        assert stations.find(address(number), 10) == (-1 if number % 3 == 1 else number % 3)
