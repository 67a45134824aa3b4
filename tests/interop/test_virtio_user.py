"""DPDK's virtio driver (net_virtio_user in testpmd) drives vhostuser-net: no guest, no kernel, no huge pages.

testpmd moves frames from a file of captured ones (net_pcap) to the interface, whose end sends them back, and from there
into another such file. So every byte that comes back is compared with what was sent.
"""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import struct
from collections.abc import Sequence
from pathlib import Path

import pytest

from vhostuser.tools.lab.backend import BackendProcess, vhostuser_net
from vhostuser.tools.lab.errors import LabError
from vhostuser.tools.lab.process import Process

pytestmark = [pytest.mark.interop, pytest.mark.timeout(60)]

ETHER = bytes.fromhex("020000000001 020000000002 88b5")
SIZES = (64, 65, 1500, 1514, 2036, 2037, 2048, 9000)
"""The shortest and the longest, a frame of Ethernet, and those around what fits into a buffer of testpmd's."""
READ_MOST = 1 << 20
"""Of a file that may grow quickly, in bytes."""
LONG_BUFFERS = "--mbuf-size=9728"
"""Frames are in one piece. Otherwise they are in pieces of 2048 bytes, and so is what they are received into."""


# ---- files of captured frames (libpcap's format, version 2.4, link type Ethernet)


def write_capture(path: Path, frames: Sequence[bytes]) -> None:
    records = [struct.pack("<IIII", 0, 0, len(frame), len(frame)) + frame for frame in frames]
    path.write_bytes(struct.pack("<IHHiIII", 0xA1B2C3D4, 2, 4, 0, 0, 65535, 1) + b"".join(records))


def read_capture(path: Path) -> list[bytes]:
    """The whole frames at its beginning that are there so far."""
    data, frames, at = b"", [], 24
    if path.exists():
        with path.open("rb") as file:
            data = file.read(READ_MOST)
    while at + 16 <= len(data):
        (length,) = struct.unpack_from("<I", data, at + 8)
        if at + 16 + length > len(data):
            break
        frames.append(data[at + 16 : at + 16 + length])
        at += 16 + length
    return frames


def some_frames(seed: int) -> list[bytes]:
    dice = random.Random(seed)
    return [
        ETHER + dice.randbytes(size - len(ETHER)) for size in (*SIZES, *(dice.randint(64, 9000) for _ in range(56)))
    ]


# ---- one run


def dpdk(directory: Path, socket: Path, queues: int, device: str, source: str, options: Sequence[str]) -> Process:
    """Forwards the frames of ``in0``, ``in1`` to the interface, and what it receives there into ``out0``, ``out1``.

    device, source: options of net_virtio_user and of net_pcap.
    """
    if shutil.which("dpdk-testpmd") is None:
        pytest.skip("dpdk-testpmd is not installed")
    cpus = sorted(os.sched_getaffinity(0))
    files = ",".join(f"rx_pcap={directory}/in{queue},tx_pcap={directory}/out{queue}" for queue in range(queues))
    user = f"net_virtio_user0,path={socket},queues={queues},queue_size=1024,{device}"
    memory = ("--no-pci", "--no-huge", "-m", "512", "--no-shconf", "--no-telemetry")
    forward = ("--forward-mode=io", "--auto-start", "--no-flush-rx", "--stats-period=1000", "--total-num-mbufs=8192")
    return Process(
        "testpmd",
        [
            *("dpdk-testpmd", f"--lcores=0@{cpus[0]},1@{cpus[-1]}", *memory),
            *(f"--vdev=net_pcap0,{files},{source}", f"--vdev={user}"),
            *("--", *forward, "--nb-cores=1", f"--rxq={queues}", f"--txq={queues}", *options),
        ],
    )  # fmt: skip


async def come_back(frontend: Process, files: Sequence[Path], counts: Sequence[int]) -> list[list[bytes]]:
    """What is in the files as soon as there are so many frames; what there is if they do not come."""
    for _ in range(400):
        got = [read_capture(path) for path in files]
        if all(len(frames) >= count for frames, count in zip(got, counts, strict=True)):
            break
        if not frontend.running:
            raise LabError(f"testpmd ended: {' | '.join(frontend.output.entries)}")
        await asyncio.sleep(0.02)
    return got


async def through_the_loop(
    directory: Path,
    frames: Sequence[Sequence[bytes]],
    device: str,
    *options: str,
    source: str = "infinite_rx=0",
    least: int | None = None,
) -> tuple[list[list[bytes]], dict[str, str]]:
    """Sends the frames of each queue; what came back to each, all of them or ``least``, and what was negotiated."""
    for queue, some in enumerate(frames):
        write_capture(directory / f"in{queue}", some)
    socket, queues = directory / "socket", len(frames)
    command = vhostuser_net(socket, ["--end=loopback", f"--queue-pairs={queues}"])
    async with (
        BackendProcess("vhostuser-net", command, socket, network=True) as backend,
        dpdk(directory, socket, queues, device, source, options) as frontend,
    ):
        counts = [least or len(some) for some in frames]
        got = await come_back(frontend, [directory / f"out{queue}" for queue in range(queues)], counts)
        (connection,) = (await backend.state())["connections"]
        return got, {name: connection[name] for name in ("features", "protocol_features", "status")}


@pytest.mark.parametrize("packed", [0, 1], ids=["split", "packed"])
@pytest.mark.parametrize("mergeable", [0, 1], ids=["plain", "mergeable"])
@pytest.mark.parametrize("in_order", [0, 1], ids=["any-order", "in-order"])
async def test_every_frame_comes_back_as_it_was_sent(
    tmp_path: Path, packed: int, mergeable: int, in_order: int
) -> None:
    """Without mergeable buffers the longest frame has to fit into one. Two queues in every second case.

    It tells the device status where it can (STATUS), up to DRIVER_OK, without which no frame would have come back.
    """
    queues = 1 + (packed ^ mergeable ^ in_order)
    frames = [some_frames(queue) for queue in range(queues)]
    device = f"packed_vq={packed},mrg_rxbuf={mergeable},in_order={in_order}"
    got, agreed = await through_the_loop(tmp_path, frames, device, *() if mergeable else (LONG_BUFFERS,))
    assert [name in agreed["features"].split() for name in ("RING_PACKED", "IN_ORDER", "bit15")] == [
        packed,
        in_order,
        mergeable,
    ]
    assert "STATUS" in agreed["protocol_features"].split()
    assert agreed["status"] == "ACKNOWLEDGE|DRIVER|DRIVER_OK|FEATURES_OK"
    assert got == frames


@pytest.mark.parametrize("device", ["in_order=0", "in_order=1", "packed_vq=1,in_order=0", "packed_vq=1,in_order=1"])
async def test_rings_go_round_and_no_frame_is_another(tmp_path: Path, device: str) -> None:
    """The same frames again and again, some of which find a full ring: what comes is unharmed, and each does come."""
    frames = [ETHER + struct.pack("<I", number) + random.Random(number).randbytes(46) for number in range(97)]
    ((got,), _) = await through_the_loop(tmp_path, [frames], device, source="infinite_rx=1", least=10_000)
    assert len(got) >= 10_000, "ten times the ring"
    assert set(got) == set(frames)
