"""Frontend: drives a back-end over a socket, one awaitable call for every request.

What belongs here: calls, the front-end's guest memory, bringing rings up and down. What does not: what is legal
(``protocol.session``), what is inside a ring (``virtqueue.DriverQueue``).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from vhostuser.channel import Channel, Fds, readable
from vhostuser.memory import GuestMemory, Region
from vhostuser.protocol import (
    FRONTEND,
    U64,
    Answer,
    FrontendRequest,
    FrontendSession,
    MemoryRegion,
    MemoryTable,
    Payload,
    ProtocolFeature,
    RemoteProtocolError,
    RequestRefused,
    VringAddress,
    VringFd,
    VringState,
)
from vhostuser.virtqueue import DriverQueue


class SharedMemory:
    """Guest memory of a front-end: one memfd a region, mapped here too. Owns the descriptors.

    regions: (guest address, bytes) of each. hugetlb: back them with 2 MiB pages. ``map`` is our own view, whose user
    addresses are our own addresses, as with QEMU.
    """

    def __init__(self, *regions: tuple[int, int], hugetlb: bool = False) -> None:
        self.fds: list[int] = []
        mapped = []
        for guest, size in regions:
            fd = os.memfd_create(f"guest {guest:#x}", os.MFD_CLOEXEC | (os.MFD_HUGETLB if hugetlb else 0))
            self.fds.append(fd)
            os.truncate(fd, size)
            mapped.append(Region.map(fd, MemoryRegion(guest, size, 0, 0)))
        self.map = GuestMemory(tuple(mapped))

    def table(self) -> MemoryTable:
        """What SET_MEM_TABLE says of it."""
        return MemoryTable(tuple(MemoryRegion(r.guest, r.size, r.host, r.offset) for r in self.map.regions))

    def close(self) -> None:
        """Closes the descriptors; mappings go with the last reference."""
        while self.fds:
            os.close(self.fds.pop())


class FrontendRing:
    """One ring on the front-end's side: its driver queue and eventfds, which it owns."""

    def __init__(self, index: int, queue: DriverQueue) -> None:
        self.index = index
        self.queue = queue
        self.kick_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.call_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.err_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def kick(self) -> None:
        """Notifies the back-end."""
        os.eventfd_write(self.kick_fd, 1)

    async def called(self) -> None:
        """Waits for the back-end's notification."""
        await readable(self.call_fd)
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self.call_fd)

    async def broken(self) -> None:
        """Waits until the back-end says that the ring is broken."""
        await readable(self.err_fd)

    def close(self) -> None:
        for fd in (self.kick_fd, self.call_fd, self.err_fd):
            os.close(fd)


class Frontend:
    """The front-end's end of one connection; owns the socket. All methods belong to the loop's thread.

    Requests may be issued by several tasks; they are sent in the order of the calls and answers are paired in that
    order.
    """

    def __init__(self, sock: socket.socket, queue_count: int = 256) -> None:
        self.session = FrontendSession(queue_count)
        self._channel = Channel(sock)
        self._turn = asyncio.Lock()

    @classmethod
    async def connect(cls, path: str) -> Self:
        """Connects to a back-end that listens. Raises OSError."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.setblocking(False)
        try:
            await asyncio.get_running_loop().sock_connect(sock, path)
        except OSError:
            sock.close()
            raise
        return cls(sock)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes the connection; the back-end sees the end of the stream."""
        self._channel.close()

    # ---- requests

    async def request(
        self,
        code: FrontendRequest,
        payload: Payload | None = None,
        fds: Sequence[int] = (),
        *,
        need_reply: bool | None = None,
    ) -> tuple[Payload | None, Fds]:
        """Sends a request and waits for its answer, if one comes: its payload and descriptors, which are then the
        caller's.

        need_reply: ask for an acknowledgement; None: wherever REPLY_ACK was negotiated and the message has no reply
        of its own (libvhost-user answers those with wrong flags when asked for both). Raises RequestRefused when
        the back-end says no, RemoteProtocolError when it breaks the protocol or closes, LocalProtocolError when the
        request is not allowed now.
        """
        async with self._turn:
            if need_reply is None:
                need_reply = self.session.has(ProtocolFeature.REPLY_ACK) and not FRONTEND[code].reply
            outgoing = self.session.request(code, payload, fds, need_reply)
            await self._channel.send(outgoing.data, outgoing.fds)
            if not self.session.outstanding:
                return None, Fds()
            answer, came = await self._answer(code)
        if answer.refused:
            came.close()
            raise RequestRefused(f"the back-end refused {code.name}")
        return answer.payload, came

    async def _answer(self, code: FrontendRequest) -> tuple[Answer, Fds]:
        first: Fds | None = None
        while True:
            data, came = await self._channel.receive(self.session.wanted)
            if not data:
                raise RemoteProtocolError(code, "the back-end closed the connection")
            first = came if first is None else first
            try:
                answer = self.session.receive(data, came)
            except BaseException:
                came.close()
                first.close()
                raise
            if answer is not None:
                return answer, first

    async def send_raw(self, data: bytes, fds: tuple[int, ...] = ()) -> None:
        """Sends any bytes and descriptors; the session knows nothing of it."""
        await self._channel.send(data, fds)

    async def receive_raw(self, count: int) -> tuple[bytes, Fds]:
        """Up to ``count`` bytes and what came with them; no bytes at the end of the stream."""
        return await self._channel.receive(count)

    async def get(self, code: FrontendRequest) -> int:
        """The u64 of a request that asks for one."""
        payload, _ = await self.request(code)
        assert isinstance(payload, U64)
        return payload.value

    # ---- whole procedures

    async def negotiate(self, features: int = ~0, protocol_features: int = ~0) -> None:
        """Takes what the back-end offers of ``features`` and ``protocol_features``, and becomes the owner."""
        offered = await self.get(FrontendRequest.GET_FEATURES)
        if offered & features & 1 << 30:
            extensions = await self.get(FrontendRequest.GET_PROTOCOL_FEATURES)
            await self.request(FrontendRequest.SET_PROTOCOL_FEATURES, U64(extensions & protocol_features))
        await self.request(FrontendRequest.SET_OWNER)
        await self.request(FrontendRequest.SET_FEATURES, U64(offered & features))

    async def set_memory(self, memory: SharedMemory) -> None:
        """Makes ``memory`` the whole of guest memory."""
        await self.request(FrontendRequest.SET_MEM_TABLE, memory.table(), memory.fds)

    async def start_ring(self, ring: FrontendRing, memory: SharedMemory, *, base: int = 0, enable: bool = True) -> None:
        """Sets the ring up, gives its eventfds and enables it; it starts at the first kick."""
        queue, index = ring.queue, ring.index
        user = memory.map.guest_to_host
        address = VringAddress(index, 0, user(queue.desc), user(queue.used), user(queue.avail), 0)
        await self.request(FrontendRequest.SET_VRING_NUM, VringState(index, queue.size))
        await self.request(FrontendRequest.SET_VRING_BASE, VringState(index, base))
        await self.request(FrontendRequest.SET_VRING_ADDR, address)
        await self.request(FrontendRequest.SET_VRING_ERR, VringFd(index), (ring.err_fd,))
        await self.request(FrontendRequest.SET_VRING_CALL, VringFd(index), (ring.call_fd,))
        await self.request(FrontendRequest.SET_VRING_KICK, VringFd(index), (ring.kick_fd,))
        if enable:
            await self.request(FrontendRequest.SET_VRING_ENABLE, VringState(index, 1))

    async def stop_ring(self, ring: FrontendRing) -> int:
        """Stops the ring; the base to start it with again."""
        payload, _ = await self.request(FrontendRequest.GET_VRING_BASE, VringState(ring.index))
        assert isinstance(payload, VringState)
        return payload.num
