"""The native driver side against plain devices that return chains in their order, several with one used entry."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.queue import model
from tests.queue.guest import ALL, WRITE, Guest, Ring
from tests.queue.packed import PACKED, PackedDevice, PackedRing
from vhostuser._native import lib
from vhostuser.driverqueue import DriverQueue
from vhostuser.protocol import QueueBroken

MIB = 1 << 20
DATA = 1 << 32


@pytest.fixture(scope="module")
def world() -> Iterator[Guest]:
    guest = Guest((0, MIB), (DATA, MIB))
    yield guest
    guest.close()


class SplitDevice:
    """As plain as it can be; judges where a driver puts descriptors."""

    def __init__(self, queue: DriverQueue, guest: Guest) -> None:
        self.ring = Ring(guest, queue.size, features=ALL)
        self.ring.desc, self.ring.avail, self.ring.used = queue.desc, queue.avail, queue.used
        self.next = self.used = self.place = 0

    def take(self) -> list[model.Chain]:
        chains, code = model.pop(self.ring, self.next, set())
        assert code == 0
        for chain in chains:
            rows = list(model.descriptors(self.ring.guest, self.ring.desc, self.ring.size, chain.head))
            assert chain.head == self.place, "descriptors are used in the order of the table (2.7.9)"
            self.place = (self.place + len(rows)) % self.ring.size
        self.next += len(chains)
        return chains

    def give_back(self, chains: list[model.Chain], length: int) -> None:
        """One entry, that of the last; the index skips the others'."""
        self.ring.return_chains(self.used, [(chains[-1].head, length)])
        self.used += len(chains)
        self.ring.used_index = self.used


class InOrderPackedDevice(PackedDevice):
    def __init__(self, queue: DriverQueue, guest: Guest) -> None:
        ring = PackedRing.__new__(PackedRing)
        ring.guest, ring.size, ring.features = guest, queue.size, ALL | PACKED
        ring.desc, ring.driver, ring.device = queue.desc, queue.avail, queue.used
        super().__init__(ring)

    def give_back(self, chains: list[model.Chain], length: int) -> None:  # type: ignore[override]
        """One descriptor, in the place of the first and with the id of the last (2.8.10)."""
        flags = self.ring.used_flags(self.used) | (WRITE if length else 0)
        self.ring.describe(self.used, (0, length, chains[-1].head, flags))
        self.used += sum(self.out.pop(chain.head)[1] for chain in chains)


buffers = st.lists(st.tuples(st.integers(DATA, DATA + 0x1000), st.integers(1, 0x2000)), max_size=3)


@settings(max_examples=300, deadline=None)
@given(data=st.data(), size=st.sampled_from([1, 2, 8]), indirect=st.booleans(), packed=st.booleans())
def test_a_conversation_in_order(world: Guest, data: st.DataObject, size: int, indirect: bool, packed: bool) -> None:
    queue = DriverQueue(world.memory, 64, size, indirect=indirect, packed=packed, in_order=True)
    device = InOrderPackedDevice(queue, world) if packed else SplitDevice(queue, world)
    offered: dict[int, model.Chain] = {}
    out: list[model.Chain] = []
    returned: list[tuple[int, int]] = []
    for _ in range(data.draw(st.integers(1, 40), "steps")):
        step = data.draw(st.sampled_from(["offer", "pop", "push", "take", "arm"]), "step")
        if step == "offer":
            readable, writable = data.draw(buffers), data.draw(buffers)
            held = sum(1 if indirect else len(chain.readable) + len(chain.writable) for chain in offered.values())
            wanted = 1 if indirect else len(readable) + len(writable)
            head = queue.offer(readable, writable)
            assert (head is not None) == (held + wanted <= size and bool(readable or writable))
            if head is not None:
                assert head not in offered
                offered[head] = model.Chain(head, readable, writable)
        elif step == "pop":
            queue.publish()
            taken = device.take()
            assert all(chain == offered[chain.head] for chain in taken)
            out += taken
        elif step == "push" and out:
            count = data.draw(st.integers(1, len(out)))
            batch, out = out[:count], out[count:]
            length = data.draw(st.integers(0, model.size(batch[-1].writable)))
            device.give_back(batch, length)
            returned += [(chain.head, model.size(chain.writable)) for chain in batch[:-1]] + [(batch[-1].head, length)]
        elif step == "take":
            expected = [returned.pop(0) for _ in range(min(len(returned), data.draw(st.integers(1, 3))))]
            assert queue.take_many(len(expected) or 1) == expected
            for head, _ in expected:
                del offered[head]
        elif step == "arm":
            assert queue.arm() == bool(returned)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("wrong", [3, 7, 8, 0xFFFF])
def test_an_entry_for_a_chain_that_is_not_out_breaks_the_ring(world: Guest, packed: bool, wrong: int) -> None:
    queue = DriverQueue(world.memory, 64, 8, packed=packed, in_order=True)
    device = InOrderPackedDevice(queue, world) if packed else SplitDevice(queue, world)
    for _ in range(3):
        assert queue.offer([(DATA, 1)]) is not None
    queue.publish()
    chains = device.take()
    device.out = {wrong: (chains[0], 1)}  # type: ignore[union-attr]
    device.give_back([model.Chain(wrong)], 0)
    with pytest.raises(QueueBroken) as broken:
        queue.take()
    assert broken.value.code == lib.VU_E_HEAD
