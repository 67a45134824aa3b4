"""A payload in words: features by name, addresses in hex, sizes that can be read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, Final, TypeAlias

from vhostuser.protocol import (
    U64,
    DeviceStatus,
    Empty,
    FrontendRequest,
    Payload,
    ProtocolFeature,
    VirtioFeature,
    feature_names,
)
from vhostuser.protocol.witness import Message
from vhostuser.tools.trace.events import Descriptor

F = FrontendRequest
Flags: TypeAlias = type[VirtioFeature] | type[ProtocolFeature] | type[DeviceStatus]
FLAGS: Final[Mapping[object, Flags]] = {
    F.GET_FEATURES: VirtioFeature,
    F.SET_FEATURES: VirtioFeature,
    F.GET_PROTOCOL_FEATURES: ProtocolFeature,
    F.SET_PROTOCOL_FEATURES: ProtocolFeature,
    F.GET_STATUS: DeviceStatus,
    F.SET_STATUS: DeviceStatus,
}
"""What the u64 of these messages has for bits."""

ADDRESSES: Final = frozenset({"guest", "user", "desc", "used", "avail", "log", "iova"})
"""Fields of payloads that are shown in hex."""

_SIZES: Final = frozenset({"size", "mmap_size", "length"})
_SHOWN_BYTES: Final = 24


def words(message: Message) -> str:
    """What the payload says; a body that fits no layout in hex, empty for an empty one."""
    payload = message.payload
    if payload is None:
        return _hex(message.body)
    if isinstance(payload, U64):
        return _number(message, payload.value)
    return "" if isinstance(payload, Empty) else _fields(payload)


def _number(message: Message, value: int) -> str:
    row = message.row
    # An acknowledgement says nothing about features, whatever the request was about.
    acknowledges = message.answers is not None and row is not None and not row.reply
    code = row.code if row else None
    kind = FLAGS.get(code) if isinstance(code, F) and not acknowledges else None
    return f"{value:#x} {_flags(kind, value)}" if kind else str(value) if value < 1 << 16 else f"{value:#x}"


def _flags(kind: Flags, value: int) -> str:
    if issubclass(kind, DeviceStatus):
        return (DeviceStatus(value & 0xFF).name or "none").replace("|", " ")
    return feature_names(value, kind)


def _fields(payload: Payload) -> str:
    return ", ".join(filter(None, (_field(item.name, getattr(payload, item.name)) for item in fields(payload))))  # type: ignore[arg-type]


def _field(name: str, value: Any) -> str:
    if name == "has_fd":
        return "" if value else "no descriptor"
    if isinstance(value, bytes):
        return f"{name} {_hex(value)}"
    if isinstance(value, tuple):
        return "; ".join(f"[{position}] {_inner(item)}" for position, item in enumerate(value)) or f"no {name}"
    if isinstance(value, Payload):
        return _fields(value)
    if name in ADDRESSES:
        return f"{name} {value:#x}"
    return f"{name} {size(value)}" if name in _SIZES else f"{name} {value}"


def _inner(value: Any) -> str:
    return _fields(value) if isinstance(value, Payload) else str(value)


def _hex(data: bytes) -> str:
    return data[:_SHOWN_BYTES].hex() + (f"... ({len(data)} bytes)" if len(data) > _SHOWN_BYTES else "")


def size(count: int) -> str:
    """Bytes, in the largest unit that divides them."""
    for shift, unit in ((30, "GiB"), (20, "MiB"), (10, "KiB")):
        if count and not count & ((1 << shift) - 1):
            return f"{count >> shift} {unit}"
    return f"{count} B"


def descriptor(what: Descriptor) -> str:
    """One passed descriptor."""
    return " ".join(filter(None, (what.kind, size(what.size) if what.size >= 0 else "", what.detail)))


def duration(nanoseconds: int) -> str:
    """Microseconds, milliseconds or seconds: the coarsest unit that leaves at least ten of it."""
    for unit, name in ((1000, "us"), (10**6, "ms")):
        if nanoseconds < unit * 10_000:
            return f"{nanoseconds // unit} {name}"
    return f"{nanoseconds / 10**9:.1f} s"
