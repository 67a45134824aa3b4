"""A block device is served like a file: size, lock, discard, zeroes, direct I/O. On loop devices, which need root."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from vhostuser.devices.image import Image, ImageBusy, ImageError

IN, OUT, FLUSH, DISCARD, WRITE_ZEROES = 0, 1, 4, 11, 13
OK = 0
SECTORS = 16384


@pytest.fixture
def attach(tmp_path: Path) -> Iterator[Callable[..., str]]:
    """Makes a loop device full of ones with this sector size; its path."""
    losetup = shutil.which("losetup", path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")
    if losetup is None or os.geteuid() != 0:
        pytest.skip("loop devices need losetup and root")
    attached: list[str] = []

    def make(sector_size: int = 512) -> str:
        file = tmp_path / f"loop{len(attached)}"
        file.write_bytes(b"\1" * (SECTORS * 512))
        command = [losetup, "--find", "--show", f"--sector-size={sector_size}", str(file)]
        made = subprocess.run(command, capture_output=True, text=True, check=False)
        if made.returncode:
            pytest.skip(f"no loop device: {made.stderr.strip()}")
        attached.append(made.stdout.strip())
        return attached[-1]

    yield make
    for device in attached:
        subprocess.run([losetup, "--detach", device], check=True)


def test_its_size_is_known_and_two_writers_are_refused(attach: Callable[..., str]) -> None:
    image = Image(attach())
    opened = image.open()
    assert image.sectors == SECTORS
    with pytest.raises(ImageBusy):
        Image(image.path).open()
    opened.close()


@pytest.mark.parametrize("direct", [False, True])
def test_every_request_is_served(attach: Callable[..., str], disks: Any, direct: bool) -> None:
    opened = Image(attach(), direct=direct).open()
    disk = disks(SECTORS, fd=disks.keep(opened.fd))
    assert disk.request(OUT, 8, b"x" * 4096).status == OK
    assert disk.request(FLUSH).status == OK
    assert disk.request(IN, 0, room=8192).data == b"\1" * 4096 + b"x" * 4096
    assert disk.request(DISCARD, 0, disk.ranges((0, 1024, 0))).status == OK
    assert disk.request(WRITE_ZEROES, 0, disk.ranges((2048, 8, 0), (4096, 1024, 1))).status == OK
    content = disk.content()
    assert content[2048 * 512 : 2057 * 512] == bytes(8 * 512) + b"\1" * 512
    assert content[4096 * 512 : 5121 * 512] == bytes(1024 * 512) + b"\1" * 512


def test_larger_sectors_than_the_block_size_are_noticed_before_a_guest_starts(attach: Callable[..., str]) -> None:
    device = attach(sector_size=4096)
    with pytest.raises(ImageError, match="--block-size=4096"):
        Image(device, direct=True)
    assert Image(device, direct=True, block_size=4096).sectors == SECTORS
