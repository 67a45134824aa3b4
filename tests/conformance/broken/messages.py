"""Messages whose size, descriptors or features nobody looks at, and what is acknowledged wrongly; row by row.

What belongs here: faults of the cases that are made from the rows of the catalog. They come by the shape of the
payload, since that is what a parser is written for.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from tests.conformance.broken.everything import find_everything, offer_everything
from tests.conformance.broken.registry import FAULTS, F, Fault, answering, fault, handling
from vhostuser.connection import HANDLERS
from vhostuser.protocol import (
    U64,
    BackendSession,
    Config,
    DeviceStateTransfer,
    Empty,
    Header,
    Inflight,
    Iotlb,
    Log,
    MemoryTable,
    Outgoing,
    Payload,
    ProtocolFeature,
    Request,
    Row,
    SingleRegion,
    VringAddress,
    VringFd,
    VringState,
    exchange,
)
from vhostuser.protocol.state import State
from vhostuser.transfer import StateTransfer

P = ProtocolFeature

# ---- sizes


def lax(kind: type[Payload], left: int, filler: bytes = b"") -> None:
    """Has payloads of this kind read whatever their size, cut off or filled up to the next one that is legal.

    left: 1 to ignore what is too much, -1 to find ``filler`` where something is missing.
    """
    check, unpack = exchange._check_size, exchange._unpack

    def check_size(row: Row, size: int, kinds: Iterable[type[Payload]]) -> None:
        if kind not in row.request:
            check(row, size, tuple(kinds))

    def read(row: Row, kinds: tuple[type[Payload], ...], frame: Any) -> Payload:
        if kind in kinds:
            frame = frame._replace(body=_fitted(kind, frame.body, left, filler))
        return unpack(row, kinds, frame)

    exchange._check_size, exchange._unpack = check_size, read  # type: ignore[assignment]


def _fitted(kind: type[Payload], body: bytes, left: int, filler: bytes) -> bytes:
    wanted = _said(kind, body)
    if (len(body) - wanted) * left <= 0:
        return body
    return body[:wanted] if left > 0 else body + filler.ljust(wanted - len(body), b"\0")


def _said(kind: type[Payload], body: bytes) -> int:
    """The size that the payload ought to have by what it says itself."""
    if kind is Config:
        return 12 + int.from_bytes(body[4:8], "little")
    if kind is MemoryTable:
        return 8 + 32 * int.from_bytes(body[:4], "little")
    return kind.sizes[0]


def _lax(name: str, kind: type[Payload], left: int, *rows: str, filler: bytes = b"") -> None:
    def patch() -> None:
        offer_everything()
        find_everything()
        lax(kind, left, filler)

    size = "short" if left < 0 else "long"
    FAULTS[f"reads_{size}_{name}"] = Fault(patch, tuple(f"message.{size}.{row}" for row in rows))


_NUMBERS = ("set-features", "set-protocol-features", "set-status")
_RINGS = ("set-vring-num", "set-vring-base", "get-vring-base", "set-vring-enable")
_EVENTS = ("set-vring-kick", "set-vring-call", "set-vring-err")
_INFLIGHT = ("get-inflight-fd", "set-inflight-fd")
_SPACE = ("get-config", "set-config")
_SLOTS = ("add-mem-reg", "rem-mem-reg")

_lax("numbers", U64, -1, *_NUMBERS, "send-rarp", "net-set-mtu", "close-crypto-session")
# Where a size is missing there was another one before.
_lax("ring_states", VringState, -1, *_RINGS, "vring-kick", filler=b"\1")
_lax("byte_orders", VringState, -1, "set-vring-endian")
_lax("events", VringFd, -1, *_EVENTS)
_lax("addresses", VringAddress, -1, "set-vring-addr")
_lax("logs", Log, -1, "set-log-base")
_lax("tables", MemoryTable, -1, "set-mem-table")
_lax("regions", SingleRegion, -1, *_SLOTS)
_lax("spaces", Config, -1, *_SPACE)
_lax("buffers", Inflight, -1, *_INFLIGHT)
_lax("translations", Iotlb, -1, "iotlb-msg")
_lax("transfers", DeviceStateTransfer, -1, "set-device-state-fd")

_lax("numbers", U64, 1, *_NUMBERS)
_lax("ring_states", VringState, 1, *_RINGS)
_lax("events", VringFd, 1, *_EVENTS)
_lax("addresses", VringAddress, 1, "set-vring-addr")
_lax("logs", Log, 1, "set-log-base")
_lax("tables", MemoryTable, 1, "set-mem-table")
_lax("regions", SingleRegion, 1, *_SLOTS)
_lax("spaces", Config, 1, *_SPACE)
_lax("buffers", Inflight, 1, *_INFLIGHT)
_lax("transfers", DeviceStateTransfer, 1, "set-device-state-fd")


@fault("framing.size-over")
def ignores_payload_where_there_is_none() -> None:
    lax(Empty, 1)


# ---- descriptors


def _acknowledges_without(*codes: F) -> None:
    """Has these messages done as if their descriptor were not needed."""
    check = exchange._check_fds

    def check_fds(row: Row, count: int, bounds: tuple[int, int], *error: Any) -> None:
        if count or error or row.code not in codes:
            check(row, count, bounds, *error)

    exchange._check_fds = check_fds  # type: ignore[assignment]

    async def change(connection: Any, request: Request, right: Any) -> Any:
        return await right(connection, request) if len(request.fds) else None

    for code in codes:
        if code in HANDLERS:
            handling(code, change)


@fault(*(f"message.no-descriptor.{row}" for row in _EVENTS))
def misses_no_event() -> None:
    _acknowledges_without(F.SET_VRING_KICK, F.SET_VRING_CALL, F.SET_VRING_ERR)


@fault("message.no-descriptor.set-mem-table", "message.no-descriptor.add-mem-reg")
def misses_no_memory() -> None:
    _acknowledges_without(F.SET_MEM_TABLE, F.ADD_MEM_REG)


@fault("message.no-descriptor.set-log-base", "message.no-descriptor.set-log-fd")
def misses_no_log() -> None:
    _acknowledges_without(F.SET_LOG_BASE, F.SET_LOG_FD)


@fault("message.no-descriptor.set-inflight-fd", "message.no-descriptor.set-backend-req-fd")
def misses_no_buffer_and_no_channel() -> None:
    _acknowledges_without(F.SET_INFLIGHT_FD, F.SET_BACKEND_REQ_FD)


@fault("message.no-descriptor.set-device-state-fd")
def misses_no_pipe() -> None:
    offer_everything()
    _acknowledges_without(F.SET_DEVICE_STATE_FD)


# ---- features


@fault(
    *(f"message.ungated.{row}" for row in (*_SPACE, *_INFLIGHT, *_SLOTS, "get-max-mem-slots")),
)
def asks_for_no_feature() -> None:
    State.missing = lambda state, gate: ""  # type: ignore[method-assign]


@fault(
    *(f"message.ungated.{row}" for row in ("set-vring-endian", "create-crypto-session", "close-crypto-session")),
    *(f"message.ungated.{row}" for row in ("vring-kick", "set-status", "get-status", "get-shared-object")),
    *(f"message.ungated.{row}" for row in ("set-device-state-fd", "check-device-state", "get-shmem-config")),
)
def asks_only_what_it_offers() -> None:
    offer_everything()
    find_everything()
    right, checked = State.missing, StateTransfer.check

    async def check(transfer: StateTransfer) -> None:
        if transfer._failure is not None:  # else ours refuses for another reason than the one that is tried
            await checked(transfer)

    StateTransfer.check = check  # type: ignore[method-assign]

    def missing(state: State, gate: Any) -> str:
        known = {P.CONFIG, P.INFLIGHT_SHMFD, P.CONFIGURE_MEM_SLOTS}
        return right(state, gate) if known & set(gate.features) else right(state, gate._replace(offered=True))

    State.missing = missing  # type: ignore[method-assign]


# ---- acknowledgements


def _acknowledges_emptily(name: str, *rows: str) -> None:
    """With the header alone, which some front-ends take for a yes."""
    codes = {F[row.upper().replace("-", "_")] for row in rows}

    def change(_: BackendSession, request: Any, answer: Outgoing | None) -> Outgoing | None:
        if answer is None or request.code not in codes or request.row.reply:
            return answer
        return Outgoing(Header(request.code, 5, 0).pack())

    def patch() -> None:
        offer_everything()
        answering(change)

    FAULTS[f"acknowledges_{name}_emptily"] = Fault(patch, tuple(f"message.acknowledged.{row}" for row in rows))


_acknowledges_emptily("rings", "set-vring-num", "set-vring-base", "set-vring-addr", "set-vring-enable")
_acknowledges_emptily("events", *_EVENTS)
_acknowledges_emptily("features", "set-features", "set-protocol-features")
_acknowledges_emptily("owners", "set-owner", "reset-owner")
_acknowledges_emptily("memory", "set-mem-table", *_SLOTS)
_acknowledges_emptily("descriptors", "set-inflight-fd", "set-backend-req-fd", "gpu-set-socket", "set-log-fd")
_acknowledges_emptily("network", "send-rarp", "net-set-mtu", "set-vring-endian")
_acknowledges_emptily("devices", "set-status", "reset-device", "vring-kick", "close-crypto-session", "set-config")
