"""The buffer of requests in flight, as split rings mark it (vhost-user specification, "Inflight I/O tracking").

What belongs here: the layout and its order of writes. It is read and written through its file, which a front-end may
cut off without harm.
"""

from __future__ import annotations

import os
from typing import Any, Self, TypeVar

from tests.conformance.plain.ring import Bad, Ring
from vhostuser._native import lib
from vhostuser.virtqueue import InflightRegion

VERSION = 1
VERSION_AT, SIZE_AT, LAST_AT, USED_AT = 8, 10, 12, 14
_NEXT_AT, _COUNTER_AT = 6, 8

_judged = InflightRegion.map

Q = TypeVar("Q", bound="InflightQueue")


class Inflight:
    """The whole buffer: ``queue_size`` entries and ``each`` bytes for a queue, from ``offset`` of the file on. Owns its
    descriptor."""

    def __init__(self, fd: int, offset: int, queues: int, queue_size: int, each: int) -> None:
        self.fd = fd
        self.offset = offset
        self.queues = queues
        self.queue_size = queue_size
        self.each = each

    @classmethod
    def map(cls, fd: int, given: Any, *, packed: bool = False) -> Self:
        """What SET_INFLIGHT_FD gives. Raises RequestRefused."""
        judged = _judged(fd, given, packed=packed)
        each = lib.vu_inflight_size(1, judged.queue_size, packed)
        return cls(os.dup(fd), given.mmap_offset, judged.queues, judged.queue_size, each)

    def queue(self, kind: type[Q], index: int, size: int) -> Q:
        """The part of one queue of ``size`` entries. Raises Bad."""
        if index >= self.queues or size > self.queue_size:
            raise Bad(lib.VU_E_INFLIGHT)
        return kind(self, self.offset + index * self.each, size)

    def __del__(self) -> None:
        os.close(self.fd)


class InflightQueue:
    """One queue's part. Resume first."""

    HEADER, ENTRY = 16, 16
    """Bytes."""

    def __init__(self, buffer: Inflight, at: int, size: int) -> None:
        self.buffer = buffer
        self.at = at
        self.size = size
        self.counter = 0
        self.last = 0
        """The head that was given back last."""

    # ---- fields

    def load(self, at: int, length: int) -> int:
        data = os.pread(self.buffer.fd, length, self.at + at)
        if len(data) < length:
            raise Bad(lib.VU_E_FAULT)
        return int.from_bytes(data, "little")

    def store(self, at: int, length: int, value: int) -> None:
        os.pwrite(self.buffer.fd, value.to_bytes(length, "little"), self.at + at)

    def entry(self, head: int) -> int:
        """Where the entry of a head begins."""
        return self.HEADER + self.ENTRY * head

    # ---- after a start

    def resume(self, queue: Any) -> None:
        """With chains in flight, the ring goes on behind them."""
        queue.again = self.recover(queue.used)
        if queue.again:
            queue.next = (queue.used + len(queue.again)) % 65536

    def chain_again(self, queue: Any, head: int) -> Any:
        """A chain that a process before us had taken."""
        return queue.parse(head)

    def recover(self, used: int) -> list[int]:
        """Heads that were taken and not given back, in the order in which they were taken."""
        version = self.load(VERSION_AT, 2)
        if version > VERSION:
            raise Bad(lib.VU_E_INFLIGHT)
        heads = self.taken() if version else []
        if heads:
            heads = self.judge(heads, used)
        if not version:
            self.clear()
        self.seal(used)
        self.store(LAST_AT, 2, self.last)
        self.store(SIZE_AT, 2, self.size)
        self.store(VERSION_AT, 2, VERSION)
        return heads

    def taken(self) -> list[int]:
        """The heads that are marked."""
        heads = [head for head in range(self.size) if self.load(self.entry(head), 1)]
        return sorted(heads, key=self.counter_of)

    def counter_of(self, head: int) -> int:
        return self.load(self.entry(head) + _COUNTER_AT, 8)

    def judge(self, heads: list[int], used: int) -> list[int]:
        """Those that are in flight really: the last batch may have been given back without having been unmarked."""
        if self.load(SIZE_AT, 2) != self.size:
            raise Bad(lib.VU_E_INFLIGHT)
        self.finish_batch((used - self.load(USED_AT, 2)) % 65536)
        heads = self.taken()
        if heads:
            self.counter = self.counter_of(heads[-1]) + 1
        return heads

    def finish_batch(self, given_back: int) -> None:
        """Unmarks so many, from the last batch's head on."""
        if given_back > self.size:
            raise Bad(lib.VU_E_INFLIGHT)
        head, met = self.load(LAST_AT, 2), set()
        for _ in range(given_back):
            if head >= self.size or head in met:
                raise Bad(lib.VU_E_INFLIGHT)
            met.add(head)
            self.finish(head)
            head = self.load(self.entry(head) + _NEXT_AT, 2)

    def clear(self) -> None:
        """A buffer that nobody has used marks nothing."""
        for head in range(self.size):
            self.finish(head)

    # ---- while the ring runs

    def take_chain(self, ring: Ring, position: int) -> None:
        """Marks the chain in this position of the ring as taken."""
        self.take(ring.avail_head(position))

    def move(self, ring: Any, used: int) -> None:
        """Of a split ring the used index tells."""

    def take(self, head: int) -> None:
        """Marks a head as taken."""
        self.store(self.entry(head) + _COUNTER_AT, 8, self.counter)
        self.counter += 1
        self.store(self.entry(head), 1, 1)

    def link(self, head: int) -> None:
        """Names the head that is about to be given back."""
        self.store(self.entry(head) + _NEXT_AT, 2, self.last)
        self.last = head
        self.store(LAST_AT, 2, head)

    def finish(self, head: int) -> None:
        """It was given back."""
        self.store(self.entry(head), 1, 0)

    def seal(self, used: int) -> None:
        """The used index up to which the marks hold."""
        self.store(USED_AT, 2, used)
