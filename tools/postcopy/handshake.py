"""What is said to one back-end, step by step, each with its outcome on the record.

What belongs here: the messages' order for one connection, and what its answers are compared with. What does not: when
the steps are made, also towards other back-ends (``run``), what an outcome means (``rules``).
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Sequence
from pathlib import Path
from typing import TypeVar

from vhostuser.frontend import (
    DRIVABLE,
    ClientRegion,
    Frontend,
    FrontendRing,
    PostcopyClient,
    ReplyTimeout,
    SharedMemory,
)
from vhostuser.protocol import LocalProtocolError, ProtocolFeature, RemoteProtocolError, RequestRefused, VirtioFeature
from vhostuser.tools.postcopy.record import Base, Outcome, Probe, Record, Step
from vhostuser.tools.postcopy.rules import ACK, ADVISE, END, LISTEN, OFFER, RINGS, TABLE
from vhostuser.tools.postcopy.subject import Subject, file_place
from vhostuser.uffd import Fault, Userfaultfd

T = TypeVar("T")

# The run's drivers ask for no kicks by index.
_FEATURES = DRIVABLE & ~VirtioFeature.RING_EVENT_IDX.mask


class StepFailed(Exception):
    """A step did not end well; it is on the record. The run cannot go on."""


class Conversation:
    """The connection to one back-end. Owns the front-end's end of it, and the userfaultfd once it has come."""

    def __init__(self, index: int, subject: Subject, frontend: Frontend, record: Record) -> None:
        self.index = index
        self.subject = subject
        self.frontend = frontend
        self._record = record
        self._client: PostcopyClient | None = None

    @property
    def client(self) -> PostcopyClient:
        """Once ``advise`` has been answered."""
        assert self._client is not None
        return self._client

    @property
    def regions(self) -> tuple[ClientRegion, ...]:
        """Where the back-end has the memory, as it says."""
        return self.client.regions

    # ---- steps, in their order

    async def negotiate(self, *, by_slots: bool, indirect: bool) -> None:
        """Takes everything that is offered, and finds out whether that includes what the run needs."""
        needed: list[ProtocolFeature | VirtioFeature] = [ProtocolFeature.PAGEFAULT]
        needed += [ProtocolFeature.CONFIGURE_MEM_SLOTS] * by_slots
        needed += [VirtioFeature.RING_INDIRECT_DESC] * indirect
        await self._step(OFFER, self._offer(needed))

    async def _offer(self, needed: Sequence[ProtocolFeature | VirtioFeature]) -> None:
        await self.frontend.negotiate(features=_FEATURES)
        session = self.frontend.session
        if lacking := [feature.name for feature in needed if not session.has(feature)]:
            raise RequestRefused(f"{' and '.join(lacking)} not offered")

    async def advise(self) -> None:
        """Asks for the userfaultfd, and looks whether it is one."""
        self._client = await self._step(ADVISE, self._advise())

    async def _advise(self) -> PostcopyClient:
        client = await PostcopyClient.advise(self.frontend)
        if (what := _kind_of(client.uffd)) != "anon_inode:[userfaultfd]":
            client.close()
            raise RequestRefused(f"the descriptor is {what}")
        return client

    async def listen(self) -> None:
        """From here on memory has holes."""
        await self._step(LISTEN, self.client.listen())

    async def share(self, memory: SharedMemory, *, by_slots: bool) -> None:
        """Shares the memory and looks up what the back-end really has at the addresses that it answers."""
        await self._step(TABLE, self.client.share(memory, by_slots=by_slots))
        for number, region in enumerate(self.regions):
            shared = memory.regions[number]
            self._record.bases.append(self._look_up(number, region, shared.fd, shared.region.offset))

    def _look_up(self, number: int, region: ClientRegion, fd: int, offset: int) -> Base:
        must = file_place(fd, offset), file_place(fd, offset + region.size - 1)
        try:
            found = self.subject.mapped(region.host), self.subject.mapped(region.host + region.size - 1)
        except (PermissionError, ProcessLookupError):
            return Base(self.index, number, region.host, None)
        if found == must:
            return Base(self.index, number, region.host, True)
        what = (
            "not mapped there" if found[0] is None else f"inode {found[0].inode} from offset {found[0].offset:#x} there"
        )
        if found[0] == must[0]:
            what = "not all of it is mapped there"
        return Base(self.index, number, region.host, False, f"{what}, by /proc/{self.subject.pid}/maps")

    async def acknowledge(self) -> None:
        """We know the addresses: from here on the back-end may touch the memory."""
        await self._step(ACK, self.client.acknowledge())

    async def start_ring(self, ring: FrontendRing, memory: SharedMemory) -> None:
        """Sets the ring up; it is not kicked yet."""
        await self._step(RINGS, self.frontend.start_ring(ring, memory))

    async def end(self) -> None:
        """Every page is there."""
        await self._step(END, self.client.end())

    # ---- at any time

    async def probe(self, *, waiting: bool) -> bool:
        """Asks a harmless question; whether it was answered. ``waiting``: a fault of this back-end waits."""
        begin = time.monotonic_ns()
        seconds = None
        try:
            await self.frontend.get_features()
            seconds = (time.monotonic_ns() - begin) / 1e9
        except ReplyTimeout:
            pass
        except (RemoteProtocolError, OSError):
            await self._lost()
            raise StepFailed from None
        self._record.probes.append(Probe(self.index, begin, waiting, seconds))
        return seconds is not None

    def faults(self) -> list[Fault]:
        """Those that wait now, which nobody serves; while the fault server does not know this back-end."""
        return Userfaultfd(self.client.uffd).read()

    async def _step(self, name: str, work: Awaitable[T]) -> T:
        begin = time.monotonic()
        try:
            result = await work
        except RequestRefused as error:
            outcome, text = Outcome.REFUSED, str(error)
        except TimeoutError:
            outcome, text = Outcome.SILENT, f"within {self.frontend.timeout:g} s"
        except (RemoteProtocolError, LocalProtocolError, OSError) as error:
            outcome, text = await self._kind(error)
        else:
            self._record.steps.append(Step(self.index, name, Outcome.DONE, time.monotonic() - begin))
            return result
        self._record.steps.append(Step(self.index, name, outcome, time.monotonic() - begin, text))
        if outcome is Outcome.LOST:
            await self._lost()
        raise StepFailed

    async def _kind(self, error: Exception) -> tuple[Outcome, str]:
        """Whether it broke the protocol, or only left."""
        if isinstance(error, OSError) or self.frontend.lost.is_set():
            return Outcome.LOST, ""
        return Outcome.WRONG, str(error)

    async def look_for_loss(self) -> None:
        """Raises StepFailed if the connection is gone."""
        if self.frontend.lost.is_set():
            await self._lost()
            raise StepFailed

    async def _lost(self) -> None:
        client = self._record.clients[self.index]
        client.ended = client.ended or await self.subject.ended() or "it closed the connection"

    def close(self) -> None:
        """The connection, and the userfaultfd."""
        self.frontend.close()
        if self._client is not None:
            self._client.close()


def _kind_of(fd: int) -> str:
    """What the kernel calls a descriptor of ours."""
    return str(Path(f"/proc/self/fd/{fd}").readlink())
