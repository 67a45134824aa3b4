"""The catalog as Markdown: docs/messages.md. What belongs here: how a row is shown. What does not: what it says."""

from collections.abc import Iterable
from typing import Final

from vhostuser.protocol.catalog import BACKEND, FRONTEND, Row, size_words
from vhostuser.protocol.codes import ProtocolFeature
from vhostuser.protocol.payloads import Payload


def table() -> str:
    """The page, which a test keeps equal to this."""
    sections = [
        _TABLE_HEAD,
        _section("Requests of the front-end", FRONTEND.values()),
        _section("Requests of the back-end", BACKEND.values()),
        _features(),
    ]
    return "\n".join(sections)


_TABLE_HEAD: Final = """\
# Messages

Generated from the catalog in `protocol/catalog.py`; edit that, not this.

Sizes are bytes of the payload, after the header of twelve. *Descriptors* are those in the ancillary data. A message
without a reply of its own is acknowledged by a u64 (0 done, anything else refused) where its sender set need_reply
and REPLY_ACK was negotiated. *Needs*: a feature in brackets need only be offered, the others must be negotiated.

*Refused* says how a request that is well-formed and cannot be fulfilled is turned down. "nack" is the acknowledgement
with a value other than 0; where none was asked for, the connection is closed ("or close"), or, if nothing depends on
the message, nothing is sent ("or silence"). Requests that are malformed, unknown or lack their feature always close
the connection; the last two send a nack first, where one was asked for.
"""


def _section(title: str, rows: Iterable[Row]) -> str:
    head = "| id | message | payload | descriptors | reply | needs | refused | served | notes |"
    lines = [f"## {title}", "", head, "|---" * head.count(" |") + "|"]
    for row in sorted(rows, key=lambda row: row.code or 255):
        lines.append(_line(row, str(row.code or "5, 37, 38, 0"), f"{row.code.name}: {row.code.note}"))
        lines += [_line(variant.row, "", f"... {variant.when.value}") for variant in row.variants]
    return "\n".join([*lines, ""])


def _line(row: Row, number: str, name: str) -> str:
    needs = ", ".join(f"({f.name})" if row.gate.offered else f.name for f in row.gate.features)
    nack = "nack, or silence" if row.silent else "nack, or close"
    cells = (
        number,
        name,
        _kinds(row.request),
        _span(row.fds),
        f"{_kinds(row.reply)}, descriptors {_span(row.reply_fds)}" if row.reply else "",
        needs,
        row.refusal.words if row.refusal else "close" if row.reply else nack,
        _served(row),
        row.note,
    )
    return "| " + " | ".join(cells) + " |"


def _served(row: Row) -> str:
    if row.unserved:
        return f"no: {row.unserved}"
    return f"yes, by devices with `{row.hook}`" if row.hook else "yes"


def _kinds(kinds: tuple[type[Payload], ...]) -> str:
    return " or ".join(f"{kind.__name__} {size_words(kind.sizes)}" for kind in kinds)


def _span(bounds: tuple[int, int]) -> str:
    least, most = bounds
    return str(most) if least == most else f"{least} to {most}"


def _features() -> str:
    lines = ["## Protocol features", "", "| bit | name | meaning |", "|---|---|---|"]
    lines += [f"| {int(feature)} | {feature.name} | {feature.note} |" for feature in ProtocolFeature]
    return "\n".join([*lines, ""])
