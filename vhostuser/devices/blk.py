"""The virtio-blk device (virtio 1.3 section 5.2) on a raw image.

What belongs here: features, configuration space, the write cache, the image's life between the first ring and the last.
What does not: requests, which are served in C (``native/blk.c``), and the image itself (``image``).
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import enum
import logging
import struct
import threading
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING

from vhostuser._native import ffi, lib
from vhostuser.device import Device, DeviceFailed
from vhostuser.devices.image import SECTOR, Image, ImageBusy, ImageError, OpenImage
from vhostuser.metrics import Kind, Metric, Sample
from vhostuser.protocol import ProtocolFeature, RequestRefused

if TYPE_CHECKING:
    from vhostuser.virtqueue import DeviceQueue

log = logging.getLogger("vhostuser")


class BlkFeature(enum.IntEnum):
    """Feature bits of virtio-blk that this device knows."""

    SEG_MAX = 2
    GEOMETRY = 4
    RO = 5
    BLK_SIZE = 6
    FLUSH = 9
    TOPOLOGY = 10
    CONFIG_WCE = 11
    MQ = 12
    DISCARD = 13
    WRITE_ZEROES = 14


_KINDS = ("reads", "writes", "flushes", "discards", "write_zeroes", "others")

REQUESTS = Metric(
    "vhostuser_blk_requests_total", Kind.COUNTER, "Requests that were answered or are under way.", labels=("kind",)
)
BYTES = Metric(
    "vhostuser_blk_bytes_total",
    Kind.COUNTER,
    "Bytes of data that reads and writes have moved.",
    unit="bytes",
    labels=("kind",),
)
FAILED = Metric(
    "vhostuser_blk_failed_requests_total",
    Kind.COUNTER,
    "Requests that ended in another status than OK.",
    labels=("status",),
)
CAPACITY = Metric("vhostuser_blk_capacity_bytes", Kind.GAUGE, "The size of the disk.", unit="bytes")

# struct virtio_blk_config up to write_zeroes_may_unmap and its padding: capacity, size_max, seg_max, cylinders, heads,
# sectors, blk_size, physical_block_exp, alignment_offset, min_io_size, opt_io_size, writeback, unused, num_queues,
# max_discard_sectors, max_discard_seg, discard_sector_alignment, max_write_zeroes_sectors, max_write_zeroes_seg,
# write_zeroes_may_unmap.
_CONFIG = struct.Struct("<QIIHBBIBBHIBBHIIIIIB3x")
_WRITEBACK = 32
"""The offset of the only byte that a driver may write."""

_PHYSICAL_BLOCK = 4096
# How often a locked image is tried again, in seconds.
_LOCK_AGAIN = 0.05
# A chain without an indirect table needs a header and a status beside its data, and rings of 128 are the usual size.
_MOST_SEGMENTS = 126
# Larger ranges are served too: QEMU's blkio driver sends them whatever is announced here.
_RANGE_SECTORS = (1 << 30) // SECTOR
_RANGES = 64


POLL_US = 64
"""About what it takes to wake a thread on an idle CPU: polling longer costs more than the sleep that it saves."""


@dataclasses.dataclass(frozen=True, slots=True)
class BlkSettings:
    """What the owner of the disk decides beside the image."""

    queues: int = 1
    queue_size: int = 1024
    serial: str = ""
    """At most 20 bytes; what GET_ID returns."""
    writeback: bool = True
    """False: every write is on the medium before it is acknowledged, unless the driver turns the cache on."""
    poll_us: int = POLL_US
    """The longest time that an idle ring is polled before its thread sleeps, in microseconds."""
    lock_patience: float = 2.0
    """How long to wait for the process that has the image locked, in seconds: in a hand-over it is about to stop."""


class BlkEngine:
    """The native data path of one open image, shared by all rings; see ``vhostuser.device.Engine``."""

    def __init__(self, fd: int, image: Image, settings: BlkSettings, *, writeback: bool) -> None:
        changes = 0 if image.read_only else lib.VU_BLK_DISCARD | lib.VU_BLK_WRITE_ZEROES
        config = ffi.new(
            "struct vu_blk_config *",
            {
                "fd": fd,
                "flags": (lib.VU_BLK_READ_ONLY if image.read_only else changes)
                | (lib.VU_BLK_WRITEBACK if writeback else 0),
                "sectors": image.sectors,
                "block_size": image.block_size,
                "max_segments": _RANGES,
                "poll_us": settings.poll_us,
                "serial": settings.serial.encode().ljust(20, b"\0"),
            },
        )
        error = ffi.new("int *")
        blk = lib.vu_blk_new(config, error)
        if blk == ffi.NULL:
            raise DeviceFailed(f"{image.path}: the engine cannot be made (code {error[0]})")
        self._blk = ffi.gc(blk, lib.vu_blk_free)

    def run(self, queue: DeviceQueue, kick: int, stop: int) -> int:
        return lib.vu_blk_run(self._blk, queue.native, kick, stop)

    def set_writeback(self, on: bool) -> None:
        lib.vu_blk_set_writeback(self._blk, on)

    def set_sectors(self, sectors: int) -> None:
        lib.vu_blk_set_sectors(self._blk, sectors)

    def stats(self) -> dict[str, int]:
        """The counters of ``struct vu_blk_stats``."""
        stats = ffi.new("struct vu_blk_stats *")
        lib.vu_blk_get_stats(self._blk, stats)
        return {name: getattr(stats, name) for name, _ in ffi.typeof("struct vu_blk_stats").fields or ()}


class Blk(Device):
    """A disk. Its image is opened and locked when the first ring starts, given back when the last one has stopped."""

    virtio_id = 2
    metrics = (REQUESTS, BYTES, FAILED, CAPACITY)

    def __init__(self, image: Image, settings: BlkSettings = BlkSettings()) -> None:
        self._image = image
        self._settings = settings
        self.queues = settings.queues
        self.queue_size = settings.queue_size
        self.features = _features(image, settings)
        # Every request may be done again from the start.
        self.protocol_features = ProtocolFeature.GET_VRING_BASE_INFLIGHT.mask
        self._negotiated = self.features
        self._writeback = settings.writeback
        self._opened: OpenImage | None = None
        self._engine: BlkEngine | None = None
        self._before: Counter[str] = Counter()

    # ---- configuration space

    def config(self) -> bytes:
        sectors = self._image.sectors
        block = self._image.block_size
        return _CONFIG.pack(
            sectors,
            0,
            max(1, min(_MOST_SEGMENTS, self.queue_size - 2)),
            *_geometry(sectors),
            block,
            max(0, (_PHYSICAL_BLOCK // block).bit_length() - 1),
            0,
            1,
            0,
            self._cached(),
            0,
            self.queues,
            _RANGE_SECTORS,
            _RANGES,
            block // SECTOR,
            _RANGE_SECTORS,
            _RANGES,
            1,
        )

    def set_config(self, offset: int, data: bytes, *, migration: bool) -> None:
        """The write cache switch. After a migration the whole space is written: what cannot change is left alone."""
        if not migration:
            if (offset, len(data)) != (_WRITEBACK, 1):
                raise RequestRefused(
                    f"only the write cache switch is writable (1 byte at offset {_WRITEBACK}),"
                    f" not {len(data)} bytes at offset {offset}"
                )
            if not self._has(BlkFeature.CONFIG_WCE):
                raise RequestRefused("the write cache switch was not negotiated (VIRTIO_BLK_F_CONFIG_WCE)")
        if offset <= _WRITEBACK < offset + len(data):
            self._writeback = bool(data[_WRITEBACK - offset])
            if self._engine is not None:
                self._engine.set_writeback(self._cached())

    def reset(self) -> None:
        """The write cache is as the owner of the disk has it."""
        self._writeback = self._settings.writeback

    def _has(self, feature: BlkFeature) -> bool:
        return bool(self._negotiated >> feature & 1)

    def _cached(self) -> bool:
        """Whether a write may be acknowledged before it is on the medium (5.2.6.2); a driver must be able to flush."""
        return self._writeback and self._has(BlkFeature.FLUSH)

    # ---- the image's life

    async def start(self, features: int) -> None:
        """Opens and locks the image. Raises DeviceFailed when that cannot be, or not within the patience."""
        opened = await self._open()
        self._negotiated = features
        try:
            self._engine = BlkEngine(opened.fd, self._image, self._settings, writeback=self._cached())
        except BaseException:
            opened.close()
            raise
        self._opened = opened

    async def _open(self) -> OpenImage:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._settings.lock_patience
        while True:
            try:
                return self._image.open()
            except ImageBusy as error:
                if loop.time() >= deadline:
                    raise DeviceFailed(str(error)) from None
            except ImageError as error:
                raise DeviceFailed(str(error)) from None
            await asyncio.sleep(_LOCK_AGAIN)

    async def stop(self) -> None:
        """Writes everything to the medium, then gives the lock back. Errors are logged: nobody is left to be told."""
        opened, engine = self._opened, self._engine
        self._opened = self._engine = None
        self._negotiated = self.features  # the next driver has not chosen yet, and may be another front-end's
        if engine is not None:
            self._before.update(engine.stats())
        if opened is None:
            return
        try:
            opened.sync()
        except ImageError as error:
            log.error("%s", error)
        finally:
            opened.close()

    def engine(self) -> BlkEngine | None:
        return self._engine

    async def watch(self, interval: float = 1.0) -> None:
        """Looks at the size of the image again and again, for ever, and announces changes. Control thread.

        ``interval`` is in seconds. Not while no ring runs: the image is then closed, and looked at when it is opened.
        """
        announced = self._image.sectors
        while True:
            await asyncio.sleep(interval)
            if (opened := self._opened) is not None:
                await _look(opened)
            if self._image.sectors != announced:
                announced = self._image.sectors
                if self._engine is not None:
                    self._engine.set_sectors(announced)
                log.info("%s: the capacity is now %d sectors", self._image.path, announced)
                self.config_changed()

    def measure(self) -> Iterator[Sample]:
        counted = Counter(self._before)
        if (engine := self._engine) is not None:
            counted.update(engine.stats())
        for kind in _KINDS:
            yield REQUESTS.sample(counted[kind], kind=kind)
        yield BYTES.sample(counted["bytes_read"], kind="reads")
        yield BYTES.sample(counted["bytes_written"], kind="writes")
        yield FAILED.sample(counted["errors"], status="ioerr")
        yield FAILED.sample(counted["unsupported"], status="unsupp")
        yield CAPACITY.sample(self._image.sectors * SECTOR)

    def state(self) -> dict[str, object]:
        return {
            "image": self._image.path,
            "open": self._opened is not None,
            "sectors": self._image.sectors,
            "read_only": self._image.read_only,
            "writeback": self._cached(),
        }


def _features(image: Image, settings: BlkSettings) -> int:
    offered = {
        BlkFeature.SEG_MAX,
        BlkFeature.GEOMETRY,
        BlkFeature.BLK_SIZE,
        BlkFeature.TOPOLOGY,
        BlkFeature.FLUSH,
        BlkFeature.CONFIG_WCE,
    }
    offered |= {BlkFeature.RO} if image.read_only else {BlkFeature.DISCARD, BlkFeature.WRITE_ZEROES}
    if settings.queues > 1:
        offered.add(BlkFeature.MQ)
    return sum(1 << feature for feature in offered)


def _geometry(sectors: int) -> tuple[int, int, int]:
    """Cylinders, heads and sectors per track as disks of this size are reported since ATA: up to 16 and 63."""
    heads, per_track = 16, 63
    return min(max(sectors // (heads * per_track), 2), 16383), heads, per_track


async def _look(opened: OpenImage) -> None:
    """Refreshes the size on a daemon thread: storage that hangs must not hold up the loop, nor the exit."""
    loop = asyncio.get_running_loop()
    looked = asyncio.Event()

    def look() -> None:
        opened.refresh()
        with contextlib.suppress(RuntimeError):  # the loop has ended meanwhile
            loop.call_soon_threadsafe(looked.set)

    threading.Thread(target=look, name="size", daemon=True).start()
    await looked.wait()
