"""``vhostuser inflight``: what it prints of a region and when its status says that something is wrong."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.queue.guest import Guest, Ring
from tests.queue.packed import PackedDriver, PackedRing
from vhostuser.protocol import Inflight
from vhostuser.tools.inflight import main
from vhostuser.virtqueue import InflightRegion


def run(*arguments: str) -> int:
    return main("vhostuser inflight", arguments)


def test_a_split_region_of_a_process(guest: Guest, capsys: pytest.CaptureFixture[str]) -> None:
    """As a process has it open: ring 0 has never run, ring 1 has taken two chains."""
    fd, size = InflightRegion.create(2, 8)
    ring = Ring(guest, 8)
    for head in (5, 3):
        ring.describe(head, 0x8000, 1, 2)
    ring.offer(0, [5, 3])
    queue = ring.open(inflight=InflightRegion.map(fd, Inflight(size, 0, 2, 8)), index=1)
    queue.pop()
    assert run(f"/proc/{os.getpid()}/fd/{fd}", "--queues=2") == 0
    assert capsys.readouterr().out.splitlines() == [
        "ring 0: nobody has used it",
        "ring 1: 8 entries, used_idx 0, in flight: 5 3",
    ]
    assert run(f"/proc/self/fd/{fd}", "--queues=2", "--queue-size=16") == 1
    assert "ring 1: wrong: desc_num 8, the ring has 16" in capsys.readouterr().out.splitlines()
    os.close(fd)


def test_a_packed_region(guest: Guest, capsys: pytest.CaptureFixture[str]) -> None:
    fd, size = InflightRegion.create(1, 8, packed=True)
    ring = PackedRing(guest, 8)
    driver = PackedDriver(ring)
    for _ in range(2):
        driver.offer([(0x8000, 16)], [(0x9000, 16)])
    queue = ring.open(inflight=InflightRegion.map(fd, Inflight(size, 0, 1, 8), packed=True))
    names = [request._chain.head for request in queue.pop()]
    assert run(f"/proc/self/fd/{fd}", "--packed") == 0
    assert capsys.readouterr().out == f"ring 0: 8 entries, used_idx 0, in flight: {names[0]} {names[1]}\n"
    os.close(fd)


@pytest.mark.parametrize(
    ("content", "options", "told"),
    [
        (b"", (), "in-flight region of 0 bytes for 1 queues"),
        (bytes(64), ("--queues=32",), "in-flight region of a queue: 2 bytes, expected 16 at least"),
        (bytes(64), ("--offset=64",), "in-flight region of 0 bytes for 1 queues"),
    ],
)
def test_a_file_that_is_no_region(tmp_path: Path, content: bytes, options: tuple[str, ...], told: str) -> None:
    (tmp_path / "region").write_bytes(content)
    with pytest.raises(SystemExit) as ended:
        run(str(tmp_path / "region"), *options)
    assert ended.value.code == f"vhostuser inflight: {tmp_path / 'region'}: {told}"


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="No such file"):
        run(str(tmp_path / "region"))


def test_a_chain_that_leaves_a_packed_region_has_no_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever bytes it is given, it says what is wrong with them."""
    (tmp_path / "region").write_bytes(b"\1" * 128)
    assert run(str(tmp_path / "region"), "--packed") == 1
    assert "wrong: " in capsys.readouterr().out
    (tmp_path / "region").write_bytes(b"\0" * 8 + b"\1\0\2\0" + b"\0" * 20 + b"\1\0\0\0\xff\xff" + b"\0" * 58)
    assert run(str(tmp_path / "region"), "--packed") == 1
    assert "in flight: ?\n" in capsys.readouterr().out
