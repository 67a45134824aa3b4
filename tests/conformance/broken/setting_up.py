"""The order in which a ring is set up, and what of it a back-end keeps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tests.conformance.broken.registry import crash, fault, handling
from tests.conformance.broken.ring_states import changing
from tests.conformance.plain import Queue, override
from tests.conformance.plain.ring import Bad
from vhostuser._native import lib
from vhostuser.connection import Connection
from vhostuser.lifecycle import Lifecycle
from vhostuser.memory import GuestMemory
from vhostuser.protocol import FrontendRequest, RequestRefused
from vhostuser.protocol.state import State
from vhostuser.ring import Ring

F = FrontendRequest


# ---- features


@fault("setup.without-bit-30")
def enables_nothing_without_being_told() -> None:
    def change(state: State, code: Any, payload: Any, right: Callable[[], None]) -> None:
        if code is F.SET_FEATURES:
            state.features = payload.value
        else:
            right()

    changing(change)


@fault("setup.without-protocol-features")
def enables_nothing_without_protocol_features() -> None:
    def change(state: State, code: Any, payload: Any, right: Callable[[], None]) -> None:
        if code is not F.SET_VRING_ENABLE or state.protocol_features:
            right()

    changing(change)


# ---- the order


def _wants(condition: Callable[[Ring], bool]) -> None:
    """A ring runs only if this holds too."""
    right = Lifecycle._wanted
    Lifecycle._wanted = lambda life, ring: right(life, ring) and condition(ring)  # type: ignore[method-assign]


def _told(code: F) -> set[tuple[Connection, int]]:
    """The rings that were told this."""
    told: set[tuple[Connection, int]] = set()

    async def change(connection: Connection, request: Any, right: Any) -> Any:
        told.add((connection, request.payload.index))
        return await right(connection, request)

    handling(code, change)
    return told


def _refuses(code: F, condition: Callable[[Ring], bool]) -> None:
    async def change(connection: Connection, request: Any, right: Any) -> Any:
        if condition(connection.rings[request.payload.index]):
            raise RequestRefused("this comes too early")
        return await right(connection, request)

    handling(code, change)


@fault("setup.nbakce", "setup.nakce", "setup.banke")
def wants_the_call_before_the_kick() -> None:
    _refuses(F.SET_VRING_KICK, lambda ring: ring._call < 0)


@fault("setup.nbake")
def wants_a_call() -> None:
    _wants(lambda ring: ring._call >= 0)


@fault("setup.nbacke", "setup.nbakce", "setup.ecnbak")
def wants_an_err_descriptor() -> None:
    _wants(lambda ring: ring._err >= 0)


@fault("setup.nakce")
def wants_a_base() -> None:
    told = _told(F.SET_VRING_BASE)

    async def change(connection: Connection, request: Any, right: Any) -> Any:
        if (connection, request.payload.index) not in told:
            raise RequestRefused("there is no base yet")
        return await right(connection, request)

    handling(F.SET_VRING_KICK, change)


@fault("setup.banke")
def wants_the_size_before_the_addresses() -> None:
    _refuses(F.SET_VRING_ADDR, lambda ring: not ring.size)


@fault("setup.kecnba")
def wants_the_size_before_the_kick() -> None:
    _refuses(F.SET_VRING_KICK, lambda ring: not ring.size)


def _dies(condition: Callable[[Ring], bool]) -> None:
    """A disk that does not look whether it was told before it starts a ring."""
    right = Lifecycle.kicked

    def kicked(life: Lifecycle, ring: Ring) -> None:
        if condition(ring):
            crash()
        right(life, ring)

    Lifecycle.kicked = kicked  # type: ignore[method-assign]


@fault("setup.no-addresses")
def dies_without_addresses() -> None:
    _dies(lambda ring: ring.address is None)


@fault("setup.no-size")
def dies_without_a_size() -> None:
    _dies(lambda ring: not ring.size)


# ---- a ring that was set up before


@fault("setup.moved")
def keeps_the_first_addresses() -> None:
    async def change(connection: Connection, request: Any, right: Any) -> Any:
        if connection.rings[request.payload.index].address is None:
            await right(connection, request)

    handling(F.SET_VRING_ADDR, change)


@fault("setup.resized")
def keeps_the_first_size() -> None:
    async def change(connection: Connection, request: Any, right: Any) -> Any:
        if not connection.rings[request.payload.index].size:
            await right(connection, request)

    handling(F.SET_VRING_NUM, change)


@fault("setup.reset-by-driver")
def remembers_the_used_index() -> None:
    remembered: dict[tuple[GuestMemory, int], int] = {}
    start, close = Queue.start, Queue.close

    def started(queue: Queue) -> None:
        start(queue)
        queue.used = queue.signalled = remembered.get((queue.memory, queue.index), queue.used)

    def closed(queue: Queue) -> None:
        if queue.started:
            remembered[queue.memory, queue.index] = queue.used
        close(queue)

    override(Queue, start=started, close=closed)


@fault("setup.two-rings")
def stops_all_rings_with_one() -> None:
    async def change(connection: Connection, request: Any, right: Any) -> Any:
        for ring in connection.rings:
            connection._session.rings[ring.index].started = False
            async with connection._life.halted(ring):
                ring.drop_kick()
        return await right(connection, request)

    handling(F.GET_VRING_BASE, change)


# ---- where it lies


def _judges(judge: Callable[[Queue, int, int, int], tuple[int, int]]) -> None:
    """Places a part of the ring by what this makes of its user address, length and alignment."""
    right = Queue.part

    def part(queue: Queue, user: int, length: int, alignment: int) -> int:
        return right(queue, *judge(queue, user, length, alignment), 1)

    override(Queue, part=part)


@fault("setup.least-alignment")
def wants_tables_at_whole_cache_lines() -> None:
    def judge(_: Queue, user: int, length: int, alignment: int) -> tuple[int, int]:
        if user % (64 if alignment == 16 else alignment):
            raise Bad(lib.VU_E_ALIGN)
        return user, length

    _judges(judge)


@fault("setup.at-the-end")
def wants_room_for_an_entry_more() -> None:
    _judges(lambda queue, user, length, alignment: (user, length + 8))


@fault("setup.apart")
def looks_for_the_whole_ring_in_one_region() -> None:
    def place(queue: Queue) -> None:
        right(queue)
        regions = queue.memory.regions
        setup = queue.setup
        (home,) = (region for region in regions if region.user <= setup.desc < region.user + region.size)
        if not all(home.user <= part < home.user + home.size for part in (setup.avail, setup.used)):
            raise Bad(lib.VU_E_RANGE)

    right = Queue.place
    override(Queue, place=place)


@fault("address.user")
def takes_memory_for_one_piece_from_guest_address_0_on() -> None:
    right = Queue.part

    def part(queue: Queue, user: int, length: int, alignment: int) -> int:
        return right(queue, user, length, alignment) - queue.memory.regions[0].guest

    override(Queue, part=part)


@fault("memory.after-rings")
def wants_memory_before_rings() -> None:
    async def change(connection: Connection, request: Any, right: Any) -> Any:
        if not connection.memory:
            raise RequestRefused("there is no memory yet")
        return await right(connection, request)

    handling(F.SET_VRING_NUM, change)
