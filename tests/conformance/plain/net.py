"""A network interface whose frames come back (virtio 1.2, section 5.1.6), one frame at a time.

What belongs here: which frames may pass, what they are made into, the buffers that they take. What does not: rings and
threads (``engine``).
"""

from __future__ import annotations

import os
import select
import threading
from collections import deque
from dataclasses import replace
from struct import pack, unpack_from
from typing import Any, NamedTuple

from tests.conformance.plain.engine import Engine
from tests.conformance.plain.queue import Chain, Queue
from tests.conformance.plain.ring import Bad
from vhostuser._native import lib
from vhostuser.devices.ends import TSO, End, NetFeature
from vhostuser.drivers.net import NetHeader
from vhostuser.memory import MemoryLost

N = NetFeature
NEEDS_CSUM = 1
ETHER = 14
LARGEST = 65535 + ETHER + 8
KINDS = {1: (N.HOST_TSO4, N.GUEST_TSO4), 4: (N.HOST_TSO6, N.GUEST_TSO6)}
"""Of gso_type: what a driver that sends such has negotiated, and one that takes such."""
_MOST = 1024
_LOOK = 1


class Frame(NamedTuple):
    """A frame on its way, and what its header says."""

    header: NetHeader
    data: bytes


class Loop(End):
    """Where frames wait until they are received, by pair."""

    kind = "loop"
    offloads = TSO

    def __init__(self, pairs: int) -> None:
        self.pairs = pairs
        self.boxes: list[deque[Frame]] = [deque() for _ in range(pairs)]
        self.events = [os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK) for _ in range(pairs)]

    def start(self, features: int) -> None:
        """Forgets what was for somebody else."""
        for box in self.boxes:
            box.clear()

    def put(self, pair: int, frame: Frame) -> None:
        """A frame more, unless there are too many."""
        if len(self.boxes[pair]) < _MOST:
            self.boxes[pair].append(frame)
            os.eventfd_write(self.events[pair], 1)

    def inject(self, frame: bytes) -> bool:
        self.put(0, Frame(NetHeader(), frame))
        return True


class Interface(Engine):
    """Stands in for ``vhostuser.devices.net.NetEngine``."""

    def __init__(self, end: Any, features: int, poll_us: int, mtu: int) -> None:
        self.mtu = mtu
        self.end: Loop = end
        self.features = features
        self.sending = threading.local()
        self.held: dict[int, list[Chain]] = {}
        """By ring: buffers that were taken and not used yet."""

    def has(self, feature: NetFeature) -> bool:
        """Was the feature negotiated?"""
        return bool(self.features >> feature & 1)

    def header_size(self) -> int:
        """Bytes in front of each frame."""
        return NetHeader.size(self.features)

    def set_mtu(self, mtu: int) -> None:
        """Another one than at the start."""
        self.mtu = mtu

    def stats(self, ring: int) -> dict[str, int]:
        """Nothing is counted."""
        return {}

    def run(self, queue: Any, kick: int, stop: int) -> int:
        if queue.index % 2:
            return super().run(queue, kick, stop)
        try:
            return self.run_receive(queue, kick, stop)
        except Bad as bad:
            raise queue.broken_by(bad.code) from None
        except MemoryLost:
            raise queue.broken_by(lib.VU_E_FAULT) from None
        except LookupError:
            raise queue.broken_by(lib.VU_E_RANGE) from None

    # ---- what the guest transmits

    def serve(self, chain: Chain) -> int:
        frame = self.parse(chain)
        if frame is not None:
            self.forward(self.pair_of(chain), frame)
        return 0

    def finish(self, queue: Queue, chain: Chain) -> None:
        self.sending.pair = queue.index // 2
        super().finish(queue, chain)

    def pair_of(self, chain: Chain) -> int:
        """Of the ring from which it comes, which has a thread of its own."""
        pair: int = self.sending.pair
        return pair

    def forward(self, pair: int, frame: Frame) -> None:
        """To where it is received."""
        self.end.put(pair, frame)

    def parse(self, chain: Chain) -> Frame | None:
        """The frame in a chain, or None if it may not pass."""
        size = self.header_size()
        if not self.sized(chain.to_read - size):
            return None
        data = self.gather(chain)
        header = NetHeader.unpack(data[:size])
        return self.judged(Frame(header, data[size:]))

    def gather(self, chain: Chain) -> bytes:
        """All that the driver transmits."""
        return chain.read()

    def sized(self, length: int) -> bool:
        """May a frame have this length?"""
        return ETHER <= length <= LARGEST

    def judged(self, frame: Frame) -> Frame | None:
        """The frame with what of its header matters to whoever gets it, or None."""
        header, clean = frame.header, NetHeader()
        if header.flags & NEEDS_CSUM:
            if not self.has(N.CSUM) or not self.sum_fits(frame):
                return None
            clean = replace(clean, flags=1, csum_start=header.csum_start, csum_offset=header.csum_offset)
        if header.gso_type:
            if not clean.flags or not header.gso_size or not self.sends(header.gso_type):
                return None
            hdr_len = self.hdr_len(frame)
            clean = replace(clean, gso_type=header.gso_type, gso_size=header.gso_size, hdr_len=hdr_len)
        return Frame(clean, frame.data)

    def hdr_len(self, frame: Frame) -> int:
        """A hint, if it can be one."""
        return frame.header.hdr_len if frame.header.hdr_len <= len(frame.data) else 0

    def sum_fits(self, frame: Frame) -> bool:
        """Is there a place for the checksum?"""
        start, offset = frame.header.csum_start, frame.header.csum_offset
        return start >= ETHER and start + offset + 2 <= len(frame.data)

    def sends(self, kind: int) -> bool:
        """Was it negotiated that the driver may transmit such segments?"""
        return kind in KINDS and self.has(KINDS[kind][0])

    # ---- what the guest receives

    def run_receive(self, queue: Queue, kick: int, stop: int) -> int:
        """Until ``stop`` is readable; buffers are taken when there is a frame for them."""
        pair = queue.index // 2
        self.held[queue.index] = []
        queue.disarm()
        while not self.stopped(stop):
            starved = self.deliver(queue, pair)
            queue.signal()
            if starved and self.ask(queue):
                continue
            self.wait(pair, kick if starved else -1, stop, look=starved and kick < 0)
            if starved:
                queue.disarm()
        self.give_up(queue)
        return 0

    def ask(self, queue: Queue) -> bool:
        """Asks for a kick; whether there is a buffer all the same."""
        return queue.arm()

    def wait(self, pair: int, kick: int, stop: int, *, look: bool) -> None:
        """Sleeps until a frame comes, or a buffer for the one that is there."""
        event = self.end.events[pair]
        poll = select.poll()
        for fd in {stop, kick, event} - {-1} - ({event} if kick >= 0 or look else set()):
            poll.register(fd, select.POLLIN)
        for fd, _ in poll.poll(_LOOK if look else None):
            if fd != stop:
                os.read(fd, 8)

    def give_up(self, queue: Queue) -> None:
        """Buffers that were not used are the driver's again, in their order."""
        places = sum(chain.places for chain in self.held.pop(queue.index))
        queue.next = (queue.next - places) % queue.ring.modulus

    def deliver(self, queue: Queue, pair: int) -> bool:
        """Hands out the frames that are there; whether one lacks buffers."""
        box = self.end.boxes[pair]
        while box:
            frame = self.fitted(box[0])
            if frame is not None:
                chains = self.buffers(queue, self.header_size() + len(frame.data))
                if chains is None:
                    return True
                if chains:
                    self.hand_over(queue, self.fill(chains, frame))
            box.popleft()
        return False

    def buffers(self, queue: Queue, length: int) -> list[Chain] | None:
        """Those for so many bytes; none: there are too few now; empty: the frame does not fit."""
        held = self.held[queue.index]
        while True:
            while held and self.useless(held[0]):
                self.hand_over(queue, [(held.pop(0), 0)])
            count = self.enough(held, length)
            if count is not None:
                taken, held[:] = held[:count], held[count:]
                return taken
            chain = queue.take()
            if chain is None:
                return None
            held.append(chain)

    def enough(self, held: list[Chain], length: int) -> int | None:
        """How many of these buffers hold so many bytes; 0: they never will, None: more are needed."""
        if not held:
            return None
        if not self.has(N.MRG_RXBUF):
            return 1 if held[0].room >= length else 0
        for count in range(1, len(held) + 1):
            if sum(chain.room for chain in held[:count]) >= length:
                return count
        return None

    def useless(self, chain: Chain) -> bool:
        """Does no frame fit into this buffer?"""
        return chain.room < self.header_size() + (0 if self.has(N.MRG_RXBUF) else ETHER)

    def fitted(self, frame: Frame) -> Frame | None:
        """What a driver with these features takes, or None if there is no such."""
        if not self.takes(frame.header.gso_type) if frame.header.gso_type else self.exceeds(frame):
            return None
        if frame.header.flags and not self.has(N.GUEST_CSUM):
            return Frame(NetHeader(), self.completed(frame))
        return frame

    def exceeds(self, frame: Frame) -> bool:
        """Is the packet longer than what the driver has negotiated?"""
        return self.has(N.MTU) and len(frame.data) > self.mtu + ETHER + 8

    def takes(self, kind: int) -> bool:
        """Was it negotiated that the driver takes such segments?"""
        return self.has(KINDS[kind][1])

    def completed(self, frame: Frame) -> bytes:
        """The frame with its checksum."""
        start = frame.header.csum_start
        at = start + frame.header.csum_offset
        data = frame.data[start:] + bytes((len(frame.data) - start) % 2)
        total = sum(unpack_from(f">{len(data) // 2}H", data))
        while total >> 16:
            total = (total & 0xFFFF) + (total >> 16)
        return frame.data[:at] + pack(">H", (0xFFFF ^ total) or 0xFFFF) + frame.data[at + 2 :]

    def fill(self, chains: list[Chain], frame: Frame) -> list[tuple[Chain, int]]:
        """Writes header and frame into these buffers, each but the last to its end; how much into each."""
        data = self.front(frame, len(chains)) + frame.data
        filled = []
        for chain in chains:
            part, data = data[: chain.room], data[chain.room :]
            chain.write(part)
            filled.append((chain, len(part)))
        return filled

    def front(self, frame: Frame, buffers: int) -> bytes:
        """The header."""
        return replace(frame.header, num_buffers=buffers).pack()[: self.header_size()]

    def hand_over(self, queue: Queue, filled: list[tuple[Chain, int]]) -> None:
        """All buffers of a frame at once."""
        for number, (chain, length) in enumerate(filled):
            self.mark(queue, chain, length, number)
            if queue.inflight is not None:
                queue.inflight.link(chain.head)
            queue.put_entry(chain.head, length)
            queue.used = queue.after(queue.used, chain.places)
            queue.returned += 1
        if queue.inflight is not None:
            queue.inflight.move(queue.ring, queue.used)
        queue.put_index()
        if queue.inflight is not None:
            for chain, _ in filled:
                queue.inflight.finish(chain.head)
            queue.inflight.seal(queue.used)

    def mark(self, queue: Queue, chain: Chain, length: int, number: int) -> None:
        """What was written, in the dirty log. number: of the buffer in its frame."""
        queue.mark_data(chain, length)


class Discard(Engine):
    """Stands in for what serves a ring that is disabled."""

    def serve(self, chain: Chain) -> int:
        return 0
