"""What only some kinds of device do: notify pages, shared memory and objects, crypto sessions, a display.

What belongs here: messages behind features that few back-ends offer; without them these cases are skipped. What does
not: whether they are understood at all (``generic``).
"""

from __future__ import annotations

import asyncio
import mmap
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

from vhostuser.channel import Channel
from vhostuser.conformance.bench import Need
from vhostuser.conformance.lane import Lane
from vhostuser.conformance.peer import Kind, Peer
from vhostuser.conformance.suite import Skipped, Theme, check, equal
from vhostuser.protocol import (
    REPLY,
    SHMEM_REGIONS,
    U64,
    VERSION,
    BackendRequest,
    CryptoSession,
    Empty,
    FrontendRequest,
    Header,
    MemoryTable,
    ProtocolFeature,
    ShmemConfig,
    Uuid,
    VringArea,
)
from vhostuser.raw import RawMessage, receive_message

B, F, P = BackendRequest, FrontendRequest, ProtocolFeature
NOTIFIER: Theme[Peer] = Theme("notifier", B.VRING_HOST_NOTIFIER_MSG.clause)
SHMEM: Theme[Peer] = Theme("shmem", F.GET_SHMEM_CONFIG.clause)
OBJECTS: Theme[Peer] = Theme("objects", F.GET_SHARED_OBJECT.clause)
CRYPTO: Theme[Peer] = Theme("crypto", F.CREATE_CRYPTO_SESSION.clause)
GPU: Theme[Peer] = Theme("gpu", F.GPU_SET_SOCKET.clause)
GPA: Theme[Peer] = Theme("gpa", "A vring address description")

_PAGE = mmap.PAGESIZE
_UUID = Uuid(bytes(range(1, 17)))


# ---- notify pages


class _Ear:
    """Our end of the back-end's channel. Owns it."""

    def __init__(self, channel: Channel, peer: Peer) -> None:
        self._channel = channel
        self._peer = peer

    async def next(self, within: float) -> RawMessage | None:
        """The next message, with open descriptors; None if none comes."""
        try:
            async with asyncio.timeout(within):
                return await receive_message(self._channel)
        except TimeoutError:
            return None

    async def offered(self) -> RawMessage:
        """The message that offers a page. Raises Skipped."""
        message = await self.next(self._peer.patience)
        if message is None or message.header.request != B.VRING_HOST_NOTIFIER_MSG:
            raise Skipped("it offers no page for this ring")
        return message

    async def answer(self, message: RawMessage, value: int, *, code: int | None = None) -> None:
        """Answers, if it was asked."""
        message.fds.close()
        if message.header.need_reply:
            number = message.header.request if code is None else code
            await self._channel.send(Header(number, VERSION | REPLY, 8).pack() + U64(value).pack())


@asynccontextmanager
async def _listening(peer: Peer, *without: ProtocolFeature) -> AsyncIterator[tuple[_Ear, Lane]]:
    """A ring that runs, with a channel that nobody has answered on yet."""
    await peer.negotiate(without=without)
    await peer.share()
    lane = peer.make_lane()
    await lane.start()
    ours, theirs = socket.socketpair()
    with theirs:
        await peer.frontend.set_backend_req_fd(theirs.fileno())
    channel = Channel(ours)
    try:
        lane.ring.kick()
        yield _Ear(channel, peer), lane
    finally:
        channel.close()


_NOTIFIER = (P.HOST_NOTIFIER, P.BACKEND_REQ, P.BACKEND_SEND_FD, Need.RINGS)


@NOTIFIER.must("area", "A page of its own is offered for a ring: one descriptor, one page, at a page's beginning.",
               *_NOTIFIER)  # fmt: skip
async def _(peer: Peer) -> None:
    async with _listening(peer) as (ear, _):
        message = await ear.offered()
        try:
            area = VringArea.unpack(message.body)
            equal("index, size and offset", (area.index, area.size, area.offset % _PAGE), (peer.index, _PAGE, 0))
            mmap.mmap(message.fds[0], _PAGE, offset=area.offset).close()
        except (OSError, ValueError, IndexError) as error:
            check(False, "a page that can be mapped", str(error))
        finally:
            message.fds.close()


@NOTIFIER.must("refused", "A front-end that maps nothing is served by kicks.", *_NOTIFIER)
async def _(peer: Peer) -> None:
    async with _listening(peer) as (ear, lane):
        await ear.answer(await ear.offered(), 1)
        await lane.works()


@NOTIFIER.must("withheld", "A front-end that answers nothing while it waits in GET_VRING_BASE has its answer.",
               *_NOTIFIER, section=F.GET_VRING_BASE.clause)  # fmt: skip
async def _(peer: Peer) -> None:
    async with _listening(peer) as (ear, lane):
        (await ear.offered()).fds.close()
        await lane.works()
        await lane.stop()


@NOTIFIER.must("wrong-answer", "A wrong answer on the channel does the connection no harm.", *_NOTIFIER, P.REPLY_ACK)
async def _(peer: Peer) -> None:
    async with _listening(peer) as (ear, lane):
        await ear.answer(await ear.offered(), 0, code=99)
        await lane.works()
        await peer.answers()


@NOTIFIER.must("unasked", "No answer is asked for where REPLY_ACK was not negotiated.", *_NOTIFIER,
               section="VHOST_USER_PROTOCOL_F_REPLY_ACK")  # fmt: skip
async def _(peer: Peer) -> None:
    async with _listening(peer, P.REPLY_ACK) as (ear, _):
        message = await ear.offered()
        message.fds.close()
        check(not message.header.need_reply, "no need_reply", "it is set")


@NOTIFIER.must("ungated", "Nothing is offered where HOST_NOTIFIER was not negotiated.", *_NOTIFIER)
async def _(peer: Peer) -> None:
    async with _listening(peer, P.HOST_NOTIFIER) as (ear, lane):
        await lane.works()
        message = await ear.next(peer.quiet)
        if message is not None:
            message.fds.close()
        check(message is None, "silence", "a message")


@NOTIFIER.must("suspended", "When the last ring has stopped nothing is sent any more.", *_NOTIFIER,
               section="Suspended device state")  # fmt: skip
async def _(peer: Peer) -> None:
    async with _listening(peer) as (ear, lane):
        await ear.answer(await ear.offered(), 0)
        await lane.works()
        await lane.stop()
        while (message := await ear.next(0)) is not None:  # what was sent before the answer
            await ear.answer(message, 0)
        message = await ear.next(peer.quiet)
        check(message is None, "silence", "a message after the answer to GET_VRING_BASE")


# ---- shared memory


async def _shmem(peer: Peer) -> ShmemConfig:
    await peer.negotiate()
    return await _asked(peer)


async def _asked(peer: Peer) -> ShmemConfig:
    body = (await peer.accepts(F.GET_SHMEM_CONFIG)).body
    equal("bytes", len(body), 8 + 8 * SHMEM_REGIONS)
    return ShmemConfig.unpack(body)


@SHMEM.must("size", "The reply has room for 256 regions.", P.SHMEM)
async def _(peer: Peer) -> None:
    await _shmem(peer)


@SHMEM.must("count", "As many regions have a size as are told.", P.SHMEM)
async def _(peer: Peer) -> None:
    told = await _shmem(peer)
    equal("regions with a size", sum(map(bool, told.memory_sizes)), told.num_regions)


@SHMEM.must("pages", "Regions are whole pages.", P.SHMEM)
async def _(peer: Peer) -> None:
    odd = [size for size in (await _shmem(peer)).memory_sizes if size % _PAGE]
    check(not odd, f"multiples of {_PAGE}", f"{odd[:1]}")


@SHMEM.must("same", "The same question has the same answer.", P.SHMEM)
async def _(peer: Peer) -> None:
    before = await _shmem(peer)
    equal("the regions", await _asked(peer), before)


# ---- shared objects


@OBJECTS.must("unknown", "What is not exported is answered without a descriptor.", P.SHARED_OBJECT)
async def _(peer: Peer) -> None:
    await peer.negotiate()
    equal("descriptors", (await peer.react(F.GET_SHARED_OBJECT, _UUID)).fds, 0)


@OBJECTS.should("no-uuid", "A request without a UUID, as QEMU sends it, does not cost the connection.", P.SHARED_OBJECT)
async def _(peer: Peer) -> None:
    await peer.negotiate()
    reaction = await peer.react(F.GET_SHARED_OBJECT, Empty())
    check(reaction.kind is Kind.REFUSED, "an answer without a descriptor", str(reaction))


# ---- crypto sessions


async def _session(peer: Peer) -> int:
    """The id of a new session. Raises Skipped: what is in its description is in no specification."""
    asked = CryptoSession(0, bytes(1024))
    reaction = await peer.react(F.CREATE_CRYPTO_SESSION, asked)
    if reaction.kind is Kind.CLOSED:
        raise Skipped("it does not know the description of a session that QEMU sends")
    equal("bytes of the reply", len(reaction.body), len(asked.pack()))
    session_id = CryptoSession.unpack(reaction.body).session_id
    if session_id < 0:
        raise Skipped("it opens no session that this suite can describe")
    return session_id


@CRYPTO.must("size", "The reply has the size of the request.", P.CRYPTO_SESSION)
async def _(peer: Peer) -> None:
    await peer.negotiate()
    await _session(peer)


@CRYPTO.must("ids", "Two open sessions have two ids.", P.CRYPTO_SESSION)
async def _(peer: Peer) -> None:
    await peer.negotiate()
    first, second = await _session(peer), await _session(peer)
    check(first != second, "two ids", f"twice {first}")


@CRYPTO.must("close", "A session that is open is closed.", P.CRYPTO_SESSION, P.REPLY_ACK)
async def _(peer: Peer) -> None:
    await peer.negotiate()
    await peer.accepts(F.CLOSE_CRYPTO_SESSION, U64(await _session(peer)))


@CRYPTO.should("closed", "A session that is not open is not closed.", P.CRYPTO_SESSION, P.REPLY_ACK)
async def _(peer: Peer) -> None:
    await peer.negotiate()
    session_id = await _session(peer)
    await peer.accepts(F.CLOSE_CRYPTO_SESSION, U64(session_id))
    await peer.refuses(F.CLOSE_CRYPTO_SESSION, U64(session_id))


# ---- a display


@GPU.should("no-socket", "What is no socket is refused.", P.REPLY_ACK)
async def _(peer: Peer) -> None:
    await peer.negotiate()
    read, _ = peer.pipe()
    await peer.refuses(F.GPU_SET_SOCKET, fds=(read,))


# ---- addresses


@GPA.must("rings", "Where GPA_ADDRESSES was negotiated, rings are found by guest addresses.", P.GPA_ADDRESSES,
          Need.RINGS)  # fmt: skip
async def _(peer: Peer) -> None:
    await peer.negotiate(also=(P.GPA_ADDRESSES,))
    await peer.share(peer.make_memory((1 << 32, 1 << 20), (0, 8 << 20)))
    lane = peer.make_lane()
    await lane.start()
    await lane.works()


@GPA.must("users", "User addresses of memory mean nothing then.", P.GPA_ADDRESSES, Need.RINGS)
async def _(peer: Peer) -> None:
    await peer.negotiate(also=(P.GPA_ADDRESSES,))
    memory = peer.make_memory((1 << 32, 1 << 20), (0, 8 << 20))
    regions = tuple(replace(region, user=0) for region in memory.table().regions)
    await peer.frontend.request(F.SET_MEM_TABLE, MemoryTable(regions), memory.fds)
    peer.adopt(memory)
    lane = peer.make_lane()
    await lane.start()
    await lane.works()
