"""Front-ends with one fault each, for the suite to find.

What belongs here: the faults. Each is the front-end of ``frontends`` with one thing changed, and right in everything
else; it says which cases must fail.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from tests.conformance.frontends import MIB, RINGS, SIZE, STEPS, Crash, Life, Talk
from tests.protocol.samples import SAMPLES
from vhostuser.channel import Fds
from vhostuser.conformance.frontend_cases import CASES
from vhostuser.conformance.frontend_cases.answers import WRONG
from vhostuser.frontend import FrontendRing, ReplyTimeout
from vhostuser.protocol import (
    FRONTEND,
    HEADER_SIZE,
    NEED_REPLY,
    REPLY,
    U64,
    VERSION,
    Config,
    DeviceStatus,
    Empty,
    FrontendRequest,
    Header,
    Inflight,
    Log,
    MemoryRegion,
    MemoryTable,
    Payload,
    ProtocolFeature,
    RemoteProtocolError,
    RequestRefused,
    SingleRegion,
    VhostUserError,
    VirtioFeature,
    VringAddress,
    VringFd,
    VringState,
)
from vhostuser.raw import receive_message

F, P, V = FrontendRequest, ProtocolFeature, VirtioFeature


class Fault(NamedTuple):
    """A front-end with a fault, and the cases that must fail. patience: seconds to wait for what it must do."""

    make: Callable[[Path], Life]
    fails: tuple[str, ...]
    patience: float = 5.0


FAULTS: dict[str, Fault] = {}


def fault(*fails: str, name: str = "") -> Callable[[type[Life]], type[Life]]:
    """Declares the class under it as a fault of its name."""

    def add(kind: type[Life]) -> type[Life]:
        FAULTS[name or kind.__name__] = Fault(kind, fails)
        return kind

    return add


def without(*steps: str) -> tuple[str, ...]:
    """A session that leaves steps out."""
    return tuple(step for step in STEPS if step not in steps)


def moved(step: str, after: str) -> tuple[str, ...]:
    """A session with one step in another place."""
    steps = list(without(step))
    steps.insert(steps.index(after) + 1, step)
    return tuple(steps)


def spelt(code: F) -> str:
    return code.name.lower().replace("_", "-")


IDS = {case.id for case in CASES}
TOP = STEPS[-1]


# ---- more is said than should be


Say = Callable[[Life], Awaitable[None]]


def saying(step: str, say: Say, *fails: str, name: str, first: bool = False) -> None:
    """A fault that does something behind a step, or (``first``) before it."""

    async def told(life: Life) -> None:
        if first:
            await say(life)
        await getattr(super(kind, life), step)()
        if not first:
            await say(life)

    kind = type(name, (Life,), {step: told})
    FAULTS[name] = Fault(kind, fails)


Maker = Callable[[], int]
"""Makes a descriptor."""


def raw(code: int, payload: Payload | bytes = b"", *, fds: Maker | None = None, flags: int = VERSION) -> Say:
    """Says one message, whatever it is."""

    async def say(life: Life) -> None:
        made = [fds()] if fds is not None else []
        try:
            await life.talk.raw(code, payload, *made, flags=flags)
        finally:
            for fd in made:
                os.close(fd)

    return say


def eventfd() -> int:
    return os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)


def file(size: int = MIB) -> int:
    fd = os.memfd_create("fault", os.MFD_CLOEXEC)
    os.truncate(fd, size)
    return fd


def only(holds: Callable[[Life], bool], say: Say) -> Say:
    """Says it where that holds."""

    async def maybe(life: Life) -> None:
        if holds(life):
            await say(life)

    return maybe


def tables(life: Life) -> bool:
    return not life.has(P.CONFIGURE_MEM_SLOTS)


class Echo(Life):
    """Sends each message of some codes a second time, changed."""

    codes: Sequence[F]
    change: Callable[[Header, bytes, Sequence[int]], tuple[Header, bytes, Sequence[int]]]

    async def after(self, talk: Talk, code: F, payload: Payload | None, fds: Sequence[int]) -> None:
        if code not in self.codes:
            return
        body = (payload or Empty()).pack()
        header, body, fds = type(self).change(Header(code, VERSION, len(body)), body, fds)
        await talk.raw(code, body, *fds, flags=header.flags)


def echo(codes: Sequence[F], change: Callable[[Header, bytes, Sequence[int]], Any], *fails: str, name: str) -> None:
    FAULTS[name] = Fault(type(name, (Echo,), {"codes": codes, "change": staticmethod(change)}), fails)


def longer(header: Header, body: bytes, fds: Sequence[int]) -> tuple[Header, bytes, Sequence[int]]:
    return header, body + bytes(4), fds


def bare(header: Header, body: bytes, _: Sequence[int]) -> tuple[Header, bytes, Sequence[int]]:
    return header, body, ()


def with_file(header: Header, body: bytes, _: Sequence[int]) -> tuple[Header, bytes, Sequence[int]]:
    return header, body, (2,)


def about(theme: str) -> list[F]:
    """Messages for which the theme has a case each."""
    return [code for code in F if f"{theme}.{spelt(code)}" in IDS]


def named(theme: str, codes: Sequence[F]) -> tuple[str, ...]:
    return tuple(f"{theme}.{spelt(code)}" for code in codes)


_ASKS = [code for code in about("size") if FRONTEND[code].reply]
_OF_RINGS = [code for code in about("size") if "VRING" in code.name and code not in _ASKS]
_OTHERS = [code for code in about("size") if code not in (*_ASKS, *_OF_RINGS)]
for _codes, _name in ((_ASKS, "questions"), (_OF_RINGS, "rings"), (_OTHERS, "others")):
    echo(_codes, longer, *named("size", _codes), name=f"longer_{_name}")

_WITH = [code for code in about("fds") if code is not F.REM_MEM_REG]
echo(_WITH, bare, *named("fds", _WITH), name="forgets_descriptors")
echo([F.REM_MEM_REG], with_file, "fds.rem-mem-reg", name="removes_with_a_file")


def ungated(codes: Sequence[F]) -> Say:
    """Says messages whose features were not offered."""

    async def say(life: Life) -> None:
        session = life.talk.session
        for code in codes:
            (feature, *_) = FRONTEND[code].gate.features
            offered = session.protocol_features_offered if isinstance(feature, P) else session.features_offered
            if not offered & feature.mask:
                fds = [2] * FRONTEND[code].fds[0]
                await life.talk.raw(code, SAMPLES[FRONTEND[code].request[0]], *fds)

    return say


saying(TOP, ungated(about("gate")[:8]), *named("gate", about("gate")[:8]), name="heeds_no_feature")
saying(TOP, ungated(about("gate")[8:]), *named("gate", about("gate")[8:]), name="heeds_no_later_feature")

echo([F.SET_VRING_NUM], with_file, "fds.none", name="descriptor_with_a_number")
saying(TOP, raw(F.SEND_RARP, U64(1)), "gate.others", name="announces_itself_unasked")


def _flags(flags: int) -> Callable[[Header, bytes, Sequence[int]], Any]:
    return lambda header, body, fds: (header._replace(flags=flags), body, fds)


echo([F.GET_QUEUE_NUM], _flags(2), "frame.version", name="version_2")
echo([F.GET_QUEUE_NUM], _flags(VERSION | REPLY), "frame.no-reply-flag", name="asks_with_the_flag_of_a_reply")
echo([F.GET_QUEUE_NUM], _flags(VERSION | 0x20), "frame.reserved-flags", name="reserved_flag")
echo([F.GET_QUEUE_NUM], _flags(VERSION | NEED_REPLY), "reply-ack.own-reply", name="asks_for_two_answers")
saying(TOP, raw(99), "frame.known", name="request_of_its_own")
saying(TOP, only(lambda life: not life.has(P.REPLY_ACK), raw(F.SET_VRING_CALL, VringFd(0, has_fd=False),
       flags=VERSION | NEED_REPLY)), "reply-ack.negotiated", name="asks_without_REPLY_ACK")  # fmt: skip


# ---- owner and features


@fault("owner.announced", "owner.before-memory", "owner.before-rings")
class NobodyOwnsIt(Life):
    steps = without("owner")


saying("owner", raw(F.SET_OWNER), "owner.once", name="owner_twice")
saying(TOP, raw(F.RESET_OWNER), "owner.no-reset", name="resets_the_owner")
saying(
    "features", raw(F.SET_FEATURES, U64(1 << V.VERSION_1)), "features.asked-first", name="features_unasked", first=True
)


class Mutant(Life):
    """Says another number than it should in each message of one code."""

    code: F
    number: Callable[[int], int]

    def outgoing(self, data: bytes, fds: Sequence[int]) -> list[tuple[bytes, Sequence[int]]]:
        if Header.unpack(data[:HEADER_SIZE]).request != self.code:
            return [(data, fds)]
        value = type(self).number(int.from_bytes(data[HEADER_SIZE : HEADER_SIZE + 8], "little"))
        return [(data[:HEADER_SIZE] + value.to_bytes(8, "little") + data[HEADER_SIZE + 8 :], fds)]


def mutant(code: F, number: Callable[[int], int], *fails: str, name: str) -> None:
    FAULTS[name] = Fault(type(name, (Mutant,), {"code": code, "number": staticmethod(number)}), fails)


mutant(F.SET_FEATURES, lambda value: value | 1 << 41, "features.offered", name="feature_never_offered")
mutant(F.SET_FEATURES, lambda value: value & ~V.PROTOCOL_FEATURES.mask, "features.before-enable", "features.bit-30",
       name="forgets_bit_30")  # fmt: skip
mutant(F.SET_PROTOCOL_FEATURES, lambda value: value | P.SHARED_OBJECT.mask, "protocol-features.offered",
       name="protocol_feature_never_offered")  # fmt: skip
mutant(F.GET_VRING_BASE, lambda value: value | 1 << 32, "ring.stop-reserved", name="stops_with_a_number")


@fault("features.before-rings")
class FeaturesAfterRings(Life):
    steps = moved("set_features", "set_up")


saying(TOP, raw(F.SET_FEATURES, U64(V.PROTOCOL_FEATURES.mask | V.VERSION_1.mask)), "features.kept-while-running",
       name="features_change")  # fmt: skip
saying(
    "features", raw(F.GET_PROTOCOL_FEATURES), "protocol-features.bit-30", name="protocol_features_at_once", first=True
)
saying("protocol_features", only(lambda life: bool(life.offered & V.PROTOCOL_FEATURES.mask),
       raw(F.SET_PROTOCOL_FEATURES, U64(1))), "protocol-features.asked-first", name="protocol_features_unasked",
       first=True)  # fmt: skip
saying("features", raw(F.SET_VRING_CALL, VringFd(0, has_fd=False)), "protocol-features.before-use", name="calls_early")
saying(TOP, only(lambda life: life.has(P.LOG_SHMFD), raw(F.SET_PROTOCOL_FEATURES, U64(0))), "protocol-features.fixed",
       name="protocol_features_change")  # fmt: skip


@fault("protocol-features.queues-asked")
class QueuesUnasked(Life):
    steps = without("queues")


# ---- memory


def table(*regions: MemoryRegion, kind: Callable[[], int] = file) -> Say:
    """Says a table, where tables are said, before the right one."""

    async def say(life: Life) -> None:
        made = [kind() for _ in regions]
        await life.talk.raw(F.SET_MEM_TABLE, MemoryTable(regions), *made)
        for fd in made:
            os.close(fd)

    return only(tables, say)


def bad_table(name: str, *regions: MemoryRegion, kind: Callable[[], int] = file, fails: str) -> None:
    saying("share", table(*regions, kind=kind), fails, name=name, first=True)


_GOOD = MemoryRegion(0, MIB, 16 * MIB, 0)
bad_table("regions_overlap", _GOOD, replace(_GOOD, guest=4096, user=32 * MIB), fails="memory.guest-disjoint")
bad_table("addresses_overlap", _GOOD, replace(_GOOD, guest=4 * MIB), fails="memory.user-disjoint")
bad_table("region_of_nothing", replace(_GOOD, size=0), fails="memory.not-empty")
bad_table("region_wraps", replace(_GOOD, guest=(1 << 64) - 4096), fails="memory.no-wrap")
bad_table("region_crooked", replace(_GOOD, guest=512), fails="memory.aligned")
bad_table("memory_of_an_eventfd", _GOOD, kind=eventfd, fails="memory.files")
bad_table("memory_beyond_its_file", replace(_GOOD, offset=4096), fails="memory.inside-file")
bad_table("no_regions", fails="memory.table-not-empty")


@fault("memory.before-addresses", "memory.before-kick")
class MemoryAfterRings(Life):
    steps = tuple(step for step in moved("share", "set_up"))

    async def set_up(self) -> None:
        await self.make()
        await super().set_up()

    async def make(self) -> None:
        """The memory, of which the back-end is told later."""
        told, self.talk.set_memory = self.talk.set_memory, _nothing  # type: ignore[method-assign]
        await super().share()
        self.talk.set_memory = told  # type: ignore[method-assign]

    async def share(self) -> None:
        await self.talk.set_memory(self.memory, by_slots=self.has(P.CONFIGURE_MEM_SLOTS))


async def _nothing(*_: object, **__: object) -> None:
    pass


async def _other_memory(life: Life) -> None:
    region = life.memory.regions[1]
    await life.talk.raw(F.SET_MEM_TABLE, MemoryTable((region.describe(),)), region.fd)


saying(TOP, only(tables, _other_memory), "memory.kept-for-rings", name="takes_the_rings_memory_away")


def slots(life: Life) -> bool:
    return life.has(P.CONFIGURE_MEM_SLOTS)


saying(TOP, only(slots, raw(F.REM_MEM_REG, SingleRegion(_GOOD))), "slots.known", name="removes_what_is_not_there")


@fault("slots.limit")
class TooManySlots(Life):
    async def slots(self) -> None:
        await super().slots()
        self.room = 32


@fault("slots.asked-first")
class SlotsUnasked(Life):
    steps = without("slots", "hotplug")


async def _both(life: Life) -> None:
    await life.talk.raw(F.SET_MEM_TABLE, life.memory.table(), *life.memory.fds)


saying(TOP, only(slots, _both), "slots.one-way", name="slots_and_tables")


# ---- rings: the last one is not used by the front-end itself

_SPARE = RINGS

saying(TOP, raw(F.SET_VRING_CALL, VringFd(9, has_fd=False)), "ring.index", name="ring_that_is_not_there")
saying(TOP, raw(F.SET_VRING_NUM, VringState(_SPARE, 0)), "ring.size", name="ring_of_nothing")
saying(TOP, raw(F.SET_VRING_NUM, VringState(_SPARE, 100)), "ring.power-of-two", name="ring_of_100")
saying(TOP, raw(F.SET_VRING_BASE, VringState(_SPARE, 1 << 16)), "ring.base", name="base_of_17_bits")
saying(TOP, only(lambda life: life.has(V.PROTOCOL_FEATURES), raw(F.SET_VRING_ENABLE, VringState(_SPARE, 2))),
       "ring.enable-number", name="enables_by_2")  # fmt: skip
saying(TOP, raw(F.SET_VRING_KICK, VringFd(_SPARE), fds=eventfd), "ring-order.size-before-kick",
       "ring-order.address-before-kick", "ring-order.base-before-kick", "ring-order.enabled", "ring-order.stopped",
       name="ring_of_a_kick_alone")  # fmt: skip
saying(TOP, raw(F.SET_VRING_NUM, VringState(0, 2 * SIZE)), "ring-order.still-size", name="size_changes")
saying(TOP, raw(F.SET_VRING_BASE, VringState(0, 7)), "ring-order.still-base", name="base_changes")


def _address(life: Life, index: int, like: int, **changes: int) -> VringAddress:
    queue, user = life.rings[like].queue, life.memory.map.guest_to_host
    return replace(VringAddress(index, 0, user(queue.desc), user(queue.used), user(queue.avail), 0), **changes)


def addressing(name: str, make: Callable[[Life], VringAddress], *fails: str, num: bool = True) -> None:
    async def say(life: Life) -> None:
        address = make(life)
        if num and address.index == _SPARE:
            await life.talk.raw(F.SET_VRING_NUM, VringState(_SPARE, 16))
        await life.talk.raw(F.SET_VRING_ADDR, address)

    saying("set_up", say, *fails, name=name)


def _free(life: Life, **changes: int) -> VringAddress:
    """Addresses for the spare ring, in memory that nobody uses."""
    at = life.memory.map.guest_to_host(MIB // 2)
    return replace(VringAddress(_SPARE, 0, at, at + 8192, at + 4096, 0), **changes)


addressing("addresses_change", lambda life: replace(_free(life), index=0), "ring-order.still-address")
addressing("addresses_without_size", _free, "ring-order.size-before-address", num=False)
addressing("addresses_nowhere", lambda life: _free(life, desc=4096), "address.inside")
addressing("addresses_crooked", lambda life: _free(life, used=_free(life).used + 2), "address.aligned")
addressing("parts_overlap", lambda life: _free(life, avail=_free(life).desc), "address.disjoint")
addressing("ring_in_another", lambda life: _address(life, _SPARE, 0), "address.other-rings")
addressing("flags_of_an_address", lambda life: _free(life, flags=2), "address.flags")

saying(TOP, raw(F.SET_VRING_KICK, VringFd(0), fds=file), "event.kick-kind", name="kick_of_a_file")
saying(TOP, raw(F.SET_VRING_CALL, VringFd(0), fds=file), "event.call-kind", name="call_of_a_file")
saying(TOP, raw(F.SET_VRING_ERR, VringFd(0), fds=file), "event.err-kind", name="err_of_a_file")
saying(TOP, raw(F.SET_VRING_CALL, U64(1 << 9 | 1 << 8)), "event.reserved-bits", name="reserved_bits_of_a_word")


async def _same_kick(life: Life) -> None:
    await life.talk.raw(F.SET_VRING_KICK, VringFd(1), life.rings[0].kick_fd)


saying(TOP, _same_kick, "event.own-kick", name="one_kick_for_two")


@fault("event.called")
class NeverCalled(Life):
    async def start(self, ring: FrontendRing) -> None:
        told, self.talk.set_vring_call = self.talk.set_vring_call, _nothing  # type: ignore[method-assign]
        await super().start(ring)
        self.talk.set_vring_call = told  # type: ignore[method-assign]


# ---- the device

_HAS_CONFIG = lambda life: life.has(P.CONFIG)  # noqa: E731
saying(
    TOP, only(_HAS_CONFIG, raw(F.GET_CONFIG, Config(250, 10, 0, bytes(10)))), "config.bounds", name="too_much_config"
)
saying(TOP, only(_HAS_CONFIG, raw(F.GET_CONFIG, Config(0, 0, 0, b""))), "config.not-empty", name="no_config_at_all")
saying(TOP, only(_HAS_CONFIG, raw(F.SET_CONFIG, Config(0, 1, 7, b"x"))), "config.flags", name="flags_of_config")


@fault("config.read-before-write")
class WritesConfigUnread(Life):
    steps = moved("write_config", "owner")


_HAS_LOG = lambda life: life.has(P.LOG_SHMFD)  # noqa: E731
_LOG = Log(4096, 0)
saying(TOP, only(_HAS_LOG, raw(F.SET_LOG_BASE, _LOG, fds=eventfd)), "log.file", name="log_of_an_eventfd")
saying(TOP, only(_HAS_LOG, raw(F.SET_LOG_BASE, replace(_LOG, size=2 * MIB), fds=file)), "log.inside-file",
       name="log_beyond_its_file")  # fmt: skip
saying(TOP, only(_HAS_LOG, raw(F.SET_LOG_BASE, replace(_LOG, size=8), fds=file)), "log.covers-memory",
       name="log_too_short")  # fmt: skip


async def _logs_nowhere(life: Life) -> None:
    features = life.talk.session.features
    if life.has(P.LOG_SHMFD):
        await life.talk.raw(F.SET_FEATURES, U64(features | V.LOG_ALL.mask))
        await life.talk.raw(F.SET_FEATURES, U64(features))


saying("log", _logs_nowhere, "log.before-logging", name="logs_nowhere", first=True)


async def _log_address(life: Life) -> None:
    if life.has(P.LOG_SHMFD):
        await life.talk.raw(F.SET_VRING_ADDR, _address(life, 0, 0, flags=1, log=1 << 40))


saying("log", _log_address, "log.used-ring", name="used_ring_beyond_the_log")

_HAS_BUFFER = lambda life: life.has(P.INFLIGHT_SHMFD)  # noqa: E731
saying("inflight", only(_HAS_BUFFER, raw(F.GET_INFLIGHT_FD, Inflight(0, 0, 0, 0))), "inflight.asks", first=True,
       name="buffer_for_nothing")  # fmt: skip


async def _another_size(life: Life) -> None:
    if life.buffer is not None:
        given = replace(life.buffer.description, mmap_size=4096)
        await life.talk.raw(F.SET_INFLIGHT_FD, given, life.buffer.fd)


async def _another_file(life: Life) -> None:
    if life.buffer is not None:
        await raw(F.SET_INFLIGHT_FD, life.buffer.description, fds=file)(life)


saying("inflight", _another_size, "inflight.as-given", name="buffer_of_another_size")
saying("inflight", _another_file, "inflight.same-file", name="another_buffer")


@fault("inflight.before-rings")
class BufferAfterRings(Life):
    steps = moved("inflight", "set_up")


@fault("inflight.large-enough")
class BufferTooSmall(Life):
    async def inflight(self) -> None:
        if self.has(P.INFLIGHT_SHMFD) and self.buffer is None:
            self.buffer = await self.talk.get_inflight_fd(RINGS, SIZE // 2)
        await super().inflight()


@fault("inflight.kept")
class ForgetsTheBuffer(Life):
    async def inflight(self) -> None:
        if self.buffer is not None:
            self.buffer.close()
            self.buffer = None
        await super().inflight()


_HAS_STATUS = lambda life: life.has(P.STATUS)  # noqa: E731
saying(TOP, only(_HAS_STATUS, raw(F.SET_STATUS, U64(0x1FF))), "status.byte", name="status_of_nine_bits")
saying("driver", only(_HAS_STATUS, raw(F.SET_STATUS, U64(1))), "status.grows", name="status_shrinks")
saying("set_features", only(_HAS_STATUS, raw(F.SET_STATUS, U64(DeviceStatus.FEATURES_OK))), "status.features-first",
       name="features_ok_early", first=True)  # fmt: skip


@fault("status.acknowledged")
class DriverNeverSeen(Life):
    steps = without("driver")


@fault("status.driver-ok")
class NeverOk(Life):
    steps = without("driver_ok")


# ---- answers


class Careless(Life):
    """Takes any message for the answer to some requests."""

    codes: Sequence[F]

    async def answer(self, talk: Talk, code: F, read: Callable[[F], Awaitable[Any]]) -> Any:
        if code not in self.codes:
            return await read(code)
        message = await receive_message(talk._channel)
        if message is None:
            raise RemoteProtocolError(code, "closed")
        size = 20 if code is F.GET_CONFIG else FRONTEND[code].reply[0].sizes[0]
        body = (message.body + bytes(size))[:size]
        talk.session.receive(Header(code, VERSION | REPLY, size).pack(), message.fds)
        return talk.session.receive(body), message.fds


class Fragile(Life):
    """Is ended by a signal when its back-end is lost while it waits for the answer to some requests."""

    codes: Sequence[F]

    def failed(self, code: F, error: Exception) -> None:
        # What is not acknowledged is found lost by the next.
        if {code, self.sent} & set(self.codes) and not isinstance(error, RequestRefused | ReplyTimeout):
            raise Crash
        raise error


class Deaf(Life):
    """Does not hear that it is to end while it waits for the answer to some requests."""

    codes: Sequence[F]

    def asked(self) -> None:
        if self.waiting not in self.codes:
            super().asked()

    async def wind_up(self) -> None:
        self.talk.timeout = None
        await super().wind_up()


class Hasty(Life):
    """Gives up when the answer to some requests takes longer than 0.1 s."""

    codes: Sequence[F]

    async def before(self, talk: Talk, code: F) -> None:
        talk.timeout = 0.1 if code in self.codes else None


class Choppy(Life):
    """Takes a part of an answer to some requests for the whole."""

    codes: Sequence[F]

    async def answer(self, talk: Talk, code: F, read: Callable[[F], Awaitable[Any]]) -> Any:
        if code not in self.codes:
            return await read(code)
        wanted = talk.session.wanted
        data, came = await talk._channel.receive(wanted)
        if len(data) < wanted:
            came.close()
            raise RemoteProtocolError(code, "not an answer")
        talk.session.receive(data, came)
        answer, rest = await read(code)
        came.extend(rest)
        return answer, came


class Stubborn(Life):
    """Takes no for yes in the answer to some requests."""

    codes: Sequence[F]

    def failed(self, code: F, error: Exception) -> None:
        if not (code in self.codes and isinstance(error, RequestRefused)):
            raise error


def at(kind: type[Life], name: str, codes: Sequence[F], *themes: str) -> None:
    """A fault at some requests."""
    fails = tuple(case for theme in themes for case in named(theme, codes) if case in IDS)
    FAULTS[f"{kind.__name__}{name}"] = Fault(type(name, (kind,), {"codes": codes}), fails)


_TAKEN = [f"answer.{way}" for way in (*WRONG, "version", "need-reply")]
at(Careless, "Features", [F.GET_FEATURES, F.GET_PROTOCOL_FEATURES], *_TAKEN)
at(Careless, "Numbers", [F.GET_QUEUE_NUM, F.GET_MAX_MEM_SLOTS, F.GET_STATUS], *_TAKEN)
at(Careless, "Structs", [F.GET_CONFIG, F.GET_INFLIGHT_FD], *_TAKEN)
at(Careless, "Bases", [F.GET_VRING_BASE], *_TAKEN)
at(Hasty, "", about("answer.late"), "answer.late")
at(Deaf, "", about("answer.never"), "answer.never")
at(Choppy, "", about("answer.pieces"), "answer.pieces")
at(Stubborn, "", [code for code in about("refused") if not FRONTEND[code].reply], "refused")
_DEATHS = about("death.at")
for _part in range(0, len(_DEATHS), 8):
    at(Fragile, str(_part // 8), _DEATHS[_part : _part + 8], "death.at", "answer.half")


@fault("refused.get-config")
class NeedsItsConfig(Life):
    def failed(self, code: F, error: Exception) -> None:
        if code is F.GET_CONFIG and isinstance(error, RequestRefused):
            raise Crash
        raise error


@fault("refused.get-inflight-fd")
class GivesBackNothing(Life):
    async def inflight(self) -> None:
        await super().inflight()
        if self.has(P.INFLIGHT_SHMFD) and self.buffer is None:
            await raw(F.SET_INFLIGHT_FD, Inflight(0, 0, RINGS, SIZE), fds=file)(self)


# ---- ends


@fault("life.survives")
class CrashesOnLittle(Life):
    async def features(self) -> None:
        await super().features()
        if not self.offered & V.PROTOCOL_FEATURES.mask:
            raise Crash


@fault("life.ends")
class DeafOnLittle(Life):
    def asked(self) -> None:
        if self.offered & V.PROTOCOL_FEATURES.mask:
            super().asked()


@fault("life.sets-up")
class SetsNothingUp(Life):
    steps = without("set_up", "enable", "driver_ok", "log", "hotplug")


FAULTS["SetsNothingUp"] = FAULTS["SetsNothingUp"]._replace(patience=0.5)  # for nothing, in every session


@fault("death.while-running")
class CrashesWhenLost(Life):
    def lost(self) -> None:
        if not self.stop.is_set():
            raise Crash


@fault("death.while-running")
class ComesBackWithHalf(Life):
    short = False

    def lost(self) -> None:
        self.short = True

    async def start(self, ring: FrontendRing) -> None:
        if not (self.short and ring.index):
            await super().start(ring)


# ---- the back-end's channel


class Channel(Life):
    """Answers the back-end's requests by itself: right, until a fault is put in."""

    async def channel(self) -> None:
        await super().channel()
        backend = self.talk.backend
        if backend is not None:
            backend._task.cancel()
            await asyncio.gather(backend._task, return_exceptions=True)
            self.served = 0
            backend._task = asyncio.ensure_future(self._serve_channel(backend._channel))

    async def _serve_channel(self, channel: Any) -> None:
        with contextlib.suppress(ConnectionError, VhostUserError):
            while (header := await self.read(channel)) is not None:
                self.served += 1
                await self.reply(channel, header)
                if header.request == 2:
                    await self.changed()
        channel.end()

    async def read(self, channel: Any) -> Header | None:
        message = await receive_message(channel)
        if message is None or len(message.body) < message.header.size:
            self.ended(half=message is not None)
            return None
        self.release(message.fds)
        good = message.header.request == 2 and message.header.flags in (VERSION, VERSION | NEED_REPLY)
        return message.header if good and not message.body and not len(message.fds) else None

    def release(self, fds: Fds) -> None:
        fds.close()

    def ended(self, *, half: bool) -> None:
        """The channel has ended."""

    async def changed(self) -> None:
        await self.read_config()

    async def reply(self, channel: Any, header: Header) -> None:
        if header.need_reply:
            await channel.send(self.words(header))

    def words(self, header: Header) -> bytes:
        return Header(header.request, VERSION | REPLY, 8).pack() + bytes(8)


@fault("channel.answered", "channel.answer-flags", "channel.answer-size", "channel.answer-id", "channel.order")
class Mute(Channel):
    async def reply(self, channel: Any, header: Header) -> None:
        pass


@fault("channel.answer-flags")
class EchoesFlags(Channel):
    def words(self, header: Header) -> bytes:
        return Header(header.request, header.flags | REPLY, 8).pack() + bytes(8)


@fault("channel.answer-size")
class AnswersInFour(Channel):
    def words(self, header: Header) -> bytes:
        return Header(header.request, VERSION | REPLY, 4).pack() + bytes(4)


@fault("channel.answer-id")
class AnswersAnother(Channel):
    def words(self, header: Header) -> bytes:
        return Header(header.request + 1, VERSION | REPLY, 8).pack() + bytes(8)


@fault("channel.unasked")
class AnswersAlways(Channel):
    async def reply(self, channel: Any, header: Header) -> None:
        await channel.send(self.words(header))


@fault("channel.order")
class AnswersTwo(Channel):
    async def reply(self, channel: Any, header: Header) -> None:
        if self.served < 3:
            await super().reply(channel, header)


@fault("channel.config-change")
class NeverReadsAgain(Channel):
    async def changed(self) -> None:
        pass


@fault(*(f"channel.{name}" for name in ("unknown", "ungated", "no-descriptor", "no-such-ring", "short", "long",
                                        "reply-flag", "version")))  # fmt: skip
class SaysYes(Channel):
    async def read(self, channel: Any) -> Header | None:
        message = await receive_message(channel)
        if message is not None:
            message.fds.close()
        return message.header if message is not None else None


@fault("channel.huge")
class AnswersTheHeader(Channel):
    async def read(self, channel: Any) -> Header | None:
        data, fds = await channel.receive(HEADER_SIZE)
        fds.close()
        header = Header.unpack(data) if len(data) == HEADER_SIZE else None
        good = header is not None and header.request == 2 and header.flags in (VERSION, VERSION | NEED_REPLY)
        return header if good and header is not None and header.size in (0, 1 << 20) else None


@fault("channel.many-descriptors")
class KeepsDescriptors(Channel):
    kept: list[Fds]

    def release(self, fds: Fds) -> None:
        self.kept = [*getattr(self, "kept", []), Fds(fds)]
        fds._fds = []

    async def run(self) -> int:
        try:
            return await super().run()
        finally:
            for fds in getattr(self, "kept", []):
                fds.close()


@fault("channel.half")
class CrashesOnHalf(Channel):
    def ended(self, *, half: bool) -> None:
        if half:
            self.fall()

    def fall(self) -> None:
        self.crashed = True
        self.stop.set()

    async def run(self) -> int:
        status = await super().run()
        return -11 if getattr(self, "crashed", False) else status


@fault("channel.closed")
class CrashesWhenClosed(CrashesOnHalf):
    def ended(self, *, half: bool) -> None:
        if not half and self.ready and not self.stop.is_set():
            self.fall()
