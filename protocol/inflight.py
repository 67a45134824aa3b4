"""The in-flight region of a queue: its bytes as values, which requests it names, what is wrong with it.

What belongs here: the layouts of the specification, section "Inflight I/O tracking", and what whoever recovers makes of
them. What does not: where the bytes come from, executing anything (``native/inflight*.c``, which this is held against).

A region is the concatenation of its queues' parts, all of one size, which the specification leaves open: of M entries
each at least. A part is of use to nobody but a successor of the program that wrote it; yet all that were looked at
(libvhost-user, DPDK, ours) have the layouts of the specification, C's padding included.
"""

import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple, Self

from vhostuser.protocol.codes import MAX_QUEUE_SIZE

INFLIGHT_VERSION: Final = 1
"""The version of the layouts here; 0 in a part that nobody has used yet."""

_AVAIL, _USED = 1 << 7, 1 << 15
_FREE = "the free list"
_SPLIT = struct.Struct("<QHHHH")
_SPLIT_STATE = struct.Struct("<B5xHQ")
_PACKED = struct.Struct("<QHHHHHHBB10x")
_PACKED_STATE = struct.Struct("<BxHHHQHHIQ")


class DescStateSplit(NamedTuple):
    """What is known of the chain whose head this entry has. next: of the list of the last batch. counter: its order."""

    inflight: int = 0
    next: int = 0
    counter: int = 0


class DescStatePacked(NamedTuple):
    """A copy of one descriptor. last, num and counter: of a chain's first one. next: of the chain or the free list."""

    inflight: int = 0
    next: int = 0
    last: int = 0
    num: int = 0
    counter: int = 0
    id: int = 0
    flags: int = 0
    len: int = 0
    addr: int = 0


@dataclass(frozen=True, slots=True)
class QueueRegionSplit:
    """A split queue's part. states: as many entries as there is room for, at least as the ring has."""

    features: int
    version: int
    desc_num: int
    last_batch_head: int
    used_idx: int
    states: tuple[DescStateSplit, ...]

    @classmethod
    def parse(cls, part: bytes) -> Self:
        """Raises ValueError if there is no room for the header; nothing else is judged."""
        states = map(DescStateSplit._make, _SPLIT_STATE.iter_unpack(_entries(part, _SPLIT, _SPLIT_STATE)))
        fields: dict[str, int] = dict(zip(cls.__slots__, _SPLIT.unpack_from(part), strict=False))
        return cls(**fields, states=tuple(states))

    def pack(self) -> bytes:
        """The bytes that `parse` reads."""
        header = _SPLIT.pack(self.features, self.version, self.desc_num, self.last_batch_head, self.used_idx)
        return header + b"".join(_SPLIT_STATE.pack(*state) for state in self.states)

    @property
    def heads(self) -> tuple[int, ...]:
        """Chains marked as in flight, in the order in which they were taken."""
        return _in_order(self.states[: self.desc_num]) if self.version else ()

    def recovered(self, used_idx: int) -> tuple[int, ...]:
        """What whoever goes on with the ring executes, in this order: `heads` without the batch that was returned last.

        used_idx: the used index that the ring has.
        """
        returned = set(self._last_batch(used_idx))
        return tuple(head for head in self.heads if head not in returned)

    def violations(self, size: int | None = None, used_idx: int | None = None) -> Iterator[str]:
        """A line for each rule that is broken; none if nobody has used the part yet.

        size: entries of the ring, and used_idx: its used index, as far as they are known.
        """
        yield from _header_violations(self.features, self.version, self.desc_num, size, len(self.states))
        if self.version != INFLIGHT_VERSION or self.desc_num > len(self.states):
            return
        entries = self.states[: self.desc_num]
        if self.desc_num and self.last_batch_head >= self.desc_num:
            yield f"last_batch_head {self.last_batch_head}, expected less than {self.desc_num}"
        yield from _state_violations(entries, self.desc_num - 1)
        if self.heads and used_idx is not None:
            yield from self._batch_violations(used_idx)

    def _batch_violations(self, used_idx: int) -> Iterator[str]:
        returned = (used_idx - self.used_idx) & 0xFFFF
        if returned > self.desc_num:
            yield f"used_idx {self.used_idx}, {returned} behind the ring's {used_idx}, expected {self.desc_num} at most"
        elif (walked := len(set(self._last_batch(used_idx)))) < returned:
            yield f"the list of the last batch has {walked} entries and then loops or leaves, expected {returned}"

    def _last_batch(self, used_idx: int) -> Iterator[int]:
        head = self.last_batch_head
        for _ in range((used_idx - self.used_idx) & 0xFFFF if self.version else 0):
            if head >= min(self.desc_num, len(self.states)):
                return
            yield head
            head = self.states[head].next


@dataclass(frozen=True, slots=True)
class QueueRegionPacked:
    """A packed queue's part. states: as many entries as there is room for, at least as the ring has."""

    features: int
    version: int
    desc_num: int
    free_head: int
    old_free_head: int
    used_idx: int
    old_used_idx: int
    used_wrap_counter: int
    old_used_wrap_counter: int
    states: tuple[DescStatePacked, ...]

    @classmethod
    def parse(cls, part: bytes) -> Self:
        """Raises ValueError if there is no room for the header; nothing else is judged."""
        states = map(DescStatePacked._make, _PACKED_STATE.iter_unpack(_entries(part, _PACKED, _PACKED_STATE)))
        fields: dict[str, int] = dict(zip(cls.__slots__, _PACKED.unpack_from(part), strict=False))
        return cls(**fields, states=tuple(states))

    def pack(self) -> bytes:
        """The bytes that `parse` reads."""
        header = (self.free_head, self.old_free_head, self.used_idx, self.old_used_idx)
        wraps = (self.used_wrap_counter, self.old_used_wrap_counter)
        begin = _PACKED.pack(self.features, self.version, self.desc_num, *header, *wraps)
        return begin + b"".join(_PACKED_STATE.pack(*state) for state in self.states)

    @property
    def heads(self) -> tuple[int, ...]:
        """First entries of chains marked as in flight, in the order in which they were taken."""
        return _in_order(self.states[: self.desc_num]) if self.version else ()

    def id_of(self, head: int) -> int:
        """The buffer id of a chain: that of its last descriptor. Raises IndexError for a chain that leaves the part."""
        return self.states[self.states[head].last].id

    def recovered(self, flags: int) -> tuple[int, ...]:
        """What whoever goes on with the ring executes, in this order: `heads` that the free list does not have.

        flags: of the ring's descriptor at old_used_idx, where the batch that was returned last shows or does not.
        """
        free = set(self._chain(self._free_head(self.seen(flags)), self.desc_num))
        return tuple(head for head in self.heads if head not in free)

    def violations(self, size: int | None = None, flags: int | None = None) -> Iterator[str]:
        """A line for each rule that is broken; none if nobody has used the part yet.

        size: entries of the ring, and flags: of its descriptor at old_used_idx, as far as they are known.
        """
        yield from _header_violations(self.features, self.version, self.desc_num, size, len(self.states))
        if self.version != INFLIGHT_VERSION or self.desc_num > len(self.states):
            return
        found = list(self._place_violations())
        yield from found or self._list_violations(flags)

    def _place_violations(self) -> Iterator[str]:
        for name in ("used_idx", "old_used_idx"):
            if (place := getattr(self, name)) >= self.desc_num:
                yield f"{name} {place}, expected less than {self.desc_num}"
        for name in ("used_wrap_counter", "old_used_wrap_counter"):
            if (wrap := getattr(self, name)) > 1:
                yield f"{name} {wrap}, expected 0 or 1"
        for name in ("free_head", "old_free_head"):
            if (head := getattr(self, name)) > self.desc_num:
                yield f"{name} {head}, expected {self.desc_num} at most"
        yield from _state_violations(self.states[: self.desc_num], self.desc_num)

    def _list_violations(self, flags: int | None) -> Iterator[str]:
        """Without the ring both readings are tried, and the better one is told."""
        seen = {self.seen(flags)} if flags is not None else {self.seen(0), self.seen(_AVAIL), self.seen(_USED)}
        yield from min((list(self._violations_if(each)) for each in sorted(seen)), key=len)

    def _violations_if(self, seen: bool) -> Iterator[str]:
        size = self.desc_num
        moved = self.used_idx - self.old_used_idx + size * (self.used_wrap_counter != self.old_used_wrap_counter)
        if not seen and moved > size:
            yield f"used_idx is {moved} ahead of old_used_idx, expected {size} at most"
        free = list(self._chain(self._free_head(seen), size))
        if len(set(free)) < len(free):
            yield "the free list loops"
        owners = dict.fromkeys(free, _FREE)
        for head in self.heads:
            if owners.get(head) != _FREE:
                yield from self._chain_violations(head, owners)
        if missing := size - len(owners):
            yield f"{missing} of {size} entries are in no list"

    def _chain_violations(self, head: int, owners: dict[int, str]) -> Iterator[str]:
        state, name = self.states[head], f"the chain of {head}"
        chain = list(self._chain(head, state.num))
        if not state.num or len(chain) < state.num or chain[-1] != state.last:
            yield f"{name}: num {state.num} and last {state.last} are not what its list has"
        for entry in chain:
            if entry in owners:
                yield f"entry {entry} is in {name} and in {owners[entry]}"
                return
            owners[entry] = name

    def _chain(self, head: int, most: int) -> Iterator[int]:
        for _ in range(most):
            if head >= min(self.desc_num, len(self.states)):
                return
            yield head
            head = self.states[head].next

    def _free_head(self, seen: bool) -> int:
        return self.free_head if seen else self.old_free_head

    def seen(self, flags: int) -> bool:
        """Whether the driver can have seen the batch that was under way. flags: as for `recovered`.

        Once the wrap counter is sealed and the index is not, the ring does not tell any more: the driver may have
        offered the place anew.
        """
        now, old = (self.used_idx, self.used_wrap_counter & 1), (self.old_used_idx, self.old_used_wrap_counter & 1)
        if now[1] == old[1] and now[0] < old[0]:
            return True
        return now != old and flags & (_AVAIL | _USED) != (_AVAIL if old[1] else _USED)


def inflight_parts(region: bytes, queues: int) -> list[bytes]:
    """The parts of a region's queues, by index. Raises ValueError for 0 queues, or more than it has bytes."""
    if not 0 < queues <= len(region):
        raise ValueError(f"in-flight region of {len(region)} bytes for {queues} queues")
    each = len(region) // queues
    return [region[index * each : (index + 1) * each] for index in range(queues)]


def _entries(part: bytes, header: struct.Struct, state: struct.Struct) -> memoryview:
    """The bytes of all entries that there is room for, and of no more than a ring can have."""
    if len(part) < header.size:
        raise ValueError(f"in-flight region of a queue: {len(part)} bytes, expected {header.size} at least")
    count = min((len(part) - header.size) // state.size, MAX_QUEUE_SIZE)
    return memoryview(part)[header.size : header.size + count * state.size]


def _in_order(states: Sequence[DescStateSplit | DescStatePacked]) -> tuple[int, ...]:
    taken = sorted((state.counter, head) for head, state in enumerate(states) if state.inflight)
    return tuple(head for _, head in taken)


def _header_violations(features: int, version: int, desc_num: int, size: int | None, room: int) -> Iterator[str]:
    if not version:
        return
    if version != INFLIGHT_VERSION:
        yield f"version {version}, expected 0 or {INFLIGHT_VERSION}"
        return
    if features:
        yield f"features {features:#x}, expected 0"
    if size is not None and desc_num != size:
        yield f"desc_num {desc_num}, the ring has {size}"
    if not 0 < desc_num <= MAX_QUEUE_SIZE:
        yield f"desc_num {desc_num}, expected 1 to {MAX_QUEUE_SIZE}"
    elif desc_num > room:
        yield f"desc_num {desc_num}, there is room for {room} entries"


def _state_violations(states: Iterable[DescStateSplit | DescStatePacked], most: int) -> Iterator[str]:
    counters: dict[int, int] = {}
    for index, state in enumerate(states):
        if state.inflight > 1:
            yield f"entry {index}: inflight {state.inflight}, expected 0 or 1"
        if state.next > most:
            yield f"entry {index}: next {state.next}, expected {most} at most"
        if state.inflight and (other := counters.setdefault(state.counter, index)) != index:
            yield f"entries {other} and {index} have the counter {state.counter}, expected an order"
