"""Rings behind an IOMMU."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

from tests.conformance.broken.registry import F, answering, fault, handling
from vhostuser.connection import Connection
from vhostuser.iommu_requests import IommuRequests
from vhostuser.iotlb import DeviceIotlb
from vhostuser.lifecycle import Lifecycle
from vhostuser.protocol import REPLY, U64, VERSION, BackendSession, Header, Outgoing, QueueBroken, Reply, RequestRefused
from vhostuser.virtqueue import RingSetup

_PAGE = 4096


def _updating(change: Any) -> None:
    """Has updates done in another way: by the table, what is right, and what the message says."""
    right = DeviceIotlb.update

    def update(iotlb: DeviceIotlb, memory: Any, iova: int, size: int, user: int, access: int) -> None:
        change(iotlb, right, memory, iova, size, user, access)

    DeviceIotlb.update = update  # type: ignore[method-assign]


@fault("iommu.forgotten", "iommu.moved", "iommu.ring", "iommu.waits")
def keeps_what_was_invalidated() -> None:
    DeviceIotlb.invalidate = lambda iotlb, iova, size: None  # type: ignore[method-assign]


@fault("iommu.works", "iommu.data", "iommu.flood", "iommu.log")
def asks_for_no_translation() -> None:
    IommuRequests._ask = lambda requests, iotlb: iotlb.take() and None  # type: ignore[method-assign]


@fault("iommu.miss")
def asks_for_no_access() -> None:
    right = DeviceIotlb.take
    DeviceIotlb.take = lambda iotlb: [asked._replace(access=0) for asked in right(iotlb)]  # type: ignore[method-assign]


@fault("iommu.told-early")
def forgets_what_it_did_not_ask_for() -> None:
    right, asked = DeviceIotlb.take, set[int]()

    def take(iotlb: DeviceIotlb) -> Any:
        taken = right(iotlb)
        asked.update(question.iova // _PAGE for question in taken)
        return taken

    def update(iotlb: DeviceIotlb, right: Any, memory: Any, iova: int, *rest: int) -> None:
        if iova // _PAGE in asked:
            right(iotlb, memory, iova, *rest)

    DeviceIotlb.take = take  # type: ignore[method-assign]
    _updating(update)


@fault("iommu.update-reply", "iommu.invalidate-reply", "iommu.invalidate-all")
def says_no_to_what_it_has_done() -> None:
    async def change(connection: Connection, request: Any, right: Any) -> Reply:
        await right(connection, request)
        return Reply(U64(1))

    handling(F.IOTLB_MSG, change)


@fault("iommu.update-again")
def takes_an_update_once() -> None:
    def update(iotlb: DeviceIotlb, right: Any, memory: Any, iova: int, *rest: int) -> None:
        if iotlb.look(iova):
            raise RequestRefused("that is known")
        right(iotlb, memory, iova, *rest)

    _updating(update)


@fault("iommu.stops")
def waits_for_translations_to_stop() -> None:
    async def change(connection: Connection, request: Any, right: Any) -> Any:
        if connection._life.iotlb is not None and not len(connection._life.iotlb):
            await asyncio.sleep(3600)
        return await right(connection, request)

    handling(F.GET_VRING_BASE, change)


@fault("iommu.flood")
def has_room_for_few_translations() -> None:
    def update(iotlb: DeviceIotlb, right: Any, *message: Any) -> None:
        if len(iotlb) > 100:
            raise RequestRefused("there is no room")
        right(iotlb, *message)

    _updating(update)


@fault("iommu.invalidate-all", "iommu.invalidate-reply")
def refuses_to_forget_what_it_does_not_know() -> None:
    right = DeviceIotlb.invalidate

    def invalidate(iotlb: DeviceIotlb, iova: int, size: int) -> None:
        if size > 1 << 62 or not iotlb.look(iova):
            raise RequestRefused("that is not known")
        right(iotlb, iova, size)

    DeviceIotlb.invalidate = invalidate  # type: ignore[method-assign]


@fault("iommu.in-use", "iommu.ring")
def gives_up_rings_whose_translations_go() -> None:
    right = IommuRequests._invalidate

    async def invalidate(requests: IommuRequests, iotlb: DeviceIotlb, iova: int, size: int) -> None:
        users = [ring for ring in requests._life.rings if ring.uses(iova, size)]
        await right(requests, iotlb, iova, size)
        for ring in users:
            ring.broken = QueueBroken(ring.index, -1, 0)

    IommuRequests._invalidate = invalidate  # type: ignore[method-assign]


@fault("iommu.restart")
def loses_its_iommu_with_its_ring() -> None:
    lost = []

    def forget(life: Lifecycle) -> None:
        if life.iotlb is not None and not any(ring.running for ring in life.rings):
            lost.append(life.iotlb)
            life.iotlb = None

    Lifecycle.forget_translations = forget  # type: ignore[method-assign]


@fault("iommu.read-only")
def writes_what_may_only_be_read() -> None:
    _updating(lambda iotlb, right, *message: right(iotlb, *message[:-1], 3))


@fault(
    *(f"iommu.refused-{name}" for name in ("size", "wrap", "outside", "across", "no-access", "bad-access", "other")),
)
def takes_any_update() -> None:
    def update(iotlb: DeviceIotlb, right: Any, *message: Any) -> None:
        with contextlib.suppress(RequestRefused):
            right(iotlb, *message)

    _updating(update)


@fault("iommu.refused-miss", "iommu.refused-failure")
def takes_its_own_messages() -> None:
    def change(session: BackendSession, request: Any, outgoing: Outgoing | None) -> Outgoing | None:
        if request.code is not F.IOTLB_MSG:
            return outgoing
        body = U64(0).pack()
        return Outgoing(Header(F.IOTLB_MSG, VERSION | REPLY, len(body)).pack() + body, ())

    answering(change)


@fault("iommu.log")
def logs_nothing_behind_an_iommu() -> None:
    right = RingSetup.open

    def opened(setup: RingSetup, memory: Any, *, log: Any = None, inflight: Any = None, iotlb: Any = None) -> Any:
        return right(setup, memory, log=None if iotlb else log, inflight=inflight, iotlb=iotlb)

    RingSetup.open = opened  # type: ignore[method-assign]
