"""Disks with one fault each, for the suite to find: ``python -m tests.conformance.broken NAME --socket-path=...``.

What belongs here: the faults. Each is our own disk with one thing patched, and right in everything else; it says which
cases must fail.
"""

from __future__ import annotations

import os
import select
import signal
import stat
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

from vhostuser import lifecycle
from vhostuser._native import lib
from vhostuser.backend_channel import BackendChannel
from vhostuser.channel import Channel, Fds
from vhostuser.connection import HANDLERS, Connection
from vhostuser.devices.blk import Blk
from vhostuser.lifecycle import Lifecycle
from vhostuser.memory import DirtyLog, Region
from vhostuser.protocol import (
    BackendSession,
    Config,
    FrontendRequest,
    Header,
    Outgoing,
    RemoteProtocolError,
    Reply,
    RequestRefused,
    VirtioFeature,
    VringState,
)
from vhostuser.protocol.codec import Reader
from vhostuser.protocol.exchange import Server
from vhostuser.protocol.ring import Ring as Agreed
from vhostuser.protocol.state import State
from vhostuser.ring import Ring
from vhostuser.virtqueue import InflightRegion, RingSetup

F = FrontendRequest


class Fault(NamedTuple):
    """What to patch, and the cases that must fail."""

    patch: Callable[[], None]
    fails: tuple[str, ...]


FAULTS: dict[str, Fault] = {}


def fault(*fails: str) -> Callable[[Callable[[], None]], Callable[[], None]]:
    """Declares the function under it as a fault of this name."""

    def add(patch: Callable[[], None]) -> Callable[[], None]:
        FAULTS[patch.__name__] = Fault(patch, fails)
        return patch

    return add


def answering(change: Callable[[BackendSession, Any, Outgoing | None], Outgoing | None]) -> None:
    """Has every answer changed: from the session, the request, and the answer that is right."""
    right = BackendSession.finish

    def finish(session: BackendSession, request: Any, outcome: Any = None) -> Outgoing | None:
        return change(session, request, right(session, request, outcome))

    BackendSession.finish = finish  # type: ignore[method-assign]


def handling(code: F, change: Callable[[Connection, Any, Any], Any]) -> None:
    """Has a request handled in another way: by the connection, the request, and what is right."""
    right = HANDLERS[code]

    async def handle(connection: Connection, request: Any) -> Any:
        return await change(connection, request, right)

    HANDLERS[code] = handle


def crash() -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


# ---- answers


@fault("reply-ack.own-reply-flags")
def keeps_need_reply() -> None:
    def change(_: BackendSession, request: Any, answer: Outgoing | None) -> Outgoing | None:
        if answer is None or not (request.need_reply and request.row.reply):
            return answer
        return Outgoing(answer.data[:4] + bytes([answer.data[4] | 8]) + answer.data[5:], answer.fds)

    answering(change)


@fault("framing.reply-flags")
def flags_of_a_number() -> None:
    def change(_: BackendSession, request: Any, answer: Outgoing | None) -> Outgoing | None:
        if answer is None or request.code is not F.GET_MAX_MEM_SLOTS:
            return answer
        return Outgoing(answer.data[:4] + b"\x0d" + answer.data[5:])

    answering(change)


@fault("framing.reply-size")
def number_of_four_bytes() -> None:
    def change(_: BackendSession, request: Any, answer: Outgoing | None) -> Outgoing | None:
        if answer is None or request.code is not F.GET_MAX_MEM_SLOTS:
            return answer
        return Outgoing(Header(request.code, 5, 4).pack() + answer.data[12:16])

    answering(change)


@fault("reply-ack.unasked")
def acknowledges_unasked() -> None:
    def change(session: BackendSession, request: Any, answer: Outgoing | None) -> Outgoing | None:
        if session.protocol_features & 8 and request.code is F.SET_OWNER:
            return Outgoing(Header(F.SET_OWNER, 5, 8).pack() + bytes(8))
        return answer

    answering(change)


@fault("reply-ack.unnegotiated", "reply-ack.switched-off")
def acknowledges_without_the_feature() -> None:
    Server._acks = lambda server, need_reply: need_reply  # type: ignore[method-assign]


@fault("message.acknowledged.set-log-fd", "log.log-fd")
def says_nothing_to_log_fd() -> None:
    answering(lambda _, request, answer: None if request.code is F.SET_LOG_FD else answer)


@fault("reply-ack.vring-base-once")
def answers_twice() -> None:
    def change(_: BackendSession, request: Any, answer: Outgoing | None) -> Outgoing | None:
        if answer is not None and request.need_reply and request.code is F.GET_VRING_BASE:
            return Outgoing(answer.data * 2)
        return answer

    answering(change)


@fault("framing.unknown", "framing.unknown-with-payload", "framing.id-0")
def acknowledges_the_unknown() -> None:
    right = Server._unusable

    def unusable(server: Server, header: Header, request: int, reason: str, *rest: Any, **more: Any) -> Any:
        error = right(server, header, request, reason, *rest, **more)
        if reason == "unknown request" and error.answer:
            error.answer = Header(header.request, 5, 8).pack() + bytes(8)
        return error

    Server._unusable = unusable  # type: ignore[method-assign]


@fault("framing.version-0", "framing.version-2", "framing.reply-flag-on-request")
def looks_at_no_flags() -> None:
    Header.check_request = lambda header: None  # type: ignore[method-assign]


@fault("framing.byte-by-byte")
def wants_whole_pieces() -> None:
    right = Channel.receive

    async def receive(channel: Channel, wanted: int) -> tuple[bytes, Fds]:
        data, fds = await right(channel, wanted)
        if 0 < len(data) < wanted:
            raise RemoteProtocolError(None, "a message in pieces")
        return data, fds

    Channel.receive = receive  # type: ignore[method-assign]


@fault("framing.payload-apart")
def wants_payloads_at_once() -> None:
    right = Channel.receive

    async def receive(channel: Channel, wanted: int) -> tuple[bytes, Fds]:
        data, fds = await right(channel, wanted)
        payload = len(data) == 12 and any(data[8:])
        if payload and not select.select([channel._sock], [], [], 0)[0]:
            raise RemoteProtocolError(None, "a payload that is not there yet")
        return data, fds

    Channel.receive = receive  # type: ignore[method-assign]


@fault("framing.end-in-header", "framing.end-in-payload")
def dies_of_half_a_message() -> None:
    right = Reader.eof

    def eof(reader: Reader) -> None:
        if reader.started:
            crash()
        right(reader)

    Reader.eof = eof  # type: ignore[method-assign]


# ---- descriptors


def _leaks(when: Callable[[Fds], bool]) -> None:
    right = Fds.close
    Fds.close = lambda fds: None if when(fds) else right(fds)  # type: ignore[method-assign]


@fault("framing.descriptors-many", "framing.descriptors-253")
def leaks_many_descriptors() -> None:
    _leaks(lambda fds: len(fds) > 8)


@fault("framing.no-leak", "memory.descriptors-closed", "slots.leak")
def leaks_memory_files() -> None:
    _leaks(lambda fds: any(stat.S_ISREG(os.fstat(fd).st_mode) for fd in fds))


@fault("framing.descriptor-of-unknown", "message.extra-descriptor")
def leaks_what_it_did_not_ask_for() -> None:
    _leaks(lambda fds: len(fds) == 1 and stat.S_ISFIFO(os.fstat(fds[0]).st_mode))


# ---- negotiation


def _number(code: F, change: Callable[[BackendSession, int], int]) -> None:
    right = BackendSession._known

    def known(session: BackendSession, request: Any) -> Any:
        payload = right(session, request)
        return replace(payload, value=change(session, payload.value)) if request.code is code else payload

    BackendSession._known = known  # type: ignore[method-assign]


@fault("features.stable")
def forgets_what_it_offered() -> None:
    _number(F.GET_FEATURES, lambda session, value: value & ~(1 << 9) if session.features else value)


@fault("features.protocol-stable")
def forgets_what_protocol_it_offered() -> None:
    _number(F.GET_PROTOCOL_FEATURES, lambda session, value: value & ~4096 if session.protocol_features else value)


@fault("features.protocol-known")
def offers_what_does_not_exist() -> None:
    _number(F.GET_PROTOCOL_FEATURES, lambda _, value: value | 1 << 40)


@fault("features.version-1")
def legacy() -> None:
    _number(F.GET_FEATURES, lambda _, value: value & ~VirtioFeature.VERSION_1.mask)


@fault("features.queue-num")
def no_queues() -> None:
    _number(F.GET_QUEUE_NUM, lambda _, value: 0)


@fault("features.mem-slots", "features.mem-slots-eight")
def no_slots() -> None:
    _number(F.GET_MAX_MEM_SLOTS, lambda _, value: 0)


@fault("features.unoffered", "features.protocol-unoffered")
def takes_any_feature() -> None:
    right = State.__init__

    def init(state: State, *arguments: Any) -> None:
        right(state, *arguments)
        state.features_offered = state.protocol_features_offered = ~0

    State.__init__ = init  # type: ignore[method-assign]


@fault("message.ungated.get-config", "message.ungated.get-inflight-fd", "message.ungated.add-mem-reg")
def asks_for_no_feature() -> None:
    State.missing = lambda state, gate: ""  # type: ignore[method-assign]


@fault("features.reset-owner", "features.reset-owner-memory")
def forgets_everything_at_reset_owner() -> None:
    right = State.apply

    def apply(state: State, code: Any, payload: Any) -> None:
        right(state, code, payload)
        if code is F.RESET_OWNER:
            state.protocol_features = 0

    State.apply = apply  # type: ignore[method-assign]


# ---- rings


@fault("ring.state.started-disabled", "ring.state.enable-disable", "features.bit-30-enables-nothing")
def never_disabled() -> None:
    Agreed.runs = property(lambda ring: ring.started)  # type: ignore[assignment,method-assign]


@fault("ring.state.stopped-enabled")
def starts_when_enabled() -> None:
    Agreed.runs = property(lambda ring: ring.enabled)  # type: ignore[assignment,method-assign]


@fault("features.bit-30-enables-nothing", "ring.state.started-disabled")
def features_enable() -> None:
    right = State._change

    def change(state: State, code: Any, payload: Any) -> None:
        right(state, code, payload)
        if code is F.SET_FEATURES:
            for ring in state.rings:
                ring.enabled = True

    State._change = change  # type: ignore[method-assign]


@fault("features.bit-30-disables-nothing")
def features_disable() -> None:
    right = State._change

    def change(state: State, code: Any, payload: Any) -> None:
        same = code is F.SET_FEATURES and payload.value == state.features
        right(state, code, payload)
        for ring in state.rings if same else ():
            ring.enabled = False

    State._change = change  # type: ignore[method-assign]


@fault("features.log-all-while-running", "log.stops")
def halts_when_logging_ends() -> None:
    right = State._change

    def change(state: State, code: Any, payload: Any) -> None:
        logged = state.features & VirtioFeature.LOG_ALL.mask
        right(state, code, payload)
        if code is F.SET_FEATURES and logged and not payload.value & VirtioFeature.LOG_ALL.mask:
            for ring in state.rings:
                ring.enabled = False

    State._change = change  # type: ignore[method-assign]


@fault("kick.before-enable", "ring.state.kick-then-enable")
def loses_early_kicks() -> None:
    right = Lifecycle.kicked

    def kicked(life: Lifecycle, ring: Ring) -> None:
        if life._session.rings[ring.index].enabled:
            right(life, ring)

    Lifecycle.kicked = kicked  # type: ignore[method-assign]


@fault("base.given")
def base_of_nothing_is_0() -> None:
    async def change(connection: Connection, request: Any, right: Any) -> Any:
        ring = connection.rings[request.payload.index]
        return await right(connection, request) if ring.running else Reply(VringState(ring.index, 0))

    handling(F.GET_VRING_BASE, change)


@fault("base.index")
def base_of_another_ring() -> None:
    def change(_: BackendSession, request: Any, answer: Outgoing | None) -> Outgoing | None:
        if answer is None or request.code is not F.GET_VRING_BASE:
            return answer
        return Outgoing(answer.data[:12] + bytes([answer.data[12] ^ 1]) + answer.data[13:])

    answering(change)


@fault("base.untouched", "base.before-negotiation")
def dies_of_an_unknown_ring() -> None:
    async def change(connection: Connection, request: Any, right: Any) -> Any:
        if not connection.rings[request.payload.index].size:
            crash()
        return await right(connection, request)

    handling(F.GET_VRING_BASE, change)


@fault("kick.replaced")
def keeps_the_first_kick() -> None:
    async def change(connection: Connection, request: Any, right: Any) -> Any:
        if not connection.rings[request.payload.index].running:
            await right(connection, request)

    handling(F.SET_VRING_KICK, change)


@fault("call.replaced", "call.none")
def keeps_the_first_call() -> None:
    async def change(connection: Connection, request: Any, right: Any) -> Any:
        if not connection.rings[request.payload.index].running:
            await right(connection, request)

    handling(F.SET_VRING_CALL, change)


@fault("call.at-start")
def calls_for_nothing_but_requests() -> None:
    Ring.call = lambda ring: None  # type: ignore[method-assign]


@fault("hostile.reported")
def reports_nothing() -> None:
    Ring.signal_err = lambda ring: None  # type: ignore[method-assign]


@fault("hostile.control-kept", "hostile.recovers", "hostile.reported")
def leaves_for_a_broken_ring() -> None:
    right = Lifecycle._ring_ended

    def ended(life: Lifecycle, ring: Ring, broken: Any) -> None:
        if broken is None:
            right(life, ring, broken)
        else:
            life._failed()

    Lifecycle._ring_ended = ended  # type: ignore[method-assign]


def _dies(name: str, codes: tuple[int, ...], *fails: str) -> None:
    """A disk that does not look before it follows what such a ring says."""

    def patch() -> None:
        right = Lifecycle._ring_ended

        def ended(life: Lifecycle, ring: Ring, broken: Any) -> None:
            if broken is not None and broken.code in codes:
                crash()
            right(life, ring, broken)

        Lifecycle._ring_ended = ended  # type: ignore[method-assign]

    FAULTS[f"dies_of_{name}"] = Fault(patch, fails)


_dies("circles", (lib.VU_E_LOOP,), "hostile.loop", "hostile.indirect-loop", "hostile.loop-of-one")
_dies("order", (lib.VU_E_ORDER,), "hostile.readable-after-writable")
_dies("jumps", (lib.VU_E_INDEX,), "hostile.index-ahead", "hostile.index-back")
_dies("numbers", (lib.VU_E_HEAD,), "hostile.head-outside", "hostile.head-far-outside", "hostile.next-outside")
_dies("links_of_tables", (lib.VU_E_HEAD,), "hostile.indirect-link-outside")
_dies("tables", (lib.VU_E_INDIRECT,), "hostile.indirect-odd", "hostile.indirect-empty", "hostile.indirect-nested")
_dies("long_tables", (lib.VU_E_SIZE,), "hostile.indirect-huge")
_dies("wraps", (lib.VU_E_OVERFLOW,), "hostile.buffer-wraps")
_dies(
    "addresses", (lib.VU_E_RANGE,),
    *("hostile.indirect-outside", "hostile.indirect-over-the-end", "hostile.buffer-outside", "hostile.buffer-huge"),
    *("hostile.buffer-over-the-end", "hostile.header-outside", "hostile.status-outside"),
)  # fmt: skip
_dies("lost_memory", (lib.VU_E_FAULT,), "memory.file-shrinks-ring")


# ---- memory


@fault("memory.offset", "memory.odd-offset", "memory.one-file")
def maps_from_the_beginning() -> None:
    right = Region.map.__func__  # type: ignore[attr-defined]

    def mapped(kind: type[Region], fd: int, described: Any, *rest: Any, **more: Any) -> Any:
        return right(kind, fd, replace(described, offset=0), *rest, **more)

    Region.map = classmethod(mapped)  # type: ignore[assignment,method-assign]


@fault("slots.removed-unknown", "slots.removed-other-user", "slots.removed-offset")
def removes_what_is_not_there() -> None:
    async def change(connection: Connection, request: Any, right: Any) -> Any:
        try:
            await right(connection, request)
        except RequestRefused:
            return

    handling(F.REM_MEM_REG, change)


@fault("slots.too-many")
def takes_any_number_of_regions() -> None:
    async def change(connection: Connection, request: Any, right: Any) -> Any:
        connection._mem_slots = 100000
        return await right(connection, request)

    handling(F.ADD_MEM_REG, change)


@fault("slots.many", "slots.too-many")
def takes_eight_regions() -> None:
    async def change(connection: Connection, request: Any, right: Any) -> Any:
        if len(connection.memory.regions) >= 8:
            raise RequestRefused("eight are enough")
        return await right(connection, request)

    handling(F.ADD_MEM_REG, change)


@fault("slots.added-used", "slots.removed")
def acknowledges_regions_without_adding_them() -> None:
    async def change(connection: Connection, request: Any, right: Any) -> Any:
        listening = connection._listening
        return await right(connection, request) if listening or not connection.memory.regions else None

    handling(F.ADD_MEM_REG, change)


# ---- the dirty log


@fault("log.before", "log.stops")
def logs_always() -> None:
    right = Lifecycle._start

    def start(life: Lifecycle, ring: Ring, regions: Any) -> None:
        lifecycle.VirtioFeature = type("Always", (), {"LOG_ALL": type("Bit", (), {"mask": ~0})})  # type: ignore
        right(life, ring, regions)

    Lifecycle._start = start  # type: ignore[method-assign]


def _marks_used(change: Callable[[RingSetup], RingSetup]) -> None:
    right = Ring.setup
    Ring.setup = lambda ring, features: change(right(ring, features))  # type: ignore[method-assign]


@fault("log.used", "log.used-elsewhere")
def never_marks_the_used_ring() -> None:
    _marks_used(lambda setup: replace(setup, log_used=False))


@fault("log.used-elsewhere")
def marks_the_used_ring_where_it_is() -> None:
    _marks_used(lambda setup: replace(setup, log=0))


@fault("log.offset")
def logs_from_the_beginning() -> None:
    right = DirtyLog.map.__func__  # type: ignore[attr-defined]

    def mapped(kind: type[DirtyLog], fd: int, size: int, offset: int = 0) -> Any:
        return right(kind, fd, size, 0)

    DirtyLog.map = classmethod(mapped)  # type: ignore[assignment,method-assign]


@fault("log.reply-bytes")
def answers_log_base_with_what_was_there() -> None:
    def change(_: BackendSession, request: Any, answer: Outgoing | None) -> Outgoing | None:
        if answer is None or request.code is not F.SET_LOG_BASE:
            return answer
        return Outgoing(answer.data[:12] + (256).to_bytes(8, "little"))

    answering(change)


@fault("log.replaced")
def keeps_the_first_log() -> None:
    async def change(connection: Connection, request: Any, right: Any) -> Any:
        return await right(connection, request) if connection._life.dirty_log is None else None

    handling(F.SET_LOG_BASE, change)


# ---- configuration space


@fault("config.part", "config.byte")
def ignores_the_offset() -> None:
    async def change(connection: Connection, request: Any, right: Any) -> Any:
        asked = request.payload
        if asked.offset > 256:
            return await right(connection, request)
        data = connection._device.config().ljust(256, b"\0")[: asked.size]
        return Reply(Config(asked.offset, asked.size, asked.flags, data))

    handling(F.GET_CONFIG, change)


@fault("config.beyond-is-error")
def knows_no_end_of_the_space() -> None:
    async def change(connection: Connection, request: Any, right: Any) -> Any:
        asked = request.payload
        if asked.offset < 256:
            return await right(connection, request)
        return Reply(Config(asked.offset, asked.size, asked.flags, bytes(asked.size)))

    handling(F.GET_CONFIG, change)


@fault("config.error-keeps-connection")
def leaves_after_an_error() -> None:
    async def change(connection: Connection, request: Any, right: Any) -> Any:
        if request.payload.offset > 256:
            raise ConnectionAbortedError
        return await right(connection, request)

    handling(F.GET_CONFIG, change)


@fault("config.read-only", "config.write-beyond")
def writes_anything() -> None:
    Blk.set_config = lambda *_, **__: None  # type: ignore[assignment,method-assign]


@fault("config.migration", "message.acknowledged.set-config")
def says_nothing_to_set_config() -> None:
    answering(lambda _, request, answer: None if request.code is F.SET_CONFIG else answer)


# ---- in flight


@fault("inflight.kept", "inflight.kept-under-load", "inflight.out-of-order")
def tracks_nothing() -> None:
    async def change(connection: Connection, request: Any, right: Any) -> Any:
        await right(connection, request)
        connection._life.inflight = None

    handling(F.SET_INFLIGHT_FD, change)


def _created(change: Callable[[int, int], tuple[int, int]]) -> None:
    right = InflightRegion.create
    InflightRegion.create = staticmethod(lambda queues, size: change(*right(queues, size)))  # type: ignore


@fault("inflight.fresh")
def buffers_of_ones() -> None:
    def change(fd: int, size: int) -> tuple[int, int]:
        os.pwrite(fd, b"\1", size - 1)
        return fd, size

    _created(change)


@fault("inflight.size")
def small_buffers() -> None:
    _created(lambda fd, size: (fd, 64))


@fault("inflight.in-file")
def buffers_without_a_file() -> None:
    def change(fd: int, size: int) -> tuple[int, int]:
        os.truncate(fd, 0)
        return fd, size

    _created(change)


@fault("inflight.again")
def one_buffer_for_all() -> None:
    made: list[tuple[int, int]] = []

    def change(fd: int, size: int) -> tuple[int, int]:
        made.append((fd, size))
        return os.dup(made[0][0]), size

    _created(change)


# ---- the back-end's channel


@fault("channel.replaced", "channel.ends-with-connection")
def keeps_channels_open() -> None:
    BackendChannel.close = lambda channel: None  # type: ignore[method-assign]


@fault("channel.suspended")
def speaks_while_suspended() -> None:
    async def change(connection: Connection, request: Any, right: Any) -> Any:
        os.write(request.fds[0], Header(2, 1, 0).pack())
        await right(connection, request)

    handling(F.SET_BACKEND_REQ_FD, change)


# ---- postcopy: more in tests/lab_postcopy/broken


@fault("postcopy.advise")
def advises_with_a_payload() -> None:
    def change(_: BackendSession, request: Any, answer: Outgoing | None) -> Outgoing | None:
        if answer is None or request.code is not F.POSTCOPY_ADVISE:
            return answer
        return Outgoing(Header(F.POSTCOPY_ADVISE, 5, 8).pack() + bytes(8), answer.fds)

    answering(change)


@fault("postcopy.listen-mapped")
def listens_with_regions() -> None:
    async def change(connection: Connection, request: Any, right: Any) -> Any:
        connection._regions.listen()

    handling(F.POSTCOPY_LISTEN, change)


def main() -> None:
    """The disk with the fault that is named first."""
    from vhostuser.tools.blk import main as disk

    FAULTS[sys.argv[1]].patch()
    disk(sys.argv[2:])


if __name__ == "__main__":
    main()
