"""Configuration space, dirty log, in-flight buffer and device status.

What belongs here: messages about the device as a whole. What does not: rings, memory.
"""

from __future__ import annotations

from vhostuser.conformance.frontend_cases.rules import Rules
from vhostuser.conformance.stage import FrontendBench
from vhostuser.conformance.suite import Skipped, check
from vhostuser.conformance.transcript import Heard, Scene, Transcript
from vhostuser.protocol import (
    U64,
    Config,
    DeviceStatus,
    FrontendRequest,
    Inflight,
    Log,
    ProtocolFeature,
    VirtioFeature,
    VringAddress,
)

F, P, V = FrontendRequest, ProtocolFeature, VirtioFeature
CONFIG = Rules("config", "Virtio device config space")
LOG = Rules("log", "Migration")
INFLIGHT = Rules("inflight", "Inflight I/O tracking")
STATUS = Rules("status", "VHOST_USER_SET_STATUS")

_SPACE = 256
_LOG_PAGE = 4096
_LOG_FLAG = 1


# ---- configuration space


def _config(heard: Heard) -> Config:
    return heard.payload if isinstance(heard.payload, Config) else Config(0, 0, 0, b"")


@CONFIG.message("bounds", "No more than 256 bytes of configuration space are named.", F.GET_CONFIG, F.SET_CONFIG)
def bounds(_: Scene, heard: Heard) -> str:
    end = _config(heard).offset + _config(heard).size
    return f"bytes up to {end}" if end > _SPACE else ""


@CONFIG.message("not-empty", "A part of the configuration space that is named has a size.", F.GET_CONFIG, F.SET_CONFIG,
                should=True)  # fmt: skip
def not_empty(_: Scene, heard: Heard) -> str:
    return "no bytes" if heard.payload is not None and not _config(heard).size else ""


@CONFIG.message("flags", "The flags are 0 (writable fields) or 1 (live migration).", F.GET_CONFIG, F.SET_CONFIG)
def flags(_: Scene, heard: Heard) -> str:
    return "" if _config(heard).flags in (0, 1) else f"flags {_config(heard).flags:#x}"


@CONFIG.message("read-before-write", "The configuration space is read before it is written.", F.SET_CONFIG, should=True)
def read_before_write(scene: Scene, _: Heard) -> str:
    return "" if scene.seen[F.GET_CONFIG] else "before GET_CONFIG"


# ---- dirty log


@LOG.message("file", "The log's descriptor is a file that can be mapped.", F.SET_LOG_BASE)
def file(_: Scene, heard: Heard) -> str:
    return next((f"a {given.kind}" for given in heard.given if not given.is_file), "")


@LOG.message("inside-file", "The log lies inside its file.", F.SET_LOG_BASE)
def inside_file(_: Scene, heard: Heard) -> str:
    if not isinstance(heard.payload, Log) or not heard.given or not heard.given[0].is_file:
        return ""
    end = heard.payload.offset + heard.payload.size
    return f"{end} bytes, in a file of {heard.given[0].size}" if end > heard.given[0].size else ""


@LOG.message("covers-memory", "The log has a bit for every page of memory that was told.", F.SET_LOG_BASE)
def covers_memory(scene: Scene, heard: Heard) -> str:
    if not isinstance(heard.payload, Log):
        return ""
    reach = heard.payload.size * 8 * _LOG_PAGE
    return f"it reaches to {reach:#x}, memory to {scene.end:#x}" if reach < scene.end else ""


@LOG.message("before-logging", "The log is there before LOG_ALL is set.", F.SET_FEATURES, F.SET_LOG_BASE)
def before_logging(scene: Scene, heard: Heard) -> str:
    asks = heard.code == F.SET_FEATURES and isinstance(heard.payload, U64) and heard.payload.value & V.LOG_ALL.mask
    return "LOG_ALL before SET_LOG_BASE" if asks and scene.log is None else ""


@LOG.message("used-ring", "A used ring that is to be logged has its place in the log.", F.SET_VRING_ADDR)
def used_ring(scene: Scene, heard: Heard) -> str:
    address = heard.payload
    if not isinstance(address, VringAddress) or not address.flags & _LOG_FLAG or scene.log is None:
        return ""
    reach = scene.log.size * 8 * _LOG_PAGE
    return f"log address {address.log:#x}, the log reaches to {reach:#x}" if address.log >= reach else ""


# ---- in-flight buffer


def _inflight(heard: Heard) -> Inflight:
    return heard.payload if isinstance(heard.payload, Inflight) else Inflight(0, 0, 0, 0)


@INFLIGHT.message("asks", "GET_INFLIGHT_FD says how many rings there are, and how large they are.", F.GET_INFLIGHT_FD,
                  section="VHOST_USER_GET_INFLIGHT_FD")  # fmt: skip
def asks(_: Scene, heard: Heard) -> str:
    told = _inflight(heard)
    return "" if told.num_queues and told.queue_size else f"{told.num_queues} rings of {told.queue_size} entries"


@INFLIGHT.message("as-given", "SET_INFLIGHT_FD describes the buffer as it was given.", F.SET_INFLIGHT_FD)
def as_given(scene: Scene, heard: Heard) -> str:
    if scene.inflight is None:
        return ""
    return "" if _inflight(heard) == scene.inflight else f"{heard.payload}, given was {scene.inflight}"


@INFLIGHT.message("same-file", "SET_INFLIGHT_FD brings the very buffer that was given.", F.SET_INFLIGHT_FD)
def same_file(scene: Scene, heard: Heard) -> str:
    if scene.buffer is None or not heard.given:
        return ""
    return "" if heard.given[0].identity == scene.buffer.identity else "another file"


@INFLIGHT.message("before-rings", "SET_INFLIGHT_FD comes before rings run.", F.SET_INFLIGHT_FD)
def before_rings(scene: Scene, _: Heard) -> str:
    return f"rings {scene.running} have their kicks" if scene.running else ""


@INFLIGHT.message("large-enough", "The buffer is asked for rings as large as they are set up then.", F.SET_VRING_NUM,
                  section="VHOST_USER_GET_INFLIGHT_FD")  # fmt: skip
def large_enough(scene: Scene, heard: Heard) -> str:
    num = getattr(heard.payload, "num", 0)
    if scene.inflight is None or num <= scene.inflight.queue_size:
        return ""
    return f"{num} entries, the buffer is for {scene.inflight.queue_size}"


async def _kept(bench: FrontendBench) -> None:
    before = after = None
    for session in (each for each in bench.sessions if each.restart):
        for connection in session.connections:
            scene, told = connection.now, connection.codes()
            if before is None:
                before = scene.buffer if told[F.SET_INFLIGHT_FD] else None
            elif connection.ready:
                after = next((h.given[0] for h in connection.heard if h.code == F.SET_INFLIGHT_FD and h.given), None)
                check(after is not None, "SET_INFLIGHT_FD for the back-end that came back", "none before rings ran")
                assert after is not None
                check(after.identity == before.identity, "the buffer of the back-end that died", "another file")
    if after is None:
        raise Skipped("it has no in-flight buffer when its back-end dies, or does not come again")


INFLIGHT.must("kept", "A back-end that comes back gets the buffer of the one that died.")(_kept)


# ---- status


def _status(heard: Heard) -> int:
    return heard.payload.value if isinstance(heard.payload, U64) else 0


@STATUS.message("byte", "The device status is a byte.", F.SET_STATUS)
def byte(_: Scene, heard: Heard) -> str:
    return "" if _status(heard) <= 0xFF else f"{_status(heard):#x}"


@STATUS.message("grows", "Bits of the status are added one after the other, and only a reset takes them away.",
                F.SET_STATUS, should=True)  # fmt: skip
def grows(scene: Scene, heard: Heard) -> str:
    lost = scene.status & ~_status(heard)
    return f"{_status(heard):#x} after {scene.status:#x}" if lost and _status(heard) else ""


@STATUS.message("features-first", "FEATURES_OK comes after SET_FEATURES.", F.SET_STATUS)
def features_first(scene: Scene, heard: Heard) -> str:
    early = _status(heard) & DeviceStatus.FEATURES_OK and scene.features is None
    return "FEATURES_OK before SET_FEATURES" if early else ""


@STATUS.message("acknowledged", "DRIVER_OK comes with ACKNOWLEDGE and DRIVER.", F.SET_STATUS, should=True)
def acknowledged(_: Scene, heard: Heard) -> str:
    needed = DeviceStatus.ACKNOWLEDGE | DeviceStatus.DRIVER
    missing = _status(heard) & DeviceStatus.DRIVER_OK and needed & ~_status(heard)
    return f"{_status(heard):#x}" if missing else ""


@STATUS.connection("driver-ok", "Where STATUS was negotiated, rings that run are followed by DRIVER_OK.", should=True)
def driver_ok(connection: Transcript) -> str | None:
    if not connection.ready or not connection.now.has(P.STATUS) or connection.cut:
        return None
    told = [_status(heard) for heard in connection.heard if heard.code == F.SET_STATUS]
    return "" if any(value & DeviceStatus.DRIVER_OK for value in told) else f"status {[hex(value) for value in told]}"
