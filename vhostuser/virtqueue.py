"""Rings as a device sees them.

What belongs here: the typed face of the native queues, batching, who may call what when. What does not: threads and
event loops (``dataplane``), when a ring runs (``lifecycle``), what requests mean (``devices``).

What is marked *touches* reads or writes guest memory and may block for as long as a missing page takes to arrive; it is
never called on the control thread.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from struct import Struct
from typing import TYPE_CHECKING, Any, Literal, Self

from vhostuser._native import ffi, lib
from vhostuser.memory import DescribedInflight, DirtyLog, GuestMemory, MemoryLost, explain
from vhostuser.protocol import QueueBroken, RequestRefused, VirtioFeature
from vhostuser.queuestats import QueueStats

if TYPE_CHECKING:
    from vhostuser.iotlb import DeviceIotlb
    from vhostuser.uffd import TouchPool

BATCH = 128
"""The most requests that one ``pop`` returns."""

GROUP = 16
"""Completions that are worth a call to the driver, so that it goes on while more are under way."""

_PEEK = Struct(f"QQQ{lib.VU_PEEK}s")
_SCRATCH = 64 * 1024
# Looked up once: a device in Python calls them for every request. For the same reason ``Request`` goes past the
# property ``native``, which costs as much as the copy of a sector.
_read = lib.vu_chain_read
_write = lib.vu_chain_write
_from_buffer = ffi.from_buffer
_BYTES = ffi.typeof("char[]")


@dataclass(frozen=True, slots=True)
class RingSetup:
    """Everything that opening a ring needs; nothing of it has been judged.

    size: entries. desc, avail, used: user addresses, guest addresses with ``guest_addresses``, or I/O virtual ones; of
    a packed ring its descriptors, the driver area and the device area. base: where to go on (SET_VRING_BASE). index:
    of the ring on its connection. features: the negotiated virtio bits; RING_PACKED tells the format. log: the guest
    address at which writes to the used ring are logged, if ``log_used`` (VHOST_VRING_F_LOG); of no interest behind an
    IOMMU. swapped: a split ring in the byte order that is not this machine's (SET_VRING_ENDIAN).
    """

    size: int
    desc: int
    avail: int
    used: int
    base: int = 0
    index: int = 0
    features: int = 0
    log: int = 0
    log_used: bool = False
    guest_addresses: bool = False
    swapped: bool = False

    def open(
        self,
        memory: GuestMemory,
        *,
        log: DirtyLog | None = None,
        inflight: InflightRegion | None = None,
        iotlb: DeviceIotlb | None = None,
    ) -> DeviceQueue:
        """Validates size, alignment and containment; touches nothing. The queue keeps what it is given alive.

        iotlb: what all addresses go through, those in the ring too. Raises QueueBroken if the ring does not fit the
        memory, the log or the in-flight region, NotTranslated where parts of it were asked for: try again.
        """
        return DeviceQueue(self, memory, log, inflight, iotlb)

    def flags(self) -> int:
        """The ``VU_RING_`` flags."""
        return (
            self._has(VirtioFeature.RING_EVENT_IDX) * lib.VU_RING_EVENT_IDX
            | self._has(VirtioFeature.RING_INDIRECT_DESC) * lib.VU_RING_INDIRECT
            | self._has(VirtioFeature.RING_PACKED) * lib.VU_RING_PACKED
            | self.log_used * lib.VU_RING_LOG_USED
            | self._has(VirtioFeature.NOTIFY_ON_EMPTY) * lib.VU_RING_NOTIFY_ON_EMPTY
            | self.guest_addresses * lib.VU_RING_GUEST_ADDR
            | self.swapped * lib.VU_RING_SWAPPED
        )

    def _has(self, feature: int) -> int:
        return self.features >> feature & 1


class NotTranslated(QueueBroken):
    """A ring cannot be opened before the device IOTLB knows where it lies. Nothing is wrong with it."""


class Request:
    """One chain of buffers: ``readable`` bytes from the driver, then room for ``writable`` bytes to it.

    Belongs to the thread of its queue, and is of no use once it was completed or its queue was closed.
    """

    __slots__ = ("_chain", "_head", "_queue", "_told", "completed", "readable", "writable")

    def __init__(self, queue: DeviceQueue, chain: Any, readable: int, writable: int, head: bytes) -> None:
        self._queue = queue
        self._chain = chain
        self._head = head
        self._told: int | None = None
        self.readable = readable
        self.writable = writable
        self.completed = False

    def read(self, length: int = -1, offset: int = 0) -> bytes:
        """Copies ``length`` readable bytes out, from ``offset``; fewer where the request is shorter; -1: all.

        *Touches*. Raises MemoryLost.
        """
        end = self.readable if length < 0 else offset + length
        if end <= len(self._head) and offset >= 0:
            return self._head[offset:end]
        return self._queue.copy_out(self._chain, offset, min(end, self.readable) - offset)

    def read_into(self, buffer: bytearray | memoryview, offset: int = 0) -> int:
        """Copies readable bytes from ``offset`` into ``buffer``; returns how many. *Touches*. Raises MemoryLost."""
        target = _from_buffer(_BYTES, buffer, True)  # by keyword it takes twice as long
        try:
            count: int = _read(self._queue._native, self._chain, offset, target, len(target))
        except TypeError:
            self._queue.native  # noqa: B018 (raises ValueError if the queue is closed)
            raise
        if count < 0:
            raise MemoryLost
        return count

    def write(self, data: bytes | bytearray | memoryview, offset: int = 0) -> int:
        """Copies ``data`` to ``offset`` of the writable bytes; returns how many there was room for. *Touches*.

        Raises MemoryLost.
        """
        source = data if type(data) is bytes else _from_buffer(_BYTES, data)
        try:
            count: int = _write(self._queue._native, self._chain, offset, source, len(source))
        except TypeError:
            self._queue.native  # noqa: B018 (raises ValueError if the queue is closed)
            raise
        if count < 0:
            raise MemoryLost
        return count

    @property
    def byteorder(self) -> Literal["little", "big"]:
        """Of the numbers in the request: little, unless CROSS_ENDIAN lets legacy drivers have another."""
        return self._queue.byteorder

    def views(self) -> tuple[list[memoryview], list[memoryview]]:
        """The segments themselves, without a copy: readable ones (read-only), then writable ones.

        They keep the memory mapped, but must not be used after the request is completed. What is written through them
        is not counted: ``complete`` must be told. Raises RequestRefused in postcopy, where a missing page would stop
        the whole process, and if a file is not sealed against shrinking, or of huge pages, which may run out: there a
        lost page would kill it.
        """
        return self._queue.views(self._chain)

    def complete(self, written: int | None = None) -> None:
        """Gives the request back with ``written`` bytes written from the start; None: as far as ``write`` has come.

        The driver sees it with the queue's next ``flush``. Raises ValueError for a second completion.
        """
        if self.completed:
            raise ValueError("the request was completed before")
        self.completed = True
        queue = self._queue
        if queue._native is None:  # closed: the driver will not hear of it
            return
        if written is not None:
            self._told = min(written, self.writable)
            queue._told = True
        finished = queue._finished
        finished.append(self)
        if queue.on_finished is not None and (len(finished) == 1 or len(finished) == GROUP):
            queue.on_finished(len(finished))


def _native_of(part: DirtyLog | InflightRegion | DeviceIotlb | None) -> Any:
    return part.native if part is not None else ffi.NULL


class DeviceQueue:
    """One open ring, seen from the device. It belongs to one thread at a time, but for ``set_call`` and properties."""

    def __init__(
        self,
        setup: RingSetup,
        memory: GuestMemory,
        log: DirtyLog | None,
        inflight: InflightRegion | None,
        iotlb: DeviceIotlb | None,
    ) -> None:
        self._native: Any = None
        self.index = setup.index
        self.byteorder: Literal["little", "big"] = "big" if setup.swapped else "little"
        """Of all numbers that the driver writes and reads, in requests too: a legacy driver's own."""
        self.memory = memory
        self.out = 0
        """Requests popped and not yet flushed."""
        self.ahead_fd = -1
        """An eventfd, readable when ``collect`` has something; -1 outside of postcopy."""
        self.on_finished: Callable[[int], None] | None = None
        """Called at the first completion since the last ``flush`` and at number ``GROUP``, with that number."""
        ring = ffi.new("struct vu_ring *")
        ring.size, ring.flags, ring.index, ring.base = setup.size, setup.flags(), setup.index, setup.base
        ring.desc, ring.avail, ring.used, ring.log_addr = setup.desc, setup.avail, setup.used, setup.log
        error = ffi.new("int *")
        native = lib.vu_queue_new(memory.native, ring, _native_of(log), _native_of(inflight), _native_of(iotlb), error)
        if native == ffi.NULL:
            kind = NotTranslated if error[0] == lib.VU_E_MISSING else QueueBroken
            raise kind(self.index, -1, error[0], explain(error[0]))
        self._native = native
        self.translated_fd: int = lib.vu_queue_translated_fd(native)
        """An eventfd: what the next request waited for was translated. -1 without a device IOTLB."""
        self._base = setup.base
        self._touch: TouchPool | None = None
        self._ring_missing = False
        self._waiting: dict[Any, Request] = {}
        self._chains = ffi.new("vu_chain *[]", BATCH)
        self._peeks = ffi.new("struct vu_peek[]", BATCH)
        self._peeked = ffi.buffer(self._peeks)
        self._scratch: Any = None
        self._finished: list[Request] = []
        self._told = False  # whether one of these was told how much was written

    @property
    def native(self) -> Any:
        """The ``vu_queue *``. Raises ValueError once the queue is closed."""
        if self._native is None:
            raise ValueError(f"queue {self.index} is closed")
        return self._native

    # ---- requests

    def pop(self, most: int = BATCH) -> list[Request]:
        """Up to ``most`` new requests, at most ``BATCH``; empty if there are none. *Touches*. Raises QueueBroken."""
        if self._ring_missing:
            self._fetch_ring()
        chains = self._chains
        count: int = lib.vu_queue_pop(self.native, chains, min(most, BATCH))
        if count <= 0:
            self._checked(count)
            return []
        lib.vu_chain_peek(self._native, chains, count, self._peeks)
        self.out += count
        peeked = _PEEK.iter_unpack(self._peeked[: count * _PEEK.size])
        return [
            Request(self, chain, readable, writable, head[:length])
            for chain, (readable, writable, length, head) in zip(chains[0:count], peeked, strict=True)
        ]

    def flush(self) -> None:
        """Returns what was completed to the driver in one step, and calls it once if it wants to be called. *Touches*.

        Also sends a signal that was forced. Raises QueueBroken.
        """
        native = self.native
        if finished := self._finished:
            self._finished = []
            self.out -= len(finished)
            chains = [request._chain for request in finished]
            lengths = self._lengths(finished) if self._told else ffi.NULL
            self._checked(lib.vu_queue_push(native, chains, lengths, len(finished)))
        result = lib.vu_queue_signal(native)
        if result < 0:
            self.check()  # else the call descriptor is of no use, which is the front-end's affair

    def _lengths(self, finished: Sequence[Request]) -> list[int]:
        self._told = False
        return [request._chain.filled if request._told is None else request._told for request in finished]

    # ---- notifications

    def kicked(self) -> None:
        """Counts a kick that was taken."""
        lib.vu_queue_kicked(self.native)

    def arm(self) -> bool:
        """Asks the driver for kicks; whether something is available all the same. *Touches*. Raises QueueBroken."""
        if self._ring_missing:
            self._fetch_ring()
        return self._checked(lib.vu_queue_arm(self.native)) > 0

    def disarm(self) -> None:
        """Tells the driver that no kicks are needed. *Touches*. Raises QueueBroken."""
        self._checked(lib.vu_queue_disarm(self.native))

    def set_call(self, fd: int) -> None:
        """Where to call the driver: an eventfd that stays the caller's, or -1. From any thread."""
        lib.vu_queue_set_call(self.native, fd)

    def force_signal(self) -> None:
        """The next ``flush`` calls the driver, whatever it asked for: once after a restart."""
        lib.vu_queue_force_signal(self.native)

    def leave_in_flight(self) -> bool:
        """Requests under way may stay in the in-flight region when the ring stops; False without one. Any thread."""
        return bool(lib.vu_queue_leave(self.native))

    def uses(self, iova: int, size: int) -> bool:
        """Whether it or a request that is out lies there, even in part. Of the thread that opened it, at any time."""
        return bool(lib.vu_queue_uses(self.native, iova, size))

    # ---- state

    @property
    def base(self) -> int:
        """The next available index (of a packed ring: both places), for GET_VRING_BASE. Final when no request is out;
        survives ``close``."""
        return self._base if self._native is None else int(lib.vu_queue_base(self._native))

    def stats(self) -> QueueStats:
        """Since the queue was opened. From any thread."""
        raw = ffi.new("struct vu_queue_stats *")
        lib.vu_queue_get_stats(self.native, raw)
        return QueueStats(
            *(raw.returned, raw.readable, raw.written, raw.batches, raw.kicks, raw.calls, raw.served_ns),
            tuple(raw.histogram),
            raw.out,
            raw.oldest,
        )

    @property
    def broken(self) -> QueueBroken | None:
        """Why nothing more comes of this queue, or None."""
        code = lib.vu_queue_broken(self.native)
        if not code:
            return None
        head = -1 if code in _NOT_OF_A_CHAIN else lib.vu_queue_broken_head(self._native)
        return QueueBroken(self.index, head, code, explain(code))

    def check(self) -> None:
        """Raises QueueBroken if the queue is broken."""
        if error := self.broken:
            raise error

    def _checked(self, result: int) -> int:
        if result < 0:
            self.check()
        return result

    def close(self) -> None:
        """Frees the queue. Requests still out become useless: they can neither be read nor written nor completed."""
        if self._native is None:
            return
        self._base = self.base
        native, self._native = self._native, None
        self._waiting.clear()
        self.ahead_fd = -1
        # A request that somebody keeps must not keep the guest's memory mapped.
        self.memory = GuestMemory()
        lib.vu_queue_free(native)

    def __del__(self) -> None:
        self.close()

    # ---- postcopy: pages may be missing

    def set_touch(self, pool: TouchPool | None) -> None:
        """From LISTEN to END: ``pool`` fetches what is missing. Only while no thread uses the queue."""
        result = lib.vu_queue_set_touch(self.native, pool.native if pool is not None else ffi.NULL)
        if result < 0:
            raise MemoryError(explain(result))
        self._touch = pool
        self._ring_missing = pool is not None
        self.ahead_fd = lib.vu_ahead_fd(self._native)

    def _fetch_ring(self) -> None:
        self._ring_missing = False
        lib.vu_queue_touch_ring(self.native)  # what cannot be had is noticed, and reported, by the next pop

    def resident(self, requests: Sequence[Request]) -> list[Request]:
        """Those whose pages are all here; the others are asked for and come back through ``collect``. *Touches*."""
        alone = len(requests) == 1 and self.out == 1
        ready = []
        for request in requests:
            if lib.vu_ahead_submit(self.native, request._chain, alone) > 0:
                self._waiting[request._chain] = request
            else:
                ready.append(request)
        return ready

    def collect(self, most: int = BATCH) -> list[Request]:
        """Up to ``most`` requests whose pages have come, or cannot: reading those raises MemoryLost. Never blocks."""
        count = lib.vu_ahead_collect(self.native, self._chains, min(most, BATCH))
        return [self._waiting.pop(chain) for chain in self._chains[0 : max(count, 0)]]

    # ---- for Request

    def copy_out(self, chain: Any, offset: int, length: int) -> bytes:
        """For ``Request.read``."""
        if length <= 0:
            return b""
        if length > _SCRATCH:
            target = ffi.new("char[]", length)
        elif self._scratch is None:
            target = self._scratch = ffi.new("char[]", _SCRATCH)
        else:
            target = self._scratch
        count = _copied(lib.vu_chain_read(self.native, chain, offset, target, length))
        copied: bytes = ffi.buffer(target, count)[:]
        return copied

    def views(self, chain: Any) -> tuple[list[memoryview], list[memoryview]]:
        """For ``Request.views``."""
        if self._native is None or self._touch is not None or not self.memory.sealed:
            raise RequestRefused(
                "views need an open queue, no postcopy, no huge pages, and memory sealed against shrinking "
                "(F_SEAL_SHRINK): use read and write"
            )
        count = chain.readable_count
        segments = [self._view(segment) for segment in chain.segments[0 : count + chain.writable_count]]
        return [segment.toreadonly() for segment in segments[:count]], segments[count:]

    def _view(self, segment: Any) -> memoryview:
        memory = self.memory
        # The destructor does nothing but hold the mapping for as long as the view lives.
        owner = ffi.gc(segment.host, lambda _: memory)
        return memoryview(ffi.buffer(owner, segment.length))


_NOT_OF_A_CHAIN = {lib.VU_E_INDEX, lib.VU_E_INFLIGHT, lib.VU_E_FAULT}


def _copied(count: int) -> int:
    if count < 0:
        raise MemoryLost
    return count


INFLIGHT_ROOM = 1024
"""Entries for each queue of a region that we make, at least. QEMU 10 asks for 128 and has rings of 256 (Debian 13's
SeaBIOS) and 1024 (Linux); it keeps the size of what it was given, so that this tells our regions from others'."""


class InflightRegion:
    """Memory of the front-end in which queues note what they have taken, so that a crash loses no request.

    queue_size: entries for each queue, which may be more than the front-end has asked for.
    """

    __slots__ = ("native", "queue_size", "queues")

    def __init__(self, native: Any, queues: int, queue_size: int) -> None:
        self.native = native
        self.queues = queues
        self.queue_size = queue_size

    @staticmethod
    def create(queues: int, queue_size: int, *, packed: bool = False) -> tuple[int, int]:
        """A fresh region for GET_INFLIGHT_FD: a memfd that the caller owns, and its size in bytes.

        packed: the format of the rings. Raises RequestRefused for numbers that no device has.
        """
        if not (1 <= queues <= 0xFFFF and 1 <= queue_size <= 32768):
            raise RequestRefused(f"in-flight region for {queues} queues of {queue_size} entries")
        size = lib.vu_inflight_size(queues, max(queue_size, INFLIGHT_ROOM), packed)
        fd = os.memfd_create("inflight", os.MFD_CLOEXEC)
        os.truncate(fd, size)
        return fd, size

    @classmethod
    def map(cls, fd: int, given: DescribedInflight, *, packed: bool = False) -> Self:
        """Maps a region as SET_INFLIGHT_FD gives it; the caller keeps ``fd``. Raises RequestRefused.

        packed: the format of the rings; a ring of the other one cannot be opened with it.
        """
        error = ffi.new("int *")
        entries = max(given.queue_size, INFLIGHT_ROOM)
        if given.mmap_size != lib.vu_inflight_size(given.num_queues, entries, packed):
            entries = given.queue_size
        native = lib.vu_inflight_map(fd, given.mmap_size, given.mmap_offset, given.num_queues, entries, packed, error)
        if native == ffi.NULL:
            raise RequestRefused(
                f"in-flight region of {given.mmap_size} bytes for {given.num_queues} queues of {given.queue_size} "
                f"entries: {explain(error[0])}"
            )
        return cls(ffi.gc(native, lib.vu_inflight_put), given.num_queues, entries)
