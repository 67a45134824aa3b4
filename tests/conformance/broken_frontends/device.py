"""Faults of configuration space, dirty log, in-flight buffer and device status.

What belongs here: what is wrong with the device as a whole.
"""

from __future__ import annotations

from dataclasses import replace

from tests.conformance.broken_frontends.faults import (
    TOP,
    eventfd,
    fault,
    file,
    moved,
    only,
    raw,
    saying,
    without,
)
from tests.conformance.broken_frontends.rings import address
from tests.conformance.frontends import MIB, RINGS, SIZE, Life
from vhostuser.protocol import (
    U64,
    Config,
    DeviceStatus,
    FrontendRequest,
    Inflight,
    Log,
    ProtocolFeature,
    VirtioFeature,
)

F, P, V = FrontendRequest, ProtocolFeature, VirtioFeature


_HAS_CONFIG = lambda life: life.has(P.CONFIG)  # noqa: E731
saying(
    TOP, only(_HAS_CONFIG, raw(F.GET_CONFIG, Config(250, 10, 0, bytes(10)))), "config.bounds", name="too_much_config"
)
saying(TOP, only(_HAS_CONFIG, raw(F.GET_CONFIG, Config(0, 0, 0, b""))), "config.not-empty", name="no_config_at_all")
saying(TOP, only(_HAS_CONFIG, raw(F.SET_CONFIG, Config(0, 1, 7, b"x"))), "config.flags", name="flags_of_config")


@fault("config.read-before-write")
class WritesConfigUnread(Life):
    steps = moved("write_config", "owner")


_HAS_LOG = lambda life: life.has(P.LOG_SHMFD)  # noqa: E731
_LOG = Log(4096, 0)
saying(TOP, only(_HAS_LOG, raw(F.SET_LOG_BASE, _LOG, fds=eventfd)), "log.file", name="log_of_an_eventfd")
saying(TOP, only(_HAS_LOG, raw(F.SET_LOG_BASE, replace(_LOG, size=2 * MIB), fds=file)), "log.inside-file",
       name="log_beyond_its_file")  # fmt: skip
saying(TOP, only(_HAS_LOG, raw(F.SET_LOG_BASE, replace(_LOG, size=8), fds=file)), "log.covers-memory",
       name="log_too_short")  # fmt: skip


async def _logs_nowhere(life: Life) -> None:
    features = life.talk.session.features
    if life.has(P.LOG_SHMFD):
        await life.talk.raw(F.SET_FEATURES, U64(features | V.LOG_ALL.mask))
        await life.talk.raw(F.SET_FEATURES, U64(features))


saying("log", _logs_nowhere, "log.before-logging", name="logs_nowhere", first=True)


async def _log_address(life: Life) -> None:
    if life.has(P.LOG_SHMFD):
        await life.talk.raw(F.SET_VRING_ADDR, address(life, 0, 0, flags=1, log=1 << 40))


saying("log", _log_address, "log.used-ring", name="used_ring_beyond_the_log")

_HAS_BUFFER = lambda life: life.has(P.INFLIGHT_SHMFD)  # noqa: E731
saying("inflight", only(_HAS_BUFFER, raw(F.GET_INFLIGHT_FD, Inflight(0, 0, 0, 0))), "inflight.asks", first=True,
       name="buffer_for_nothing")  # fmt: skip


async def _another_size(life: Life) -> None:
    if life.buffer is not None:
        given = replace(life.buffer.description, mmap_size=4096)
        await life.talk.raw(F.SET_INFLIGHT_FD, given, life.buffer.fd)


async def _another_file(life: Life) -> None:
    if life.buffer is not None:
        await raw(F.SET_INFLIGHT_FD, life.buffer.description, fds=file)(life)


saying("inflight", _another_size, "inflight.as-given", name="buffer_of_another_size")
saying("inflight", _another_file, "inflight.same-file", name="another_buffer")


@fault("inflight.before-rings")
class BufferAfterRings(Life):
    steps = moved("inflight", "set_up")


@fault("inflight.large-enough")
class BufferTooSmall(Life):
    async def inflight(self) -> None:
        if self.has(P.INFLIGHT_SHMFD) and self.buffer is None:
            self.buffer = await self.talk.get_inflight_fd(RINGS, SIZE // 2)
        await super().inflight()


@fault("inflight.kept")
class ForgetsTheBuffer(Life):
    async def inflight(self) -> None:
        if self.buffer is not None:
            self.buffer.close()
            self.buffer = None
        await super().inflight()


_HAS_STATUS = lambda life: life.has(P.STATUS)  # noqa: E731
saying(TOP, only(_HAS_STATUS, raw(F.SET_STATUS, U64(0x1FF))), "status.byte", name="status_of_nine_bits")
saying("driver", only(_HAS_STATUS, raw(F.SET_STATUS, U64(1))), "status.grows", name="status_shrinks")
saying("set_features", only(_HAS_STATUS, raw(F.SET_STATUS, U64(DeviceStatus.FEATURES_OK))), "status.features-first",
       name="features_ok_early", first=True)  # fmt: skip


@fault("status.acknowledged")
class DriverNeverSeen(Life):
    steps = without("driver")


@fault("status.driver-ok")
class NeverOk(Life):
    steps = without("driver_ok")
