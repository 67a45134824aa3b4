"""A dissector for Wireshark: what the catalog knows, as tables of Lua, and the code that reads them (dissector.lua).

What belongs here: saying the catalog in Lua. What does not: how packets are shown (dissector.lua), how they come
about (``pcapng``).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib.resources import files
from typing import Any, Final

from vhostuser.protocol import BACKEND, FRONTEND, U64, DeviceStatus, Payload, ProtocolFeature, Row, VirtioFeature
from vhostuser.protocol.layouts import Part, parts
from vhostuser.tools.trace.words import ADDRESSES, FLAGS, Flags

_HERE: Final = "--@catalog@\n"


def script() -> str:
    """The whole dissector."""
    code = files(__package__).joinpath("dissector.lua").read_text()
    return code.replace(_HERE, f"local catalog = {_lua(_catalog())}\n")


def _catalog() -> dict[str, Any]:
    rows = [*FRONTEND.values(), *BACKEND.values()]
    return {
        "messages": {"main": _messages(FRONTEND), "backend": _messages(BACKEND)},
        "layouts": {kind.__name__: _layout(kind) for row in rows for kind in _kinds(row)},
        "flags": {kind.__name__: _bits(kind) for kind in (VirtioFeature, ProtocolFeature, DeviceStatus)},
    }


def _messages(rows: Mapping[int, Row]) -> dict[int, Any]:
    return {number: _message(row) for number, row in rows.items()}


def _message(row: Row) -> dict[str, Any]:
    forms = [row, *(variant.row for variant in row.variants)]
    flags = FLAGS.get(row.code)
    return {
        "name": str(row),
        "clause": row.clause,
        "request": _names(kind for form in forms for kind in form.request),
        "reply": _names(kind for form in forms for kind in form.reply),
        **({"flags": flags.__name__} if flags else {}),
    }


def _names(kinds: Iterable[type[Payload]]) -> list[str]:
    return list(dict.fromkeys(kind.__name__ for kind in kinds))


def _kinds(row: Row) -> Iterable[type[Payload]]:
    yield U64
    for form in (row, *(variant.row for variant in row.variants)):
        yield from (*form.request, *form.reply)


def _layout(kind: type[Payload]) -> dict[str, Any]:
    sizes = kind.sizes
    return {"first": sizes[0], "last": sizes[-1], "step": sizes.step, "parts": [_part(part) for part in parts(kind)]}


def _part(part: Part) -> dict[str, Any]:
    found: dict[str, Any] = {"form": part.form.value, "name": part.name}
    if part.size is not None:
        found["size"] = part.size
    if part.name in ADDRESSES:
        found["hex"] = True
    if part.parts:
        found |= {"parts": [_part(inner) for inner in part.parts], "times": part.times or 0}
    return found


def _bits(kind: Flags) -> dict[int, str]:
    bits = {int(member).bit_length() - 1 if kind is DeviceStatus else int(member): member.name for member in kind}
    return {bit: str(name) for bit, name in bits.items()}


def _lua(value: Any, indent: str = "") -> str:
    """A value as Lua writes it."""
    inner = indent + "  "
    if isinstance(value, dict):
        entries = [f"{inner}[{_lua(name)}] = {_lua(item, inner)},\n" for name, item in value.items()]
        return "{\n" + "".join(entries) + indent + "}" if entries else "{}"
    if isinstance(value, list):
        return "{" + ", ".join(_lua(item, inner) for item in value) + "}"
    if isinstance(value, bool):
        return str(value).lower()
    return str(value) if isinstance(value, int) else '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
