"""Rings: what is said of them before they run, while they run, and when they are to stop.

What belongs here: the messages about rings and their order. What does not: what lies in the rings.
"""

from __future__ import annotations

from vhostuser.conformance.frontend_cases.rules import Rules
from vhostuser.conformance.transcript import Heard, RingSeen, Scene, Transcript, overlap
from vhostuser.protocol import VHOST_VRING_F_LOG, FrontendRequest, VirtioFeature, VringAddress, VringFd, VringState

F, V = FrontendRequest, VirtioFeature
CASES = Rules("ring", "Vring state description")
ORDER = Rules("ring-order", "Ring states")
ADDRESS = Rules("address", "VHOST_USER_SET_VRING_ADDR")
EVENT = Rules("event", "VHOST_USER_SET_VRING_KICK")

_LARGEST = 32768
_OF_RINGS = (
    F.SET_VRING_NUM, F.SET_VRING_ADDR, F.SET_VRING_BASE, F.GET_VRING_BASE, F.SET_VRING_KICK, F.SET_VRING_CALL,
    F.SET_VRING_ERR, F.SET_VRING_ENABLE,
)  # fmt: skip


def _ring(scene: Scene, heard: Heard) -> tuple[int, RingSeen]:
    index = getattr(heard.payload, "index", 0)
    return index, scene.rings.get(index, RingSeen())


def _num(heard: Heard) -> int:
    return heard.payload.num if isinstance(heard.payload, VringState) else 0


# ---- values


@CASES.message("index", "No ring is named that the device does not have.", *_OF_RINGS, section="Multiple queue support")
def index(scene: Scene, heard: Heard) -> str:
    number, _ = _ring(scene, heard)
    return "" if number < scene.queues else f"ring {number}, the device has {scene.queues}"


@CASES.message("size", "A ring has 1 to 32768 entries.", F.SET_VRING_NUM)
def size(_: Scene, heard: Heard) -> str:
    return "" if 0 < _num(heard) <= _LARGEST else f"{_num(heard)} entries"


@CASES.message("power-of-two", "The size of a split ring is a power of two.", F.SET_VRING_NUM)
def power_of_two(scene: Scene, heard: Heard) -> str:
    number = _num(heard)
    return f"{number} entries" if number & (number - 1) and not scene.has(V.RING_PACKED) else ""


@CASES.message("base", "The base of a split ring has 16 bits.", F.SET_VRING_BASE)
def base(scene: Scene, heard: Heard) -> str:
    return f"base {_num(heard):#x}" if _num(heard) > 0xFFFF and not scene.has(V.RING_PACKED) else ""


@CASES.message("stop-reserved", "The number in GET_VRING_BASE is zero.", F.GET_VRING_BASE)
def stop_reserved(_: Scene, heard: Heard) -> str:
    return f"{_num(heard):#x}" if _num(heard) else ""


@CASES.message("enable-number", "A ring is enabled by 1 and disabled by 0.", F.SET_VRING_ENABLE)
def enable_number(_: Scene, heard: Heard) -> str:
    return "" if _num(heard) in (0, 1) else f"{_num(heard)}"


# ---- order


@ORDER.message("size-before-kick", "A ring has its size before its kick.", F.SET_VRING_KICK, section="Ring states")
def size_before_kick(scene: Scene, heard: Heard) -> str:
    number, ring = _ring(scene, heard)
    return "" if ring.size else f"ring {number} has no size"


@ORDER.message("address-before-kick", "A ring has its addresses before its kick.", F.SET_VRING_KICK,
               section="Ring states")  # fmt: skip
def address_before_kick(scene: Scene, heard: Heard) -> str:
    number, ring = _ring(scene, heard)
    return "" if ring.address else f"ring {number} has no addresses"


@ORDER.message("base-before-kick", "A ring has its base before its kick.", F.SET_VRING_KICK, should=True,
               section="Ring states")  # fmt: skip
def base_before_kick(scene: Scene, heard: Heard) -> str:
    number, ring = _ring(scene, heard)
    return f"ring {number} has no base" if ring.base is None else ""


@ORDER.message("size-before-address", "A ring has its size before its addresses, which are judged by it.",
               F.SET_VRING_ADDR, should=True)  # fmt: skip
def size_before_address(scene: Scene, heard: Heard) -> str:
    number, ring = _ring(scene, heard)
    return "" if ring.size else f"ring {number} has no size"


@ORDER.message("still-size", "The size of a ring is not changed while it runs.", F.SET_VRING_NUM)
def still_size(scene: Scene, heard: Heard) -> str:
    number, ring = _ring(scene, heard)
    return f"ring {number} runs" if ring.armed and ring.size != _num(heard) else ""


@ORDER.message("still-base", "The base of a ring is not set while it runs.", F.SET_VRING_BASE)
def still_base(scene: Scene, heard: Heard) -> str:
    number, ring = _ring(scene, heard)
    return f"ring {number} runs" if ring.armed else ""


@ORDER.message("still-address", "A running ring keeps its addresses; only logging is switched.", F.SET_VRING_ADDR)
def still_address(scene: Scene, heard: Heard) -> str:
    number, ring = _ring(scene, heard)
    new, old = heard.payload, ring.address
    if not ring.armed or not isinstance(new, VringAddress) or old is None:
        return ""
    moved = (new.desc, new.used, new.avail) != (old.desc, old.used, old.avail)
    return f"ring {number} runs" if moved else ""


@ORDER.connection("enabled", "Where PROTOCOL_FEATURES was negotiated, a ring that is given a kick is enabled too.",
                  section="VHOST_USER_SET_VRING_ENABLE")  # fmt: skip
def enabled(connection: Transcript) -> str | None:
    scene, armed, switched = connection.now, set(), set()
    if not scene.has(V.PROTOCOL_FEATURES):
        return None
    for heard in connection.heard:
        number = getattr(heard.payload, "index", 0)
        if heard.code == F.SET_VRING_KICK:
            armed.add(number)
        elif heard.code == F.SET_VRING_ENABLE and _num(heard):
            switched.add(number)
    left = armed - switched
    if not armed or connection.cut:
        return None
    return f"rings {sorted(left)} never enabled" if left else ""


@ORDER.connection("stopped", "Every ring is stopped by GET_VRING_BASE before the connection is closed.", should=True,
                  section="VHOST_USER_GET_VRING_BASE")  # fmt: skip
def stopped(connection: Transcript) -> str | None:
    if not connection.ended or not connection.ready:
        return None
    left = connection.now.running
    return f"rings {left} were never stopped" if left else ""


# ---- addresses


def _parts(heard: Heard, ring: RingSeen) -> dict[str, tuple[int, int]]:
    """The parts of a split ring: user address and bytes of each."""
    address = heard.payload
    if not isinstance(address, VringAddress):
        return {}
    entries = ring.size or 1
    return {
        "descriptor table": (address.desc, 16 * entries),
        "available ring": (address.avail, 4 + 2 * entries),
        "used ring": (address.used, 4 + 8 * entries),
    }


def _split(scene: Scene) -> bool:
    return not scene.has(V.RING_PACKED) and not scene.has(V.ACCESS_PLATFORM)


@ADDRESS.message("inside", "All parts of a ring lie in memory that was told.", F.SET_VRING_ADDR)
def inside(scene: Scene, heard: Heard) -> str:
    number, ring = _ring(scene, heard)
    if not _split(scene) or not scene.regions:
        return ""
    for name, (start, length) in _parts(heard, ring).items():
        if not any(seen.holds_user(start, length) for seen in scene.regions):
            return f"{name} of ring {number} at {start:#x}, {length} bytes, is in no region"
    return ""


@ADDRESS.message("aligned", "The parts of a split ring are aligned: 16 bytes, 2 and 4.", F.SET_VRING_ADDR)
def aligned(scene: Scene, heard: Heard) -> str:
    if not _split(scene):
        return ""
    for (name, (start, _)), unit in zip(_parts(heard, RingSeen()).items(), (16, 2, 4), strict=False):
        if start % unit:
            return f"{name} at {start:#x}"
    return ""


@ADDRESS.message("disjoint", "The parts of a ring do not overlap.", F.SET_VRING_ADDR)
def disjoint(scene: Scene, heard: Heard) -> str:
    if not _split(scene):
        return ""
    parts = list(_parts(heard, _ring(scene, heard)[1]).items())
    for number, (name, one) in enumerate(parts):
        for other_name, other in parts[:number]:
            if overlap(one, other):
                return f"the {name} lies in the {other_name}"
    return ""


@ADDRESS.message("other-rings", "Rings do not lie in each other.", F.SET_VRING_ADDR)
def other_rings(scene: Scene, heard: Heard) -> str:
    number, mine = _ring(scene, heard)
    for other, ring in scene.rings.items():
        if other == number or ring.address is None:
            continue
        theirs = {"desc": (ring.address.desc, 16 * (ring.size or 1))}
        if any(overlap(part, theirs["desc"]) for part in _parts(heard, mine).values()):
            return f"ring {number} lies in the descriptor table of ring {other}"
    return ""


@ADDRESS.message("flags", "No flag is set but the one for logging.", F.SET_VRING_ADDR)
def flags(_: Scene, heard: Heard) -> str:
    value = heard.payload.flags if isinstance(heard.payload, VringAddress) else 0
    return f"flags {value:#x}" if value & ~VHOST_VRING_F_LOG else ""


# ---- events


def _descriptor(heard: Heard) -> str:
    return next((f"a {given.kind}" for given in heard.given if given.kind not in ("eventfd", "pipe", "fifo")), "")


@EVENT.message("kick-kind", "A ring's kicks come through an eventfd or a pipe.", F.SET_VRING_KICK)
def kick_kind(_: Scene, heard: Heard) -> str:
    return _descriptor(heard)


@EVENT.message("call-kind", "The driver is called through an eventfd or a pipe.", F.SET_VRING_CALL)
def call_kind(_: Scene, heard: Heard) -> str:
    return _descriptor(heard)


@EVENT.message("err-kind", "Errors are reported through an eventfd or a pipe.", F.SET_VRING_ERR)
def err_kind(_: Scene, heard: Heard) -> str:
    return _descriptor(heard)


@EVENT.message("reserved-bits", "Bits 9 to 63 of the word are zero.", F.SET_VRING_KICK, F.SET_VRING_CALL,
               F.SET_VRING_ERR)  # fmt: skip
def reserved_bits(_: Scene, heard: Heard) -> str:
    word = int.from_bytes(heard.message.body[:8], "little")
    return f"{word:#x}" if word >> 9 else ""


@EVENT.message("own-kick", "No two rings share a kick.", F.SET_VRING_KICK)
def own_kick(scene: Scene, heard: Heard) -> str:
    number, _ = _ring(scene, heard)
    for other, given in scene.kicks.items():
        if other != number and heard.given and given == heard.given[0]:
            return f"rings {other} and {number} have the same"
    return ""


@EVENT.connection("called", "A ring that runs has a call, or says that its driver polls.", should=True,
                  section="VHOST_USER_SET_VRING_CALL")  # fmt: skip
def called(connection: Transcript) -> str | None:
    if not connection.ready:
        return None
    told = {h.payload.index for h in connection.heard if h.code == F.SET_VRING_CALL and isinstance(h.payload, VringFd)}
    left = connection.ready - told
    return f"no SET_VRING_CALL for rings {sorted(left)}" if left else ""
