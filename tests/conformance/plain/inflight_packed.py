"""The buffer of requests in flight, as packed rings mark it (vhost-user specification, "Inflight I/O tracking").

What belongs here: the layout and its order of writes. What does not: the file (``inflight``). A chain has entries of
its own here, with its descriptors in them, for the driver writes over those of the ring.
"""

from __future__ import annotations

from struct import Struct
from typing import Any

from tests.conformance.plain.inflight import SIZE_AT, VERSION, VERSION_AT, InflightQueue
from tests.conformance.plain.packed import PackedRing
from tests.conformance.plain.ring import Bad, Descriptor
from vhostuser._native import lib
from vhostuser.protocol import QueueRegionPacked

FREE_AT, OLD_FREE_AT, USED_AT, OLD_USED_AT, WRAP_AT, OLD_WRAP_AT = 12, 14, 16, 18, 20, 21
NEXT_AT, LAST_AT, NUM_AT, COUNTER_AT, DESCRIPTOR_AT = 2, 4, 6, 8, 16
_HEADER, _ENTRY = 32, 32
_DESCRIPTOR = Struct("<HHIQ")


class PackedInflightQueue(InflightQueue):
    """One packed queue's part. Chains are named by their buffer ids. Resume first."""

    HEADER, ENTRY = _HEADER, _ENTRY

    def __init__(self, buffer: Any, at: int, size: int) -> None:
        super().__init__(buffer, at, size)
        self.entries: dict[int, int] = {}
        """Of chains that are out, by their ids."""

    # ---- after a start

    def resume(self, queue: Any) -> None:
        """Where a ring goes on is the buffer's word, if anybody has written into it."""
        ring = queue.ring
        version = self.load(VERSION_AT, 2)
        if version > VERSION:
            raise Bad(lib.VU_E_INFLIGHT)
        region = self.region()
        if not version or (region.desc_num != self.size and not region.heads):
            self.begin(ring, queue.used)
            return
        heads = self.judge(ring, region)
        queue.used = queue.signalled = self.position(ring, USED_AT, WRAP_AT)
        queue.again = list(heads)
        queue.next = queue.after(queue.used, sum(self.load(self.entry(head) + NUM_AT, 2) for head in heads))

    def region(self) -> QueueRegionPacked:
        """All of it as it is now."""
        part = b"".join(self.load(at, 32).to_bytes(32, "little") for at in range(0, self.entry(self.size), 32))
        return QueueRegionPacked.parse(part)

    def begin(self, ring: PackedRing, used: int) -> None:
        """Nothing is out, and every entry is free."""
        for entry in range(self.size):
            self.store(self.entry(entry) + NEXT_AT, 2, entry + 1)
            self.store(self.entry(entry), 1, 0)
        self.store(FREE_AT, 2, 0)
        self.move(ring, used)
        self.seal(used)
        self.store(SIZE_AT, 2, self.size)
        self.store(VERSION_AT, 2, VERSION)

    def judge(self, ring: PackedRing, region: QueueRegionPacked) -> tuple[int, ...]:
        """Entries of chains that are in flight really, in order; the batch that did not count is taken back."""
        if region.old_used_idx >= self.size:
            raise Bad(lib.VU_E_INFLIGHT)
        flags = ring.descriptor(region.old_used_idx).flags
        if any(region.violations(self.size, flags)):
            raise Bad(lib.VU_E_INFLIGHT)
        heads = self.in_flight(region, flags)
        if not region.seen(flags):
            for new, old, length in ((FREE_AT, OLD_FREE_AT, 2), (USED_AT, OLD_USED_AT, 2), (WRAP_AT, OLD_WRAP_AT, 1)):
                self.store(new, length, self.load(old, length))
        self.seal(0)
        for entry in set(range(self.size)) - set(heads):
            self.store(self.entry(entry), 1, 0)
        self.counter = 1 + max((region.states[head].counter for head in heads), default=-1)
        return heads

    def in_flight(self, region: QueueRegionPacked, flags: int) -> tuple[int, ...]:
        """What is to be done again, in this order."""
        return region.recovered(flags)

    def position(self, ring: PackedRing, index: int, wrap: int) -> int:
        """A place of the ring that the buffer tells."""
        return self.load(index, 2) + (0 if self.load(wrap, 1) else ring.size)

    def chain_again(self, queue: Any, entry: int) -> Any:
        """The chain as it was when it was taken."""
        saved, head = [], entry
        for _ in range(self.load(self.entry(head) + NUM_AT, 2)):
            identity, flags, length, guest = _DESCRIPTOR.unpack(
                self.load(self.entry(entry) + DESCRIPTOR_AT, 16).to_bytes(16, "little")
            )
            saved.append(Descriptor(guest, length, flags, identity))
            entry = self.load(self.entry(entry) + NEXT_AT, 2)
        chain = queue.parse_all(queue.entered(saved))
        chain.head, chain.places = saved[-1].after, len(saved)
        self.entries[chain.head] = head
        return chain

    # ---- while the ring runs

    def take_chain(self, ring: PackedRing, position: int) -> None:
        """Marks the chain that begins there, with copies of its descriptors."""
        chain = list(ring.linked(ring.desc, ring.size, position % ring.size))
        head = last = entry = self.load(OLD_FREE_AT, 2)
        self.store(self.entry(head) + NUM_AT, 2, len(chain))
        self.store(self.entry(head) + COUNTER_AT, 8, self.counter)
        self.counter += 1
        self.store(self.entry(head), 1, 1)
        for descriptor in chain:
            fields = _DESCRIPTOR.pack(descriptor.after, descriptor.flags, descriptor.length, descriptor.guest)
            self.store(self.entry(entry) + DESCRIPTOR_AT, 16, int.from_bytes(fields, "little"))
            last, entry = entry, self.load(self.entry(entry) + NEXT_AT, 2)
        self.store(self.entry(head) + LAST_AT, 2, last)
        self.store(FREE_AT, 2, entry)
        self.store(OLD_FREE_AT, 2, entry)
        self.entries[chain[-1].after] = head

    def link(self, head: int) -> None:
        """Its entries are free once it shows in the ring."""
        entry = self.entries[head]
        self.store(self.entry(self.load(self.entry(entry) + LAST_AT, 2)) + NEXT_AT, 2, self.load(FREE_AT, 2))
        self.store(FREE_AT, 2, entry)

    def move(self, ring: PackedRing, used: int) -> None:
        """Where the ring will have been given back to."""
        self.store(WRAP_AT, 1, int(ring.wrap(used)))
        self.store(USED_AT, 2, used % ring.size)

    def finish(self, head: int) -> None:
        self.store(self.entry(self.entries.pop(head)), 1, 0)

    def seal(self, used: int) -> None:
        """What was moved counts. The index last."""
        for new, old, length in ((FREE_AT, OLD_FREE_AT, 2), (WRAP_AT, OLD_WRAP_AT, 1), (USED_AT, OLD_USED_AT, 2)):
            self.store(old, length, self.load(new, length))
