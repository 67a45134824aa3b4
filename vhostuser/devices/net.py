"""The virtio-net device (virtio 1.3, section 5.1).

What belongs here: features, configuration space, the link, what the front-end says of MTU and migration. What does not:
frames, which are moved in C (``native/net*.c``), and where they go (``ends``).
"""

from __future__ import annotations

import dataclasses
import logging
import os
import struct
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING

from vhostuser._native import ffi, lib
from vhostuser.device import Device, DeviceFailed, Engine
from vhostuser.devices.capture import LOST
from vhostuser.devices.ends import End, EndError, NetFeature
from vhostuser.metrics import Kind, Metric, Sample
from vhostuser.protocol import ProtocolFeature, RequestRefused, VirtioFeature

if TYPE_CHECKING:
    from vhostuser.virtqueue import DeviceQueue

log = logging.getLogger("vhostuser")

FRAMES = Metric("vhostuser_net_frames_total", Kind.COUNTER, "Frames that were moved.", labels=("queue",))
BYTES = Metric(
    "vhostuser_net_bytes_total",
    Kind.COUNTER,
    "Bytes of these frames, without the virtio header.",
    unit="bytes",
    labels=("queue",),
)
DROPPED = Metric(
    "vhostuser_net_dropped_frames_total",
    Kind.COUNTER,
    "Frames that were not moved, by reason.",
    labels=("queue", "reason"),
)
USELESS = Metric(
    "vhostuser_net_useless_buffers_total",
    Kind.COUNTER,
    "Receive buffers that no frame fits into.",
    labels=("queue",),
)

REASONS = tuple(
    name.removeprefix("dropped_")
    for name, _ in ffi.typeof("struct vu_net_stats").fields or ()
    if name.startswith("dropped_")
)
"""Why frames are dropped; docs/net.md says what each means."""

# struct virtio_net_config up to duplex: mac, status, max_virtqueue_pairs, mtu, speed, duplex.
_CONFIG = struct.Struct("<6sHHHIB")
_LINK_UP = 1
_FULL_DUPLEX = 1
MTU_MOST = 65535
MTU_LEAST = 68
"""RFC 791: what every host must take."""
POLL_US = 64
"""About what it takes to wake a thread on an idle CPU: polling longer costs more than the sleep that it saves."""


def local_mac() -> bytes:
    """A random address of the locally administered kind."""
    mac = bytearray(os.urandom(6))
    mac[0] = mac[0] & 0xFC | 0x02
    return bytes(mac)


@dataclasses.dataclass(frozen=True, slots=True)
class NetSettings:
    """What the owner of the device decides beside its end."""

    mac: bytes = dataclasses.field(default_factory=local_mac)
    """6 bytes. Front-ends with an idea of their own (QEMU) tell the guest theirs."""
    mtu: int = 1500
    """Bytes of an IP packet, 68 to 65535."""
    queue_size: int = 1024
    speed: int = 10_000
    """Mbit/s, as the guest is told."""
    poll_us: int = POLL_US
    """The longest time that an idle ring is polled before its thread sleeps, in microseconds."""


class NetEngine:
    """The native data path between the rings of one device and its end; see ``vhostuser.device.Engine``."""

    def __init__(self, end: End, features: int, poll_us: int, mtu: int) -> None:
        config = {"end": end.native, "features": features, "pairs": end.pairs, "poll_us": poll_us, "mtu": mtu}
        error = ffi.new("int *")
        net = lib.vu_net_new(ffi.new("struct vu_net_config *", config), error)
        if net == ffi.NULL:
            raise DeviceFailed(f"{end}: the engine cannot be made (code {error[0]})")
        self._end = end  # which the engine uses
        self._net = ffi.gc(net, lib.vu_net_free)

    def run(self, queue: DeviceQueue, kick: int, stop: int) -> int:
        pair, transmits = divmod(queue.index, 2)
        serve = lib.vu_net_transmit if transmits else lib.vu_net_receive
        return serve(self._net, pair, queue.native, kick, stop)

    def set_mtu(self, mtu: int) -> None:
        """The guest has been told another MTU, in bytes: none that negotiated it gets a longer packet from now on."""
        lib.vu_net_set_mtu(self._net, mtu)

    def stats(self, ring: int) -> dict[str, int]:
        """The counters of ``struct vu_net_stats`` for one ring."""
        stats = ffi.new("struct vu_net_stats *")
        lib.vu_net_get_stats(self._net, ring, stats)
        return {name: getattr(stats, name) for name, _ in ffi.typeof("struct vu_net_stats").fields or ()}


class _Discard:
    """Serves a ring that is started and disabled: frames go nowhere."""

    def run(self, queue: DeviceQueue, kick: int, stop: int) -> int:
        return lib.vu_net_discard(queue.native, kick, stop)


class Net(Device):
    """A network interface whose frames go to ``end``, which has as many pairs of queues."""

    virtio_id = 1
    metrics = (FRAMES, BYTES, DROPPED, USELESS, LOST)

    def __init__(self, end: End, settings: NetSettings | None = None) -> None:
        self._end = end
        self._settings = settings or NetSettings()
        self.queues = 2 * end.pairs
        self.queue_num = end.pairs
        self.queue_size = self._settings.queue_size
        self.features = _features(end)
        self.protocol_features = ProtocolFeature.RARP.mask | ProtocolFeature.MTU.mask
        if end.pairs > 1:
            self.postcopy_obstacle = "QEMU hangs for good in postcopy with more than one queue pair (seen on 7.2)"
            # QEMU before 8.0 adds, and removes, every region once for each pair; tables it sends once.
            self.mem_slots = 0
        self._mtu = self._settings.mtu
        self._up = end.linked
        # What engines before this one have counted, and this one. Together: the control thread reads while the data
        # thread stops the device, and must count nothing twice.
        self._counted: tuple[list[Counter[str]], NetEngine | None] = [Counter() for _ in range(self.queues)], None

    # ---- configuration space

    def config(self) -> bytes:
        settings = self._settings
        status = _LINK_UP if self._up else 0
        return _CONFIG.pack(settings.mac, status, self._end.pairs, self._mtu, settings.speed, _FULL_DUPLEX)

    def set_config(self, offset: int, data: bytes, *, migration: bool) -> None:
        """After a migration the whole space is written: what cannot change is left alone."""
        if not migration:
            super().set_config(offset, data, migration=migration)

    def set_link(self, up: bool) -> None:
        """Link up or down, as the guest is told. Control thread only."""
        if up != self._up:
            self._up = up
            log.info("%s: the link is %s", self._end, "up" if up else "down")
            self.config_changed()

    async def attend(self) -> None:
        """What the end needs on the control thread while front-ends are served, for as long as that is; the link goes
        with it."""
        await self._end.attend(self.set_link)

    # ---- what the front-end says

    def set_mtu(self, mtu: int) -> None:
        if not MTU_LEAST <= mtu <= MTU_MOST:
            raise RequestRefused(f"an MTU of {mtu} bytes, {MTU_LEAST} to {MTU_MOST} are possible")
        self._mtu = mtu
        if (engine := self._counted[1]) is not None:
            engine.set_mtu(mtu)

    def reset(self) -> None:
        """Its MTU is the owner's again."""
        self._mtu = self._settings.mtu

    def announce_guest(self, mac: bytes) -> None:
        """A reverse ARP request (RFC 903) from the guest's address, so that switches learn where it is now."""
        request = struct.pack(">HHBBH", 1, 0x0800, 6, 4, 3) + (mac + bytes(4)) * 2
        if not self._end.inject((b"\xff" * 6 + mac + b"\x80\x35" + request).ljust(60, b"\0")):
            log.warning("%s: the announcement of %s was not taken", self._end, mac.hex(":"))

    # ---- the engine's life

    async def start(self, features: int) -> None:
        """Raises DeviceFailed when the end does not take what was negotiated."""
        try:
            self._end.start(features)
        except EndError as error:
            raise DeviceFailed(str(error)) from None
        self._counted = self._counted[0], NetEngine(self._end, features, self._settings.poll_us, self._mtu)

    async def stop(self) -> None:
        self._end.stop()
        self._counted = self._counters(), None

    def engine(self) -> NetEngine | None:
        return self._counted[1]

    def disabled_engine(self, index: int) -> Engine | None:
        """Of the rings that are started and disabled only those of transmission are served: by throwing away."""
        return _Discard() if index % 2 else None

    # ---- what others see

    def _counters(self) -> list[Counter[str]]:
        """Of each ring, since the beginning."""
        before, engine = self._counted
        if engine is None:
            return before
        return [ended + Counter(engine.stats(ring)) for ring, ended in enumerate(before)]

    def measure(self) -> Iterator[Sample]:
        for queue, counted in enumerate(self._counters()):
            yield FRAMES.sample(counted["frames"], queue=queue)
            yield BYTES.sample(counted["bytes"], queue=queue)
            yield USELESS.sample(counted["useless"], queue=queue)
            for reason in REASONS:
                yield DROPPED.sample(counted[f"dropped_{reason}"], queue=queue, reason=reason)
        yield from self._end.measure()

    def state(self) -> dict[str, object]:
        return {
            **self._end.state(),
            "mac": self._settings.mac.hex(":"),
            "mtu": self._mtu,
            "link": "up" if self._up else "down",
        }


def _features(end: End) -> int:
    offered = {
        NetFeature.MTU,
        NetFeature.MAC,
        NetFeature.MRG_RXBUF,
        NetFeature.STATUS,
        NetFeature.GUEST_ANNOUNCE,
        NetFeature.SPEED_DUPLEX,
    }
    offered |= end.offloads
    if end.pairs > 1:
        offered.add(NetFeature.MQ)
    # The threads of all rings return chains in the order in which they took them (native/net_held.c). Each used entry
    # is written, though the last of a batch would be enough (2.7.9): DPDK's driver reads the length of each.
    return sum(1 << feature for feature in offered) | VirtioFeature.IN_ORDER.mask
