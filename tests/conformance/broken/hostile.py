"""What no driver puts into a ring."""

from __future__ import annotations

from typing import Any

from tests.conformance.broken.registry import FAULTS, Fault, crash, fault
from vhostuser._native import lib
from vhostuser.lifecycle import Lifecycle
from vhostuser.protocol import (
    FrontendRequest,
)
from vhostuser.ring import Ring

F = FrontendRequest


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
