"""The block device: what it offers, its configuration space, its write cache, and when it has the image."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vhostuser.device import DeviceFailed
from vhostuser.devices.blk import BYTES, REQUESTS, Blk, BlkFeature, BlkSettings
from vhostuser.devices.image import Image
from vhostuser.metrics import as_json, value_in
from vhostuser.protocol import Config, FrontendRequest, RequestRefused

CAPACITY, SEG_MAX, BLK_SIZE, PHYSICAL, WRITEBACK, QUEUES, DISCARD = 0, 12, 20, 24, 32, 34, 36


@pytest.fixture
def path(tmp_path: Path) -> Path:
    image = tmp_path / "disk.img"
    image.write_bytes(b"".join(bytes([sector % 251 + 1]) * 512 for sector in range(2048)))
    return image


def field(disk: Blk, offset: int, code: str) -> int:
    value: int = struct.unpack_from(f"<{code}", disk.config(), offset)[0]
    return value


def without(disk: Blk, *features: BlkFeature) -> int:
    return disk.features & ~sum(1 << feature for feature in features)


# ---- features and configuration space


def test_configuration_space_is_laid_out_as_the_specification_says(path: Path) -> None:
    disk = Blk(Image(path, block_size=1024), BlkSettings(queues=3))
    assert len(disk.config()) == 60
    assert field(disk, CAPACITY, "Q") == 2048
    assert field(disk, SEG_MAX, "I") == 126
    assert struct.unpack_from("<HBB", disk.config(), 16) == (2, 16, 63)
    assert field(disk, BLK_SIZE, "I") == 1024
    assert struct.unpack_from("<BBHI", disk.config(), PHYSICAL) == (2, 0, 1, 0)
    assert field(disk, WRITEBACK, "B") == 1
    assert field(disk, QUEUES, "H") == 3
    sectors, segments, alignment, zero_sectors, zero_segments, unmap = struct.unpack_from(
        "<IIIIIB", disk.config(), DISCARD
    )
    assert alignment == 2
    assert min(sectors, segments, zero_sectors, zero_segments, unmap) > 0


def test_what_cannot_be_done_is_not_offered(path: Path) -> None:
    writable, read_only = Blk(Image(path)), Blk(Image(path, read_only=True), BlkSettings(queues=2))
    changes = {BlkFeature.DISCARD, BlkFeature.WRITE_ZEROES}
    assert all(writable.features >> feature & 1 for feature in changes)
    assert not any(read_only.features >> feature & 1 for feature in changes)
    assert (writable.features >> BlkFeature.RO & 1, read_only.features >> BlkFeature.RO & 1) == (0, 1)
    assert (writable.features >> BlkFeature.MQ & 1, read_only.features >> BlkFeature.MQ & 1) == (0, 1)


def test_a_ring_too_small_for_a_large_chain_announces_fewer_segments(path: Path) -> None:
    assert field(Blk(Image(path), BlkSettings(queue_size=16)), SEG_MAX, "I") == 14
    assert field(Blk(Image(path), BlkSettings(queue_size=2)), SEG_MAX, "I") == 1


@pytest.mark.parametrize(("offset", "data"), [(0, bytes(8)), (31, bytes(2)), (32, bytes(2)), (33, b"\1"), (32, b"")])
def test_only_the_write_cache_switch_is_writable(path: Path, offset: int, data: bytes) -> None:
    disk = Blk(Image(path))
    before = disk.config()
    with pytest.raises(RequestRefused, match="offset 32"):
        disk.set_config(offset, data, migration=False)
    assert disk.config() == before


def test_after_a_migration_the_whole_space_may_be_written_and_the_switch_counts(path: Path) -> None:
    disk = Blk(Image(path))
    disk.set_config(0, bytes(60), migration=True)
    assert field(disk, WRITEBACK, "B") == 0
    assert field(disk, CAPACITY, "Q") == 2048


# ---- the write cache


async def test_the_switch_needs_its_feature(path: Path) -> None:
    disk = Blk(Image(path))
    await disk.start(without(disk, BlkFeature.CONFIG_WCE))
    with pytest.raises(RequestRefused, match="CONFIG_WCE"):
        disk.set_config(WRITEBACK, b"\0", migration=False)
    await disk.stop()
    disk.set_config(WRITEBACK, b"\0", migration=False)  # by the next driver, which has not chosen yet
    await disk.stop()


async def test_a_driver_that_cannot_flush_gets_writes_on_the_medium(path: Path) -> None:
    disk = Blk(Image(path))
    await disk.start(without(disk, BlkFeature.FLUSH))
    assert not disk.state()["writeback"]
    assert field(disk, WRITEBACK, "B") == 0
    await disk.stop()
    await disk.start(disk.features)
    assert disk.state()["writeback"]
    await disk.stop()


# ---- the image


async def test_the_image_is_locked_between_start_and_stop_only(path: Path) -> None:
    disk, second = Blk(Image(path)), Blk(Image(path), BlkSettings(lock_patience=0))
    await disk.start(disk.features)
    with pytest.raises(DeviceFailed, match="another process has it open"):
        await second.start(second.features)
    await disk.stop()
    await second.start(second.features)
    await second.stop()


async def test_an_image_that_is_handed_over_is_waited_for(path: Path) -> None:
    source, target = Blk(Image(path)), Blk(Image(path))
    await source.start(source.features)
    starting = asyncio.ensure_future(target.start(target.features))
    await asyncio.sleep(0)
    assert not starting.done()
    await source.stop()
    await starting
    assert target.state()["open"]
    await target.stop()


async def test_an_image_that_has_gone_fails_the_start_with_one_line(path: Path) -> None:
    disk = Blk(Image(path))
    os.remove(path)  # noqa: PTH107
    with pytest.raises(DeviceFailed, match="No such file"):
        await disk.start(disk.features)
    await disk.stop()


async def test_a_stop_that_cannot_write_says_so_and_gives_the_image_back(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    disk = Blk(Image(path))
    await disk.start(disk.features)

    def fail(fd: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fdatasync", fail)
        await disk.stop()
    assert "writes were lost" in caplog.text
    await disk.start(disk.features)
    await disk.stop()


async def test_a_size_that_changes_is_announced(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    disk = Blk(Image(path))
    announced = asyncio.Event()
    disk.announce = (announced.set,)
    await disk.start(disk.features)
    with caplog.at_level(logging.INFO):
        watching = asyncio.ensure_future(disk.watch(interval=0.001))
        os.truncate(path, 4 << 20)
        await asyncio.wait_for(announced.wait(), 5)
    watching.cancel()
    assert field(disk, CAPACITY, "Q") == 8192
    await disk.stop()


# ---- behind a front-end


async def exchange(pair: Any, kind: int, sector: int, data: bytes = b"", room: int = 0) -> tuple[int, bytes]:
    """One request through the first ring; its status and what was read."""
    memory, ring = pair.memory.map, pair.rings[0]
    memory.write(1 << 20, struct.pack("<IIQ", kind, 0, sector) + data)
    ring.queue.offer([(1 << 20, 16 + len(data))], [(2 << 20, room + 1)])
    ring.queue.publish()
    ring.kick()
    while (taken := ring.queue.take()) is None:
        if not ring.queue.arm():
            await asyncio.wait_for(ring.called(), 5)
    back = memory.read(2 << 20, room + 1)
    assert taken[1] == (room + 1 if back[-1] == 0 else 1)
    return back[-1], back[:-1]


async def test_a_front_end_reads_writes_and_flushes(pairs: Callable[..., Any], path: Path) -> None:
    disk = Blk(Image(path))
    pair = pairs(disk)
    await pair.set_up()
    assert await exchange(pair, 0, 5, room=512) == (0, bytes([6]) * 512)
    assert (await exchange(pair, 1, 5, b"x" * 1024))[0] == 0
    assert (await exchange(pair, 4, 0))[0] == 0
    with path.open("rb") as image:
        assert image.read()[2560:3584] == b"x" * 1024
    for _ in range(2):  # the engine's numbers, then what is kept of them
        shown = as_json(disk.measure())
        assert [value_in(shown, REQUESTS, kind=kind) for kind in ("reads", "writes", "flushes")] == [1, 1, 1]
        assert [value_in(shown, BYTES, kind=kind) for kind in ("reads", "writes")] == [512, 1024]
        await pair.frontend.stop_ring(pair.rings[0])


async def test_the_image_is_free_once_the_last_ring_has_stopped(pairs: Callable[..., Any], path: Path) -> None:
    pair = pairs(Blk(Image(path), BlkSettings(queues=2)))
    await pair.set_up(rings=2)
    assert (await exchange(pair, 4, 0))[0] == 0
    with pytest.raises(DeviceFailed):
        other = Blk(Image(path), BlkSettings(lock_patience=0))
        await other.start(other.features)
    for ring in pair.rings:
        await pair.frontend.stop_ring(ring)
    await other.start(other.features)
    await other.stop()


async def test_a_front_end_whose_image_is_taken_is_sent_away(pairs: Callable[..., Any], path: Path) -> None:
    opened = Image(path).open()
    pair = pairs(Blk(Image(path), BlkSettings(lock_patience=0)))
    await pair.set_up()
    pair.rings[0].kick()
    await asyncio.wait_for(pair.serving, 5)
    opened.close()


@pytest.mark.parametrize("size", [57, 60])
async def test_the_configuration_is_answered_in_the_size_that_was_asked(
    pairs: Callable[..., Any], path: Path, size: int
) -> None:
    disk = Blk(Image(path))
    pair = pairs(disk)
    await pair.frontend.negotiate()
    payload, _ = await pair.frontend.request(FrontendRequest.GET_CONFIG, Config(0, size, 0, bytes(size)))
    assert payload == Config(0, size, 0, disk.config()[:size])


async def test_the_write_cache_is_switched_through_the_front_end(pairs: Callable[..., Any], path: Path) -> None:
    disk = Blk(Image(path))
    pair = pairs(disk)
    await pair.set_up()
    await pair.frontend.request(FrontendRequest.SET_CONFIG, Config(32, 1, 0, b"\0"))
    assert not disk.state()["writeback"]
    with pytest.raises(RequestRefused):
        await pair.frontend.request(FrontendRequest.SET_CONFIG, Config(0, 8, 0, bytes(8)))
