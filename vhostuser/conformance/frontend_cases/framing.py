"""Headers, sizes, descriptors and gates of every message: most of it read from the rows of the catalog.

What belongs here: what can be said of a message by itself, or by what was negotiated. What does not: order, values.
"""

from __future__ import annotations

from collections.abc import Callable

from vhostuser.conformance.frontend_cases.rules import Rules, spelt
from vhostuser.conformance.transcript import Heard, Scene
from vhostuser.protocol import FRONTEND, REPLY, U64, VERSION, FrontendRequest, ProtocolFeature, Row, VirtioFeature
from vhostuser.protocol.catalog import When

F, P, V = FrontendRequest, ProtocolFeature, VirtioFeature
FRAME = Rules("frame", "Message Specification, Header")
SIZE = Rules("size", "Message Specification, Payload")
FDS = Rules("fds", "Communication")
GATE = Rules("gate", "Protocol features")
REPLY_ACK = Rules("reply-ack", "VHOST_USER_PROTOCOL_F_REPLY_ACK")

_VERSION_BITS = 0x3


@FRAME.message("version", "Every request has version 1.")
def version(_: Scene, heard: Heard) -> str:
    flags = heard.message.header.flags
    return "" if flags & _VERSION_BITS == VERSION else f"flags {flags:#x}"


@FRAME.message("no-reply-flag", "No request has the flag of a reply.")
def no_reply_flag(_: Scene, heard: Heard) -> str:
    flags = heard.message.header.flags
    return f"flags {flags:#x}" if flags & REPLY else ""


@FRAME.message("reserved-flags", "Bits 4 to 31 of the flags are zero.", should=True)
def reserved_flags(_: Scene, heard: Heard) -> str:
    flags = heard.message.header.flags
    return f"flags {flags:#x}" if flags >> 4 else ""


@FRAME.message("known", "Every request is one of the specification.")
def known(_: Scene, heard: Heard) -> str:
    return "" if heard.code and heard.code in FRONTEND else "no such request"


@REPLY_ACK.message("negotiated", "An acknowledgement is asked for only where REPLY_ACK was negotiated.")
def need_reply(scene: Scene, heard: Heard) -> str:
    if not heard.message.header.need_reply or heard.code in (F.POSTCOPY_LISTEN, F.IOTLB_MSG):
        return ""
    # The message that negotiates it may ask for one itself.
    sets = heard.payload.value if heard.code == F.SET_PROTOCOL_FEATURES and isinstance(heard.payload, U64) else 0
    return "" if scene.has(P.REPLY_ACK) or sets & P.REPLY_ACK.mask else "need_reply"


@REPLY_ACK.message("own-reply", "A message with a reply of its own does not ask for an acknowledgement.", should=True)
def own_reply(scene: Scene, heard: Heard) -> str:
    row = FRONTEND.get(heard.code)
    asks = row is not None and row.reply and row.asks is None and heard.message.header.need_reply
    return "need_reply, on a message that has a reply" if asks else ""


# ---- from the rows


def _row(scene: Scene, code: int) -> Row:
    row = FRONTEND[code]
    if scene.has(P.LOG_SHMFD):
        return next((variant.row for variant in row.variants if variant.when is When.LOG_SHMFD), row)
    return row


def _size(scene: Scene, heard: Heard) -> str:
    size, kinds = len(heard.message.body), _row(scene, heard.code).request
    if any(size in kind.sizes for kind in kinds) and size == heard.message.header.size:
        return "" if heard.payload is not None else f"a payload that contradicts itself: {heard.message.body.hex()}"
    return f"{heard.message.header.size} bytes of payload"


def _fds(scene: Scene, heard: Heard) -> str:
    row, came = _row(scene, heard.code), len(heard.given)
    least, most = row.fds
    count = heard.payload.fd_count() if heard.payload is not None else None
    if count is not None and least != most:
        least = most = count
    if row.code is F.REM_MEM_REG:
        most = 0
    expected = least if least == most else f"{least} to {most}"
    return "" if least <= came <= most else f"{came} descriptors, expected {expected}"


def _gate(scene: Scene, heard: Heard) -> str:
    gate = FRONTEND[heard.code].gate
    for feature in gate.features:
        protocol = isinstance(feature, P)
        offered = scene.offered_protocol if protocol else scene.offered
        bits = offered if gate.offered else (scene.protocol if protocol else scene.features) or 0
        if not bits & feature.mask:
            return f"{feature.name} was not {'offered' if gate.offered else 'negotiated'}"
    return ""


_SENT = [
    F.GET_FEATURES, F.SET_FEATURES, F.SET_OWNER, F.SET_MEM_TABLE, F.SET_LOG_BASE, F.SET_VRING_NUM, F.SET_VRING_ADDR,
    F.SET_VRING_BASE, F.GET_VRING_BASE, F.SET_VRING_KICK, F.SET_VRING_CALL, F.SET_VRING_ERR, F.GET_PROTOCOL_FEATURES,
    F.SET_PROTOCOL_FEATURES, F.GET_QUEUE_NUM, F.SET_VRING_ENABLE, F.SET_BACKEND_REQ_FD, F.GET_CONFIG, F.SET_CONFIG,
    F.GET_INFLIGHT_FD, F.SET_INFLIGHT_FD, F.RESET_DEVICE, F.GET_MAX_MEM_SLOTS, F.ADD_MEM_REG, F.REM_MEM_REG,
    F.SET_STATUS, F.GET_STATUS,
]  # fmt: skip
"""Messages that the back-end of this suite brings a front-end to send."""

_WORDS = {
    F.SET_MEM_TABLE: "SET_MEM_TABLE has a descriptor for each of its regions.",
    F.SET_LOG_BASE: "SET_LOG_BASE has its one descriptor.",
    F.SET_VRING_KICK: "SET_VRING_KICK has one descriptor, or says in bit 8 that it has none.",
    F.SET_VRING_CALL: "SET_VRING_CALL has one descriptor, or says in bit 8 that it has none.",
    F.SET_VRING_ERR: "SET_VRING_ERR has one descriptor, or says in bit 8 that it has none.",
    F.SET_BACKEND_REQ_FD: "SET_BACKEND_REQ_FD has its one descriptor.",
    F.SET_INFLIGHT_FD: "SET_INFLIGHT_FD has its one descriptor.",
    F.ADD_MEM_REG: "ADD_MEM_REG has exactly one descriptor.",
    F.REM_MEM_REG: "REM_MEM_REG has no descriptor.",
}


def _add(theme: Rules, code: FrontendRequest, rule: str, objection: Callable[[Scene, Heard], str]) -> None:
    should = theme is FDS and code is F.REM_MEM_REG
    theme.message(spelt(code), rule, code, should=should)(objection)


for _code in _SENT:
    _add(SIZE, _code, f"{_code.name} has a payload of its size.", _size)
    if _code in _WORDS:
        _add(FDS, _code, _WORDS[_code], _fds)
    if FRONTEND[_code].gate.features:
        _add(GATE, _code, f"{_code.name} is sent only with its feature.", _gate)

_WITHOUT = tuple(code for code in _SENT if FRONTEND[code].fds == (0, 0) and code is not F.SET_LOG_BASE)
FDS.message("none", "A message that has no use for descriptors has none.", *_WITHOUT, section="Communication")(_fds)


_UNOFFERED = tuple(code for code in F if code not in _SENT and FRONTEND[code].gate.features)


@GATE.message("others", "No message is sent whose feature is not there.")
def others(scene: Scene, heard: Heard) -> str:
    return _gate(scene, heard) if heard.code in _UNOFFERED else ""
