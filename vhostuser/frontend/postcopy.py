"""Postcopy as the destination's front-end plays it towards one back-end: messages, the userfaultfd, the addresses.

What belongs here: the order of the messages, and judging the addresses that come back. What does not: bringing pages
and waking who waits (``faultserver``, which takes ``uffd`` and ``regions``). Section "Postcopy".

    client = await PostcopyClient.advise(frontend)
    await client.listen()
    await client.share(memory)
    server.add_client("blk", client.uffd, client.regions)
    await client.acknowledge()       # from here on the back-end touches the memory, and may wait for pages
    ...                              # rings are started, pages are placed
    await client.end()               # every page has been placed
    client.close()
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import NamedTuple, Self

from vhostuser.frontend.calls import Calls
from vhostuser.frontend.memory import SharedMemory, SharedRegion
from vhostuser.protocol import (
    FrontendRequest,
    LocalProtocolError,
    MemoryRegion,
    Postcopy,
    ProtocolFeature,
    RemoteProtocolError,
)


class ClientRegion(NamedTuple):
    """A region as the back-end has it: guest address, its own address of the first byte, bytes, bytes of its pages."""

    guest: int
    host: int
    size: int
    page_size: int


class PostcopyClient:
    """One back-end in postcopy. Owns ``uffd``; the connection stays the caller's. Several may share one memory.

    uffd: the back-end's userfaultfd. regions: what was shared, as the back-end has it; known after ``share``.
    """

    def __init__(self, frontend: Calls, uffd: int) -> None:
        self.uffd = uffd
        self.regions: tuple[ClientRegion, ...] = ()
        self._frontend = frontend

    @classmethod
    async def advise(cls, frontend: Calls) -> Self:
        """POSTCOPY_ADVISE: postcopy may follow. Raises RequestRefused where the back-end has no userfaultfd."""
        return cls(frontend, await frontend.postcopy_advise())

    async def listen(self) -> None:
        """POSTCOPY_LISTEN: memory that is shared from now on has holes."""
        await self._frontend.postcopy_listen()

    async def share(self, memory: SharedMemory, *, by_slots: bool | None = None) -> None:
        """Shares ``memory`` and learns the back-end's addresses of it; it does not touch it before ``acknowledge``.

        by_slots: region by region (ADD_MEM_REG), not as one table; None: as QEMU does, wherever CONFIGURE_MEM_SLOTS was
        negotiated. Raises RemoteProtocolError for an answer that does not fit what was sent, LocalProtocolError before
        ``listen``.
        """
        self._check_listening(FrontendRequest.SET_MEM_TABLE)
        if by_slots is None:
            by_slots = self._frontend.session.has(ProtocolFeature.CONFIGURE_MEM_SLOTS)
        if by_slots:
            for region in memory.regions:
                await self.add(region)
        else:
            based = await self._frontend.set_mem_table(memory)
            self.regions = _judge(FrontendRequest.SET_MEM_TABLE, memory.regions, based)

    async def add(self, region: SharedRegion) -> ClientRegion:
        """Shares one more region; an ``acknowledge`` must follow. Raises as ``share``."""
        self._check_listening(FrontendRequest.ADD_MEM_REG)
        based = await self._frontend.add_mem_reg(region)
        (added,) = _judge(FrontendRequest.ADD_MEM_REG, [region], [] if based is None else [based])
        self.regions += (added,)
        return added

    def _check_listening(self, code: FrontendRequest) -> None:
        if self._frontend.session.postcopy not in (Postcopy.LISTENING, Postcopy.AWAITING_ACK):
            raise LocalProtocolError(code, "is an ordinary table before POSTCOPY_LISTEN", clause=code.clause)

    async def remove(self, region: SharedRegion) -> None:
        """Takes a region away: whoever waits in it in the back-end gets an error. An ``acknowledge`` must follow."""
        await self._frontend.rem_mem_reg(region)
        self.regions = tuple(kept for kept in self.regions if kept.guest != region.region.guest)

    async def acknowledge(self) -> None:
        """We know where everything is: the back-end may touch it. Nothing comes back."""
        await self._frontend.postcopy_ack()

    async def end(self) -> None:
        """POSTCOPY_END, after the last page was placed. ``uffd`` stays open until ``close``."""
        await self._frontend.postcopy_end()

    def close(self) -> None:
        """Closes the userfaultfd. Again: nothing."""
        if self.uffd >= 0:
            os.close(self.uffd)
        self.uffd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _judge(
    code: FrontendRequest, sent: Iterable[SharedRegion], based: Iterable[MemoryRegion]
) -> tuple[ClientRegion, ...]:
    """What the back-end answered to these regions. Whether it has mapped them there only it and the kernel know."""
    asked, came = [region.region for region in sent], list(based)  # of the same length, or the session would object
    for region, answer in zip(asked, came, strict=True):
        if (answer.guest, answer.size) != (region.guest, region.size):
            raise RemoteProtocolError(
                code,
                f"the region at guest address {region.guest:#x} of {region.size:#x} bytes came back as "
                f"{answer.guest:#x} of {answer.size:#x}",
                clause=code.clause,
            )
        if not answer.user or (answer.user - region.offset) % region.page_size:
            raise RemoteProtocolError(
                code,
                f"address {answer.user:#x} for offset {region.offset:#x} of a file with pages of {region.page_size:#x} "
                "bytes, which no mapping has",
                clause=code.clause,
            )
    return tuple(ClientRegion(r.guest, a.user, r.size, r.page_size) for r, a in zip(asked, came, strict=True))
