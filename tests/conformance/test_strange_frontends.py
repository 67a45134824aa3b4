"""The suite for front-ends against QEMU and DPDK, with their waivers, as a CI would have it. No guest, no kernel.

QEMU's firmware drives the disk far enough: SeaBIOS sets a ring up and asks for the first sector.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.interop, pytest.mark.timeout(300)]

HERE = Path(__file__).parent
QEMU = (
    "qemu-system-x86_64 -accel tcg -machine pc,memory-backend=m -m 64 -nodefaults -display none"
    " -object memory-backend-memfd,id=m,size=64M,share=on -chardev socket,id=c,path={socket},reconnect=1"
    " -device vhost-user-blk-pci,chardev=c,num-queues=1"
)
TESTPMD = (
    "dpdk-testpmd --lcores 0@0,1@0 --no-pci --no-huge -m 256 --no-shconf --no-telemetry"
    " --vdev net_virtio_user0,path={socket},queues=1,queue_size=256"
    " -- --forward-mode=rxonly --auto-start --stats-period=1000 --nb-cores=1 --total-num-mbufs=2048"
)


def conform(*arguments: str, seconds: float = 280) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "vhostuser.tools.main", "conform", "frontend", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=seconds)


def nothing_new(program: str, command: str, waivers: str, *options: str) -> None:
    if not shutil.which(program):
        pytest.skip(f"{program} is not installed")
    done = conform("--start", command, "--strict", f"--waive={HERE / waivers}", "--quiet-time=0.5", *options)
    assert [line for line in done.stderr.splitlines() if line.startswith(("fail", "error"))] == [], done.stderr
    assert done.returncode == 0, done.stderr


def test_nothing_but_what_is_known_of_qemu() -> None:
    nothing_new("qemu-system-x86_64", QEMU, "qemu-frontend.waivers", "--jobs=3", "--timeout=4")


def test_nothing_but_what_is_known_of_virtio_user() -> None:
    nothing_new("dpdk-testpmd", TESTPMD, "virtio-user.waivers", "--jobs=3", "--timeout=4", "--device=net")
