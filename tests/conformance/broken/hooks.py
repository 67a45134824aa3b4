"""What only some kinds of device do, on a disk that does it all."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from tests.conformance.broken.everything import Everything, offer_everything
from tests.conformance.broken.registry import F, answering, crash, fault, handling
from vhostuser import hook_requests
from vhostuser.backend_channel import BackendChannel
from vhostuser.connection import Connection
from vhostuser.hook_requests import HookRequests
from vhostuser.hooks import NotifierArea
from vhostuser.protocol import (
    HEADER_SIZE,
    NEED_REPLY,
    BackendRequest,
    Empty,
    Header,
    MemoryTable,
    Outgoing,
    ProtocolFeature,
    Reply,
    Request,
    RequestRefused,
    ShmemConfig,
    VringArea,
)
from vhostuser.protocol.exchange import Client

B, P = BackendRequest, ProtocolFeature


# ---- notify pages


@fault("notifier.area")
def offers_two_pages() -> None:
    right = Everything.host_notifier

    def two(device: Everything, index: int) -> NotifierArea | None:
        area = right(device, index)
        return area and area._replace(size=2 * area.size)

    Everything.host_notifier = two  # type: ignore[method-assign]
    offer_everything()


@fault("notifier.refused")
def insists_on_its_page() -> None:
    def unheard(_: HookRequests, __: VringArea, refusal: BaseException | None) -> None:
        if "refused" in str(refusal):
            crash()

    HookRequests._unheard = unheard  # type: ignore[method-assign]
    offer_everything()


@fault("notifier.withheld")
def waits_for_its_page() -> None:
    answers: list[asyncio.Future[Any]] = []
    right = BackendChannel.request

    def request(channel: BackendChannel, *what: Any) -> asyncio.Future[Any]:
        answers.append(right(channel, *what))
        return answers[-1]

    async def stop(connection: Connection, request: Request, stop: Any) -> Any:
        await asyncio.wait(answers)
        return await stop(connection, request)

    BackendChannel.request = request  # type: ignore[method-assign,assignment]
    offer_everything()
    handling(F.GET_VRING_BASE, stop)


@fault("notifier.wrong-answer")
def dies_of_a_wrong_answer() -> None:
    def fail(_: BackendChannel, reason: str) -> None:
        if "reply to request" in reason:
            crash()

    BackendChannel._fail = fail  # type: ignore[method-assign]
    offer_everything()


@fault("notifier.unasked")
def always_asks_for_an_answer() -> None:
    right = Client.request

    def request(client: Client, code: Any, *what: Any, **more: Any) -> Outgoing:
        data, fds = right(client, code, *what, **more)
        if code is B.VRING_HOST_NOTIFIER_MSG:
            header = Header.unpack(data[:HEADER_SIZE])
            data = Header(header.request, header.flags | NEED_REPLY, header.size).pack() + data[HEADER_SIZE:]
        return Outgoing(data, fds)

    Client.request = request  # type: ignore[method-assign,assignment]
    offer_everything()


def _say(connection: Connection) -> None:
    """A message on the channel whatever was negotiated."""
    if connection._announcements.channel is not None:
        body = VringArea(0, 0, 0, has_fd=False).pack()
        with contextlib.suppress(OSError):
            sock = connection._announcements.channel._channel._sock
            sock.send(Header(B.VRING_HOST_NOTIFIER_MSG, 1, len(body)).pack() + body)


@fault("notifier.ungated")
def offers_pages_to_everybody() -> None:
    right = Connection._kicked

    def kicked(connection: Connection, ring: Any) -> None:
        right(connection, ring)
        if not connection._session.has(P.HOST_NOTIFIER):
            _say(connection)

    Connection._kicked = kicked  # type: ignore[method-assign]
    offer_everything()


@fault("notifier.suspended")
def takes_its_page_back_too_late() -> None:
    async def stop(connection: Connection, request: Request, stop: Any) -> Any:
        reply = await stop(connection, request)
        asyncio.get_running_loop().call_later(0.02, _say, connection)
        return reply

    offer_everything()
    handling(F.GET_VRING_BASE, stop)


# ---- shared memory


def _shorter(code: F) -> None:
    """Has the answer to this request be four bytes shorter."""

    def change(_: Any, request: Any, right: Outgoing | None) -> Outgoing | None:
        if request.code is not code or right is None:
            return right
        header = Header.unpack(right.data[:HEADER_SIZE])
        return Outgoing(Header(code, header.flags, header.size - 4).pack() + right.data[HEADER_SIZE:-4], right.fds)

    answering(change)
    offer_everything()


@fault("shmem.size", "shmem.count", "shmem.pages", "shmem.same")
def has_room_for_fewer_regions() -> None:
    _shorter(F.GET_SHMEM_CONFIG)


def _configured(change: Callable[[ShmemConfig], ShmemConfig]) -> None:
    right = hook_requests.shmem_config
    hook_requests.shmem_config = lambda sizes: change(right(sizes))
    offer_everything()


@fault("shmem.count")
def miscounts_its_regions() -> None:
    _configured(lambda config: replace(config, num_regions=2))


@fault("shmem.pages")
def has_half_a_page() -> None:
    _configured(lambda config: replace(config, memory_sizes=(0, 2048, *config.memory_sizes[2:])))


@fault("shmem.same")
def grows() -> None:
    asked: list[None] = []

    def larger(config: ShmemConfig) -> ShmemConfig:
        asked.append(None)
        return replace(config, memory_sizes=(0, len(asked) << 20, *config.memory_sizes[2:]))

    _configured(larger)


# ---- shared objects


@fault("objects.unknown")
def finds_any_object() -> None:
    async def find(_: Connection, __: Request, ___: Any) -> Reply:
        return Reply(Empty(), fds=(os.memfd_create("object", os.MFD_CLOEXEC),))

    offer_everything()
    handling(F.GET_SHARED_OBJECT, find)


@fault("objects.no-uuid")
def wants_a_uuid() -> None:
    async def find(connection: Connection, request: Request, right: Any) -> Any:
        if isinstance(request.payload, Empty):
            raise ConnectionAbortedError
        return await right(connection, request)

    offer_everything()
    handling(F.GET_SHARED_OBJECT, find)


# ---- crypto sessions, a display


@fault("crypto.size", "crypto.ids", "crypto.close", "crypto.closed")
def answers_a_part_of_the_session() -> None:
    _shorter(F.CREATE_CRYPTO_SESSION)


@fault("crypto.ids")
def has_one_session() -> None:
    Everything.create_crypto_session = lambda *_: 1  # type: ignore[method-assign]
    offer_everything()


@fault("crypto.close", "crypto.closed")
def closes_no_session() -> None:
    async def close(_: Connection, __: Request, ___: Any) -> None:
        raise RequestRefused("it is in use")

    offer_everything()
    handling(F.CLOSE_CRYPTO_SESSION, close)


@fault("crypto.closed")
def closes_any_session() -> None:
    async def close(_: Connection, __: Request, ___: Any) -> None:
        return None

    offer_everything()
    handling(F.CLOSE_CRYPTO_SESSION, close)


@fault("gpu.no-socket")
def shows_its_pictures_to_anything() -> None:
    async def show(_: Connection, __: Request, ___: Any) -> None:
        return None

    handling(F.GPU_SET_SOCKET, show)


# ---- addresses


@fault("gpa.rings", "gpa.users")
def knows_user_addresses_only() -> None:
    Connection._named = lambda _, region: region  # type: ignore[method-assign]
    offer_everything()


@fault("gpa.users")
def looks_at_user_addresses() -> None:
    async def share(connection: Connection, request: Request, right: Any) -> Any:
        assert isinstance(request.payload, MemoryTable)
        users = [region.user for region in request.payload.regions]
        if len(set(users)) < len(users):
            raise RequestRefused("two regions overlap")
        return await right(connection, request)

    offer_everything()
    handling(F.SET_MEM_TABLE, share)
