"""Layouts said again as data are those by which payloads are read: a slow reader of them finds every field."""

import sys
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.protocol.samples import PAYLOADS
from vhostuser.protocol import Payload, PostcopyAck
from vhostuser.protocol.layouts import Form, Part, parts


def read(found: Sequence[Part], data: bytes) -> tuple[dict[str, Any], bytes]:
    """Fields by name, and what is left."""
    values: dict[str, Any] = {}
    for number, part in enumerate(found):
        behind = sum(later.size or 0 for later in found[number + 1 :])
        taken, data = data[: part_size(part, data, behind)], data[part_size(part, data, behind) :]
        values |= one(part, taken)
    return values, data


def part_size(part: Part, data: bytes, behind: int) -> int:
    return len(data) - behind if part.size is None else part.size


def one(part: Part, data: bytes) -> dict[str, Any]:
    match part.form:
        case Form.NUMBER:
            return {part.name: int.from_bytes(data, sys.byteorder)}
        case Form.SIGNED:
            return {part.name: int.from_bytes(data, sys.byteorder, signed=True)}
        case Form.BYTES:
            return {part.name: data}
        case Form.INDEX:
            word = int.from_bytes(data, sys.byteorder)
            return {part.name: word & 0xFF, "has_fd": not word >> 8}
        case Form.GROUP:
            return {part.name: group(part, data)}
        case Form.PADDING:
            return {}


def group(part: Part, data: bytes) -> Any:
    found = []
    while data:
        values, data = read(part.parts, data)
        found.append(values.get("", values))
    return found[0] if part.times == 1 else found


def plain(value: Any) -> Any:
    if isinstance(value, Payload):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value)}  # type: ignore[arg-type]
    return [plain(item) for item in value] if isinstance(value, tuple) else value


@pytest.mark.parametrize("kind", [kind for kind in PAYLOADS if kind is not PostcopyAck], ids=lambda kind: kind.__name__)
@given(data=st.data())
def test_every_field_is_found(kind: type[Payload], data: st.DataObject) -> None:
    payload = data.draw(PAYLOADS[kind])
    values, left = read(parts(kind), payload.pack())
    assert left == b""
    wanted = plain(payload)
    assert {name: values[name] for name in wanted} == wanted
