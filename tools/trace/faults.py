"""Faults on purpose: which messages are to be delayed, robbed, corrupted or never to arrive.

What belongs here: the options' syntax, and what is to become of a message. What does not: doing it to a socket
(``relay``).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Final

from vhostuser.protocol import BACKEND, FRONTEND, HEADER_SIZE, Header
from vhostuser.protocol.witness import Wire

_NAMES: Final = {
    wire: {number: str(row) for number, row in rows.items()}
    for wire, rows in ((Wire.MAIN, FRONTEND), (Wire.BACKEND, BACKEND))
}
_REPLY: Final = ".reply"
_ANY: Final = "any"


class Kind(Enum):
    """What is done, by the option that asks for it."""

    DELAY = "delay"
    DROP_FD = "drop-fd"
    CORRUPT = "corrupt"
    KILL_AFTER = "kill-after"


class FaultError(ValueError):
    """The option says nothing that can be done; one line."""


@dataclass(frozen=True, slots=True)
class Fault:
    """One option. message: a name, with ".reply" for its answer, or "any". least: not before so many messages."""

    kind: Kind
    message: str = _ANY
    seconds: float = 0.0
    least: int = 0


@dataclass(frozen=True, slots=True)
class Plan:
    """What becomes of one message. delay: seconds. kill: hang up behind it."""

    delay: float = 0.0
    drop: bool = False
    corrupt: bool = False
    kill: bool = False

    def corrupted(self, data: bytes) -> bytes:
        """`data`, the beginning of a message: where asked for, the payload's first byte inverted, or the version."""
        if not self.corrupt:
            return data
        where = HEADER_SIZE if len(data) > HEADER_SIZE else 4
        return data[:where] + bytes([data[where] ^ 0xFF]) + data[where + 1 :]

    @property
    def words(self) -> tuple[str, ...]:
        """What is done on purpose."""
        delay = (f"delayed by {self.delay * 1000:g} ms",) if self.delay else ()
        return delay + ("descriptors dropped",) * self.drop + ("corrupted",) * self.corrupt


NOTHING: Final = Plan()


class Faults:
    """All that are asked for, on one connection. Counts its messages."""

    def __init__(self, faults: Sequence[Fault] = ()) -> None:
        self._faults = faults
        self._count = 0

    def plan(self, wire: Wire, header: Header, *, request: bool) -> Plan:
        """What becomes of the next message."""
        self._count += 1
        if not self._faults:
            return NOTHING
        name = _NAMES[wire].get(header.request, f"request {header.request}") + ("" if request else _REPLY)
        hit = [fault for fault in self._faults if fault.message in (_ANY, name) and self._count >= fault.least]
        kinds = {fault.kind for fault in hit}
        return Plan(
            sum(fault.seconds for fault in hit), Kind.DROP_FD in kinds, Kind.CORRUPT in kinds, Kind.KILL_AFTER in kinds
        )


def parse(kind: Kind, text: str) -> Fault:
    """The fault that an option's value asks for: NAME; for delay MS or MS@NAME; for kill-after NAME or a number.

    Raises FaultError.
    """
    if kind is Kind.DELAY:
        amount, _, name = text.partition("@")
        if not re.fullmatch(r"\d+(\.\d+)?", amount):
            raise FaultError(f"{text!r} is not MILLISECONDS or MILLISECONDS@MESSAGE")
        return Fault(kind, _known(name) if name else _ANY, seconds=float(amount) / 1000)
    if kind is Kind.KILL_AFTER and text.isdecimal():
        return Fault(kind, least=int(text))
    return Fault(kind, _known(text))


def _known(name: str) -> str:
    if name != _ANY and not any(name.removesuffix(_REPLY) in names.values() for names in _NAMES.values()):
        raise FaultError(f"there is no message {name!r}; the names are those of docs/messages.md, with {_REPLY} behind")
    return name
