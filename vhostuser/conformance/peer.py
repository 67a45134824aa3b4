"""What a case has at hand: a fresh connection to the back-end, memory, rings, and the means to send what no front-end
would.

What belongs here: the openings that many cases share, and how a back-end takes a bad message. What does not: rings with
requests (``lane``), processes (``subject``).
"""

from __future__ import annotations

import asyncio
import os
import select
from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack
from enum import Enum
from pathlib import Path
from typing import NamedTuple

from vhostuser.channel import readable, writable
from vhostuser.conformance.frames import NetFeature
from vhostuser.conformance.lane import AREA, Lane
from vhostuser.conformance.subject import Subject
from vhostuser.conformance.suite import Skipped, Violation, check
from vhostuser.driverqueue import DriverQueue, RingParts
from vhostuser.frontend import DRIVABLE_PROTOCOL, Frontend, FrontendRing, ReplyTimeout, SharedLog, SharedMemory
from vhostuser.protocol import (
    FRONTEND,
    NEED_REPLY,
    REPLY,
    U64,
    VERSION,
    FrontendRequest,
    Header,
    Payload,
    ProtocolFeature,
    RequestRefused,
    VhostUserError,
    VirtioFeature,
)

MIB = 1 << 20
MEMORY = 8 * MIB
RINGS = 64 * 1024
"""Guest memory for each ring, from address 0 on; requests follow from 1 MiB on."""
_HUGE_PAGES = Path("/sys/kernel/mm/hugepages/hugepages-2048kB")
PLAIN = VirtioFeature.VERSION_1.mask | VirtioFeature.PROTOCOL_FEATURES.mask


class Kind(Enum):
    """How a back-end took a message."""

    DONE = "done"
    REFUSED = "refused"
    CLOSED = "the connection closed"
    SILENT = "no answer"


class Reaction(NamedTuple):
    """How, and what it answered: flags and payload of the reply, how many descriptors came with it."""

    kind: Kind
    flags: int = 0
    body: bytes = b""
    fds: int = 0

    def __str__(self) -> str:
        return f"{self.kind.value} (reply {self.body.hex()})" if self.body else self.kind.value


class Peer:
    """One case's view of the back-end. Owns everything that it makes."""

    def __init__(
        self, frontend: Frontend, subject: Subject, patience: float, quiet: float, *, net: bool, ring: int | None = None
    ) -> None:
        self.frontend = frontend
        self.subject = subject
        self.patience = patience
        self.quiet = quiet
        self.index = int(net) if ring is None else ring
        """The ring whose requests this suite knows."""
        self.packed = False
        """Are the rings of this case packed ones?"""
        self._net = net
        self._judged = ring is None
        self._paired: tuple[Frontend, SharedMemory] | None = None
        self._owned = ExitStack()
        self._owned.callback(frontend.close)
        self._fds: set[int] = set()
        self._memory: SharedMemory | None = None

    def close(self) -> None:
        """Closes the connections and everything that was made."""
        self._owned.close()
        while self._fds:
            os.close(self._fds.pop())

    async def again(self) -> Frontend:
        """Leaves the back-end and connects anew; memory stays ours, the back-end has to be told again."""
        self.frontend.close()
        self.frontend = await self.subject.connect()
        self._owned.callback(self.frontend.close)
        return self.frontend

    def own(self, close: Callable[[], object]) -> None:
        """Has this called with the end of the case."""
        self._owned.callback(close)

    # ---- openings

    @property
    def format(self) -> int:
        """The feature that tells the format of the rings."""
        return VirtioFeature.RING_PACKED.mask * self.packed

    async def negotiate(
        self, *features: VirtioFeature | NetFeature, legacy: bool = False,
        without: Collection[ProtocolFeature] = (), also: Collection[ProtocolFeature] = (),
    ) -> Frontend:  # fmt: skip
        """Takes VERSION_1 (unless ``legacy``), protocol features and these; of the protocol features all but those
        ``without``, and ``also`` what this suite does not drive a ring with. Raises Skipped where a legacy driver
        is refused."""
        wanted = PLAIN | self.format | sum(feature.mask for feature in features)
        wanted &= ~VirtioFeature.VERSION_1.mask if legacy else wanted
        protocol = DRIVABLE_PROTOCOL | sum(feature.mask for feature in also)
        await self.frontend.negotiate(wanted, protocol & ~sum(feature.mask for feature in without))
        if legacy:
            await self._serves_legacy_drivers()
        return self.frontend

    async def _serves_legacy_drivers(self) -> None:
        """Raises Skipped where it goes. Virtio, "Reserved Feature Bits": "A device MAY fail to operate further if
        VIRTIO_F_VERSION_1 is not accepted"."""
        try:
            await self.frontend.get_features()
        except (VhostUserError, ConnectionError):
            raise Skipped("drivers from before virtio 1 are refused, as they may be") from None

    def make_memory(self, *regions: tuple[int, int], hugetlb: bool = False) -> SharedMemory:
        """Memory that nobody was told of yet; by default 8 MiB from guest address 0 on."""
        memory = SharedMemory(*(regions or [(0, MEMORY)]), hugetlb=hugetlb)
        self._owned.callback(memory.close)
        return memory

    def make_huge_memory(self, size: int) -> SharedMemory:
        """Memory of huge pages. Raises Skipped where there are not twice as many to spare."""
        counts = (_HUGE_PAGES / name for name in ("free_hugepages", "resv_hugepages"))
        try:
            free, reserved = (int(count.read_text()) for count in counts)
            if (free - reserved) * 2 * MIB < 2 * size:
                raise Skipped("this machine has no huge pages of 2 MiB to spare")
            return self.make_memory((0, size), hugetlb=True)
        except (OSError, RequestRefused) as error:
            raise Skipped(f"this machine has no huge pages of 2 MiB: {error}") from None

    @property
    def memory(self) -> SharedMemory:
        """What was shared last."""
        assert self._memory is not None
        return self._memory

    async def share(self, memory: SharedMemory | None = None, *, by_slots: bool = False) -> SharedMemory:
        """Tells the back-end of this memory, or of what ``make_memory`` makes; see ``Frontend.set_memory``."""
        self._memory = memory or self.make_memory()
        await self.frontend.set_memory(self._memory, by_slots=by_slots)
        return self._memory

    def adopt(self, memory: SharedMemory) -> None:
        """Takes this memory for the one that was shared: a case tells the back-end of it by itself."""
        self._memory = memory

    def make_log(self) -> SharedLog:
        """A dirty log for the memory that was shared."""
        log = SharedLog(self.memory.end)
        self._owned.callback(log.close)
        return log

    def make_lane(
        self, index: int | None = None, *, size: int = 64, indirect: bool = False, at: int | RingParts | None = None,
        requests: int | None = None,
    ) -> Lane:  # fmt: skip
        """A ring in the shared memory that the back-end does not know yet. at, requests: guest addresses of its parts
        and of its requests, where the usual ones will not do."""
        index = self.index if index is None else index
        event_idx = self.frontend.session.has(VirtioFeature.RING_EVENT_IDX)
        place = index * RINGS if at is None else at
        queue = DriverQueue(
            self.memory.map, place, size, event_idx=event_idx, indirect=indirect, packed=self.packed
        )  # fmt: skip
        lane = Lane(
            self.frontend, self.memory, index, queue, MIB + index * AREA if requests is None else requests,
            frames=self._net, judged=self._judged, receives=self._receiver(index, at), patience=self.patience,
            quiet=self.quiet,
        )  # fmt: skip
        self._owned.callback(lane.close)
        return lane

    def _receiver(self, index: int, at: int | RingParts | None) -> FrontendRing | None:
        """An empty ring to receive by, beside one that sends: no network driver has the one without the other, and
        DPDK serves neither until it has both. None where guest memory has no room for it."""
        if not self._net or index % 2 == 0 or self._paired == (self.frontend, self.memory):
            return None
        place = at + RINGS if isinstance(at, int) else (index - 1) * RINGS
        regions = [entry.region for entry in self.memory.regions]
        if not any(region.guest <= place and place + RINGS <= region.guest + region.size for region in regions):
            return None
        self._paired = (self.frontend, self.memory)
        ring = FrontendRing(index - 1, DriverQueue(self.memory.map, place, 64, packed=self.packed))
        self._owned.callback(ring.close)
        return ring

    async def lane(self, *features: VirtioFeature, size: int = 64, **options: bool) -> Lane:
        """The usual opening: negotiates, shares memory, sets the ring up as ``Lane.start`` does. No kick yet."""
        await self.negotiate(*features)
        await self.share()
        lane = self.make_lane(size=size)
        await lane.start(**options)
        return lane

    # ---- messages of any content

    async def send(
        self, code: int, payload: Payload | bytes = b"", fds: Sequence[int] = (), *, flags: int = VERSION
    ) -> None:
        """Sends a message of any content. The descriptors stay the caller's."""
        body = payload if isinstance(payload, bytes) else payload.pack()
        await self.frontend.send_raw(Header(code, flags, len(body)).pack() + body, fds)

    async def react(
        self, code: int, payload: Payload | bytes = b"", fds: Sequence[int] = (), *, flags: int | None = None
    ) -> Reaction:
        """Sends a message of any content, and sees how it is taken; by default it asks for an answer where it has no
        reply of its own."""
        if flags is None:
            flags = VERSION if self._replies(code) else VERSION | NEED_REPLY
        try:
            await self.send(code, payload, fds, flags=flags)
        except ConnectionError:
            return Reaction(Kind.CLOSED)
        return await self.reaction(code)

    async def reaction(self, code: int) -> Reaction:
        """How the message ``code``, which was sent, is taken."""
        try:
            message = await self.frontend.receive_message()
        except ReplyTimeout:
            return Reaction(Kind.SILENT)
        if message is None:
            return Reaction(Kind.CLOSED)
        count = len(message.fds)
        message.fds.close()
        if message.header.request != code:
            raise Violation(f"an answer to request {code}", f"an answer to request {message.header.request}")
        kind = Kind.REFUSED if self._says_no(code, message.body, count) else Kind.DONE
        return Reaction(kind, message.header.flags, message.body, count)

    def _replies(self, code: int) -> bool:
        """Has the message a reply of its own as things stand?"""
        return code in FRONTEND and self.frontend.session.replies(FrontendRequest(code))

    def _says_no(self, code: int, body: bytes, fds: int) -> bool:
        """Does a reply of this content refuse the request?"""
        if not self._replies(code):
            return body != U64(0).pack()
        row = FRONTEND[code]
        if row.refusal is None:
            return False
        kind = next((kind for kind in row.reply if len(body) in kind.sizes), None)
        if kind is None:
            raise Violation(f"a reply to {row} as the specification has it", f"{len(body)} bytes")
        request = row.request[0].unpack(bytes(row.request[0].sizes[0]))
        try:
            return row.refusal.told(request, kind.unpack(body), fds)
        except ValueError as error:
            raise Violation(f"a reply to {row} as the specification has it", str(error)) from None

    async def refuses(
        self, code: int, payload: Payload | bytes = b"", fds: Sequence[int] = (), *, flags: int | None = None
    ) -> None:
        """The message must not be taken for done: a refusal, or the end of the connection."""
        if not self.frontend.session.has(ProtocolFeature.REPLY_ACK) and not self._replies(code):
            raise Skipped("without REPLY_ACK a refusal cannot be seen")
        reaction = await self.react(code, payload, fds, flags=flags)
        check(reaction.kind in (Kind.REFUSED, Kind.CLOSED), "a refusal, or the connection closed", str(reaction))

    async def accepts(
        self, code: int, payload: Payload | bytes = b"", fds: Sequence[int] = (), *, flags: int | None = None
    ) -> Reaction:
        """The message must be answered, and not with no."""
        reaction = await self.react(code, payload, fds, flags=flags)
        check(reaction.kind is Kind.DONE, "the request done and answered", str(reaction))
        check(reaction.flags == VERSION | REPLY, "a reply with flags 0x5", f"flags {reaction.flags:#x}")
        return reaction

    async def answers(self) -> None:
        """The connection lives: GET_FEATURES is answered next, by the very next message."""
        await self.accepts(FrontendRequest.GET_FEATURES, flags=VERSION)

    async def serves_another(self) -> None:
        """The next front-end is served, whatever became of this connection."""
        frontend = await self.again()
        await frontend.get_features()

    # ---- descriptors

    def pipe(self) -> tuple[int, int]:
        """Both ends of a pipe, read and write; they are closed with the case."""
        ends = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._fds.update(ends)
        return ends

    def eventfd(self) -> int:
        """An eventfd, closed with the case."""
        fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._fds.add(fd)
        return fd

    def keep(self, fd: int) -> int:
        """Takes a descriptor that came along, to be closed with the case."""
        self._fds.add(fd)
        return fd

    def drop(self, fd: int) -> None:
        """Closes one of our descriptors before the end of the case."""
        self._fds.discard(fd)
        os.close(fd)

    async def read(self, fd: int) -> bytes:
        """What comes next from a descriptor, whose other end has the patience's time; nothing at its end."""
        await asyncio.wait_for(readable(fd), self.patience)
        return os.read(fd, 65536)

    async def write(self, fd: int, data: bytes) -> None:
        """Writes all of this into a descriptor, whose other end has the patience's time for each piece."""
        os.set_blocking(fd, False)
        while data:
            await asyncio.wait_for(writable(fd), self.patience)
            data = data[os.write(fd, data) :]

    async def let_go(self, read: int, write: int) -> bool:
        """Closes our write end of a pipe of which the back-end was sent another; does it close its own too?"""
        self.drop(write)
        poll = select.poll()
        poll.register(read, 0)
        deadline = asyncio.get_running_loop().time() + self.patience
        while not poll.poll(0):
            if asyncio.get_running_loop().time() > deadline:
                return False
            await asyncio.sleep(0.005)
        return True

    def open_fds(self) -> int:
        """How many descriptors the back-end's process has. Raises Skipped where that cannot be seen."""
        try:
            return len(list(Path(f"/proc/{self.subject.pid}/fd").iterdir()))
        except OSError as error:
            raise Skipped(f"the back-end's descriptors cannot be counted: {error.strerror}") from None
