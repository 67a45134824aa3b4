"""Faults of single messages and of negotiation: sizes, descriptors, flags, gates, features, the owner.

What belongs here: what is wrong with a message by itself, or with its place among features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tests.conformance.broken_frontends.faults import (
    FAULTS,
    TOP,
    Fault,
    Say,
    about,
    fault,
    moved,
    named,
    only,
    raw,
    saying,
    without,
)
from tests.conformance.frontends import Life, Talk
from tests.protocol.samples import SAMPLES
from vhostuser.protocol import (
    FRONTEND,
    HEADER_SIZE,
    NEED_REPLY,
    REPLY,
    U64,
    VERSION,
    Empty,
    FrontendRequest,
    Header,
    Payload,
    ProtocolFeature,
    VirtioFeature,
    VringFd,
)

F, P, V = FrontendRequest, ProtocolFeature, VirtioFeature


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


_ASKS = [code for code in about("size") if FRONTEND[code].reply]
_OF_RINGS = [code for code in about("size") if "VRING" in code.name and code not in _ASKS]
_OF_MEMORY = [F.SET_MEM_TABLE, F.ADD_MEM_REG, F.REM_MEM_REG, F.SET_LOG_BASE, F.SET_INFLIGHT_FD]
_OTHERS = [code for code in about("size") if code not in (*_ASKS, *_OF_RINGS, *_OF_MEMORY)]
for _codes, _name in ((_ASKS, "questions"), (_OF_RINGS, "rings"), (_OF_MEMORY, "memory"), (_OTHERS, "others")):
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
