"""A disk, and its program with whatever a service manager passes to it."""

from pathlib import Path

import pytest

from vhostuser.devices.blk import Blk
from vhostuser.devices.image import Image


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(1 << 20))
    return path


@pytest.fixture
def disk(image: Path) -> Blk:
    return Blk(Image(str(image)))
