"""Guest memory as it is told: whole tables, and slots that come and go.

What belongs here: regions, their files, and when they come. What does not: addresses of rings in them (``rings``).
"""

from __future__ import annotations

from collections.abc import Sequence

from vhostuser.conformance.frontend_cases.rules import Rules
from vhostuser.conformance.transcript import Heard, RegionSeen, Scene, overlap, same
from vhostuser.protocol import FrontendRequest, MemoryRegion, MemoryTable, SingleRegion

F = FrontendRequest
CASES = Rules("memory", "VHOST_USER_SET_MEM_TABLE")
SLOTS = Rules("slots", "VHOST_USER_ADD_MEM_REG")

_PAGE = 4096
_TOLD = (F.SET_MEM_TABLE, F.ADD_MEM_REG)


def _new(heard: Heard) -> list[RegionSeen]:
    match heard.payload:
        case MemoryTable(regions):
            given: list = [*heard.given, *[None] * len(regions)]  # type: ignore[type-arg]
            return [RegionSeen(*both) for both in zip(regions, given, strict=False)]
        case SingleRegion(region):
            return [RegionSeen(region, heard.given[0] if heard.given else None)]
    return []


def _whole(scene: Scene, heard: Heard) -> list[RegionSeen]:
    """All of memory after this message."""
    return _new(heard) if heard.code == F.SET_MEM_TABLE else scene.regions + _new(heard)


def _told(region: MemoryRegion) -> str:
    return f"region at guest {region.guest:#x}, {region.size:#x} bytes, user {region.user:#x}, file {region.offset:#x}"


def _clash(regions: Sequence[MemoryRegion], field: str) -> str:
    for number, one in enumerate(regions):
        for other in regions[:number]:
            if overlap((getattr(one, field), one.size), (getattr(other, field), other.size)):
                return f"{_told(one)} overlaps {_told(other)}"
    return ""


@CASES.message("guest-disjoint", "Regions do not overlap in guest addresses.", *_TOLD)
def guest_disjoint(scene: Scene, heard: Heard) -> str:
    return _clash([seen.region for seen in _whole(scene, heard)], "guest")


@CASES.message("user-disjoint", "Regions do not overlap in user addresses.", *_TOLD)
def user_disjoint(scene: Scene, heard: Heard) -> str:
    return _clash([seen.region for seen in _whole(scene, heard)], "user")


@CASES.message("not-empty", "Every region has a size.", *_TOLD)
def not_empty(_: Scene, heard: Heard) -> str:
    return next((_told(seen.region) for seen in _new(heard) if not seen.region.size), "")


@CASES.message("no-wrap", "No region reaches beyond the end of the address space.", *_TOLD)
def no_wrap(_: Scene, heard: Heard) -> str:
    for region, _given in _new(heard):
        if max(region.guest, region.user, region.offset) + region.size > 1 << 64:
            return _told(region)
    return ""


@CASES.message("aligned", "Addresses, sizes and offsets of regions are whole pages of 4096 bytes.", *_TOLD, should=True)
def aligned(_: Scene, heard: Heard) -> str:
    for region, _given in _new(heard):
        if any(number % _PAGE for number in (region.guest, region.size, region.user, region.offset)):
            return _told(region)
    return ""


@CASES.message("files", "The descriptors are files that can be mapped.", *_TOLD)
def files(_: Scene, heard: Heard) -> str:
    return next((f"a {given.kind}" for given in heard.given if not given.is_file), "")


@CASES.message("inside-file", "Every region lies inside its file.", *_TOLD)
def inside_file(_: Scene, heard: Heard) -> str:
    for region, given in _new(heard):
        if given is not None and given.is_file and region.offset + region.size > given.size:
            return f"{_told(region)}, in a file of {given.size:#x}"
    return ""


@CASES.message("before-addresses", "Memory is told before addresses of rings.", F.SET_VRING_ADDR, should=True,
               section="VHOST_USER_SET_MEM_TABLE")  # fmt: skip
def before_addresses(scene: Scene, _: Heard) -> str:
    return "" if scene.regions else "no memory was told yet"


@CASES.message("before-kick", "Memory is told before a ring is given its kick.", F.SET_VRING_KICK,
               section="VHOST_USER_SET_MEM_TABLE")  # fmt: skip
def before_kick(scene: Scene, _: Heard) -> str:
    return "" if scene.regions else "no memory was told yet"


@CASES.message("table-not-empty", "A table has a region at least.", F.SET_MEM_TABLE, should=True)
def table_not_empty(_: Scene, heard: Heard) -> str:
    return "" if _new(heard) else "an empty table"


@CASES.message("kept-for-rings", "Memory in which a running ring lies does not go away.", F.SET_MEM_TABLE,
               F.REM_MEM_REG, section="Suspended device state")  # fmt: skip
def kept_for_rings(scene: Scene, heard: Heard) -> str:
    if heard.code == F.REM_MEM_REG and isinstance(heard.payload, SingleRegion):
        gone = heard.payload.region
        left = [seen for seen in scene.regions if not same(seen.region, gone)]
    else:
        left = _new(heard)
    for index in scene.running:
        address = scene.rings[index].address
        held = address is None or any(seen.holds_user(address.desc, 1) for seen in left)
        if not held:
            return f"ring {index} lies in what goes"
    return ""


# ---- slots


@SLOTS.message("known", "Only regions that were added are removed: guest address, user address and size agree.",
               F.REM_MEM_REG)  # fmt: skip
def known(scene: Scene, heard: Heard) -> str:
    if not isinstance(heard.payload, SingleRegion):
        return ""
    region = heard.payload.region
    return "" if any(same(seen.region, region) for seen in scene.regions) else f"{_told(region)} is none of them"


@SLOTS.message("limit", "No more regions are added than GET_MAX_MEM_SLOTS has allowed.", F.ADD_MEM_REG)
def limit(scene: Scene, _: Heard) -> str:
    if scene.slots is None or len(scene.regions) < scene.slots:
        return ""
    return f"one more than {scene.slots} regions"


@SLOTS.message("asked-first", "GET_MAX_MEM_SLOTS comes before the first ADD_MEM_REG.", F.ADD_MEM_REG, should=True)
def asked_first(scene: Scene, _: Heard) -> str:
    return "" if scene.slots is not None else "before GET_MAX_MEM_SLOTS"


@SLOTS.message("one-way", "Memory is told by slots or by tables, not by both.", F.SET_MEM_TABLE, F.ADD_MEM_REG,
               should=True)  # fmt: skip
def one_way(scene: Scene, heard: Heard) -> str:
    other = F.ADD_MEM_REG if heard.code == F.SET_MEM_TABLE else F.SET_MEM_TABLE
    return f"after {other.name}" if scene.seen[other] else ""
