"""Rules about rings, tried once more on a packed one.

What belongs here: which cases have such a twin, and which mean something only in a split ring. What does not: rules
that packed rings alone have (``packed``), how a case writes into a ring of either format (``bytewise``).

A theme's cases that need a ring have twins without being asked. What a case reads or writes in the ring by itself goes
through ``Lane.bytes`` then, or it is listed here.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from enum import Enum
from fnmatch import fnmatchcase

from vhostuser.conformance.bench import Need
from vhostuser.conformance.peer import Peer
from vhostuser.conformance.suite import Case, Theme
from vhostuser.protocol import VirtioFeature

PREFIX = "packed."
_ON_RINGS = {Need.RINGS, Need.BOTH_RINGS, Need.BLK, Need.WRITABLE, Need.NET, Need.LOOP, Need.TWO_PAIRS}
_SPLIT_ALONE = {
    "setup.nakce": "a packed ring's first wrap counter is 1, so without a base it begins nowhere",
    "setup.reset-by-driver": "there is no index in a packed ring that a back-end could have remembered",
    "call.on-empty*": "legacy drivers have no packed rings",
    "base.wrap": "indexes of 16 bits; see packed.wrap",
    "base.set": "heads in the available ring; see packed.base-place",
    "split.order-of-table": "descriptors of a packed chain follow each other",
    "split.link-ignored": "a packed descriptor has no link",
    "split.indirect-after-direct": "a packed chain is direct or one table",
    "hostile.head-*": "a buffer id is the driver's alone",
    "hostile.next-outside": "a packed descriptor has no link",
    "hostile.loop": "a packed descriptor has no link; hostile.loop-of-one is a chain longer than the ring",
    "hostile.index-*": "a packed ring has no index",
    "hostile.indirect-loop": "NEXT means nothing in a packed ring's table",
    "hostile.indirect-link-outside": "NEXT means nothing in a packed ring's table",
    "hostile.control-kept": "breaks the ring by a head; see packed.control-kept",
    "hostile.recovers": "breaks the ring by a head; see packed.recovers",
    "hostile.reported": "breaks the ring by a head; see packed.reported",
    "address.avail-over-the-end": "an event suppression structure of four bytes cannot lie across the end",
    "address.used-over-the-end": "an event suppression structure of four bytes cannot lie across the end",
    "log.used-elsewhere": "what is marked of a packed ring is where the ring is, whatever log address there is",
    "net.transmit.indirect-behind": "a packed chain is direct or one table",
    "net.header.*": "what is in a frame does not depend on the ring, and legacy devices have no packed ones",
    "net.frame.*": "what is in a frame does not depend on the ring",
    "net.postcopy.*": "they are not about what is in the ring",
    "features.*": "they are not about what is in the ring",
    "blk.*": "what a disk makes of a request does not depend on how it came",
}
"""Patterns of ids, and why they are about split rings alone."""


def twins(*themes: Theme[Peer]) -> list[Case[Peer]]:
    """The twins of what these themes say of rings."""
    return [_twin(case) for theme in themes for case in theme.cases if has_twin(case)]


def has_twin(case: Case[Peer]) -> bool:
    """Is this a rule for rings of both formats?"""
    return bool(_ON_RINGS & set(case.needs)) and not any(fnmatchcase(case.id, pattern) for pattern in _SPLIT_ALONE)


def twin_id(case_id: str) -> str:
    """What the twin of this case is called."""
    return PREFIX + case_id.removeprefix("split.")


def _twin(case: Case[Peer]) -> Case[Peer]:
    async def run(peer: Peer) -> None:
        peer.packed = True
        await case.run(peer)

    needs: Iterable[Enum] = (*case.needs, VirtioFeature.RING_PACKED)
    section = case.section.replace("Split", "Packed")
    return replace(case, id=twin_id(case.id), section=section, rule=f"Packed: {case.rule}", needs=tuple(needs), run=run)
