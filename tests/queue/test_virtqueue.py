"""Both sides of both formats, in every combination that takes part, against one model of what a virtqueue is.

Rules: chains are taken in the order in which they were offered (virtio 1.3, 2.6), each is returned once, with what was
written, no notification is lost that was asked for (2.7.7, 2.8.10), and a base says where to go on.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.queue.guest import Guest
from tests.queue.model import Chain, Range, size
from tests.queue.virtqueue import Kind, NativeDevice, NativeDriver, PlainDevice, PlainDriver, Virtqueue

DATA = 1 << 32
SHAPES = [(1, 1), (0, 1), (1, 0), (2, 1), (0, 3)]
"""How many buffers to read and to write a chain has."""
STEPS = ["offer", "offer", "take", "take", "return", "return", "see", "see", "arm", "disarm", "want", "decline",
         "give up", "restart"]  # fmt: skip
kinds = st.builds(
    Kind,
    size=st.sampled_from([1, 2, 4, 8, 16]),
    packed=st.booleans(),
    indirect=st.booleans(),
    event_idx=st.booleans(),
)
odd_kinds = st.builds(
    Kind, size=st.sampled_from([3, 5, 7, 13]), packed=st.just(True), indirect=st.booleans(), event_idx=st.booleans()
)
programs = st.lists(st.tuples(st.sampled_from(STEPS), st.integers(0, 255)), max_size=60)


@pytest.fixture(scope="module")
def world() -> Iterator[Guest]:
    guest = Guest((0, 1 << 20), (DATA, 1 << 20))
    yield guest
    guest.close()


def buffers(number: int) -> tuple[list[Range], list[Range]]:
    """Different ones for different numbers."""
    readable, writable = SHAPES[number % len(SHAPES)]
    at = DATA + 4096 * (number % 64)
    parts = [(at + 256 * part, 1 + (number + part) % 200) for part in range(readable + writable)]
    return parts[:readable], parts[readable:]


class Play:
    """One ring, its model and its two sides. exact: notifications are compared, which both sides must be native for."""

    def __init__(self, kind: Kind, driver: Any, device: Any) -> None:
        self.model = Virtqueue(kind)
        self.driver = driver
        self.device = device
        self.exact = isinstance(driver, NativeDriver) and isinstance(device, NativeDevice)

    def do(self, step: str, number: int) -> None:
        getattr(self, f"_{step.replace(' ', '_')}")(number)

    def _offer(self, number: int) -> None:
        for each in range(number, number + 1 + number % 4):
            readable, writable = buffers(each)
            head = self.driver.offer(readable, writable)
            assert (head is not None) == self.model.has_room(len(readable) + len(writable))
            if head is not None:
                self.model.offer(Chain(head, readable, writable))
        kick = self.driver.publish()
        wanted = self.model.publish()
        assert kick == wanted or not self.exact

    def _take(self, number: int) -> None:
        chains = self.device.take(1 + number % 5)
        assert chains or not self.model.waiting
        assert chains == self.model.take(len(chains))

    def _return(self, number: int) -> None:
        """Any of those that are out; in order, the oldest."""
        out = [offered.chain for offered in self.model.taken]
        chosen = [out.pop(0 if self.model.kind.in_order else (number + each) % len(out))
                  for each in range(min(len(out), 1 + number % 3))]  # fmt: skip
        back = [(chain.head, number % (size(chain.writable) + 1)) for chain in chosen]
        self.device.give_back(back)
        wanted = self.model.give_back(back)
        assert not self.exact or self.device.called == wanted

    def _see(self, number: int) -> None:
        most = 1 + number % 4
        seen = self.driver.take(most)
        assert len(seen) >= min(most, len(self.model.returned))
        assert seen == self.model.see(len(seen))

    def _arm(self, _: int) -> None:
        if self.exact:
            assert self.device.queue.arm() == self.model.want_kicks()

    def _disarm(self, _: int) -> None:
        if self.exact:
            self.device.queue.disarm()
            self.model.want_no_kicks()

    def _want(self, _: int) -> None:
        if self.exact:
            assert self.driver.queue.arm() == self.model.want_calls()

    def _decline(self, _: int) -> None:
        if self.exact:
            self.driver.queue.disarm()
            self.model.want_no_calls()

    def _give_up(self, number: int) -> None:
        """Of those that were taken last, none of which has been returned."""
        if isinstance(self.device, NativeDevice):
            most = self.model.newest()
            count = number % (most + 1)
            heads = [offered.chain.head for offered in self.model.taken]
            self.device.give_up(heads[len(heads) - count :])
            self.model.give_up(count)

    def _restart(self, _: int) -> None:
        if isinstance(self.device, NativeDevice):
            assert self.device.queue.base == self.model.base()
            if not self.model.taken:
                self.device.restart()

    def finish(self) -> None:
        """All that is under way comes to its end, and nothing is left."""
        while self.model.waiting or self.model.taken:
            self._take(4)
            self._return(2)
        while self.model.returned:
            self._see(3)
        assert self.driver.take(1) == []
        if self.exact:
            assert self.device.queue.base == self.driver.queue.base == self.model.base()
            assert self.device.queue.out == 0


def play(world: Guest, kind: Kind, program: list[tuple[str, int]], driver: type[Any], device: type[Any]) -> None:
    one = driver(kind, world)
    other = device(kind, world, one.parts())
    try:
        play = Play(kind, one, other)
        for step, number in program:
            play.do(step, number)
        play.finish()
    finally:
        if isinstance(other, NativeDevice):
            other.close()


MANY = settings(max_examples=1000, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@MANY
@given(kind=kinds | odd_kinds, program=programs)
def test_both_native_sides(world: Guest, kind: Kind, program: list[tuple[str, int]]) -> None:
    play(world, kind, program, NativeDriver, NativeDevice)


@MANY
@given(kind=kinds | odd_kinds, program=programs)
def test_the_native_driver_with_a_plain_device(world: Guest, kind: Kind, program: list[tuple[str, int]]) -> None:
    play(world, kind, program, NativeDriver, PlainDevice)


@MANY
@given(kind=kinds | odd_kinds, program=programs)
def test_the_native_device_with_a_plain_driver(world: Guest, kind: Kind, program: list[tuple[str, int]]) -> None:
    play(world, kind, program, PlainDriver, NativeDevice)


@MANY
@given(kind=kinds | odd_kinds, program=programs)
def test_both_native_sides_in_order(world: Guest, kind: Kind, program: list[tuple[str, int]]) -> None:
    ordered = Kind(kind.size, kind.packed, kind.indirect, kind.event_idx, in_order=True)
    play(world, ordered, program, NativeDriver, NativeDevice)


@pytest.mark.parametrize("packed", [False, True])
def test_positions_go_on_behind_their_last(world: Guest, packed: bool) -> None:
    """Indexes behind 65535, wrap counters a few thousand times."""
    steps = [("offer", 3), ("take", 4), ("want", 0), ("return", 2), ("return", 1), ("see", 3), ("arm", 0)]
    play(world, Kind(4, packed, indirect=True, event_idx=True), steps * 9000, NativeDriver, NativeDevice)
