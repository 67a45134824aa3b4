"""A ring with requests in it, as a case drives it: offer, kick, see what comes back, or that nothing does.

What belongs here: requests that any device of a kind must serve, and waiting for them. What does not: what is sent to
the back-end about the ring beyond start and stop (``peer``).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
from typing import NamedTuple

from vhostuser.conformance.bytewise import bytewise
from vhostuser.conformance.suite import Violation, check, equal
from vhostuser.driverqueue import Descriptor, DriverQueue, RawRing
from vhostuser.drivers.blk import BlkAnswer, BlkDriver, BlkRequest, BlkStatus
from vhostuser.drivers.net import FrameSender
from vhostuser.frontend import Frontend, FrontendRing, SharedMemory

DEPTH, LARGEST = 16, 16 * 1024
AREA = BlkDriver.bytes_needed(DEPTH, LARGEST)
"""Guest memory that a lane's requests take, in bytes."""

PLAIN = BlkRequest.read(0, 1)
"""What a disk is asked where it does not matter what: it writes to memory, not to the medium."""
_FRAME = bytes(12) + b"\x08\x00" + bytes(50)

_LOOK = 0.001


class Buffers(NamedTuple):
    """Guest addresses of a block request that a case puts into the ring by itself. The status is one byte."""

    header: int
    data: int
    status: int


class Lane:
    """One ring with its requests. Owns the ring's eventfds.

    at: guest address of the requests. features: negotiated virtio features. frames: requests are frames to send, not
    block requests. judged: it is looked at what came of block requests; else they have to come back and no more.
    receives: the other ring of a pair, which stays empty and is started first. patience: seconds to wait for what must
    come. quiet: seconds to look on where nothing may.
    """

    def __init__(
        self, frontend: Frontend, memory: SharedMemory, index: int, queue: DriverQueue, at: int, *,
        frames: bool, receives: FrontendRing | None, patience: float, quiet: float, judged: bool = True,
    ) -> None:  # fmt: skip
        self.frontend = frontend
        self.memory = memory
        self.index = index
        self.at = at
        self.queue = queue
        self.ring = FrontendRing(index, queue)
        self.bytes = bytewise(queue)
        """The ring byte by byte, in either format."""
        self.base = queue.first_base
        """Where to start, or go on after a stop."""
        self.patience = patience
        self.quiet = quiet
        features = frontend.session.features
        self._sender = FrameSender(queue, at, features=features, slots=DEPTH) if frames else None
        self._disk = BlkDriver(queue, at, depth=DEPTH, largest=LARGEST)
        self._judged = judged
        self._out = 0
        self._receives = receives

    @property
    def raw(self) -> RawRing:
        """A split ring byte by byte."""
        return self.queue.raw

    # ---- the ring's life

    async def start(self, **options: bool) -> None:
        """Sets the ring up from ``base`` on, gives its eventfds, enables it; see ``Frontend.start_ring``."""
        await self.pair()
        await self.frontend.start_ring(self.ring, self.memory, base=self.base, **options)

    async def pair(self) -> None:
        """Starts the other ring of the pair, if that has not been done."""
        receives, self._receives = self._receives, None
        if receives is not None:
            await self.frontend.start_ring(receives, self.memory)

    async def stop(self) -> int:
        """GET_VRING_BASE; the base, which is kept."""
        self.base = await self.frontend.stop_ring(self.ring)
        return self.base

    async def enable(self, on: bool = True) -> None:
        """SET_VRING_ENABLE."""
        await self.frontend.set_vring_enable(self.index, on)

    def kick(self) -> None:
        """Notifies the back-end."""
        self.ring.kick()

    async def kick_seen(self) -> None:
        """Waits until the back-end has taken the kick's counter; while a ring may not run, it need not."""
        deadline = asyncio.get_running_loop().time() + self.quiet
        while _readable(self.ring.kick_fd):
            if asyncio.get_running_loop().time() > deadline:
                return
            await asyncio.sleep(_LOOK)

    # ---- requests

    def offer(self, *requests: BlkRequest, count: int = 1) -> None:
        """Makes requests available, without a kick; none given: ``count`` plain ones."""
        if self._sender is not None:
            self._out += self._sender.send([_FRAME] * count)
        else:
            for request in requests or [PLAIN] * count:
                check(self._disk.submit(request) is not None, "room for a request", "the ring full")
                self._out += 1
        self.queue.publish()

    def buffers(self, request: BlkRequest = PLAIN, slot: int = DEPTH - 1) -> Buffers:
        """Lays a request out in memory, for a case that describes it in the ring by itself."""
        head = self.at + slot * 64
        self.memory.write(head, request.type.to_bytes(4, "little") + bytes(4) + request.sector.to_bytes(8, "little"))
        self.memory.write(head + 32, bytes([BlkStatus.NONE]))
        return Buffers(head, self._disk.data_at(slot), head + 32)

    # ---- the ring byte by byte; what is offered so is not seen by ``answers``

    def describe(self, *segments: tuple[int, int, bool], first: int = 0) -> None:
        """Writes a chain of (guest address, bytes, writable) into the table, from descriptor ``first`` on."""
        for number, (guest, length, writable) in enumerate(segments, first):
            more = number + 1 < first + len(segments)
            flags = Descriptor.NEXT * more | Descriptor.WRITE * writable
            self.bytes.describe(number, guest, length, flags, number + 1 if more else 0)

    def plain_chain(self, first: int = 0) -> Buffers:
        """Lays a read of one sector out, in memory and in three descriptors from ``first`` on."""
        buffers = self.buffers()
        self.describe((buffers.header, 16, False), (buffers.data, 512, True), (buffers.status, 1, True), first=first)
        return buffers

    def usual_chain(self) -> None:
        """Describes what a device of this kind is asked where it does not matter what, from descriptor 0 on."""
        if self._sender is not None:
            self.describe((self.at, len(_FRAME), False))
        else:
            self.plain_chain()

    def push(self, *heads: int) -> None:
        """Makes chains available, without a kick."""
        self.bytes.push(*heads)

    async def used_to(self, index: int) -> None:
        """Waits until the used index is ``index``, see ``Bytewise.returned``."""
        deadline = asyncio.get_running_loop().time() + self.patience
        while (seen := self.bytes.returned) != index:
            if asyncio.get_running_loop().time() > deadline:
                raise Violation(f"a used index of {index}", f"{seen} after {self.patience:g} s")
            await asyncio.sleep(_LOOK)

    async def stays_at(self, index: int) -> None:
        """Sees that the used index stays at ``index``."""
        await self.frontend.get_features()
        await asyncio.sleep(self.quiet)
        equal("the used index", self.bytes.returned, index)

    # ---- what comes back

    def _collect(self) -> list[BlkAnswer]:
        if self._sender is not None:
            self._out -= self._sender.collect()
            return []
        answers = [answer for _, answer in self._disk.collect()]
        self._out -= len(answers)
        return answers if self._judged else []

    async def answers(self, left: int = 0) -> list[BlkAnswer]:
        """Waits until no more than ``left`` requests are out; what came, in the order of the used ring. Looks at the
        ring and not for calls."""
        found: list[BlkAnswer] = []
        deadline = asyncio.get_running_loop().time() + self.patience
        while True:
            found += self._collect()
            if self._out <= left:
                return found
            if asyncio.get_running_loop().time() > deadline:
                raise Violation("every request returned", f"{self._out} still out after {self.patience:g} s")
            await asyncio.sleep(_LOOK)

    async def works(self, *requests: BlkRequest, kick: bool = True) -> list[BlkAnswer]:
        """Offers requests (a plain one), and sees all come back done."""
        self.offer(*requests)
        if kick:
            self.kick()
        return await self.served()

    async def served(self) -> list[BlkAnswer]:
        """Sees everything that is out come back done."""
        answers = await self.answers()
        for answer in answers:
            equal(f"the status of request type {answer.request.type}", answer.status, int(BlkStatus.OK))
        return answers

    async def idle(self) -> None:
        """Sees that the ring is not processed: nothing is returned for a while."""
        await self.frontend.get_features()  # what was sent before has been seen
        out = self._out
        await asyncio.sleep(self.quiet)
        self._collect()
        check(self._out == out, "the ring left alone", f"{out - self._out} requests returned")

    async def without_effect(self) -> None:
        """Sees what a ring that is started and disabled does: a disk's nothing, a network device's drops all frames."""
        await (self.idle() if self._sender is None else self.answers())

    def returned(self) -> bool:
        """Looks once: has everything that was offered come back?"""
        self._collect()
        return not self._out

    async def called(self, within: float | None = None) -> bool:
        """Is the call eventfd signalled ``within`` so many seconds (default: the patience)? Its counter is taken."""
        try:
            async with asyncio.timeout(self.patience if within is None else within):
                await self.ring.called()
        except TimeoutError:
            return False
        return True

    async def calm(self) -> None:
        """Waits for calls that are still on their way, and takes the call eventfd's counter."""
        await self.frontend.get_features()
        await asyncio.sleep(self.quiet)
        self._take_calls()

    def _take_calls(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self.ring.call_fd)

    async def reported(self) -> bool:
        """Is the err eventfd signalled?"""
        try:
            async with asyncio.timeout(self.patience):
                await self.ring.broken()
        except TimeoutError:
            return False
        return True

    def close(self) -> None:
        """Closes the eventfds."""
        self.ring.close()


def _readable(fd: int) -> bool:
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(0))
