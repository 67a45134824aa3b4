"""A ring that a case writes byte by byte, in either format: chains of any content, and what the device makes of them.

What belongs here: what both formats have, in words that a case can use for both; a packed ring's fields. What does not:
requests (``lane``), the fields of a split ring and rings that are legal (``driverqueue``).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from struct import Struct
from typing import NamedTuple

from vhostuser.driverqueue import Descriptor, DriverQueue

AVAIL, USED = 1 << 7, 1 << 15
"""Flags of a packed descriptor (virtio 1.3, 2.8.1)."""
ENABLE, DISABLE, DESC = 0, 1, 2
"""Flags of an event suppression structure (2.8.10)."""
_ROW = Struct("<QIHH")
_EVENT = Struct("<HH")
_WRAP = 1 << 15
_FAR = 1000


class Bytewise(ABC):
    """Chains are described entry by entry of a table, as a split ring has it, and pushed by the number of the first.

    What is pushed is not seen by the ring's DriverQueue, which offers nothing more afterwards.
    """

    def __init__(self, queue: DriverQueue) -> None:
        self.queue = queue

    @abstractmethod
    def describe(self, index: int, guest: int, length: int, flags: int = 0, after: int = 0) -> None:
        """Writes an entry; ``after`` is the one that follows it where the flags say NEXT."""

    @abstractmethod
    def describe_at(self, table: int, index: int, guest: int, length: int, flags: int = 0, after: int = 0) -> None:
        """Writes an entry of an indirect table; in a packed ring's, each is followed by the one behind it."""

    @abstractmethod
    def rewrite(self, index: int, guest: int, length: int, flags: int, after: int) -> None:
        """Writes an entry of a chain again that was pushed."""

    @abstractmethod
    def push(self, *heads: int) -> None:
        """Makes chains available, without a kick. What a packed ring returns for one is its first entry's number."""

    @property
    @abstractmethod
    def returned(self) -> int:
        """How many chains were returned since the ring was made; of a packed ring, those that were pushed."""

    @abstractmethod
    def used_entry(self, number: int) -> tuple[int, int]:
        """The head and the length of the chain that was returned as this one, which it was."""

    @property
    @abstractmethod
    def written_at(self) -> int:
        """The guest address at which the device returns the first chain of a ring."""

    # ---- notifications; while nothing is out

    @abstractmethod
    def want_no_calls(self) -> None:
        """Says that the driver needs no calls."""

    @abstractmethod
    def want_call(self, after: int = 0, *, late: bool = False) -> None:
        """With EVENT_IDX: asks for a call with the next chain that is returned, with that behind so many of one
        descriptor, or as late as can be said."""

    @abstractmethod
    def is_kick_wanted(self) -> bool:
        """With EVENT_IDX: has the device asked for a kick with the next chain?"""

    # ---- bases

    @abstractmethod
    def base_at(self, place: int) -> int:
        """The base of a ring that goes on so many chains, or descriptors of a packed ring, behind its first."""

    @abstractmethod
    def drained(self, base: int) -> int:
        """The base that says the same of what was taken, and that all of it was returned."""


def bytewise(queue: DriverQueue) -> Bytewise:
    """For a ring of its format."""
    return PackedBytes(queue) if queue.packed else SplitBytes(queue)


class SplitBytes(Bytewise):
    """A split ring."""

    def __init__(self, queue: DriverQueue) -> None:
        super().__init__(queue)
        self._raw = queue.raw

    def describe(self, index: int, guest: int, length: int, flags: int = 0, after: int = 0) -> None:
        self._raw.describe(index, guest, length, flags, after)

    def describe_at(self, table: int, index: int, guest: int, length: int, flags: int = 0, after: int = 0) -> None:
        self._raw.describe_at(table, index, guest, length, flags, after)

    def rewrite(self, index: int, guest: int, length: int, flags: int, after: int) -> None:
        self._raw.describe(index, guest, length, flags, after)

    def push(self, *heads: int) -> None:
        index = self._raw.available_index
        self._raw.make_available(index, heads)
        self._raw.available_index = index + len(heads)

    @property
    def returned(self) -> int:
        return self._raw.used_index

    def used_entry(self, number: int) -> tuple[int, int]:
        return self._raw.used_entry(number)

    @property
    def written_at(self) -> int:
        return self.queue.used

    def want_no_calls(self) -> None:
        self._raw.available_flags = 1

    def want_call(self, after: int = 0, *, late: bool = False) -> None:
        self._raw.used_event = self._raw.used_index + (_FAR if late else after)

    def is_kick_wanted(self) -> bool:
        return self._raw.available_event == self._raw.available_index

    def base_at(self, place: int) -> int:
        return place

    def drained(self, base: int) -> int:
        return self._raw.used_index


Row = tuple[int, int, int, int]
"""A packed descriptor: address, length, buffer id, flags."""


class _Entry(NamedTuple):
    guest: int
    length: int
    flags: int
    after: int


class PackedBytes(Bytewise):
    """A packed ring. Places are counted through two rounds, the first of which has the wrap counter 1."""

    def __init__(self, queue: DriverQueue) -> None:
        super().__init__(queue)
        self.memory, self.size = queue.memory, queue.size
        self._next = self._seen = -1
        self._entries: dict[int, _Entry] = {}
        self._at: dict[int, int] = {}
        self._first = 0
        self._hidden: Row = (0, 0, 0, 0)
        self._out: list[tuple[int, int]] = []
        self._returned: list[tuple[int, int]] = []

    # ---- places

    def word(self, place: int) -> int:
        """A place and its wrap counter in 16 bits, as bases and event suppression structures have them."""
        return place % self.size | _WRAP * (place % (2 * self.size) < self.size)

    def place(self, word: int) -> int:
        """The place that 16 bits say."""
        return word % _WRAP + (0 if word & _WRAP else self.size)

    def _address(self, place: int) -> int:
        return self.queue.desc + 16 * (place % self.size)

    def _row(self, place: int) -> Row:
        guest, length, identity, flags = _ROW.unpack(self.memory.read(self._address(place), 16))
        return guest, length, identity, flags

    def write_row(self, guest: int, row: Row) -> None:
        """Writes a descriptor anywhere."""
        self.memory.write(guest, _ROW.pack(*row))

    def _put(self, place: int, row: Row) -> None:
        """Writes a descriptor of the ring; the flags when everything else is there."""
        at = self._address(place)
        self.memory.write(at, _ROW.pack(*row)[:14])
        self.memory.publish(at + 14, row[3])

    def go_to(self, place: int) -> None:
        """Goes on there, as if all places before it had been used, which the ring is made to say."""
        self._next = self._seen = place
        for before in range(place - self.size, place):
            self.write_row(self._address(before), (0, 0, 0, (AVAIL | USED) * (before % (2 * self.size) < self.size)))

    def _begin(self) -> None:
        """Goes on where the DriverQueue has come to, everything being back."""
        if self._next < 0:
            base = self.queue.base
            self._next, self._seen = self.place(base & 0xFFFF), self.place(base >> 16)

    # ---- chains

    def describe(self, index: int, guest: int, length: int, flags: int = 0, after: int = 0) -> None:
        self._entries[index] = _Entry(guest, length, flags, after)

    def describe_at(self, table: int, index: int, guest: int, length: int, flags: int = 0, after: int = 0) -> None:
        self.write_row(table + 16 * index, (guest, length, 0, flags & ~Descriptor.NEXT))

    def rewrite(self, index: int, guest: int, length: int, flags: int, after: int) -> None:
        place = self._at[index]
        self._put(place, (guest, length, after, flags | self._row(place)[3] & (AVAIL | USED)))

    def push(self, *heads: int) -> None:
        for head in heads:
            self.push_as(head, head)

    def push_as(self, identity: int, head: int, *, others: int | None = None) -> None:
        """Makes a chain available under a buffer id. others: that of its descriptors but the last."""
        self.push_but_first(head, identity, others=others)
        self.push_first()

    def push_but_first(self, head: int, identity: int = 0, *, others: int | None = None) -> None:
        """The same without its first descriptor, so that it is not there yet."""
        self._begin()
        chain = self._chain(head)
        self._first = self._next
        for offset, number in enumerate(chain):
            place = self._next + offset
            entry = self._entries.get(number, _Entry(0, 0, 0, 0))
            own = identity if others is None or offset + 1 == len(chain) else others
            self._at[number] = place
            row = (entry.guest, entry.length, own, entry.flags | self._mark(place))
            if offset:
                self._put(place, row)
            else:
                self._hidden = row
        self._out.append((identity, len(chain)))
        self._next = (self._next + len(chain)) % (2 * self.size)

    def push_first(self, mark: int | None = None) -> None:
        """The first descriptor of that chain. mark: AVAIL and USED as they are not to be."""
        *rest, flags = self._hidden
        if mark is not None:
            flags = flags & ~(AVAIL | USED) | mark
        self._put(self._first, (rest[0], rest[1], rest[2], flags))

    @property
    def first_row(self) -> bytes:
        """That descriptor as it is now."""
        return self.memory.read(self._address(self._first), 16)

    def _mark(self, place: int) -> int:
        """The flags that make a descriptor available."""
        return AVAIL if place % (2 * self.size) < self.size else USED

    def _chain(self, head: int) -> list[int]:
        """The numbers of a chain's entries, as many as a ring has at most."""
        chain = [head]
        while len(chain) < self.size and (entry := self._entries.get(chain[-1])) and entry.flags & Descriptor.NEXT:
            chain.append(entry.after)
        return chain

    # ---- what comes back

    @property
    def returned(self) -> int:
        self._begin()
        while self.is_used(self._seen):
            _, length, head, flags = self._row(self._seen)
            self._returned.append((head, length if flags & Descriptor.WRITE else 0))
            gone = next((out for out in self._out if out[0] == head), (head, 1))
            if gone in self._out:
                self._out.remove(gone)
            self._seen = (self._seen + gone[1]) % (2 * self.size)
        return len(self._returned)

    def is_used(self, place: int) -> bool:
        """Does the descriptor in this place, of the two rounds, say that a chain was returned?"""
        return self._row(place)[3] & (AVAIL | USED) == (AVAIL | USED) * (place < self.size)

    def used_entry(self, number: int) -> tuple[int, int]:
        return self._returned[number]

    @property
    def written_at(self) -> int:
        return self.queue.desc

    # ---- notifications

    def say(self, flags: int, word: int = 0) -> None:
        """Writes the driver area."""
        self.memory.write(self.queue.avail, _EVENT.pack(word, flags))

    def want_no_calls(self) -> None:
        self.say(DISABLE)

    def want_call(self, after: int = 0, *, late: bool = False) -> None:
        self.want_call_at(self.size - 1 if late else after)

    def want_call_at(self, ahead: int) -> None:
        """Asks for a call with what is returned so many places behind what was returned last."""
        self.say(DESC, self.word(self.place(self.queue.base >> 16) + ahead))

    @property
    def asked(self) -> tuple[int, int]:
        """What the device says about kicks: a place's 16 bits, and flags."""
        word, flags = _EVENT.unpack(self.memory.read(self.queue.used, 4))
        return word, flags

    def is_kick_wanted(self) -> bool:
        word, flags = self.asked
        return flags == ENABLE or (flags == DESC and word == self.queue.base & 0xFFFF)

    # ---- bases

    def base_at(self, place: int) -> int:
        return self.word(place) * 0x1_0001

    def drained(self, base: int) -> int:
        return (base & 0xFFFF) * 0x1_0001
