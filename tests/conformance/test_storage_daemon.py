"""The whole suite against QEMU's storage daemon, with its waivers, as a CI would have it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.conformance.test_our_blk import conform

pytestmark = [pytest.mark.interop, pytest.mark.timeout(180)]

WAIVERS = Path(__file__).parent / "qemu-storage-daemon.waivers"
DAEMON = (
    "qemu-storage-daemon --blockdev driver=file,node-name=f,filename={image}"
    " --export vhost-user-blk,id=e,node-name=f,addr.type=unix,addr.path={socket},writable=on,num-queues=2"
)


@pytest.fixture
def daemon() -> str:
    if not shutil.which("qemu-storage-daemon"):
        pytest.skip("qemu-storage-daemon is not installed")
    return DAEMON


def test_nothing_but_what_is_known(daemon: str) -> None:
    done = conform("--start", daemon, "--strict", f"--waive={WAIVERS}", "--timeout=1.5", "--jobs=3", seconds=170)
    new = [line for line in done.stderr.splitlines() if line.startswith(("fail", "error"))]
    assert new == []
    assert done.returncode == 0


def test_without_waivers_it_does_not_conform(daemon: str) -> None:
    done = conform("--start", daemon, "config")
    assert done.returncode == 1
    assert "fail   config.byte: Each byte can be read alone." in done.stderr
